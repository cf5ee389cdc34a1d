"""What a program is, read from its syntax tree: when two are the same, and what in one differs from another."""

import ast
import hashlib
import warnings
from collections.abc import Iterator

from autoresearch.records import one_line

Body = list[ast.stmt]
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
    """Sort each run of `NAME = value` by name, unless one of them is set twice or reads another: then order matters."""
    run: dict[str, ast.stmt] = {}
    for statement in [*body, None]:
        name = constant_name(statement)
        reads = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - {name} if statement else set()
        if run and (name is None or name in run or reads & run.keys()):
            yield from (run[key] for key in sorted(run))
            run = {}
        if name is not None and statement is not None:
            run[name] = statement
        elif statement is not None:
            yield statement


def constant_name(statement: ast.stmt | None) -> str | None:
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
    return one_line("; ".join(sorted(found, key=lambda text: (" " not in text, text.lstrip("+-")))), 300) or None


def parts(body: Body, within: str = "", head: str = "") -> Iterator[tuple[str, str]]:
    """(name, source) of each constant, function and method; what is neither belongs to its class or `the top level`."""
    rest = [head]
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{within}{name}", ast.unparse(statement)
            case ast.ClassDef(name=name, body=inner):
                head = " ".join(ast.unparse(part) for part in [*statement.bases, *statement.decorator_list])
                yield from parts(inner, f"{within}{name}.", head)
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                yield f"{within}{name}", ast.unparse(value)
            case _:
                rest.append(ast.unparse(statement))
    yield within.rstrip(".") or "the top level", "\n".join(rest)


def word(name: str, was: str | None, now: str | None) -> str:
    constant = name.rpartition(".")[2].isupper()
    if was is None or now is None:
        sign, value = ("+", now) if was is None else ("-", was)
        return f"{sign}{name} {one_line(value or '', 40)}" if constant else f"{sign}{name}"
    if not constant:
        return name
    was, now = differing_arguments(was, now)
    return f"{name} {one_line(was, 40)} -> {one_line(now, 40)}"


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
