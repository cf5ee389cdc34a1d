"""Where a run stands: updated by events while it runs, kept on disk for other processes."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from autoresearch.files import lock_owner, one_line, tail, write_whole
from autoresearch.journal.experiment import Experiment, score
from autoresearch.journal.journal import LOCK
from autoresearch.task import Arena, Machine, Progress, read_progress
from autoresearch.view import events
from autoresearch.view.figures import count, figures

NOW = "now.json"  # in the folder of a run


@dataclass(frozen=True)
class Phase:
    """What the driver does: `preparing`, `asking`, `training`, `guarding`, `waiting`, `stopped`,
    or nothing yet; that in words; the idea that it is about. Times are seconds since 1970."""

    name: str = ""
    number: int = 0
    words: str = ""
    idea: str = ""
    since: float = 0.0
    until: float | None = None


@dataclass(frozen=True)
class Status:
    """One moment of a run. `save` writes all but `experiments`, which git has."""

    tag: str
    phase: Phase = Phase()
    agent: str = ""
    arena: str = ""
    budget: float = 0.0  # seconds of training
    agent_limit: float = 0.0  # seconds of a call
    gpu: str = ""
    experiments: tuple[Experiment, ...] = ()


def update(status: Status, event: events.Event, now: float) -> Status:
    """The status after an event."""
    phase = status.phase
    match event:
        case events.Preparing(arena):
            words = f"preparing the arena {arena}".rstrip()
            status, phase = replace(status, arena=arena), Phase("preparing", 0, words, "", now)
        case events.Started():
            status = with_facts(status, event.agent, event.arena, event.machine)
            status = replace(status, agent_limit=event.agent_limit, experiments=event.history)
            phase = Phase(since=now)
        case events.Asking(number, turn):
            idea = phase.idea if turn else ""
            repair = f" for repair {turn} of: {idea}" if turn else ""
            words, until = f"{number:04d} asking {status.agent}{repair}", now + status.agent_limit
            phase = Phase("asking", number, words, idea, now, until)
        case events.Training(number, idea):
            phase = Phase("training", number, f"{number:04d} running: {idea}", idea, now)
        case events.Guarding(number):
            words = f"{number:04d} the guard looks at it: {phase.idea}"
            phase = Phase("guarding", number, words, phase.idea, now)
        case events.Settled(experiment):
            status = replace(status, experiments=(*status.experiments, experiment))
            phase = Phase(since=now)
        case events.Waiting(why, until):
            at = f"{until.astimezone():%H:%M:%S of %d %b}"
            words = f"waiting until {at}: {one_line(why, 500)}"
            phase = Phase("waiting", 0, words, phase.idea, now, until.timestamp())
        case events.Stopped(reason, experiments, best, dollars):
            words = f"stopped: {reason}"
            if dollars:
                words += f"; ${dollars:.2f} spent"
            words += f"; {count(experiments)} recorded in this call"
            if best:
                words += f"; best {score(best)}, experiment {best.number}: {best.description}"
            phase = Phase("stopped", 0, words, "", now)
    return replace(status, phase=phase)


def with_facts(status: Status, agent: str, arena: Arena, machine: Machine) -> Status:
    return replace(status, agent=agent, arena=arena.name, budget=arena.budget, gpu=machine.gpu)


def save(status: Status, path: Path) -> None:
    """Write down where the run stands; a disk that is full or read-only must not end it."""
    with suppress(OSError):
        write_whole(path, json.dumps(asdict(replace(status, experiments=()))))


def load(path: Path, tag: str, experiments: Sequence[Experiment]) -> Status:
    """The status of a run with these experiments. The file may be missing or of another version."""
    known = Status(tag, experiments=tuple(experiments))
    if experiments:
        last = experiments[-1]
        known = with_facts(known, last.agent, last.arena, last.machine)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        phase = Phase(**saved.pop("phase"))
        told = {name: value for name, value in saved.items() if value}  # while it prepares: little
        return replace(known, **told | {"experiments": known.experiments}, phase=phase)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return known


def progress(status: Status, folder: Path) -> Progress | None:
    """How far the training is that runs now, by its log, in the folder of the run."""
    log = folder / f"{status.phase.number:04d}" / "run.log"
    return read_progress(tail(log)) if status.phase.name == "training" else None


def state(status: Status, folder: Path) -> tuple[str, str | None]:
    """`running`, `stopped`, or `died` where its driver ended without a word; who runs it."""
    holder, ended = lock_owner(folder / LOCK), status.phase.name in ("", "stopped")
    return "running" if holder else "stopped" if ended else "died", holder


def facts(status: Status, folder: Path) -> dict[str, object]:
    """A status for scripts, in plain values; an unknown one is None."""
    found, far = figures(status.experiments), progress(status, folder)
    summary = asdict(found) | {"gain": found.gain, "dollars": found.dollars} if found else None
    now, holder = state(status, folder)
    return {
        "state": now,
        "holder": holder,
        **{name: value for name, value in asdict(status).items() if name != "experiments"},
        "progress": asdict(far) if far else None,
        "figures": summary,
        "experiments": [{**asdict(e), "score": e.score} for e in status.experiments],
    }
