"""A run, inside its job: a fresh tree, the measurement under its limits, the guard of a would-be
keep."""

import math
import os
import re
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoresearch import task
from autoresearch.files import UserError, cache, one_line, remove, tail
from autoresearch.ideas import SCORED, Run, sealed_of
from autoresearch.jobs import gpu
from autoresearch.jobs.compiled import OWN, cache_environment, keep_compiled, start_from_kept
from autoresearch.jobs.feed import Feed
from autoresearch.jobs.keeper import Exit, keep
from autoresearch.jobs.sandbox import Sandbox, lend, lent_paths
from autoresearch.journal.git import Repo, changed_files, checkout_tree, run_git
from autoresearch.task import Arena, Task

CLOCKS = "gpu.csv"  # in the folder of an experiment
OUT, MODEL = "out", "model"  # a folder there, and what a run or its feeder leaves in it
PAUSED = 0.02  # of the budget: a run that stood still for less is believed
# Numbers that the record has by another name
RECORDED = {"total_tokens_M": "tokens_M", "num_steps": "steps", "num_params_M": "parameters_M"}
GUARDED = ("val_bpb_upstream", "sealed_bpb")  # a guard's numbers that the record has as they are
OURS = re.compile(
    r"(run|referee)_seconds|duels_won|void_runs|(gpu|sealed|guard)_?\w*|tokens_per_second|memory_gb"
)


@dataclass(frozen=True)
class Conditions:
    """What all runs of a study have in common: the task, the person's checkout and the commit that
    they started from, the arena, the seed, the hard limit in seconds, the sandbox. `gpu`: whether
    a run sees one."""

    task: Task
    root: Path
    start: str
    arena: Arena
    gpu: bool
    seed: int
    limit: float
    sandbox: Sandbox

    @classmethod
    def read(cls, spec: dict[str, Any]) -> "Conditions":
        """What job.json holds of it."""
        arena, task = spec["arena"], Task(**spec["task"])
        folder = arena["folder"] and Path(arena["folder"])
        own = {"task": task, "root": Path(spec["root"]), "sandbox": Sandbox(**spec["sandbox"])}
        return cls(**{**spec, **own, "arena": Arena(**{**arena, "folder": folder})})


