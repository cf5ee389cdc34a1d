"""The task: the file that is improved, numbers out of a log, what better means, the arena made
ready."""

import io
import json
import math
import os
import re
import subprocess
import sys
import tokenize
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoresearch.files import UserError, one_line

EDITABLE = "train.py"  # the one file that an experiment changes
METRIC = "val_bpb"
TIE = 0.0002  # val_bpb: two runs of one program differ by so much
MAX_PROGRAM = 1_000_000  # bytes, twenty times what a person can hold in their head


def trailer(name: str, form: str = "s", **default: Any) -> Any:
    """A dataclass field that the commit message of an experiment holds as a trailer."""
    return field(metadata={"trailer": name, "form": form}, **default)


@dataclass(frozen=True)
class Arena:
    """What all scores of a study have in common: the data by name and version, the budget in
    seconds."""

    name: str = trailer("Arena")
    budget: float = trailer("Budget-seconds", ".0f", default=0.0)
    data: str = trailer("Data", default="")
    folder: Path = Path()


@dataclass(frozen=True)
class Machine:
    """Where experiments run. All but `torch` are empty without a GPU.

    `uuid` names the GPU to CUDA, `card` to nvidia-smi: they differ for a slice of a card (MIG).
    """

    gpu: str = trailer("Gpu", default="")
    driver: str = trailer("Gpu-driver", default="")
    torch: str = trailer("Torch", default="")
    uuid: str = ""
    card: str = ""

    @property
    def is_slice(self) -> bool:
        return self.uuid != self.card


def is_better(score: float, lines: int, incumbent: float | None, best_ever: float | None) -> bool:
    """Whether a score is kept. `lines` is the net change to train.py.

    A gain of more than a tie is kept. A tie is kept only where it removes lines, and only within a
    tie of the best ever kept, so that a row of ties cannot drift upwards. Without an incumbent, any
    score is kept.
    """
    if incumbent is None or best_ever is None:
        return True
    gain = round(incumbent - score, 6)
    if gain > TIE:
        return True
    above_best = round(score - best_ever, 6)
    return gain >= -TIE and lines < 0 and above_best <= TIE


# --------------------------------------------------------------------------------------------------
# Programs

NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)  # what reading one may raise


def decode(source: bytes) -> str:
    """A program's text in the encoding it declares; SyntaxError or ValueError where Python would
    not read it, or where it is too long."""
    if len(source) > MAX_PROGRAM:
        raise ValueError(f"longer than {MAX_PROGRAM / 1e6:g} MB")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return io.TextIOWrapper(io.BytesIO(source), encoding).read()


