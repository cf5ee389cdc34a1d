"""The feeder: what the job believes of it, and what the feeder refuses."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from struct import Struct

import pytest
from conftest import ROOT, Project, experiment

MESSAGE = Struct("<cQd")


def feed_by(project: Project, script: str) -> None:
    """Have a shell script for a feeder, which says what it says at once, and a training of a second."""
    project.write("feeder.sh", script)
    project.patch("pyproject.toml", "measure = ", 'feed = "sh feeder.sh"\nmeasure = ')
    project.patch("train.py", "import os\n", "import os, time\ntime.sleep(1)\n")
    project.patch(
        "train.py", 'open(os.environ["AUTORESEARCH_MODEL"], "w")', "open(os.devnull, 'w')"
    )
    project.patch("pyproject.toml", 'guard = "python prepare.py --judge"\n', "")
    project.git("add", "--all")
    project.git(
        "-c", "user.name=P", "-c", "user.email=p@example.org", "commit", "--quiet", "-mfeed"
    )


def saying(**facts: object) -> str:
    return f"echo '{json.dumps(facts)}' >&2\n"


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        (saying(trouble="the disk is gone"), 1, "error: the disk is gone"),
        (saying(crash="its last step took 99 s"), 1, "its last step took 99 s"),
        ("echo 'KeyError: 1' >&2; exit 1", 1, "the feeder failed: KeyError: 1"),
        (saying(num_steps=1), 1, "handed in no weights"),
    ],
)
def test_what_it_says_is_the_reason(project: Project, script: str, code: int, said: str) -> None:
    feed_by(project, script)
    assert said in project.research("echo nothing", code=code)


def test_its_numbers_count(project: Project) -> None:
    warning = "echo 'a warning' >&2; "
    feed_by(project, warning + saying(num_steps=7, training_seconds=1.5, weights_MB=0.1))
    project.research("sed -i 's/^VAL_BPB = .*/VAL_BPB = 0.9/' train.py; echo lower")
    run = experiment(project, 1)
    assert (run.verdict, run.facts["steps"], run.facts["training_seconds"]) == ("keep", 7.0, 1.5)


def test_a_run_that_is_quiet(impatient: Project) -> None:
    impatient.pace(quiet=1.0)
    feed_by(impatient, saying(num_steps=1) + "sleep 60\n")
    impatient.patch("train.py", "time.sleep(1)", "time.sleep(60)")
    impatient.git("-c", "user.name=P", "-c", "user.email=p@e.org", "commit", "-qam", "sleep")
    assert "since no step was finished in 1 s" in impatient.research("echo nothing", code=1)


class Client:
    """The run's end of the real feeder, by hand."""

    def __init__(self, model: Path | None = None):
        env = {**os.environ, **({"AUTORESEARCH_MODEL": str(model)} if model else {})}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt.feed"],
            cwd=ROOT,
            env=env,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
        )
        self.hello = json.loads(self.read()[1])

    def ask(
        self, kind: bytes, size: int = 0, seconds: float = 0.0, content: bytes = b""
    ) -> tuple[bytes, bytes]:
        self.process.stdin.write(MESSAGE.pack(kind, size, seconds) + content)
        self.process.stdin.flush()
        return self.read()

    def read(self) -> tuple[bytes, bytes]:
        kind, size, _ = MESSAGE.unpack(self.process.stdout.read(MESSAGE.size))
        return kind, self.process.stdout.read(size)

    def facts(self) -> dict[str, object]:
        """The last thing that it told the job."""
        *_, last = self.process.communicate()[1].splitlines()
        return json.loads(last)


GRAPH = b"{}"


