"""
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training decide.

    uv run loop.py --agent 'COMMAND'    today's run on this machine's GPU, started or resumed
    uv run loop.py --demo               any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status               where it stands; works while it runs and after

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `settle` records it, `decide`
judges it. Everything that happened is in git; kill this at any instant and start it again, and nothing is lost.
"""

import argparse
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NoReturn

from autoresearch import checks, prompt, records
from autoresearch.agents import Agent, AgentCall, ask, find_agent
from autoresearch.display import Plain, standing
from autoresearch.git import GitError, Repo
from autoresearch.ledger import PROGRAMS, REFS, Ledger, hold, holder, read_history
from autoresearch.process import sweep
from autoresearch.records import (
    EDITABLE,
    Crashed,
    Edit,
    Event,
    Experiment,
    Finished,
    Outcome,
    Rejected,
    Reply,
    Status,
    UserError,
)
from autoresearch.referee import review
from autoresearch.trial import check_syntax, find_machine, prepare_arena, run_training

ROOT = Path(__file__).resolve().parent
TIE = 0.0002  # val_bpb that a run repeats itself to
MODEL = "model.pt2"  # in an experiment's folder
REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row that changed nothing, before it is a person's matter


@dataclass(frozen=True)
class Lab:
    """Everything an experiment needs: where, with what, by whose hand, under which limits."""

    checkout: Repo  # the user's; read, never written
    ledger: Ledger
    arena: records.Arena
    machine: records.Machine
    agent: Agent
    seed: int
    train_limit: float
    agent_limit: float
    show: Callable[[Event], None]


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def research(lab: Lab, spent: Callable[[int], str | None]) -> str:
    """Run experiments until a budget is spent, and return which. The baseline comes first and is not counted."""
    if not lab.ledger.history:
        baseline(lab)
    done = stalls = 0
    while (budget := spent(done)) is None:
        settled = attempt(lab)
        done, stalls = (done + 1, 0) if settled else (done, stalls + 1)
        if stalls == STALLS:
            folder = lab.ledger.folder
            raise UserError(f"the agent {lab.agent.name!r} changed nothing {STALLS} times in a row; see {folder}")
    return budget


def baseline(lab: Lab) -> None:
    """Train what the user committed, as an empty commit: the first incumbent."""
    with experiment(lab) as (base, folder):
        commit = lab.ledger.worktree().commit("baseline\n", base)
        outcome = train(lab, base, commit, folder, "baseline")
        if not isinstance(outcome, Finished):
            why, log = records.reason(outcome), folder / "run.log"
            raise UserError(f"there is no baseline, since train.py does not run as it is: {why}; see {log}")
        settle(lab, base, commit, outcome, [Reply("baseline", "", 0.0)], 0, program(lab, base))


def attempt(lab: Lab) -> bool:
    """One experiment: an idea, its run, at most two repairs, the verdict. False when the agent changed nothing."""
    with experiment(lab) as (base, folder):
        history = [recorded for _, recorded in lab.ledger.history]
        taste = program(lab, base)
        edit = propose(lab, base, base, folder, prompt.brief(taste, lab.arena, history), turn=0)
        if not edit.fresh:
            why = edit.reply.error or f"no line of train.py is different: {edit.reply.description}"
            lab.show(records.Stalled(lab.ledger.next_number, why))
            return False
        replies, idea, repairs = [edit.reply], subject(edit.reply), 0
        outcome = run(lab, base, edit, folder, idea)
        while isinstance(outcome, Crashed) and repairs < REPAIRS:
            request = prompt.repair(taste, idea, outcome)
            mend = propose(lab, base, edit.commit, folder, request, turn=repairs + 1)
            replies.append(mend.reply)
            if not mend.fresh:
                break
            edit, repairs = mend, repairs + 1
            outcome = run(lab, base, edit, folder, idea)
        settle(lab, base, edit.commit, outcome, replies, repairs, taste)
    return True


