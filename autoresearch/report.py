"""What was found, at what price, and whether to believe it: progress.png for a glance, report.html for the morning."""

import csv
import json
import math
import os
import re
import string
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import StatisticsError, correlation, median, quantiles
from typing import Any

from autoresearch import prompt
from autoresearch.display import duration, money
from autoresearch.files import tail
from autoresearch.git import Repo
from autoresearch.records import EDITABLE, TIE, Experiment, UserError, one_line
from autoresearch.scene import Figures, figures

GREEN, GREY, ORANGE, RED = "#188038", "#9aa0a6", "#b06000", "#c5221f"
FAR = 1e6  # what no chart can show
LABELS = 16  # gains named in the picture: the largest
PATIENCE = 15.0  # seconds that the last report is waited for
MAX_PARTS = 40  # of the program, listed with what was tried
MAX_DIFF = 20_000  # characters of a diff that are shown
MAX_LOG = 3_000  # characters of a log's end that are shown


@dataclass(frozen=True)
class Point:
    """One experiment in a chart. No number is nan there, which no chart draws."""

    number: int
    status: str
    val_bpb: float
    description: str
    sealed: float = math.nan


def points_of(history: Iterable[Experiment]) -> list[Point]:
    return [
        Point(e.number, e.status, number(e.val_bpb), e.description, number(e.sealed_bpb)) for e in history
    ]  # fmt: skip


def number(value: float | None) -> float:
    return math.nan if value is None else value


def read_table(path: Path) -> list[Point]:
    """The rows of a results.tsv, ours or upstream's, numbered as they come; UserError when it is none."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [
            Point(
                number, row["status"], float(row["val_bpb"]) if row["status"] != "crash" else math.nan,
                one_line(row["description"] or "", 200),
            )
            for number, row in enumerate(rows)
        ]  # fmt: skip
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        columns = "commit, val_bpb, memory_gb, status, description"
        raise UserError(f"{path} is no results.tsv, tab-separated with the columns {columns} ({error!r})") from None


class Refresher:
    """Has the report made again, by a process that takes only the time that nobody else wants."""

    def __init__(self, root: Path, tag: str):
        self.command = [sys.executable, str(root / "loop.py"), "report", "--tag", tag]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Unless the last one is still at it: then the next experiment's will show both."""
        if self.process is None or self.process.poll() is not None:
            with suppress(OSError):
                self.process = self.spawn()
                os.sched_setscheduler(self.process.pid, os.SCHED_IDLE, os.sched_param(0))

    def finish(self) -> None:
        """Make the last one, with all that is known, and wait for it."""
        if self.process:
            self.process.kill()
            self.process.wait()
        with suppress(OSError):
            last = self.spawn()
            try:
                last.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                last.kill()

    def spawn(self) -> subprocess.Popen[bytes]:
        nowhere = subprocess.DEVNULL
        return subprocess.Popen(self.command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)


# -----------------------------------------------------------------------------
# The chart: val_bpb by experiment


@dataclass(frozen=True)
class Curve:
    """What both charts show: the points with a number, the running best as a step line, the sealed scores of the kept
    moved to the same start, and the range of the axis, which leaves out what is far off."""

    points: list[Point]
    best: list[tuple[int, float]]
    sealed: list[tuple[int, float]]
    low: float
    high: float
    last: int


def curve_of(points: Sequence[Point]) -> Curve:
    """UserError when no experiment was kept."""
    scored = [p for p in points if abs(p.val_bpb) < FAR]  # nan is not
    kept = [p for p in scored if p.status == "keep"]
    if not kept:
        raise UserError("nothing to draw: no experiment was kept yet")
    values = [p.val_bpb for p in kept]
    sealed = [p for p in kept if math.isfinite(p.sealed)]
    moved = [(p.number, p.sealed + sealed[0].val_bpb - sealed[0].sealed) for p in sealed]
    # of what was discarded, the better half; a failed idea can be worse by the whole range of what was found
    others = [p.val_bpb for p in scored if p.status != "keep"]
    middle = quantiles(others, n=2)[0] if len(others) > 1 else max([*others, values[0]])
    ends = [*values, *(value for _, value in moved), min(middle, values[0] + 2 * (values[0] - min(values)) + 10 * TIE)]
    margin = max((max(ends) - min(ends)) * 0.08, 5 * TIE)
    best = [(p.number, p.val_bpb) for p in kept]
    return Curve(scored, best, moved, min(ends) - margin, max(ends) + margin, max(p.number for p in points))


