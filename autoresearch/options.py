"""The command line: what a person may ask for, and how a wrong argument is told."""

import argparse
import math
import os
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import NoReturn

from autoresearch.pace import PACE
from autoresearch.presets import PRESETS
from autoresearch.records import UserError

DEMO = {"tag": "demo", "agent": "random", "arena": "demo", "experiments": 5}


def parse(argv: list[str] | None, description: str, commands: Iterable[str]) -> argparse.Namespace:
    """Read a command line; UserError for a wrong one. The first of the commands is the default, and takes defaults."""
    today = date.today()
    usual = {"tag": f"{today:%b}{today.day}".lower(), "arena": "climbmix", "experiments": math.inf}
    first, *others = commands
    parser = Parser(description=description)
    add = parser.add_argument
    add("command", nargs="?", choices=[first, *others], default=first, help=f"what to do (default: {first})")
    add("--tag", help=f"name of the run and its branch (default: {usual['tag']})")
    add(
        "--agent",
        help=f"{', '.join(PRESETS)}, random, or any shell command: prompt on standard input, idea on its last line of "
        "output (default: the first that is installed)",
    )
    add("--model", metavar="NAME", help="which model the agent uses (default: its own)")
    add("--arena", help="what to train on: climbmix, tinystories, python, demo or ./a/folder (default: climbmix)")
    add("--gpu", metavar="N", type=whole, help="which GPU (default: the first)")
    add("--experiments", metavar="N", type=whole, help="stop after so many, the baseline not counted")
    add("--hours", metavar="H", type=positive, default=math.inf, help="start no experiment after so many hours")
    add(
        "--dollars",
        metavar="D",
        type=positive,
        default=math.inf,
        help="start no experiment after so many were spent on the agent, and on the GPU if its price is given",
    )
    add(
        "--gpu-dollars-per-hour",
        metavar="X",
        type=positive,
        default=0.0,
        help="what the GPU costs, from the start of this call to its end",
    )
    add(
        "--train-timeout",
        metavar="S",
        type=positive,
        help="hard limit of a run (default: twice the budget, at least 120)",
    )
    add("--agent-timeout", metavar="S", type=positive, default=900.0, help="hard limit of an agent call (default: 900)")
    add("--no-isolation", action="store_true", help="let train.py use the network and see the whole environment")
    add("--plain", action="store_true", help="a line for each event, as where there is no terminal")
    add("--no-report", action="store_true", help="do not refresh progress.png and report.html after each experiment")
    add("--results", metavar="FILE", type=Path, help="of report: draw this results.tsv, which may be upstream's")
    add("--json", action="store_true", help="of status, for scripts")
    add("--demo", action="store_true", help="demo arena, random agent, five experiments: any machine")
    options = parser.parse_args(argv)
    if options.command not in (first, "doctor"):  # which asks what the first would need
        return options
    for name, value in (usual | DEMO if options.demo else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if os.sep in options.arena:  # the same from the worktree
        options.arena = str(Path(options.arena).expanduser().resolve())
    if options.train_timeout is not None and options.train_timeout < PACE.shortest_limit:
        parser.error(f"--train-timeout must be at least {PACE.shortest_limit:g} s")
    return options


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more", 2)


def whole(text: str) -> int:
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
