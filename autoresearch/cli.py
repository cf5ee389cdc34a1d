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
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoresearch import audit, checks
from autoresearch.agents import AGENTS, prompt
from autoresearch.desk import Desk, read_program
from autoresearch.files import CODE, STOPS, UserError, lock, lock_of_device, uninterrupted
from autoresearch.jobs import dismiss_idle, gpu
from autoresearch.journal.experiment import Experiment
from autoresearch.journal.git import AgentTree
from autoresearch.journal.journal import FOLDER, REFS, TABLE, read_history, runs_of
from autoresearch.pace import PACE
from autoresearch.study import Limits, Study
from autoresearch.task import read_task
from autoresearch.view import events
from autoresearch.view.report import draw, read_table, write_report
from autoresearch.view.status import NOW, facts, load
from autoresearch.view.terminal import Display, standing

# Runs experiments until a limit is reached, and returns which
Research = Callable[[Study, Desk], str]

# --------------------------------------------------------------------------------------------------
# Commands and options

DESCRIPTION = """\
Research, overnight, by itself: an agent edits a file, git commits, a measurement decides.
Without a command: run, whose options `loop.py run --help` lists, --demo among them."""
DEMO = {"tag": "demo", "agent": "random", "arena": "demo", "experiments": 5}


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more", 2)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read a command line; UserError for a wrong one."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add = command.add_argument
        about = "the repository to work in (default: that of loop.py, or of the current folder)"
        add("-C", metavar="DIR", dest="root", type=Path, help=about)
        if name in ("run", "doctor", "audit"):
            add_run_options(command)
            command.set_defaults(**DEMO if "--demo" in argv else {})
        else:
            add("--tag", help="name of the run (default: the one that was active last)")
        if name == "audit":
            command.set_defaults(tag=None, agent="true", experiments=0, audit=3)
        if name == "status":
            add("--json", action="store_true", help="for scripts")
        if name == "report":
            about = "draw this results.tsv instead, which may be upstream's"
            add("--results", metavar="FILE", type=Path, help=about)
    if argv[:1] == ["-C"] and argv[2:3] and argv[2] in COMMANDS:
        argv = [argv[2], *argv[:2], *argv[3:]]
    if argv[:1] not in (["--help"], ["-h"]) and (not argv or argv[0].startswith("-")):
        argv = ["run", *argv]
    return parser.parse_args(argv)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    def limit(name: str, metavar: str, about: str, default: float | None = None) -> None:
        add(name, metavar=metavar, type=positive, default=default, help=about)

    def switch(name: str, about: str) -> None:
        add(name, action="store_true", help=about)

    shell = "any shell command: prompt on standard input, idea on its last line of output"
    add("--tag", default=today(), help="name of the run and its branch (default: %(default)s)")
    add("--agent", help=f"{', '.join(AGENTS)}, random, or {shell} (default: the first installed)")
    add("--model", metavar="NAME", help="which model the agent uses (default: its own)")
    about = "what the task works on, given to it as AUTORESEARCH_ARENA (default: its own)"
    add("--arena", default="", help=about)
    add("--gpu", metavar="N", type=natural_number, help="which GPU (default: the first)")
    about = "stop after so many, the baseline not counted"
    add("--experiments", metavar="N", type=natural_number, default=math.inf, help=about)
    add("--until", metavar="SCORE", type=float, help="stop when a score is this good")
    limit("--hours", "H", "start no experiment after so many hours", math.inf)
    about = "start no experiment after this call spent so many, on the agent and on a priced GPU"
    limit("--dollars", "D", about, math.inf)
    limit("--gpu-dollars-per-hour", "X", "the GPU's price, from the start of this call", 0.0)
    about = "limit of a run (default: twice its budget, at least 120; without a clock, the task's)"
    limit("--train-timeout", "S", about)
    about = "at the end, run baseline and best again so often, with new seeds"
    add("--audit", metavar="N", type=natural_number, default=0, help=about)
    limit("--agent-timeout", "S", "limit of an agent call (default: 900)", 900.0)
    switch("--no-isolation", "let runs use the network and see the whole environment")
    switch("--plain", "a line for each event, as where there is no terminal")
    switch("--no-report", "write no progress.png and report.html at the end")
    switch("--demo", "demo arena, random agent, five experiments: any machine")


def today() -> str:
    return f"{date.today():%b}{date.today().day}".lower()


