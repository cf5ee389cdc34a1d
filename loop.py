"""Research, overnight, by itself: an agent edits a file, git commits, a measurement decides.

    uv run loop.py               today's run on this machine's GPU, started or resumed
    uv run loop.py --demo        any machine, no network, no key: five experiments of 15 s each
    uv run loop.py status        where it stands, while it runs and after
    uv run loop.py report        progress.png and report.html
    uv run loop.py doctor        what a run here needs, and which of it is missing
    uv run loop.py prompt        the agent's next prompt

The whole idea is in this file: `research` asks for experiments, `attempt` makes one, `judge` is
the rule, `settle` records it. Everything that happened is in git: kill this at any instant, start
it again, and nothing is lost.
"""

import sys
from dataclasses import replace
from pathlib import Path

from autoresearch import checks, cli
from autoresearch.agents import prompt
from autoresearch.desk import Desk
from autoresearch.files import UserError, one_line
from autoresearch.ideas import Busy, Edit, Failed, Hopeless, Idea, Run, Trouble
from autoresearch.journal.experiment import Verdict
from autoresearch.study import Study
from autoresearch.task import Task
from autoresearch.view import events

REPAIRS = 2  # of one idea that crashed
STALLS = 5  # agent calls in a row without an experiment, before there is a pause


def research(study: Study, desk: Desk) -> str:
    """Run experiments until a limit is reached, and return which. The baseline is not counted.

    Until something has been achieved, an error that needs a person ends the run: that person is
    still at the keyboard. After that it is retried, because at night most errors go away.
    """
    if not study.journal.history:
        baseline(study, desk)
    stalls = pauses = 0
    feedback = ""  # on the last call, for the next one
    while (limit := study.reached()) is None:
        match trouble := step(study, desk, feedback, afresh=pauses > 0):
            case None:
                stalls, pauses, feedback = 0, 0, ""
                continue
            case Failed(why):
                stalls += 1
                feedback = f"{why} (call {stalls} in a row that brought nothing)"
                number = study.journal.next_number
                study.show(events.Note(f"{number:04d} no experiment: {one_line(why)}"))
                if stalls < STALLS:
                    continue
                trouble = Hopeless(
                    f"{study.agent.name} brought nothing {stalls} times in a row: {why}"
                )
        if isinstance(trouble, Hopeless) and not study.limits.done:
            raise UserError(trouble.why)
        pauses += 1
        desk.pause(trouble, pauses)
    return limit


def step(study: Study, desk: Desk, feedback: str, afresh: bool) -> Trouble | None:
    """Attempt an experiment. An error of git, the disk, the data or the GPU is trouble too, and
    loses nothing: the next attempt starts, as a new driver would, from git."""
    try:
        if afresh:
            study.journal.reconcile()
        trouble = attempt(study, desk, feedback)
    except Exception as error:
        return Hopeless(checks.explain(error))
    if isinstance(trouble, Hopeless):
        return Hopeless(f"{study.agent.name}: {trouble.why}")
    return trouble


def baseline(study: Study, desk: Desk) -> None:
    """Measure what the person committed: the first incumbent."""
    idea = desk.baseline()
    idea.run = desk.measure(idea)
    if idea.run.crash:
        why = f"since `{study.task.measure}` does not run as it is: {idea.run.crash}"
        raise UserError(f"there is no baseline, {why}; see {idea.folder / 'run.log'}")
    settle(study, desk, idea)


def attempt(study: Study, desk: Desk, feedback: str) -> Trouble | None:
    """One experiment: an idea, its run, at most two repairs, the verdict. Returns why there is
    none."""
    task, journal = study.task, study.journal
    idea = desk.new_idea()
    request = prompt.brief(task, idea.program, journal.experiments, feedback)
    edit = desk.propose(idea, request)
    trouble = unusable(task, edit)
    if isinstance(trouble, Failed) and edit.duplicate_of:
        same = f"the same program as experiment {edit.duplicate_of.number}"
        study.show(events.Note(f"{idea.number:04d} {same}; asking once more"))
        feedback = prompt.repeated(edit.duplicate_of)
        request = prompt.brief(task, idea.program, journal.experiments, feedback)
        edit = desk.propose(idea, request)
        trouble = unusable(task, edit)
    if trouble:
        return trouble
    idea.edit = edit
    idea.run = run(task, desk, idea)
    pauses = 0
    while idea.run.repairable and idea.repairs < REPAIRS:
        words = idea.edit.reply.subject()
        request = prompt.repair(task, idea.program, idea.number, words, idea.run)
        edit = desk.propose(idea, request, turn=idea.repairs + 1)
        trouble = unusable(task, edit)
        if isinstance(trouble, Busy) and not study.reached():
            pauses += 1
            desk.pause(trouble, pauses)
            if study.reached():
                break
        elif trouble:
            break
        else:
            idea.repairs += 1
            idea.edit = replace(edit, reply=idea.edit.reply)  # the idea stays what it was
            idea.run = run(task, desk, idea)
    settle(study, desk, idea)
    return None


def unusable(task: Task, edit: Edit) -> Trouble | None:
    """Why an edit is not run. One that came with an error is, unless the agent says it broke
    off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, Hopeless | Busy):
        return edit.reply.trouble
    if not edit.paths:
        nothing = f"no line of {task.what} is different: {edit.reply.description}"
        return edit.reply.trouble or Failed(nothing)
    return Failed(prompt.repeated(edit.duplicate_of)) if edit.duplicate_of else None


def run(task: Task, desk: Desk, idea: Idea) -> Run:
    """Measure an idea, unless it touches other files or is no program."""
    edit = idea.edit
    unrun = Run(repairable=True, facts={"run_seconds": 0.0})
    if edit.foreign:
        paths = one_line(f"changed more than {task.what}: {', '.join(edit.foreign)}")
        return replace(unrun, crash=paths, repairable=False)
    if edit.fault:
        return replace(unrun, crash=edit.fault[0], log=edit.fault[1])
    return desk.measure(idea)


def judge(study: Study, run: Run, lines: int) -> Verdict:
    """The verdict, by the score alone. In duels a gain counts that was there each time."""
    task, journal = study.task, study.journal
    if run.score is None:
        return "crash"
    if run.rival is None:
        better = task.is_better(run.score, lines, journal.incumbent_score, journal.best_score)
    else:
        better = run.facts["duels_won"] == task.duels
    return "keep" if better else "discard"


def settle(study: Study, desk: Desk, idea: Idea) -> None:
    """Judge an idea, and record it for good. The branch follows the record."""
    verdict = judge(study, idea.run, idea.edit.change.lines)
    with study.journal.writing():
        experiment = desk.write_up(idea, verdict)
        final = study.journal.record(experiment, idea.base, idea.edit.commit)
    study.limits.done += idea.number > 0
    study.show(events.Settled(experiment, final))


def main(argv: list[str] | None = None, root: Path | None = None) -> int:
    return cli.main(research, argv, root)


if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parent))
