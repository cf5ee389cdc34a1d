"""The command line: commands and their options, the start of a run, signals, exit codes."""

import argparse
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoresearch import checks, prompt, records, report
from autoresearch.display import NOW, Display, facts, standing
from autoresearch.files import STOPS, lock, lock_of_device, lock_owner, uninterrupted
from autoresearch.git import AgentTree
from autoresearch.jobs import gpu
from autoresearch.jobs.job import Track
from autoresearch.ledger import LOCK, REFS, read_history
from autoresearch.pace import PACE
from autoresearch.presets import PRESETS, ROOT
from autoresearch.records import Experiment, UserError
from autoresearch.scene import load
from autoresearch.study import Limits, Study
from autoresearch.task import prepare_arena

Research = Callable[[Study], str]  # runs experiments until a limit is reached, and returns which

# ----------------------------------------------------------------------------------------------------------------------
# Commands and options

DESCRIPTION = """\
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training decide.
Without a command: run, whose options `loop.py run --help` lists, --demo among them."""
DEMO = {"tag": "demo", "agent": "random", "arena": "demo", "experiments": 5}


def parse(argv: list[str]) -> argparse.Namespace:
    """Read a command line; UserError for a wrong one."""
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, about, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add_options(command.add_argument)
    if argv[:1] not in (["--help"], ["-h"]) and (not argv or argv[0].startswith("-")):
        argv = ["run", *argv]
    return parser.parse_args(argv)


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more", 2)


Add = Callable[..., Any]  # an ArgumentParser's add_argument


def run_options(add: Add) -> None:
    add("--tag", help=f"name of the run and its branch (default: {today()})")
    about_agent = "or any shell command: prompt on standard input, idea on its last line of output"
    add("--agent", help=f"{', '.join(PRESETS)}, random, {about_agent} (default: the first that is installed)")
    add("--model", metavar="NAME", help="which model the agent uses (default: its own)")
    add("--arena", help="what to train on: climbmix, tinystories, python, demo or ./a/folder (default: climbmix)")
    add("--gpu", metavar="N", type=natural_number, help="which GPU (default: the first)")
    add("--experiments", metavar="N", type=natural_number, help="stop after so many, the baseline not counted")
    add("--hours", metavar="H", type=positive, default=math.inf, help="start no experiment after so many hours")
    about_dollars = "start no experiment after so many were spent on the agent, and on the GPU if its price is given"
    add("--dollars", metavar="D", type=positive, default=math.inf, help=about_dollars)
    about_rate = "what the GPU costs, from the start of this call to its end"
    add("--gpu-dollars-per-hour", metavar="X", type=positive, default=0.0, help=about_rate)
    about_limit = "hard limit of a run (default: twice the budget, at least 120)"
    add("--train-timeout", metavar="S", type=positive, help=about_limit)
    add("--agent-timeout", metavar="S", type=positive, default=900.0, help="hard limit of an agent call (default: 900)")
    add("--no-isolation", action="store_true", help="let train.py use the network and see the whole environment")
    add("--plain", action="store_true", help="a line for each event, as where there is no terminal")
    add("--no-report", action="store_true", help="do not refresh progress.png and report.html after each experiment")
    add("--demo", action="store_true", help="demo arena, random agent, five experiments: any machine")


def tag_option(add: Add) -> None:
    add("--tag", help="name of the run (default: the one that was active last)")


def status_options(add: Add) -> None:
    tag_option(add)
    add("--json", action="store_true", help="for scripts")


def report_options(add: Add) -> None:
    tag_option(add)
    add("--results", metavar="FILE", type=Path, help="draw this results.tsv instead, which may be upstream's")


def today() -> str:
    return f"{date.today():%b}{date.today().day}".lower()


