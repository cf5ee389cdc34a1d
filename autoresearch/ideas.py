"""The nouns of the loop before an experiment is recorded: Reply, Trouble, Usage, Edit, Run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoresearch.files import one_line
from autoresearch.task import trailer

if TYPE_CHECKING:
    from autoresearch.journal.experiment import Experiment

# --------------------------------------------------------------------------------------------------
# What an agent's call brought


@dataclass(frozen=True)
class Usage:
    """What agent calls cost. None is unknown, and left out of a sum, which reads `at least`."""

    seconds: float = trailer("Agent-seconds", ".1f", default=0.0)
    model: str | None = trailer("Model", default=None)
    calls: int | None = trailer("Agent-calls", "d", default=None)
    turns: int | None = trailer("Agent-turns", "d", default=None)
    tokens_in: int | None = trailer("Agent-tokens-in", "d", default=None)  # cached ones included
    tokens_cached: int | None = trailer("Agent-tokens-cached", "d", default=None)
    tokens_out: int | None = trailer("Agent-tokens-out", "d", default=None)
    cost_usd: float | None = trailer("Cost-usd", ".4f", default=None)

    def __add__(self, other: "Usage") -> "Usage":
        def both(name: str) -> Any:
            known = [v for usage in (self, other) if (v := getattr(usage, name)) is not None]
            return sum(known) if known else None

        sums = {f.name: both(f.name) for f in fields(self) if f.name != "model"}
        return Usage(model=other.model or self.model, **sums)


@dataclass(frozen=True)
class Trouble:
    """Why a call failed."""

    why: str


class NeedsPerson(Trouble):
    """No login, no credit, no such model."""


class Fruitless(Trouble):
    """This call brought nothing to run; the next one may."""


@dataclass(frozen=True)
class Busy(Trouble):
    """Passes by itself: at `until`, or in a while."""

    until: datetime | None = None


@dataclass(frozen=True)
class Reply:
    """What the agent says: the idea in a line, the reason in a paragraph; what the call cost, and
    what went wrong with it. `cut_short`: the agent itself says that it broke off, so that an edit
    may be half done."""

    description: str = ""
    reason: str = ""
    usage: Usage = Usage()
    trouble: Trouble | None = None
    cut_short: bool = False

    def subject(self, changes: str = "") -> str:
        """The line of a commit; for an agent that said nothing, of what it changed."""
        silent = f"not described: {changes}" if changes else "an edit that was not described"
        return one_line(self.description or silent, 120)


@dataclass(frozen=True)
class Change:
    """Lines added and removed, what is different in words, and the fingerprint of the program that
    was run; empty for one that was not."""

    words: str = trailer("Changes", default="")
    source: str = trailer("Source", default="")
    added: int = trailer("Lines-added", "d", default=0)
    removed: int = trailer("Lines-removed", "d", default=0)

    @property
    def lines(self) -> int:
        """Net."""
        return self.added - self.removed


@dataclass(frozen=True)
class Edit:
    """What git says an agent did: all paths that it changed, a commit of the incumbent with those
    that it may, those that it may not, and what the commit changes.

    `fault`: why it cannot run, and the line of the program. `duplicate_of` ran the same program.
    """

    reply: Reply
    paths: tuple[str, ...]
    commit: str
    foreign: tuple[str, ...] = ()
    change: Change = Change()
    fault: tuple[str, str] | None = None
    duplicate_of: "Experiment | None" = None


# --------------------------------------------------------------------------------------------------
# A run

# Facts with a trailer of their own in the record, and its format; any other is `Fact-<name>`.
FACTS = {
    "val_bpb_upstream": ".6f", "sealed_bpb": ".6f", "memory_gb": ".1f", "training_seconds": ".1f",
    "total_seconds": ".1f", "run_seconds": ".1f", "evaluation_seconds": ".1f",
    "referee_seconds": ".1f", "tokens_M": ".3f", "steps": ".0f", "tokens_per_second": ".0f",
    "mfu_percent": ".2f", "parameters_M": ".3f", "gpu_mhz": ".0f", "gpu_watts": ".0f",
    "gpu_celsius": ".0f", "gpu_slowed_percent": ".0f", "gpu_usd_per_hour": ".4f",
}  # fmt: skip
SCORED = "guarded"  # the fact that the score is the guard's


@dataclass(frozen=True)
class Run:
    """One execution of a commit: its score, or in a line why it has none.

    `repairable`: its agent may mend it. `log` is the end of what it printed, `curve` the loss along
    the way, `facts` are all other numbers, by the names that they have in the record. `rival`: the
    incumbent's score, where it ran beside this one. `sealed`: the score on what is held out.
    """

    score: float | None = None
    rival: float | None = None
    sealed: float | None = None
    crash: str = ""
    repairable: bool = False
    log: str = ""
    curve: str = ""
    facts: Mapping[str, float] = field(default_factory=dict)


def sealed_of(facts: Mapping[str, float]) -> float | None:
    """The score on what is held out, which only a guard can print."""
    return facts.get("sealed_bpb", facts.get("guard_sealed"))


# --------------------------------------------------------------------------------------------------
# An idea


@dataclass
class Idea:
    """An edit on its way to a verdict, in memory alone: the incumbent that it starts from, the text
    of the program.md in force, the edit as it is now (its reply is the first one), its runs by
    seed, of which only the last may have crashed, and what a person should know of the verdict."""

    number: int
    folder: Path
    base: str
    program: str
    edit: Edit
    repairs: int = 0
    runs: dict[int, Run] = field(default_factory=dict)
    note: str = ""

    @property
    def run(self) -> Run:
        """The last one."""
        return next(reversed(self.runs.values()), Run())

    @property
    def scores(self) -> dict[int, float]:
        return {seed: run.score for seed, run in self.runs.items() if run.score is not None}

    @property
    def sealed(self) -> dict[int, float]:
        return {seed: run.sealed for seed, run in self.runs.items() if run.sealed is not None}