@contextmanager
def experiment(lab: Lab) -> Iterator[tuple[str, Path]]:
    """Yield the commit that the next experiment starts from, with the worktree clean on it, and a folder of its own.

    Afterwards, come what may, the tree stands on the incumbent: the new one, if the experiment was kept. The marker
    tells the next start that a tip of the branch that it does not know was ours.
    """
    ledger = lab.ledger
    folder = ledger.folder / f"{ledger.next_number:04d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ledger.in_flight.touch()
    ledger.stand()
    try:
        yield ledger.base, folder
    finally:
        ledger.stand()
        ledger.in_flight.unlink()


def propose(lab: Lab, base: str, before: str, folder: Path, request: str, turn: int) -> Edit:
    """Call the agent once and see what it did to the tree since `base`, and to train.py since `before`."""
    ledger = lab.ledger
    lab.show(records.Asking(ledger.next_number, turn))
    facts = {"TAG": ledger.tag, "EXPERIMENT": folder.name, "ATTEMPT": str(turn), "SEED": str(lab.seed)}
    env = {f"AUTORESEARCH_{name}": value for name, value in facts.items()}
    call = AgentCall(ledger.worktree().tree, folder, turn, env, lab.agent_limit, mark=ledger.folder)
    reply = ask(lab.agent, request, call)
    tree = ledger.worktree()  # once more: the agent may have broken it
    paths = tuple(tree.changed(ledger.branch, base))
    commit = tree.commit(subject(reply) + "\n", base, (EDITABLE,))
    plain = (tree.tree / EDITABLE).is_file() and not (tree.tree / EDITABLE).is_symlink()
    fresh = tree.blob(commit, EDITABLE) != tree.blob(before, EDITABLE) or not plain or bool(set(paths) - {EDITABLE})
    return Edit(reply, paths, commit, fresh, plain)


def run(lab: Lab, base: str, edit: Edit, folder: Path, idea: str) -> Outcome:
    """Train an edit, unless it touched more than train.py."""
    if foreign := tuple(path for path in edit.paths if path != EDITABLE):
        return Rejected(foreign)
    if not edit.plain:
        return Crashed("train.py was removed, or is no longer a plain file", "", 0.0)
    return train(lab, base, edit.commit, folder, idea)


def train(lab: Lab, base: str, commit: str, folder: Path, idea: str) -> Outcome:
    """Train a commit in a tree that holds nothing else. What would be kept is scored by the referee first."""
    ledger = lab.ledger
    tree = ledger.worktree()
    tree.reset(ledger.branch, commit)
    if broken := check_syntax(tree.tree / EDITABLE):
        return broken
    lab.show(records.Training(ledger.next_number, idea))
    model, log = folder / MODEL, folder / "run.log"
    bar = math.inf if ledger.incumbent_bpb is None else ledger.incumbent_bpb + TIE
    limit, mark = lab.train_limit, ledger.folder
    ended = run_training(tree.tree, lab.arena, seed=lab.seed, bar=bar, model=model, limit=limit, log=log, mark=mark)
    altered = [path for path, _ in tree.altered(commit)]
    tree.reset(ledger.branch, commit)  # what the program left there was not the agent's doing
    if altered:
        return Crashed(f"changed files while it ran: {', '.join(altered)}", "", ended.seconds)
    if not isinstance(ended, Finished) or verdict(lab, base, commit, ended) != "keep":
        return ended
    lab.show(records.Refereeing(ledger.next_number, ended.summary.val_bpb))
    return review(tree.tree, lab.arena, ended, model=model, limit=limit, log=folder / "referee.log", mark=mark)


def verdict(lab: Lab, base: str, commit: str, outcome: Outcome) -> Status:
    added, removed = lab.checkout.lines_changed(base, commit, EDITABLE)
    best = lab.ledger.best
    return decide(outcome, added - removed, lab.ledger.incumbent_bpb, best.val_bpb if best else None)


