"""A run, inside its job: a fresh tree, the training under its limits, the referee of a would-be
keep."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoresearch import task
from autoresearch.files import UserError, one_line, remove, tail
from autoresearch.ideas import Run
from autoresearch.jobs import gpu
from autoresearch.jobs.keeper import Exit, keep
from autoresearch.jobs.sandbox import Sandbox
from autoresearch.journal.git import changed_files, checkout_tree
from autoresearch.pace import PACE
from autoresearch.task import METRIC, TIE, Arena, is_better, prepare_arena

Stamps = dict[str, list[int]]

MANIFEST = "manifest.json"  # in the arena's folder: the hashes of all its files
MODEL, CLOCKS = "model.pt2", "gpu.csv"  # in the folder of an experiment
PAUSED = 0.02  # of the budget: a run that stood still for less is believed
AGREE = 0.0005  # val_bpb between a compiled model in its own process and its exported graph
# Numbers of the summary that are recorded, by the names that the record has for them
RECORDED = {
    "val_bpb_upstream": "val_bpb_upstream", "training_seconds": "training_seconds",
    "evaluation_seconds": "evaluation_seconds", "total_tokens_M": "tokens_M", "num_steps": "steps",
    "num_params_M": "parameters_M", "mfu_percent": "mfu_percent",
}  # fmt: skip


@dataclass(frozen=True)
class Conditions:
    """What all runs of a study have in common: the arena, the seed, the hard limit in seconds, the
    sandbox; the stamps of the arena's files when they were whole, and the text of its manifest."""

    arena: Arena
    seed: int
    limit: float
    sandbox: Sandbox
    stamps: Stamps
    manifest: str | None

    @classmethod
    def of(cls, arena: Arena, seed: int, limit: float, sandbox: Sandbox) -> "Conditions":
        manifest = read_text(arena.folder / MANIFEST)
        return cls(arena, seed, limit, sandbox, stamps_of(arena.folder), manifest)

    @classmethod
    def read(cls, spec: dict[str, Any]) -> "Conditions":
        """What job.json holds of it."""
        arena = Arena(**{**spec["arena"], "folder": Path(spec["arena"]["folder"])})
        return cls(**{**spec, "arena": arena, "sandbox": Sandbox(**spec["sandbox"])})


def stamps_of(folder: Path) -> Stamps:
    """What changes when a file does. Its owner cannot set the time of the last change (ctime)."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    stats = [(path.name, path.lstat()) for path in files]
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats}


def read_text(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do what a job.json says: train a commit, and have the referee score it if it would be kept.

    Returns what outcome.json holds: the run, the stamps of the arena's files now, and whether the
    run is void; or the trouble that came in between.
    """
    conditions = Conditions.read(spec["conditions"])
    job = RunJob(conditions, folder, Path(spec["git_dir"]), spec["commit"])
    incumbent, lines, best = spec["incumbent"], spec["lines"], spec["best"]
    try:
        job.write_tree()
        job.mend_arena()  # first, so that this run is not blamed for earlier damage
        with gpu.observed(spec["card"], folder / CLOCKS):
            # with room for the digits that a printed score leaves out
            bar = math.inf if incumbent is None else incumbent + TIE + 1e-6
            found = job.train(score_to_beat=bar)
        if altered := job.altered():
            crash = f"changed files while it ran: {', '.join(altered)}"
            found = Run(crash=crash, repairable=True, facts=seconds_of(found))
        elif found.score is not None and is_better(found.score, lines, incumbent, best):
            print(f"refereeing {found.score}", flush=True)  # read by the driver, for the view
            found = job.referee(found)
    except UserError as error:
        return {"trouble": str(error)}
    finally:
        remove(job.tree)
        remove(folder / MODEL)
    if found.score is not None:
        found = replace(found, facts={**found.facts, **gpu.read_observed(folder / CLOCKS)})
    return {"run": asdict(found), "stamps": job.stamps, "void": job.void}


def seconds_of(run: Run) -> dict[str, float]:
    return {"run_seconds": run.facts["run_seconds"]}


