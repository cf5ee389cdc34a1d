"""Jobs: whatever takes long is a process of its own with a folder. An agent's call is one, and a run is one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from autoresearch.files import remove, uninterrupted, write_whole
from autoresearch.pace import PACE

SPEC, OUTCOME, LOG = "job.json", "outcome.json", "job.log"  # in the folder: what to do, what came of it, errors of ours
CODE = Path(__file__).resolve().parent.parent.parent  # where `autoresearch` is imported from


class Job:
    """A job that was started: `python -m autoresearch.jobs FOLDER`, which keeps all processes of it.

    Only its outcome counts, which is there whole or not at all: a job that ended without one is lost.
    """

    def __init__(self, folder: Path, spec: Mapping[str, Any], env: Mapping[str, str]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in (SPEC, OUTCOME, LOG):  # an agent or a run may have put anything there
            remove(folder / name)
        write_whole(folder / SPEC, json.dumps({**spec, "driver": os.getpid()}))
        with (folder / LOG).open("wb") as log, uninterrupted():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autoresearch.jobs", str(folder)],
                cwd=CODE, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for its end, at most so many seconds; whether it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def result(self) -> dict[str, Any] | None:
        """Wait for its end, which comes at once if this is interrupted, and return its outcome."""
        try:
            self.wait()
        finally:
            self.stop()
        return self.outcome()

    def outcome(self) -> dict[str, Any] | None:
        """What came of it; None for a job that was lost. What lies there when the keeper failed is not from it."""
        if self.process.returncode:
            return None
        outcome: dict[str, Any] = json.loads((self.folder / OUTCOME).read_text(encoding="utf-8"))
        return outcome

    def stop(self) -> None:
        """End it and all that it started. One that has ended stays ended."""
        with uninterrupted():
            for signum in (signal.SIGTERM, signal.SIGCONT):  # somebody may have stopped it
                self.process.send_signal(signum)
            if not self.wait(4 * PACE.grace):
                self.process.kill()
                self.process.wait()
