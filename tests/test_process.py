"""Whatever a process starts is gone when it returns; and at its limit it may say a last word."""

import subprocess
import time
from pathlib import Path

import pytest

from autoresearch import process
from autoresearch.pace import Pace


def run(tmp_path: Path, script: str, limit: float = 20.0, politely: bool = False) -> tuple[process.Exit, str]:
    out = tmp_path / "out"
    env = {"PATH": "/usr/bin:/bin"}
    ended = process.run(
        ["/bin/sh", "-c", script], cwd=tmp_path, env=env, limit=limit, mark=tmp_path, out=out, politely=politely
    )
    return ended, out.read_text()


@pytest.mark.parametrize(
    "leave",
    [
        "setsid env -i {nap} &",  # another session, and no mark in its environment
        "(setsid env -i sh -c '{nap} & {nap}' &) ; sleep 0.2",  # orphaned twice
        "trap '' INT TERM HUP; {nap} & {nap} &",
    ],
)
def test_nothing_is_left(tmp_path: Path, leave: str) -> None:
    nap, before = f"sleep 999.{time.monotonic_ns()}", process.descendants()  # of other tests
    # a child of ours that is none of the run's, nor are those that it has meanwhile
    bystander = subprocess.Popen(["/bin/sh", "-c", f"while [ ! -e {tmp_path}/go ] && sleep 0.02; do :; done"])
    try:
        ended, _ = run(tmp_path, f"{leave.format(nap=nap)}\necho started")
        assert ended.code == 0
        assert subprocess.run(["pgrep", "--full", nap], capture_output=True, text=True).stdout == ""
        assert not process.descendants(before | {bystander.pid})  # no zombies either
        assert bystander.poll() is None
    finally:
        (tmp_path / "go").touch()
        bystander.wait()


def test_a_last_word(tmp_path: Path) -> None:
    ended, said = run(tmp_path, "trap 'echo cost: 3; exit 0' INT; while :; do sleep 0.1; done", 0.5, politely=True)
    assert (ended.code, said) == (None, "cost: 3\n")


def test_one_that_will_not_hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PACE", Pace(grace=0.3))
    before = process.descendants()
    ended, _ = run(tmp_path, "trap '' INT TERM; while :; do sleep 0.1; done", 0.5, politely=True)
    assert ended.code is None and not process.descendants(before)
