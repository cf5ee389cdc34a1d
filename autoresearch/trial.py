"""One training run: process, limit, clock, log -> outcome. Also what the driver asks the machine before the first."""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

from autoresearch import process
from autoresearch.records import Arena, Crashed, Finished, Machine, Summary, TimedOut, UserError, one_line
from autoresearch.source import NO_PROGRAM, decode


def run_training(
    tree: Path, arena: Arena, *, seed: int, bar: float, model: Path, limit: float, log: Path, mark: Path
) -> Finished | Crashed | TimedOut:
    """Run the tree's train.py under a hard limit in seconds, its output in `log`, and judge how it ended.

    A run that scores `bar` or better leaves its exported model. What it claims is held against the driver's own clock
    and count, and the arena's files must be afterwards what they were before.
    """
    model.unlink(missing_ok=True)
    witness, before = Witness(), stamps(arena.folder)
    env = environment(arena.name) | {
        "AUTORESEARCH_SEED": str(seed),
        "AUTORESEARCH_BAR": repr(bar),
        "AUTORESEARCH_MODEL": str(model),
        "AUTORESEARCH_TICKS": str(witness.theirs),
    }
    with witness:
        ended = process.run(
            [sys.executable, "train.py"], cwd=tree, env=env, limit=limit, mark=mark, out=log,
            pass_fds=(witness.theirs,), watch=witness.look,
        )  # fmt: skip
    end, curve = process.tail(log), read_curve(process.tail(log, MAX_LOG))
    if altered := restore(tree, arena, before):
        return Crashed(f"changed the arena's files while it ran: {', '.join(altered)}", end, ended.seconds)
    if ended.code is None:
        return TimedOut(limit, ended.seconds, curve)
    if ended.code:
        return Crashed(reason_of(ended.code, end), end, ended.seconds, curve)
    try:
        summary = read_summary(process.tail(log, 100_000), arena.budget)
        witness.check(summary)
    except ValueError as error:
        return Crashed(str(error), end, ended.seconds, curve)
    # on our clock, which also sees the interpreter go
    return Finished(replace(summary, total_seconds=round(ended.seconds, 1)), ended.seconds, curve)


class Witness:
    """What the driver sees of a run for itself: prepare.py sends `(` by a pipe when its clock starts, a `.` for each
    batch that it hands out, and `)` when the budget is spent. The times are those of the driver's clock."""

    SLACK = 2.0  # seconds between our clock and theirs on a busy machine, and half a percent

    def __init__(self) -> None:
        self.ours, self.theirs = os.pipe()
        os.set_blocking(self.ours, False)
        self.seen = b""
        self.started = self.stopped = 0.0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        os.close(self.ours)
        os.close(self.theirs)

    def look(self) -> None:
        with suppress(BlockingIOError):
            ticks = os.read(self.ours, 2**16)
            self.started = self.started if self.seen else time.monotonic()
            self.stopped = time.monotonic()
            self.seen = (self.seen + ticks)[: 2**24]

    def check(self, summary: Summary) -> None:
        """ValueError when a summary claims what was not seen."""
        drawn = self.seen.count(b".")
        if self.seen.count(b"(") != 1 or self.seen.count(b")") != 1:
            raise ValueError("did not start and end its budget once, as the TrainLoader does")
        if not self.seen.endswith(b")"):
            raise ValueError("drew batches after its budget was spent")
        if summary.num_steps != drawn:
            raise ValueError(f"claims {summary.num_steps} steps, and drew {drawn} batches")
        claimed, measured = summary.training_seconds, self.stopped - self.started
        if abs(claimed - measured) > self.SLACK + measured / 200:
            raise ValueError(f"claims {claimed:.1f} s of training, and the driver's clock says {measured:.1f} s")


Stamps = dict[str, tuple[int, ...]]


def stamps(folder: Path) -> Stamps:
    """What changes when a file does. The time of the last change (ctime) cannot be set back by who owns the file."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats}


def restore(tree: Path, arena: Arena, before: Stamps) -> list[str]:
    """Have the arena's files made again that are not what they were, and name them."""
    after = stamps(arena.folder)
    altered = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if altered:
        for name in altered:
            (arena.folder / name).unlink(missing_ok=True)
        if prepare_arena(tree, arena.name) != arena:
            raise UserError(f"the arena {arena.name} was changed and cannot be made again: take another --tag")
    return altered


def environment(arena: str) -> dict[str, str]:
    """What a training process inherits. The demo arena is sized for a CPU, and runs on one everywhere."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if arena == "demo" else {}
    return {**os.environ, "AUTORESEARCH_ARENA": arena, "PYTHONUNBUFFERED": "1", **hidden}


def reason_of(code: int, end: str) -> str:
    """Say in a line why a run died: the signal, or the last line of its output."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [line for line in end.splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("error: ")) if lines else f"exit code {code} without a word"