def draw(points: Sequence[Point], title: str, path: Path) -> None:
    """Write the chart as a picture of 1400 x 700 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that the loop need not wait for
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curve = curve_of(points)
    figure = Figure(figsize=(10, 5), dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.1, 0.575, 0.82))
    faint = [p for p in curve.points if p.status != "keep"]
    near, far = ([p for p in faint if (p.val_bpb <= curve.high) == inside] for inside in (True, False))
    axes.plot([p.number for p in near], [p.val_bpb for p in near], ".", color=GREY, alpha=0.5, label="discarded")
    axes.plot([p.number for p in far], [curve.high] * len(far), "^", color=GREY, alpha=0.5, ms=4, clip_on=False)
    lines: list[tuple[list[tuple[int, float]], dict[str, Any]]] = [
        (curve.best, {"color": GREEN, "lw": 1.5, "label": "best so far"})
    ]
    if len(curve.sealed) > 1:
        lines.append((curve.sealed, {"color": ORANGE, "lw": 1, "ls": ":", "label": "the same on sealed text"}))
    for steps, look in lines:
        axes.step(*zip(*steps, (curve.last, steps[-1][1]), strict=True), where="post", **look)
    axes.plot(*zip(*curve.best, strict=True), "o", color=GREEN, ms=5, label="kept")
    if crashed := [p.number for p in points if p.status == "crash"]:
        axes.plot(crashed, [curve.low] * len(crashed), "x", color=RED, alpha=0.6, ms=4, clip_on=False, label="crashed")
    axes.set(xlabel="experiment", ylabel="val_bpb (lower is better)", ylim=(curve.low, curve.high))
    axes.set_xlim(-0.02 * max(curve.last, 1), 1.02 * max(curve.last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(useOffset=False)
    axes.set_title(one_line(title, 150).replace("$", r"\$"), loc="left", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    named = largest(points)
    shown = -math.inf
    for p in named:
        if p.number - shown > curve.last / 40:  # or the numbers would cover each other
            shown = p.number
            axes.annotate(
                f"{p.number}", (p.number, p.val_bpb), xytext=(0, -11), textcoords="offset points", ha="center",
                fontsize=7, color=GREEN,
            )  # fmt: skip
    ideas = "\n".join(f"{p.number:4d}  {one_line(p.description, 52)}" for p in named)
    words = f"largest gains\n\n{ideas}" if named else "nothing better than the baseline yet"
    figure.text(0.665, 0.9, words.replace("$", r"\$"), fontsize=7, va="top", linespacing=1.7)
    with warnings.catch_warnings(), whole(path) as fresh:
        warnings.simplefilter("ignore")  # of letters that the font has not got
        figure.savefig(fresh, format="png")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which nobody else does; the file then takes its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def largest(points: Sequence[Point]) -> list[Point]:
    """The kept experiments that gained most, in their order."""
    kept = [p for p in points if p.status == "keep" and math.isfinite(p.val_bpb)]
    steps = sorted(pairwise(kept), key=lambda step: step[1].val_bpb - step[0].val_bpb)
    return sorted((p for _, p in steps[:LABELS]), key=lambda p: p.number)


def svg(history: Sequence[Experiment]) -> str:
    """The chart for the page; each point tells its experiment when hovered, and opens it when clicked."""
    curve = curve_of(points_of(history))
    width, height, left, bottom, top = 960, 380, 70, 34, 12

    def x(number: float) -> float:
        return round(left + (width - left - 16) * (number / max(curve.last, 1)), 1)

    def y(value: float) -> float:
        inside = min(max(value, curve.low), curve.high)
        return round(top + (height - top - bottom) * (curve.high - inside) / (curve.high - curve.low), 1)

    def steps(line: Sequence[tuple[int, float]]) -> str:
        path = f"M{x(line[0][0])} {y(line[0][1])}" + "".join(f"H{x(number)}V{y(value)}" for number, value in line[1:])
        return f"{path}H{x(curve.last)}"

    parts = []
    for tick, label in ticks(curve.low, curve.high):
        parts.append(f'<path class="grid" d="M{left} {y(tick)}H{width}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{label}</text>')
    for tick, label in ticks(0, max(curve.last, 1), integer=True):
        parts.append(f'<text x="{x(tick)}" y="{height - 8}" text-anchor="middle">{label}</text>')
    if len(curve.sealed) > 1:
        parts.append(f'<path class="sealed" d="{steps(curve.sealed)}"/>')
    parts.append(f'<path class="best" d="{steps(curve.best)}"/>')
    for p in sorted(curve.points, key=lambda p: p.status == "keep"):
        said = escape(f"{p.number}: {p.val_bpb:.6f} {p.status}. {p.description}")
        at, shape = (x(p.number), y(p.val_bpb)), f'class="point {p.status}" data-n="{p.number}"'
        if p.val_bpb > curve.high:
            shape = f'<path {shape} d="M{at[0] - 4} {at[1] + 7}h8l-4-7z">'
        else:
            shape = f'<circle {shape} cx="{at[0]}" cy="{at[1]}" r="{5 if p.status == "keep" else 3}">'
        parts.append(f"{shape}<title>{said}</title></{shape[1:].partition(' ')[0]}>")
    for e in history:
        if e.status == "crash":
            cross = (
                f'<path class="cross" data-n="{e.number}" d="M{x(e.number) - 3} {height - bottom - 7}l6 6m0-6l-6 6">'
            )
            parts.append(f"{cross}<title>{escape(f'{e.number}: {e.headline}')}</title></path>")
    for p in largest(curve.points):
        parts.append(
            f'<text class="kept" x="{x(p.number)}" y="{y(p.val_bpb) + 18}" text-anchor="middle">{p.number}</text>'
        )
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="val_bpb by experiment"'
    return f'<svg id="chart" {box}>{"".join(parts)}</svg>'


def ticks(low: float, high: float, integer: bool = False) -> list[tuple[float, str]]:
    """Round values within a range, and how each is written.

    >>> ticks(0.9931, 1.0012)
    [(0.994, '0.994'), (0.996, '0.996'), (0.998, '0.998'), (1.0, '1.000')]
    """
    from matplotlib.ticker import MaxNLocator

    values = [round(float(v), 9) for v in MaxNLocator(6, integer=integer).tick_values(low, high)]
    places = max(-math.floor(math.log10(values[1] - values[0]) + 1e-9), 0)
    return [(v, f"{v:.{places}f}") for v in values if low <= v <= high]


# -----------------------------------------------------------------------------
# The page


def write_report(checkout: Repo, history: Sequence[tuple[str, Experiment]], folder: Path) -> tuple[Path, Path]:
    """Write progress.png and report.html of one run into its folder, and return where."""
    experiments = [e for _, e in history]
    found = figures(experiments)
    if found is None:
        raise UserError("nothing to report: the run has no baseline yet")
    first = experiments[0]
    place = f"{first.arena}, {first.budget or 0:g} s each, on {first.gpu or 'a CPU'}"
    agents = ", ".join(sorted({e.agent for e in experiments[1:]})) or first.agent
    title = f"{first.tag}: {place}; agent {one_line(agents, 60)}"
    picture, page = folder / "progress.png", folder / "report.html"
    draw(points_of(experiments), title, picture)
    best_commit = next(commit for commit, e in history if e == found.best)
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    details = [
        detail(e, commit, diff, folder) for (commit, e), diff in zip(history, diffs(checkout, history), strict=True)
    ]
    text = template.substitute(
        title=escape(title),
        summary=summary(found, experiments),
        headline=headline(found, experiments),
        whole=escape(checkout.git("diff", "--no-ext-diff", history[0][0], best_commit, "--", EDITABLE)[:MAX_DIFF]),
        best=escape(best_commit),
        belief=belief(experiments, found),
        chart=svg(experiments),
        gains=gains(experiments),
        themes=themes(experiments),
        spend=spend(found),
        time=time_spent(found),
        rows="".join(map(table_row, experiments)),
        # data for the script, which puts it in as text: no end of a tag can stand in it
        details=json.dumps(details).replace("<", "\\u003c"),
    )
    with whole(page) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return picture, page


def summary(f: Figures, experiments: Sequence[Experiment]) -> str:
    """What this is about, for who has never seen such a report."""
    first, since = experiments[0], experiments[-1].number - f.best.number
    return escape(
        f"An agent changed train.py {f.experiments} times, one idea each. Each was trained for {first.budget or 0:g} s "
        f"and scored by val_bpb, the bits per byte of unseen text: lower is better. {f.kept} beat what was best before "
        f"and were kept; the best is experiment {f.best.number}, and {since} since then brought nothing better."
    )


def headline(f: Figures, experiments: Sequence[Experiment]) -> str:
    best, first = f.best, experiments[0]
    sealed = "" if (change := sealed_change(first, best)) is None else f"; {change:+.4f} on sealed text"
    boxes = [
        (f"{best.val_bpb:.4f}", f"best val_bpb, experiment {best.number}"),
        (f"{-f.gain / (f.baseline or 1):+.2%}", f"{-f.gain:+.4f} from the baseline's {f.baseline:.4f}{sealed}"),
        (
            f"{f.experiments}",
            f"experiments after the baseline: {f.kept} kept, {f.discarded} discarded, {f.crashed} crashed",
        ),
        (duration(sum(f.seconds.values())), f"h:mm:ss of work, {f.hourly:.1f} experiments an hour"),
        ((money(f) or ["unknown"])[0].partition(" (")[0], "spent, see below"),
    ]
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(words)}</span></div>" for value, words in boxes)


def sealed_change(first: Experiment, best: Experiment) -> float | None:
    known = first.sealed_bpb is not None and best.sealed_bpb is not None and best.number > 0
    return (best.sealed_bpb or 0.0) - (first.sealed_bpb or 0.0) if known else None


def belief(experiments: Sequence[Experiment], f: Figures) -> str:
    """Whether to believe it: repeats, speed, the sealed score, the noise, what the run was compared under."""
    first, best = experiments[0], f.best
    said = ["Baseline and best were each trained once: train both again, in turns, before a gain is called one."]
    said += speed(experiments, best)
    if (change := sealed_change(first, best)) is not None and f.gain > 0:
        share = -change / f.gain
        verdict = (
            "the search did not fit the validation rows" if share > 0.8 else
            "part of the gain does not carry over: look at the last diffs" if share > 0.3 else
            "the gain does not carry over: the search may have fitted the validation rows"
        )  # fmt: skip
        levels = f"{first.sealed_bpb:.4f} to {best.sealed_bpb:.4f}"
        said.append(
            f"On sealed rows, which no decision was taken on, it went from {levels}: {change:+.4f}, {share:.0%} of the "
            f"gain; {verdict}. That says nothing of luck in one training."
        )
    small = [e for e in experiments[1:] if e.status == "keep" and (e.gain or 0.0) < 5 * TIE]
    if small:
        noise = f"less than {5 * TIE:g}, five times what a run on a GPU of its own repeats itself to"
        said.append(f"{len(small)} of {f.kept} kept gained {noise}.")
    under = f"{first.arena} ({first.data}), {first.gpu or 'a CPU'}, torch {first.torch}, seed {first.seed}"
    said.append(f"The same for all scores: {under}.")
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in said)


def speed(experiments: Sequence[Experiment], best: Experiment) -> list[str]:
    """Whether scores follow how much of the text a run got to see: then the machine decided, or the model's size."""
    seen = [e for e in experiments if e.tokens_M and e.val_bpb is not None]
    if len(seen) < 2:
        return []
    tokens = sorted(e.tokens_M or 0.0 for e in seen)
    said = f"Tokens seen in one training: {tokens[0]:.3g}M to {tokens[-1]:.3g}M, median {median(tokens):.3g}M"
    if experiments[0].tokens_M and best.tokens_M:
        said += f"; baseline {experiments[0].tokens_M:.3g}M, best {best.tokens_M:.3g}M"
    later = [e for e in seen if e.number > best.number] or seen
    pairs = [(math.log(e.tokens_M or 1.0), e.val_bpb or 0.0) for e in later]
    with suppress(StatisticsError):  # all alike
        r = correlation(*zip(*pairs, strict=True))
        if len(pairs) >= 8 and r < -0.7:
            which = f"{len(pairs)} experiments {'in all' if later is seen else 'since the best'}"
            said += (
                f". Of the {which}, those that saw less scored worse (correlation {r:.2f}): how fast a run was, by its "
                "size or by what else the machine did, decided more than the ideas; what was discarded may be worth "
                "another try"
            )
    return [f"{said}."]


