"""The referee: whose number counts, and what it does with a model that is not one."""

import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Project, experiment

from gpt import graph
from prepare import ARENA


def claiming(claimed: float, scored: object) -> str:
    """An agent whose train.py prints one score and leaves a model of another."""
    return f"""
    sed -i 's/^VAL_BPB = [0-9.]*/VAL_BPB = {claimed}/; s/file.write(.*)/file.write("{scored}")/' train.py; echo an idea
    """


@pytest.mark.parametrize(
    ("claimed", "scored", "status", "recorded"),
    [
        (0.9, 0.9003, "keep", "0.900300"),
        (0.9997, 0.9999, "discard", "0.999900"),  # no better than a tie, by the number that counts
        (0.9, 0.9006, "crash", "0.000000"),
    ],
)
def test_its_number_counts(
    project: Project, claimed: float, scored: float, status: str, recorded: str
) -> None:
    project.research(claiming(claimed, scored))
    row = project.rows()[1]
    assert (row["status"], row["val_bpb"]) == (status, recorded)
    message = project.git("log", "-1", "--format=%B", row["commit"])
    if status == "crash":
        assert "Crash: the guard: claims val_bpb 0.900000, and its model scores 0.900600" in message
    else:
        assert f"\nSealed-bpb: {scored + 0.1:.6f}\n" in message and "\nReferee-seconds: " in message
    project.check()


def test_what_loses_on_sealed_rows_is_not_kept(project: Project) -> None:
    """With both seeds by the real driver, and no agent is told the number."""
    project.patch("prepare.py", "{score + 0.1:.6f}", "{2.3456 - score:.6f}")
    project.patch("pyproject.toml", "seeds = 1 ", "seeds = 2 ")
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "two seeds")
    project.research(claiming(0.9, 0.9), experiments=1)
    baseline, better = experiment(project, 0), experiment(project, 1)
    assert baseline.sealed == {42: 1.3456, 43: 1.3456} and better.sealed == {42: 1.4456}
    reason = "[better on validation, and worse on the sealed rows]"
    assert better.verdict == "discard" and better.headline == f"an idea {reason}"
    assert project.rows()[1]["description"] == f"an idea {reason}"
    told = project.loop("prompt", "--tag=t")
    assert reason in told and "3456" not in told and "4456" not in told
    project.check()


def test_a_guard_that_gives_no_score_where_it_did(project: Project) -> None:
    """The measured score is not held against one of the guard's; without one, it counts."""
    project.patch(
        "prepare.py", 'print(f"val_bpb: {', 'print(f"val_bpb: {score}" * (score > 0.95) + f"\\nx: {'
    )
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "a guard")
    project.research(claiming(0.9, 0.9))
    assert experiment(project, 0).facts["guarded"] == 1
    assert project.rows()[1]["description"] == "an idea [the guard: val_bpb was not printed]"
    assert experiment(project, 1).verdict == "crash"
    assert "guarded" not in project.loop("prompt", "--tag=t")
    project.patch("prepare.py", "score > 0.95", "score > 2")
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "another")
    project.research(claiming(0.9, 0.9), tag="u")
    assert experiment(project, 1, "u").verdict == "keep"


def test_a_model_that_it_cannot_score(project: Project) -> None:
    project.research(claiming(0.9, "no model"))
    assert re.search(r"\[the guard: ValueError: .*no model", project.rows()[1]["description"])
    project.check()


def test_modules_that_a_training_leaves_are_not_the_referees(project: Project) -> None:
    forge = 'print("val_bpb: 0.1\\nsealed_bpb: 0.1"); raise SystemExit'
    copy = f"open('pathlib.py', 'w').write({forge!r})"
    project.research(
        f"echo {shlex.quote(copy)} >> train.py; sed -i 's/^VAL_BPB = 1.0/VAL_BPB = 0.9/' train.py; echo idea"
    )
    assert (project.rows()[1]["status"], project.rows()[1]["val_bpb"]) == ("keep", "0.900000")


def test_no_model_is_left_and_a_discard_costs_no_referee(project: Project) -> None:
    lower = 'sed -i "s/^VAL_BPB = .*/VAL_BPB = 0.9/" train.py; echo lower'
    project.research(
        f"if [ $AUTORESEARCH_EXPERIMENT = 0002 ]; then echo 'X = 1' >> train.py; else {lower}; fi",
        2,
    )
    assert [row["status"] for row in project.rows()] == ["keep", "keep", "discard"]
    assert not list(project.root.glob("runs/t/**/out"))
    assert not (project.root / "runs/t/0002/guard.log").exists()


class Payload:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["PAYLOAD"],)


@pytest.mark.parametrize("place", ["weights.bin", "graph.json"])
def test_a_pickle_in_the_model_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model = torch.nn.Embedding(ARENA.vocab_size, ARENA.vocab_size)
    x = torch.zeros(ARENA.eval_rows, ARENA.sequence_len, dtype=torch.int64)
    exported = graph.export(model, x)
    (tmp_path / "graph.json").write_bytes(exported.text)
    with (tmp_path / "weights.bin").open("wb", buffering=0) as file:
        graph.write_tensors(model, exported, file)
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "it-ran"))
    (tmp_path / place).write_bytes(pickle.dumps(Payload()))
    command = [sys.executable, ROOT / "prepare.py", "--judge"]
    env = {**os.environ, "AUTORESEARCH_MODEL": str(tmp_path), "AUTORESEARCH_SCORE": "2.0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "it-ran").exists()
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: the ")
    pickle.loads((tmp_path / place).read_bytes())
    assert (tmp_path / "it-ran").exists()  # so that this test can fail
