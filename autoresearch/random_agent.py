"""The built-in offline agent: random search over the constants at the top of train.py.

    python -m autoresearch.random_agent     in a worktree; edits ./train.py

It knows nothing of training. A constant takes part when its comment starts with a range, `# [0.1, 2.0] ...`; one or
two of them move by a step within it, and a program that was tried before is not tried again. It is the control arm: a
real agent should beat it.
"""

import ast
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from autoresearch.git import run_git

FACTORS = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
TRIES = 200


@dataclass(frozen=True)
class Constant:
    """One assignment `NAME = value  # [low, high] ...`; the value may be a call with a number for each machine."""

    name: str
    value: ast.expr
    low: float
    high: float


def find_constants(source: str) -> list[Constant]:
    """The constants of a program that declare a range, in order."""
    found = []
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value, end_lineno=int(line)):
                comment = source.splitlines()[line - 1].encode()[value.end_col_offset or 0 :].decode()
                bounds = re.match(r"\s*#\s*\[\s*([^,\]]+),\s*([^\]]+)\]", comment)
                if bounds and name.isupper():
                    low, high = (float(ast.literal_eval(power(b))) for b in bounds.groups())
                    found.append(Constant(name, value, low, high))
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
    """A number moved by a factor and held within its range, as source: powers stay powers and integers integers."""
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
                moved_to = 1 - (1 - old) / factor  # a decay rate: what counts is its distance from 1
            else:
                moved_to = old * factor
            return repr(float(f"{min(max(moved_to, low), high):.3g}"))
        case _:
            raise AssertionError(ast.dump(number))


def propose(source: str, rng: random.Random) -> tuple[str, list[str]]:
    """Move one or two constants of a program. Returns the new program and what changed; nothing may have."""
    constants = find_constants(source)
    chosen = rng.sample(constants, min(len(constants), rng.choice((1, 1, 2))))
    lines = source.splitlines(keepends=True)
    changes = []
    for constant in chosen:
        factor = rng.choice(FACTORS)
        old = ast.get_source_segment(source, constant.value) or ""
        for number in reversed(list(numbers(constant.value))):
            moved = step(number, factor, constant.low, constant.high)
            lines[number.lineno - 1] = replace(lines[number.lineno - 1], number, moved)
        new = next(c for c in find_constants("".join(lines)) if c.name == constant.name).value
        new_text = ast.get_source_segment("".join(lines), new) or ""
        if new_text != old:
            changes.append(f"{constant.name} {squeeze(old)} -> {squeeze(new_text)}")
    return "".join(lines), changes


def replace(line: str, number: ast.expr, text: str) -> str:
    """Put a number's new text into its line; the blanks behind it give or take, so that the columns stay."""
    end = number.end_col_offset or 0
    before, old, after = line[: number.col_offset], line[number.col_offset : end], line[end:]
    comma = "," if after.startswith(",") else ""
    rest = after[len(comma) :]
    blanks = len(rest) - len(rest.lstrip(" "))
    width = max(blanks + len(old) - len(text), min(blanks, 1))
    return before + text + comma + " " * width + rest[blanks:]


def squeeze(text: str) -> str:
    """A value as it reads in a line: of a call, the first number stands for all."""
    return re.sub(r",.*\)$", ", …)", " ".join(text.split()))


def tried_before(tag: str) -> set[str]:
    """Blobs of every train.py that the tag's history holds."""
    refs = run_git("for-each-ref", "--format=%(refname):train.py", f"refs/autoresearch/{tag}/*")
    return {line.split()[0] for line in run_git("cat-file", "--batch-check", stdin=refs).splitlines()}


def main() -> None:
    if os.environ["AUTORESEARCH_ATTEMPT"] != "0":
        print("random search does not debug: the idea is given up")
        return
    path = Path("train.py")
    source = path.read_text(encoding="utf-8")
    rng = random.Random(f"{os.environ['AUTORESEARCH_SEED']}/{os.environ['AUTORESEARCH_EXPERIMENT']}")
    tried = tried_before(os.environ["AUTORESEARCH_TAG"])
    for _ in range(TRIES):
        program, changes = propose(source, rng)
        if changes and run_git("hash-object", "--stdin", stdin=program).strip() not in tried:
            path.write_text(program, encoding="utf-8")
            print(f"A random step within the range that train.py gives. No theory behind it.\n\n{'; '.join(changes)}")
            return
    print("every step from here was tried before, or train.py has no constants with a range")


if __name__ == "__main__":
    main()