def gains(experiments: Sequence[Experiment]) -> str:
    kept = sorted((e for e in experiments if e.status == "keep" and e.gain), key=lambda e: -(e.gain or 0.0))
    if not kept:
        return "<p>None yet.</p>"
    shown, rest = kept[:15], kept[15:]
    rows = "".join(
        f"<li>{link(e)} {escape(e.description)} <small>experiment {e.number}, {e.lines:+d} lines</small></li>"
        for e in shown
    )
    more = f"<p>and {len(rest)} more, {-sum(e.gain or 0.0 for e in rest):+.6f} together</p>" if rest else ""
    return f"<ol>{rows}</ol>{more}"


def link(e: Experiment) -> str:
    """The difference that an experiment made, to be clicked."""
    return f'<a href="#" data-n="{e.number}">{escape(prompt.verdict(e).strip("()"))}</a>'


def themes(experiments: Sequence[Experiment]) -> str:
    """What was tried of each part of the program: what was kept first, then the most often tried."""
    parts = prompt.tried(experiments)
    parts.sort(key=lambda part: -sum(e.status == "keep" for _, e in part[1]))
    rows = []
    for name, entries in parts[:MAX_PARTS]:
        kept = sum(e.status == "keep" for _, e in entries)
        best = sorted(entries, key=lambda entry: -math.inf if entry[1].gain is None else entry[1].gain, reverse=True)[
            :3
        ]
        tries = ", ".join(
            f"{escape(one_line(value, 24))} {link(e)}{'*' if '; ' in (e.changes or '') else ''}" for value, e in best
        )
        rows.append(f"<tr><td>{escape(name)}</td><td>{len(entries)}</td><td>{kept}</td><td>{tries}</td></tr>")
    if not rows:
        return "<p>Nothing yet.</p>"
    head = "<tr><th>part</th><th>tried</th><th>kept</th><th>its best tries, and the difference each made</th></tr>"
    more = f"<p>and {len(parts) - MAX_PARTS} more, never kept</p>" if len(parts) > MAX_PARTS else ""
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>{more}'


