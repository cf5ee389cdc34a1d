"""Jobs: an agent's call or a run, each a process of its own with a folder."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from autoresearch.files import CODE, STOPS, remove, uninterrupted, write_whole
from autoresearch.pace import PACE

# In the folder: the order, the result, and our own errors
SPEC, OUTCOME, LOG = "job.json", "outcome.json", "job.log"


def wait(process: subprocess.Popen[bytes], seconds: float | None = None) -> bool:
    """Wait for a child, at most so many seconds, without polling; whether it has ended."""
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            select.select([pidfd], [], [], seconds)
        finally:
            os.close(pidfd)
    return process.poll() is not None


def start_keeper() -> subprocess.Popen[bytes]:
    """Start a `python -m autoresearch.jobs`, which loads its modules and waits for an order."""
    return subprocess.Popen(
        # -S: it needs no installed package, and starts sooner
        [sys.executable, "-S", "-m", "autoresearch.jobs"],
        cwd=CODE,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


class Job:
    """A keeper that has its order, and keeps all processes of the job.

    Only its outcome counts, a file that is there whole or not at all: without one the job is lost.
    """

    idle: ClassVar[subprocess.Popen[bytes] | None] = None  # for the next job: loading takes a while

    def __init__(self, folder: Path, spec: Mapping[str, Any], env: Mapping[str, str]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SPEC, OUTCOME, LOG):  # an agent or a run may have put anything there
            remove(folder / name)
        write_whole(folder / SPEC, json.dumps({**spec, "driver": os.getpid()}, default=str))
        order = json.dumps({"folder": str(folder), "env": dict(env)})
        with uninterrupted():
            self.process, Job.idle = Job.idle or start_keeper(), None
            if self.process.poll() is not None:
                self.process = start_keeper()
            with suppress(BrokenPipeError), self.process.stdin as pipe:  # type: ignore[union-attr]
                pipe.write(order.encode())  # one that has just been killed makes a lost job
            Job.idle = start_keeper()
            if signal.sigpending() & {*STOPS}:  # or it would run on until the driver has ended
                self.stop()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so many seconds; whether it has ended."""
        return wait(self.process, seconds)

    def result(self) -> dict[str, Any] | None:
        """Wait for its end, which comes at once if this is interrupted, and return its outcome."""
        try:
            self.wait()
        finally:
            self.stop()
        return self.outcome()

    def outcome(self) -> dict[str, Any] | None:
        """None for a lost job: the file beside a keeper that failed is not the keeper's."""
        if self.process.returncode:
            return None
        outcome: dict[str, Any] = json.loads((self.folder / OUTCOME).read_text(encoding="utf-8"))
        return outcome

    def stop(self) -> None:
        """End it and all that it started. One that has ended stays ended."""
        with uninterrupted():
            for signum in (signal.SIGTERM, signal.SIGCONT):  # a stopped one has to wake up first
                self.process.send_signal(signum)
            if not self.wait(4 * PACE.grace):
                self.process.kill()
                self.process.wait()


def dismiss_idle() -> None:
    """End the keeper that waits for an order."""
    if Job.idle:
        Job.idle.communicate()  # the end of its input is the end of it
        Job.idle = None
