"""A run, in the process of its job: a fresh tree, the training under its limits, the referee of a would-be keep."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autoresearch.files import remove, tail
from autoresearch.git import changed_files, checkout_tree
from autoresearch.jobs import gpu
from autoresearch.jobs.keeper import Exit, keep
from autoresearch.jobs.sandbox import Isolation
from autoresearch.pace import PACE
from autoresearch.records import TIE, Arena, Crashed, Finished, Killed, Summary, UserError, one_line
from autoresearch.task import (
    MAX_LINE,
    MAX_LOG,
    NOT_FINITE,
    is_better,
    prepare_arena,
    read_curve,
    read_summary,
    reason_of,
)

Outcome = Finished | Crashed | Killed
Stamps = dict[str, list[int]]

MANIFEST = "manifest.json"  # in the arena's folder: the hashes of all its files
MODEL, CLOCKS = "model.pt2", "gpu.csv"  # in the folder of an experiment
PAUSED = 0.02  # of the budget that a run may stand still and be believed all the same
AGREE = 0.0005  # val_bpb between a compiled model in its own process and its exported graph


@dataclass(frozen=True)
class Track:
    """What all runs of a study have in common: the arena, the seed, the hard limit in seconds, the sandbox; and what
    the arena's files were when they were whole, with the text of its manifest."""

    arena: Arena
    seed: int
    limit: float
    isolation: Isolation
    stamps: Stamps
    manifest: str | None

    @classmethod
    def of(cls, arena: Arena, seed: int, limit: float, isolation: Isolation) -> "Track":
        return cls(arena, seed, limit, isolation, stamps_of(arena.folder), read_text(arena.folder / MANIFEST))

    def spec(self) -> dict[str, Any]:
        """As job.json holds it."""
        facts = asdict(self)
        facts["arena"]["folder"] = str(self.arena.folder)
        return facts

    @classmethod
    def read(cls, spec: dict[str, Any]) -> "Track":
        arena = Arena(**{**spec["arena"], "folder": Path(spec["arena"]["folder"])})
        walls = Isolation(tuple(spec["isolation"]["prefix"]), spec["isolation"]["bare"], spec["isolation"]["missing"])
        return cls(arena, spec["seed"], spec["limit"], walls, spec["stamps"], spec["manifest"])


def stamps_of(folder: Path) -> Stamps:
    """What changes when a file does. The time of the last change (ctime) cannot be set back by who owns the file."""
    stats = [(path.name, path.lstat()) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats}