def settle(lab: Lab, base: str, commit: str, outcome: Outcome, replies: list[Reply], repairs: int, taste: str) -> None:
    """Judge an experiment and record it for ever. Where the branch stands follows from the record."""
    ledger, machine = lab.ledger, lab.machine
    added, removed = lab.checkout.lines_changed(base, commit, EDITABLE)
    program_blob = lab.checkout.store(taste, PROGRAMS)
    with ledger.writing():
        recorded = Experiment(
            tag=ledger.tag, number=ledger.next_number, status=verdict(lab, base, commit, outcome),
            description=subject(replies[0]), reason=replies[0].reason, finished=ledger.now(), arena=lab.arena.name,
            data=lab.arena.data, seed=lab.seed, agent=lab.agent.name, torch=machine.torch, gpu=machine.gpu or None,
            driver=machine.driver or None, program=program_blob, added=added, removed=removed, repairs=repairs,
            agent_seconds=sum(reply.seconds for reply in replies), incumbent=ledger.incumbent_bpb,
            **records.facts_of(outcome),
        )  # fmt: skip
        final = ledger.record(recorded, base, commit)
    for model in ledger.folder.glob(f"*/{MODEL}"):  # large, and only the incumbent's is worth its room
        if (model.parent.name == f"{recorded.number:04d}") != (recorded.status == "keep"):
            model.unlink()
    lab.show(records.Settled(recorded, final))


def decide(outcome: Outcome, lines: int, incumbent: float | None, best_ever: float | None) -> Status:
    """Judge an experiment by its number alone. `lines` is the net change to train.py.

    Better than the incumbent by more than a tie is kept. A tie is kept only where it removes lines, and never more
    than a tie above the best ever kept, so that a row of ties cannot drift upwards. Without an incumbent: kept.
    """
    if not isinstance(outcome, Finished):
        return "crash"
    if incumbent is None or best_ever is None:
        return "keep"
    gain = round(incumbent - outcome.summary.val_bpb, 6)
    if gain > TIE:
        return "keep"
    above_best = round(outcome.summary.val_bpb - best_ever, 6)
    return "keep" if gain >= -TIE and lines < 0 and above_best <= TIE else "discard"


def subject(reply: Reply) -> str:
    return records.one_line(reply.description, 120) or "an edit that was not described"


