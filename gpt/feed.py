"""The feeder: outside of a run's sandbox, it alone opens the text, and owns clock and count.

    python -m gpt.feed      requests come by standard input, replies go by standard output

In this order: it takes the model's graph, hands out batches from the first one that is asked for
until the budget is spent, takes the weights, and hands out the validation rows. What it has seen it
tells the job on standard error, a JSON object a line. prepare.Feed is the other end.
"""

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from statistics import median
from struct import Struct
from typing import BinaryIO, cast

import numpy as np

from autoresearch.files import UserError, one_line
from gpt.arena import Arena, from_environment, read_manifest
from gpt.pack import Documents, Packer
from gpt.tokenizer import Tokenizer

# kind, size, seconds: of training in a reply, of counted work in a request
MESSAGE = Struct("<cQd")
F_SETPIPE_SZ, PIPE = 1031, 2**20  # linux/fcntl.h; bytes
LATE = 5.0  # seconds that a busy machine may add to the last step, or to handing in the weights
SHARE = 1 / 40  # of the budget, which the last step may take beyond it, and the weights
SLOWEST = 250e6  # bytes a second at which weights leave
MAX_GRAPH, MAX_WEIGHTS, MAX_BATCH = 2**23, 2**36, 2**24  # bytes, bytes, tokens


class Refused(Exception):
    """What the run did, which it may not: the reason that it crashed."""


def training_rows(arena: Arena, stems: list[str]) -> Iterator[np.ndarray]:
    """Rows of T+1 tokens without end, each epoch of documents in an order of its own."""
    documents, rng = Documents(arena.folder, stems), np.random.default_rng(arena.seed)

    def epochs() -> Iterator[np.ndarray]:
        while True:
            yield from documents.shuffled(rng, arena.sequence_len + 1)

    packer = Packer(epochs())
    row = np.empty(arena.sequence_len + 1, np.uint16)
    while True:
        packer.fill(row)
        yield row


