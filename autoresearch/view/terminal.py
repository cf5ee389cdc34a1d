"""The terminal: a live view, or a line for each event."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autoresearch.files import one_line, uninterrupted
from autoresearch.journal.experiment import Experiment, chained, difference, score, show, signed
from autoresearch.task import Progress
from autoresearch.view import events
from autoresearch.view.figures import Figures, count, duration, figures, money, shares
from autoresearch.view.status import NOW, Phase, Status, progress, save, state, update

STYLES = {"keep": "bold green", "discard": "dim", "crash": "red"}
LAST = 10  # experiments listed


class Output:
    """Standard output, which may go away with its terminal while the research goes on."""

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stdout.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()


class Display:
    """Shows every event of a run, and keeps on disk where the run stands."""

    def __init__(self, tag: str, folder: Path, plain: bool):
        self.status = Status(tag)
        self.folder = folder
        file = cast("IO[str]", Output())
        self.console = Console(
            file=file, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self.plain = plain or not sys.stdout.isatty() or self.console.is_dumb_terminal
        self.live: Live | None = None
        self.notes: list[str] = []  # events that the live view would not show a moment later

    def __call__(self, event: events.Event) -> None:
        before, self.status = self.status, update(self.status, event, time.time())
        if self.status != before:
            save(self.status, self.folder / NOW)
        if isinstance(event, events.Started) and not self.plain:
            self.open()
        if isinstance(event, events.Stopped):
            self.close()
        said = f"{datetime.now():%H:%M:%S}  {line(event, self.status.phase.words)}"
        if self.live is None:
            style = STYLES[event.experiment.verdict] if isinstance(event, events.Settled) else ""
            self.console.print(said, style=style)
        elif isinstance(event, events.Note):
            self.notes = [*self.notes[-99:], said]

    def open(self) -> None:
        self.live = Live(
            get_renderable=self.view,
            console=self.console,
            screen=True,
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with uninterrupted():  # its thread inherits the mask: signals go to the main thread
            self.live.start(refresh=True)

    def close(self) -> None:
        """Give the terminal back, with the last view and the notes on it."""
        if self.live:
            self.live.stop()
            self.live = None
            self.console.print(self.view(), soft_wrap=False)
            self.console.print("\n".join(self.notes))

    def view(self) -> RenderableType:
        try:
            far, note = progress(self.status, self.folder), "\n".join(self.notes[-3:])
            return render(self.status, far, time.time(), note)
        except Exception as error:  # a view that fails must not end the research
            return Text(f"this cannot be shown: {error!r}")


# --------------------------------------------------------------------------------------------------
# The view of a status


def render(status: Status, progress: Progress | None, now: float, note: str = "") -> RenderableType:
    """A status at a time. `note` stands below the phase: who runs it, or the latest events."""
    found = figures(status.experiments)
    where = f"{status.arena}, {status.budget:g} s each" if status.budget else status.arena
    facts = " · ".join(filter(None, (where, status.gpu or "the CPU", status.agent)))
    parts: list[RenderableType] = [one_row((status.tag, "bold"), "  ", (facts, "dim"))]
    parts += headline(found) if found else ["no baseline yet"]
    if len(status.experiments) > 1:
        best: list[float] = []
        for value, e in zip(chained(status.experiments), status.experiments, strict=True):
            best.append(value if e.verdict == "keep" and value is not None else best[-1])
        curve = sparkline(best)
        parts.append(Text.assemble((curve, "green"), ("  best so far", "dim")))
    done, said = how_far(status, progress, now)
    parts += ["", one_row(status.phase.words)]
    if said:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(1.0, min(done, 1.0), width=30), f"{min(done, 1.0):4.0%}", said)
        parts.append(bar)
    if note:
        parts.append(one_row(note, style="dim"))
    if status.experiments:
        parts += ["", table(status.experiments[: -LAST - 1 : -1])]
    return Group(*parts)


def one_row(*parts: str | tuple[str, str], style: str = "") -> Text:
    """Text that is cut where the line ends."""
    return Text.assemble(*parts, style=style, overflow="ellipsis", no_wrap=True)


def headline(f: Figures) -> Iterator[Text]:
    best, share = f.best, f.change / abs(f.baseline) if f.baseline else 0.0
    idea, gain = "nothing better yet", ""
    if best.number:
        idea = f"experiment {best.number}: {best.description}"
        gain = f"{f.change:+.6f}{f' ({share:+.2%})' if share else ''}  "
    verdicts = f"{f.kept} kept, {f.discarded} discarded, {f.crashed} crashed"
    rate = f", {f.hourly:.1f} an hour" if f.experiments else ""
    beside = f"  baseline {show(f.baseline)}  "
    yield one_row("best ", (score(best), "bold green"), beside, (gain, "bold"), idea)
    yield one_row(f"{count(f.experiments)}: {verdicts}{rate}")
    yield one_row(f"time: {shares(f.seconds)}", style="dim")
    if spent := money(f):
        yield one_row(f"spent: {spent}", style="dim")


def how_far(status: Status, progress: Progress | None, now: float) -> tuple[float, str]:
    """What part of the phase is done, and what to say of that; empty where nobody can know."""
    p, elapsed = status.phase, max(now - status.phase.since, 0.0)
    if progress:
        done = progress.percent / 100
        left = duration(status.budget * (1 - done))
        speed = f"  {progress.speed / 1000:,.0f}k tok/s" if progress.speed else ""
        return done, f"loss {progress.loss:.3f}{speed}  {left} left"
    if p.until:
        whole = max(p.until - p.since, 1.0)
        return elapsed / whole, f"{duration(elapsed)} of {duration(whole)} at most"
    return 0.0, f"starting, {duration(elapsed)}" if p.name == "training" else ""


def table(experiments: Sequence[Experiment]) -> Table:
    """Experiments in the order given, one line each."""
    rows = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style="dim")
    for name in ("nr", "verdict", experiments[0].metric, "change", "min"):
        rows.add_column(name, no_wrap=True, justify="left" if name == "verdict" else "right")
    rows.add_column("idea", no_wrap=True, overflow="ellipsis", ratio=1)
    for e in experiments:
        known = "" if e.score is None else score(e)
        cells = (f"{e.number}", e.verdict, known, difference(e), f"{e.minutes:.1f}", e.headline)
        rows.add_row(*map(Text, cells), style=STYLES[e.verdict])
    return rows


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve of at most `width` characters, from the lowest value to the highest.

    >>> sparkline([3.0, 2.0, 1.0])
    '█▅▁'
    """
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((value - low) / span * 7)] for value in values)


