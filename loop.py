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
from typing import Literal

from autoresearch import checks, cli, noise
from autoresearch.agents import prompt
from autoresearch.desk import Desk
from autoresearch.files import UserError, one_line
from autoresearch.ideas import Busy, Edit, Fruitless, Idea, NeedsPerson, Run, Trouble
from autoresearch.journal.experiment import Verdict
from autoresearch.study import Study
from autoresearch.task import Task
from autoresearch.view import events

REPAIRS = 2  # of one idea that crashed
RENEW = 15  # experiments in a row without a keep, after which the incumbent runs again
STALLS = 5  # agent calls in a row without an experiment, before there is a pause


def research(study: Study, desk: Desk) -> str:
    """Make experiments until a limit is reached, and return which. The baseline is not counted.

    As long as this call has recorded no experiment, an error that needs a person ends it: that
    person is still at the keyboard. Later it is waited out and tried again, as a usage limit always
    is, because at night most errors go away.
    """
    if not study.journal.experiments:
        baseline(study, desk)
    stalls = pauses = 0
    feedback = ""  # on the last call, for the next one
    while (limit := study.reached()) is None:
        trouble = step(study, desk, feedback, after_trouble=pauses > 0)
        if trouble is None:
            stalls, pauses, feedback = 0, 0, ""
            continue
        if isinstance(trouble, Fruitless):
            stalls += 1
            feedback = f"{trouble.why} (call {stalls} in a row that brought nothing)"
            number = study.journal.next_number
            study.show(events.Note(f"{number:04d} no experiment: {one_line(trouble.why)}"))
            if stalls < STALLS:
                continue
            often = f"{study.agent.name} brought nothing {stalls} times in a row"
            trouble = Fruitless(f"{often}: {trouble.why}")
        if not isinstance(trouble, Busy) and not study.limits.experiments_done:
            raise UserError(trouble.why)
        pauses += 1
        desk.pause(trouble, pauses)
    return limit


def step(study: Study, desk: Desk, feedback: str, after_trouble: bool) -> Trouble | None:
    """Attempt an experiment; after trouble, read the record from git first, as a new driver would.
    An error of git, the disk, the data or the GPU is trouble too: it costs the idea on its way, and
    nothing that was recorded."""
    try:
        if after_trouble:
            study.journal.reconcile()
        if study.task.seeds > 1 and study.journal.dry and study.journal.dry % RENEW == 0:
            renew(study, desk)
        trouble = attempt(study, desk, feedback)
    except Exception as error:
        return NeedsPerson(checks.explain(error))
    if isinstance(trouble, NeedsPerson):
        return NeedsPerson(f"{study.agent.name}: {trouble.why}")
    return trouble


def baseline(study: Study, desk: Desk) -> None:
    """Measure what the person committed: the first incumbent."""
    idea = desk.baseline()
    while (verdict := judge(study, idea)) == "again":
        desk.measure(idea)
    if verdict == "crash":
        guard = idea.run.crash.startswith("the guard")
        line, log = (study.task.guard, "guard") if guard else (study.task.measure, "run")
        why = f"since `{line}` does not run as it is: {idea.run.crash}"
        raise UserError(f"there is no baseline, {why}; see {idea.folder / log}.log")
    settle(study, desk, idea, verdict)


def attempt(study: Study, desk: Desk, feedback: str) -> Trouble | None:
    """One experiment: an edit, its runs, two repairs at most, the verdict; or why there is none."""
    task, journal = study.task, study.journal
    idea = desk.new_idea()
    request = prompt.brief(task, idea.program, journal.experiments, feedback)
    edit = desk.propose(idea, request)
    trouble = unusable(task, edit)
    if isinstance(trouble, Fruitless) and edit.duplicate_of:
        same = f"the same program as experiment {edit.duplicate_of.number}"
        study.show(events.Note(f"{idea.number:04d} {same}; asking once more"))
        request = prompt.brief(task, idea.program, journal.experiments, trouble.why)
        edit = desk.propose(idea, request)
        trouble = unusable(task, edit)
    if trouble:
        return trouble
    idea.edit = edit
    while (verdict := judge(study, idea)) == "again":
        run(task, desk, idea)
        if idea.run.repairable and idea.repairs < REPAIRS and repair(study, desk, idea):
            idea.repairs += 1
            idea.runs.clear()
    settle(study, desk, idea, verdict)
    return None