class RunJob:
    """One run of one commit."""

    def __init__(self, conditions: Conditions, folder: Path, git_dir: Path, commit: str):
        self.conditions = conditions
        self.folder = folder
        self.git_dir = git_dir
        self.commit = commit
        self.tree = folder / "tree"
        self.stamps = conditions.stamps
        self.void = False  # it stood still, as in a frozen container: clocks and limits say nothing

    def write_tree(self) -> None:
        """The commit's files, and nothing else."""
        remove(self.tree)
        checkout_tree(self.git_dir, self.commit, self.tree, self.folder / "index")

    def keep(
        self, *command: str, log: Path, monitor: "ClockMonitor | None" = None, **env: str
    ) -> Exit:
        """Run a Python program of the tree in the sandbox, with this added to its environment."""
        c, tmp = self.conditions, self.folder / "tmp"
        remove(tmp)
        tmp.mkdir(parents=True)
        environment = c.sandbox.environment(tmp) | {
            "AUTORESEARCH_ARENA": c.arena.name,
            "AUTORESEARCH_SEED": str(c.seed),
            "PYTHONUNBUFFERED": "1",
            "GIT_CEILING_DIRECTORIES": str(self.folder),  # or git finds the person's repository
            **({"CUDA_VISIBLE_DEVICES": ""} if c.arena.name == "demo" else {}),  # sized for a CPU
            **env,
        }
        try:
            return keep(
                [*c.sandbox.prefix, sys.executable, *command],
                cwd=self.tree,
                env=environment,
                limit=c.limit,
                out=log,
                pass_fds=(monitor.theirs,) if monitor else (),
                watch=monitor.look if monitor else str,
            )
        finally:
            remove(tmp)

    def train(self, score_to_beat: float) -> Run:
        """Run train.py. One that scores well enough leaves its exported model."""
        c, model, log = self.conditions, self.folder / MODEL, self.folder / "run.log"
        remove(model)
        with ClockMonitor(log, c.limit - c.arena.budget) as monitor:
            ended = self.keep(
                "train.py",
                log=log,
                monitor=monitor,
                AUTORESEARCH_BAR=repr(score_to_beat),
                AUTORESEARCH_MODEL=str(model),
                AUTORESEARCH_TICKS=str(monitor.theirs),
            )
        found = read_run(c.arena.budget, ended, monitor, log)
        self.void |= ended.paused > (0.0 if found.crash else PAUSED * c.arena.budget)
        return found

    def altered(self) -> list[str]:
        """What the program changed while it ran: files of its tree, and files of the arena, which
        are made again."""
        changed = ["its tree"]
        if self.tree.is_dir():
            changed = changed_files(self.git_dir, self.tree, self.folder / "index")
        if changed or stamps_of(self.conditions.arena.folder) != self.stamps:
            self.write_tree()
            changed += [f"{self.conditions.arena.name}/{name}" for name in self.mend_arena()]
        return changed

    def mend_arena(self) -> list[str]:
        """Make the arena's files again that are not what they were, by the manifest's hashes, and
        name all that were touched. The tree's prepare.py does it, so the tree must be fresh."""
        c, folder = self.conditions, self.conditions.arena.folder
        found = stamps_of(folder)
        touched = sorted(name for name, stamp in self.stamps.items() if found.get(name) != stamp)
        if touched:
            folder.mkdir(exist_ok=True)
            for path in (folder / name for name in touched):
                if path.is_symlink() or not path.is_file():
                    remove(path)
            if c.manifest is not None and read_text(folder / MANIFEST) != c.manifest:
                (folder / MANIFEST).write_text(c.manifest)  # a forged one vouches for forged files
            if prepare_arena(self.tree, c.arena.name, quietly=True) != c.arena:
                what = f"the arena {c.arena.name} was changed and cannot be made again"
                raise UserError(f"{what}: take another --tag")
            self.stamps = stamps_of(folder)
        return touched

    def referee(self, found: Run) -> Run:
        """Score the exported model on validation and sealed rows, by the tree's prepare.py, in a
        process that runs nothing of train.py. Returns the run with the referee's scores, or a crash
        where there is no model or the two scores do not agree."""
        model, log = self.folder / MODEL, self.folder / "referee.log"

        def refuse(why: str, log: str = "") -> Run:
            return Run(crash=why, repairable=True, log=log, facts=seconds_of(found))

        if not model.is_file():
            return refuse("it left no model for the referee: finish was not called, or not ours")
        self.write_tree()  # the training may have left modules that prepare.py would import
        ended = self.keep("prepare.py", "--judge", str(model), log=log)
        end = tail(log)
        self.void |= ended.code != 0 and ended.paused > 0
        if ended.code is None:
            return refuse(f"the referee: killed {ended.why}", end)
        if ended.code:
            return refuse(f"the referee: {task.read_failure(ended.code, end)}", end)
        # not always the last line: a library may have the last word
        judged = [line for line in end.splitlines() if line.startswith("judged: ")]
        if not judged:
            return refuse("the referee: ended without a verdict", end)
        scores = json.loads(judged[-1].removeprefix("judged: "))
        score = scores.pop(METRIC)
        if abs((found.score or 0.0) - score) > AGREE:
            claim = f"claims {METRIC} {found.score:.6f}"
            return refuse(f"{claim}, and the referee scores its model {score:.6f}", end)
        facts = {name: round(value, 6) for name, value in scores.items()}
        facts = {**found.facts, **facts, "referee_seconds": ended.seconds}
        return replace(found, score=round(score, 6), facts=facts)


