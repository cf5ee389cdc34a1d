"""An experiment as git remembers it: a record, written as a commit message and read back."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from statistics import fmean
from typing import Any, Literal, TypeVar

from autoresearch.files import one_line
from autoresearch.ideas import FACTS, Change, Usage, sealed_of
from autoresearch.task import Arena, Machine, trailer

Verdict = Literal["keep", "discard", "crash"]

OWN = {name[0].upper() + name[1:].replace("_", "-"): name for name in FACTS}  # by trailer
OLD = "lower val_bpb"  # what older records measure, without a word of it
SCORE = ("Score", "Val-bpb")  # the trailer, and the one of that


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A finished idea. `scores` are by seed; that of `seed` decided, and a crash has none.
    `sealed`: those on what is held out, as far as the guard printed them."""

    number: int = trailer("Experiment", "d")
    verdict: Verdict = trailer("Status")
    description: str
    reason: str
    scores: Mapping[int, float] = field(default_factory=dict)
    sealed: Mapping[int, float] = field(default_factory=dict)
    # the incumbent's score at the time, its mean for the same seeds
    incumbent: float | None = trailer("Incumbent", "score", default=None)
    crash: str = trailer("Crash", default="")  # why there is no score
    note: str = trailer("Note", default="")  # what the score does not say
    facts: Mapping[str, float] = field(default_factory=dict)
    curve: str = trailer("Curve", default="")  # loss and tokens per second along the way
    change: Change
    repairs: int = trailer("Repairs", "d")
    agent: str = trailer("Agent")
    usage: Usage
    seed: int = trailer("Seed", "d")
    arena: Arena
    machine: Machine
    program: str = trailer("Program")  # blob of the program.md in force
    goal: str = trailer("Metric", default=OLD)  # the direction and the name
    task: str = trailer("Task", default="")  # blob of the task in force
    tag: str = trailer("Tag")
    finished: str = trailer("Finished")  # UTC, ISO 8601 with microseconds: the order of results.tsv
    commit: str = ""  # that has this for its message

    @property
    def score(self) -> float | None:
        return self.scores.get(self.seed)

    @property
    def metric(self) -> str:
        return self.goal.partition(" ")[2]

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return self.goal.startswith("higher")

    @property
    def gain(self) -> float | None:
        """How much better than the incumbent of its time; None without a score or an incumbent."""
        if self.score is None or self.incumbent is None:
            return None
        change = fmean(self.scores.values()) - self.incumbent
        return change if self.higher else -change

    @property
    def headline(self) -> str:
        """The idea; where it crashed, why; where it lost a duel, which; what else is of note."""
        said, won = one_line(self.crash, 120), self.facts.get("duels_won")
        if won is not None and self.verdict == "discard":
            said = said or f"lost duel {won + 1:.0f}"
        return " ".join([self.description, *(f"[{words}]" for words in (said, self.note) if words)])

    @property
    def minutes(self) -> float:
        """What agent, run and guard took together."""
        runs = self.facts.get("run_seconds", 0.0) + self.facts.get("referee_seconds", 0.0)
        return (self.usage.seconds + runs) / 60


def best_of(experiments: Sequence[Experiment]) -> Experiment | None:
    """The one with the best score, the first of equals. Of kept ones that rest on more than a run,
    the last: each was better than the one before, whatever the seeds and the hour were."""
    scored = [e for e in experiments if e.score is not None]
    if not scored:
        return None
    if len(scored[-1].scores) > 1 or "duels_won" in scored[-1].facts:
        return scored[-1]
    best = max if scored[0].higher else min
    return best(scored, key=lambda e: e.score or 0.0)


def chained(experiments: Sequence[Experiment]) -> list[float | None]:
    """Scores as if all had run beside the baseline: its own, and from there the gains of what was
    kept, added up. With one seed, and a machine that does not drift, they are the scores."""
    values: list[float | None] = []
    level = 0.0
    for e in experiments:
        value = None
        if e.score is not None:
            value = e.score if e.number == 0 else level
            if e.gain is not None:
                value += e.gain if e.higher else -e.gain
        if e.verdict == "keep":
            level = value or 0.0
        values.append(value)
    return values


def show(score: float) -> str:
    """A score for a person: six places, or six digits if it is small or large."""
    return f"{score:.6f}" if not score or 1e-3 <= abs(score) < 1e3 else f"{score:.6g}"


