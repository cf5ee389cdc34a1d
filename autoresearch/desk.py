"""Ideas on their way: asked of an agent, and measured; what the loop waits for."""

import os
import re
import time
from datetime import datetime, timedelta
from typing import Any

from autoresearch.agents.call import AgentCall, ask
from autoresearch.files import UserError, tail
from autoresearch.ideas import Busy, Edit, Idea, Reply, Run, Trouble
from autoresearch.jobs import LOG, Job, gpu
from autoresearch.jobs.job import run_spec
from autoresearch.journal.changes import source_of, syntax_error
from autoresearch.pace import PACE, clock
from autoresearch.study import Study
from autoresearch.task import MAX_FILE
from autoresearch.view import events

RUNS = 3  # of a commit, where no fault of the program ends one
GUARDING = re.compile(r"^guarding (\S+)$", re.MULTILINE)  # in the log of a job


def propose(study: Study, idea: Idea, request: str, turn: int = 0) -> Edit:
    """Call the agent once, in a tree of the idea's commit, and make its edit a commit on the idea's
    base."""
    task, journal, tree, before = study.task, study.journal, study.tree, idea.edit.commit
    tree.hand_out(before)
    study.show(events.Asking(idea.number, turn, idea.run.crash))
    env = {
        "AUTORESEARCH_TAG": journal.tag,
        "AUTORESEARCH_EXPERIMENT": idea.folder.name,
        "AUTORESEARCH_ATTEMPT": str(turn),
        "AUTORESEARCH_SEED": str(study.conditions.seed),
        "GIT_CEILING_DIRECTORIES": str(tree.path.parent),  # or git finds the person's repository
    }
    limit = study.agent_limit
    call = AgentCall(task, tree.path, idea.base, idea.folder, env, limit, journal.alive)
    reply = ask(study.agent, request, call)
    study.limits.paid += reply.usage.cost_usd or 0.0
    edit = read_edit(study, reply, idea.base, before)
    tree.discard()
    return edit


def read_edit(study: Study, reply: Reply, base: str, before: str) -> Edit:
    """What git says of the agent's tree, which was handed out as `before`. What may be edited
    becomes a commit on `base`."""
    task, tree = study.task, study.tree
    paths = tuple(tree.changed())
    foreign = tuple(path for path in paths if not task.may_edit(path))
    files = {path: tree.read(path) for path in paths if path not in foreign}
    lost = [path for path, text in files.items() if text is None]
    lost = [path for path in lost if path in task.files or tree.has(path)]  # the others are deleted
    commit, usable = before, files.keys() - {*lost}
    if usable:
        commit = tree.commit(reply.subject() + "\n", base, usable)
    lines = study.checkout.lines_changed(base, commit)
    faults = (syntax_error(path, text) for path, text in files.items() if text is not None)
    fault = next(filter(None, faults), None)
    if lost:
        fault = f"{lost[0]} is gone, no plain file, or longer than {MAX_FILE // 1_000_000} MB", ""
    runs = paths and not foreign and not fault
    source = source_of(study.checkout, task, commit) if runs else ""
    same = study.journal.tried.get(source) if source else None
    return Edit(reply, paths, commit, foreign, lines, source, fault, same)


def measure(study: Study, idea: Idea) -> Run:
    """Run an idea's commit as a job. A job that is lost, or that stood still with the machine, says
    nothing of the program, and runs again."""
    journal, edit = study.journal, idea.edit
    spec = run_spec(
        study.conditions, study.checkout, journal.alive, edit.commit, study.machine.card,
        edit.added - edit.removed, journal.incumbent_score, journal.best_score,
    )  # fmt: skip
    for _ in range(RUNS):
        wait_for_gpu(study)
        study.show(events.Training(idea.number, edit.reply.subject()))
        outcome = wait_for_job(study, Job(idea.folder, spec, os.environ))
        if outcome and not outcome.get("void"):
            break
    else:
        lost = f"{RUNS} runs in a row were lost, or stood still with the machine"
        raise UserError(f"{lost}: see {idea.folder / LOG}")
    if trouble := outcome.get("trouble"):
        raise UserError(trouble)
    stamps = study.conditions.stamps
    stamps.clear()
    stamps.update(outcome["stamps"])
    return Run(**outcome["run"])


def wait_for_job(study: Study, job: Job) -> dict[str, Any] | None:
    """Wait for a run, and show when the guard has its turn."""
    claimed = None
    try:
        while not job.wait(0.2):
            if not claimed and (claimed := GUARDING.search(tail(job.folder / LOG))):
                event = events.Refereeing(study.journal.next_number, float(claimed[1]))
                study.show(event)
    finally:
        job.stop()
    return job.outcome()


def wait_for_gpu(study: Study) -> None:
    """Wait while other programs use the GPU, and until it has its memory back from killed ones."""
    pauses = 0
    while users := gpu.users(study.machine, study.idle):
        if study.reached():
            raise UserError(users)
        pauses += 1
        pause(study, Busy(users), pauses)


def pause(study: Study, trouble: Trouble, count: int) -> None:
    """Wait until the time that the trouble names, longer each time, but not beyond a limit."""
    now = datetime.now().astimezone()
    seconds = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff)
    if isinstance(trouble, Busy) and trouble.until:
        seconds = max(seconds, (trouble.until - now).total_seconds())
    study.show(events.Waiting(trouble.why, now + timedelta(seconds=seconds)))
    end = clock() + seconds
    while (left := end - clock()) > 0 and not study.reached():
        time.sleep(min(left, 1.0))
