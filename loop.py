"""
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training decide.

    uv run loop.py                      today's run on this machine's GPU, started or resumed
    uv run loop.py --demo               any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status               where it stands; works while it runs and after
    uv run loop.py report               progress.png and report.html
    uv run loop.py doctor               what a run here would need, and what of it is missing
    uv run loop.py prompt               what the agent is told

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `settle` records it, `decide`
judges it. Everything that happened is in git; kill this at any instant and start it again, and nothing is lost.
"""

import argparse
import math
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn

from autoresearch import checks, commands, gpu, isolation, locks, prompt, records, report, source
from autoresearch.agents import AgentCall, ask, find_agent, spent_on
from autoresearch.display import Display, count
from autoresearch.git import GitError, Repo, size_of
from autoresearch.ledger import PROGRAMS, Ledger
from autoresearch.options import parse, whole
from autoresearch.pace import PACE
from autoresearch.presets import PRESETS, Agent
from autoresearch.process import STOPS, clock, sweep, uninterrupted
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
from autoresearch.trial import Track, check_syntax, prepare_arena, run_training

ROOT = Path(__file__).resolve().parent
MODEL, CLOCKS = "model.pt2", "gpu.csv"  # in an experiment's folder
MAX_PROGRAM = 1_000_000  # bytes of train.py
REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row that brought nothing, before there is a pause


@dataclass
class Budget:
    """What this call of the driver may use, and what it has used."""

    experiments: float = math.inf
    hours: float = math.inf
    dollars: float = math.inf
    gpu_rate: float = 0.0  # dollars an hour, from the start to the end
    done: int = 0  # experiments, the baseline not counted
    paid: float = 0.0  # dollars, for the agent
    start: float = field(default_factory=clock)

    @property
    def hours_spent(self) -> float:
        return (clock() - self.start) / 3600

    @property
    def dollars_spent(self) -> float:
        return self.paid + self.gpu_rate * self.hours_spent

    def spent(self) -> str | None:
        """Which limit is reached, if any; asked before each experiment, and while something is waited for."""
        if self.done >= self.experiments:
            return f"{count(self.done)} done"
        if self.hours_spent >= self.hours:
            return f"{self.hours:g} hours are over"
        over = self.dollars_spent >= self.dollars
        return f"${self.dollars_spent:.2f} of ${self.dollars:g} are spent" if over else None


@dataclass(frozen=True)
class Lab:
    """Everything an experiment needs: where, with what, by whose hand, under which limits."""

    checkout: Repo  # the user's; read, never written
    ledger: Ledger
    track: Track
    machine: records.Machine
    idle: int  # MiB of the GPU's memory that are in use when nothing of ours is
    agent: Agent
    agent_limit: float
    budget: Budget
    show: Callable[[Event], None]
    report: report.Refresher | None


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def research(lab: Lab) -> str:
    """Run experiments until a limit is reached, and return which. The baseline comes first and is not counted.

    What only a person can mend ends it when nothing was achieved yet, since the person is there. Later it is waited
    for: in the night, most things pass by themselves.
    """
    if not lab.ledger.history:
        baseline(lab)
    stalls = pauses = 0
    told = ""  # what the agent has to hear of its last call
    while (spent := lab.budget.spent()) is None:
        match trouble := step(lab, told, afresh=pauses > 0):
            case None:
                stalls, pauses, told = 0, 0, ""
                continue
            case Failed(why):
                stalls, told = stalls + 1, f"{why} (call {stalls + 1} in a row that brought nothing)"
                lab.show(records.Stalled(lab.ledger.next_number, why))
                if stalls < STALLS:
                    continue
                trouble = Hopeless(f"{lab.agent.name} brought nothing {stalls} times in a row: {why}")
        if isinstance(trouble, Hopeless) and not lab.budget.done:
            raise UserError(trouble.why)
        pauses += 1
        pause(lab, trouble, pauses)
    return spent


