"""The benchmark of train.py, run as a reader would, on few tokens; and what the notebook owes to it."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from benchmarks.train_bench import REFERENCE

BENCH = [sys.executable, str(ROOT / "benchmarks/train_bench.py")]


def test_columns_get_the_same_tokens(cache: Path) -> None:
    """Reference, train.py and an idea, side by side: one table with figures of real runs."""
    command = [*BENCH, "--tokens", "16384", "--jobs", "2", "--try", "NGRAMS=() DEPTH=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in done.stdout.splitlines() if "│" in line}
    assert [cell.split()[0] for cell in rows["num_steps"]] == ["4.0"] * 3
    scores = [float(cell.split()[0]) for cell in rows["val_bpb"]]
    assert all(2 < score < 5 for score in scores) and len(set(scores)) == 3
    sizes = [float(cell.split()[0]) for cell in rows["num_params_M"]]
    assert sizes[2] < sizes[0] < sizes[1]
    for name in ("tokens/s", "startup_seconds", "compile_seconds", "evaluation_seconds", "total_seconds"):
        assert all(float(cell.split()[0].replace(",", "")) >= 0 for cell in rows[name]), name


def test_wrong_constants_are_told_in_a_line() -> None:
    for text, reason in (("DEPHT=3", "train.py has 0 constants DEPHT"), ("DEPTH", "is not of the form 'NAME=VALUE")):
        done = subprocess.run([*BENCH, "--try", text], capture_output=True, text=True, check=False)
        assert done.returncode and reason in done.stderr and "Traceback" not in done.stderr


def test_the_notebook_explains_every_constant_that_differs() -> None:
    """From upstream's: one row of the table for each."""
    source, notebook = (ROOT / "train.py").read_text(), (ROOT / "docs/notebook.md").read_text()
    for name, value in REFERENCE.items():
        ours = re.search(rf"^{name} *= (.*?) *#", source, re.MULTILINE)
        assert ours, name
        same = re.sub(r"\s+", " ", ours[1]).replace('"', "'") == value
        assert same or re.search(rf"^\|[^|]*`{name}`", notebook, re.MULTILINE), name
