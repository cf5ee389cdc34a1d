"""Research, overnight, by itself: an agent edits train.py, git commits, five minutes of training
decide.

    uv run loop.py               today's run on this machine's GPU, started or resumed
    uv run loop.py --demo        any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status        where it stands, while it runs and after
    uv run loop.py report        progress.png and report.html
    uv run loop.py doctor        what a run here needs, and which of it is missing
    uv run loop.py prompt        the agent's next prompt

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `settle`
judges and records it. Everything that happened is in git: kill this at any instant, start it again,
and nothing is lost.
"""

import os
import re
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

from autoresearch import checks, cli
from autoresearch.agents import prompt
from autoresearch.agents.call import AgentCall, ask, spent_on
from autoresearch.files import UserError, one_line, tail
from autoresearch.ideas import Busy, Edit, Failed, Hopeless, Idea, Reply, Run, Trouble, Usage
from autoresearch.jobs import LOG, Job, gpu
from autoresearch.journal.changes import Change, describe_change, fingerprint
from autoresearch.journal.experiment import Experiment, Verdict
from autoresearch.pace import PACE, clock
from autoresearch.study import Study
from autoresearch.task import EDITABLE, MAX_PROGRAM, is_better, syntax_error
from autoresearch.view import events

REPAIRS = 2  # of one idea that crashed
RUNS = 3  # of a commit, where no fault of the program ends one
STALLS = 5  # agent calls in a row without an experiment, before there is a pause
REFEREEING = re.compile(r"^refereeing (\d+\.\d+)$", re.MULTILINE)  # in the log of a job


def research(study: Study) -> str:
    """Run experiments until a limit is reached, and return which. The baseline is not counted.

    Until something has been achieved, an error that needs a person ends the run: that person is
    still at the keyboard. After that it is retried, because at night most errors go away.
    """
    if not study.journal.history:
        baseline(study)
    stalls = pauses = 0
    feedback = ""  # on the last call, for the next one
    while (limit := study.limits.reached()) is None:
        match trouble := step(study, feedback, afresh=pauses > 0):
            case None:
                stalls, pauses, feedback = 0, 0, ""
                continue
            case Failed(why):
                stalls += 1
                feedback = f"{why} (call {stalls} in a row that brought nothing)"
                study.show(events.Stalled(study.journal.next_number, why))
                if stalls < STALLS:
                    continue
                trouble = Hopeless(
                    f"{study.agent.name} brought nothing {stalls} times in a row: {why}"
                )
        if isinstance(trouble, Hopeless) and not study.limits.done:
            raise UserError(trouble.why)
        pauses += 1
        pause(study, trouble, pauses)
    return limit


def step(study: Study, feedback: str, afresh: bool) -> Trouble | None:
    """Attempt an experiment. An error of git, the disk, the data or the GPU is trouble too, and
    loses nothing: the next attempt starts, as a new driver would, from git."""
    try:
        if afresh:
            study.journal.reconcile()
        trouble = attempt(study, feedback)
    except Exception as error:
        return Hopeless(checks.explain(error))
    if isinstance(trouble, Hopeless):
        return Hopeless(f"{study.agent.name}: {trouble.why}")
    return trouble


def baseline(study: Study) -> None:
    """Train what the person committed, as an empty commit: the first incumbent."""
    base = study.journal.base
    commit = study.checkout.commit_tree("baseline\n", f"{base}^{{tree}}", base)
    program = study.checkout.show(commit, EDITABLE)
    idea = new_idea(study, Edit(Reply("baseline", "", Usage(0.0)), (), program, commit))
    idea.run = train(study, idea)
    if idea.run.crash:
        why = f"since train.py does not run as it is: {idea.run.crash}"
        raise UserError(f"there is no baseline, {why}; see {idea.folder / 'run.log'}")
    settle(study, idea)


