"""Where a run stands: folded from events while it runs, kept on disk for whoever asks meanwhile or afterwards."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from autoresearch.files import tail
from autoresearch.records import (
    Asking,
    Event,
    Experiment,
    Preparing,
    Refereeing,
    Settled,
    Started,
    Stopped,
    Training,
    Waiting,
)
from autoresearch.task import Progress, read_progress

PAUSE = 60.0  # seconds between two experiments that are no longer the driver's own work


@dataclass(frozen=True)
class Phase:
    """What the driver is at: `preparing`, `asking`, `training`, `refereeing`, `waiting`, `stopped`, or nothing yet.
    Times are seconds since 1970; `turn` is 0 for the idea, 1 and 2 for its repairs; `detail` is the idea or the
    reason."""

    name: str = ""
    number: int = 0
    turn: int = 0
    detail: str = ""
    since: float = 0.0
    until: float | None = None


@dataclass(frozen=True)
class Scene:
    """One moment of a run. All but `experiments`, which git has, is what `save` writes."""

    tag: str
    phase: Phase = Phase()
    agent: str = ""
    arena: str = ""
    budget: float = 0.0  # seconds of training
    agent_limit: float = 0.0  # seconds of a call
    gpu: str = ""
    started: float = 0.0
    dollars: float = 0.0  # spent by a call of the driver that has ended
    experiments: tuple[Experiment, ...] = ()


def fold(scene: Scene, event: Event, now: float) -> Scene:
    """The scene after an event."""
    match event:
        case Preparing(arena):
            return replace(scene, arena=arena, phase=Phase("preparing", since=now))
        case Started():
            return replace(
                scene, agent=event.agent, arena=event.arena.name, budget=event.arena.budget, gpu=event.machine.gpu,
                agent_limit=event.agent_limit, started=now, experiments=event.history, phase=Phase(since=now),
            )  # fmt: skip
        case Asking(number, turn):
            return replace(scene, phase=Phase("asking", number, turn, scene.phase.detail if turn else "", now))
        case Training(number, idea):
            return replace(scene, phase=Phase("training", number, 0, idea, now))
        case Refereeing(number):
            return replace(scene, phase=Phase("refereeing", number, 0, scene.phase.detail, now))
        case Settled(experiment):
            return replace(scene, experiments=(*scene.experiments, experiment), phase=Phase(since=now))
        case Waiting(why, until):
            return replace(scene, phase=Phase("waiting", 0, 0, why, now, until.timestamp()))
        case Stopped(reason):
            return replace(scene, dollars=event.dollars, phase=Phase("stopped", 0, 0, reason, now))
    return scene


def save(scene: Scene, path: Path) -> None:
    """Write down where the run stands; a disk that is full or read-only must not end it."""
    with suppress(OSError):
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(json.dumps(asdict(replace(scene, experiments=()))), encoding="utf-8")
        fresh.replace(path)


def load(path: Path, tag: str, experiments: Sequence[Experiment]) -> Scene:
    """The scene of a run whose experiments git has; what was last written down of it may be missing or torn."""
    known = replace(Scene(tag), experiments=tuple(experiments))
    if experiments:
        last = experiments[-1]
        known = replace(known, agent=last.agent, arena=last.arena, budget=last.budget or 0.0, gpu=last.gpu or "")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        del saved["experiments"]
        phase = Phase(**{name: like(getattr(Phase(), name), value) for name, value in saved.pop("phase").items()})
        fields = {name: like(getattr(known, name), value) for name, value in saved.items()}
        return replace(known, **{**fields, "phase": phase, "tag": tag})
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return known


def like(pattern: object, value: Any) -> Any:
    """A value that was read from a file, when it is of the same kind as another; ValueError else."""
    kinds: Any = {float: (int, float), type(None): (int, float, type(None))}.get(type(pattern), type(pattern))
    if not isinstance(value, kinds) or (isinstance(value, int | float) and not abs(value) < 1e11):
        raise ValueError(f"{value!r} is not like {pattern!r}")
    return value


def progress(scene: Scene, folder: Path) -> Progress | None:
    """How far the training is that runs now, by its own log, in the folder of the run."""
    log = folder / f"{scene.phase.number:04d}" / "run.log"
    return read_progress(tail(log)) if scene.phase.name == "training" else None


# -----------------------------------------------------------------------------
# Figures of a history


@dataclass(frozen=True)
class Figures:
    """What a history amounts to. `seconds` is where the time went, the pauses left out; `dollars` is None where nobody
    knows, and `at_least` says that some calls are of unknown cost."""

    baseline: float
    best: Experiment  # of those kept
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
        return self.baseline - (self.best.val_bpb or 0.0)

    @property
    def experiments(self) -> int:
        return self.kept + self.discarded + self.crashed

    @property
    def dollars(self) -> float | None:
        known = [value for value in (self.agent_dollars, self.gpu_dollars) if value is not None]
        return sum(known) if known else None


def figures(history: Sequence[Experiment]) -> Figures | None:
    """None as long as there is no baseline."""
    kept = [e for e in history if e.status == "keep" and e.val_bpb is not None]
    if not kept:
        return None
    gaps = [(seconds_between(a, b), b) for a, b in pairwise(history)]
    worked = [(gap, gap - e.minutes * 60) for gap, e in gaps if gap - e.minutes * 60 < PAUSE]
    scored = [e for e in history if e.training_seconds is not None]
    training, evaluation = sum(e.training_seconds or 0.0 for e in scored), sum(map(evaluation_of, scored))
    seconds = {
        "agent": sum(e.agent_seconds for e in history),
        "start-up": max(
            sum(e.run_seconds for e in scored) - training - sum(e.evaluation_seconds or 0.0 for e in scored), 0
        ),
        "training": training,
        "evaluation": evaluation,
        "crashed": sum(e.run_seconds for e in history if e.training_seconds is None),
        "own": sum(max(own, 0.0) for _, own in worked),
    }
    costs = [e.cost_usd for e in history if e.cost_usd is not None]
    rates = [e.gpu_rate * e.minutes / 60 for e in history if e.gpu_rate is not None]
    counts = {status: sum(e.status == status for e in history[1:]) for status in ("keep", "discard", "crash")}
    return Figures(
        baseline=kept[0].val_bpb or 0.0,
        best=min(kept, key=lambda e: e.val_bpb or 0.0),
        kept=counts["keep"],
        discarded=counts["discard"],
        crashed=counts["crash"],
        hourly=3600 * len(worked) / max(sum(gap for gap, _ in worked), 1e-3),
        seconds=seconds,
        agent_dollars=sum(costs) if costs else None,
        gpu_dollars=sum(rates) if rates else None,
        at_least=any(e.cost_usd is None for e in history[1:]),
    )


def seconds_between(before: Experiment, after: Experiment) -> float:
    return (datetime.fromisoformat(after.finished) - datetime.fromisoformat(before.finished)).total_seconds()


def evaluation_of(e: Experiment) -> float:
    return (e.evaluation_seconds or 0.0) + (e.referee_seconds or 0.0)


def running_best(history: Sequence[Experiment]) -> list[float]:
    """The incumbent's score after each experiment."""
    best: list[float] = []
    for e in history:
        if e.status == "keep" and e.val_bpb is not None:
            best.append(e.val_bpb)
        elif best:
            best.append(best[-1])
    return best
