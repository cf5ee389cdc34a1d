"""Research, overnight, by itself: an agent edits a file, git commits, a measurement decides.

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

import sys
from dataclasses import replace
from pathlib import Path

from autoresearch import checks, cli
from autoresearch.agents import prompt
from autoresearch.agents.call import spent_on
from autoresearch.desk import measure, pause, propose
from autoresearch.files import UserError, one_line, tail
from autoresearch.ideas import Busy, Edit, Failed, Hopeless, Idea, Reply, Run, Trouble, Usage
from autoresearch.journal.changes import Change, describe_edit, source_of
from autoresearch.journal.experiment import Experiment, Verdict
from autoresearch.study import Study
from autoresearch.task import MAX_FILE, Task
from autoresearch.view import events

REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row without an experiment, before there is a pause


def research(study: Study) -> str:
    """Run experiments until a limit is reached, and return which. The baseline is not counted.

    Until something has been achieved, an error that needs a person ends the run: that person is
    still at the keyboard. After that it is retried, because at night most errors go away.
    """
    if not study.journal.history:
        baseline(study)
    stalls = pauses = 0
    feedback = ""  # on the last call, for the next one
    while (limit := study.reached()) is None:
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
    """Measure what the person committed, as an empty commit: the first incumbent."""
    base = study.journal.base
    commit = study.checkout.commit_tree("baseline\n", f"{base}^{{tree}}", base)
    source = source_of(study.checkout, study.task, commit)
    idea = new_idea(study, Edit(Reply("baseline", "", Usage(0.0)), (), commit, source=source))
    idea.run = measure(study, idea)
    if idea.run.crash:
        why = f"since {study.task.what} does not run as it is: {idea.run.crash}"
        raise UserError(f"there is no baseline, {why}; see {idea.folder / 'run.log'}")
    settle(study, idea)


def attempt(study: Study, feedback: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there is
    none."""
    task, journal = study.task, study.journal
    idea = new_idea(study)
    request = prompt.brief(task, idea.program, journal.experiments, feedback)
    edit = propose(study, idea, request)
    trouble = unusable(task, edit)
    if isinstance(trouble, Failed) and edit.duplicate_of:
        study.show(events.Repeated(idea.number, edit.duplicate_of))
        feedback = prompt.repeated(edit.duplicate_of)
        request = prompt.brief(task, idea.program, journal.experiments, feedback)
        edit = propose(study, idea, request)
        trouble = unusable(task, edit)
    if trouble:
        return trouble
    idea.edit = edit
    idea.run = run(study, idea)
    pauses = 0
    while idea.run.repairable and idea.repairs < REPAIRS:
        words = idea.edit.reply.subject()
        request = prompt.repair(task, idea.program, idea.number, words, idea.run)
        edit = propose(study, idea, request, turn=idea.repairs + 1)
        trouble = unusable(task, edit)
        if isinstance(trouble, Busy) and not study.reached():
            pauses += 1
            pause(study, trouble, pauses)
            if study.reached():
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
    edit = edit or Edit(Reply("", "", Usage(0.0)), (), base)
    return Idea(number, folder, base, read_program(study), edit)


def read_program(study: Study) -> str:
    """program.md as it is now, or as committed while an editor replaces it."""
    text = tail(study.checkout.tree / "program.md", MAX_FILE)
    return text or study.checkout.show(study.journal.base, "program.md").decode(errors="replace")


def unusable(task: Task, edit: Edit) -> Trouble | None:
    """Why an edit is not run. One that came with an error is, unless the agent says it broke
    off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, Hopeless | Busy):
        return edit.reply.trouble
    if not edit.paths:
        nothing = f"no line of {task.what} is different: {edit.reply.description}"
        return edit.reply.trouble or Failed(nothing)
    return Failed(prompt.repeated(edit.duplicate_of)) if edit.duplicate_of else None


def run(study: Study, idea: Idea) -> Run:
    """Measure an idea, unless it touches other files or is no program."""
    edit = idea.edit
    unrun = Run(repairable=True, facts={"run_seconds": 0.0})
    if edit.foreign:
        paths = one_line(f"changed more than {study.task.what}: {', '.join(edit.foreign)}")
        return replace(unrun, crash=paths, repairable=False)
    if edit.fault:
        return replace(unrun, crash=edit.fault[0], log=edit.fault[1])
    return measure(study, idea)


def settle(study: Study, idea: Idea) -> None:
    """Judge an idea by its score alone, and record it for good. The branch follows the record."""
    journal, edit, facts = study.journal, idea.edit, dict(idea.run.facts)
    words = describe_edit(study.checkout, idea.base, edit.commit, edit.lines)
    if study.limits.gpu_rate:
        facts["gpu_usd_per_hour"] = study.limits.gpu_rate
    score, seed = idea.run.score, study.conditions.seed
    with journal.writing():
        experiment = Experiment(
            goal=study.task.goal,
            task=journal.store(study.task.text),
            number=idea.number,
            verdict=judge(study, score, edit.added - edit.removed),
            description=edit.reply.subject(words),
            reason=edit.reply.reason,
            scores={} if score is None else {seed: score},
            incumbent=journal.incumbent_score,
            crash=idea.run.crash,
            facts=facts,
            curve=idea.run.curve,
            change=Change(words, edit.source, edit.added, edit.removed),
            repairs=idea.repairs,
            agent=study.agent.name,
            usage=spent_on(idea.folder, idea.base),
            seed=seed,
            arena=study.conditions.arena,
            machine=study.machine,
            program=journal.store(idea.program),
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
    better = study.task.is_better(score, lines, journal.incumbent_score, journal.best_score)
    return "keep" if better else "discard"


def main(argv: list[str] | None = None, root: Path | None = None) -> int:
    return cli.main(research, argv, root)


if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parent))
