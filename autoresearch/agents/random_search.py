"""The built-in offline agent: random search over the constants at the top of train.py.

python -m autoresearch.agents.random_search in a working tree; edits ./train.py

It knows nothing of training. A constant takes part when its comment starts with a range, `# [0.1,
2.0] ...`; one or two of them move by a step within it, and a program that was tried before is not
tried again. It is the control arm: a real agent should beat it.
"""

import os
import random
import re
from pathlib import Path

from autoresearch.journal.changes import fingerprint
from autoresearch.journal.git import run_git

FACTORS = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
TRIES = 200
# A line `NAME = value # [low, high] ...`: name, value, low, high
CONSTANT = re.compile(r"^([A-Z]\w*) *= *([^#\n]+)# *\[([^],\n]+),([^],\n]+)\]", re.MULTILINE)
# The number of a value, or of a value for each machine, `pick(cpu, gpu)`
NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?(?:\*\*\d+)?"
ON_CPU, ON_GPU = rf"(?:pick\()?({NUMBER})(?:,.*\))? *", rf"(?:pick\(.*, *)?({NUMBER})\)? *"


def read(number: str) -> float:
    """
    >>> read("2**10")
    1024.0
    """
    base, _, exponent = number.partition("**")
    return float(base) ** int(exponent or 1)


def step(number: str, factor: float, low: float, high: float) -> str:
    """A number moved by a factor within its range: powers stay powers, and integers integers."""
    base, power, exponent = number.partition("**")
    up = 1 if factor > 1 else -1
    if power:
        moved = f"{base}**{int(exponent) + up}"
        return moved if low <= read(moved) <= high else number
    old = float(number)
    if number.isdigit():
        near = round(old * factor)
        return str(int(min(max(near + up * (near == old), low), high)))
    new = old * factor
    if old == low == 0:
        new = high * 0.1 * factor  # a factor cannot leave zero
    elif high < 1 and old >= 0.5:
        new = 1 - (1 - old) / factor  # a decay rate: what counts is its distance from 1
    new = min(max(new, low), high)
    return repr(float(f"{new:.3g}") if new < 0.99 else round(new, 5))  # 0.9996 is not 1.0


def propose(source: str, rng: random.Random, form: str = ON_CPU) -> tuple[str, list[str]]:
    """Move one or two constants. Returns the new program and what changed, which may be nothing."""
    constants, changes = list(CONSTANT.finditer(source)), []
    chosen = rng.sample(constants, min(len(constants), rng.choice((1, 1, 2))))
    for constant in sorted(chosen, key=re.Match.start, reverse=True):  # the last first: it moves
        name, value, *bounds = constant.groups()
        low, high = map(read, bounds)
        number = re.fullmatch(form, value)
        if number is None:  # what suits the card
            continue
        moved = step(number[1], rng.choice(FACTORS), low, high)
        if read(moved) == read(number[1]):
            continue
        new = (value[: number.start(1)] + moved + value[number.end(1) :]).rstrip()
        start, end = constant.span(2)
        source = f"{source[:start]}{new:<{len(value) - 1}} {source[end:]}"
        changes.append(f"{name} {number[1]} -> {moved}")
    return source, changes


def tried_before(tag: str) -> set[str]:
    """Fingerprints of every program that the tag's history trained."""
    form = "--format=%(contents:trailers:key=Source,valueonly)"
    return set(run_git("for-each-ref", form, f"refs/autoresearch/{tag}/*").split())


def main() -> None:
    if os.environ["AUTORESEARCH_ATTEMPT"] != "0":
        print("random search does not debug: the idea is given up")
        return
    path = Path("train.py")
    source = path.read_text(encoding="utf-8-sig")
    rng = random.Random("/".join(os.environ[f"AUTORESEARCH_{x}"] for x in ("SEED", "EXPERIMENT")))
    tried = tried_before(os.environ["AUTORESEARCH_TAG"])
    form = ON_CPU if os.environ["AUTORESEARCH_ARENA"] == "demo" else ON_GPU
    for _ in range(TRIES):
        program, changes = propose(source, rng, form)
        if changes and fingerprint(program.encode()) not in tried:
            path.write_text(program, encoding="utf-8")
            print("A random step within the range that train.py gives. No theory behind it.\n")
            print("; ".join(changes))
            return
    print("every step from here was tried before, or train.py has no constants with a range")


if __name__ == "__main__":
    main()
