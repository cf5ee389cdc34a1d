"""The feeder of a run: what the task's `feed` starts, outside of the sandbox."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from autoresearch.files import UserError, one_line
from autoresearch.pace import PACE


class Feed:
    """A process that hands data to a run by two pipes, and owns clock and count; or none, where the
    task names none.

    Standard error is for the job, a JSON object a line: numbers, which are believed where the run
    prints others; `crash`, the reason that the run has to end; `trouble`, which is not its fault.
    `startup`: seconds that may pass before the first step.
    """

    def __init__(self, line: str, tree: Path, env: Mapping[str, str], startup: float) -> None:
        self.startup = startup
        self.facts: dict[str, float] = {}
        self.crash = ""
        self.pipes: tuple[int, ...] = ()  # the run's ends
        self.process: subprocess.Popen[bytes] | None = None
        if not line:
            return
        theirs, requests = os.pipe()
        replies, answers = os.pipe()
        self.pipes = (replies, requests)
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", line], cwd=tree, env={**env, "PWD": str(tree)},
            stdin=theirs, stdout=answers, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        assert self.process.stderr
        self.said = self.process.stderr
        os.set_blocking(self.said.fileno(), False)
        self.rest, self.noise = b"", ""
        self.heard = time.monotonic()

    @property
    def names(self) -> dict[str, str]:
        """What the run's environment tells of it."""
        return {"AUTORESEARCH_FEED": ",".join(map(str, self.pipes))} if self.pipes else {}

    def close(self) -> None:
        for pipe in self.pipes:
            os.close(pipe)
        if self.process:
            self.said.close()
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def expect_weights(self) -> None:
        """ValueError where a run handed in none."""
        if self.process and "weights_MB" not in self.facts:
            raise ValueError("handed in no weights: finish was not called, or not ours")

    def look(self) -> str:
        """Hear what it says; returns why the run has to end, if it has. UserError for trouble."""
        if not self.process:
            return ""
        now = time.monotonic()
        with suppress(BlockingIOError):
            while block := os.read(self.said.fileno(), 2**16):
                self.rest += block
                self.heard = now
        *lines, self.rest = self.rest.split(b"\n")
        for line in filter(None, lines):
            self.hear(line.decode(errors="replace"))
        if self.process.poll() and not self.crash:
            self.crash = f"the feeder failed: {self.noise}"
        training = "num_steps" in self.facts
        patience = PACE.quiet if training else self.startup
        if "training_seconds" not in self.facts and now - self.heard > patience:
            return self.crash or f"since no step was finished in {patience:g} s"
        return self.crash

    def hear(self, line: str) -> None:
        try:
            told = json.loads(line)
            self.crash = told.pop("crash", self.crash)
            if "trouble" in told:
                raise UserError(told["trouble"])
            self.facts |= {name: value for name, value in told.items() if math.isfinite(value)}
        except (ValueError, TypeError, AttributeError):  # a warning, or a traceback
            self.noise = one_line(line)