def exact(goal: str, score: float) -> str:
    """A score for the record: as upstream writes its own, any other with all digits that count."""
    return f"{score:.6f}" if goal == OLD else f"{score:.12g}"


def score(e: Experiment) -> str:
    return "no number" if e.score is None else show(e.score)


def difference(e: Experiment) -> str:
    """To the incumbent of its time, signed."""
    if e.score is None or e.incumbent is None:
        return ""
    change = fmean(e.scores.values()) - e.incumbent
    return f"{change:+{'.6f' if e.goal == OLD else '.6g'}}"


def signed(e: Experiment) -> str:
    """That in brackets, after a score."""
    return f" ({difference(e)})" if e.gain is not None else ""


# --------------------------------------------------------------------------------------------------
# As a commit message


def message(e: Experiment) -> str:
    """The commit message: the idea, the reason wrapped, the trailers; an unknown value has none."""
    # each on one line, or the name of a file or a model could make up a trailer of its own
    trailers = "\n".join(one_line(f"{name}: {text}", 1000) for name, text in write(e))
    parts = (e.description, textwrap.fill(e.reason, 100), trailers)
    return "\n\n".join(filter(None, parts)) + "\n"


def write(record: Any) -> Iterator[tuple[str, str]]:
    """The trailers of a record, and of the records in it."""
    for f in fields(record):
        value = getattr(record, f.name)
        if f.name == "scores":
            for seed, score in value.items():
                name = SCORE[record.goal == OLD] if seed == record.seed else f"Score-{seed}"
                yield name, exact(record.goal, score)
        elif f.name == "sealed":  # that of the first seed is a fact
            further = [seed for seed in value if seed != record.seed]
            yield from ((f"Sealed-{seed}", exact(record.goal, value[seed])) for seed in further)
        elif f.name == "facts":
            known = {name: fact for name, fact in OWN.items() if fact in value}
            others = [name for name in value if name not in FACTS]
            yield from ((name, f"{value[fact]:{FACTS[fact]}}") for name, fact in known.items())
            yield from ((f"Fact-{name}", f"{value[name]:.12g}") for name in others)
        elif is_dataclass(value):
            yield from write(value)
        elif "trailer" in f.metadata and value not in (None, ""):
            form = f.metadata["form"]
            text = exact(record.goal, value) if form == "score" else f"{value:{form}}"
            yield f.metadata["trailer"], text


def parse_message(text: str) -> Experiment:
    """Read back what `message` wrote; ValueError for any other commit."""
    *body, last = text.strip().split("\n\n")
    found = dict(re.findall(r"^([A-Z][\w-]*): (.*)$", last, re.MULTILINE))
    reason = " ".join(" ".join(body[1:]).split())
    try:
        scores = {int(seed): float(v) for seed, v in with_prefix(found, "Score-")}
        name = SCORE[found.get("Metric", OLD) == OLD]
        if name in found:
            scores = {int(found["Seed"]): float(found[name]), **scores}
        facts = {fact: float(found[name]) for name, fact in OWN.items() if name in found}
        facts |= {name: float(v) for name, v in with_prefix(found, "Fact-")}
        first, further = sealed_of(facts), with_prefix(found, "Sealed-")
        sealed = {} if first is None else {int(found["Seed"]): first}
        sealed |= {int(seed): float(v) for seed, v in further if seed != "bpb"}
        values = {"scores": scores, "sealed": sealed, "facts": facts}
        return read(Experiment, found, description=body[0], reason=reason, **values)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not the commit of an experiment: {text[:60]!r}") from error


def with_prefix(found: Mapping[str, str], prefix: str) -> Iterator[tuple[str, str]]:
    return ((name.removeprefix(prefix), v) for name, v in found.items() if name.startswith(prefix))


T = TypeVar("T")


def read(kind: type[T], found: Mapping[str, str], **values: Any) -> T:
    """A record from its trailers and the values of its other fields."""
    for f in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(f.type):
            values[f.name] = read(f.type, found)  # type: ignore[arg-type]
        elif (name := f.metadata.get("trailer", "")) in found:
            values[f.name] = {"s": str, "d": int}.get(f.metadata["form"][-1], float)(found[name])
    return kind(**values)
