"""One training run: process, limits, clock, log -> outcome. Also what the driver asks prepare.py before the first."""

import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from autoresearch import process
from autoresearch.git import remove_tree
from autoresearch.isolation import Isolation
from autoresearch.pace import PACE
from autoresearch.records import Arena, Crashed, Finished, Killed, Summary, UserError, one_line
from autoresearch.source import NO_PROGRAM, decode

MANIFEST = "manifest.json"  # in the arena's folder: the hashes of all its files

Stamps = dict[str, tuple[int, ...]]


@dataclass
class Track:
    """Where all trainings of a run happen and what they have in common: the tree that the program is put into, the
    arena, the hard limit in seconds, the mark of their processes; and what the arena's files were when it was whole."""

    tree: Path
    arena: Arena
    seed: int
    limit: float
    isolation: Isolation
    mark: Path

    def __post_init__(self) -> None:
        self.stamps = stamps(self.arena.folder)
        self.manifest = read_bytes(self.arena.folder / MANIFEST)

    def run(self, *command: str, log: Path, witness: "Witness | None" = None, **facts: str) -> process.Exit:
        """Run a Python program of the tree; `facts` are for its environment."""
        tmp = self.mark / "tmp"
        remove_tree(tmp)
        tmp.mkdir(parents=True)
        env = self.isolation.environment(tmp) | {
            "AUTORESEARCH_ARENA": self.arena.name,
            "AUTORESEARCH_SEED": str(self.seed),
            "PYTHONUNBUFFERED": "1",
            **({"CUDA_VISIBLE_DEVICES": ""} if self.arena.name == "demo" else {}),  # sized for a CPU
            **facts,
        }
        try:
            return process.run(
                [*self.isolation.prefix, sys.executable, *command], cwd=self.tree, env=env, limit=self.limit,
                mark=self.mark, out=log, pass_fds=(witness.theirs,) if witness else (),
                watch=witness.look if witness else str,
            )  # fmt: skip
        finally:
            remove_tree(tmp)

    def mend(self) -> list[str]:
        """Have the arena's files made again that are not what they were, by the manifest's hashes, and name those that
        were touched at all. To be called when the tree is as it was committed, since its prepare.py does it."""
        folder, found = self.arena.folder, stamps(self.arena.folder)
        touched = sorted(name for name, stamp in self.stamps.items() if found.get(name) != stamp)
        if touched:
            folder.mkdir(exist_ok=True)
            for path in (folder / name for name in touched):
                if path.is_symlink() or not path.is_file():
                    remove_tree(path)
            if self.manifest is not None and read_bytes(folder / MANIFEST) != self.manifest:
                (folder / MANIFEST).write_bytes(self.manifest)  # a forged one would vouch for forged files
            if prepare_arena(self.tree, self.arena.name, quietly=True) != self.arena:
                raise UserError(f"the arena {self.arena.name} was changed and cannot be made again: take another --tag")
            self.stamps = stamps(folder)
        return touched


def stamps(folder: Path) -> Stamps:
    """What changes when a file does. The time of the last change (ctime) cannot be set back by who owns the file."""
    stats = [(path.name, path.lstat()) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats}