def natural_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def settle_options(options: argparse.Namespace) -> checks.Setup:
    """Make options and environment mean the same to every job; UserError for a wrong one."""
    if os.sep in options.arena:  # the same from another folder
        options.arena = str(Path(options.arena).expanduser().resolve())
    least = PACE.shortest_limit
    if options.train_timeout is not None and options.train_timeout < least:
        raise UserError(f"--train-timeout must be at least {least:g} s; --help tells more", 2)
    if cache := os.environ.get("AUTORESEARCH_CACHE"):
        os.environ["AUTORESEARCH_CACHE"] = str(Path(cache).resolve())
    try:
        seed = natural_number(os.environ.get("AUTORESEARCH_SEED", "42"))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"AUTORESEARCH_SEED: {error}", 2) from None
    return checks.Setup(options.root, read_task(options.root), options, seed)


# --------------------------------------------------------------------------------------------------
# Running


def run(options: argparse.Namespace, research: Research) -> int:
    """Start or resume a run and stay with it until a limit is reached; returns the exit code."""
    setup = settle_options(options)
    rate = options.gpu_dollars_per_hour  # counts from here
    limits = Limits(options.experiments, options.hours, options.dollars, options.until, rate)
    checks.require(setup)
    journal, machine = setup.journal, setup.machine
    if setup.root != CODE:
        setup.checkout.hide(f"/{FOLDER}/", f"/{TABLE}*")
    show = Display(options.tag, journal.folder, options.plain)
    if options.agent is None:
        first = f"agent {setup.agent.name}, the first installed of {', '.join(AGENTS)}"
        show(events.Note(f"{first}; --agent takes another"))
    core = resource.RLIMIT_CORE  # dumps of gigabytes each
    resource.setrlimit(core, (0, resource.getrlimit(core)[1]))
    if machine.uuid:  # by number, CUDA may mean another one than nvidia-smi does
        os.environ["CUDA_VISIBLE_DEVICES"] = machine.uuid
    device = lock_of_device(machine.uuid or "cpu")
    with (
        lock(journal.lock, f"the run {options.tag}", "its driver"),
        lock(device, machine.gpu or "the CPU", f"run {options.tag}"),
    ):
        journal.reconcile()
        code = work(setup, limits, show, research)
    if journal.experiments and not options.no_report:
        try:
            paths = write_report(setup.checkout, setup.task, journal.experiments, journal.folder)
            print(*paths, sep="\n")
        except Exception as error:  # the research was done
            print(f"no report: {checks.explain(error)}", file=sys.stderr)
    return code


def work(setup: checks.Setup, limits: Limits, show: Display, research: Research) -> int:
    """Prepare the arena, research, and leave everything in order, whatever ends it."""
    journal = setup.journal
    code, ended = 0, "an error"
    try:
        study = make_study(setup, limits, show)
        show(
            events.Started(
                journal.tag,
                study.agent.name,
                study.conditions.arena,
                study.machine,
                tuple(journal.experiments),
                study.agent_limit,
                study.conditions.sandbox.missing,
                study.task.network,
                bool(study.conditions.sandbox.prefix),
            )
        )
        desk = Desk(study)
        ended = research(study, desk)
        if setup.options.audit:
            ended = f"{ended}; {audit.audit(study, desk, setup.options.audit)}"
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:
        ended = checks.explain(error) or "setup failed"
        raise
    finally:
        with uninterrupted():
            show(events.Stopped(ended, limits.experiments_done, journal.best, limits.dollars_spent))
    return code


def make_study(setup: checks.Setup, limits: Limits, show: Display) -> Study:
    """Make the arena ready; UserError where the run went on under other conditions."""
    task, options, journal, machine = setup.task, setup.options, setup.journal, setup.machine
    show(events.Preparing(options.arena))
    tree = AgentTree(setup.checkout, journal.folder / "tree")
    # what the person committed, since `setup` has the person's rights
    first = f"{journal.experiments[0].commit}^" if journal.experiments else "HEAD"
    start = setup.checkout.resolve(first) or journal.base
    arena = setup.prepare(tree, start)
    checks.check_comparable(journal, arena, machine, setup.seed)
    return Study(
        task=task,
        checkout=setup.checkout,
        journal=journal,
        tree=tree,
        conditions=setup.conditions(start, arena),
        machine=machine,
        idle=gpu.memory(machine, "used"),
        agent=setup.agent,
        agent_limit=options.agent_timeout,
        limits=limits,
        prepare=partial(setup.prepare, tree, start, quietly=True),
        show=show,
    )


