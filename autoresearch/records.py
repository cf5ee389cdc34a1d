"""What the parts tell each other: frozen records, made only when every field is known. Imports nothing of ours."""

import re
import textwrap
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

EDITABLE = "train.py"  # the one file that an experiment changes
TIE = 0.0002  # val_bpb that a run repeats itself to
Status = Literal["keep", "discard", "crash"]


class UserError(Exception):
    """Something a person has to mend; told in one line that names the cure. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


# -----------------------------------------------------------------------------
# The arena and the machine, as the driver knows them


@dataclass(frozen=True)
class Arena:
    """What `prepare.py` says of the arena it made ready: its name, budget in seconds, and the name of its files."""

    name: str
    budget: float
    data: str
    folder: Path


@dataclass(frozen=True)
class Machine:
    """Where experiments run. All but `torch` are empty without a GPU.

    `uuid` names it to CUDA, `card` to nvidia-smi: the two differ for a slice of a card (MIG).
    """

    gpu: str
    driver: str
    torch: str
    uuid: str = ""
    card: str = ""

    @property
    def is_slice(self) -> bool:
        return self.uuid != self.card


# -----------------------------------------------------------------------------
# How one training run ended


@dataclass(frozen=True)
class Summary:
    """The block that `finish` of prepare.py prints, field for field."""

    val_bpb: float
    val_bpb_upstream: float
    training_seconds: float
    total_seconds: float
    peak_vram_mb: float
    mfu_percent: float | None
    total_tokens_M: float
    num_steps: int
    num_params_M: float
    depth: int
    evaluation_seconds: float


@dataclass(frozen=True)
class Finished:
    """Training ended with a summary; `seconds` is wall clock from start to exit, `curve` the loss along the way. Once
    the referee has agreed, the scores are the referee's, and the one on sealed rows is known."""

    summary: Summary
    seconds: float
    curve: str = ""
    sealed_bpb: float | None = None
    referee_seconds: float | None = None
    gpu: dict[str, float] = field(default_factory=dict)  # its clock and power, where they are known


@dataclass(frozen=True)
class Crashed:
    """No number: `reason` in one line, `tail` is the end of what the run printed."""

    reason: str
    tail: str
    seconds: float
    curve: str = ""


@dataclass(frozen=True)
class Killed:
    """By the driver: at the hard limit, or since nothing would come of it any more."""

    why: str
    seconds: float
    curve: str = ""


@dataclass(frozen=True)
class Rejected:
    """Never trained: the agent changed these paths, and only train.py may change."""

    paths: tuple[str, ...]


Outcome = Finished | Crashed | Killed | Rejected

# -----------------------------------------------------------------------------
# What an agent's call left besides its edit


@dataclass(frozen=True)
class Usage:
    """What agent calls cost. None is unknown, and a sum leaves unknown parts out, so it reads `at least`."""

    seconds: float
    cost_usd: float | None = None
    tokens_in: int | None = None  # those read from a cache included
    tokens_cached: int | None = None
    tokens_out: int | None = None
    turns: int | None = None
    model: str | None = None
    calls: int = 1

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.seconds + other.seconds,
            plus(self.cost_usd, other.cost_usd),
            plus(self.tokens_in, other.tokens_in),
            plus(self.tokens_cached, other.tokens_cached),
            plus(self.tokens_out, other.tokens_out),
            plus(self.turns, other.turns),
            other.model or self.model,
            self.calls + other.calls,
        )


Number = TypeVar("Number", int, float)


def plus(a: Number | None, b: Number | None) -> Number | None:
    return b if a is None else a if b is None else a + b


@dataclass(frozen=True)
class Hopeless:
    """Only a person can mend it: no login, no credit, no such model."""

    why: str


@dataclass(frozen=True)
class Busy:
    """It will pass by itself: at `until`, or in a while."""

    why: str
    until: datetime | None = None


@dataclass(frozen=True)
class Failed:
    """The call brought nothing to train, and the next one may."""

    why: str


Trouble = Hopeless | Busy | Failed


@dataclass(frozen=True)
class Reply:
    """One agent call: the idea in a line and the reason in a paragraph, both the agent's own words, what it cost, and
    what went wrong with it. `cut_short` says that by its own word it broke off, so that an edit may be half of one."""

    description: str
    reason: str
    usage: Usage
    trouble: Trouble | None = None
    cut_short: bool = False


@dataclass(frozen=True)
class Edit:
    """What one agent call did to the tree: every path that it changed, train.py as it is now (None where that is no
    plain file), a commit of the incumbent with that, and which experiment trained the same program before."""

    reply: Reply
    paths: tuple[str, ...]
    program: bytes | None
    commit: str
    added: int = 0  # lines of train.py, against the incumbent
    removed: int = 0
    duplicate_of: "Experiment | None" = None


# -----------------------------------------------------------------------------
# One experiment, as git remembers it