def step(lab: Lab, told: str, afresh: bool) -> Trouble | None:
    """Attempt an experiment; what fails of git, the disk, the data or the GPU is one more kind of trouble. Nothing is
    lost by that: the next attempt starts, as a new driver would, from what git holds."""
    try:
        if afresh:
            reconcile(lab.checkout, lab.ledger, lab.show)
        trouble = attempt(lab, told)
    except Exception as error:
        return Hopeless(explain(error))
    return replace(trouble, why=f"{lab.agent.name}: {trouble.why}") if isinstance(trouble, Hopeless) else trouble


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
            mend = propose(lab, base, edit.commit, folder, request, turn=repairs + 1, crash=outcome.reason)
            trouble = unusable(mend)
            if isinstance(trouble, Busy) and not lab.budget.spent():
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
    checks.check_disk(folder)
    ledger.in_flight.touch()
    ledger.stand()
    try:
        yield ledger.base, folder
    finally:
        with uninterrupted():
            ledger.stand()
            ledger.in_flight.unlink(missing_ok=True)


def propose(lab: Lab, base: str, before: str, folder: Path, request: str, turn: int, crash: str = "") -> Edit:
    """Call the agent once and see what it did to the tree since `base`, and to train.py since `before`."""
    ledger = lab.ledger
    ledger.worktree().reset(ledger.branch, before)
    lab.show(records.Asking(ledger.next_number, turn, crash))
    facts = {"TAG": ledger.tag, "EXPERIMENT": folder.name, "ATTEMPT": str(turn), "SEED": str(lab.track.seed)}
    env = {f"AUTORESEARCH_{name}": value for name, value in facts.items()}
    call = AgentCall(ledger.worktree().tree, base, folder, env, lab.agent_limit, mark=ledger.folder)
    reply = ask(lab.agent, request, call)
    lab.budget.paid += reply.usage.cost_usd or 0.0
    tree = ledger.worktree()  # once more: the agent may have broken it
    paths = tuple(tree.changed(ledger.branch, base))
    plain = 0 <= size_of(tree.tree / EDITABLE) <= MAX_PROGRAM
    commit = tree.commit(subject(reply) + "\n", base, (EDITABLE,) if plain else ())
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


def pause(lab: Lab, trouble: Trouble, count: int) -> None:
    """Wait until the time that the agent named, at least longer each time, but not beyond the budget."""
    seconds, now = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff), datetime.now().astimezone()
    if isinstance(trouble, Busy) and trouble.until:
        seconds = max(seconds, (trouble.until - now).total_seconds())
    lab.show(records.Waiting(trouble.why, now + timedelta(seconds=seconds)))
    end = clock() + seconds
    while (left := end - clock()) > 0 and not lab.budget.spent():
        time.sleep(min(left, 1.0))


def run(lab: Lab, base: str, edit: Edit, folder: Path, idea: str) -> Outcome:
    """Train an edit, unless it touched more than train.py."""
    if foreign := tuple(path for path in edit.paths if path != EDITABLE):
        return Rejected(foreign)
    if not edit.plain:
        return Crashed("train.py was removed, is no plain file any more, or has more than 1 MB", "", 0.0)
    return train(lab, base, edit.commit, folder, idea)