def syntax_error(program: bytes) -> tuple[str, str] | None:
    """Compile train.py without running it, since a typo must not cost a run. Returns what is wrong
    in a line, and the line of the program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(decode(program), EDITABLE, "exec")
    except NO_PROGRAM as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        said = f"{type(error).__name__}: {getattr(error, 'msg', error)}{where}"
        text = getattr(error, "text", "") or ""
        return one_line(f"{EDITABLE} does not compile: {said}"), one_line(text)
    return None


# --------------------------------------------------------------------------------------------------
# A log: the lines along the way, and the summary block at its end

MAX_LOG = 4_000_000  # bytes of the log's end that are searched for progress
PROGRESS = re.compile(r"([\d.]+)%.*?\bloss\D{0,3}([\d.]{1,12})(?:.*?\b([\d,]{1,15}) tok/s)?")
MAX_LINE = 300  # characters; no line of progress is longer
NOT_FINITE = re.compile(r"[\d.]+%(?:(?!\bloss)[^\r\n])*\bloss\W{0,3}(nan|inf)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Progress:
    """One line along the way: percent of the budget, loss, tokens per second if it has them."""

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
    lines = re.split(r"[\r\n]+", log)
    whole = lines[1:] if len(log) > MAX_LINE else lines
    return next((p for p in map(read_line, reversed(whole)) if p and 0 <= p.percent <= 100), None)


def read_curve(log: str) -> str:
    """The loss and the tokens per second at each tenth of the budget, by train.py's progress lines.

    >>> read_curve("step 1   9.0%  loss 5.1\\nstep 2  11.0%  loss 4.2500  81,200 tok/s")
    '11% 4.250 81k/s'
    """
    points: dict[int, str] = {}
    for p in map(read_line, re.split(r"[\r\n]+", log)):
        if p and 10 <= p.percent <= 100:
            pace = f" {p.speed / 1000:.0f}k/s" if p.speed else ""
            points.setdefault(int(p.percent // 10), f"{p.percent:.0f}% {p.loss:.3f}{pace}")
    return ", ".join(points[tenth] for tenth in sorted(points))


REQUIRED = (METRIC, "training_seconds", "num_steps")


def read_summary(log: str, budget: float) -> dict[str, float]:
    """The `name: number` lines of the one block after `---`. ValueError for a block that is missing
    or doubled, a required number that is missing, doubled or not finite, and a training time that
    is not the budget."""
    blocks = re.split(r"^---$", log, flags=re.MULTILINE)[1:]
    blocks = [block for block in blocks if re.search(rf"^{METRIC}:", block, re.MULTILINE)]
    if len(blocks) != 1:
        printed = f"{len(blocks)} summaries were" if blocks else "no summary was"
        raise ValueError(f"{printed} printed")
    lines = re.findall(r"^(\w+):\s*(\S+)$", blocks[0], re.MULTILINE)
    values = {}
    for name in REQUIRED:
        if (count := [line[0] for line in lines].count(name)) != 1:
            raise ValueError(f"the summary has {count} lines of {name}")
    for name, text in lines:
        try:
            values[name] = read_number(name, text)
        except ValueError:  # train.py may print notes of its own
            if name in REQUIRED:
                raise
    if values[METRIC] <= 0:
        raise ValueError(f"{METRIC} is {values[METRIC]:g}, and no text is that easy")
    # the clock is read between steps, so a run ends within a step of its budget: seconds, on a CPU
    seconds = values["training_seconds"]
    if not 0.98 * budget <= seconds <= 1.05 * budget + 5:
        raise ValueError(f"trained for {seconds:g} s, and the budget is {budget:g} s")
    return values


def read_number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is not a number: {one_line(text, 40)}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is not finite: {text}")
    return value


def read_failure(code: int, log: str) -> str:
    """Why a run died, in a line: the signal, or the last line of its log."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [line for line in log.splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("error: ")) if lines else f"exit code {code}, no output"


# --------------------------------------------------------------------------------------------------
# Before the first run


def prepare_arena(tree: Path, name: str, quietly: bool = False) -> Arena:
    """Have prepare.py make an arena ready and take the facts from its last line. Unless `quietly`,
    it talks to the terminal itself, and a UserError for what it refused adds nothing."""
    command = [sys.executable, "prepare.py", "--arena", name]
    env = {key: value for key, value in os.environ.items() if key != "AUTORESEARCH_ARENA"}
    err = subprocess.PIPE if quietly else None
    done = subprocess.run(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=err, text=True, check=False
    )
    if done.returncode:
        said = one_line((done.stderr or "").strip().rpartition("\n")[2].removeprefix("error: "))
        killed = f"prepare.py was killed by signal {-done.returncode}"
        raise UserError(killed if done.returncode < 0 else said, max(done.returncode, 1))
    try:
        facts = json.loads(done.stdout.strip().rpartition("\n")[2].removeprefix("ready: "))
        return Arena(facts["name"], facts["budget"], facts["data"], Path(facts["folder"]))
    except (ValueError, KeyError, TypeError):
        cure = "restore it with git"
        raise UserError(f"prepare.py did not end with its line `ready: {{...}}`: {cure}") from None
