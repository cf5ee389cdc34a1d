"""The benchmark of train.py, run as a reader would, on few tokens; and what the notebook owes to it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.train_bench import CPU_TOKENS, REFERENCE, constants_of, parse, with_constants

BENCH = [sys.executable, str(ROOT / "benchmarks/train_bench.py")]


def test_columns_get_the_same_tokens(cache: Path) -> None:
    """Reference, train.py and an idea side by side, with figures of real runs; what failed is told in a line."""
    command = [
        *BENCH,
        "--tokens",
        "16384",
        "--jobs",
        "2",
        "--try",
        "HEAD_DIM=33",
        "--try",
        "NGRAMS=() DEPTH=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (failed,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    why = "AssertionError: HEAD_DIM must be a multiple of 8 up to 256, as attention kernels need"
    assert failed == f"error: HEAD_DIM=33, seed 42: ended with 1: {why}"
    assert "Traceback" not in done.stderr and "fewer than 262,144 tokens" in done.stdout
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5]
        for line in done.stdout.splitlines()
        if "│" in line
    }
    assert [cell.split()[0] for cell in rows["num_steps"]] == ["4.0"] * 3
    scores = [float(cell.split()[0]) for cell in rows["val_bpb"]]
    assert all(2 < score < 5 for score in scores) and len(set(scores)) == 3
    sizes = [float(cell.split()[0]) for cell in rows["num_params_M"]]
    assert sizes[2] < sizes[0] < sizes[1]
    for name in ("tokens/s", "compile_seconds", "evaluation_seconds", "total_seconds"):
        assert all(float(cell.split()[0].replace(",", "")) >= 0 for cell in rows[name]), name


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--arena", "nope"],
            "no NVIDIA GPU found, and only the arena demo runs without one, not nope",
        ),
        (["--jobs", "0"], "argument --jobs: '0' is not a whole number, at least 1"),
        (["--tokens", "-5"], "argument --tokens: '-5' is not a whole number, at least 1"),
        (["--budget", "0"], "argument --budget: '0' is not a positive number"),
        (
            ["--budget", "60", "--tokens", "5"],
            "argument --tokens: not allowed with argument --budget",
        ),
        (["--try", "DEPHT=3"], "argument --try: DEPHT: no such constant at the top of train.py"),
        (["--try", "WIDTH=64"], "argument --try: WIDTH: no such constant at the top of train.py"),
        (
            ["--try", "DEPTH"],
            "argument --try: 'DEPTH' is not of the form 'NAME=VALUE NAME=VALUE', values without blanks",
        ),
        (["--try", ""], "argument --try: '' is not of the form"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: {reason}")
        and said.endswith("; --help tells more\n")
        and said.count("\n") == 1
    )


def test_on_a_cpu_tokens_count_unless_a_time_is_given() -> None:
    assert (parse([]).tokens, parse([]).budget) == (CPU_TOKENS, None)
    assert (parse(["--budget", "60"]).tokens, parse(["--budget", "60"]).budget) == (None, 60.0)


def test_an_arena_that_cannot_run_here_is_not_made(tmp_path: Path) -> None:
    env = os.environ | {"AUTORESEARCH_CACHE": str(tmp_path)}
    done = subprocess.run(
        [*BENCH, "--arena", "python"], env=env, capture_output=True, text=True, check=False
    )
    assert (
        done.returncode == 2
        and "no NVIDIA GPU found" in done.stderr
        and not list(tmp_path.iterdir())
    )


def test_a_constant_is_replaced_and_nothing_else() -> None:
    source = (ROOT / "train.py").read_text()
    assert not {"WIDTH", "T", "V", "DEVICE", "LAG", "ATTENTION", "POLAR_EXPRESS"} & constants_of(
        source
    )
    changed = with_constants(source, {"WINDOWS": r"'S\1'", "BATCH": "2**13"})
    pairs = zip(source.splitlines(), changed.splitlines(), strict=True)
    assert [new for old, new in pairs if old != new] == ["BATCH = 2**13", r"WINDOWS = 'S\1'"]


def test_the_notebook_has_a_row_for_every_constant() -> None:
    """Where it comes from; and no row for one that is gone."""
    constants = constants_of((ROOT / "train.py").read_text())
    rows = re.findall(r"^\|([^|]*)\|", (ROOT / "docs/notebook.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([A-Z_0-9]+)`", row)} == constants


def test_the_reference_sets_constants_that_there_are() -> None:
    assert REFERENCE.keys() <= constants_of((ROOT / "train.py").read_text())