def run_spec(
    conditions: Conditions, checkout: Repo, alive: Path, commit: str, card: str, beat: float
) -> dict[str, Any]:
    """The job.json of a run: what it measures, where, and the score beyond which the guard looks at
    it."""
    return {
        "kind": "run",
        "alive": alive,
        "git_dir": checkout.git_dir,
        "commit": commit,
        "conditions": asdict(conditions),
        "card": card,
        "beat": beat,
    }


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do what a job.json says: measure a commit, and have the guard look at it if it would be kept.

    Returns what outcome.json holds: the run, and whether it is void; or the trouble that came in
    between.
    """
    conditions = Conditions.read(spec["conditions"])
    study = Path(spec["alive"]).parent
    job = RunJob(conditions, folder, study, Path(spec["git_dir"]), spec["commit"])

    def better(score: float) -> bool:
        return job.task.gain(score, than=spec["beat"]) > 0

    try:
        job.write_tree()
        with gpu.observed(spec["card"], folder / CLOCKS):
            found = job.measure()
        if altered := job.altered():
            crash = f"changed files while it ran: {', '.join(altered)}"
            found = Run(crash=crash, repairable=True, facts=seconds_of(found))
        elif job.task.guard and found.score is not None and better(found.score):
            print(f"guarding {found.score}", flush=True)  # read by the driver, for the view
            found = job.guard(found)
        if job.is_baseline():
            keep_compiled(study)
    except UserError as error:
        return {"trouble": str(error)}
    finally:
        remove(job.tree)
        remove(folder / OUT)
        remove(folder / "feed")
        remove(study / OWN)
    if found.score is not None:
        found = replace(found, facts={**found.facts, **gpu.read_observed(folder / CLOCKS)})
    return {"run": asdict(found), "void": job.void}


def seconds_of(run: Run) -> dict[str, float]:
    return {"run_seconds": run.facts["run_seconds"]}


class RunJob:
    """One run of one commit."""

    def __init__(
        self, conditions: Conditions, folder: Path, study: Path, git_dir: Path, commit: str
    ):
        self.conditions = conditions
        self.task = conditions.task
        self.folder = folder
        self.study = study  # its folder
        self.git_dir = git_dir
        self.commit = commit
        self.tree = folder / "tree"
        self.index = b""
        self.void = False  # it stood still, as in a frozen container: clocks and limits say nothing

    def is_baseline(self) -> bool:
        """Whether it is the program that the person committed."""
        trees = [f"{commit}^{{tree}}" for commit in (self.commit, self.conditions.start)]
        ours, theirs = run_git("--git-dir", str(self.git_dir), "rev-parse", *trees).split()
        return ours == theirs

    def write_tree(self) -> None:
        """The commit's files, and nothing else but the packages of Node, which looks no farther."""
        remove(self.tree)
        self.index = checkout_tree(self.git_dir, self.commit, self.tree)
        packages, link = self.conditions.root / "node_modules", self.tree / "node_modules"
        if packages.is_dir() and not os.path.lexists(link):
            link.symlink_to(packages)

    @property
    def names(self) -> dict[str, str]:
        """What the environment of a run and of its feeder tells."""
        return {
            "AUTORESEARCH_ARENA": self.conditions.arena.name,
            "AUTORESEARCH_CACHE": str(cache()),  # which lies in the home, and the run has another
            "AUTORESEARCH_SEED": str(self.conditions.seed),
            "AUTORESEARCH_MODEL": str(self.folder / OUT / MODEL),
        }

    def keep(self, line: str, log: Path, feed: Feed | None = None, **env: str) -> Exit:
        """Run a shell line in the tree and the sandbox, with this added to its environment: the
        measurement, beside its feeder, or the guard, which only reads what that left."""
        c, tmp, out = self.conditions, self.folder / "tmp", self.folder / OUT
        remove(tmp)
        tmp.mkdir(parents=True)
        # the guard shares no compiled code with what it guards against
        compiled = start_from_kept(self.study) if feed else tmp
        read, write = lent_paths(c.root, c.task.read), [self.tree, tmp, compiled]
        if not (feed and feed.process):  # which alone opens the text, and takes the model
            read += [cache(), *([c.arena.folder] if c.arena.folder else [])]
            (write if feed else read).append(out)
        environment = lend(c.root, c.sandbox.environment(tmp)) | {
            **self.names,
            "PYTHONUNBUFFERED": "1",
            "GIT_CEILING_DIRECTORIES": str(self.folder),  # or git finds the person's repository
            **({} if c.gpu else {"CUDA_VISIBLE_DEVICES": ""}),
            **cache_environment(compiled),
            **(feed.names if feed else {}),
            **env,
        }

        def watch() -> str:
            return feed.look() or diverged(log) if feed else ""

        try:
            return keep(
                c.sandbox.command(["/bin/sh", "-c", line], read, write),
                cwd=self.tree,
                env=environment,
                limit=c.limit,
                out=log,
                pass_fds=feed.pipes if feed else (),
                watch=watch,
            )
        finally:
            remove(tmp)

    def measure(self) -> Run:
        """Run `measure`, beside its feeder."""
        log = self.folder / "run.log"
        remove(self.folder / OUT)
        (self.folder / OUT).mkdir(parents=True)
        with closing(self.start_feed()) as feed:
            ended = self.keep(self.task.measure, log, feed)
        found = read_run(self.task.metric, ended, feed, log)
        arena = self.conditions.arena
        believed = math.inf if arena.counted else PAUSED * arena.budget  # counted work has no clock
        self.void |= ended.paused > (0.0 if found.crash else believed)
        return found

    def start_feed(self) -> Feed:
        """Start the feeder in a tree of what the person committed, which no run can reach."""
        c, tree = self.conditions, self.folder / "feed/tree"
        if self.task.feed:
            remove(tree.parent)
            checkout_tree(self.git_dir, c.start, tree)
        env = lend(c.root, dict(os.environ)) | self.names
        return Feed(self.task.feed, tree, env, c.limit - c.arena.budget)

    def altered(self) -> list[str]:
        """Which files of its tree a program has changed while it ran."""
        if self.tree.is_symlink() or not self.tree.is_dir():
            return ["its tree"]
        return changed_files(self.git_dir, self.tree, self.index)

    def guard(self, found: Run) -> Run:
        """Run `guard` in a fresh tree. Returns the run with its numbers, among them the score if it
        prints the metric, or a crash where it fails."""
        log = self.folder / "guard.log"
        self.write_tree()  # the measurement may have left modules that the guard would import
        ended = self.keep(self.task.guard, log, AUTORESEARCH_SCORE=repr(found.score))
        end = tail(log)
        self.void |= ended.code != 0 and ended.paused > 0
        refused = Run(repairable=True, facts=seconds_of(found))  # no log: its numbers are not told
        if code := ended.code:
            return replace(refused, crash=f"the guard: {task.read_failure(code, end)}")
        if code is None:
            return replace(refused, crash=f"the guard: killed {ended.why}")
        try:
            numbers = task.read_numbers(end, self.task.metric, optional=True)
        except ValueError as error:
            return replace(refused, crash=f"the guard: {error}")
        score, scores = found.score, {}
        if not self.task.duels and self.task.metric in numbers:  # no guard scores their other side
            score, scores = numbers.pop(self.task.metric), {SCORED: 1.0}
        told = {name if name in GUARDED else f"guard_{name}": v for name, v in numbers.items()}
        facts = {**found.facts, **told, **scores, "referee_seconds": ended.seconds}
        return replace(found, score=score, sealed=sealed_of(facts), facts=facts)


def diverged(log: Path) -> str:
    """Why a run is lost, by the last line of its log: the loss is not finite."""
    found = task.NOT_FINITE.search(tail(log, task.MAX_LINE))
    return f"the loss is not finite: {one_line(found[0])}" if found else ""


def read_run(metric: str, ended: Exit, feed: Feed, log: Path) -> Run:
    """How a measurement ended. What its feeder says counts, whatever it printed."""
    end, seconds = tail(log), {"run_seconds": ended.seconds}
    run = Run(log=end, curve=task.read_curve(tail(log, task.MAX_LOG)), facts=seconds)
    lost = feed.crash or (diverged(log) if ended.code is None else "")
    if lost or ended.code is None:
        return replace(run, crash=lost or f"killed {ended.why}", repairable=bool(lost))
    if ended.code:
        return replace(run, crash=task.read_failure(ended.code, end), repairable=True)
    try:
        numbers = task.read_numbers(tail(log, 1_000_000), metric)
        feed.expect_weights()
    except ValueError as error:
        return replace(run, crash=str(error), repairable=True)
    score = numbers.pop(metric)
    numbers |= feed.facts
    facts = {RECORDED.get(name, name): v for name, v in numbers.items() if not OURS.fullmatch(name)}
    if "peak_vram_mb" in facts:
        facts["memory_gb"] = facts.pop("peak_vram_mb") / 1024
    if facts.get("training_seconds") and "tokens_M" in facts:
        facts["tokens_per_second"] = facts["tokens_M"] * 1e6 / facts["training_seconds"]
    # on our clock, which also sees the interpreter go
    facts |= seconds | {"total_seconds": round(ended.seconds, 1)}
    return replace(run, score=score, facts=facts)
