"""
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training decide.

    uv run loop.py                      today's run on this machine's GPU, started or resumed
    uv run loop.py --demo               any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status               where it stands; works while it runs and after
    uv run loop.py prompt               what the agent is told

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `settle` records it, `decide`
judges it. Everything that happened is in git; kill this at any instant and start it again, and nothing is lost.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import NoReturn

from autoresearch import checks, prompt, records, source
from autoresearch.agents import AgentCall, ask, find_agent, spent_on
from autoresearch.display import Plain, standing
from autoresearch.git import GitError, Repo
from autoresearch.ledger import PROGRAMS, REFS, Ledger, hold, holder, read_history
from autoresearch.presets import PRESETS, Agent
from autoresearch.process import sweep
from autoresearch.records import (
    EDITABLE,
    TIE,
    Busy,
    Crashed,
    Edit,
    Event,
    Experiment,
    Failed,
    Finished,
    Hopeless,
    Outcome,
    Rejected,
    Reply,
    Status,
    Trouble,
    Usage,
    UserError,
)
from autoresearch.referee import review
from autoresearch.trial import check_syntax, find_machine, prepare_arena, run_training

ROOT = Path(__file__).resolve().parent
MODEL = "model.pt2"  # in an experiment's folder
REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row that brought nothing, before it is a person's matter
BACKOFF, MAX_BACKOFF = 60.0, 1800.0  # seconds to wait for an agent that is busy, doubled each time


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
    deadline: float  # of the monotonic clock: when no experiment is started, and nothing waited for, any more
    show: Callable[[Event], None]


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def research(lab: Lab, spent: Callable[[int], str | None]) -> str:
    """Run experiments until a budget is spent, and return which. The baseline comes first and is not counted."""
    if not lab.ledger.history:
        baseline(lab)
    done = stalls = pauses = 0
    told = ""  # what the agent has to hear of its last call
    while (budget := spent(done)) is None:
        match attempt(lab, told):
            case None:
                done, stalls, pauses, told = done + 1, 0, 0, ""
            case Busy() as busy:
                pauses += 1
                pause(lab, busy, pauses)
            case Failed(why):
                stalls, told = stalls + 1, why
                lab.show(records.Stalled(lab.ledger.next_number, why))
                if stalls == STALLS:
                    raise UserError(f"{lab.agent.name} brought nothing {STALLS} times in a row: {why}")
            case Hopeless(why):
                raise UserError(f"{lab.agent.name}: {why}")
    return budget


def baseline(lab: Lab) -> None:
    """Train what the user committed, as an empty commit: the first incumbent."""
    with experiment(lab) as (base, folder):
        commit = lab.ledger.worktree().commit("baseline\n", base)
        outcome = train(lab, base, commit, folder, "baseline")
        if not isinstance(outcome, Finished):
            why, log = records.reason(outcome), folder / "run.log"
            raise UserError(f"there is no baseline, since train.py does not run as it is: {why}; see {log}")
        settle(lab, base, commit, outcome, Reply("baseline", "", Usage(0.0)), 0, folder, program(lab, base))


def attempt(lab: Lab, told: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there was none."""
    with experiment(lab) as (base, folder):
        taste = program(lab, base)
        edit = propose(lab, base, base, folder, prompt.brief(taste, lab.ledger.experiments, told), turn=0)
        if edit.repeats and isinstance(unusable(edit), Failed):
            told = prompt.repeated(edit.repeats)
            lab.show(records.Repeated(lab.ledger.next_number, edit.repeats))
            edit = propose(lab, base, base, folder, prompt.brief(taste, lab.ledger.experiments, told), turn=0)
        if trouble := unusable(edit):
            return trouble
        idea, repairs, pauses = edit.reply, 0, 0
        outcome = run(lab, base, edit, folder, subject(idea))
        while isinstance(outcome, Crashed) and repairs < REPAIRS:
            request = prompt.repair(taste, lab.ledger.next_number, subject(idea), outcome)
            mend = propose(lab, base, edit.commit, folder, request, turn=repairs + 1)
            trouble = unusable(mend)
            if isinstance(trouble, Busy) and time.monotonic() < lab.deadline:
                pauses += 1
                pause(lab, trouble, pauses)
            elif trouble:
                break
            else:
                edit, repairs = mend, repairs + 1
                outcome = run(lab, base, edit, folder, subject(idea))
        settle(lab, base, edit.commit, outcome, idea, repairs, folder, taste)
    return None