def train(lab: Lab, base: str, commit: str, folder: Path, idea: str) -> Outcome:
    """Train a commit in a tree that holds nothing else. What would be kept is scored by the referee first."""
    ledger = lab.ledger
    tree = ledger.worktree()
    tree.reset(ledger.branch, commit)
    if broken := check_syntax(tree.tree / EDITABLE):
        return broken
    wait_for_gpu(lab)
    lab.track.mend()  # what somebody did to the data since is not this program's fault
    lab.show(records.Training(ledger.next_number, idea))
    model, log = folder / MODEL, folder / "run.log"
    bar = math.inf if ledger.incumbent_bpb is None else ledger.incumbent_bpb + TIE
    with gpu.observed(lab.machine, folder / CLOCKS):
        ended = run_training(lab.track, bar=bar, model=model, log=log)
    tree = ledger.worktree()  # once more: the program may have broken it
    altered = [path for path, _ in tree.altered(commit)]
    tree.reset(ledger.branch, commit)  # what the program left there was not the agent's doing
    altered += [f"{lab.track.arena.name}/{name}" for name in lab.track.mend()]
    if altered:
        return Crashed(f"changed files while it ran: {', '.join(altered)}", "", ended.seconds)
    if not isinstance(ended, Finished) or verdict(lab, base, commit, ended) != "keep":
        return ended
    lab.show(records.Refereeing(ledger.next_number, ended.summary.val_bpb))
    return review(lab.track, ended, model=model, log=folder / "referee.log")


def wait_for_gpu(lab: Lab) -> None:
    """Until nobody else uses the GPU, and what was killed has given its memory back."""
    pauses = 0
    while others := gpu.users(lab.machine, lab.idle):
        if lab.budget.spent():
            raise UserError(others)
        pauses += 1
        pause(lab, Busy(others), pauses)


def verdict(lab: Lab, base: str, commit: str, outcome: Outcome) -> Status:
    added, removed = lab.checkout.lines_changed(base, commit, EDITABLE)
    best = lab.ledger.best
    return decide(outcome, added - removed, lab.ledger.incumbent_bpb, best.val_bpb if best else None)


def settle(
    lab: Lab, base: str, commit: str, outcome: Outcome, idea: Reply, repairs: int, folder: Path, taste: str
) -> None:
    """Judge an experiment and record it for ever. Where the branch stands follows from the record."""
    ledger, machine, arena = lab.ledger, lab.machine, lab.track.arena
    added, removed = lab.checkout.lines_changed(base, commit, EDITABLE)
    before, after = (lab.checkout.show(name, EDITABLE) for name in (base, commit))
    changes = source.changes(before, after)
    program_blob = lab.checkout.store(taste, PROGRAMS)
    with ledger.writing():
        recorded = Experiment(
            tag=ledger.tag, number=ledger.next_number, status=verdict(lab, base, commit, outcome),
            description=subject(idea, changes), reason=idea.reason, finished=ledger.now(), seed=lab.track.seed,
            arena=arena.name, budget=arena.budget, data=arena.data, agent=lab.agent.name,
            torch=machine.torch, gpu=machine.gpu or None, driver=machine.driver or None, program=program_blob,
            gpu_rate=lab.budget.gpu_rate or None,
            added=added, removed=removed, repairs=repairs, incumbent=ledger.incumbent_bpb, changes=changes,
            source=None if isinstance(outcome, Rejected) else source.fingerprint(after),
            **records.costs_of(spent_on(folder, base)), **records.facts_of(outcome),
            **(gpu.read_observed(folder / CLOCKS) if isinstance(outcome, Finished) else {}),
        )  # fmt: skip
        final = ledger.record(recorded, base, commit)
    lab.budget.done += recorded.number > 0
    for model in ledger.folder.glob(f"*/{MODEL}"):  # large, and only the incumbent's is worth its room
        if (model.parent.name == f"{recorded.number:04d}") != (recorded.status == "keep"):
            model.unlink()
    lab.show(records.Settled(recorded, final))
    if lab.report:
        lab.report.start()


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
    ledger.reload()
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


