"""The report of a run: progress.png for a glance, report.html for the morning."""

import base64
import csv
import io
import json
import math
import re
import string
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, StatisticsError, correlation, median
from typing import Any

from autoresearch import noise
from autoresearch.agents.prompt import outcome, tried
from autoresearch.audit import in_words, read_audit
from autoresearch.files import UserError, one_line, printable, tail, write_whole
from autoresearch.journal.experiment import Experiment, chained, difference, show, write
from autoresearch.journal.git import Repo
from autoresearch.journal.journal import from_text
from autoresearch.task import Task
from autoresearch.view.figures import Figures, count, duration, figures, money

GREEN, GREY, ORANGE, RED = "#188038", "#9aa0a6", "#b06000", "#c5221f"
LARGEST = 16  # gains named in the chart and on the page
MAX_DIFF = 20_000  # characters shown
MAX_LOG = 3_000  # characters shown, of its end


@dataclass(frozen=True)
class Point:
    """An experiment in the chart; nan stands for an unknown score."""

    number: int
    verdict: str
    score: float
    description: str
    sealed: float = math.nan


def points_of(history: Sequence[Experiment]) -> list[Point]:
    points = []
    for e, value in zip(history, chained(history), strict=True):
        score, sealed = math.nan if value is None else value, e.facts.get("sealed_bpb", math.nan)
        points.append(Point(e.number, e.verdict, score, e.description, sealed))
    return points


def read_table(path: Path) -> list[Point]:
    """The rows of a results.tsv, ours or upstream's, numbered in their order."""
    points: list[Point] = []
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                score = math.nan if row["status"] == "crash" else float([*row.values()][1])
                idea = one_line(from_text(row["description"] or ""))
                points.append(Point(len(points), row["status"], score, idea))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        form = "tab-separated with the columns commit, a score, memory_gb, status, description"
        raise UserError(f"{path} is no results.tsv, {form} ({error!r})") from None
    return points


# --------------------------------------------------------------------------------------------------
# The chart


@dataclass(frozen=True)
class Curve:
    """The points with a score; the best so far as steps, and the same on sealed text, moved to the
    same start; the range of the axis, which leaves far scores out."""

    points: list[Point]
    best: list[tuple[int, float]]
    sealed: list[tuple[int, float]]
    low: float
    high: float


def curve_of(points: Sequence[Point]) -> Curve:
    scored = [p for p in points if math.isfinite(p.score)]
    kept = [p for p in scored if p.verdict == "keep"]
    if not kept:
        raise UserError("nothing to draw: no experiment was kept yet")
    best = [(p.number, p.score) for p in kept]
    known = [p for p in kept if math.isfinite(p.sealed)]
    sealed = [(p.number, p.sealed + known[0].score - known[0].sealed) for p in known]
    for steps in (best, sealed):
        steps += [(points[-1].number, value) for _, value in steps[-1:]]
    # one failed idea can lose more than all gains together: show the better half of the others
    first, others = kept[0].score, [p.score for p in scored if p.verdict != "keep"]
    gained = first - min(p.score for p in kept)
    inside = [value for _, value in best + sealed]
    inside.append(min(median(others or [first]), first + 2 * gained + abs(first) / 1000))
    low, high = min(inside), max(inside)
    margin = max((high - low) * 0.08, abs(first) / 2000, 1e-9)
    return Curve(scored, best, sealed, low - margin, high + margin)


