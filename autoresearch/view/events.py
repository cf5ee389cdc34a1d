"""Events: what the loop tells the view."""

from dataclasses import dataclass
from datetime import datetime

from autoresearch.journal.experiment import Experiment
from autoresearch.task import Arena, Machine


@dataclass(frozen=True)
class Note:
    """What changes nothing, and a person should know."""

    text: str


@dataclass(frozen=True)
class Preparing:
    arena: str


@dataclass(frozen=True)
class Started:
    tag: str
    agent: str
    arena: Arena
    machine: Machine
    history: tuple[Experiment, ...]
    agent_limit: float  # seconds of a call
    exposed: str  # what their isolation lacks; empty if nothing
    network: bool = False  # whether the task gives them the network
    isolated: bool = False  # whether they are, as far as the kernel allows it


@dataclass(frozen=True)
class Asking:
    number: int
    attempt: int  # 0 is the idea, 1 and 2 are its repairs
    crash: str = ""  # what is to be repaired


@dataclass(frozen=True)
class Training:
    number: int
    description: str


@dataclass(frozen=True)
class Guarding:
    number: int
    score: float  # before the guard


@dataclass(frozen=True)
class Settled:
    experiment: Experiment


@dataclass(frozen=True)
class Waiting:
    why: str
    until: datetime


@dataclass(frozen=True)
class Stopped:
    reason: str
    experiments: int  # of this call
    best: Experiment | None
    dollars: float  # of this call


Event = Note | Preparing | Started | Asking | Training | Guarding | Settled | Waiting | Stopped
