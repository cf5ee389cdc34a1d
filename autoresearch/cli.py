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

from autoresearch import checks
from autoresearch.agents import AGENTS, ROOT, prompt
from autoresearch.files import STOPS, UserError, lock, lock_of_device, lock_owner, uninterrupted
from autoresearch.jobs import gpu
from autoresearch.jobs.job import Conditions
from autoresearch.journal.git import AgentTree
from autoresearch.journal.journal import LOCK, REFS, History, read_history
from autoresearch.pace import PACE
from autoresearch.study import Limits, Study
from autoresearch.task import prepare_arena
from autoresearch.view import events
from autoresearch.view.status import NOW, facts, load
from autoresearch.view.terminal import Display, standing

Research = Callable[[Study], str]  # runs experiments until a limit is reached, and returns which
Add = Callable[..., Any]  # an ArgumentParser's add_argument

# --------------------------------------------------------------------------------------------------
# Commands and options

DESCRIPTION = """\
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training
decide. Without a command: run, whose options `loop.py run --help` lists, --demo among them."""
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
    for name, (_, about, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        add_options(command.add_argument)
    if argv[:1] not in (["--help"], ["-h"]) and (not argv or argv[0].startswith("-")):
        argv = ["run", *argv]
    return parser.parse_args(argv)


def run_options(add: Add) -> None:
    def limit(name: str, metavar: str, about: str, default: float | None = None) -> None:
        add(name, metavar=metavar, type=positive, default=default, help=about)

    def switch(name: str, about: str) -> None:
        add(name, action="store_true", help=about)

    shell = "any shell command: prompt on standard input, idea on its last line of output"
    arenas = "climbmix, tinystories, python, demo or ./a/folder"
    add("--tag", help=f"name of the run and its branch (default: {today()})")
    add("--agent", help=f"{', '.join(AGENTS)}, random, or {shell} (default: the first installed)")
    add("--model", metavar="NAME", help="which model the agent uses (default: its own)")
    add("--arena", help=f"what to train on: {arenas} (default: climbmix)")
    add("--gpu", metavar="N", type=natural_number, help="which GPU (default: the first)")
    about = "stop after so many, the baseline not counted"
    add("--experiments", metavar="N", type=natural_number, help=about)
    limit("--hours", "H", "start no experiment after so many hours", math.inf)
    about = "start no experiment after this call spent so many, on the agent and on a priced GPU"
    limit("--dollars", "D", about, math.inf)
    limit("--gpu-dollars-per-hour", "X", "the GPU's price, from the start of this call", 0.0)
    limit("--train-timeout", "S", "limit of a run (default: twice the budget, at least 120)")
    limit("--agent-timeout", "S", "limit of an agent call (default: 900)", 900.0)
    switch("--no-isolation", "let train.py use the network and see the whole environment")
    switch("--plain", "a line for each event, as where there is no terminal")
    switch("--no-report", "write no progress.png and report.html at the end")
    switch("--demo", "demo arena, random agent, five experiments: any machine")


def tag_option(add: Add) -> None:
    add("--tag", help="name of the run (default: the one that was active last)")


def status_options(add: Add) -> None:
    tag_option(add)
    add("--json", action="store_true", help="for scripts")


def report_options(add: Add) -> None:
    tag_option(add)
    about = "draw this results.tsv instead, which may be upstream's"
    add("--results", metavar="FILE", type=Path, help=about)


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
    """Fill in the defaults, in the options and in the environment of all jobs."""
    usual = {"tag": today(), "arena": "climbmix", "experiments": math.inf}
    for name, value in (usual | DEMO if options.demo else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
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
    return checks.Setup(ROOT, options, seed)


# --------------------------------------------------------------------------------------------------
# Running


def run(options: argparse.Namespace, research: Research) -> int:
    """Start or resume a run and stay with it until a limit is reached; returns the exit code."""
    setup = settle_options(options)
    rate = options.gpu_dollars_per_hour  # counts from here
    limits = Limits(options.experiments, options.hours, options.dollars, rate)
    show = Display(options.tag, ROOT / "runs" / options.tag, options.plain)
    checks.require(setup)
    journal, machine = setup.journal, setup.machine
    if options.agent is None:
        show(events.Chosen(setup.agent.name, tuple(AGENTS)))
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
    if journal.history and not options.no_report:
        options.results = None
        try:
            write_report(options, research)
        except Exception as error:  # the research was done
            print(f"no report: {checks.explain(error)}", file=sys.stderr)
    return code


def work(setup: checks.Setup, limits: Limits, show: Display, research: Research) -> int:
    """Prepare the arena, research, and leave everything in order, whatever ends it."""
    journal = setup.journal
    code, ended = 1, "an error"
    try:
        study = make_study(setup, limits, show)
        show(
            events.Started(
                journal.tag,
                journal.branch,
                study.agent.name,
                study.conditions.arena,
                study.machine,
                tuple(journal.experiments),
                study.agent_limit,
                study.conditions.sandbox.missing,
            )
        )
        ended = research(study)
        code = 0
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:
        ended = checks.explain(error)
        raise
    finally:
        with uninterrupted():
            show(events.Stopped(ended, limits.done, journal.best, limits.dollars_spent))
    return code


def make_study(setup: checks.Setup, limits: Limits, show: Display) -> Study:
    """Make the arena ready; UserError where the run went on under other conditions."""
    options, journal, machine = setup.options, setup.journal, setup.machine
    show(events.Preparing(options.arena))
    tree = AgentTree(setup.checkout, journal.folder / "tree", journal.folder / "index")
    tree.hand_out(journal.base)  # with the prepare.py that makes the arena
    try:
        arena = prepare_arena(tree.path, options.arena)
    finally:
        tree.discard()
    limit = options.train_timeout or max(PACE.shortest_limit, 2 * arena.budget)
    if limit <= arena.budget:
        short = f"--train-timeout {limit:g} ends a run before its budget"
        raise UserError(f"{short} of {arena.budget:g} s", 2)
    checks.check_comparable(journal, arena, machine, setup.seed)
    return Study(
        checkout=setup.checkout,
        journal=journal,
        tree=tree,
        conditions=Conditions.of(arena, setup.seed, limit, setup.sandbox),
        machine=machine,
        idle=gpu.used(machine),
        agent=setup.agent,
        agent_limit=options.agent_timeout,
        limits=limits,
        show=show,
    )


# --------------------------------------------------------------------------------------------------
# Questions about a run, answered from git and from the disk


def status(options: argparse.Namespace, research: Research) -> int:
    tag, history = past(options.tag)
    folder = folder_of(tag)
    now, owner = load(folder / NOW, tag, [e for _, e in history]), lock_owner(folder / LOCK)
    if options.json:
        print(json.dumps(facts(now, folder, owner), indent=1, default=str))
    else:
        Console().print(standing(now, folder, owner))
    return 0


def write_report(options: argparse.Namespace, research: Research) -> int:
    from autoresearch.view import report  # matplotlib takes half a second

    if options.results:
        picture = Path("progress.png")
        report.draw(report.read_table(options.results), str(options.results), picture)
        print(picture)
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
        state = Text(finding.state, styles[finding.state])
        table.add_row(Text(finding.what), state, Text(finding.said))
    Console().print(table)
    return int(any(finding.state == "fail" for finding in findings))


def show_prompt(options: argparse.Namespace, research: Research) -> int:
    tag, history = past(options.tag)
    if not history:
        raise UserError(f"{tag} has no baseline yet, which the prompt starts from")
    program = (ROOT / "program.md").read_text(encoding="utf-8", errors="replace")
    print(prompt.brief(program, [e for _, e in history]), end="")
    return 0


def past(tag: str | None) -> tuple[str, History]:
    """A run and its history as git holds it: the one named, or the one that was active last."""
    checkout = checks.open_checkout(ROOT)
    if tag is not None:
        checks.check_name(checkout, tag)
    history = read_history(checkout, tag or "*")
    active = {e.tag: datetime.fromisoformat(e.finished).timestamp() for _, e in history}
    for path in (ROOT / "runs").glob(f"{tag or '*'}/{NOW}"):
        name = path.parent.name
        active[name] = max(active.get(name, 0.0), path.stat().st_mtime)
    if not active:
        others = ", ".join(sorted({e.tag for _, e in read_history(checkout)}))
        there = f"no experiments yet under {REFS}/{tag or ''}{others and f'; there are {others}'}"
        raise UserError(f"{there}; `loop.py --demo` makes some")
    last = max(active, key=lambda name: active[name])
    mine = [entry for entry in history if entry[1].tag == last]
    if mine and not any(e.verdict == "keep" for _, e in mine):
        raise UserError(f"{last} has lost its baseline, {REFS}/{last}/0000")
    return last, mine


def folder_of(tag: str) -> Path:
    return ROOT / "runs" / tag


# Of each command: its function, its description, its options
Command = tuple[Callable[[argparse.Namespace, Research], int], str, Callable[[Add], None]]
COMMANDS: dict[str, Command] = {
    "run": (run, "start or resume a run, and stay with it until a limit is reached", run_options),
    "status": (status, "print where a run stands, while it runs and after", status_options),
    "report": (write_report, "write progress.png and report.html of a run", report_options),
    "doctor": (doctor, "check all that a run with these options needs", run_options),
    "prompt": (show_prompt, "print the agent's next prompt", tag_option),
}


# --------------------------------------------------------------------------------------------------
# The process


def main(research: Research, argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as where the shell closed it
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # an ASCII terminal
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, interrupt)
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        return COMMANDS[options.command][0](options, research)
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
        for signum in STOPS:  # Python drops our handlers as it ends: a late Ctrl-C would kill it
            signal.signal(signum, signal.SIG_IGN)
        close_output()


def interrupt(signum: int, frame: object) -> NoReturn:
    """Leave by the same door as Ctrl-C, the running job stopped. A second signal is too late."""
    for other in STOPS:
        signal.signal(other, lambda *_: None)
    raise KeyboardInterrupt


def close_output() -> None:
    """Without a terminal, write the rest to nowhere, or Python would end with an error of its
    own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
