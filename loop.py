"""
Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training decide.

    uv run loop.py                      today's run on this machine's GPU, started or resumed
    uv run loop.py --demo               any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status               where it stands; works while it runs and after
    uv run loop.py report               progress.png and report.html
    uv run loop.py doctor               what a run here would need, and what of it is missing
    uv run loop.py prompt               what the agent is told

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `decide` judges it, `settle`
records it. Everything that happened is in git; kill this at any instant and start it again, and nothing is lost.
"""

import os
import re
import sys
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from autoresearch import checks, cli, prompt, records, source
from autoresearch.agents import AgentCall, ask, spent_on
from autoresearch.files import tail
from autoresearch.jobs import LOG, Job, gpu
from autoresearch.jobs.job import MODEL, read_outcome
from autoresearch.pace import PACE, clock
from autoresearch.records import (
    EDITABLE,
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
from autoresearch.study import Study
from autoresearch.task import check_syntax, is_better

REPAIRS = 2  # of one idea that crashed
AGAIN = 2  # times that a run is repeated for no fault of its program
REFEREEING = re.compile(r"^refereeing (\d+\.\d+)$", re.MULTILINE)  # in the log of a job
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
    """Train what the person committed, as an empty commit: the first incumbent."""
    ledger, folder, text = study.ledger, new_folder(study), read_program(study)
    commit = study.checkout.commit_tree("baseline\n", f"{ledger.base}^{{tree}}", ledger.base)
    edit = Edit(Reply("baseline", "", Usage(0.0)), (), study.checkout.show(commit, EDITABLE), commit)
    outcome = train(study, edit, folder, "baseline")
    if not isinstance(outcome, Finished):
        why, log = records.reason(outcome), folder / "run.log"
        raise UserError(f"there is no baseline, since train.py does not run as it is: {why}; see {log}")
    settle(study, text, edit, outcome, repairs=0)


def attempt(study: Study, told: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there was none."""
    ledger, folder = study.ledger, new_folder(study)
    base, program = ledger.base, read_program(study)
    request = prompt.brief(program, ledger.experiments, told)
    edit = propose(study, base, base, folder, request, turn=0)
    if edit.duplicate_of and isinstance(unusable(edit), Failed):
        study.show(records.Repeated(ledger.next_number, edit.duplicate_of))
        request = prompt.brief(program, ledger.experiments, prompt.repeated(edit.duplicate_of))
        edit = propose(study, base, base, folder, request, turn=0)
    if trouble := unusable(edit):
        return trouble
    idea, repairs, pauses = edit.reply, 0, 0
    outcome = run(study, edit, folder, subject(idea))
    while isinstance(outcome, Crashed) and repairs < REPAIRS:
        request = prompt.repair(program, ledger.next_number, subject(idea), outcome)
        mend = propose(study, base, edit.commit, folder, request, turn=repairs + 1, crash=outcome.reason)
        trouble = unusable(mend)
        if isinstance(trouble, Busy) and not study.limits.reached():
            pauses += 1
            pause(study, trouble, pauses)
        elif trouble:
            break
        else:
            edit, repairs = mend, repairs + 1
            outcome = run(study, edit, folder, subject(idea))
    settle(study, program, replace(edit, reply=idea), outcome, repairs)
    return None


def new_folder(study: Study) -> Path:
    """The folder of the next experiment."""
    folder = study.ledger.folder / f"{study.ledger.next_number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    checks.check_room(folder)
    return folder


def propose(study: Study, base: str, before: str, folder: Path, request: str, turn: int, crash: str = "") -> Edit:
    """Call the agent once, in a tree of the commit `before`, and make what it did to train.py a commit on `base`."""
    ledger, tree = study.ledger, study.tree
    tree.hand_out(before)
    study.show(records.Asking(ledger.next_number, turn, crash))
    facts = {"TAG": ledger.tag, "EXPERIMENT": folder.name, "ATTEMPT": str(turn), "SEED": str(study.track.seed)}
    env = {f"AUTORESEARCH_{name}": value for name, value in facts.items()}
    env["GIT_CEILING_DIRECTORIES"] = str(tree.path.parent)  # or git finds the person's repository if the tree's is gone
    reply = ask(study.agent, request, AgentCall(tree.path, base, folder, env, study.agent_limit, ledger.alive))
    study.limits.paid += reply.usage.cost_usd or 0.0
    paths, program = tuple(tree.changed()), tree.read(EDITABLE)
    usable = EDITABLE in paths and program is not None
    commit = tree.commit(subject(reply) + "\n", base, EDITABLE) if usable else before
    tree.discard()
    lines = study.checkout.lines_changed(base, commit, EDITABLE)
    if program is None:
        return Edit(reply, paths, program, commit, *lines)
    known = ledger.tried.get(source.fingerprint(program) or "") if usable and len(paths) == 1 else None
    return Edit(reply, paths, program, commit, *lines, known)


def unusable(edit: Edit) -> Trouble | None:
    """Why an edit is not worth a run. One that came with a failure is, unless the agent says that it broke off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, Hopeless | Busy):
        return edit.reply.trouble
    if not edit.paths:
        return edit.reply.trouble or Failed(f"no line of train.py is different: {edit.reply.description}")
    return Failed(prompt.repeated(edit.duplicate_of)) if edit.duplicate_of else None


def pause(study: Study, trouble: Trouble, count: int) -> None:
    """Wait until the time that the agent named, at least longer each time, but not beyond a limit."""
    seconds, now = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff), datetime.now().astimezone()
    if isinstance(trouble, Busy) and trouble.until:
        seconds = max(seconds, (trouble.until - now).total_seconds())
    study.show(records.Waiting(trouble.why, now + timedelta(seconds=seconds)))
    end = clock() + seconds
    while (left := end - clock()) > 0 and not study.limits.reached():
        time.sleep(min(left, 1.0))


