"""The offline agent: honest random search, within bounds, never twice the same."""

import random
import re

import pytest
from conftest import ROOT, Project

from autoresearch.agents.random_search import CONSTANT, ON_CPU, ON_GPU, propose, read

SOURCE = (ROOT / "train.py").read_text()


def test_it_finds_the_constants_of_train_py() -> None:
    names = {found[1] for found in CONSTANT.finditer(SOURCE)}
    assert {"DEPTH", "BATCH", "MATRIX_LR", "WARMDOWN", "FINAL_LR"} <= names
    assert "MICRO_BATCH" not in names and "T" not in names


@pytest.mark.parametrize("form", [ON_CPU, ON_GPU], ids=["CPU", "GPU"])
def test_proposals_stay_within_bounds(form: str) -> None:
    """Along a random walk of 300 steps every value stays in its range and every program compiles; for a GPU what suits
    the card stays as it is, and for each machine the value of the other."""
    rng, source, moved = random.Random(0), SOURCE, set()
    for _ in range(300):
        before, (source, _) = source, propose(source, rng, form)
        for name, value, low, high in CONSTANT.findall(source):
            if number := re.fullmatch(form, value):
                assert read(low) <= read(number[1]) <= read(high), name
        compile(source, "train.py", "exec")
        lines = zip(before.splitlines(), source.splitlines(), strict=True)
        moved |= {old.split()[0] for old, new in lines if old != new}
    # each of them, from zero as well
    of_card = set() if form == ON_CPU else {"DEPTH", "HEADS", "BATCH", "TABLE_ROWS"}
    assert moved == {found[1] for found in CONSTANT.finditer(SOURCE)} - of_card
    (rope,) = re.findall(r"^ROPE_BASE += pick\((\S+), (\S+)\)", source, re.MULTILINE)
    assert [value == kept for value, kept in zip(rope, ("1e4", "1e6"), strict=True)] == [
        form == ON_GPU,
        form == ON_CPU,
    ]


def test_it_says_what_it_did() -> None:
    for seed in range(50):
        program, changes = propose(SOURCE, random.Random(seed))
        changed = [
            new.split()[0]
            for old, new in zip(SOURCE.splitlines(), program.splitlines(), strict=True)
            if old != new
        ]
        assert sorted(change.split()[0] for change in changes) == sorted(changed)


def test_it_never_proposes_what_was_tried(project: Project) -> None:
    """One constant with six steps: six experiments, each another program, then it has nothing left to try."""
    project.research("random", experiments=6)
    commits = [row["commit"] for row in project.rows()]
    blobs = {project.git("rev-parse", f"{commit}:train.py") for commit in commits}
    assert len(blobs) == len(commits) == 7
    said = project.loop("status", "--tag=t")
    assert "6 experiments" in said and "VAL_BPB 1.0 -> " in said
    project.check()


def test_the_same_seed_makes_the_same_search(project: Project) -> None:
    project.research("random", experiments=3, tag="a")
    project.research("random", experiments=3, tag="b")
    a, b = ([row["description"] for row in project.rows() if row["tag"] == tag] for tag in "ab")
    assert a == b


def test_it_does_not_debug(project: Project) -> None:
    """An idea that crashes is given up: one crash row, and the search goes on."""
    project.write(
        "train.py",
        (project.root / "train.py").read_text()
        + "\nif VAL_BPB < 0.8: raise ValueError('too good')\n",
    )
    project.git(
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "commit",
        "--quiet",
        "--all",
        "--message=crash below 0.8",
    )
    project.research("random", experiments=5)
    statuses = [row["status"] for row in project.rows()]
    assert "crash" in statuses and len(statuses) == 6
    project.check()