@dataclass(frozen=True)
class Experiment:
    """Everything known of a finished experiment. `message` and `parse_message` make it a commit message and back."""

    tag: str
    number: int
    status: Status
    description: str
    reason: str
    finished: str  # UTC, ISO 8601 with microseconds: the order of rows in results.tsv
    arena: str
    data: str
    seed: int
    agent: str
    torch: str
    program: str  # blob of the program.md in force
    added: int  # lines of train.py
    removed: int
    repairs: int
    agent_seconds: float
    run_seconds: float  # from the first training process to the last, wall clock
    budget: float | None = None  # seconds of training
    crash: str | None = None  # why there is no number
    source: str | None = None  # fingerprint of the program that was trained
    changes: str | None = None  # what in the program is different, from the diff
    curve: str | None = None  # loss and tokens per second along the way
    val_bpb: float | None = None
    val_bpb_upstream: float | None = None
    sealed_bpb: float | None = None
    incumbent: float | None = None
    memory_gb: float | None = None
    training_seconds: float | None = None
    total_seconds: float | None = None
    evaluation_seconds: float | None = None
    referee_seconds: float | None = None
    tokens_M: float | None = None
    tokens_per_second: float | None = None
    steps: int | None = None
    params_M: float | None = None
    mfu_percent: float | None = None
    gpu: str | None = None
    driver: str | None = None
    gpu_mhz: float | None = None  # the usual clock of the run
    gpu_watts: float | None = None
    gpu_slowed_percent: float | None = None  # of the run, by heat or a fault in the power
    gpu_rate: float | None = None  # dollars an hour
    model: str | None = None
    calls: int | None = None
    turns: int | None = None
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None

    @property
    def gain(self) -> float | None:
        """How much better than the incumbent of its time; None without a number or an incumbent."""
        return None if self.val_bpb is None or self.incumbent is None else self.incumbent - self.val_bpb

    @property
    def lines(self) -> int:
        """Net change to train.py."""
        return self.added - self.removed

    @property
    def headline(self) -> str:
        """The idea, and where it crashed, why."""
        return self.description + (f" [{one_line(self.crash, 120)}]" if self.crash else "")

    @property
    def minutes(self) -> float:
        return (self.agent_seconds + self.run_seconds + (self.referee_seconds or 0)) / 60


def costs_of(usage: Usage) -> dict[str, Any]:
    """What the record takes from the agent's calls."""
    return {
        "agent_seconds": usage.seconds, "cost_usd": usage.cost_usd, "model": usage.model, "calls": usage.calls or None,
        "turns": usage.turns, "tokens_in": usage.tokens_in, "tokens_cached": usage.tokens_cached,
        "tokens_out": usage.tokens_out,
    }  # fmt: skip


def facts_of(outcome: Outcome) -> dict[str, Any]:
    """What the record takes from a run: from the harness, never from the agent's words."""
    match outcome:
        case Finished(summary, seconds, curve, sealed_bpb, referee_seconds, gpu):
            return {
                **gpu,
                "curve": curve or None, "sealed_bpb": sealed_bpb, "referee_seconds": referee_seconds,
                "val_bpb": summary.val_bpb, "val_bpb_upstream": summary.val_bpb_upstream, "run_seconds": seconds,
                "memory_gb": summary.peak_vram_mb / 1024, "training_seconds": summary.training_seconds,
                "total_seconds": summary.total_seconds, "evaluation_seconds": summary.evaluation_seconds,
                "tokens_M": summary.total_tokens_M, "steps": summary.num_steps,
                "tokens_per_second": summary.total_tokens_M * 1e6 / summary.training_seconds,
                "params_M": summary.num_params_M, "mfu_percent": summary.mfu_percent,
            }  # fmt: skip
        case Crashed(_, _, seconds, curve) | Killed(_, seconds, curve):
            return {"curve": curve or None, "crash": reason(outcome), "run_seconds": seconds}
        case Rejected():
            return {"crash": reason(outcome), "run_seconds": 0.0}


def reason(outcome: Crashed | Killed | Rejected) -> str:
    """Why there is no number, in a line."""
    match outcome:
        case Crashed(why):
            return why
        case Killed(why):
            return f"killed {why}"
        case Rejected(paths):
            return one_line(f"changed more than train.py: {', '.join(p for p in paths if p != EDITABLE)}")