def natural_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def settle_options(options: argparse.Namespace) -> checks.Setup:
    """Fill in what a person left out, in the options and in the environment of what the driver starts."""
    usual = {"tag": today(), "arena": "climbmix", "experiments": math.inf}
    for name, value in (usual | DEMO if options.demo else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if os.sep in options.arena:  # the same from another folder
        options.arena = str(Path(options.arena).expanduser().resolve())
    if options.train_timeout is not None and options.train_timeout < PACE.shortest_limit:
        raise UserError(f"--train-timeout must be at least {PACE.shortest_limit:g} s; --help tells more", 2)
    if cache := os.environ.get("AUTORESEARCH_CACHE"):
        os.environ["AUTORESEARCH_CACHE"] = str(Path(cache).resolve())
    return checks.Setup(ROOT, options, natural_number(os.environ.get("AUTORESEARCH_SEED", "42")))


# ----------------------------------------------------------------------------------------------------------------------
# Running


def run(options: argparse.Namespace, research: Research) -> int:
    """Start or resume a run and stay with it until a limit is reached; returns the exit code."""
    setup = settle_options(options)
    # from here on the GPU costs
    limits = Limits(options.experiments, options.hours, options.dollars, options.gpu_dollars_per_hour)
    show = Display(options.tag, ROOT / "runs" / options.tag, options.plain)
    checks.require(setup)
    ledger, machine = setup.ledger, setup.machine
    if options.agent is None:
        show(records.Chosen(setup.agent.name, tuple(PRESETS)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # gigabytes each
    if machine.uuid:  # by number, CUDA may mean another one than nvidia-smi does
        os.environ["CUDA_VISIBLE_DEVICES"] = machine.uuid
    with (
        lock(ledger.lock, f"the run {options.tag}", "its driver"),
        lock(lock_of_device(machine.uuid or "cpu"), machine.gpu or "the CPU", f"run {options.tag}"),
    ):
        ledger.reconcile()
        show(records.Preparing(options.arena))
        tree = AgentTree(setup.checkout, ledger.folder / "tree", ledger.folder / "index")
        tree.hand_out(ledger.base)  # whose prepare.py makes the arena
        arena = prepare_arena(tree.path, options.arena)
        limit = options.train_timeout or max(PACE.shortest_limit, 2 * arena.budget)
        if limit <= arena.budget:
            raise UserError(f"--train-timeout {limit:g} ends a run before its budget of {arena.budget:g} s", 2)
        checks.check_comparable(ledger, arena, machine, setup.seed)
        return work(
            Study(
                setup.checkout, ledger, machine=machine, idle=gpu.used(machine), agent=setup.agent,
                tree=tree, track=Track.of(arena, setup.seed, limit, setup.walls),
                agent_limit=options.agent_timeout,
                limits=limits, show=show, report=None if options.no_report else report.Refresher(ROOT, options.tag),
            ),
            research,
        )  # fmt: skip


def work(study: Study, research: Research) -> int:
    """Research, and leave everything in order, whatever ends it."""
    ledger = study.ledger
    code, ended = 1, "an error"
    try:
        study.show(
            records.Started(
                ledger.tag, ledger.branch, study.agent.name, study.track.arena, study.machine,
                tuple(ledger.experiments), study.agent_limit, study.track.isolation.missing,
            )
        )  # fmt: skip
        ended = research(study)
        code = 0
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:
        ended = checks.explain(error)
        raise
    finally:
        with uninterrupted():
            study.show(records.Stopped(ended, study.limits.done, ledger.best, study.limits.dollars_spent))
        if study.report and ledger.history:
            study.report.finish()
    return code


# ----------------------------------------------------------------------------------------------------------------------
# What a person asks about a run from outside: answered from git and from the disk


def status(options: argparse.Namespace, research: Research) -> int:
    tag, history = past(options.tag)
    folder = folder_of(tag)
    scene, holder = load(folder / NOW, tag, [e for _, e in history]), lock_owner(folder / LOCK)
    if options.json:
        print(json.dumps(facts(scene, folder, holder), indent=1))
    else:
        Console().print(standing(scene, folder, holder))
    return 0


def write_report(options: argparse.Namespace, research: Research) -> int:
    if options.results:
        report.draw(report.read_table(options.results), str(options.results), Path("progress.png"))
        print("progress.png")
        return 0
    tag, history = past(options.tag)
    for path in report.write_report(checks.open_checkout(ROOT), history, folder_of(tag)):
        print(path)
    return 0


def doctor(options: argparse.Namespace, research: Research) -> int:
    findings = list(checks.examine(settle_options(options)))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in findings:
        table.add_row(Text(finding.what), Text(finding.state, styles[finding.state]), Text(finding.said))
    Console().print(table)
    return int(any(finding.state == "fail" for finding in findings))


def show_prompt(options: argparse.Namespace, research: Research) -> int:
    tag, history = past(options.tag)
    if not history:
        raise UserError(f"{tag} has no baseline yet, which the prompt starts from")
    program = (ROOT / "program.md").read_text(encoding="utf-8", errors="replace")
    print(prompt.brief(program, [e for _, e in history]), end="")
    return 0


def past(tag: str | None) -> tuple[str, list[tuple[str, Experiment]]]:
    """A run and its (commit, experiment) as git holds them: of the one named, else of the one that was active last."""
    checkout = checks.open_checkout(ROOT)
    if tag is not None:
        checks.check_name(checkout, tag)
    history = read_history(checkout, tag or "*")
    active = {path.parent.name: path.stat().st_mtime for path in (ROOT / "runs").glob(f"{tag or '*'}/{NOW}")}
    for _, e in history:
        active[e.tag] = max(active.get(e.tag, 0.0), datetime.fromisoformat(e.finished).timestamp())
    if not active:
        others = sorted({e.tag for _, e in read_history(checkout)})
        there = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"no experiments yet under {REFS}/{tag or ''}{there}; `loop.py --demo` makes some")
    last = max(active, key=lambda name: active[name])
    mine = [entry for entry in history if entry[1].tag == last]
    if mine and not any(e.status == "keep" for _, e in mine):
        raise UserError(f"{last} has lost its baseline, {REFS}/{last}/0000")
    return last, mine


def folder_of(tag: str) -> Path:
    return ROOT / "runs" / tag


# Of each command: its function, what it does, its options
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Research], int], str, Callable[[Add], None]]] = {
    "run": (run, "start or resume a run, and stay with it until a limit is reached", run_options),
    "status": (status, "print where a run stands, while it runs and after", status_options),
    "report": (write_report, "write progress.png and report.html of a run", report_options),
    "doctor": (doctor, "check what a run with these options would need, and what of it is missing", run_options),
    "prompt": (show_prompt, "print what the agent would be told now", tag_option),
}


# ----------------------------------------------------------------------------------------------------------------------
# The process


def main(research: Research, argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where the shell closed it
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that knows only ASCII
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, interrupt)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        return COMMANDS[options.command][0](options, research)
    except KeyboardInterrupt:
        for signum in STOPS:  # Python takes our handlers away while it ends, and a second Ctrl-C would end it otherwise
            signal.signal(signum, signal.SIG_IGN)
        return 130
    except BrokenPipeError:  # of `loop.py prompt | head`
        return 0
    except Exception as error:
        if said := checks.explain(error):
            with suppress(OSError):  # a terminal that went away
                print(f"error: {said}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1
    finally:
        close_output()


def interrupt(signum: int, frame: object) -> NoReturn:
    """Leave by the same door as Ctrl-C: the running job stopped. A second signal must not break into that."""
    for other in STOPS:
        signal.signal(other, lambda *_: None)
    raise KeyboardInterrupt


def close_output() -> None:
    """Where the terminal went away, write the rest to nowhere, or Python would end with an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