def read_bytes(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


RETRIES = 2  # of a run that failed while the driver was stopped


def run_training(track: Track, *, bar: float, model: Path, log: Path) -> Finished | Crashed | Killed:
    """Run the tree's train.py, its output in `log`, and judge how it ended.

    A run that scores `bar` or better leaves its exported model. One that fails while the driver itself was stopped, so
    that clocks and limits say nothing of the program, runs again.
    """
    for left in reversed(range(1 + RETRIES)):
        outcome, paused = run_once(track, bar=bar, model=model, log=log)
        if isinstance(outcome, Finished) or not (paused and left):
            break
    return outcome


def run_once(track: Track, *, bar: float, model: Path, log: Path) -> tuple[Finished | Crashed | Killed, float]:
    """One run, and the seconds of it in which the driver was stopped. The driver's own clock and count check what the
    run claims."""
    model.unlink(missing_ok=True)
    with Witness(log, track.limit - track.arena.budget) as witness:
        ended = track.run(
            "train.py", log=log, witness=witness, AUTORESEARCH_BAR=repr(bar), AUTORESEARCH_MODEL=str(model),
            AUTORESEARCH_TICKS=str(witness.theirs),
        )  # fmt: skip
    return judge(track, ended, witness, log), ended.paused


def judge(track: Track, ended: process.Exit, witness: "Witness", log: Path) -> Finished | Crashed | Killed:
    end, curve = process.tail(log), read_curve(process.tail(log, MAX_LOG))
    if ended.code is None:
        if witness.diverged:
            return Crashed(witness.diverged, end, ended.seconds, curve)
        return Killed(ended.why, ended.seconds, curve)
    if ended.code:
        return Crashed(reason_of(ended.code, end), end, ended.seconds, curve)
    try:
        summary = read_summary(process.tail(log, 100_000), track.arena.budget)
        witness.check(summary)
    except ValueError as error:
        return Crashed(str(error), end, ended.seconds, curve)
    # on our clock, which also sees the interpreter go
    return Finished(replace(summary, total_seconds=round(ended.seconds, 1)), ended.seconds, curve)


class Witness:
    """What the driver sees of a run for itself: prepare.py sends `(` by a pipe when its clock starts, a `.` for each
    batch that it hands out, and `)` when the budget is spent. The times are those of the driver's clock. `startup` is
    how many seconds may pass before the first batch, say to compile: with more, the budget does not fit the limit."""

    SLACK = 2.0  # seconds between our clock and theirs on a busy machine, and half a percent

    def __init__(self, log: Path, startup: float) -> None:
        self.log = log
        self.startup = startup
        self.ours, self.theirs = os.pipe()
        os.set_blocking(self.ours, False)
        self.starts = self.drawn = self.ends = 0
        self.last = b""
        self.started: float | None = None
        self.stopped = time.monotonic()
        self.diverged = ""

    def __enter__(self) -> "Witness":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.ours)
        os.close(self.theirs)

    def look(self) -> str:
        """Take note of what came by the pipe; returns why the run is doomed, if it is."""
        now = time.monotonic()
        with suppress(BlockingIOError):
            ticks = os.read(self.ours, 2**16)
            self.started, self.stopped = self.started or now, now
            self.starts, self.drawn, self.ends = (
                count + ticks.count(tick)
                for count, tick in ((self.starts, b"("), (self.drawn, b"."), (self.ends, b")"))
            )
            self.last = ticks[-1:]
        patience = PACE.quiet if self.drawn else self.startup
        if self.last != b")" and now - self.stopped > patience:
            return f"since no step was finished in {patience:g} s"
        if found := NOT_FINITE.search(process.tail(self.log, MAX_LINE)):
            self.diverged = f"the loss is not finite: {one_line(found[0])}"
        return self.diverged

    def check(self, summary: Summary) -> None:
        """ValueError when a summary claims what was not seen."""
        if self.starts != 1 or self.ends != 1:
            raise ValueError("did not start and end its budget once, as the TrainLoader does")
        if self.last != b")":
            raise ValueError("drew batches after its budget was spent")
        if summary.num_steps != self.drawn:
            raise ValueError(f"claims {summary.num_steps} steps, and drew {self.drawn} batches")
        claimed, measured = summary.training_seconds, self.stopped - (self.started or 0)
        if abs(claimed - measured) > self.SLACK + measured / 200:
            raise ValueError(f"claims {claimed:.1f} s of training, and the driver's clock says {measured:.1f} s")


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
NOT_FINITE = re.compile(r"[\d.]+%(?:(?!\bloss)[^\r\n])*\bloss\W{0,3}(nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """What one line along the way says: percent of the budget, the loss, tokens per second where they are told."""

    percent: float
    loss: float
    speed: float | None


def read_line(line: str) -> Progress | None:
    """One of train.py's progress lines; None for any other."""
    found = PROGRESS.search(line) if "loss" in line and len(line) <= MAX_LINE else None
    with suppress(ValueError, OverflowError):
        if found:
            speed = found[3] and float(found[3].replace(",", ""))
            return Progress(float(found[1]), float(found[2]), speed or None)
    return None


def read_progress(log: str) -> Progress | None:
    """The last progress line of a log."""
    lines = reversed(re.split(r"[\r\n]+", log)[1:] if len(log) > MAX_LINE else re.split(r"[\r\n]+", log))
    return next((p for p in map(read_line, lines) if p and 0 <= p.percent <= 100), None)


def read_curve(log: str) -> str:
    """The loss and the tokens per second at each tenth of the budget, as far as train.py's progress lines give them.

    >>> read_curve("step 1   9.0%  loss 5.1\\nstep 2  11.0%  loss 4.2500  81,200 tok/s")
    '11% 4.250 81k/s'
    """
    points: dict[int, str] = {}
    for p in map(read_line, re.split(r"[\r\n]+", log)):
        if p and 10 <= p.percent <= 100:
            pace = f" {p.speed / 1000:.0f}k/s" if p.speed else ""
            points.setdefault(int(p.percent // 10), f"{p.percent:.0f}% {p.loss:.3f}{pace}")
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


def prepare_arena(tree: Path, name: str, quietly: bool = False) -> Arena:
    """Have prepare.py make an arena ready and take the facts from its last line. Unless `quietly`, it talks to the
    terminal itself, so that a UserError for what it refused has nothing to add."""
    command = [sys.executable, "prepare.py", "--arena", name]
    env = {variable: value for variable, value in os.environ.items() if variable != "AUTORESEARCH_ARENA"}
    err = subprocess.PIPE if quietly else None
    done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=err, text=True, check=False)
    if done.returncode:
        said = (done.stderr or "").strip().rpartition("\n")[2].removeprefix("error: ")
        why = f"prepare.py was killed by signal {-done.returncode}" if done.returncode < 0 else one_line(said)
        raise UserError(why, max(done.returncode, 1))
    try:
        facts = json.loads(done.stdout.strip().rpartition("\n")[2].removeprefix("ready: "))
        return Arena(facts["name"], facts["budget"], facts["data"], Path(facts["folder"]))
    except (ValueError, KeyError, TypeError):
        raise UserError("prepare.py did not end with its line `ready: {...}`: restore it with git") from None