@contextmanager
def experiment(lab: Lab) -> Iterator[tuple[str, Path]]:
    """Yield the commit that the next experiment starts from, with the worktree clean on it, and a folder of its own.

    Afterwards, come what may, the tree stands on the incumbent: the new one, if the experiment was kept. The marker
    tells the next start that a tip of the branch that it does not know was ours.
    """
    ledger = lab.ledger
    folder = ledger.folder / f"{ledger.next_number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
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
    ledger.worktree().reset(ledger.branch, before)
    lab.show(records.Asking(ledger.next_number, turn))
    facts = {"TAG": ledger.tag, "EXPERIMENT": folder.name, "ATTEMPT": str(turn), "SEED": str(lab.seed)}
    env = {f"AUTORESEARCH_{name}": value for name, value in facts.items()}
    call = AgentCall(ledger.worktree().tree, base, folder, env, lab.agent_limit, mark=ledger.folder)
    reply = ask(lab.agent, request, call)
    tree = ledger.worktree()  # once more: the agent may have broken it
    paths = tuple(tree.changed(ledger.branch, base))
    commit = tree.commit(subject(reply) + "\n", base, (EDITABLE,))
    plain = (tree.tree / EDITABLE).is_file() and not (tree.tree / EDITABLE).is_symlink()
    only = plain and not set(paths) - {EDITABLE}
    fresh = tree.blob(commit, EDITABLE) != tree.blob(before, EDITABLE) or not only
    known = ledger.tried.get(source.fingerprint(tree.show(commit, EDITABLE)) or "") if fresh and only else None
    return Edit(reply, paths, commit, fresh, plain, known)


