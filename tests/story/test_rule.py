"""The rule, case by case."""

import math
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from made_up import MadeUpJournal, World

import loop
from autoresearch import noise
from autoresearch.ideas import Change, Edit, Idea, Reply, Run, Usage
from autoresearch.journal.experiment import Experiment, Verdict
from autoresearch.task import Arena, Machine, Task

ONE = Task(("train.py",), "python train.py", "loss", noise=0.0005)  # a tie is 0.0002
TWO = replace(ONE, seeds=2)


def experiment(
    number: int, verdict: Verdict, scores: list[float], rivals: list[float], first: int = 42
) -> Experiment:
    """One that ran with the seeds from `first` on, as its incumbent did."""
    return Experiment(
        number=number, verdict=verdict, description="", reason="", usage=Usage(0.0), change=Change(), repairs=0,
        scores=dict(enumerate(scores, first)), incumbent=fmean(rivals) if rivals else None,
        agent="", seed=first, arena=Arena(), machine=Machine(), program="", goal="lower loss", tag="t", finished="",
    )  # fmt: skip


def journal_of(*experiments: Experiment) -> MadeUpJournal:
    journal = MadeUpJournal(World())
    journal.experiments = [*experiments]
    return journal


def idea_of(runs: dict[int, Run], lines: int = 0) -> Idea:
    change = Change("", "", max(lines, 0), max(-lines, 0))
    edit = Edit(Reply(), ("a",), "c", (), change)
    return Idea(1, None, "c0", "", edit, runs=runs)  # type: ignore[arg-type]


def judged(task: Task, journal: MadeUpJournal, idea: Idea) -> str:
    study: Any = SimpleNamespace(task=task, journal=journal)
    return loop.judge(study, idea)


def verdict(task: Task, journal: MadeUpJournal, scores: list[float], lines: int = 0) -> str:
    seeds = [*journal.incumbent_scores] or [42, 43]
    runs = {seed: Run(score) for seed, score in zip(seeds, scores, strict=False)}
    return judged(task, journal, idea_of(runs, lines))


@pytest.mark.parametrize(
    ("score", "lines", "better"),
    [
        (0.9, 50, True),  # better, at any length
        (0.9997, 5, True),  # better by more than a tie
        (0.9998, 0, False),  # a tie that removes nothing
        (0.9998, 5, False),  # a tie that adds
        (0.9998, -1, True),  # a tie that removes lines, on the better side
        (1.0, -1, True),  # equal and simpler
        (1.0002, -1, True),  # the edge of a tie, in spite of binary fractions
        (1.000201, -9, False),  # just worse
        (1.1, -500, False),  # worse, however short
    ],
)
def test_one_seed(score: float, lines: int, better: bool) -> None:
    journal = journal_of(experiment(0, "keep", [1.0], []))
    assert verdict(ONE, journal, [score], lines) == ("keep" if better else "discard")


def test_ties_do_not_add_up() -> None:
    best = experiment(1, "keep", [0.9998], [1.1])
    journal = journal_of(
        experiment(0, "keep", [1.1], []), best, experiment(2, "keep", [1.0], [0.9998])
    )
    assert verdict(ONE, journal, [1.0], -9) == "keep"
    assert verdict(ONE, journal, [1.0001], -9) == "discard"
    assert verdict(ONE, journal, [0.9997], 9) == "keep"


@pytest.mark.parametrize(
    ("scores", "lines", "found"),
    [
        ([0.99], 0, "again"),  # a gain runs once more
        ([0.9999], 9, "again"),  # however small
        ([1.0], 0, "discard"),
        ([1.0001], -1, "again"),  # a tie with fewer lines
        ([1.0003], -1, "discard"),
        ([0.99, 2.0], 0, "keep"),  # each against the incumbent's score for its seed
        ([0.99, 2.009], 0, "keep"),  # the mean counts
        ([0.99, 2.01], 0, "discard"),
        ([0.99, 2.0098], 0, "discard"),  # a gain of a tie at most
        ([0.99, 2.0098], -1, "keep"),
        ([0.99, 2.5], -9, "discard"),
    ],
)
def test_two_seeds(scores: list[float], lines: int, found: str) -> None:
    journal = journal_of(experiment(0, "keep", [1.0, 2.0], []))
    assert verdict(TWO, journal, scores, lines) == found


