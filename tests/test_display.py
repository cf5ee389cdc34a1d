"""What a person sees: the view at a fixed width, in a real terminal, without one, and from another process."""

import fcntl
import io
import json
import os
import signal
import struct
import subprocess
import termios
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import Project, wait_for
from rich.console import Console
from test_prompt import night

from autoresearch.ideas import Usage
from autoresearch.journal.experiment import Experiment
from autoresearch.task import Arena, Machine, Progress
from autoresearch.view import events, figures, status, terminal
from autoresearch.view.status import Status, update

BETTER = "sed -i 's/^VAL_BPB = [0-9.]*/VAL_BPB = 0.9/' train.py; echo lower the score"
START = datetime(2026, 11, 24, 22, tzinfo=UTC)


def timed(history: list[Experiment], seconds: float = 360.0) -> tuple[Experiment, ...]:
    """The same, one after the other."""
    stamps = ((START + timedelta(seconds=seconds * i)).isoformat() for i in range(len(history)))
    return tuple(replace(e, finished=stamp) for e, stamp in zip(history, stamps, strict=True))


def started(history: tuple[Experiment, ...]) -> events.Started:
    machine = Machine("NVIDIA H100", "600.1", "2.15")
    arena = Arena("climbmix", 300.0, "d", Path("/cache/climbmix"))
    return events.Started("nov23", "claude", arena, machine, history, 900.0, "")


def shown(now: Status, progress: Progress | None, at: float, width: int = 80) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(terminal.render(now, progress, at))
    return captured.get().splitlines()


def test_the_view_at_80_columns() -> None:
    history = timed(
        [replace(e, description=f"an idea that gains {e.number}", crash="") for e in night(40)]
    )
    now = update(Status("nov23"), started(history), 1000.0)
    now = update(now, events.Training(40, "halve the batch"), 1010.0)
    lines = shown(now, Progress(42.0, 3.2145, 81_000.0), 1150.0)
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].rstrip() == "nov23  climbmix, 300 s each · NVIDIA H100 · claude"
    assert lines[1].startswith(
        "best 0.987000  baseline 1.000000  -0.013000 (-1.30%)  experiment 38: an idea th…"
    )
    assert lines[2].rstrip() == "39 experiments: 13 kept, 22 discarded, 4 crashed, 10.0 an hour"
    assert lines[3].startswith("time: agent 6%, start-up")
    assert lines[4].startswith("█") and lines[4].rstrip().endswith("▁  best so far")
    text = "\n".join(line.rstrip() for line in lines)
    assert (
        "0040 running: halve the batch" in text and "42% loss 3.215  81k tok/s  2:54 left" in text
    )
    rows = [line.split()[:2] for line in lines[-10:]]
    assert [int(number) for number, _ in rows] == list(range(39, 29, -1))


@pytest.mark.parametrize("width", [20, 40, 200])
def test_any_width(width: int) -> None:
    history = timed(night(3))
    now = update(update(Status("nov23"), started(history), 0.0), events.Asking(3, 0), 5.0)
    assert all(len(line) <= width for line in shown(now, None, 41.0, width))
    assert any("asking claude" in line or width == 20 for line in shown(now, None, 41.0, width))


@pytest.mark.parametrize(
    ("happened", "words"),
    [
        ([events.Preparing("climbmix")], "preparing the arena climbmix"),
        ([events.Asking(7, 2)], "0007 asking claude for repair 2 of: "),
        ([events.Asking(7, 0)], "0:41 of 15:00 at most"),
        ([events.Training(7, "an idea")], "starting, 0:41"),
        (
            [events.Training(7, "an idea"), events.Guarding(7, 0.9)],
            "0007 the guard looks at it: an idea",
        ),
        ([events.Waiting("usage limit", datetime.fromtimestamp(200, UTC))], "usage limit"),
        (
            [events.Stopped("8 hours are over", 3, None, 4.5)],
            "stopped: 8 hours are over; $4.50 spent",
        ),
    ],
)
def test_phases(happened: list[events.Event], words: str) -> None:
    now = update(Status("nov23"), started(timed(night(2))), 0.0)
    for event in happened:
        now = update(now, event, 100.0)
    assert words in "\n".join(shown(now, None, 141.0))


def test_an_escape_in_a_description_is_no_markup() -> None:
    odd = replace(night(1)[0], description="[bold]x[/] :smile: [link=http://a]")
    now = update(Status("nov23"), started(timed([odd, *night(2)[1:]])), 0.0)
    assert "[bold]x[/] :smile: [link=http://a]" in "\n".join(shown(now, None, 0.0, 120))


def test_figures_of_a_night() -> None:
    """Where the time went, what it cost, and how many an hour, over a pause of eight hours in the middle."""
    history = [
        replace(e, usage=Usage(60.0, cost_usd=0.5 if e.number else 0.0), facts={
            "run_seconds": 330.0, "training_seconds": 300.0, "evaluation_seconds": 10.0, "gpu_usd_per_hour": 2.0,
        })
        for e in night(9) if e.verdict != "crash"
    ]  # fmt: skip
    first, second = timed(history[:4], 392.0), timed(history[4:], 392.0)
    later = [
        replace(e, finished=(datetime.fromisoformat(e.finished) + timedelta(hours=8)).isoformat())
        for e in second
    ]
    found = figures.figures([*first, *later])
    assert found is not None
    n = len(history)
    assert found.seconds == pytest.approx(
        {
            "agent": 60 * n,
            "start-up": 20 * n,
            "training": 300 * n,
            "evaluation": 10 * n,
            "crashed": 0,
            "own": 2.0 * (n - 2),
        }
    )
    assert found.hourly == pytest.approx(3600 / 392)
    assert found.agent_dollars == 0.5 * (n - 1) and found.gpu_dollars == pytest.approx(
        2.0 * n * 390 / 3600
    )
    assert not found.at_least