def unusable(edit: Edit) -> Trouble | None:
    """Why an edit is not worth a run. One that came with a failure is, unless the agent says that it broke off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, Hopeless | Busy):
        return edit.reply.trouble
    if not edit.fresh:
        return edit.reply.trouble or Failed(f"no line of train.py is different: {edit.reply.description}")
    return Failed(prompt.repeated(edit.repeats)) if edit.repeats else None


def pause(lab: Lab, busy: Busy, count: int) -> None:
    """Wait until the time that the agent named, at least longer each time, but not beyond the deadline."""
    in_a_while = datetime.now().astimezone() + timedelta(seconds=min(BACKOFF * 2 ** (count - 1), MAX_BACKOFF))
    until = max(busy.until or in_a_while, in_a_while)
    lab.show(records.Waiting(busy.why, until))
    while (left := (until - datetime.now().astimezone()).total_seconds()) > 0 and time.monotonic() < lab.deadline:
        time.sleep(min(left, 1.0))  # by the time of day, which goes on while the machine sleeps


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


def settle(
    lab: Lab, base: str, commit: str, outcome: Outcome, idea: Reply, repairs: int, folder: Path, taste: str
) -> None:
    """Judge an experiment and record it for ever. Where the branch stands follows from the record."""
    ledger, machine = lab.ledger, lab.machine
    added, removed = lab.checkout.lines_changed(base, commit, EDITABLE)
    before, after = (lab.checkout.show(name, EDITABLE) for name in (base, commit))
    changes = source.changes(before, after)
    program_blob = lab.checkout.store(taste, PROGRAMS)
    with ledger.writing():
        recorded = Experiment(
            tag=ledger.tag, number=ledger.next_number, status=verdict(lab, base, commit, outcome),
            description=subject(idea, changes), reason=idea.reason, finished=ledger.now(), seed=lab.seed,
            arena=lab.arena.name, budget=lab.arena.budget, data=lab.arena.data, agent=lab.agent.name,
            torch=machine.torch, gpu=machine.gpu or None, driver=machine.driver or None, program=program_blob,
            added=added, removed=removed, repairs=repairs, incumbent=ledger.incumbent_bpb, changes=changes,
            source=None if isinstance(outcome, Rejected) else source.fingerprint(after),
            **records.costs_of(spent_on(folder, base)), **records.facts_of(outcome),
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


def subject(reply: Reply, changes: str | None = None) -> str:
    silent = f"not described: {changes}" if changes else "an edit that was not described"
    return records.one_line(reply.description or silent, 120)


def program(lab: Lab, base: str) -> str:
    """program.md as the user has it now, read afresh for every experiment; while an editor swaps it, as committed."""
    try:
        return (lab.checkout.tree / "program.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return lab.checkout.show(base, "program.md").decode(errors="replace")


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
    agent, checkout = find_agent(options.agent, options.model), checks.open_checkout(ROOT)
    if options.agent is None:
        show(records.Chosen(agent.name, tuple(PRESETS)))
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
        deadline = time.monotonic() + (options.hours or math.inf) * 3600
        lab = Lab(checkout, ledger, arena, machine, agent, seed, limit, options.agent_timeout, deadline, show)
        before = len(ledger.history)
        show(records.Started(options.tag, ledger.branch, agent.name, arena, machine, before, ledger.incumbent_bpb))
        code = 0
        try:
            ended = research(lab, lambda done: spent(options, done, deadline))
        except KeyboardInterrupt:
            code, ended = 130, "interrupted"
        show(records.Stopped(ended, len(ledger.history) - before, ledger.best))
    return code


def spent(options: argparse.Namespace, done: int, deadline: float) -> str | None:
    """Which budget is used up, if any; asked before each experiment."""
    if options.experiments is not None and done >= options.experiments:
        return f"{options.experiments} experiments done"
    if time.monotonic() >= deadline:
        return f"{options.hours:g} hours are over"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def status(options: argparse.Namespace) -> int:
    """Print where a run stands."""
    experiments = past(options.tag)
    print(standing(experiments, holder(ROOT / "runs" / experiments[0].tag)))
    return 0


def show_prompt(options: argparse.Namespace) -> int:
    """Print what the agent would be told now."""
    taste = (ROOT / "program.md").read_text(encoding="utf-8", errors="replace")
    print(prompt.brief(taste, past(options.tag)), end="")
    return 0


def past(tag: str | None) -> list[Experiment]:
    """The experiments of a run as git holds them: of the one named, else of the one that ran last."""
    experiments = [experiment for _, experiment in read_history(checks.open_checkout(ROOT), tag or "*")]
    if not experiments:
        running = holder(ROOT / "runs" / (tag or ""))
        why = f"; {running} is training the baseline" if running else ""
        raise UserError(f"no experiments yet under {REFS}/{tag or ''}{why}")
    last = max(experiments, key=lambda e: e.finished)
    mine = [experiment for experiment in experiments if experiment.tag == last.tag]
    if not any(e.status == "keep" for e in mine):
        raise UserError(f"{last.tag} has lost its baseline, {REFS}/{last.tag}/0000")
    return mine


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=(__doc__ or "").strip().splitlines()[0])
    today = date.today()
    today_tag = f"{today:%b}{today.day}".lower()
    add = parser.add_argument
    add("command", nargs="?", choices=["run", *READ_ONLY], default="run", help="what to do (default: run)")
    add("--tag", help=f"name of the run and its branch (default: {today_tag})")
    add(
        "--agent",
        help=f"{', '.join(PRESETS)}, random, or any shell command: prompt on standard input, idea on its last line of "
        "output (default: the first that is installed)",
    )
    add("--model", metavar="NAME", help="which model the agent uses (default: its own)")
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
    if options.command in READ_ONLY:
        return options
    demo = {"tag": "demo", "agent": "random", "arena": "demo", "experiments": 5}
    usual = {"tag": today_tag, "arena": "climbmix"}
    for name, value in (demo if options.demo else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if os.sep in options.arena:  # the same from the worktree
        options.arena = str(Path(options.arena).expanduser().resolve())
    if options.train_timeout is not None and options.train_timeout < 120:
        parser.error("--train-timeout must be at least 120 s")
    return options


READ_ONLY = {"status": status, "prompt": show_prompt}  # also while another process runs


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
        return READ_ONLY[options.command](options) if options.command in READ_ONLY else start(options, Plain())
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
