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

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from autoresearch import checks, cli, gpu, prompt, records, source
from autoresearch.agents import AgentCall, ask, spent_on
from autoresearch.git import size_of
from autoresearch.ledger import PROGRAMS
from autoresearch.pace import PACE
from autoresearch.process import clock, uninterrupted
from autoresearch.records import (
    EDITABLE,
    TIE,
    Busy,
    Crashed,
    Edit,
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
from autoresearch.study import Study
from autoresearch.trial import check_syntax, run_training

MODEL, CLOCKS = "model.pt2", "gpu.csv"  # in an experiment's folder
MAX_PROGRAM = 1_000_000  # bytes of train.py
REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row that brought nothing, before there is a pause


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def research(study: Study) -> str:
    """Run experiments until a limit is reached, and return which. The baseline comes first and is not counted.

    What only a person can mend ends it when nothing was achieved yet, since the person is there. Later it is waited
    for: in the night, most things pass by themselves.
    """
    if not study.ledger.history:
        baseline(study)
    stalls = pauses = 0
    told = ""  # what the agent has to hear of its last call
    while (spent := study.limits.reached()) is None:
        match trouble := step(study, told, afresh=pauses > 0):
            case None:
                stalls, pauses, told = 0, 0, ""
                continue
            case Failed(why):
                stalls, told = stalls + 1, f"{why} (call {stalls + 1} in a row that brought nothing)"
                study.show(records.Stalled(study.ledger.next_number, why))
                if stalls < STALLS:
                    continue
                trouble = Hopeless(f"{study.agent.name} brought nothing {stalls} times in a row: {why}")
        if isinstance(trouble, Hopeless) and not study.limits.done:
            raise UserError(trouble.why)
        pauses += 1
        pause(study, trouble, pauses)
    return spent


def step(study: Study, told: str, afresh: bool) -> Trouble | None:
    """Attempt an experiment; what fails of git, the disk, the data or the GPU is one more kind of trouble. Nothing is
    lost by that: the next attempt starts, as a new driver would, from what git holds."""
    try:
        if afresh:
            study.ledger.reconcile()
        trouble = attempt(study, told)
    except Exception as error:
        return Hopeless(checks.explain(error))
    return replace(trouble, why=f"{study.agent.name}: {trouble.why}") if isinstance(trouble, Hopeless) else trouble


def baseline(study: Study) -> None:
    """Train what the user committed, as an empty commit: the first incumbent."""
    with experiment(study) as (base, folder):
        commit = study.ledger.worktree().commit("baseline\n", base)
        outcome = train(study, base, commit, folder, "baseline")
        if not isinstance(outcome, Finished):
            why, log = records.reason(outcome), folder / "run.log"
            raise UserError(f"there is no baseline, since train.py does not run as it is: {why}; see {log}")
        settle(study, base, commit, outcome, Reply("baseline", "", Usage(0.0)), 0, folder, program(study, base))


def attempt(study: Study, told: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there was none."""
    with experiment(study) as (base, folder):
        taste = program(study, base)
        edit = propose(study, base, base, folder, prompt.brief(taste, study.ledger.experiments, told), turn=0)
        if edit.repeats and isinstance(unusable(edit), Failed):
            told = prompt.repeated(edit.repeats)
            study.show(records.Repeated(study.ledger.next_number, edit.repeats))
            edit = propose(study, base, base, folder, prompt.brief(taste, study.ledger.experiments, told), turn=0)
        if trouble := unusable(edit):
            return trouble
        idea, repairs, pauses = edit.reply, 0, 0
        outcome = run(study, base, edit, folder, subject(idea))
        while isinstance(outcome, Crashed) and repairs < REPAIRS:
            request = prompt.repair(taste, study.ledger.next_number, subject(idea), outcome)
            mend = propose(study, base, edit.commit, folder, request, turn=repairs + 1, crash=outcome.reason)
            trouble = unusable(mend)
            if isinstance(trouble, Busy) and not study.limits.reached():
                pauses += 1
                pause(study, trouble, pauses)
            elif trouble:
                break
            else:
                edit, repairs = mend, repairs + 1
                outcome = run(study, base, edit, folder, subject(idea))
        settle(study, base, edit.commit, outcome, idea, repairs, folder, taste)
    return None


@contextmanager
def experiment(study: Study) -> Iterator[tuple[str, Path]]:
    """Yield the commit that the next experiment starts from, with the worktree clean on it, and a folder of its own.

    Afterwards, come what may, the tree stands on the incumbent: the new one, if the experiment was kept. The marker
    tells the next start that a tip of the branch that it does not know was ours.
    """
    ledger = study.ledger
    folder = ledger.folder / f"{ledger.next_number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    checks.check_room(folder)
    ledger.in_flight.touch()
    ledger.stand()
    try:
        yield ledger.base, folder
    finally:
        with uninterrupted():
            ledger.stand()
            ledger.in_flight.unlink(missing_ok=True)


def propose(study: Study, base: str, before: str, folder: Path, request: str, turn: int, crash: str = "") -> Edit:
    """Call the agent once and see what it did to the tree since `base`, and to train.py since `before`."""
    ledger = study.ledger
    ledger.worktree().reset(ledger.branch, before)
    study.show(records.Asking(ledger.next_number, turn, crash))
    facts = {"TAG": ledger.tag, "EXPERIMENT": folder.name, "ATTEMPT": str(turn), "SEED": str(study.track.seed)}
    env = {f"AUTORESEARCH_{name}": value for name, value in facts.items()}
    call = AgentCall(ledger.worktree().tree, base, folder, env, study.agent_limit, mark=ledger.folder)
    reply = ask(study.agent, request, call)
    study.limits.paid += reply.usage.cost_usd or 0.0
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


def pause(study: Study, trouble: Trouble, count: int) -> None:
    """Wait until the time that the agent named, at least longer each time, but not beyond the budget."""
    seconds, now = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff), datetime.now().astimezone()
    if isinstance(trouble, Busy) and trouble.until:
        seconds = max(seconds, (trouble.until - now).total_seconds())
    study.show(records.Waiting(trouble.why, now + timedelta(seconds=seconds)))
    end = clock() + seconds
    while (left := end - clock()) > 0 and not study.limits.reached():
        time.sleep(min(left, 1.0))


def run(study: Study, base: str, edit: Edit, folder: Path, idea: str) -> Outcome:
    """Train an edit, unless it touched more than train.py."""
    if foreign := tuple(path for path in edit.paths if path != EDITABLE):
        return Rejected(foreign)
    if not edit.plain:
        return Crashed("train.py was removed, is no plain file any more, or has more than 1 MB", "", 0.0)
    return train(study, base, edit.commit, folder, idea)


def train(study: Study, base: str, commit: str, folder: Path, idea: str) -> Outcome:
    """Train a commit in a tree that holds nothing else. What would be kept is scored by the referee first."""
    ledger = study.ledger
    tree = ledger.worktree()
    tree.reset(ledger.branch, commit)
    if broken := check_syntax(tree.tree / EDITABLE):
        return broken
    wait_for_gpu(study)
    study.track.mend()  # what somebody did to the data since is not this program's fault
    study.show(records.Training(ledger.next_number, idea))
    model, log = folder / MODEL, folder / "run.log"
    bar = math.inf if ledger.incumbent_bpb is None else ledger.incumbent_bpb + TIE
    with gpu.observed(study.machine, folder / CLOCKS):
        ended = run_training(study.track, bar=bar, model=model, log=log)
    tree = ledger.worktree()  # once more: the program may have broken it
    altered = [path for path, _ in tree.altered(commit)]
    tree.reset(ledger.branch, commit)  # what the program left there was not the agent's doing
    altered += [f"{study.track.arena.name}/{name}" for name in study.track.mend()]
    if altered:
        return Crashed(f"changed files while it ran: {', '.join(altered)}", "", ended.seconds)
    if not isinstance(ended, Finished) or verdict(study, base, commit, ended) != "keep":
        return ended
    study.show(records.Refereeing(ledger.next_number, ended.summary.val_bpb))
    return review(study.track, ended, model=model, log=folder / "referee.log")


def wait_for_gpu(study: Study) -> None:
    """Until nobody else uses the GPU, and what was killed has given its memory back."""
    pauses = 0
    while others := gpu.users(study.machine, study.idle):
        if study.limits.reached():
            raise UserError(others)
        pauses += 1
        pause(study, Busy(others), pauses)


def verdict(study: Study, base: str, commit: str, outcome: Outcome) -> Status:
    added, removed = study.checkout.lines_changed(base, commit, EDITABLE)
    best = study.ledger.best
    return decide(outcome, added - removed, study.ledger.incumbent_bpb, best.val_bpb if best else None)


def settle(
    study: Study, base: str, commit: str, outcome: Outcome, idea: Reply, repairs: int, folder: Path, taste: str
) -> None:
    """Judge an experiment and record it for ever. Where the branch stands follows from the record."""
    ledger, machine, arena = study.ledger, study.machine, study.track.arena
    added, removed = study.checkout.lines_changed(base, commit, EDITABLE)
    before, after = (study.checkout.show(name, EDITABLE) for name in (base, commit))
    changes = source.changes(before, after)
    program_blob = study.checkout.store(taste, PROGRAMS)
    with ledger.writing():
        recorded = Experiment(
            tag=ledger.tag, number=ledger.next_number, status=verdict(study, base, commit, outcome),
            description=subject(idea, changes), reason=idea.reason, finished=ledger.now(), seed=study.track.seed,
            arena=arena.name, budget=arena.budget, data=arena.data, agent=study.agent.name,
            torch=machine.torch, gpu=machine.gpu or None, driver=machine.driver or None, program=program_blob,
            gpu_rate=study.limits.gpu_rate or None,
            added=added, removed=removed, repairs=repairs, incumbent=ledger.incumbent_bpb, changes=changes,
            source=None if isinstance(outcome, Rejected) else source.fingerprint(after),
            **records.costs_of(spent_on(folder, base)), **records.facts_of(outcome),
            **(gpu.read_observed(folder / CLOCKS) if isinstance(outcome, Finished) else {}),
        )  # fmt: skip
        final = ledger.record(recorded, base, commit)
    study.limits.done += recorded.number > 0
    for model in ledger.folder.glob(f"*/{MODEL}"):  # large, and only the incumbent's is worth its room
        if (model.parent.name == f"{recorded.number:04d}") != (recorded.status == "keep"):
            model.unlink()
    study.show(records.Settled(recorded, final))
    if study.report:
        study.report.start()


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


def program(study: Study, base: str) -> str:
    """program.md as the user has it now, read afresh for every experiment; while an editor swaps it, as committed."""
    try:
        return (study.checkout.tree / "program.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return study.checkout.show(base, "program.md").decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    return cli.main(research, argv)


if __name__ == "__main__":
    sys.exit(main())