class Feeder:
    """Serves one run. `model` is the folder for graph.json and weights.bin; None drops them."""

    def __init__(
        self, arena: Arena, requests: BufferedReader, replies: BinaryIO, model: Path | None
    ):
        if (manifest := read_manifest(arena)) is None:
            cure = f"`uv run prepare.py --arena {arena.name}`"
            raise UserError(f"the arena {arena.name!r} is not prepared: run {cure}")
        self.arena, self.manifest, self.model = arena, manifest, model
        self.requests, self.replies = requests, replies
        self.born = self.last = time.monotonic()
        self.batch: np.ndarray | None = None  # the next one, packed ahead
        self.started: float | None = None  # by the clock, when the first batch was asked for
        self.ended: float | None = None
        self.registered = False  # whether the graph is here
        self.counted = 0.0  # seconds of work, as the run counts them
        self.steps: list[float] = []  # seconds from request to request
        self.facts: dict[str, float] = {}

    def serve(self) -> None:
        """Answer the run until it ends; Refused for what it may not do."""
        lengths = Tokenizer.load(self.arena.folder / self.manifest["tokenizer"]).byte_lengths()
        facts = {**asdict(self.arena), "lengths": lengths}
        self.reply(b"h", json.dumps(facts).encode())
        answer = {
            b"o": self.open, b"g": self.graph, b"b": self.draw, b"w": self.take, b"v": self.show
        }  # fmt: skip
        while len(header := self.requests.read(MESSAGE.size)) == MESSAGE.size:
            kind, size, seconds = MESSAGE.unpack(header)
            if kind not in answer:
                raise Refused("it spoke to the feeder itself, which the TrainLoader does")
            answer[kind](size, seconds)

    def reply(self, kind: bytes, content: bytes | memoryview = b"", seconds: float = 0.0) -> None:
        self.replies.write(MESSAGE.pack(kind, len(content), seconds))
        self.replies.write(content)
        self.replies.flush()

    def open(self, rows: int, _: float) -> None:
        """Pack the first batch, before the clock starts."""
        if not 0 < rows * self.arena.sequence_len <= MAX_BATCH:
            raise Refused(f"a batch of {rows} rows has no tokens, or more than {MAX_BATCH}")
        if self.batch is not None:
            raise Refused("a second TrainLoader was opened, and a run has one: draw from that")
        self.rows = training_rows(self.arena, self.manifest["train"])
        self.batch = np.empty((rows, self.arena.sequence_len + 1), np.uint16)
        self.pack()
        self.reply(b"o")

    def pack(self) -> None:
        assert self.batch is not None
        for place, row in zip(self.batch, self.rows, strict=False):
            place[:] = row

    def graph(self, size: int, _: float) -> None:
        """Take the model's graph, which has seen no data yet."""
        if self.started is not None:
            raise Refused("the model was registered after the first batch: its graph leaves before")
        if size > MAX_GRAPH:
            raise Refused(
                f"the model's graph has {size / 1e6:.0f} MB, more than {MAX_GRAPH / 1e6:.0f}"
            )
        text = self.requests.read(size)
        if self.model:
            self.model.mkdir(parents=True, exist_ok=True)
            (self.model / "graph.json").write_bytes(text)
        self.registered = True
        self.reply(b"g")

    def draw(self, _: int, counted: float) -> None:
        """Hand out a batch, or say that the budget is spent."""
        if self.batch is None or not self.registered:
            raise Refused(
                "the model was not registered before the first batch: its graph leaves then"
            )
        now = time.monotonic()
        if self.started is None:
            self.started = self.last = now
            self.tell(startup_seconds=now - self.born)
        elif self.ended is None:
            self.step(now, counted)
        if self.ended:
            self.reply(b"e", seconds=self.facts["training_seconds"])
            return
        self.reply(b"b", self.batch.data.cast("B"), self.seconds(now))
        steps = len(self.steps) + 1
        tokens = steps * len(self.batch) * self.arena.sequence_len
        self.tell(num_steps=steps, total_tokens_M=tokens / 1e6)
        self.pack()

    def seconds(self, now: float) -> float:
        """Of training so far."""
        assert self.started is not None
        return self.counted if self.arena.counted else now - self.started

    def step(self, now: float, counted: float) -> None:
        """A step has ended, and with it the budget if that is spent."""
        if self.arena.counted:
            if not self.counted <= counted < math.inf:  # worded so that NaN fails
                raise Refused(f"its counted work went from {self.counted:g} to {counted:g} s")
            self.counted = counted
        self.steps.append(now - self.last)  # with the time in which the run left its batch unread
        self.last = now
        if (seconds := self.seconds(now)) < self.arena.budget:
            return
        usual = median(self.steps)
        if self.arena.counted:  # a few slow steps stretch nothing
            late = self.steps[-1] - 2 * usual
        else:
            late = seconds - self.arena.budget - min(2 * usual, self.share)
        if late > LATE:
            raise Refused(f"its last step took {self.steps[-1]:.1f} s, and others {usual:.1f}")
        self.ended = now
        self.tell(training_seconds=seconds)

    @property
    def share(self) -> float:
        """Seconds that the last step may take beyond the budget, and the weights."""
        return max(SHARE * self.arena.budget, 1.0)

    def take(self, size: int, counted: float) -> None:
        """Take the weights, in the graph's order; what comes later changes nothing."""
        now = time.monotonic()
        if self.started is not None and self.ended is None:
            self.step(now, counted)
        if self.ended is None:
            seconds = self.seconds(now) if self.started else 0.0
            left = self.arena.budget - seconds
            raise Refused(f"finish was called {left:.1f} s before the budget was spent")
        if "weights_MB" in self.facts:
            raise Refused("finish was called twice")
        if size > MAX_WEIGHTS:
            raise Refused(f"the weights have {size / 1e9:.0f} GB, and may have 68")
        left, block, writing = size, memoryview(bytearray(PIPE)), 0.0
        with (self.model / "weights.bin" if self.model else Path(os.devnull)).open("wb") as file:
            while left and (got := self.requests.readinto(block[:left])):
                start = time.monotonic()
                left -= file.write(block[:got])
                writing += time.monotonic() - start
        # a slow disk is not the run's fault, but a run could make it slow by weights without end
        late = time.monotonic() - self.ended - min(writing, self.share)
        if left or late > LATE + min(size / SLOWEST, self.share):
            raise Refused(f"the weights came {late:.1f} s after the budget was spent")
        self.tell(weights_MB=size / 1e6)
        self.reply(b"w")

    def show(self, _: int, __: float) -> None:
        """Stream the validation rows: the run's weights are out, so it may see them."""
        if "weights_MB" not in self.facts:
            raise Refused("validation rows were asked for before the weights were handed in")
        rows = np.load(self.arena.folder / self.manifest["val"])
        self.reply(b"v", rows.data.cast("B"))

    def tell(self, **facts: float) -> None:
        """Tell the job what is known by now."""
        self.facts |= facts
        say(self.facts)


def say(facts: dict[str, float] | dict[str, str]) -> None:
    print(json.dumps(facts), file=sys.stderr, flush=True)


def main() -> int:
    replies = sys.stdout.buffer
    with suppress(OSError):  # an ordinary user may have used up what the kernel allows
        for pipe in (0, 1):
            fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE)
    try:
        model = os.environ.get("AUTORESEARCH_MODEL")
        requests = cast("BufferedReader", sys.stdin.buffer)
        Feeder(from_environment(), requests, replies, Path(model) if model else None).serve()
    except BrokenPipeError:  # the run has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (Refused, UserError, OSError, MemoryError, ValueError) as error:
        # a disk, the arena's files, memory: not the run's fault
        reason = str(error) if isinstance(error, Refused | UserError) else f"the feeder: {error!r}"
        say({"crash" if isinstance(error, Refused) else "trouble": one_line(reason)})
        with suppress(BrokenPipeError):
            replies.write(MESSAGE.pack(b"x", len(reason.encode()), 0.0) + reason.encode())
            replies.flush()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
