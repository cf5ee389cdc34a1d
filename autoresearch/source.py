"""What a program is, read from its syntax tree: when two are the same, and what in one differs from another."""

import ast
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from autoresearch.records import one_line

Body = list[ast.stmt]
TOP = "top-level"
NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)


def fingerprint(source: str) -> str | None:
    """A hash that comments, layout, docstrings and the order of constants do not change; None for what is no program.

    >>> fingerprint("A = 1  # one\\nB = 2") == fingerprint("B = 2\\n\\nA = 1")
    True
    """
    try:
        module = parse(source)
        module.body = list(sort_constants(module.body))
        return hashlib.sha256(ast.dump(module).encode()).hexdigest()[:16]
    except NO_PROGRAM:
        return None


def parse(source: str) -> ast.Module:
    """The syntax tree without docstrings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = ast.parse(source)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest or [ast.Pass()]
    return module


def sort_constants(body: Body) -> Iterator[ast.stmt]:
    """Sort each run of `NAME = value` by name. A run ends where a name is set again, or one reads another: there the
    order matters."""
    run: dict[str, ast.stmt] = {}
    read: set[str] = set()
    for statement in body:
        name = constant_name(statement)
        reads = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - {name}
        if name is None or name in run or name in read or reads & run.keys():
            yield from (run[key] for key in sorted(run))
            run, read = {}, set()
        if name is None:
            yield statement
        else:
            run[name] = statement
            read |= reads
    yield from (run[key] for key in sorted(run))


def constant_name(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]) if name.isupper():
            return name
    return None


# -----------------------------------------------------------------------------
# What differs


def changes(before: str, after: str) -> str | None:
    """Name what one program has otherwise than another, bounded: constants with their values, functions by name.

    >>> changes("A = 1\\ndef f(): pass", "A = 2\\ndef f(): return 1\\nB = 3")
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


def parts(body: Body, within: str = "", head: str = "") -> Iterator[tuple[str, Part]]:
    rest = [head]
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{within}{name}", Part(ast.unparse(statement))
            case ast.ClassDef(name=name, body=inner):
                head = " ".join(ast.unparse(part) for part in [*statement.bases, *statement.decorator_list])
                yield from parts(inner, f"{within}{name}.", head)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                yield f"{within}{name}", Part(ast.unparse(value), constant=True)
            case _:
                rest.append(ast.unparse(statement))
    yield within.rstrip(".") or TOP, Part("\n".join(rest))


def word(name: str, was: Part | None, now: Part | None) -> str:
    if was is None or now is None:
        part, sign = (now, "+") if was is None else (was, "-")
        return f"{sign}{name} {one_line(part.text, 40)}" if part and part.constant else f"{sign}{name}"
    if not (was.constant and now.constant):
        return name
    before, after = differing_arguments(was.text, now.text)
    return f"{name} {one_line(before, 40)} -> {one_line(after, 40)}"


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