def read_run(budget: float, ended: Exit, monitor: "ClockMonitor", log: Path) -> Run:
    """How a training ended. The monitor's own clock and count check its claims."""
    end, seconds = tail(log), {"run_seconds": ended.seconds}
    run = Run(log=end, curve=task.read_curve(tail(log, task.MAX_LOG)), facts=seconds)
    if ended.code is None:
        diverged = monitor.diverged
        return replace(run, crash=diverged or f"killed {ended.why}", repairable=bool(diverged))
    if ended.code:
        return replace(run, crash=task.read_failure(ended.code, end), repairable=True)
    try:
        summary = task.read_summary(tail(log, 100_000), budget)
        monitor.check(summary)
    except ValueError as error:
        return replace(run, crash=str(error), repairable=True)
    facts = {ours: summary[theirs] for theirs, ours in RECORDED.items() if theirs in summary}
    if "peak_vram_mb" in summary:
        facts["memory_gb"] = summary["peak_vram_mb"] / 1024
    if "tokens_M" in facts:
        facts["tokens_per_second"] = facts["tokens_M"] * 1e6 / facts["training_seconds"]
    # on our clock, which also sees the interpreter go
    facts |= seconds | {"total_seconds": round(ended.seconds, 1)}
    return replace(run, score=summary[METRIC], facts=facts)


class ClockMonitor:
    """The job's own clock and count of a run. prepare.py sends by a pipe `(` when its clock starts,
    `.` for each batch that it hands out, `)` when the budget is spent.

    `startup`: seconds allowed before the first batch (imports, compilation).
    """

    SLACK = 2.0  # seconds between our clock and theirs on a busy machine, and half a percent

    def __init__(self, log: Path, startup: float) -> None:
        self.log = log
        self.startup = startup
        self.ours, self.theirs = os.pipe()
        os.set_blocking(self.ours, False)
        self.starts = self.drawn = self.ends = 0
        self.last = b""
        self.started: float | None = None
        self.stopped = time.monotonic()
        self.diverged = ""

    def __enter__(self) -> "ClockMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.ours)
        os.close(self.theirs)

    def look(self) -> str:
        """Read the pipe and the end of the log; returns why the run has to end, if it has."""
        now = time.monotonic()
        with suppress(BlockingIOError):
            ticks = os.read(self.ours, 2**16)
            self.started, self.stopped = self.started or now, now
            self.starts += ticks.count(b"(")
            self.drawn += ticks.count(b".")
            self.ends += ticks.count(b")")
            self.last = ticks[-1:]
        patience = PACE.quiet if self.drawn else self.startup
        if self.last != b")" and now - self.stopped > patience:
            return f"since no step was finished in {patience:g} s"
        if found := task.NOT_FINITE.search(tail(self.log, task.MAX_LINE)):
            self.diverged = f"the loss is not finite: {one_line(found[0])}"
        return self.diverged

    def check(self, summary: dict[str, float]) -> None:
        """ValueError where a summary claims something else than was seen."""
        if self.starts != 1 or self.ends != 1:
            raise ValueError("did not start and end its budget once, as the TrainLoader does")
        if self.last != b")":
            raise ValueError("drew batches after its budget was spent")
        steps, claimed = summary["num_steps"], summary["training_seconds"]
        if steps != self.drawn:
            raise ValueError(f"claims {steps:.0f} steps, and drew {self.drawn} batches")
        measured = self.stopped - (self.started or 0)
        if abs(claimed - measured) > self.SLACK + measured / 200:
            said = f"and the job's clock says {measured:.1f} s"
            raise ValueError(f"claims {claimed:.1f} s of training, {said}")