def read_text(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do what a job.json says: train a commit, and have the referee score it if it would be kept. Returns what
    outcome.json holds: which kind of end, its fields, what the arena's files are by now, whether the run is void."""
    job = Run(Track.read(spec["track"]), folder, Path(spec["git_dir"]), spec["commit"])
    try:
        job.write_tree()
        job.mend()  # first, so that earlier damage is not blamed on this run
        incumbent, lines, best = spec["incumbent"], spec["lines"], spec["best"]
        score_to_beat = math.inf if incumbent is None else incumbent + TIE
        with gpu.observed(spec["card"], folder / CLOCKS):
            outcome = job.train(score_to_beat)
        altered = job.altered()
        if altered:
            outcome = Crashed(f"changed files while it ran: {', '.join(altered)}", "", outcome.seconds)
        elif isinstance(outcome, Finished) and is_better(outcome.summary.val_bpb, lines, incumbent, best):
            print(f"refereeing {outcome.summary.val_bpb}", flush=True)  # read by the driver, for the display
            outcome = job.referee(outcome)
    except UserError as error:
        return {"trouble": str(error)}
    finally:
        remove(job.tree)
    if isinstance(outcome, Finished):
        outcome = replace(outcome, gpu=gpu.read_observed(folder / CLOCKS))
    return {type(outcome).__name__: asdict(outcome), "stamps": job.stamps, "void": job.void}


def read_outcome(found: dict[str, Any]) -> Outcome:
    """The end of a run, out of its outcome.json."""
    if "Finished" in found:
        return Finished(**{**found["Finished"], "summary": Summary(**found["Finished"]["summary"])})
    return Crashed(**found["Crashed"]) if "Crashed" in found else Killed(**found["Killed"])


class Run:
    """One run of one commit."""

    def __init__(self, track: Track, folder: Path, git_dir: Path, commit: str):
        self.track = track
        self.folder = folder
        self.git_dir = git_dir
        self.commit = commit
        self.tree = folder / "tree"
        self.stamps = track.stamps
        self.void = False  # whether it stood still, as in a frozen container, so that clocks and limits say nothing

    def write_tree(self) -> None:
        """The commit's files, and nothing else."""
        remove(self.tree)
        checkout_tree(self.git_dir, self.commit, self.tree, self.folder / "index")

    def keep(self, *command: str, log: Path, witness: "Witness | None" = None, **facts: str) -> Exit:
        """Run a Python program of the tree in the sandbox; `facts` are for its environment."""
        tmp = self.folder / "tmp"
        remove(tmp)
        tmp.mkdir(parents=True)
        env = self.track.isolation.environment(tmp) | {
            "AUTORESEARCH_ARENA": self.track.arena.name,
            "AUTORESEARCH_SEED": str(self.track.seed),
            "PYTHONUNBUFFERED": "1",
            "GIT_CEILING_DIRECTORIES": str(self.folder),  # or git finds the person's repository above
            **({"CUDA_VISIBLE_DEVICES": ""} if self.track.arena.name == "demo" else {}),  # sized for a CPU
            **facts,
        }
        try:
            return keep(
                [*self.track.isolation.prefix, sys.executable, *command], cwd=self.tree, env=env,
                limit=self.track.limit, out=log, pass_fds=(witness.theirs,) if witness else (),
                watch=witness.look if witness else str,
            )  # fmt: skip
        finally:
            remove(tmp)

    def train(self, score_to_beat: float) -> Outcome:
        """Run train.py and judge how it ended. One that scores well enough leaves its exported model."""
        model, log = self.folder / MODEL, self.folder / "run.log"
        remove(model)
        with Witness(log, self.track.limit - self.track.arena.budget) as witness:
            ended = self.keep(
                "train.py", log=log, witness=witness, AUTORESEARCH_BAR=repr(score_to_beat),
                AUTORESEARCH_MODEL=str(model), AUTORESEARCH_TICKS=str(witness.theirs),
            )  # fmt: skip
        outcome = judge(self.track, ended, witness, log)
        self.void |= ended.paused > (PAUSED * self.track.arena.budget if isinstance(outcome, Finished) else 0.0)
        return outcome

    def altered(self) -> list[str]:
        """Name what the program changed while it ran: files of its tree, and of the arena, which are made again."""
        changed = changed_files(self.git_dir, self.tree, self.folder / "index") if self.tree.is_dir() else ["its tree"]
        if changed or stamps_of(self.track.arena.folder) != self.stamps:
            self.write_tree()
            changed += [f"{self.track.arena.name}/{name}" for name in self.mend()]
        return changed

    def mend(self) -> list[str]:
        """Have the arena's files made again that are not what they were, by the manifest's hashes, and name those that
        were touched at all. The tree must be as it was committed, since its prepare.py does it."""
        folder, found = self.track.arena.folder, stamps_of(self.track.arena.folder)
        touched = sorted(name for name, stamp in self.stamps.items() if found.get(name) != stamp)
        if touched:
            folder.mkdir(exist_ok=True)
            for path in (folder / name for name in touched):
                if path.is_symlink() or not path.is_file():
                    remove(path)
            if self.track.manifest is not None and read_text(folder / MANIFEST) != self.track.manifest:
                (folder / MANIFEST).write_text(self.track.manifest)  # a forged one would vouch for forged files
            if prepare_arena(self.tree, self.track.arena.name, quietly=True) != self.track.arena:
                name = self.track.arena.name
                raise UserError(f"the arena {name} was changed and cannot be made again: take another --tag")
            self.stamps = stamps_of(folder)
        return touched

    def referee(self, outcome: Finished) -> Outcome:
        """Have the tree's prepare.py score the exported model on validation and sealed rows, in a process that runs
        nothing of train.py. Returns the run with the referee's scores, which nothing that an agent wrote has touched;
        a crash where there is no model, or where the two do not agree."""
        model, log = self.folder / MODEL, self.folder / "referee.log"
        if not model.is_file():
            why = "it left no model for the referee: finish was not called, or not ours"
            return Crashed(why, "", outcome.seconds)
        self.write_tree()  # the training may have left modules that prepare.py would import
        ended = self.keep("prepare.py", "--judge", str(model), log=log)
        end = tail(log)
        self.void |= ended.code != 0 and ended.paused > 0
        if ended.code != 0:
            why = f"killed {ended.why}" if ended.code is None else reason_of(ended.code, end)
            return Crashed(f"the referee: {why}", end, outcome.seconds)
        judged = [line for line in end.splitlines() if line.startswith("judged: ")]  # a library may have the last word
        if not judged:
            return Crashed("the referee: ended without a verdict", end, outcome.seconds)
        verdict = json.loads(judged[-1].removeprefix("judged: "))
        claimed, scored = outcome.summary.val_bpb, verdict["val_bpb"]
        if abs(claimed - scored) > AGREE:
            why = f"claims val_bpb {claimed:.6f}, and the referee scores its model {scored:.6f}"
            return Crashed(why, end, outcome.seconds)
        upstream, sealed = round(verdict["val_bpb_upstream"], 6), round(verdict["sealed_bpb"], 6)
        summary = replace(outcome.summary, val_bpb=round(scored, 6), val_bpb_upstream=upstream)
        return replace(outcome, summary=summary, sealed_bpb=sealed, referee_seconds=ended.seconds)


def judge(track: Track, ended: Exit, witness: "Witness", log: Path) -> Outcome:
    """How a training ended; the keeper's own clock and count check what it claims."""
    end, curve = tail(log), read_curve(tail(log, MAX_LOG))
    if ended.code is None:
        if witness.diverged:
            return Crashed(witness.diverged, end, ended.seconds, curve)
        return Killed(ended.why, ended.seconds, curve)
    if ended.code:
        return Crashed(reason_of(ended.code, end), end, ended.seconds, curve)
    try:
        summary = read_summary(tail(log, 100_000), track.arena.budget)
        witness.check(summary)
    except ValueError as error:
        return Crashed(str(error), end, ended.seconds, curve)
    # on our clock, which also sees the interpreter go
    return Finished(replace(summary, total_seconds=round(ended.seconds, 1)), ended.seconds, curve)


class Witness:
    """What the job sees of a run for itself: prepare.py sends `(` by a pipe when its clock starts, a `.` for each
    batch that it hands out, and `)` when the budget is spent. The times are those of the job's clock. `startup` is
    how many seconds may pass before the first batch, say to compile: with more, the budget does not fit the limit."""

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

    def __enter__(self) -> "Witness":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.ours)
        os.close(self.theirs)

    def look(self) -> str:
        """Take note of what came by the pipe; returns why the run is doomed, if it is."""
        now = time.monotonic()
        with suppress(BlockingIOError):
            ticks = os.read(self.ours, 2**16)
            self.started, self.stopped = self.started or now, now
            self.starts, self.drawn, self.ends = (
                count + ticks.count(tick)
                for count, tick in ((self.starts, b"("), (self.drawn, b"."), (self.ends, b")"))
            )
            self.last = ticks[-1:]
        patience = PACE.quiet if self.drawn else self.startup
        if self.last != b")" and now - self.stopped > patience:
            return f"since no step was finished in {patience:g} s"
        if found := NOT_FINITE.search(tail(self.log, MAX_LINE)):
            self.diverged = f"the loss is not finite: {one_line(found[0])}"
        return self.diverged

    def check(self, summary: Summary) -> None:
        """ValueError when a summary claims what was not seen."""
        if self.starts != 1 or self.ends != 1:
            raise ValueError("did not start and end its budget once, as the TrainLoader does")
        if self.last != b")":
            raise ValueError("drew batches after its budget was spent")
        if summary.num_steps != self.drawn:
            raise ValueError(f"claims {summary.num_steps} steps, and drew {self.drawn} batches")
        claimed, measured = summary.training_seconds, self.stopped - (self.started or 0)
        if abs(claimed - measured) > self.SLACK + measured / 200:
            raise ValueError(f"claims {claimed:.1f} s of training, and the driver's clock says {measured:.1f} s")
