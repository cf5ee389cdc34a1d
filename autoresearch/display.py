"""What a person sees while it runs: one line for each event."""

from contextlib import suppress
from datetime import datetime

from rich.console import Console

from autoresearch.records import (
    Asking,
    Chosen,
    Dropped,
    Event,
    Experiment,
    Mended,
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


class Plain:
    """One timestamped line per event, for a terminal, a pipe or a log."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def __call__(self, event: Event) -> None:
        style = event.experiment.status if isinstance(event, Settled) else ""
        color = {"keep": "bold green", "discard": "", "crash": "red", "": ""}[style]
        with suppress(OSError):  # the terminal went away, and the research goes on
            self.console.print(f"{datetime.now():%H:%M:%S}  {text(event)}", style=color)


def text(event: Event) -> str:
    """Word an event in one line."""
    match event:
        case Chosen(agent, among):
            return f"agent {agent}, the first installed of {', '.join(among)}; --agent takes another"
        case Preparing(arena):
            return f"preparing the arena {arena}"
        case Started(tag, branch, agent, arena, machine, recorded, incumbent, exposed):
            where = machine.gpu or "the CPU"
            so_far = f"resuming after {recorded} experiments, best {incumbent:.6f}" if incumbent else "a new run"
            contest = f"arena {arena.name}, {arena.budget:g} s each, on {where}"
            walls = (
                f"train.py WITH the network and your processes ({exposed})" if exposed else "train.py without network"
            )
            return f"{tag}: {so_far}; {contest}; agent {agent}; branch {branch}; {walls}"
        case Asking(number, 0):
            return f"{number:04d} asking the agent"
        case Asking(number, attempt):
            return f"{number:04d} crashed; asking for repair {attempt}"
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
            return f"waiting until {until.astimezone():%H:%M:%S} of {until.astimezone():%d %b}: {one_line(why, 500)}"
        case Dropped(commit):
            return f"put away what was unfinished: {commit[:10]}"
        case Mended(what):
            return f"mended: {what}"
        case Stopped(reason, experiments, best):
            score = f"; best {best.val_bpb:.6f}, experiment {best.number}: {best.description}" if best else ""
            return f"stopped: {reason}; recorded in this call, baseline included: {experiments}{score}"


def outcome(e: Experiment) -> str:
    """An experiment in one line: number, verdict, score, difference to the incumbent, idea."""
    score = "no number" if e.val_bpb is None else f"{e.val_bpb:.6f}"
    difference = f" ({e.val_bpb - e.incumbent:+.6f})" if e.val_bpb is not None and e.incumbent is not None else ""
    return f"{e.number:04d} {e.status:7s} {score}{difference} {e.headline}"


def standing(experiments: list[Experiment], holder: str | None) -> str:
    """Where a run stands, in a few lines: counts, gain, rate, the kept ones, the last ten."""
    first, best = experiments[0], min((e for e in experiments if e.status == "keep"), key=lambda e: e.val_bpb or 0.0)
    kept, discarded, crashed = (sum(e.status == s for e in experiments[1:]) for s in ("keep", "discard", "crash"))
    minutes = sum(e.minutes for e in experiments)
    state = f"running, {holder}" if holder else "not running"
    costs = [e.cost_usd for e in experiments if e.cost_usd is not None]
    spend = f", ${sum(costs):.2f}{' at least' if len(costs) < len(experiments) - 1 else ''}" if costs else ""
    count = f"{len(experiments) - 1} experiments, {minutes:.0f} min{spend}"
    return "\n".join(
        [
            f"{first.tag}: {state}; arena {first.arena}, branch autoresearch/{first.tag}",
            f"{count}: {kept} kept, {discarded} discarded, {crashed} crashed",
            f"baseline {first.val_bpb:.6f}; best {best.val_bpb:.6f}, experiment {best.number}: {best.description}",
            "",
            *(outcome(e) for e in experiments[-10:]),
        ]
    )