def repair(study: Study, desk: Desk, idea: Idea) -> bool:
    """Have an agent mend an idea that crashed, and wait for one that is busy. Returns whether there
    is another edit to run."""
    words, pauses = idea.edit.reply.subject(), 0
    request = prompt.repair(study.task, idea.program, idea.number, words, idea.run)
    while True:
        edit = desk.propose(idea, request, turn=idea.repairs + 1)
        trouble = unusable(study.task, edit)
        if trouble is None:
            idea.edit = replace(edit, reply=idea.edit.reply)
            return True
        if not isinstance(trouble, Busy) or study.reached():
            return False
        pauses += 1
        desk.pause(trouble, pauses)
        if study.reached():
            return False


def unusable(task: Task, edit: Edit) -> Trouble | None:
    """Why an edit cannot be run. One that came with an error can, unless the agent itself says that
    it broke off."""
    if edit.reply.cut_short and isinstance(edit.reply.trouble, NeedsPerson | Busy):
        return edit.reply.trouble
    if not edit.paths:
        nothing = f"no line of {task.what} is different: {edit.reply.description}"
        return edit.reply.trouble or Fruitless(nothing)
    return Fruitless(prompt.repeated(edit.duplicate_of)) if edit.duplicate_of else None


def run(task: Task, desk: Desk, idea: Idea) -> None:
    """Measure an idea. Not if it touches other files, and not if it does not compile: those crash
    without a run, and the second may be repaired."""
    edit = idea.edit
    unrun = Run(repairable=True, facts={"run_seconds": 0.0})
    if edit.foreign:
        paths = one_line(f"changed more than {task.what}: {', '.join(edit.foreign)}")
        idea.runs[desk.seed(idea)] = replace(unrun, crash=paths, repairable=False)
    elif edit.fault:
        idea.runs[desk.seed(idea)] = replace(unrun, crash=edit.fault[0], log=edit.fault[1])
    else:
        desk.measure(idea)


def judge(study: Study, idea: Idea) -> Verdict | Literal["again"]:
    """The rule, paired by seed: what gains with the first seed runs with the next one too, and what
    gains more than a tie on average is kept. Fewer lines make a tie enough. Where scores drift with
    the machine, what wins all its duels is kept. One lucky run keeps nothing, and neither does what
    loses on the sealed rows."""
    task, journal, last = study.task, study.journal, idea.run
    if last.crash:
        return "crash"
    if idea.runs:
        better = last.facts.get("duels_won") == task.duels
        if last.rival is None:
            better = noise.is_better(task, journal, idea.scores, idea.edit.change.lines)
        if not better:
            return "discard"
        if noise.is_worse_on_sealed(task, journal, idea.sealed):
            idea.note = "better on validation, and worse on the sealed rows"
            return "discard"
    return "keep" if len(idea.runs) >= task.seeds else "again"


def renew(study: Study, desk: Desk) -> None:
    """Run the incumbent again with a new seed, which is the first from then on: a bar that was a
    lucky run does not stand forever."""
    idea = desk.renewal()
    settle(study, desk, idea, "crash" if idea.run.crash else "keep")


def settle(study: Study, desk: Desk, idea: Idea, verdict: Verdict) -> None:
    """Record a finished idea for good. The branch follows the record."""
    with study.journal.writing():
        found = desk.write_up(idea, verdict)
        experiment = study.journal.record(found, idea.base, idea.edit.commit)
    study.limits.experiments_done += bool(idea.edit.paths)  # no baseline, and no renewal
    study.show(events.Settled(experiment))


def main(argv: list[str] | None = None, root: Path | None = None) -> int:
    return cli.main(research, argv, root)


if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parent))
