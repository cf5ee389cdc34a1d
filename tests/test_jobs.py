"""The process around each job: whatever it started is gone when it ends, and jobs leave each other alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

from autoresearch.jobs import Job
from autoresearch.jobs.keeper import Exit

LEAVE = [
    "setsid env -i {nap} &",  # another session, and nothing in its environment
    "(setsid env -i sh -c '{nap} & {nap}' &) ; sleep 0.2",  # orphaned twice
    "trap '' INT TERM HUP; {nap} & {nap} &",
]


def start(folder: Path, script: str, limit: float = 20.0, **pace: str) -> Job:
    folder.mkdir(exist_ok=True)
    spec = {
        "kind": "call", "command": ["/bin/sh", "-c", script], "cwd": str(folder), "limit": limit,
        "stdin": os.devnull, "out": str(folder / "out"), "err": str(folder / "err"), "alive": str(folder / "alive"),
    }  # fmt: skip
    return Job(folder, spec, {"PATH": "/usr/bin:/bin", **pace})


def ended(job: Job) -> Exit:
    found = job.result()
    assert found is not None
    return Exit(**found)


def running(nap: str) -> bool:
    return subprocess.run(["pgrep", "--full", nap], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("leave", LEAVE)
def test_nothing_is_left_at_the_end(tmp_path: Path, leave: str) -> None:
    nap = f"sleep 999.{time.monotonic_ns()}"
    job = start(tmp_path, f"{leave.format(nap=nap)}\nfor i in 1 2 3; do echo started; done; exit 3")
    assert ended(job).code == 3 and not running(nap)
    assert (tmp_path / "out").read_text() == "started\n" * 3


@pytest.mark.parametrize("leave", LEAVE)
def test_nothing_is_left_at_the_limit(tmp_path: Path, leave: str) -> None:
    nap = f"sleep 999.{time.monotonic_ns()}"
    exit = ended(
        start(
            tmp_path,
            f"{leave.format(nap=nap)}\nsleep 1000",
            0.5,
            AUTORESEARCH_PACE='{"grace": 0.2}',
        )
    )
    assert exit.code is None and exit.why == "at the limit of 0.5 s" and not running(nap)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("killed", ["the driver", "the command"])
def test_nothing_is_left_after_a_kill(tmp_path: Path, leave: str, killed: str) -> None:
    """SIGKILL, without namespaces, and nobody is there to start the driver again."""
    nap = f"sleep 999.{time.monotonic_ns()}"
    script = f"{leave.format(nap=nap)}\n sleep 0.3; echo $$ > pid.new; mv pid.new pid; sleep 1000"
    job = f"start(Path({str(tmp_path)!r}), {script!r}).result()"
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom test_jobs import *; {job}"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_for((tmp_path / "pid").exists)
        assert running(nap)
        os.kill(
            driver.pid if killed == "the driver" else int((tmp_path / "pid").read_text()),
            signal.SIGKILL,
        )
        wait_for(lambda: not running(nap), seconds=10)
        assert driver.wait(timeout=10) == (-signal.SIGKILL if killed == "the driver" else 0)
    finally:
        driver.kill()
        driver.wait()


def test_jobs_side_by_side(tmp_path: Path) -> None:
    """One ends, one is stopped, and the third goes on."""
    jobs = [start(tmp_path / name, "sleep 0.2; sleep 1.5; echo done") for name in "abc"]
    short = start(tmp_path / "d", "true")
    assert ended(short).code == 0
    jobs[0].stop()
    assert jobs[0].outcome() is None
    assert [ended(job).code for job in jobs[1:]] == [0, 0]
    assert (tmp_path / "b/out").read_text() == "done\n"


def test_a_last_word(tmp_path: Path) -> None:
    exit = ended(
        start(tmp_path, "trap 'echo cost: 3; exit 0' INT; while :; do sleep 0.1; done", 0.5)
    )
    assert exit.code is None and (tmp_path / "out").read_text() == "cost: 3\n"


def test_one_that_will_not_hear(tmp_path: Path) -> None:
    exit = ended(
        start(
            tmp_path,
            "trap '' INT TERM; while :; do sleep 0.1; done",
            0.5,
            AUTORESEARCH_PACE='{"grace": 0.3}',
        )
    )
    assert exit.code is None


def test_a_job_that_is_killed_is_lost(tmp_path: Path) -> None:
    job = start(tmp_path, "sleep 1000")
    wait_for((tmp_path / "out").exists)
    job.process.kill()
    assert job.result() is None


def test_an_outcome_that_the_command_writes_itself(tmp_path: Path) -> None:
    """Whatever it puts in the place of the keeper's files counts for nothing, and stands in no later job's way."""
    for put in ("mkdir", "mkfifo"):
        for name in ("outcome.json", "outcome.json.new", "job.json.new", "job.log", "out", "err"):
            job = start(
                tmp_path,
                f'echo \'{{"code": 0, "seconds": 9}}\' > outcome.json; rm -rf {name}; {put} {name}; exit 3',
            )
            assert ended(job).code == 3
    assert ended(start(tmp_path, "true")).code == 0


def test_stopped_at_once(tmp_path: Path) -> None:
    """Also in the instant in which the command is started."""
    nap = f"sleep 999.{time.monotonic_ns()}"
    for i in range(12):
        job = start(tmp_path, f"{nap} & {nap}")
        time.sleep(0.04 + 0.004 * i)
        job.stop()
        assert not running(nap)


def test_a_keeper_that_was_stopped_ends_all_the_same(tmp_path: Path) -> None:
    job = start(tmp_path, "kill -STOP $PPID; touch done; sleep 1000")
    wait_for((tmp_path / "done").exists)
    job.stop()
    assert job.outcome() is None


def test_no_such_command(tmp_path: Path) -> None:
    spec = {"kind": "call", "command": ["/no/such"], "cwd": "/", "limit": 1, "stdin": os.devnull}
    spec |= {name: str(tmp_path / name) for name in ("out", "err", "alive")}
    assert Job(tmp_path, spec, os.environ).result() == {"not_started": "No such file or directory"}