def test_in_order(cache: Path, tmp_path: Path) -> None:
    """Graph, batches until the budget is spent, weights, validation rows; and what the job hears."""
    client = Client(tmp_path)
    assert client.hello["name"] == "demo" and len(client.hello["lengths"][0]) == 1024
    assert client.ask(b"o", 2) == (b"o", b"")
    assert client.ask(b"g", len(GRAPH), content=GRAPH) == (b"g", b"")
    kind, batch = client.ask(b"b")
    assert kind == b"b" and len(batch) == 2 * 257 * 2
    assert client.ask(b"b", seconds=14.9)[0] == b"b"
    assert client.ask(b"b", seconds=15.1) == (b"e", b"")
    assert client.ask(b"b", seconds=0.0) == (b"e", b"")  # the budget stays spent
    assert client.ask(b"w", 16, content=b"0123456789abcdef") == (b"w", b"")
    kind, rows = client.ask(b"v")
    assert kind == b"v" and len(rows) == 256 * 257 * 2
    facts = client.facts()
    assert (facts["num_steps"], facts["training_seconds"]) == (2, 15.1)
    assert facts["weights_MB"] == 16e-6 and facts["total_tokens_M"] == 2 * 512e-6
    assert (tmp_path / "graph.json").read_bytes() == GRAPH
    assert (tmp_path / "weights.bin").read_bytes() == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([(b"b", 0, b"")], "the model was not registered before the first batch"),
        ([(b"o", 2, b""), (b"b", 0, b"")], "the model was not registered before the first"),
        ([(b"o", 2, b""), (b"o", 2, b"")], "a second TrainLoader was opened"),
        ([(b"o", 2**40, b"")], "more than 16777216"),
        ([(b"o", 0, b"")], "has no tokens"),
        ([(b"g", 2**40, b"")], "the model's graph has"),
        ([(b"v", 0, b"")], "validation rows were asked for before the weights"),
        ([(b"w", 16, b"")], "before the budget was spent"),
        ([(b"?", 0, b"")], "it spoke to the feeder itself"),
    ],
)
def test_refused(cache: Path, requests: list[tuple[bytes, int, bytes]], reason: str) -> None:
    client = Client()
    *_, (kind, said) = [client.ask(kind, size, content=text) for kind, size, text in requests]
    assert kind == b"x" and reason in said.decode()
    assert reason in client.facts()["crash"] and client.process.returncode == 1


def registered() -> Client:
    client = Client()
    client.ask(b"o", 2)
    client.ask(b"g", len(GRAPH), content=GRAPH)
    assert client.ask(b"b")[0] == b"b"
    return client


def test_finish_after_a_loop_of_ones_own(cache: Path) -> None:
    """It stopped drawing when the budget was spent, and never heard that it was."""
    client = registered()
    assert client.ask(b"w", 16, 15.1, content=bytes(16))[0] == b"w"
    assert client.facts()["training_seconds"] == 15.1


@pytest.mark.parametrize("counted", [float("inf"), float("nan"), -1.0])
def test_no_number_of_seconds(cache: Path, counted: float) -> None:
    client = registered()
    assert b"its counted work went from 0 to" in client.ask(b"b", 0, counted)[1]
    client.facts()


def test_a_batch_that_is_left_unread_is_time_of_the_step(cache: Path) -> None:
    """It would be training time on no clock: the feeder waits in its write meanwhile."""
    client = Client()
    fcntl.fcntl(client.process.stdout.fileno(), 1031, 4096)  # F_SETPIPE_SZ
    client.ask(b"o", 64)
    client.ask(b"g", len(GRAPH), content=GRAPH)
    for _ in range(4):
        client.ask(b"b")
    client.process.stdin.write(MESSAGE.pack(b"b", 0, 1.0))
    client.process.stdin.flush()
    time.sleep(7)
    client.read()
    assert b"its last step took 7." in client.ask(b"b", seconds=15.1)[1]
    client.facts()


def test_late_weights(cache: Path) -> None:
    client = Client()
    client.ask(b"o", 2)
    client.ask(b"g", len(GRAPH), content=GRAPH)
    client.ask(b"b")
    assert client.ask(b"b", seconds=15.1)[0] == b"e"
    time.sleep(6)
    assert b"s after the budget was spent" in client.ask(b"w", 16, content=bytes(16))[1]
    client.facts()