def attempt(study: Study, feedback: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there is
    none."""
    journal = study.journal
    idea = new_idea(study)
    request = prompt.brief(idea.program, journal.experiments, feedback)
    edit = propose(study, idea, request)
    trouble = unusable(edit)
    if isinstance(trouble, Failed) and edit.duplicate_of:
        study.show(events.Repeated(idea.number, edit.duplicate_of))
        feedback = prompt.repeated(edit.duplicate_of)
        edit = propose(study, idea, prompt.brief(idea.program, journal.experiments, feedback))
        trouble = unusable(edit)
    if trouble:
        return trouble
    idea.edit = edit
    idea.run = run(study, idea)
    pauses = 0
    while idea.run.repairable and idea.repairs < REPAIRS:
        request = prompt.repair(idea.program, idea.number, subject(idea.edit.reply), idea.run)
        edit = propose(study, idea, request, turn=idea.repairs + 1)
        trouble = unusable(edit)
        if isinstance(trouble, Busy) and not study.limits.reached():
            pauses += 1
            pause(study, trouble, pauses)
            if study.limits.reached():
                break
        elif trouble:
            break
        else:
            idea.repairs += 1
            idea.edit = replace(edit, reply=idea.edit.reply)  # the idea stays what it was
            idea.run = run(study, idea)
    settle(study, idea)
    return None


def new_idea(study: Study, edit: Edit | None = None) -> Idea:
    """An idea that starts from the incumbent, by default from its program unchanged."""
    number, base = study.journal.next_number, study.journal.base
    folder = study.journal.folder / f"{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    checks.check_room(folder)
    edit = edit or Edit(Reply("", "", Usage(0.0)), (), None, base)
    return Idea(number, folder, base, read_program(study), edit)


def read_program(study: Study) -> str:
    """program.md as it is now, or as committed while an editor replaces it."""
    try:
        path = study.checkout.tree / "program.md"
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return study.checkout.show(study.journal.base, "program.md").decode(errors="replace")


def propose(study: Study, idea: Idea, request: str, turn: int = 0) -> Edit:
    """Call the agent once, in a tree of the idea's commit, and make its edit of train.py a commit
    on the idea's base."""
    journal, tree, before = study.journal, study.tree, idea.edit.commit
    tree.hand_out(before)
    study.show(events.Asking(idea.number, turn, idea.run.crash))
    env = {
        "AUTORESEARCH_TAG": journal.tag,
        "AUTORESEARCH_EXPERIMENT": idea.folder.name,
        "AUTORESEARCH_ATTEMPT": str(turn),
        "AUTORESEARCH_SEED": str(study.conditions.seed),
        "GIT_CEILING_DIRECTORIES": str(tree.path.parent),  # or git finds the person's repository
    }
    call = AgentCall(tree.path, idea.base, idea.folder, env, study.agent_limit, journal.alive)
    reply = ask(study.agent, request, call)
    study.limits.paid += reply.usage.cost_usd or 0.0
    paths, program, commit = tuple(tree.changed()), tree.read(EDITABLE), before
    if EDITABLE in paths and program is not None:
        commit = tree.commit(subject(reply) + "\n", idea.base, EDITABLE)
    tree.discard()
    lines = study.checkout.lines_changed(idea.base, commit, EDITABLE)
    same = None
    if paths == (EDITABLE,) and program is not None:
        same = journal.tried.get(fingerprint(program))
    return Edit(reply, paths, program, commit, *lines, same)


def unusable(edit: Edit) -> Trouble | None:
    """Why an edit is not run. One that came with an error is, unless the agent says it broke
    off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, Hopeless | Busy):
        return edit.reply.trouble
    if not edit.paths:
        nothing = f"no line of train.py is different: {edit.reply.description}"
        return edit.reply.trouble or Failed(nothing)
    return Failed(prompt.repeated(edit.duplicate_of)) if edit.duplicate_of else None


def pause(study: Study, trouble: Trouble, count: int) -> None:
    """Wait until the time that the trouble names, longer each time, but not beyond a limit."""
    now = datetime.now().astimezone()
    seconds = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff)
    if isinstance(trouble, Busy) and trouble.until:
        seconds = max(seconds, (trouble.until - now).total_seconds())
    study.show(events.Waiting(trouble.why, now + timedelta(seconds=seconds)))
    end = clock() + seconds
    while (left := end - clock()) > 0 and not study.limits.reached():
        time.sleep(min(left, 1.0))


def run(study: Study, idea: Idea) -> Run:
    """Train an idea, unless it touches more than train.py or is no program."""
    edit = idea.edit
    unrun = Run(repairable=True, facts={"run_seconds": 0.0})
    if edit.foreign:
        paths = one_line(f"changed more than {EDITABLE}: {', '.join(edit.foreign)}")
        return replace(unrun, crash=paths, repairable=False)
    if edit.program is None:
        size = f"{MAX_PROGRAM // 1_000_000} MB"
        return replace(unrun, crash=f"train.py is gone, no plain file, or longer than {size}")
    if wrong := syntax_error(edit.program):
        return replace(unrun, crash=wrong[0], log=wrong[1])
    return train(study, idea)


def train(study: Study, idea: Idea) -> Run:
    """Run an idea's commit as a job. A job that is lost, or that stood still with the machine, says
    nothing of the program, and runs again."""
    journal, edit = study.journal, idea.edit
    spec = {
        "kind": "run",
        "alive": str(journal.alive),
        "git_dir": str(study.checkout.git_dir),
        "commit": edit.commit,
        "conditions": asdict(study.conditions),
        "card": study.machine.card,
        "lines": edit.added - edit.removed,
        "incumbent": journal.incumbent_score,
        "best": journal.best_score,
    }
    for _ in range(RUNS):
        wait_for_gpu(study)
        study.show(events.Training(idea.number, subject(edit.reply)))
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
    """Wait for a run, and show when the referee has its turn."""
    claimed = None
    try:
        while not job.wait(0.2):
            if not claimed and (claimed := REFEREEING.search(tail(job.folder / LOG))):
                event = events.Refereeing(study.journal.next_number, float(claimed[1]))
                study.show(event)
    finally:
        job.stop()
    return job.outcome()


def wait_for_gpu(study: Study) -> None:
    """Wait while other programs use the GPU, and until it has its memory back from killed ones."""
    pauses = 0
    while users := gpu.users(study.machine, study.idle):
        if study.limits.reached():
            raise UserError(users)
        pauses += 1
        pause(study, Busy(users), pauses)


def settle(study: Study, idea: Idea) -> None:
    """Judge an idea by its score alone, and record it for good. The branch follows the record."""
    journal, edit, facts = study.journal, idea.edit, dict(idea.run.facts)
    before = study.checkout.show(idea.base, EDITABLE)
    after = before if edit.program is None else edit.program
    words = describe_change(before, after)
    source = "" if edit.foreign else fingerprint(after)
    if study.limits.gpu_rate:
        facts["gpu_usd_per_hour"] = study.limits.gpu_rate
    score, seed = idea.run.score, study.conditions.seed
    with journal.writing():
        experiment = Experiment(
            number=idea.number,
            verdict=judge(study, score, edit.added - edit.removed),
            description=subject(edit.reply, words),
            reason=edit.reply.reason,
            scores={} if score is None else {seed: score},
            incumbent=journal.incumbent_score,
            crash=idea.run.crash,
            facts=facts,
            curve=idea.run.curve,
            change=Change(words, source, edit.added, edit.removed),
            repairs=idea.repairs,
            agent=study.agent.name,
            usage=spent_on(idea.folder, idea.base),
            seed=seed,
            arena=study.conditions.arena,
            machine=study.machine,
            program=journal.store_program(idea.program),
            tag=journal.tag,
            finished=journal.now(),
        )
        final = journal.record(experiment, idea.base, edit.commit)
    study.limits.done += idea.number > 0
    study.show(events.Settled(experiment, final))


def judge(study: Study, score: float | None, lines: int) -> Verdict:
    journal = study.journal
    if score is None:
        return "crash"
    better = is_better(score, lines, journal.incumbent_score, journal.best_score)
    return "keep" if better else "discard"


def subject(reply: Reply, changes: str = "") -> str:
    silent = f"not described: {changes}" if changes else "an edit that was not described"
    return one_line(reply.description or silent, 120)


def main(argv: list[str] | None = None) -> int:
    return cli.main(research, argv)


if __name__ == "__main__":
    sys.exit(main())