def program(lab: Lab, base: str) -> str:
    """program.md as the user has it now, read afresh for every experiment; while an editor swaps it, as committed."""
    try:
        return (lab.checkout.tree / "program.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return lab.checkout.show(base, "program.md")


# ----------------------------------------------------------------------------------------------------------------------
# Starting, and starting again


def reconcile(checkout: Repo, ledger: Ledger, show: Callable[[Event], None]) -> None:
    """Make processes, branch, worktree and results.tsv agree with the refs. This is how a run resumes."""
    sweep(ledger.folder)
    tip = checkout.resolve(f"refs/heads/{ledger.branch}")
    expected = tip is None or checkout.contains(ledger.base, tip) or tip in {commit for commit, _ in ledger.history}
    if not expected and not ledger.in_flight.exists():
        raise UserError(
            f"the branch {ledger.branch} has commits that are no experiments: keep them with "
            f"`git branch mine {tip}`, then `git update-ref -d refs/heads/{ledger.branch}`"
        )
    ledger.stand()
    if tip and not expected:
        show(records.Dropped(tip))
    ledger.in_flight.unlink(missing_ok=True)
    ledger.rebuild()


def start(options: argparse.Namespace, show: Callable[[Event], None]) -> int:
    """Start or resume a run and stay with it until a budget is spent; returns the exit code."""
    agent, checkout = find_agent(options.agent), checks.open_checkout(ROOT)
    checks.check_tag(checkout, options.tag)
    seed = whole(os.environ.get("AUTORESEARCH_SEED", "42"))
    if cache := os.environ.get("AUTORESEARCH_CACHE"):
        os.environ["AUTORESEARCH_CACHE"] = str(Path(cache).resolve())  # the same from the worktree
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(options.gpu)
    machine = find_machine(options.arena)
    if not Ledger(checkout, options.tag).history:
        checks.check_committed(checkout)
    with hold(ROOT / "runs" / options.tag):
        ledger = Ledger(checkout, options.tag)
        reconcile(checkout, ledger, show)
        show(records.Preparing(options.arena))
        arena = prepare_arena(ledger.worktree().tree, options.arena)
        limit = options.train_timeout or max(120.0, 2 * arena.budget)
        if limit <= arena.budget:
            raise UserError(f"--train-timeout {limit:g} ends a run before its budget of {arena.budget:g} s", 2)
        checks.check_comparable(ledger, arena, machine, seed)
        lab = Lab(checkout, ledger, arena, machine, agent, seed, limit, options.agent_timeout, show)
        before = len(ledger.history)
        show(records.Started(options.tag, ledger.branch, agent.name, arena, machine, before, ledger.incumbent_bpb))
        code, began = 0, time.monotonic()
        try:
            ended = research(lab, lambda done: spent(options, done, time.monotonic() - began))
        except KeyboardInterrupt:
            code, ended = 130, "interrupted"
        show(records.Stopped(ended, len(ledger.history) - before, ledger.best))
    return code


def spent(options: argparse.Namespace, done: int, seconds: float) -> str | None:
    """Which budget is used up, if any; asked before each experiment."""
    if options.experiments is not None and done >= options.experiments:
        return f"{options.experiments} experiments done"
    if options.hours is not None and seconds >= options.hours * 3600:
        return f"{options.hours:g} hours are over"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def status(options: argparse.Namespace) -> int:
    """Print where a run stands, from what git holds: the one named, else the one that ran last."""
    checkout = checks.open_checkout(ROOT)
    history = read_history(checkout, options.tag or "*")
    if not history:
        running = holder(ROOT / "runs" / (options.tag or ""))
        why = f"; {running} is training the baseline" if running else ""
        raise UserError(f"no experiments yet under {REFS}/{options.tag or ''}{why}")
    last = max(history, key=lambda entry: entry[1].finished)[1]
    mine = [entry for entry in history if entry[1].tag == last.tag]
    print(standing(mine, holder(ROOT / "runs" / last.tag)))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").strip().splitlines()[0])
    today = date.today()
    today_tag = f"{today:%b}{today.day}".lower()
    add = parser.add_argument
    add("command", nargs="?", choices=["run", "status"], default="run", help="what to do (default: run)")
    add("--tag", help=f"name of the run and its branch (default: {today_tag})")
    add("--agent", help="random, or any shell command: prompt on standard input, idea on its last line of output")
    add("--arena", help="what to train on: climbmix, tinystories, python, demo or ./a/folder (default: climbmix)")
    add("--gpu", metavar="N", type=whole, help="which GPU (default: the first)")
    add("--experiments", metavar="N", type=whole, help="stop after so many, the baseline not counted")
    add("--hours", metavar="H", type=positive, help="start no experiment after so many hours")
    add(
        "--train-timeout",
        metavar="S",
        type=positive,
        help="hard limit of a run (default: twice the budget, at least 120)",
    )
    add("--agent-timeout", metavar="S", type=positive, default=900.0, help="hard limit of an agent call (default: 900)")
    add("--demo", action="store_true", help="demo arena, random agent, five experiments: any machine")
    options = parser.parse_args(argv)
    if options.command == "status":
        return options
    demo = {"tag": "demo", "agent": "random", "arena": "demo", "experiments": 5}
    usual = {"tag": today_tag, "arena": "climbmix"}
    for name, value in (demo if options.demo else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.agent is None:
        parser.error("--agent is missing: 'random', or a command such as 'claude -p'")
    if os.sep in options.arena:  # the same from the worktree
        options.arena = str(Path(options.arena).expanduser().resolve())
    if options.train_timeout is not None and options.train_timeout < 120:
        parser.error("--train-timeout must be at least 120 s")
    return options


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more", 2)


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def interrupt(signum: int, frame: object) -> NoReturn:
    """Leave by the same door as Ctrl-C: training stopped, tree put back."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that knows only ASCII
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, interrupt)
    try:
        options = parse(argv)
        return status(options) if options.command == "status" else start(options, Plain())
    except UserError as error:
        if str(error):
            print(f"error: {error}", file=sys.stderr)
        return error.code
    except (GitError, OSError, argparse.ArgumentTypeError) as error:
        print(f"error: {records.one_line(str(error), 500)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
