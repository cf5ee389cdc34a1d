"""Ideas on their way: asked of an agent, and measured; what the loop waits for."""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from autoresearch import noise
from autoresearch.agents.call import AgentCall, ask, spent_on
from autoresearch.files import UserError, check_room, tail
from autoresearch.ideas import SCORED, Busy, Change, Edit, Idea, Reply, Run, Trouble
from autoresearch.jobs import LOG, Job, gpu
from autoresearch.jobs.job import run_spec
from autoresearch.journal.changes import describe_edit, source_of, syntax_error
from autoresearch.journal.experiment import Experiment, Verdict
from autoresearch.journal.git import Repo
from autoresearch.pace import PACE, clock
from autoresearch.study import Study
from autoresearch.task import MAX_FILE
from autoresearch.view import events

MOST_SLOWED = 10  # percent of a run
LEAST_SPEED = 0.9  # of that of the same program
LONG_START = 10.0  # seconds more than the incumbent's, and twice as many
RUNS = 3  # of a commit, where no fault of the program ends one
GUARDING = re.compile(r"^guarding (-?[\d.]+(?:e[-+]?\d+)?)$", re.MULTILINE)  # in the log of a job


def slow_start(facts: Mapping[str, float], before: Mapping[str, float]) -> str:
    """What to say of a run that took far longer to start than the incumbent; else nothing."""
    took, usual = (known.get("startup_seconds", 0.0) for known in (facts, before))
    if usual and took > 2 * usual and took >= usual + LONG_START:
        return f"start-up of {took:.0f} s, before {usual:.0f} s"
    return ""


def stamps(folder: Path | None) -> list[tuple[str, int, int]]:
    """What changes when a file of a folder does."""
    files = sorted(folder.iterdir()) if folder and folder.is_dir() else []
    stats = [(path.name, path.lstat()) for path in files]
    return [(name, s.st_size, s.st_mtime_ns) for name, s in stats]


def read_program(checkout: Repo, commit: str) -> str:
    """program.md as it is now, or as committed while an editor replaces it."""
    text = tail(checkout.tree / "program.md", MAX_FILE)
    return text or checkout.show(commit, "program.md").decode(errors="replace")