def spend(f: Figures) -> str:
    if f.dollars is None:
        return "<p>Unknown: no call said what it cost, and no price was given with --gpu-dollars-per-hour.</p>"
    per = [f"${f.dollars / f.experiments:.3f} for an experiment"] if f.experiments else []
    per += [f"${f.dollars / f.kept:.2f} for one that was kept"] if f.kept else []
    per += [f"${f.dollars / (f.gain * 1000):.2f} for 0.001 of val_bpb"] if f.gain > TIE else []
    return f"<p>{escape('; '.join([*money(f), *per]))}.</p>"


def time_spent(f: Figures) -> str:
    total = sum(f.seconds.values()) or 1.0
    parts = [(name, value) for name, value in f.seconds.items() if value / total >= 0.001]
    bars = "".join(
        f'<i class="part{n}" style="flex-grow:{value / total:.4f}" title="{escape(name)}"></i>'
        for n, (name, value) in enumerate(parts)
    )
    words = "".join(
        f'<li><i class="part{n}"></i>{escape(name)} {duration(value)}, {value / total:.1%}</li>'
        for n, (name, value) in enumerate(parts)
    )
    return f'<div class="bar">{bars}</div><ul class="legend">{words}</ul>'


def table_row(e: Experiment) -> str:
    """One row; `data-v` is what a column is sorted by, where it is not the text."""
    cells = [
        (f"{e.number}", e.number), (e.status, None), ("" if e.val_bpb is None else f"{e.val_bpb:.6f}", e.val_bpb),
        ("" if e.gain is None else f"{-e.gain:+.6f}", None if e.gain is None else -e.gain),
        ("" if e.steps is None else f"{e.steps}", e.steps),
        (f"{e.memory_gb:.1f}" if e.memory_gb else "", e.memory_gb), (f"{e.minutes:.1f}", e.minutes),
        ("" if e.cost_usd is None else f"{e.cost_usd:.2f}", e.cost_usd), (f"{e.lines:+d}", e.lines), (e.headline, None),
    ]  # fmt: skip
    tds = "".join(f"<td{'' if value is None else f' data-v={value}'}>{escape(text)}</td>" for text, value in cells)
    return f'<tr class="{e.status}" data-n="{e.number}" tabindex="0">{tds}</tr>'