def check_syntax(path: Path) -> Crashed | None:
    """Compile train.py without running it: a typo must not cost a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(decode(path.read_bytes()), path.name, "exec")
    except NO_PROGRAM as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        reason = f"train.py does not compile: {type(error).__name__}: {getattr(error, 'msg', error)}{where}"
        return Crashed(one_line(reason), one_line(f"{getattr(error, 'text', '') or ''}"), 0.0)
    return None


# -----------------------------------------------------------------------------
# What a run printed: the lines along the way, and the summary block

MAX_LOG = 4_000_000  # bytes of the log's end that are searched for progress
PROGRESS = re.compile(r"([\d.]+)%.*?\bloss\D{0,3}([\d.]{1,12})(?:.*?\b([\d,]{1,15}) tok/s)?")
MAX_LINE = 300  # characters; what is longer is no line of progress


def read_curve(log: str) -> str:
    """The loss and the tokens per second at each tenth of the budget, as far as train.py's progress lines give them.

    >>> read_curve("step 1   9.0%  loss 5.1\\nstep 2  11.0%  loss 4.2500  81,200 tok/s")
    '11% 4.250 81k/s'
    """
    points: dict[int, str] = {}
    lines = (line for line in re.split(r"[\r\n]+", log) if "loss" in line and len(line) <= MAX_LINE)
    for percent, loss, speed in (found.groups("") for found in map(PROGRESS.search, lines) if found):
        with suppress(ValueError, OverflowError):
            done, value = float(percent), float(loss)
            if 10 <= done <= 100:
                pace = f" {float(speed.replace(',', '')) / 1000:.0f}k/s" if speed else ""
                points.setdefault(int(done // 10), f"{done:.0f}% {value:.3f}{pace}")
    return ", ".join(points[tenth] for tenth in sorted(points))


MAY_BE_UNKNOWN = {"mfu_percent"}


def read_summary(log: str, budget: float) -> Summary:
    """Read the one block after `---`; ValueError when it is missing, doubled, incomplete, not finite, or for a training
    time that is not the budget."""
    blocks = re.split(r"^---$", log, flags=re.MULTILINE)[1:]
    blocks = [block for block in blocks if re.search(r"^val_bpb:", block, re.MULTILINE)]
    if len(blocks) != 1:
        raise ValueError("no summary was printed" if not blocks else f"{len(blocks)} summaries were printed")
    values = {field.name: read_value(blocks[0], field.name, field.type is int) for field in fields(Summary)}
    summary = Summary(**values)  # type: ignore[arg-type]
    if summary.val_bpb <= 0:
        raise ValueError(f"val_bpb is {summary.val_bpb:g}, and no text is that easy")
    # the clock is read between steps, so a run ends within a step of its budget: seconds, on a CPU with other work
    if not 0.98 * budget <= summary.training_seconds <= 1.05 * budget + 5:
        raise ValueError(f"trained for {summary.training_seconds:g} s, and the budget is {budget:g} s")
    return summary


def read_value(block: str, name: str, whole: bool) -> float | int | None:
    found = re.findall(rf"^{name}:\s*(\S+)$", block, re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"the summary has {len(found)} lines of {name}")
    if found[0] == "n/a" and name in MAY_BE_UNKNOWN:
        return None
    try:
        value = int(found[0]) if whole else float(found[0])
    except ValueError:
        raise ValueError(f"{name} is not a number: {one_line(found[0], 40)}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is not finite: {found[0]}")
    return value


# -----------------------------------------------------------------------------
# Before the first run


def prepare_arena(tree: Path, name: str) -> Arena:
    """Have prepare.py make an arena ready and take the facts from its last line. It talks to the terminal itself,
    so that a UserError for what it refused has nothing to add."""
    command = [sys.executable, "prepare.py", "--arena", name]
    env = {variable: value for variable, value in os.environ.items() if variable != "AUTORESEARCH_ARENA"}
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        why = f"prepare.py was killed by signal {-done.returncode}" if done.returncode < 0 else ""
        raise UserError(why, max(done.returncode, 1))
    try:
        facts = json.loads(done.stdout.strip().rpartition("\n")[2].removeprefix("ready: "))
        return Arena(facts["name"], facts["budget"], facts["data"], Path(facts["folder"]))
    except (ValueError, KeyError, TypeError):
        raise UserError("prepare.py did not end with its line `ready: {...}`: restore it with git") from None


def find_machine(arena: str) -> Machine:
    """Name the GPU that CUDA_VISIBLE_DEVICES puts first, its driver, and torch; UserError when there is none but the
    arena needs one."""
    if arena == "demo":
        return Machine("", "", version("torch"))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    query = ["nvidia-smi", f"--id={gpu}", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        missing = f"no NVIDIA GPU found (nvidia-smi --id={gpu})"
        raise UserError(f"{missing}, and every arena but demo needs one: here, try --demo") from None
    name, _, driver = found.rpartition(", ")
    return Machine(name, driver, version("torch"))
