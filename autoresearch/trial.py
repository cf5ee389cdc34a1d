"""One training run: process, limit, log -> outcome. Also what the driver asks the machine before the first."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from autoresearch import process
from autoresearch.records import Arena, Crashed, Finished, Machine, Outcome, Summary, TimedOut, UserError, one_line


def run_training(tree: Path, arena: Arena, *, seed: int, limit: float, log: Path, mark: Path) -> Outcome:
    """Run the tree's train.py under a hard limit in seconds, its output in `log`, and judge how it ended."""
    env = environment(arena.name) | {"AUTORESEARCH_SEED": str(seed)}
    ended = process.run([sys.executable, "train.py"], cwd=tree, env=env, limit=limit, mark=mark, out=log)
    if ended.code is None:
        return TimedOut(limit, ended.seconds)
    end = process.tail(log)
    if ended.code:
        return Crashed(reason_of(ended.code, end), end, ended.seconds)
    try:
        return Finished(read_summary(process.tail(log, 100_000), arena.budget), ended.seconds)
    except ValueError as error:
        return Crashed(str(error), end, ended.seconds)


def environment(arena: str) -> dict[str, str]:
    """What a training process inherits. The demo arena is sized for a CPU, and runs on one everywhere."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if arena == "demo" else {}
    return {**os.environ, "AUTORESEARCH_ARENA": arena, "PYTHONUNBUFFERED": "1", **hidden}


def reason_of(code: int, end: str) -> str:
    """Say in a line why a run died: the signal, or the last line of its output."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = [line for line in end.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else f"exit code {code} without a word"


MAX_SOURCE = 1_000_000  # bytes; a program that a person can hold in their head is a twentieth of it


def check_syntax(path: Path) -> Crashed | None:
    """Compile train.py without running it: a typo must not cost a run."""
    if path.stat().st_size > MAX_SOURCE:
        return Crashed(f"train.py is longer than {MAX_SOURCE / 1e6:g} MB", "", 0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(path.read_bytes(), path.name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        reason = f"train.py does not compile: {type(error).__name__}: {getattr(error, 'msg', error)}{where}"
        return Crashed(one_line(reason), one_line(f"{getattr(error, 'text', '') or ''}"), 0.0)
    return None


# -----------------------------------------------------------------------------
# The summary block

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
    # the clock is read between steps, so a run ends within a step of its budget
    if not 0.98 * budget <= summary.training_seconds <= 1.05 * budget + 2:
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
        raise UserError(f"{missing}, and the arena {arena!r} needs one: here, try --demo") from None
    name, _, driver = found.rpartition(", ")
    return Machine(name, driver, version("torch"))
