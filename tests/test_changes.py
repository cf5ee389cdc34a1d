"""When two programs are the same, and what in one differs from another."""

import ast

import pytest
from conftest import ROOT

from autoresearch.journal.changes import describe_change, fingerprint

SOURCE = (ROOT / "train.py").read_bytes()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A = 1\nB = 2\n", "# a note\nB = 2  # two\n\n\nA = (1)\n"),
        (
            "def f(x):\n    return x + 1\n",
            'def f(x):\n    """Add."""\n\n    return (x +\n            1)\n',
        ),
        ("A = 1\nimport os\nC = 3\nB = 2\n", "A = 1\nimport os\nB = 2\nC = 3\n"),
    ],
)
def test_the_same_program(one: str, other: str) -> None:
    assert fingerprint(one.encode()) == fingerprint(other.encode()) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A = 1\n", "A = 2\n"),
        ("A = 1\n", "A = 1.0\n"),
        ("A = 1\nA = 2\n", "A = 2\nA = 1\n"),  # the last one counts
        ("A = 1\nB = A\n", "B = A\nA = 1\n"),  # it is read
        ("f()\ng()\n", "g()\nf()\n"),
        ("def f():\n    x = 1\n    return x\n", "def f():\n    return x\n    x = 1\n"),
        ("A = 1\nimport os\nB = 2\n", "B = 2\nimport os\nA = 1\n"),
        (
            "A = randn(2)\nB = randn(2)\n",
            "B = randn(2)\nA = randn(2)\n",
        ),  # the first draw is another one
        ("A = half(1)\nB = 2\n", "B = 2\nA = half(1)\n"),  # which may read the other
        ("# coding: latin-1\nA = '\xe9'\n", "A = '\xe9'\n"),
    ],
)
def test_another_program(one: str, other: str) -> None:
    assert fingerprint(one.encode()) != fingerprint(other.encode())


@pytest.mark.parametrize(
    "text",
    [
        "def (",
        "x = " + "1+" * 50_000 + "1",
        "\0",
        "(" * 1000,
        "# caf\xe9",
        "# coding: nope",
        "x = 1\n" * 200_000,
    ],
)
def test_what_is_no_program(text: str) -> None:
    program = text.encode("latin-1")
    assert fingerprint(program) == describe_change(SOURCE, program) == ""


def test_a_program_moved_about_is_the_same() -> None:
    """train.py with its comments gone and its layout changed."""
    again = ast.unparse(ast.parse(SOURCE)).encode()
    assert fingerprint(again) == fingerprint(SOURCE) != fingerprint(SOURCE + b"X = 1")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("A = 1", "A = 2", "A 1 -> 2"),
        ("A = pick(1, 2, 3)", "A = pick(1, 5, 3)", "A pick(1, 2, 3) -> pick(1, 5, 3)"),
        ("A = pick(1, 2)", "A = pick(1, 2, 3)", "A pick(1, 2) -> pick(1, 2, 3)"),
        ("A = 1", "B = 1", "-A 1; +B 1"),
        ("class C(X):\n def f(self): 1", "class C(Y):\n def f(self): 2\n def g(self): 3", "C; C.f; +C.g"),
        ("def f(): pass", "async def f(): pass", "f"),
        ("f()", "g()", "top-level"),
        ("A = 1  # one", "A = 1", ""),
        ("class C: pass", "class C(metaclass=M): pass", "C"),
        ("A = 1", "A = '; B 1 -> 2'", "A 1 -> ', B 1 -> 2'"),
    ],
)  # fmt: skip
def test_what_changed(before: str, after: str, said: str) -> None:
    assert describe_change(before.encode(), after.encode()) == said


def test_what_changed_is_bounded() -> None:
    many = "\n".join(f"CONSTANT_{i} = {i}" for i in range(1000))
    assert len(describe_change(b"", many.encode())) <= 300
    assert len(describe_change(b"A = 1", f"A = '{'x' * 10_000}'".encode())) < 100
