"""The run's end of the feeder's pipes; gpt/feed.py is the other one."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase
from pathlib import Path
from typing import Any

from gpt.arena import Arena, fail, from_environment
from gpt.feed import F_SETPIPE_SZ, MESSAGE, PIPE

FEEDER = [sys.executable, "-m", "gpt.feed"]
ROOT = Path(__file__).parent.parent


class Feed:
    """Asks the feeder that the driver started: AUTORESEARCH_FEED has our ends of its pipes. Whoever
    runs train.py by hand gets one of their own."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.replies: Any
        self.requests: Any
        if "AUTORESEARCH_FEED" in os.environ:
            replies, requests = map(int, os.environ["AUTORESEARCH_FEED"].split(","))
            self.replies, self.requests = os.fdopen(replies, "rb", 0), os.fdopen(requests, "wb", 0)
        else:
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            env = {name: text for name, text in os.environ.items() if name != "AUTORESEARCH_MODEL"}
            self.process = subprocess.Popen(
                FEEDER, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=nowhere, bufsize=0
            )
            self.replies, self.requests = self.process.stdout, self.process.stdin
        with suppress(OSError):
            fcntl.fcntl(self.requests.fileno(), F_SETPIPE_SZ, PIPE)
        self.facts = json.loads(self.read())
        # bytes of each token, exact and as upstream has them
        self.lengths: tuple[list[int], list[int]] = self.facts.pop("lengths")

    def ask(
        self,
        kind: bytes,
        size: int = 0,
        seconds: float = 0.0,
        send: Callable[[RawIOBase], object] = id,
    ) -> bytearray:
        """Send a request, and what `send` writes after it; return the content of the reply."""
        with suppress(BrokenPipeError):  # it has said why
            self.requests.write(MESSAGE.pack(kind, size, seconds))
            send(self.requests)
        return self.read()

    def read(self) -> bytearray:
        """The next reply, which is empty at the end of the budget; SystemExit where it is a
        refusal, or the feeder is gone."""
        kind, size, self.seconds = MESSAGE.unpack(self.receive(MESSAGE.size))
        content = self.receive(size)
        if kind == b"x":
            fail(content.decode())
        return content

    def receive(self, size: int) -> bytearray:
        content = bytearray(size)
        view = memoryview(content)
        while view:
            if not (count := self.replies.readinto(view)):
                fail("the feeder has ended")
            view = view[count:]
        return content

    def close(self) -> None:
        """End a feeder that was started here."""
        self.requests.close()
        self.replies.close()
        if self.process:
            self.process.wait()


def connect() -> tuple[Feed | None, Arena]:
    """The driver's feeder, which knows the arena that is hidden from us; by hand, the loader starts
    one. Programs that this one starts know the arena, and have no feeder."""
    if told := os.environ.get("AUTORESEARCH_FACTS"):
        return None, Arena(**json.loads(told))
    if "AUTORESEARCH_FEED" not in os.environ:
        return None, from_environment()
    try:
        feed = Feed()
    except (ValueError, OSError):
        fail("AUTORESEARCH_FEED is for the driver to set: unset it")
    del os.environ["AUTORESEARCH_FEED"]
    os.environ["AUTORESEARCH_FACTS"] = json.dumps(feed.facts)
    return feed, Arena(**feed.facts)