def start(options: argparse.Namespace) -> int:
    """Start or resume a run and stay with it until a limit is reached; returns the exit code."""
    budget = Budget(options.experiments, options.hours, options.dollars, options.gpu_dollars_per_hour)
    checkout = checks.open_checkout(ROOT)
    checks.check_tag(checkout, options.tag)
    show = Display(options.tag, ROOT / "runs" / options.tag, options.plain)
    agent = find_agent(options.agent, options.model)
    checks.check_prices(agent, options)
    if options.agent is None:
        show(records.Chosen(agent.name, tuple(PRESETS)))
    seed = whole(os.environ.get("AUTORESEARCH_SEED", "42"))
    if cache := os.environ.get("AUTORESEARCH_CACHE"):
        os.environ["AUTORESEARCH_CACHE"] = str(Path(cache).resolve())  # the same from the worktree
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # gigabytes each
    machine = gpu.find_machine(options.arena, options.gpu)
    if machine.uuid:  # by number, CUDA may mean another one than nvidia-smi does
        os.environ["CUDA_VISIBLE_DEVICES"] = machine.uuid
    ledger = Ledger(checkout, options.tag, show)
    if ledger.is_new():
        checks.check_committed(checkout)
    with (
        locks.hold(ledger.lock, f"the run {options.tag}", "its driver"),
        locks.hold(locks.of_device(machine.uuid or "cpu"), machine.gpu or "the CPU", f"run {options.tag}"),
    ):
        idle = checks.check_gpu(machine)
        reconcile(checkout, ledger, show)
        show(records.Preparing(options.arena))
        arena = prepare_arena(ledger.worktree().tree, options.arena)
        limit = options.train_timeout or max(PACE.shortest_limit, 2 * arena.budget)
        if limit <= arena.budget:
            raise UserError(f"--train-timeout {limit:g} ends a run before its budget of {arena.budget:g} s", 2)
        checks.check_comparable(ledger, arena, machine, seed)
        walls = isolation.NONE if options.no_isolation else isolation.find_isolation()
        track = Track(ledger.worktree().tree, arena, seed, limit, walls, mark=ledger.folder)
        refresher = None if options.no_report else report.Refresher(ROOT, options.tag)
        return work(Lab(checkout, ledger, track, machine, idle, agent, options.agent_timeout, budget, show, refresher))


def work(lab: Lab) -> int:
    """Research, and leave everything in order, whatever ends it."""
    ledger = lab.ledger
    code, ended = 1, "an error"
    try:
        lab.show(
            records.Started(
                ledger.tag, ledger.branch, lab.agent.name, lab.track.arena, lab.machine, tuple(ledger.experiments),
                lab.agent_limit, lab.track.isolation.missing,
            )
        )  # fmt: skip
        ended = research(lab)
        code = 0
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except Exception as error:
        ended = explain(error)
        raise
    finally:
        with uninterrupted():
            sweep(ledger.folder, frozenset())
            lab.show(records.Stopped(ended, lab.budget.done, ledger.best, lab.budget.dollars_spent))
        if lab.report and ledger.history:
            lab.report.finish()
    return code


# ----------------------------------------------------------------------------------------------------------------------
# The command line


COMMANDS = {"run": start, **commands.COMMANDS}


def interrupt(signum: int, frame: object) -> NoReturn:
    """Leave by the same door as Ctrl-C: training stopped, tree put back. Once is enough: a second must not break into
    that."""
    for other in STOPS:
        signal.signal(other, lambda *_: None)
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that knows only ASCII
    for signum in STOPS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signum, interrupt)
    try:
        options = parse(argv, (__doc__ or "").strip().splitlines()[0], COMMANDS)
        return COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # of `loop.py prompt | head`
        return 0
    except Exception as error:
        if said := explain(error):
            with suppress(OSError):  # a terminal that went away
                print(f"error: {said}", file=sys.stderr)
        return error.code if isinstance(error, UserError) else 1


def explain(error: Exception) -> str:
    """An error in one line; one that nobody foresaw with its type and place, for whoever mends this driver."""
    if isinstance(error, UserError | GitError | OSError | argparse.ArgumentTypeError):
        return str(error) if isinstance(error, UserError) else records.one_line(str(error), 500)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return records.one_line(f"{type(error).__name__}: {error} (in {place}, a mistake of this program)", 500)


def let_go() -> None:
    """Where the terminal went away, write the rest to nowhere, or Python would end with an error of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    code = main()
    let_go()
    sys.exit(code)
