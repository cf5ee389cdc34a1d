"""How far a score is to be believed: what a gain must exceed, learnt from what ran twice."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from autoresearch.journal.experiment import Experiment
from autoresearch.journal.journal import Record
from autoresearch.task import Task

TIE = 0.4  # of the standard deviation of one gain
PRIOR = 4  # edits that ran twice, for which the task's own `noise` counts
Scores = Mapping[int, float]  # by seed


def gains(task: Task, scores: Scores, incumbent: Scores) -> list[float]:
    """Gains over the incumbent, for the same seeds."""
    both = [seed for seed in scores if seed in incumbent]
    return [task.gain(scores[seed], incumbent[seed]) for seed in both]


def gains_by_run(task: Task, experiments: Sequence[Experiment]) -> Iterator[list[float]]:
    """Of each experiment its gains over the incumbent of its time, seed by seed."""
    incumbent: Scores = {}
    for e in experiments:
        yield gains(task, e.scores, incumbent)
        if e.verdict == "keep":
            incumbent = e.scores


def deviation(task: Task, experiments: Sequence[Experiment]) -> float:
    """The standard deviation of one gain. Two gains of one edit differ by chance alone, so half the
    square of their difference is its variance."""
    twice = [gains for gains in gains_by_run(task, experiments) if len(gains) > 1]
    squares = sum((first - second) ** 2 / 2 for first, second, *_ in twice)
    return math.sqrt((PRIOR * task.noise**2 + squares) / (PRIOR + len(twice)))


def tie(task: Task, experiments: Sequence[Experiment]) -> float:
    """Gains that are no larger than this, either way, are none."""
    return TIE * deviation(task, experiments)


def drift(experiments: Sequence[Experiment]) -> float:
    """How much ties have added up to: the incumbent's loss against the best ever kept."""
    total = best = 0.0
    for e in experiments:
        if e.verdict == "keep":
            total += e.gain or 0.0
            best = max(best, total)
    return best - total


def least_gain(task: Task, experiments: Sequence[Experiment], runs: int, lines: int) -> float:
    """What the mean gain must exceed after so many runs: with seeds to come, nothing; at the end, a
    tie. With fewer lines a tie is enough, unless ties have added up to more than one."""
    within = tie(task, experiments)
    least = within if runs >= task.seeds else 0.0
    last = digits(experiments)
    if lines < 0:
        least = min(least, drift(experiments) - within - 2 * last)
    return least + last


def digits(experiments: Sequence[Experiment]) -> float:
    """What binary fractions may add to a gain."""
    return 1e-9 * max((abs(s) for e in experiments[:1] for s in e.scores.values()), default=0.0)


def to_beat(task: Task, record: Record, before: Scores, seed: int, lines: int) -> float:
    """The score that the next run of an idea, with this seed, must exceed for the idea to go on."""
    if not record.kept:
        return task.worst
    runs = len(before) + 1
    least = runs * least_gain(task, record.experiments, runs, lines)
    least -= sum(gains(task, before, record.incumbent_scores))
    rival = record.incumbent_scores[seed]
    return rival + least if task.higher else rival - least


def is_better(task: Task, record: Record, scores: Scores, lines: int) -> bool:
    """Whether these scores are better than the incumbent's, as far as is known."""
    least = least_gain(task, record.experiments, len(scores), lines)
    return not record.kept or fmean(gains(task, scores, record.incumbent_scores)) > least


def is_worse_on_sealed(task: Task, record: Record, sealed: Scores) -> bool:
    """Whether these sealed scores are worse than the incumbent's by more than chance, as far as
    both are known: their mean gain is a loss of more than its standard deviation."""
    found = gains(task, sealed, record.kept[-1].sealed) if record.kept else []
    if not found:
        return False
    within = deviation(task, record.experiments) / math.sqrt(len(found))
    return fmean(found) < -within - digits(record.experiments)