# --------------------------------------------------------------------------------------------------
# Questions about a run, answered from git and from the disk


def run_audit(options: argparse.Namespace, research: Research) -> int:
    options.tag, history = past(options)
    options.arena = options.arena or (history[0].arena.name if history else "")
    return run(options, research)


def status(options: argparse.Namespace, research: Research) -> None:
    tag, history = past(options)
    folder = runs_of(options.root) / tag
    now = load(folder / NOW, tag, history)
    if options.json:
        print(json.dumps(facts(now, folder), indent=1, default=str))
    else:
        Console().print(standing(now, folder))


def report(options: argparse.Namespace, research: Research) -> None:
    task = read_task(options.root)
    if options.results:
        points = read_table(options.results)
        draw(points, str(options.results), Path("progress.png"), task.metric, task.higher)
        print("progress.png")
        return
    tag, history = past(options)
    checkout = checks.open_checkout(options.root)
    print(*write_report(checkout, task, history, runs_of(options.root) / tag), sep="\n")


def doctor(options: argparse.Namespace, research: Research) -> int:
    findings = list(checks.examine(settle_options(options)))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for what, state, said in findings:
        table.add_row(what, Text(state, styles[state]), Text(said))
    Console().print(table)
    return int(any(state == "fail" for _, state, _ in findings))


def show_prompt(options: argparse.Namespace, research: Research) -> None:
    tag, history = past(options)
    if not history:
        raise UserError(f"{tag} has no baseline yet, which the prompt starts from")
    program = read_program(checks.open_checkout(options.root), "HEAD")
    print(prompt.brief(read_task(options.root), program, history), end="")


def past(options: argparse.Namespace) -> tuple[str, list[Experiment]]:
    """A run and its history as git holds it: the one named, or the one that was active last."""
    tag, checkout = options.tag, checks.open_checkout(options.root)
    if tag is not None:
        checks.check_name(checkout, tag)
    history = read_history(checkout, tag or "*")
    active = {e.tag: datetime.fromisoformat(e.finished).timestamp() for e in history}
    seen = runs_of(options.root).glob(f"{tag or '*'}/{NOW}")  # written at each event
    active |= {path.parent.name: path.stat().st_mtime for path in seen}
    if not active:
        others = ", ".join(sorted({e.tag for e in read_history(checkout)}))
        there = f"no experiments yet under {REFS}/{tag or ''}{others and f'; there are {others}'}"
        cure = "; `uv run loop.py --demo` makes some" if options.root == CODE else ""
        raise UserError(there + cure)
    last = max(active, key=lambda name: active[name])
    mine = [e for e in history if e.tag == last]
    if mine and not any(e.verdict == "keep" for e in mine):
        raise UserError(f"{last} has lost its baseline, {REFS}/{last}/0000")
    return last, mine


# Of each command: its function, which returns an exit code or nothing, its description
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, Research], int | None], str]] = {
    "run": (run, "start or resume a run, and stay with it until a limit is reached"),
    "status": (status, "print where a run stands, while it runs and after"),
    "audit": (run_audit, "run baseline and best again, with new seeds, and say what the gain is"),
    "report": (report, "write progress.png and report.html of a run"),
    "doctor": (doctor, "check all that a run with these options needs"),
    "prompt": (show_prompt, "print the agent's next prompt"),
}


# --------------------------------------------------------------------------------------------------
# The process


def main(research: Research, argv: list[str] | None = None, root: Path | None = None) -> int:
    """`root`: the repository to work in without -C; by default that of the current folder."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where the shell closed it
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, interrupt)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        options.root = root if root and not options.root else checks.top_of(options.root or Path())
        return COMMANDS[options.command][0](options, research) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `loop.py prompt | head`
        return 0
    except Exception as error:
        if said := checks.explain(error):
            with suppress(OSError):  # the terminal may be gone
                print(f"error: {said}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1
    finally:
        dismiss_idle()
        for signum in STOPS:  # Python drops our handlers as it ends: a late Ctrl-C would kill it
            signal.signal(signum, signal.SIG_IGN)
        close_output()


def interrupt(signum: int, frame: object) -> NoReturn:
    """Leave by the same door as Ctrl-C, the running job stopped. A second signal is too late."""
    for other in STOPS:
        signal.signal(other, lambda *_: None)
    raise KeyboardInterrupt


def close_output() -> None:
    """Without a terminal, write the rest to nowhere, or Python would end with an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
