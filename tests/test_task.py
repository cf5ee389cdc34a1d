"""The task: what is read from TOML, which files may change, and the numbers of a log."""

import math
from pathlib import Path

import pytest
from conftest import ROOT

from autoresearch.files import UserError
from autoresearch.task import Task, read_failure, read_numbers, read_task

MINIMAL = 'files = ["a.py"]\nmeasure = "make"\nhigher = "qps"\n'


def task_of(folder: Path, text: str, name: str = "autoresearch.toml") -> Task:
    (folder / name).write_text(text)
    return read_task(folder)


def test_this_repository() -> None:
    task = read_task(ROOT)
    assert task.only_file == "train.py" and task.goal == "lower val_bpb" and task.noise == 0.0005


def test_defaults(tmp_path: Path) -> None:
    task = task_of(tmp_path, MINIMAL)
    assert task == Task(("a.py",), "make", "qps", higher=True)
    assert (task.seeds, task.timeout, task.network, task.gpu) == (1, 600.0, False, False)


def test_in_pyproject_beside_prices(tmp_path: Path) -> None:
    table = f"[tool.autoresearch]\n{MINIMAL}[tool.autoresearch.prices]\nx = [1, 2, 3]\n"
    assert task_of(tmp_path, table, "pyproject.toml").metric == "qps"


def test_upstream_needs_no_task(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    task = task_of(tmp_path, "[project]\nname = 'nano'\n", "pyproject.toml")
    assert task.measure == "uv run train.py" and task.goal == "lower val_bpb" and task.gpu


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("files = [", "autoresearch.toml cannot be read"),
        (MINIMAL + "seed = 3", "unknown key seed; the keys are files, measure, lower, higher"),
        (MINIMAL + 'lower = "x"', "both lower and higher"),
        ('files = ["a"]\nmeasure = "make"', "neither lower nor higher"),
        ('files = []\nmeasure = "make"\nlower = "x"', "files is missing"),
        ('files = ["a"]\nlower = "x"', "measure is missing"),
        (MINIMAL.replace('["a.py"]', '"a.py"'), "files = 'a.py' is of the wrong kind"),
        (MINIMAL.replace('"a.py"', "3"), "files = [3] is of the wrong kind"),
        (MINIMAL.replace("qps", "lines"), "'lines' cannot be a metric"),
        (MINIMAL.replace("qps", "q p"), "'q p' cannot be a metric"),
        (MINIMAL + "timeout = true", "timeout = True is of the wrong kind"),
        (MINIMAL + "gpu = 1", "gpu = 1 is of the wrong kind"),
        (MINIMAL + "timeout = -1", "timeout = -1 is no number of 0 or more"),
        (MINIMAL + "seeds = 0", "seeds = 0 leaves nothing to measure"),
        (MINIMAL + "seeds = 2.0", "seeds = 2.0 is of the wrong kind"),
        (MINIMAL + "seeds = 2\nduels = 3", "seeds are for scores that hold, and duels for those"),
        (MINIMAL + "noise = nan", "noise = nan is no number of 0 or more"),
    ],
)
def test_a_wrong_task(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        task_of(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_no_task_shows_the_lines_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_task(tmp_path)
    said, _, lines = str(error.value).partition("\n")
    assert "has no task; pyproject.toml takes lines like these" in said
    task_of(tmp_path, lines, "pyproject.toml")  # they are a task


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("a.py", ["a.py"], ["b/a.py", "a.pyc", "axpy"]),
        ("*.py", ["a.py"], ["b/a.py"]),
        ("**/*.py", ["a.py", "b/c/a.py"], ["a.txt"]),
        ("src/", ["src/a", "src/b/c"], ["src", "srcs/a", "x/src/a"]),
        ("src/**", ["src/a", "src/b/c"], ["src"]),
        ("a?.[x]", ["ab.[x]"], ["ab.x", "a/.[x]"]),
    ],
)
def test_patterns(pattern: str, inside: list[str], outside: list[str]) -> None:
    task = Task((pattern, "other"), "make", "x")
    assert all(map(task.may_edit, inside)) and not any(map(task.may_edit, outside))


@pytest.mark.parametrize(
    ("log", "numbers"),
    [
        ("x: 1.5", {"x": 1.5}),
        ("METRIC x=2e3\nMETRIC other = 4", {"x": 2000.0, "other": 4.0}),
        ("x: 9\nnotes of a step\n---\nx:   1.5\ndepth: 8\nmfu: n/a\n", {"x": 1.5, "depth": 8.0}),
        ("x: 1\nbad: inf\nwords: of mine\n", {"x": 1.0}),
    ],
)
def test_numbers(log: str, numbers: dict[str, float]) -> None:
    assert read_numbers(log, "x") == numbers


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "x was not printed"),
        ("x: 1\nx: 1", "x was printed 2 times"),
        ("---\nx: 1\n---\nx: 2\n", "x was printed 2 times"),
        ("x: 1\n---\nother: 2\n", "x was not printed"),
        ("x: nan", "x is not a finite number: nan"),
        ("x: low", "x is not a finite number: low"),
    ],
)
def test_no_number_to_believe(log: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_numbers(log, "x")


def test_a_metric_that_may_be_missing_is_not_mistold() -> None:
    assert read_numbers("other: 2\n", "x", optional=True) == {"other": 2.0}
    for log in ("x: \n", "x: 99 ms\n", "x: 99\n---\nother: 2\n", "METRIC x= \n"):
        with pytest.raises(ValueError, match="x was not printed"):
            read_numbers(log, "x", optional=True)


def test_direction() -> None:
    higher, lower = Task(("a",), "m", "x", higher=True), Task(("a",), "m", "x")
    assert (higher.gain(2.0, 1.0), lower.gain(2.0, 1.0)) == (1.0, -1.0)
    assert (higher.worst, lower.worst) == (-math.inf, math.inf)


@pytest.mark.parametrize(("code", "words"), [(-9, "signal 9 (out of memory?)"), (139, "signal 11")])
def test_a_signal_by_itself_and_through_a_shell(code: int, words: str) -> None:
    assert words in read_failure(code, "")


def test_the_error_of_node_stands_above_its_version() -> None:
    log = "a.mjs:1\nx\n^\n\nReferenceError: x is not defined\n    at a.mjs:1:1\n\nNode.js v20.1.0\n"
    assert read_failure(1, log) == "ReferenceError: x is not defined"
    assert read_failure(1, "Node.js v20.1.0\n") == "Node.js v20.1.0"