SHOWN = ("description", "reason", "finished", "data", "source", "program", "status", "tag", "curve", "crash")


def detail(e: Experiment, commit: str, diff: str, folder: Path) -> dict[str, object]:
    """What is shown of an experiment when it is opened."""
    own = folder / f"{e.number:04d}"
    known = {name: value for name, value in asdict(e).items() if value is not None and name not in SHOWN}
    log = tail(own / "run.log", 2 * MAX_LOG).replace("\r", "\n")
    return {
        "n": e.number, "commit": commit, "status": e.status, "description": e.description, "reason": e.reason,
        "crash": e.crash, "curve": e.curve, "figures": known,
        "diff": diff if len(diff) <= MAX_DIFF else f"{diff[:MAX_DIFF]}\n… cut off here; git show {commit[:10]} has all",
        "log": prompt.printable(re.sub(r"\n+", "\n", log))[-MAX_LOG:],
    }  # fmt: skip


def diffs(checkout: Repo, history: Sequence[tuple[str, Experiment]]) -> list[str]:
    """What each experiment changed, by one call of git."""
    commits = [commit for commit, _ in history]
    options = ("--stdin", "-p", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color")
    out = checkout.git("diff-tree", *options, stdin="".join(f"{commit}\n" for commit in commits))
    # a hash on a line of its own, then the diff, whose lines all begin otherwise
    _, *parts = re.split(r"^([0-9a-f]{40,64})\n", out, flags=re.MULTILINE)
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    return [found.get(commit, "").strip("\n") for commit in commits]