@pytest.mark.parametrize(
    ("sealed", "incumbent", "found"),
    [
        ([3.0, 4.0], {42: 3.0, 43: 4.0}, "keep"),  # no loss
        ([3.0005, 4.0001], {42: 3.0, 43: 4.0}, "keep"),  # on average less than the noise of two
        ([3.0009, 3.9999], {42: 3.0, 43: 4.0}, "discard"),  # more than that
        ([3.0009, 3.9999], {42: 3.0}, "discard"),  # paired by seed, where both have one
        ([3.0004, 9.0], {42: 3.0}, "keep"),
        ([None, 4.0006], {42: 3.0, 43: 4.0}, "discard"),
        ([9.0, 9.0], {}, "keep"),  # nothing to be compared with, as in an old record
        ([None, None], {42: 3.0, 43: 4.0}, "keep"),
        ([3.0009], {42: 3.0, 43: 4.0}, "discard"),  # without another run
        ([3.0004], {42: 3.0, 43: 4.0}, "again"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_sealed(sign: int, sealed: list[Any], incumbent: dict[int, float], found: str) -> None:
    """What gains on validation must not lose on the sealed rows by more than the noise, whatever direction is better."""
    task = replace(TWO, higher=sign < 0)
    first = experiment(0, "keep", [1.0 * sign, 2.0 * sign], [])
    journal = journal_of(
        replace(first, sealed={seed: sign * value for seed, value in incumbent.items()})
    )
    runs = {
        seed: Run(score * sign, sealed=value and value * sign)
        for seed, score, value in zip((42, 43), (0.99, 1.99), sealed, strict=False)
    }
    idea = idea_of(runs)
    assert judged(task, journal, idea) == found
    said = "better on validation, and worse on the sealed rows"
    assert idea.note == (said if found == "discard" else "")


def test_what_is_no_better_is_not_called_better() -> None:
    first = replace(experiment(0, "keep", [1.0, 2.0], []), sealed={42: 3.0})
    idea = idea_of({42: Run(1.1, sealed=4.0)})
    assert judged(TWO, journal_of(first), idea) == "discard" and idea.note == ""


def test_the_baseline_runs_with_all_seeds() -> None:
    journal = journal_of()
    assert [verdict(TWO, journal, [1.0, 2.0][:n]) for n in range(3)] == ["again", "again", "keep"]


def test_a_tie_is_learnt() -> None:
    """From the edits that ran twice; what the task says counts for four of them."""
    journal = journal_of(experiment(0, "keep", [1.0, 2.0], []))
    assert noise.tie(TWO, journal.experiments) == pytest.approx(0.0002)
    for number in range(1, 13):  # gains that differ by 0.02, kept or not; one run says nothing
        scores = [0.98 + 0.03 * (number % 2), 2.0 - 0.03 * (number % 2)][: 1 + number // 3 % 2]
        journal.experiments.append(experiment(number, "discard", scores, [1.0, 2.0]))
    twice = sum(len(e.scores) == 2 for e in journal.experiments[1:])
    assert twice == 6
    spread = [
        (0.02 - 0.0) ** 2 / 2 if n % 2 == 0 else (-0.01 - 0.03) ** 2 / 2
        for n in (3, 4, 5, 9, 10, 11)
    ]
    expected = math.sqrt((4 * 0.0005**2 + sum(spread)) / 10)
    assert noise.deviation(TWO, journal.experiments) == pytest.approx(expected)


def test_what_the_next_run_has_to_beat() -> None:
    """The guard looks at what goes on, and at nothing else."""
    journal = journal_of(experiment(0, "keep", [1.0, 2.0], []))
    assert noise.to_beat(TWO, journal_of(), {}, 42, 0) == math.inf
    assert noise.to_beat(TWO, journal, {}, 42, 0) == pytest.approx(1.0)
    assert noise.to_beat(TWO, journal, {}, 42, -1) == pytest.approx(1.0002)
    assert noise.to_beat(TWO, journal, {42: 0.99}, 43, 0) == pytest.approx(2.0096)
    higher = replace(TWO, higher=True)
    assert noise.to_beat(higher, journal, {42: 1.01}, 43, 0) == pytest.approx(1.9904)