def standing(status: Status, folder: Path) -> RenderableType:
    """The view of a run that another process runs, or that has ended."""
    now, holder = state(status, folder)
    note = f"running, {holder}" if holder else "not running"
    if now == "died":
        note += ": the driver ended without a word; the same command resumes it"
        status = replace(status, phase=Phase(words=f"stopped at: {status.phase.words}"))
    return render(status, progress(status, folder), time.time(), note)


# --------------------------------------------------------------------------------------------------
# A line for each event


def line(event: events.Event, words: str) -> str:
    """`words`: the phase that the event has led to, which says it all for most of them."""
    match event:
        case events.Note(text):
            return text
        case events.Started():
            return describe_start(event)
        case events.Asking(number, 0):
            return f"{number:04d} asking the agent"
        case events.Asking(number, attempt, crash):
            return f"{number:04d} crashed: {one_line(crash)}; asking for repair {attempt}"
        case events.Guarding(number, claimed):
            return f"{number:04d} would be kept with {show(claimed)}; the guard looks at it"
        case events.Settled(e):
            said = f"{e.number:04d} {e.verdict:7s} {score(e)}{signed(e)}"
            return f"{said} {e.headline} ({e.commit[:10]})"
    return words


def describe_start(event: events.Started) -> str:
    found, where = figures(event.history), event.machine.gpu or "the CPU"
    so_far = "a new run"
    if found:
        so_far = f"resuming after {count(found.experiments)}, best {score(found.best)}"
    arena = f"{event.arena.budget:g} s each, on {where}" if event.arena.budget else f"on {where}"
    if event.arena.name:
        arena = f"arena {event.arena.name}, {arena}"
    exposed = f"WITH the network and your processes ({event.exposed})"
    sandbox = "with the network" if event.network else "without network"
    if event.exposed:
        sandbox = f"{sandbox} ({event.exposed})" if event.isolated else exposed
    who = f"agent {event.agent}; branch autoresearch/{event.tag}; runs {sandbox}"
    return f"{event.tag}: {so_far}; {arena}; {who}"