# One line for each trailer, in the order they are written: name, field, type, format.
TRAILERS: tuple[tuple[str, str, type, str], ...] = (
    ("Experiment", "number", int, "d"),
    ("Status", "status", str, "s"),
    ("Val-bpb", "val_bpb", float, ".6f"),
    ("Val-bpb-upstream", "val_bpb_upstream", float, ".6f"),
    ("Sealed-bpb", "sealed_bpb", float, ".6f"),
    ("Incumbent", "incumbent", float, ".6f"),
    ("Crash", "crash", str, "s"),
    ("Memory-gb", "memory_gb", float, ".1f"),
    ("Training-seconds", "training_seconds", float, ".1f"),
    ("Total-seconds", "total_seconds", float, ".1f"),
    ("Run-seconds", "run_seconds", float, ".1f"),
    ("Evaluation-seconds", "evaluation_seconds", float, ".1f"),
    ("Referee-seconds", "referee_seconds", float, ".1f"),
    ("Tokens-M", "tokens_M", float, ".3f"),
    ("Steps", "steps", int, "d"),
    ("Tokens-per-second", "tokens_per_second", float, ".0f"),
    ("Mfu-percent", "mfu_percent", float, ".2f"),
    ("Parameters-M", "params_M", float, ".3f"),
    ("Curve", "curve", str, "s"),
    ("Changes", "changes", str, "s"),
    ("Source", "source", str, "s"),
    ("Lines-added", "added", int, "d"),
    ("Lines-removed", "removed", int, "d"),
    ("Repairs", "repairs", int, "d"),
    ("Agent", "agent", str, "s"),
    ("Agent-seconds", "agent_seconds", float, ".1f"),
    ("Model", "model", str, "s"),
    ("Agent-calls", "calls", int, "d"),
    ("Agent-turns", "turns", int, "d"),
    ("Agent-tokens-in", "tokens_in", int, "d"),
    ("Agent-tokens-cached", "tokens_cached", int, "d"),
    ("Agent-tokens-out", "tokens_out", int, "d"),
    ("Cost-usd", "cost_usd", float, ".4f"),
    ("Seed", "seed", int, "d"),
    ("Arena", "arena", str, "s"),
    ("Budget-seconds", "budget", float, ".0f"),
    ("Data", "data", str, "s"),
    ("Gpu", "gpu", str, "s"),
    ("Gpu-driver", "driver", str, "s"),
    ("Gpu-mhz", "gpu_mhz", float, ".0f"),
    ("Gpu-watts", "gpu_watts", float, ".0f"),
    ("Gpu-slowed-percent", "gpu_slowed_percent", float, ".0f"),
    ("Gpu-usd-per-hour", "gpu_rate", float, ".4f"),
    ("Torch", "torch", str, "s"),
    ("Program", "program", str, "s"),
    ("Tag", "tag", str, "s"),
    ("Finished", "finished", str, "s"),
)


def message(experiment: Experiment) -> str:
    """Word the commit message: the idea, the reason wrapped, and the trailers; what is unknown has no trailer."""
    values = [(name, getattr(experiment, field), form) for name, field, _, form in TRAILERS]
    # each on one line, or what a file or a model is called could make up a trailer of its own
    trailers = "\n".join(one_line(f"{name}: {value:{form}}", 1000) for name, value, form in values if value is not None)
    return "\n\n".join(filter(None, [experiment.description, textwrap.fill(experiment.reason, 100), trailers])) + "\n"


def parse_message(text: str) -> Experiment:
    """Read back what `message` wrote; ValueError for any other commit."""
    *body, last = text.strip().split("\n\n")
    found = dict(re.findall(r"^([A-Z][A-Za-z-]*): (.*)$", last, re.MULTILINE))
    try:
        values: dict[str, Any] = {field: kind(found[name]) for name, field, kind, _ in TRAILERS if name in found}
        return Experiment(description=body[0], reason=" ".join(" ".join(body[1:]).split()), **values)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not the commit of an experiment: {text[:60]!r}") from error


def one_line(text: str, limit: int = 200) -> str:
    """Make foreign text safe for a commit subject, a table or a terminal: one bounded line without control characters.

    >>> one_line("a\\tb\\x1b[31m")
    'a b [31m'
    """
    printable = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


# -----------------------------------------------------------------------------
# What the display is told


@dataclass(frozen=True)
class Chosen:
    agent: str
    among: tuple[str, ...]  # what was looked for, in that order


@dataclass(frozen=True)
class Preparing:
    arena: str


@dataclass(frozen=True)
class Started:
    tag: str
    branch: str
    agent: str
    arena: Arena
    machine: Machine
    history: tuple[Experiment, ...]
    agent_limit: float  # seconds of a call
    exposed: str  # why train.py runs without isolation; empty when it has it


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
class Refereeing:
    number: int
    val_bpb: float  # as train.py's own process has it


@dataclass(frozen=True)
class Settled:
    experiment: Experiment
    commit: str


@dataclass(frozen=True)
class Stalled:
    number: int
    reason: str


@dataclass(frozen=True)
class Repeated:
    number: int
    earlier: Experiment  # which trained the same program


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


Event = (
    Chosen | Preparing | Started | Asking | Training | Refereeing | Settled | Stalled | Repeated | Waiting | Stopped
)  # fmt: skip
