"""What a program is, read from its syntax tree: when two are the same, and what in one differs from another."""

import ast
import hashlib
import io
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from autoresearch.records import one_line

TOP = "top-level"
MAX_SOURCE = 1_000_000  # bytes; a program that a person can hold in their head is a twentieth of it
NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)


def decode(source: bytes) -> str:
    """A program's text as Python reads it, by its own word on the encoding; SyntaxError or ValueError for what it would
    not read, or for more than a person could."""
    if len(source) > MAX_SOURCE:
        raise ValueError(f"longer than {MAX_SOURCE / 1e6:g} MB")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return io.TextIOWrapper(io.BytesIO(source), encoding).read()


def fingerprint(source: bytes) -> str | None:
    """A hash that comments, layout, docstrings and the order of plain constants do not change; None for no program.

    >>> fingerprint(b"A = 1  # one\\nB = 2") == fingerprint(b"B = 2\\n\\nA = 1")
    True
    """
    try:
        module = parse(source)
        module.body = list(sort_constants(module.body))
        # by its text: another Python has other syntax trees
        return hashlib.sha256(ast.unparse(module).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    except NO_PROGRAM:
        return None


def parse(source: bytes) -> ast.Module:
    """The syntax tree without docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ast.parse(decode(source))
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest or [ast.Pass()]
    return module


def sort_constants(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Sort each row of plain constants by name. What calls or reads anything stays where it is: its order matters."""
    row: dict[str, ast.stmt] = {}
    for statement in body:
        name = plain_constant(statement)
        if name is None or name in row:
            yield from (row[key] for key in sorted(row))
            row = {}
        if name is None:
            yield statement
        else:
            row[name] = statement
    yield from (row[key] for key in sorted(row))


PLAIN = (ast.Constant, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Tuple, ast.List, ast.expr_context)


def plain_constant(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
            return name if all(isinstance(node, PLAIN) for node in ast.walk(value)) else None
    return None


# -----------------------------------------------------------------------------
# What differs


def changes(before: bytes, after: bytes) -> str | None:
    """Name what one program has otherwise than another, bounded: constants with their values, functions by name.

    >>> changes(b"A = 1\\ndef f(): pass", b"A = 2\\ndef f(): return 1\\nB = 3")
    'A 1 -> 2; +B 3; f'
    """
    try:
        old, new = (dict(parts(parse(text).body)) for text in (before, after))
        names = [name for name in old | new if old.get(name) != new.get(name)]
        found = [word(name, old.get(name), new.get(name)) for name in names]
    except NO_PROGRAM:
        return None
    constants_first = sorted(found, key=lambda text: (" -> " not in text, text.lstrip("+-")))
    return one_line("; ".join(constants_first), 300) or None


@dataclass(frozen=True)
class Part:
    """A constant, by its value, or a function, a method, a class without them, or what is left of the top level."""

    text: str
    constant: bool = False


def parts(body: list[ast.stmt], within: str = "", head: str = "") -> Iterator[tuple[str, Part]]:
    rest = [head]
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{within}{name}", Part(ast.unparse(statement))
            case ast.ClassDef(name=name, body=inner):
                head = " ".join(
                    ast.unparse(part) for part in [*statement.bases, *statement.keywords, *statement.decorator_list]
                )
                yield from parts(inner, f"{within}{name}.", head)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                yield f"{within}{name}", Part(ast.unparse(value), constant=True)
            case _:
                rest.append(ast.unparse(statement))
    yield within.rstrip(".") or TOP, Part("\n".join(rest))


def word(name: str, was: Part | None, now: Part | None) -> str:
    if was is None or now is None:
        part, sign = (now, "+") if was is None else (was, "-")
        return f"{sign}{name} {short(part.text)}" if part and part.constant else f"{sign}{name}"
    if not (was.constant and now.constant):
        return name
    before, after = differing_arguments(was.text, now.text)
    return f"{name} {short(before)} -> {short(after)}"


def short(value: str) -> str:
    return one_line(value.replace(";", ","), 40)  # a semicolon parts one change from the next


def differing_arguments(was: str, now: str) -> tuple[str, str]:
    """Of two calls that differ in some arguments, those; so that `pick(1, 2, 3)` beside `pick(1, 4, 3)` is 2 and 4."""
    match ast.parse(was, mode="eval").body, ast.parse(now, mode="eval").body:
        case ast.Call(func=f, args=old), ast.Call(func=g, args=new) if len(old) == len(new) and ast.dump(f) == ast.dump(
            g
        ):
            pairs = [(ast.unparse(a), ast.unparse(b)) for a, b in zip(old, new, strict=True)]
            differing = [(a, b) for a, b in pairs if a != b]
            if 0 < len(differing) < len(pairs):
                return ", ".join(a for a, _ in differing), ", ".join(b for _, b in differing)
    return was, now