# --- in a terminal, in a pipe, from outside


def in_a_terminal(project: Project, agent: str, *args: str) -> tuple[subprocess.Popen[bytes], int]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = project.command(
        "--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=1", *args
    )
    driver = subprocess.Popen(
        ["setsid", "--ctty", *command],
        cwd=project.root,
        env=project.env | {"TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    return driver, ours


def read_all(terminal: int) -> str:
    said = b""
    while True:
        try:
            said += os.read(terminal, 2**16)
        except OSError:  # the other side is closed
            os.close(terminal)
            return said.decode()


def test_a_terminal_has_the_live_view_and_keeps_a_summary(project: Project) -> None:
    driver, terminal = in_a_terminal(project, f"sleep 1; {BETTER}")
    wait_for((project.root / "runs/t/0001/prompt-0.md").exists)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 9, 31, 0, 0))  # while it is shown
    said = read_all(terminal)
    assert driver.wait(timeout=30) == 0
    live, summary = said.split("\x1b[?1049l")  # the alternate screen is left
    assert "\x1b[?1049h" in live and "asking" in live
    assert "best 0.900000" in summary and "stopped" in summary and "Traceback" not in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_leaving_gives_the_terminal_back(project: Project, signum: signal.Signals) -> None:
    driver, terminal = in_a_terminal(project, "sleep 1000")
    wait_for((project.root / "runs/t/0001/prompt-0.md").exists)
    driver.send_signal(signum)
    said = read_all(terminal)
    assert driver.wait(timeout=30) == 130
    assert said.count("\x1b[?1049h") == said.count("\x1b[?1049l") == 1
    assert "stopped: interrupted" in said.split("\x1b[?1049l")[1] and "Traceback" not in said
    project.check()


def test_what_happens_besides_is_seen_in_the_live_view(impatient: Project) -> None:
    driver, terminal = in_a_terminal(
        impatient, f"if mkdir {impatient.root.parent}/ready; then exit 3; fi; {BETTER}"
    )
    said = read_all(terminal)
    assert driver.wait(timeout=30) == 0
    assert "no experiment: exit code 3" in said.split("\x1b[?1049l")[1]


def test_a_pipe_has_no_live_view_whatever_the_environment(project: Project) -> None:
    project.env["FORCE_COLOR"] = project.env["TTY_COMPATIBLE"] = "1"
    assert "\x1b[?1049h" not in project.research(BETTER)


def test_plain_in_a_terminal(project: Project) -> None:
    driver, terminal = in_a_terminal(project, BETTER, "--plain")
    said = read_all(terminal)
    assert driver.wait(timeout=30) == 0
    assert "\x1b[?1049h" not in said and "0001 keep    0.900000 (-0.100000) lower the score" in said


def test_status_of_a_run_that_runs_ends_or_dies(project: Project) -> None:
    go = project.root.parent / "go"
    driver = project.start(f"while [ ! -e {go} ]; do sleep 0.02; done; {BETTER}")
    wait_for((project.root / "runs/t/0001/prompt-0.md").exists)
    said = project.loop("status")
    assert "0001 asking while [ ! -e" in said and f"running, process {driver.pid}" in said
    go.touch()
    assert driver.wait(timeout=30) == 0
    said = project.loop("status", "--tag=t")
    assert (
        "not running" in said
        and "stopped: 1 experiment done" in said
        and "1 experiment: 1 kept" in said
    )
    go.unlink()
    driver = project.start(f"while [ ! -e {go} ]; do sleep 0.02; done; {BETTER}")
    wait_for((project.root / "runs/t/0002/prompt-0.md").exists)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    go.touch()  # or the agent, which nobody is left to end, would wait for ever
    assert "the driver ended without a word" in project.loop("status")
    facts = json.loads(project.loop("status", "--json"))
    assert (
        facts["state"] == "died"
        and facts["phase"]["name"] == "asking"
        and facts["phase"]["number"] == 2
    )
    assert facts["figures"]["kept"] == 1 and facts["experiments"][1]["score"] == 0.9


def test_status_before_there_is_a_baseline(project: Project) -> None:
    """Without a tag, the run that is at it is found."""
    go = project.root / "runs/t/0000/tmp/go"
    train = (project.root / "train.py").read_text()
    project.write(
        "train.py",
        f"import os, time\nwhile not os.path.exists(os.environ['TMPDIR'] + '/go'): time.sleep(0.02)\n{train}",
    )
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "slow")
    driver = project.start("true", experiments=0)
    wait_for((project.root / "runs/t/0000/run.log").exists)
    said = project.loop("status")
    assert "0000 running: baseline" in said and "no baseline yet" in said
    assert "has no baseline yet" in project.loop("prompt", code=1)
    go.touch()
    assert driver.wait(timeout=30) == 0


def test_what_is_written_down_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    status.save(replace(update(Status("t"), started(()), 0.0), budget=7.0), path)
    good = path.read_text()
    assert status.load(path, "t", ()).budget == 7.0
    for text in (
        "",
        "{",
        '{"tag": "t"}',
        '{"phase": 3}',
        "[]",
        '{"phase": {"name": "asking", "odd": 1}}',
        good[:-9],
    ):
        path.write_text(text)
        assert status.load(path, "t", timed(night(2))).arena == "climbmix"


def test_the_prompt_into_a_pipe_that_closes(project: Project) -> None:
    project.research("true", experiments=0)
    command = " ".join(project.command("prompt", "--tag=t"))
    done = subprocess.run(
        ["sh", "-c", f"{command} | head -c 10"],
        cwd=project.root,
        env=project.env,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