def draw(points: Sequence[Point], title: str, path: Path, metric: str, higher: bool) -> None:
    """Write the chart as a PNG of 1400 x 700 pixels."""
    points = turned(points, higher)
    from matplotlib.figure import Figure  # takes half a second
    from matplotlib.ticker import MaxNLocator

    curve = curve_of(points)
    figure = Figure(figsize=(10, 5), dpi=140)
    axes = figure.add_axes((0.09, 0.1, 0.56, 0.82))
    kept = [(p.number, p.score) for p in curve.points if p.verdict == "keep"]
    others = [(p.number, p.score) for p in curve.points if p.verdict != "keep"]
    looks = [
        ("discarded", ".", GREY, [(x, y) for x, y in others if y <= curve.high]),
        ("far off", "^", GREY, [(x, curve.high) for x, y in others if y > curve.high]),
        ("crashed", "x", RED, [(p.number, curve.low) for p in points if p.verdict == "crash"]),
        ("the same on sealed text", ":", ORANGE, curve.sealed),
        ("best so far", "-", GREEN, curve.best),
        ("kept", "o", GREEN, kept),
    ]
    for label, style, color, where in looks:
        if where:
            xs, ys = zip(*where, strict=True)
            (drawn,) = axes.plot(xs, ys, style, ms=5, alpha=0.7, drawstyle="steps-post")
            drawn.set(color=color, label=label, clip_on=False)
    axes.set(xlabel="experiment", ylabel=f"{metric} ({'higher' if higher else 'lower'} is better)")
    axes.set(ylim=(curve.high, curve.low) if higher else (curve.low, curve.high))
    axes.yaxis.set_major_formatter(lambda value, _: f"{-value if higher else value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(one_line(title, 150), loc="left", fontsize=9, parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    named, shown = sorted(largest(points), key=lambda p: p.number), -math.inf
    for p in named:
        if p.number - shown > points[-1].number / 40:  # or the labels would overlap
            shown = p.number
            axes.text(shown, p.score, f"\n{shown}", ha="center", va="top", fontsize=7, color=GREEN)
    ideas = "\n".join(f"{p.number:4d}  {one_line(p.description, 52)}" for p in named)
    words = f"largest gains\n\n{ideas}" if named else "nothing better than the baseline yet"
    figure.text(0.665, 0.9, words, fontsize=7, va="top", linespacing=1.7, parse_math=False)
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        figure.savefig(picture, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, picture.getvalue())


def turned(points: Sequence[Point], higher: bool) -> Sequence[Point]:
    """Points of which the lower one is better."""
    return [replace(p, score=-p.score, sealed=-p.sealed) for p in points] if higher else points


def largest(points: Sequence[Point]) -> list[Point]:
    """The kept experiments that gained most, the largest gain first."""
    kept = [p for p in points if p.verdict == "keep" and math.isfinite(p.score)]
    steps = sorted(pairwise(kept), key=lambda step: step[1].score - step[0].score)
    return [p for _, p in steps[:LARGEST]]


# --------------------------------------------------------------------------------------------------
# The page: the script in report.html builds it from data


def write_report(
    checkout: Repo, task: Task, experiments: Sequence[Experiment], folder: Path
) -> tuple[Path, Path]:
    """Write progress.png and report.html of a run into its folder, and return their paths."""
    found = figures(experiments)
    if found is None:
        raise UserError("nothing to report: the run has no baseline yet")
    first, points = experiments[0], points_of(experiments)
    agents = ", ".join(sorted({e.agent for e in experiments[1:]})) or first.agent
    each = f"{first.arena.name}, {first.arena.budget:g} s each, " if first.arena.budget else ""
    place = f"{each}on {first.machine.gpu or 'a CPU'}"
    title = f"{first.tag}: {place}; agent {one_line(agents, 60)}"
    picture, page = folder / "progress.png", folder / "report.html"
    draw(points, title, picture, first.metric, first.higher)
    best = found.best.commit
    total = sum(found.seconds.values()) or 1.0
    entries = zip(experiments, diffs(checkout, experiments), strict=True)
    again = read_audit(checkout, first.tag, found.best.number)
    audited = in_words(task, again) if again else ""
    data = {
        "chart": base64.b64encode(picture.read_bytes()).decode(),
        "boxes": boxes(found, experiments, audited),
        "belief": belief(found, experiments, task, audited),
        "metric": first.metric,
        "higher": first.higher,
        "gains": [p.number for p in largest(turned(points, first.higher))],
        "parts": tried(experiments),
        "best": best,
        "diff": checkout.git("diff", "--no-ext-diff", first.commit, best),
        "cost": cost(found),
        "time": [f"{name} {duration(s)}, {s / total:.1%}" for name, s in found.seconds.items()],
        "experiments": [record(e, diff, folder) for e, diff in entries],
    }
    text = json.dumps(data, default=lambda e: e.number)  # for the experiments in `parts`
    text = text.replace("<", "\\u003c")  # so that no tag begins in it
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    words = {"title": title, "metric": first.metric, "what": task.what}
    words["goal"] = "higher" if first.higher else "lower"
    escaped = {name: escape(word) for name, word in words.items()}
    write_whole(page, template.substitute(data=text, **escaped))
    return picture, page


def boxes(f: Figures, experiments: Sequence[Experiment], audited: str) -> dict[str, str]:
    """The headline: values by their captions."""
    since = count(experiments[-1].number - f.best.number)
    verdicts = f"{f.kept} kept, {f.discarded} discarded, {f.crashed} crashed"
    share = f"{f.change / abs(f.baseline):+.2%}" if f.baseline else "from 0"
    best = short(f.best.score or 0.0)
    return {
        f"best {f.best.metric}, of experiment {f.best.number}, {since} ago": best,
        f"{f.change:+.4f} from the baseline's {short(f.baseline)}": share,
        f"experiments after the baseline: {verdicts}": f"{f.experiments}",
        f"of work, {f.hourly:.1f} experiments an hour": duration(sum(f.seconds.values())),
        **({"gain, run again with new seeds": audited} if audited else {}),
        "spent, see below": money(f).partition(" (")[0] or "unknown",
    }


def short(score: float) -> str:
    return f"{score:.4f}" if abs(score) >= 0.1 else f"{score:.3g}"


def belief(f: Figures, experiments: Sequence[Experiment], task: Task, audited: str) -> list[str]:
    """Whether to believe it: repeats, noise, speed, sealed text, conditions."""
    first, best = experiments[0], f.best
    within = noise.tie(task, experiments)
    said = ["Baseline and best ran once each: run both again before you trust a gain."]
    if len(best.scores) > 1:
        said = repeats(task, experiments)
    if won := best.facts.get("duels_won"):
        said = [
            f"Each that was kept beat the one before it side by side, {won:.0f} times in a row."
        ]
    if audited:
        said[:0] = [f"A gain of {f.gain:.4g} is claimed; run again, with new seeds: {audited}."]
    if void := sum(e.facts.get("void_runs", 0.0) for e in experiments):
        said.append(f"{void:.0f} runs were void and ran again: the machine was held back.")
    said += speed(experiments, best)
    before, after = first.facts.get("sealed_bpb"), best.facts.get("sealed_bpb")
    if before is not None and after is not None and f.gain > 0:
        said.append(
            f"On sealed text, where nothing that was kept lost more than chance, the score went "
            f"from {before:.4f} to {after:.4f}: {after - before:+.4f}, "
            f"{(before - after) / f.gain:.0%} of the gain. At much less than 100%, the search "
            "fitted the validation text: look at the last diffs. This says nothing about luck in "
            "one training."
        )
    small = [e for e in experiments[1:] if e.verdict == "keep" and (e.gain or 0.0) < 5 * within]
    if small and len(best.scores) < 2:
        often = f"{5 * within:g}, five times the difference between two runs of one program"
        said.append(f"{len(small)} of {f.kept} kept gained less than {often}.")
    same = {"data": first.arena.data, "torch": first.machine.torch, "seed": str(first.seed)}
    return [*said, f"All share {', '.join(f'{name} {v}' for name, v in same.items() if v)}."]


def repeats(task: Task, experiments: Sequence[Experiment]) -> list[str]:
    """What each keep gained, run by run, and how likely it is a gain; the noise that this rests on;
    the runs of the incumbent with new seeds."""
    twice = [gains for gains in noise.gains_by_run(task, experiments) if len(gains) > 1]
    spread = noise.deviation(task, experiments)
    said = [
        f"One gain has a standard deviation of {spread:.2g}, learnt from {count(len(twice))} that "
        f"ran twice; the task's own guess, {task.noise:g}, counts for {noise.PRIOR}."
    ]
    scored = [e for e in experiments if e.scores]
    for e, gains in zip(scored, noise.gains_by_run(task, experiments), strict=True):
        if e.verdict == "keep" and gains and e.gain is not None:
            runs = ", ".join(f"{gain:+.2g}" for gain in gains)
            odds = NormalDist().cdf(e.gain * len(gains) ** 0.5 / spread) if spread else 1.0
            said.append(f"{e.number} gained {runs}: by itself a gain with {odds:.0%} probability.")
    for e in experiments[1:]:
        if e.verdict == "keep" and e.gain is None:
            new, old = [*e.scores.values()][:2]
            said.append(f"{e.number}, the incumbent again: {show(new)}, where it had {show(old)}.")
    return said


def speed(experiments: Sequence[Experiment], best: Experiment) -> list[str]:
    """Whether scores follow the tokens seen: then the speed of a run decided, not its idea."""
    seen = [e for e in experiments if e.score is not None and e.facts.get("tokens_M", 0.0) > 0]
    if len(seen) < 2:
        return []
    tokens = {e.number: e.facts["tokens_M"] for e in seen}
    low, middle, high = min(tokens.values()), median(tokens.values()), max(tokens.values())
    said = f"Tokens seen in one training: {low:.3g}M to {high:.3g}M, median {middle:.3g}M"
    if (number := experiments[0].number) in tokens and best.number in tokens:
        said += f"; baseline {tokens[number]:.3g}M, best {tokens[best.number]:.3g}M"
    later = [e for e in seen if e.number > best.number] or seen
    with suppress(StatisticsError):  # all alike
        r = correlation([math.log(tokens[e.number]) for e in later], [e.score or 0 for e in later])
        if len(later) >= 8 and (r if best.higher else -r) > 0.7:
            said += (
                f". Of {len(later)} experiments, those that saw less scored worse (correlation "
                f"{r:.2f}): speed, set by the size of a model or by other load on the machine, "
                "decided more than ideas; some discarded ones may deserve another try"
            )
    return [f"{said}."]


def cost(f: Figures) -> str:
    if f.dollars is None:
        return "Unknown: no call told its cost, and there was no --gpu-dollars-per-hour."
    units: dict[str, float] = {"experiment": f.experiments, "kept one": f.kept}
    units |= {f"0.001 of {f.best.metric}": f.gain * 1000}
    per = [f"${f.dollars / n:.3f} per {unit}" for unit, n in units.items() if n > 0.2]
    return "; ".join([money(f), *per])


def record(e: Experiment, diff: str, folder: Path) -> dict[str, Any]:
    """An experiment on the page; `figures` are the trailers of its commit."""
    log = tail(folder / f"{e.number:04d}" / "run.log", 2 * MAX_LOG).replace("\r", "\n")
    return {
        "number": e.number,
        "description": e.description,
        "reason": e.reason,
        "score": None if e.score is None else show(e.score),
        "difference": difference(e),
        "outcome": outcome(e).strip("()"),
        "minutes": f"{e.minutes:.1f}",
        "lines": f"{e.change.lines:+d}",
        "figures": dict(write(e)),
        "commit": e.commit,
        "diff": diff if len(diff) <= MAX_DIFF else f"{diff[:MAX_DIFF]}\n… cut off here",
        "log": printable(re.sub(r"\n+", "\n", log))[-MAX_LOG:],
    }


def diffs(checkout: Repo, experiments: Sequence[Experiment]) -> list[str]:
    """The diff of each experiment, by one call of git."""
    commits = [e.commit for e in experiments]
    options = ("--stdin", "-p", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color")
    out = checkout.git("diff-tree", *options, stdin="".join(f"{commit}\n" for commit in commits))
    # a hash on a line of its own, then the diff, whose lines all begin otherwise
    _, *found = re.split(r"^([0-9a-f]{40,64})\n", out, flags=re.MULTILINE)
    by_commit = dict(zip(found[::2], found[1::2], strict=True))
    return [by_commit.get(commit, "").strip("\n") for commit in commits]
