"""A made-up agent and engine: whole nights in memory, in milliseconds. What is real is the loop and its rule."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from autoresearch.desk import Desk
from autoresearch.ideas import (
    Busy,
    Change,
    Edit,
    Fruitless,
    Idea,
    NeedsPerson,
    Reply,
    Run,
    Trouble,
    Usage,
)
from autoresearch.journal.experiment import Experiment
from autoresearch.journal.journal import Record
from autoresearch.study import Limits, Study
from autoresearch.task import Arena, Machine, Task

TASK = Task(("train.py",), "python train.py", "loss", seeds=2, noise=0.01)
# What an agent's call may bring, and how often
KINDS = {
    "idea": 60, "crash": 10, "fault": 5, "foreign": 3, "nothing": 6, "repeat": 6, "failed": 4,
    "busy": 3, "hopeless": 2, "cut short": 1,
}  # fmt: skip


class Killed(BaseException):
    """The driver, at any instant: no `except Exception` sees it."""


@dataclass
class World:
    """What outlives a driver. `plan`: what the next calls bring; after it, chance decides."""

    seed: int = 0
    plan: list[str] = field(default_factory=list)
    kill_at: int = -1  # the instant, counted from the driver's start
    full_at: int = -1  # the instant at which the disk is full
    instant: int = 0
    refs: dict[int, tuple[str, str, Experiment]] = field(default_factory=dict)  # parent, commit
    rows: list[int] = field(default_factory=list)
    tip: str = "start"
    truth: dict[str, float] = field(
        default_factory=lambda: {"start": 1.0}  # by commit; nan crashes
    )
    gain: Callable[[random.Random], float] = lambda rng: rng.gauss(0, 0.02)  # of an idea, in truth
    error: float = 0.005  # standard deviation of a score
    slow: list[bool] = field(default_factory=list)  # whether the next runs find a slow machine
    startups: list[float] = field(default_factory=list)  # seconds, of the next runs
    looked_at: set[str] = field(default_factory=set)  # commits whose last run the guard looked at
    requests: list[str] = field(default_factory=list)
    pauses: list[tuple[Trouble, int]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def at(self) -> None:
        """An instant at which the driver may die."""
        self.instant += 1
        if self.instant == self.kill_at:
            raise Killed
        if self.instant == self.full_at:
            raise OSError("no space left")

    def study(self, task: Task = TASK, **limits: Any) -> tuple[Study, "MadeUpDesk"]:
        """A driver that has just started, and read the record."""
        self.instant = 0
        journal: Any = MadeUpJournal(self)
        journal.reconcile()
        conditions: Any = SimpleNamespace(seed=42, arena=Arena())
        agent: Any = SimpleNamespace(name="made-up")
        nothing: Any = None
        checkout: Any = SimpleNamespace(commit_tree=self.again)
        study = Study(
            task, checkout, journal, nothing, conditions, Machine(), 0, agent, 900.0, Limits(**limits),
            Arena, self.events.append,
        )  # fmt: skip
        return study, MadeUpDesk(self, study)

    def again(self, text: str, tree: str, parent: str) -> str:
        """An empty commit."""
        commit = f"{text.strip()} {self.instant} {parent}"
        self.truth[commit] = self.truth[parent]
        return commit


class MadeUpJournal(Record):
    """As the journal of git: the ref is the truth, the row follows, the next start mends."""

    def __init__(self, world: World):
        super().__init__("start")
        self.world = world
        self.tag = "t"

    def store(self, text: str) -> str:
        return "blob"

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def record(self, experiment: Experiment, parent: str, commit: str) -> Experiment:
        world = self.world
        final = f"final {experiment.number}"
        experiment = replace(experiment, commit=final)
        world.truth[final] = world.truth[commit]
        world.at()
        assert experiment.number not in world.refs
        renewed = experiment.description.startswith("the incumbent again")
        guarded = commit in world.looked_at or renewed
        assert experiment.verdict != "keep" or guarded, "the guard looks at what is kept"
        world.refs[experiment.number] = parent, final, experiment
        world.tip = final if experiment.verdict == "keep" else world.tip
        world.at()
        world.rows.append(experiment.number)
        self.experiments.append(experiment)
        world.at()
        return experiment

    def reconcile(self) -> None:
        refs = sorted(self.world.refs.items())
        self.experiments = [e for _, (_, _, e) in refs]
        self.world.rows = [number for number, _ in refs]


class MadeUpDesk(Desk):
    """Ideas, calls and runs are made up; seeds, duels and the record are the real desk's."""

    def __init__(self, world: World, study: Study):
        super().__init__(study)
        self.world = world

    def new_idea(self) -> Idea:
        self.world.at()
        journal = self.study.journal
        unchanged = Edit(Reply(), (), journal.base)
        return Idea(journal.next_number, Path("folder"), journal.base, "Be bold.", unchanged)

    def baseline(self) -> Idea:
        idea = self.new_idea()
        idea.edit = replace(idea.edit, reply=Reply("baseline"), change=Change(source="start"))
        return idea

    def propose(self, idea: Idea, request: str, turn: int = 0) -> Edit:
        world = self.world
        world.at()
        world.requests.append(request)
        kind = (
            world.plan.pop(0) if world.plan else world.rng.choices([*KINDS], [*KINDS.values()])[0]
        )
        reply, lines = Reply(kind, "", Usage(1.0)), world.rng.randrange(4)
        trouble = {
            "failed": Fruitless("a fruit"),
            "busy": Busy("asleep"),
            "hopeless": NeedsPerson("no key"),
        }
        if kind in trouble:
            return Edit(replace(reply, trouble=trouble[kind]), (), idea.edit.commit)
        if kind == "nothing":
            return Edit(reply, (), idea.edit.commit)
        commit, parent = f"commit {len(world.requests)}", world.truth[idea.base]
        world.truth[commit] = float("nan") if kind == "crash" else parent - world.gain(world.rng)
        edit = Edit(reply, ("train.py",), commit, (), Change("", commit, lines, 1))
        unrun = replace(edit, change=replace(edit.change, source=""))
        if kind == "repeat":
            earlier = world.rng.choice(self.study.journal.experiments)
            return replace(edit, change=earlier.change, duplicate_of=earlier)
        if kind == "cut short":
            return replace(edit, reply=replace(reply, trouble=Busy("asleep"), cut_short=True))
        if kind == "foreign":
            return replace(unrun, foreign=("prepare.py",))
        return replace(unrun, fault=("SyntaxError", "line")) if kind == "fault" else edit

    def run_job(self, idea: Idea, commit: str, seed: int, beat: float, which: str) -> Run:
        world, journal, edit = self.world, self.study.journal, idea.edit
        world.at()
        assert idea.base == journal.base, "an idea runs on the incumbent"
        assert not edit.foreign and not edit.fault, "what may not run does not run"
        assert not edit.paths or edit.change.source not in journal.tried, "no program runs twice"
        truth = world.truth[commit]
        if truth != truth:
            return Run(crash="it crashed", repairable=True, facts={"run_seconds": 1.0})
        score, speed = truth + world.rng.gauss(0, world.error), 1000.0
        if world.slow and world.slow.pop(0):  # which costs it what no idea gains
            score, speed = score + 0.5, 899.0
        world.looked_at.discard(commit)
        facts = {"run_seconds": 1.0, "tokens_per_second": speed}
        if world.startups:
            facts["startup_seconds"] = world.startups.pop(0)
        if self.study.task.gain(score, beat) > 0:
            world.looked_at.add(commit)
            return Run(score, sealed=score + 1, facts=facts)
        return Run(score, facts=facts)

    def pause(self, trouble: Trouble, count: int) -> None:
        with suppress(OSError):  # waiting needs no disk
            self.world.at()
        self.world.pauses.append((trouble, count))
