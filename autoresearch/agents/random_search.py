"""The built-in offline agent: random search over the constants at the top of train.py.

python -m autoresearch.agents.random_search in a working tree; edits ./train.py

It knows nothing of training. A constant takes part when its comment starts with a range, `# [0.1,
2.0] ...`; one or two of them move by a step within it, and a program that was tried before is not
tried again. It is the control arm: a real agent should beat it.
"""

import ast
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoresearch.journal.changes import fingerprint
from autoresearch.journal.git import run_git

FACTORS = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
TRIES = 200


@dataclass(frozen=True)
class Constant:
    """One line `NAME = value # [low, high] ...`; the value may be a call with a number for each
    machine."""

    name: str
    line: int
    numbers: tuple[ast.expr, ...]
    low: float
    high: float


def find_constants(source: str) -> list[Constant]:
    """The constants of a program that declare a range, in order."""
    found, lines = [], source.splitlines()
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value, end_lineno=int(number)) if (
                name.isupper()
            ):
                bounds = re.search(r"#\s*\[\s*([^,\]]+),\s*([^\]]+)\]", lines[number - 1])
                if bounds:
                    low, high = (float(ast.literal_eval(power(bound))) for bound in bounds.groups())
                    found.append(Constant(name, number - 1, tuple(numbers(value)), low, high))
    return found


def power(text: str) -> str:
    """A bound as a literal: `2**10` reads as `1024`."""
    base, stars, exponent = text.strip().partition("**")
    return str(int(base) ** int(exponent)) if stars else base


def numbers(value: ast.expr) -> Iterator[ast.expr]:
    """The literal numbers of an expression, `2**n` as one."""
    match value:
        case ast.Constant(value=int() | float()) if not isinstance(value.value, bool):
            yield value
        case ast.BinOp(left=ast.Constant(), op=ast.Pow(), right=ast.Constant()):
            yield value
        case ast.Call(args=arguments):
            for argument in arguments:
                yield from numbers(argument)


def step(number: ast.expr, factor: float, low: float, high: float) -> str:
    """A number moved by a factor and held within its range, as source: powers stay powers and
    integers integers."""
    match number:
        case ast.BinOp(left=ast.Constant(value=int(base)), right=ast.Constant(value=int(exponent))):
            moved = exponent + (1 if factor > 1 else -1)
            return f"{base}**{moved if low <= base**moved <= high else exponent}"
        case ast.Constant(value=int(old)):
            new = round(old * factor)
            new += (new == old) * (1 if factor > 1 else -1)
            return str(int(min(max(new, low), high)))
        case ast.Constant(value=float(old)):
            if old == low == 0:
                moved_to = high * 0.1 * factor  # a factor cannot leave zero
            elif high < 1 and old >= 0.5:
                moved_to = (
                    1 - (1 - old) / factor
                )  # a decay rate: what counts is its distance from 1
            else:
                moved_to = old * factor
            bounded = min(max(moved_to, low), high)
            return repr(
                float(f"{bounded:.3g}") if bounded < 0.99 else round(bounded, 5)
            )  # 0.9996 is not 1.0
        case _:
            raise AssertionError(ast.dump(number))


def propose(source: str, rng: random.Random) -> tuple[str, list[str]]:
    """Move one or two constants of a program. Returns the new program and what changed; nothing may
    have."""
    constants = find_constants(source)
    lines, changes = source.splitlines(keepends=True), []
    for constant in rng.sample(constants, min(len(constants), rng.choice((1, 1, 2)))):
        factor, old = rng.choice(FACTORS), lines[constant.line]
        new = [step(number, factor, constant.low, constant.high) for number in constant.numbers]
        if any(
            ast.unparse(ast.parse(text)) == ast.unparse(was)
            for text, was in zip(new, constant.numbers, strict=True)
        ):
            continue  # at its bound for one machine, which may be this one: all must move
        for number, text in reversed(list(zip(constant.numbers, new, strict=True))):
            lines[constant.line] = replace(lines[constant.line], number, text)
        changes.append(f"{constant.name} {value_of(old)} -> {value_of(lines[constant.line])}")
    return "".join(lines), changes


def replace(line: str, number: ast.expr, text: str) -> str:
    """Put a number's new text into its line."""
    return line[: number.col_offset] + text + line[number.end_col_offset :]


def value_of(line: str) -> str:
    """A line's value as it reads in a sentence: of a call, the first number stands for all."""
    value = line.partition("=")[2].partition("#")[0]
    return re.sub(r",.*\)$", ", …)", " ".join(value.split()))


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
    for _ in range(TRIES):
        program, changes = propose(source, rng)
        if changes and fingerprint(program.encode()) not in tried:
            path.write_text(program, encoding="utf-8")
            print("A random step within the range that train.py gives. No theory behind it.\n")
            print("; ".join(changes))
            return
    print("every step from here was tried before, or train.py has no constants with a range")


if __name__ == "__main__":
    main()
