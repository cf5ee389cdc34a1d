"""What a person sees while it runs, and when they ask: a live view, or one line for each event. Renderables are made
from a scene and the time alone."""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import IO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autoresearch import scene as scenes
from autoresearch.files import uninterrupted
from autoresearch.records import (
    Asking,
    Chosen,
    Event,
    Experiment,
    Preparing,
    Refereeing,
    Repeated,
    Settled,
    Stalled,
    Started,
    Stopped,
    Training,
    Waiting,
    one_line,
)
from autoresearch.scene import Figures, Phase, Scene, figures, fold, running_best
from autoresearch.task import Progress

STYLES = {"keep": "bold green", "discard": "dim", "crash": "red"}
LAST = 10  # experiments listed
NOW = "now.json"  # in the folder of a run: where it stands


class Display:
    """Told every event of a run, it shows them, and keeps on disk where the run stands."""

    def __init__(self, tag: str, folder: Path, plain: bool):
        self.scene = Scene(tag)
        self.folder = folder
        self.console = Console(
            file=cast("IO[str]", Unbreakable()), highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self.plain = plain or not sys.stdout.isatty() or self.console.is_dumb_terminal
        self.live: Live | None = None
        self.notes: list[str] = []  # what happened besides, and would be lost in a view of the moment

    def __call__(self, event: Event) -> None:
        before, self.scene = self.scene, fold(self.scene, event, time.time())
        if self.scene != before:
            scenes.save(self.scene, self.folder / NOW)
        if isinstance(event, Started) and not self.plain:
            self.open()
        if isinstance(event, Stopped):
            self.close()
        said = f"{datetime.now():%H:%M:%S}  {line(event)}"
        if self.live is None:
            style = STYLES[event.experiment.status] if isinstance(event, Settled) else ""
            self.console.print(said, style=style)
        else:
            if isinstance(event, Stalled | Repeated):
                self.notes = [*self.notes[-99:], said]
            self.live.refresh()

    def open(self) -> None:
        self.live = Live(
            get_renderable=self.view, console=self.console, screen=True, refresh_per_second=2,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.suspend = signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # it would leave the shell on this screen
        with uninterrupted():  # so that its thread hears no signal, which would break into what the driver protects
            self.live.start(refresh=True)

    def close(self) -> None:
        """Give the terminal back, with what stood on it and what was noted."""
        if self.live:
            self.live.stop()
            self.live = None
            signal.signal(signal.SIGTSTP, self.suspend)
            self.console.print(self.view(), soft_wrap=False)
            self.console.print("\n".join(self.notes))

    def view(self) -> RenderableType:
        try:
            note = "\n".join(self.notes[-3:])
            return render(self.scene, scenes.progress(self.scene, self.folder), time.time(), note)
        except Exception as error:  # what is shown must not end what is done
            return Text(f"this cannot be shown: {error!r}")


class Unbreakable:
    """Standard output that may go away, as a terminal does, while the research goes on. To a terminal that takes
    nothing any more, say after Ctrl-S, nothing is written."""

    def __init__(self) -> None:
        self.terminal: int | None = None
        with suppress(OSError):  # opened afresh, since not to wait is a property of what is open, which others share
            if sys.stdout.isatty():
                self.terminal = os.open(os.ttyname(sys.stdout.fileno()), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            if self.terminal is None:
                sys.stdout.write(text)
            else:
                data = text.encode(sys.stdout.encoding, "replace")
                while data and select.select([], [self.terminal], [], 0.05)[1]:
                    data = data[os.write(self.terminal, data) :]
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stdout.flush()


# -----------------------------------------------------------------------------
# The view of a scene


def render(scene: Scene, progress: Progress | None, now: float, note: str = "") -> RenderableType:
    """A scene as it looks at a time. `note` is shown with the phase: who runs it, or what happened besides."""
    found = figures(scene.experiments)
    facts = [scene.arena and f"{scene.arena}, {scene.budget:g} s each", scene.gpu or "the CPU", scene.agent]
    title = Text.assemble((scene.tag, "bold"), "  ", (" · ".join(filter(None, facts)), "dim"))
    title.no_wrap, title.overflow = True, "ellipsis"
    parts: list[RenderableType] = [title, *(headline(found) if found else ["no baseline yet"])]
    if len(scene.experiments) > 1:
        parts.append(Text.assemble((sparkline(running_best(scene.experiments)), "green"), ("  best so far", "dim")))
    parts += ["", *phase(scene, progress, now, note)]
    if scene.experiments:
        parts += ["", table(scene.experiments[: -LAST - 1 : -1])]
    return Group(*parts)


def headline(f: Figures) -> list[RenderableType]:
    best, share = f.best, f.gain / f.baseline if f.baseline else 0.0
    idea = f"experiment {best.number}: {best.description}" if best.number else "nothing better yet"
    counts = [f"{count(f.experiments)}: {f.kept} kept, {f.discarded} discarded, {f.crashed} crashed"]
    if f.experiments:
        counts.append(f"{f.hourly:.1f} an hour")
    return [
        Text.assemble(
            "best ", (f"{best.val_bpb:.6f}", "bold green"), f"  baseline {f.baseline:.6f}  ",
            (f"{-f.gain:+.6f} ({-share:+.2%})  " if best.number else "", "bold"), idea,
            overflow="ellipsis", no_wrap=True,
        ),
        Text(", ".join(counts), overflow="ellipsis", no_wrap=True),
        Text(f"time: {shares(f.seconds)}", style="dim", overflow="ellipsis", no_wrap=True),
        *(Text(f"spent: {dollars}", style="dim", overflow="ellipsis", no_wrap=True) for dollars in money(f)),
    ]  # fmt: skip


def money(f: Figures) -> list[str]:
    """What was spent, in words; nothing where nobody knows."""
    if f.dollars is None:
        return []
    parts = {"agent": f.agent_dollars, "GPU": f.gpu_dollars}
    known = ", ".join(f"{name} ${value:.2f}" for name, value in parts.items() if value is not None)
    return [f"${f.dollars:.2f}{' at least' if f.at_least else ''} ({known})"]


def shares(seconds: dict[str, float]) -> str:
    """
    >>> shares({"agent": 1.0, "training": 3.0, "own": 0.0})
    'agent 25%, training 75%'
    """
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{name} {value / total:.0%}" for name, value in seconds.items() if value / total >= 0.005)


def phase(scene: Scene, progress: Progress | None, now: float, note: str) -> list[RenderableType]:
    """What it is at, and how far that is."""
    p, elapsed = scene.phase, max(now - scene.phase.since, 0.0)
    number = f"{p.number:04d} "
    match p.name:
        case "preparing":
            words, bar = f"preparing the arena {scene.arena}", None
        case "asking":
            words = f"{number}asking {scene.agent}" + (f" for repair {p.turn} of: {p.detail}" if p.turn else "")
            bar = (elapsed / (scene.agent_limit or 1), f"{duration(elapsed)} of {duration(scene.agent_limit)} at most")
        case "training" if progress:
            done, left = progress.percent / 100, duration(scene.budget * (1 - progress.percent / 100))
            speed = f"  {progress.speed / 1000:,.0f}k tok/s" if progress.speed else ""
            words, bar = f"{number}training: {p.detail}", (done, f"loss {progress.loss:.3f}{speed}  {left} left")
        case "training":
            words, bar = f"{number}training: {p.detail}", (0.0, f"starting, {duration(elapsed)}")
        case "refereeing":
            words, bar = f"{number}the referee scores it: {p.detail}", None
        case "waiting" if p.until:
            words = f"waiting until {datetime.fromtimestamp(p.until):%H:%M:%S of %d %b}: {p.detail}"
            bar = (elapsed / max(p.until - p.since, 1), f"{duration(max(p.until - now, 0))} left")
        case "stopped":
            words, bar = f"stopped: {p.detail}" + (f"; ${scene.dollars:.2f} spent" if scene.dollars else ""), None
        case _:
            words, bar = "", None
    lines: list[RenderableType] = [Text(words, overflow="ellipsis", no_wrap=True)] if words else []
    if bar:
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(1.0, min(bar[0], 1.0), width=30), f"{min(bar[0], 1.0):4.0%}", bar[1])
        lines.append(row)
    if note:
        lines.append(Text(note, style="dim", overflow="ellipsis", no_wrap=True))
    return lines


def table(experiments: Sequence[Experiment]) -> Table:
    """Experiments in the order given, one line each."""
    rows = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style="dim")
    for name in ("nr", "verdict", "val_bpb", "change", "min"):
        rows.add_column(name, no_wrap=True, justify="left" if name == "verdict" else "right")
    rows.add_column("idea", no_wrap=True, overflow="ellipsis", ratio=1)
    for e in experiments:
        score = "" if e.val_bpb is None else f"{e.val_bpb:.6f}"
        change = "" if e.gain is None else f"{-e.gain:+.6f}"
        cells = (f"{e.number}", e.status, score, change, f"{e.minutes:.1f}", e.headline)
        rows.add_row(*(Text(cell) for cell in cells), style=STYLES[e.status])
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
    return "".join(BARS[round((value - low) / (high - low) * 7) if high > low else 0] for value in values)


def duration(seconds: float) -> str:
    """
    >>> duration(62.0)
    '1:02'
    """
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


# -----------------------------------------------------------------------------
# One line for each event


def line(event: Event) -> str:
    """Word an event in one line."""
    match event:
        case Chosen(agent, among):
            return f"agent {agent}, the first installed of {', '.join(among)}; --agent takes another"
        case Preparing(arena):
            return f"preparing the arena {arena}"
        case Started():
            best = figures(event.history)
            so_far = f"resuming after {count(best.experiments)}, best {best.best.val_bpb:.6f}" if best else "a new run"
            contest = f"arena {event.arena.name}, {event.arena.budget:g} s each, on {event.machine.gpu or 'the CPU'}"
            walls = f"WITH the network and your processes ({event.exposed})" if event.exposed else "without network"
            end = f"agent {event.agent}; branch {event.branch}; train.py {walls}"
            return f"{event.tag}: {so_far}; {contest}; {end}"
        case Asking(number, 0):
            return f"{number:04d} asking the agent"
        case Asking(number, attempt, crash):
            return f"{number:04d} crashed: {one_line(crash)}; asking for repair {attempt}"
        case Training(number, description):
            return f"{number:04d} training: {description}"
        case Refereeing(number, val_bpb):
            return f"{number:04d} would be kept with {val_bpb:.6f}; the referee scores the model"
        case Settled(experiment, commit):
            return f"{outcome(experiment)} ({commit[:10]})"
        case Stalled(number, reason):
            return f"{number:04d} no experiment: {one_line(reason)}"
        case Repeated(number, earlier):
            return f"{number:04d} the same program as experiment {earlier.number}; asking once more"
        case Waiting(why, until):
            return f"waiting until {until.astimezone():%H:%M:%S of %d %b}: {one_line(why, 500)}"
        case Stopped(reason, experiments, best, dollars):
            score = f"; best {best.val_bpb:.6f}, experiment {best.number}: {best.description}" if best else ""
            spent = f"; ${dollars:.2f} spent" if dollars else ""
            return f"stopped: {reason}; {count(experiments)} recorded in this call{spent}{score}"


def count(experiments: int) -> str:
    return f"{experiments} experiment{'' if experiments == 1 else 's'}"


def outcome(e: Experiment) -> str:
    """An experiment in one line: number, verdict, score, difference to the incumbent, idea."""
    score = "no number" if e.val_bpb is None else f"{e.val_bpb:.6f}"
    difference = "" if e.gain is None else f" ({-e.gain:+.6f})"
    return f"{e.number:04d} {e.status:7s} {score}{difference} {e.headline}"


# -----------------------------------------------------------------------------
# For who asks from outside


def state(scene: Scene, holder: str | None) -> str:
    """What became of a run: `running`, `stopped`, or `died`, when its driver ended without a word."""
    return "running" if holder else "died" if scene.phase.name not in ("", "stopped") else "stopped"


def standing(scene: Scene, folder: Path, holder: str | None) -> RenderableType:
    """The view of a run that another process runs, or none any more."""
    now = state(scene, holder)
    note = {
        "running": f"running, {holder}",
        "stopped": "not running",
        "died": "not running: the driver ended without a word; the same command resumes it",
    }[now]
    if now == "died":
        at = f"{scene.phase.name} {scene.phase.number:04d} {scene.phase.detail}".strip()
        scene = replace(scene, phase=Phase("stopped", detail=f"at {at}"))
    return render(scene, scenes.progress(scene, folder), time.time(), note)


def facts(scene: Scene, folder: Path, holder: str | None) -> dict[str, object]:
    """The same for scripts, in plain values; an unknown one is None."""
    found, far = figures(scene.experiments), scenes.progress(scene, folder)
    summary = asdict(found) | {"gain": found.gain, "dollars": found.dollars} if found else None
    return {
        "state": state(scene, holder),
        "holder": holder,
        **{name: value for name, value in asdict(scene).items() if name != "experiments"},
        "progress": asdict(far) if far else None,
        "figures": summary,
        "experiments": [asdict(e) for e in scene.experiments],
    }