def run(study: Study, edit: Edit, folder: Path, description: str) -> Outcome:
    """Train an edit, unless it touched more than train.py or cannot be trained."""
    if foreign := tuple(path for path in edit.paths if path != EDITABLE):
        return Rejected(foreign)
    if edit.program is None:
        return Crashed("train.py was removed, is no plain file any more, or has more than 1 MB", "", 0.0)
    return check_syntax(edit.program) or train(study, edit, folder, description)


def train(study: Study, edit: Edit, folder: Path, description: str) -> Outcome:
    """Run an edit's commit as a job. One that is lost, or that stood still with the machine, is never the program's
    fault and runs again."""
    ledger = study.ledger
    spec = {
        "kind": "run", "alive": str(ledger.alive), "git_dir": str(study.checkout.git_dir), "commit": edit.commit,
        "track": study.track.spec(), "card": study.machine.card, "lines": edit.added - edit.removed,
        "incumbent": ledger.incumbent_bpb, "best": ledger.best.val_bpb if ledger.best else None,
    }  # fmt: skip
    for _ in range(1 + AGAIN):
        wait_for_gpu(study)
        study.show(records.Training(ledger.next_number, description))
        found = watched(study, Job(folder, spec, os.environ))
        if found and not found.get("void"):
            break
    if not found:
        raise UserError(f"the job of a run ended without an outcome, and so did the next: see {folder / LOG}")
    if trouble := found.get("trouble"):
        raise UserError(trouble)
    study.track.stamps.update(found["stamps"])
    return read_outcome(found)


def watched(study: Study, job: Job) -> dict[str, Any] | None:
    """Wait for a run, and show when the referee has its turn."""
    said = ""
    try:
        while not job.wait(0.2):
            if not said and (found := REFEREEING.search(tail(job.folder / LOG))):
                said = found[1]
                study.show(records.Refereeing(study.ledger.next_number, float(said)))
    finally:
        job.stop()
    return job.outcome()


def wait_for_gpu(study: Study) -> None:
    """Until nobody else uses the GPU, and it has its memory back from killed processes."""
    pauses = 0
    while others := gpu.users(study.machine, study.idle):
        if study.limits.reached():
            raise UserError(others)
        pauses += 1
        pause(study, Busy(others), pauses)


def settle(study: Study, program: str, edit: Edit, outcome: Outcome, repairs: int) -> None:
    """Judge an experiment and record it for good, with the program.md that it was thought of under. Where the branch
    stands follows from the record."""
    ledger, machine, arena, idea = study.ledger, study.machine, study.track.arena, edit.reply
    folder, base = ledger.folder / f"{ledger.next_number:04d}", ledger.base
    after = study.checkout.show(edit.commit, EDITABLE)
    changes = source.changes(study.checkout.show(base, EDITABLE), after)
    best = ledger.best.val_bpb if ledger.best else None
    with ledger.writing():
        recorded = Experiment(
            tag=ledger.tag, number=ledger.next_number,
            status=decide(outcome, edit.added - edit.removed, ledger.incumbent_bpb, best),
            description=subject(idea, changes), reason=idea.reason, finished=ledger.now(), seed=study.track.seed,
            arena=arena.name, budget=arena.budget, data=arena.data, agent=study.agent.name,
            torch=machine.torch, gpu=machine.gpu or None, driver=machine.driver or None,
            program=ledger.store_program(program), gpu_rate=study.limits.gpu_rate or None,
            added=edit.added, removed=edit.removed, repairs=repairs, incumbent=ledger.incumbent_bpb, changes=changes,
            source=None if isinstance(outcome, Rejected) else source.fingerprint(after),
            **records.costs_of(spent_on(folder, base)), **records.facts_of(outcome),
        )  # fmt: skip
        final = ledger.record(recorded, base, edit.commit)
    study.limits.done += recorded.number > 0
    for model in ledger.folder.glob(f"*/{MODEL}"):  # large, and only the incumbent's is worth its room
        if (model.parent.name == f"{recorded.number:04d}") != (recorded.status == "keep"):
            model.unlink()
    study.show(records.Settled(recorded, final))
    if study.report:
        study.report.start()


def decide(outcome: Outcome, lines: int, incumbent: float | None, best_ever: float | None) -> Status:
    """Judge an experiment by its number alone. `lines` is the net change to train.py."""
    if not isinstance(outcome, Finished):
        return "crash"
    return "keep" if is_better(outcome.summary.val_bpb, lines, incumbent, best_ever) else "discard"


def subject(reply: Reply, changes: str | None = None) -> str:
    silent = f"not described: {changes}" if changes else "an edit that was not described"
    return records.one_line(reply.description or silent, 120)


def read_program(study: Study) -> str:
    """program.md as the person has it now, read afresh for every experiment; while an editor swaps it, as committed."""
    try:
        return (study.checkout.tree / "program.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return study.checkout.show(study.ledger.base, "program.md").decode(errors="replace")


def main(argv: list[str] | None = None) -> int:
    return cli.main(research, argv)


if __name__ == "__main__":
    sys.exit(main())
