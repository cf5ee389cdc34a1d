"""Duels: an edit and the incumbent in turns, the real desk with made-up runs."""

import math
from dataclasses import replace
from typing import Any

import pytest
from made_up import TASK, World

from autoresearch.desk import Desk
from autoresearch.files import UserError
from autoresearch.ideas import Edit, Idea, Reply, Run

NEVER = -math.inf  # no score beats it


class Ring(Desk):
    """Runs take their scores from two lists."""

    def __init__(self, mine: list[float | None], theirs: list[float | None], duels: int):
        task = replace(TASK, duels=duels, seeds=1, noise=0.0)
        study, desk = World().study(task)
        super().__init__(study)
        self.left = {"mine": mine, "theirs": theirs}
        self.idea = replace_edit(desk.new_idea())
        self.order: list[tuple[str, float]] = []

    def run_job(self, idea: Idea, commit: str, seed: int, beat: float, which: str) -> Run:
        self.order.append((commit, beat))
        score = self.left[commit].pop(0)
        crash = "" if score is not None else "no number"
        return Run(score, crash=crash, repairable=bool(crash), facts={"run_seconds": 1.0})


def replace_edit(idea: Idea) -> Idea:
    return replace(idea, base="theirs", edit=Edit(Reply(), ("a",), "mine"))


def fight(mine: list[Any], theirs: list[Any], duels: int) -> tuple[Run, list[Any]]:
    ring = Ring(mine, theirs, duels)
    return ring.duel(ring.idea, 42), ring.order


def test_all_are_won() -> None:
    run, order = fight([1, 2, 3], [2, 4, 9], 3)
    assert (run.score, run.rival) == (2.0, 5.0)
    assert run.facts == {"run_seconds": 6.0, "duels_won": 3.0}
    # each goes first in turn, and the guard looks at the last one, which knows what it has to beat
    assert order == [
        ("mine", NEVER), ("theirs", NEVER), ("theirs", NEVER), ("mine", NEVER),
        ("theirs", NEVER), ("mine", 9),
    ]  # fmt: skip


def test_a_sealed_score_says_nothing_in_a_duel() -> None:
    """It drifts as the other one does, and no guard has looked at the incumbent in the same minutes."""
    ring = Ring([1], [2], 1)
    run_job = ring.run_job
    ring.run_job = lambda *args: replace(run_job(*args), sealed=9.0)  # type: ignore[method-assign]
    assert ring.duel(ring.idea, 42).sealed is None


def test_the_first_that_is_lost_ends_it() -> None:
    run, order = fight([1, 5], [2, 4], 5)
    assert (run.score, run.rival, run.facts["duels_won"]) == (3.0, 3.0, 1.0)
    assert len(order) == 4
    run, order = fight([2], [2], 5)  # equal is not won
    assert run.facts["duels_won"] == 0 and len(order) == 2


def test_a_crash_has_no_score() -> None:
    run, order = fight([None], [2], 5)
    assert run.crash and run.score is None and len(order) == 1
    run, order = fight([1, None], [2, 2], 5)
    assert run.crash and run.facts == {"run_seconds": 4.0} and len(order) == 4


def test_an_incumbent_that_crashes_is_nobodys_fault() -> None:
    with pytest.raises(UserError, match="the incumbent crashed in a duel: no number"):
        fight([1], [None, None, None], 5)


def test_one_duel() -> None:
    run, order = fight([1], [2], 1)
    assert order == [("theirs", NEVER), ("mine", 2)] and run.facts["duels_won"] == 1


def test_an_incumbent_may_fail_once() -> None:
    run, order = fight([1], [None, 2], 1)
    assert run.facts["duels_won"] == 1 and run.facts["run_seconds"] == 3.0 and len(order) == 3
