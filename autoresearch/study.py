"""A study: one tag, and everything that its experiments have in common."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from autoresearch.agents.agent import Agent
from autoresearch.jobs.job import Conditions
from autoresearch.journal.git import AgentTree, Repo
from autoresearch.journal.journal import Journal
from autoresearch.pace import clock
from autoresearch.task import Arena, Machine, Task
from autoresearch.view.events import Event
from autoresearch.view.figures import count


@dataclass
class Limits:
    """What this call of the driver may use, and what it has used."""

    experiments: float = math.inf
    hours: float = math.inf
    dollars: float = math.inf
    until: float | None = None  # a score
    gpu_rate: float = 0.0  # dollars an hour, from the start to the end
    experiments_done: int = 0  # the baseline not counted
    paid: float = 0.0  # dollars, for the agent
    start: float = field(default_factory=clock)

    @property
    def hours_spent(self) -> float:
        return (clock() - self.start) / 3600

    @property
    def dollars_spent(self) -> float:
        return self.paid + self.gpu_rate * self.hours_spent


@dataclass(frozen=True)
class Study:
    """Where experiments run, with what, by which agent, under which limits."""

    task: Task
    checkout: Repo
    journal: Journal
    tree: AgentTree
    conditions: Conditions
    machine: Machine
    idle: int  # MiB of the GPU's memory in use without a run of ours
    agent: Agent
    agent_limit: float
    limits: Limits
    prepare: Callable[[], Arena]  # make its data whole
    show: Callable[[Event], None]

    def reached(self) -> str | None:
        """Which limit or goal is reached, if any: asked before each experiment and in each wait."""
        limits, best, goal = self.limits, self.journal.best, self.limits.until
        if goal is not None and best and self.task.gain(best.score or 0.0, goal) >= 0:
            return f"the goal of {goal:g} is reached"
        if limits.experiments_done >= limits.experiments:
            return f"{count(limits.experiments_done)} done"
        if limits.hours_spent >= limits.hours:
            return f"{limits.hours:g} hours are over"
        spent = limits.dollars_spent
        return f"${spent:.2f} of ${limits.dollars:g} are spent" if spent >= limits.dollars else None
