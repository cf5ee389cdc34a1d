"""What a history amounts to."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from autoresearch.journal.experiment import Experiment, best_of, chained

PAUSE = 60.0  # seconds between two experiments: with more, the driver waited for something


@dataclass(frozen=True)
class Figures:
    """`seconds` says where the time went, pauses left out. `dollars` is None where no cost is
    known; `at_least`: some calls are of unknown cost."""

    baseline: float
    best: Experiment  # of those kept
    change: float  # of the score, the gains of what was kept added up
    kept: int
    discarded: int
    crashed: int
    hourly: float  # experiments
    seconds: dict[str, float]
    agent_dollars: float | None
    gpu_dollars: float | None
    at_least: bool

    @property
    def gain(self) -> float:
        return self.change if self.best.higher else -self.change

    @property
    def experiments(self) -> int:
        return self.kept + self.discarded + self.crashed

    @property
    def dollars(self) -> float | None:
        known = [value for value in (self.agent_dollars, self.gpu_dollars) if value is not None]
        return sum(known) if known else None


def figures(history: Sequence[Experiment]) -> Figures | None:
    """None as long as there is no baseline."""
    kept = [e for e in history if e.verdict == "keep" and e.score is not None]
    if not (best := best_of(kept)):
        return None
    ends = [datetime.fromisoformat(e.finished).timestamp() for e in history]
    gaps = [(end - start, e) for (start, end), e in zip(pairwise(ends), history[1:], strict=True)]
    worked = [(gap, gap - e.minutes * 60) for gap, e in gaps if gap - e.minutes * 60 < PAUSE]
    scored = [e for e in history if e.score is not None]
    runs, training, evaluation = (
        sum_fact(scored, f"{part}_seconds") for part in ("run", "training", "evaluation")
    )
    seconds = {
        "agent": sum(e.usage.seconds for e in history),
        "start-up": max(runs - training - evaluation, 0.0),
        "training": training,
        "evaluation": evaluation + sum_fact(scored, "referee_seconds"),
        "crashed": sum_fact([e for e in history if e.score is None], "run_seconds"),
        "own": sum(max(own, 0.0) for _, own in worked),
    }
    costs = [e.usage.cost_usd for e in history if e.usage.cost_usd is not None]
    gpu = [rate * e.minutes / 60 for e in history if (rate := e.facts.get("gpu_usd_per_hour"))]
    verdicts = [e.verdict for e in history[1:]]
    return Figures(
        baseline=kept[0].score or 0.0,
        best=best,
        change=(chained(history)[history.index(best)] or 0.0) - (kept[0].score or 0.0),
        kept=verdicts.count("keep"),
        discarded=verdicts.count("discard"),
        crashed=verdicts.count("crash"),
        hourly=3600 * len(worked) / max(sum(gap for gap, _ in worked), 1e-3),
        seconds=seconds,
        agent_dollars=sum(costs) if costs else None,
        gpu_dollars=sum(gpu) if gpu else None,
        at_least=any(e.usage.cost_usd is None for e in history[1:]),
    )


def sum_fact(experiments: Sequence[Experiment], name: str) -> float:
    return sum(e.facts.get(name, 0.0) for e in experiments)


# --------------------------------------------------------------------------------------------------
# Figures in words


def count(experiments: int) -> str:
    return f"{experiments} experiment{'' if experiments == 1 else 's'}"


def money(f: Figures) -> str:
    """What was spent; empty where no cost is known."""
    if f.dollars is None:
        return ""
    parts = {"agent": f.agent_dollars, "GPU": f.gpu_dollars}
    known = ", ".join(f"{name} ${value:.2f}" for name, value in parts.items() if value is not None)
    return f"${f.dollars:.2f}{' at least' if f.at_least else ''} ({known})"


def shares(seconds: dict[str, float]) -> str:
    """
    >>> shares({"agent": 1.0, "training": 3.0, "own": 0.0})
    'agent 25%, training 75%'
    """
    total = sum(seconds.values()) or 1.0
    parts = {name: value / total for name, value in seconds.items() if value / total >= 0.005}
    return ", ".join(f"{name} {share:.0%}" for name, share in parts.items())


def duration(seconds: float) -> str:
    """
    >>> duration(62.0)
    '1:02'
    """
    hours, rest = divmod(round(seconds), 3600)
    minutes = f"{rest // 60:02d}" if hours else f"{rest // 60}"
    return f"{f'{hours}:' if hours else ''}{minutes}:{rest % 60:02d}"