class Desk:
    """Where the ideas of a study lie until they are settled: everything that takes time, and
    everything that git and the disk have to say of them."""

    def __init__(self, study: Study):
        self.study, self.task, self.journal = study, study.task, study.journal
        self.data = stamps(study.conditions.arena.folder)

    def new_idea(self) -> Idea:
        """An idea that starts from the incumbent, at first its program unchanged."""
        number, base = self.journal.next_number, self.journal.base
        folder = self.journal.folder / f"{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        check_room(folder)
        program = read_program(self.study.checkout, base)
        return Idea(number, folder, base, program, Edit(Reply(), (), base))

    def baseline(self) -> Idea:
        """What the person committed."""
        idea = self.new_idea()
        source = source_of(self.study.checkout, self.task, idea.base)
        idea.edit = self.unchanged(idea.base, "baseline", source)
        return idea

    def renewal(self) -> Idea:
        """The incumbent as it is, with a seed that nothing has run with, the first from then on."""
        idea, seed, last = self.new_idea(), self.journal.new_seed, self.journal.kept[-1]
        words = f"the incumbent again, with seed {seed}"
        idea.edit = self.unchanged(idea.base, words, last.change.source)
        idea.runs[seed] = self.run(idea, idea.edit.commit, seed, self.task.worst)
        if idea.run.score is not None:
            kept = [*last.scores.items()][: self.task.seeds - 1]
            idea.runs |= {seed: Run(score, sealed=last.sealed.get(seed)) for seed, score in kept}
        return idea

    def unchanged(self, base: str, words: str, source: str) -> Edit:
        """An edit of nothing, as an empty commit."""
        commit = self.study.checkout.commit_tree(f"{words}\n", f"{base}^{{tree}}", base)
        return Edit(Reply(words), (), commit, change=Change(source=source))

    # --- an agent's call

    def propose(self, idea: Idea, request: str, turn: int = 0) -> Edit:
        """Call the agent once, in a tree of the idea's commit. Its edit becomes a commit."""
        study, tree, before = self.study, self.study.tree, idea.edit.commit
        tree.hand_out(before)
        study.show(events.Asking(idea.number, turn, idea.run.crash))
        env = {
            "AUTORESEARCH_TAG": study.journal.tag,
            "AUTORESEARCH_EXPERIMENT": idea.folder.name,
            "AUTORESEARCH_ATTEMPT": str(turn),
            "AUTORESEARCH_ARENA": study.conditions.arena.name,
            "AUTORESEARCH_SEED": str(study.conditions.seed),
            "GIT_CEILING_DIRECTORIES": str(tree.path.parent),  # or git finds the person's
        }
        alive, limit = study.journal.alive, study.agent_limit
        call = AgentCall(study.task, tree.path, idea.base, idea.folder, env, limit, alive)
        reply = ask(study.agent, request, call)
        study.limits.paid += reply.usage.cost_usd or 0.0
        edit = self.read_edit(reply, idea.base, before)
        tree.discard()
        return edit

    def read_edit(self, reply: Reply, base: str, before: str) -> Edit:
        """What git says of the agent's tree, which was handed out as `before`. What may be edited
        becomes a commit on `base`."""
        task, tree, checkout = self.task, self.study.tree, self.study.checkout
        paths = tuple(tree.changed())
        foreign = tuple(path for path in paths if not task.may_edit(path))
        files = {path: tree.read(path) for path in paths if path not in foreign}
        lost = [path for path, text in files.items() if text is None]
        lost = [path for path in lost if path in task.files or tree.has(path)]  # others are deleted
        commit, usable = before, files.keys() - {*lost}
        if usable:
            commit = tree.commit(reply.subject() + "\n", base, usable)
        faults = (syntax_error(path, text) for path, text in files.items() if text is not None)
        fault = next(filter(None, faults), None)
        if lost:
            fault = f"{lost[0]} is gone, no plain file, or longer than {MAX_FILE // 10**6} MB", ""
        runs = paths and not foreign and not fault
        source = source_of(checkout, task, commit) if runs else ""
        same = self.journal.tried.get(source) if source else None
        change = describe_edit(checkout, base, commit, source)
        return Edit(reply, paths, commit, foreign, change, fault, same)

    # --- a run

    def seed(self, idea: Idea) -> int:
        """That of an idea's next run: those of the incumbent, in that order."""
        known = [*self.journal.incumbent_scores]
        first = self.study.conditions.seed
        return (known or range(first, first + self.task.seeds))[len(idea.runs)]

    def measure(self, idea: Idea) -> None:
        """Run an idea with its next seed; where scores drift, beside the incumbent."""
        seed, lines = self.seed(idea), idea.edit.change.lines
        if self.task.duels and self.journal.kept:
            idea.runs[seed] = self.duel(idea, seed)
        else:
            beat = noise.to_beat(self.task, self.journal, idea.scores, seed, lines)
            idea.runs[seed] = self.run(idea, idea.edit.commit, seed, beat)

    def duel(self, idea: Idea, seed: int) -> Run:
        """Run an idea and the incumbent in turns, in the same minutes; the first duel that is lost
        ends it. Returns the idea's last run, with the mean scores of both."""
        mine, theirs, seconds = idea.edit.commit, idea.base, 0.0
        scores: dict[str, list[float]] = {mine: [], theirs: []}
        task, won = self.task, 0
        tie = noise.TIE * task.noise
        margin = tie if task.higher else -tie
        for number in range(task.duels):
            last = number == task.duels - 1
            # each goes first in turn; in the last duel the guard needs the other's score
            for commit in (theirs, mine) if last or number % 2 else (mine, theirs):
                beat = scores[theirs][-1] + margin if last and commit == mine else -task.worst
                which = f"duel {number + 1} of {task.duels}, "
                for _ in range(1 if commit == mine else RUNS):
                    run = self.run(idea, commit, seed, beat, which)
                    seconds += run.facts["run_seconds"]
                    if run.score is not None:
                        break
                if run.score is None and commit == theirs:
                    raise UserError(f"the incumbent crashed in a duel: {run.crash}")
                if commit == mine:
                    found = run
                if run.score is None:
                    return replace(run, facts={**run.facts, "run_seconds": seconds})
                scores[commit].append(run.score)
            if task.gain(scores[mine][-1], scores[theirs][-1]) <= tie:
                break
            won += 1
        facts = {**found.facts, "run_seconds": seconds, "duels_won": float(won)}
        mean, rival = fmean(scores[mine]), fmean(scores[theirs])
        # no guard has looked at the incumbent in these minutes
        return replace(found, score=mean, rival=rival, sealed=None, facts=facts)

    def run(self, idea: Idea, commit: str, seed: int, beat: float, which: str = "") -> Run:
        """Run a commit. A run on a machine that was not itself is void, and runs again, once. What
        the guard looked at and did not score is no match for a score of the guard's."""
        run = self.run_job(idea, commit, seed, beat, which)
        if why := self.held_back(idea, commit, run):
            self.study.show(events.Note(f"{idea.number:04d} void, and run again: {why}"))
            void = run.facts["run_seconds"]
            run = self.run_job(idea, commit, seed, beat, which)
            seconds = void + run.facts["run_seconds"]
            run = replace(run, facts={**run.facts, "run_seconds": seconds, "void_runs": 1.0})
        kept = self.journal.kept[-1:]
        looked_at, missing = "referee_seconds" in run.facts, SCORED not in run.facts
        if looked_at and missing and any(SCORED in e.facts for e in kept):
            crash = f"the guard: {self.task.metric} was not printed"
            facts = {"run_seconds": run.facts["run_seconds"]}
            return Run(crash=crash, repairable=True, facts=facts)
        return run

    def held_back(self, idea: Idea, commit: str, run: Run) -> str:
        """Why a run says little of its program: a slowed GPU, or the same program was faster."""
        slowed = run.facts.get("gpu_slowed_percent", 0.0)
        if slowed > MOST_SLOWED:
            return f"heat or power held the GPU back for {slowed:.0f}% of the time"
        before: Mapping[str, float] = {}
        if commit == idea.edit.commit:
            kept = self.journal.kept if not idea.edit.paths else []
            earlier = [*(e.facts for e in kept), *(r.facts for r in idea.runs.values())]
            before = earlier[-1] if earlier else {}
        speed, usual = (facts.get("tokens_per_second", 0.0) for facts in (run.facts, before))
        if run.score is not None and speed < LEAST_SPEED * usual:
            return f"{speed:,.0f} tokens a second, where the same program had {usual:,.0f}"
        return ""

    def run_job(self, idea: Idea, commit: str, seed: int, beat: float, which: str) -> Run:
        """Run a commit as a job; one that is lost, or stood still with the machine, runs again.
        `beat`: a score, beyond which the guard looks at it."""
        study, edit = self.study, idea.edit
        conditions, alive = replace(study.conditions, seed=seed), study.journal.alive
        spec = run_spec(conditions, study.checkout, alive, commit, study.machine.card, beat)
        # the logs in an idea's own folder are its own
        folder = idea.folder if commit == edit.commit else idea.folder / "rival"
        for _ in range(RUNS):
            self.mend_data()
            self.wait_for_gpu()
            study.show(events.Training(idea.number, which + edit.reply.subject()))
            outcome = self.wait_for(Job(folder, spec, os.environ))
            if outcome and not outcome.get("void"):
                break
        else:
            lost = f"{RUNS} runs in a row were lost, or stood still with the machine"
            raise UserError(f"{lost}: see {folder / LOG}")
        if trouble := outcome.get("trouble"):
            raise UserError(trouble)
        return Run(**outcome["run"])

    def wait_for(self, job: Job) -> dict[str, Any] | None:
        """Wait for a run, and show when the guard has its turn."""
        claimed = None
        try:
            while not job.wait(0.2):
                if not claimed and (claimed := GUARDING.search(tail(job.folder / LOG))):
                    number, score = self.journal.next_number, float(claimed[1])
                    self.study.show(events.Guarding(number, score))
        finally:
            job.stop()
        return job.outcome()

    def mend_data(self) -> None:
        """Have the task's `setup` look after its files again, where one was changed or removed. No
        run can do that; a cleaner of old files may."""
        arena = self.study.conditions.arena
        if stamps(arena.folder) != self.data:
            if self.study.prepare() != arena:
                what = f"the data of {arena.name} was changed and cannot be made again"
                raise UserError(f"{what}: take another --tag")
            self.data = stamps(arena.folder)

    def wait_for_gpu(self) -> None:
        """Wait while other programs use the GPU, or it lacks the memory of killed ones."""
        pauses = 0
        while users := gpu.users(self.study.machine, self.study.idle):
            if self.study.reached():
                raise UserError(users)
            pauses += 1
            self.pause(Busy(users), pauses)

    def pause(self, trouble: Trouble, count: int) -> None:
        """Wait until the time that the trouble names, longer each time, but not beyond a limit."""
        now = datetime.now().astimezone()
        seconds = min(PACE.backoff * 2 ** min(count - 1, 20), PACE.max_backoff)
        if isinstance(trouble, Busy) and trouble.until:
            seconds = max(seconds, (trouble.until - now).total_seconds())
        self.study.show(events.Waiting(trouble.why, now + timedelta(seconds=seconds)))
        end = clock() + seconds
        while (left := end - clock()) > 0 and not self.study.reached():
            time.sleep(min(left, 1.0))

    # --- the end of it

    def write_up(self, idea: Idea, verdict: Verdict) -> Experiment:
        """The record of a finished idea: the figures of its first run, and the seconds of all."""
        study, journal, edit, run = self.study, self.journal, idea.edit, idea.run
        first = next(iter(idea.runs.values()), run)
        facts = dict(run.facts if verdict == "crash" else first.facts)
        for name in ("run_seconds", "referee_seconds", "void_runs"):
            if known := [r.facts[name] for r in idea.runs.values() if name in r.facts]:
                facts[name] = sum(known)
        before = journal.kept[-1].facts if journal.kept else {}
        notes = [note for note in (idea.note, slow_start(facts, before)) if note]
        if study.limits.gpu_rate:
            facts["gpu_usd_per_hour"] = study.limits.gpu_rate
        scores, incumbent = {} if verdict == "crash" else idea.scores, journal.incumbent_scores
        rival = run.rival
        if rival is None and scores.keys() <= incumbent.keys():
            rival = fmean(incumbent[seed] for seed in scores or list(incumbent)[:1])
        return Experiment(
            goal=study.task.goal,
            task=journal.store(study.task.text),
            number=idea.number,
            verdict=verdict,
            description=edit.reply.subject(edit.change.words),
            reason=edit.reply.reason,
            scores=scores,
            sealed={} if verdict == "crash" else idea.sealed,
            incumbent=rival,
            crash=run.crash,
            note="; ".join(notes),
            facts=facts,
            curve=first.curve,
            change=edit.change,
            repairs=idea.repairs,
            agent=study.agent.name,
            usage=spent_on(idea.folder, idea.base),
            seed=next(iter(idea.runs), study.conditions.seed),
            arena=study.conditions.arena,
            machine=study.machine,
            program=journal.store(idea.program),
            tag=journal.tag,
            finished=journal.now(),
        )
