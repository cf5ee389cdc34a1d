"""The task: what of train.py's output counts, when a score is better, and how the arena is made ready."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from autoresearch.records import EDITABLE, TIE, Arena, Crashed, Summary, UserError, one_line
from autoresearch.source import NO_PROGRAM, decode


def is_better(score: float, lines: int, incumbent: float | None, best_ever: float | None) -> bool:
    """Whether a score is kept. `lines` is the net change to train.py.

    Better than the incumbent by more than a tie is kept. A tie is kept only where it removes lines, and never more
    than a tie above the best ever kept, so that a row of ties cannot drift upwards. Without an incumbent: kept.
    """
    if incumbent is None or best_ever is None:
        return True
    gain = round(incumbent - score, 6)
    if gain > TIE:
        return True
    above_best = round(score - best_ever, 6)
    return gain >= -TIE and lines < 0 and above_best <= TIE


def reason_of(code: int, end: str) -> str:
    """Say in a line why a run died: the signal, or the last line of its output."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [line for line in end.splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("error: ")) if lines else f"exit code {code} without a word"


def check_syntax(program: bytes) -> Crashed | None:
    """Compile train.py without running it: a typo must not cost a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(decode(program), EDITABLE, "exec")
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
