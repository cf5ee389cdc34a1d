"""What an edit changed in a program, and when two programs are the same, by their syntax trees."""

import ast
import hashlib
import io
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from autoresearch.files import one_line
from autoresearch.ideas import Change
from autoresearch.journal.git import Repo
from autoresearch.task import MAX_FILE, Task

TOP = "top-level"


# --------------------------------------------------------------------------------------------------
# Programs

NO_PROGRAM = (SyntaxError, ValueError, RecursionError, MemoryError)  # what reading one may raise


def decode(source: bytes) -> str:
    """A program's text as Python reads it; SyntaxError or ValueError for none, or one too long."""
    if len(source) > MAX_FILE:
        raise ValueError(f"longer than {MAX_FILE / 1e6:g} MB")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return io.TextIOWrapper(io.BytesIO(source), encoding).read()


def syntax_error(path: str, program: bytes) -> tuple[str, str] | None:
    """Compile a Python file without running it, since a typo must not cost a run. Returns what is
    wrong in a line, and the line of the program; None for a file that is not Python."""
    if not path.endswith(".py"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(decode(program), path, "exec")
    except NO_PROGRAM as error:
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        said = f"{type(error).__name__}: {getattr(error, 'msg', error)}{where}"
        text = getattr(error, "text", "") or ""
        return one_line(f"{path} does not compile: {said}"), one_line(text)
    return None


def fingerprint(source: bytes) -> str:
    """A hash but for comments, layout, docstrings, the order of constants; empty for no program.

    >>> fingerprint(b"A = 1  # one\\nB = 2") == fingerprint(b"B = 2\\n\\nA = 1")
    True
    """
    try:
        module = parse(source)
        module.body = list(sort_constants(module.body))
        # by its text: another Python has other syntax trees
        return hashlib.sha256(ast.unparse(module).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    except NO_PROGRAM:
        return ""


def source_of(repo: Repo, task: Task, commit: str) -> str:
    """The fingerprint of the files that may change, in a commit."""
    if task.only_file.endswith(".py"):
        return fingerprint(repo.show(commit, task.only_file))
    listed = sorted(item for item in repo.blobs(commit).items() if task.may_edit(item[0]))
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


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
    """Sort each row of plain constants by name; the order of all else matters."""
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


PLAIN = (
    ast.Constant | ast.UnaryOp | ast.unaryop | ast.BinOp | ast.operator | ast.Tuple | ast.List
    | ast.expr_context
)  # fmt: skip


def plain_constant(statement: ast.stmt) -> str | None:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
            return name if all(isinstance(node, PLAIN) for node in ast.walk(value)) else None
    return None


# -----------------------------------------------------------------------------
# What differs


def describe_edit(repo: Repo, base: str, commit: str, source: str) -> Change:
    """What an edit changed, in a bounded line: the parts of one program, else files."""
    lines = repo.lines_changed(base, commit)
    words = one_line("; ".join(f"{path} +{a} -{r}" for path, (a, r) in lines.items()), 300)
    match list(lines):
        case [path] if path.endswith(".py"):
            words = describe_change(repo.show(base, path), repo.show(commit, path))
    added, removed = (sum(row[column] for row in lines.values()) for column in (0, 1))
    return Change(words, source, added, removed)


def describe_change(before: bytes, after: bytes) -> str:
    """What differs between two programs, in a bounded line: constants with their values, functions
    by name; empty where one of them is no program.

    >>> describe_change(b"A = 1\\ndef f(): pass", b"A = 2\\ndef f(): return 1\\nB = 3")
    'A 1 -> 2; +B 3; f'
    """
    try:
        old, new = (dict(parts(parse(text).body)) for text in (before, after))
        names = [name for name in old | new if old.get(name) != new.get(name)]
        found = [describe_part(name, old.get(name), new.get(name)) for name in names]
    except NO_PROGRAM:
        return ""
    constants_first = sorted(found, key=lambda text: (" -> " not in text, text.lstrip("+-")))
    return one_line("; ".join(constants_first), 300)


@dataclass(frozen=True)
class Part:
    """A constant's value, or the text of a function, a method, the rest of a class or module."""

    text: str
    constant: bool = False


def parts(body: list[ast.stmt], within: str = "", head: str = "") -> Iterator[tuple[str, Part]]:
    rest = [head]
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield f"{within}{name}", Part(ast.unparse(statement))
            case ast.ClassDef(name=name, body=inner, bases=bases, keywords=keywords):
                around = [*bases, *keywords, *statement.decorator_list]
                yield from parts(inner, f"{within}{name}.", " ".join(map(ast.unparse, around)))
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name.isupper():
                yield f"{within}{name}", Part(ast.unparse(value), constant=True)
            case _:
                rest.append(ast.unparse(statement))
    yield within.rstrip(".") or TOP, Part("\n".join(rest))


def describe_part(name: str, was: Part | None, now: Part | None) -> str:
    if was and now:
        both = was.constant and now.constant
        return f"{name} {short(was.text)} -> {short(now.text)}" if both else name
    part, sign = (now, "+") if now else (was, "-")
    return f"{sign}{name} {short(part.text)}" if part and part.constant else f"{sign}{name}"


def short(value: str) -> str:
    return one_line(value.replace(";", ","), 40)  # a semicolon parts one change from the next
