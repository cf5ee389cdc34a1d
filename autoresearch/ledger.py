"""The experiment history: git refs and trailers are the truth, results.tsv is their projection."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from autoresearch.files import uninterrupted, waiting_lock, write_whole
from autoresearch.git import Repo
from autoresearch.records import Experiment, UserError, message, parse_message

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\ttag\texperiment\tminutes\tcost_usd\tlines\n"
LOCK = "lock"  # in a run's folder
REFS = "refs/autoresearch"
PROGRAMS = "refs/autoresearch-program"  # every program.md that was ever in force


class Ledger:
    """What one tag has: its record, its branch, its folder. `history` holds (commit, experiment), oldest first, once
    `reconcile` has read it; the baseline is its first."""

    def __init__(self, checkout: Repo, tag: str):
        self.checkout = checkout
        self.tag = tag
        self.branch = f"autoresearch/{tag}"
        self.folder = checkout.tree / "runs" / tag
        self.lock = self.folder / LOCK
        self.alive = self.folder / "alive"  # the lock that every job of the tag shares
        self.table = checkout.tree / "results.tsv"
        self.history: list[tuple[str, Experiment]] = []
        self.programs: dict[str, str] = {}  # the blobs of program.md that were stored, by their text

    def is_new(self) -> bool:
        return not self.checkout.refs(f"{REFS}/{self.tag}")

    @property
    def experiments(self) -> list[Experiment]:
        return [experiment for _, experiment in self.history]

    @property
    def tried(self) -> dict[str, Experiment]:
        """Experiments by the fingerprint of the program that they trained; the first of each. A run that was killed
        says little of its program."""
        known = (e for e in reversed(self.experiments) if not (e.crash or "").startswith("killed"))
        return {e.source: e for e in known if e.source}

    @property
    def next_number(self) -> int:
        return self.history[-1][1].number + 1 if self.history else 0

    @property
    def kept(self) -> list[tuple[str, Experiment]]:
        return [entry for entry in self.history if entry[1].status == "keep"]

    @property
    def base(self) -> str:
        """What the next experiment starts from and the branch stands on: the last one kept, or else the user's HEAD."""
        commit = self.kept[-1][0] if self.kept else self.checkout.resolve("HEAD")
        assert commit
        return commit

    @property
    def incumbent_bpb(self) -> float | None:
        return self.kept[-1][1].val_bpb if self.kept else None

    @property
    def best(self) -> Experiment | None:
        """The best ever kept; a tie that was kept since lies a little above it."""
        return min((e for _, e in self.kept), key=lambda e: math.inf if e.val_bpb is None else e.val_bpb, default=None)

    def now(self) -> str:
        """The time of day, but never earlier than the last record's: a clock set back must not reorder results.tsv."""
        time = datetime.now(UTC)
        if self.history:
            last = datetime.fromisoformat(self.history[-1][1].finished)
            time = max(time, last + timedelta(microseconds=1))
        return time.isoformat(timespec="microseconds")

    def store_program(self, text: str) -> str:
        """The blob of a program.md."""
        if text not in self.programs:
            self.programs = {text: self.checkout.store(text)}
        return self.programs[text]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold results.tsv, and let no signal in: between the ref and its row nothing but SIGKILL can come."""
        with uninterrupted(), waiting_lock(self.table.parent / "runs" / "results.lock"):
            yield

    def record(self, experiment: Experiment, parent: str, commit: str) -> str:
        """Make `commit`'s files a child of `parent` with the experiment's trailers, for ever. Returns the new commit.

        The ref is the moment of truth: before it nothing has happened, after it the row can be made again. To be
        called within `writing`.
        """
        # what is remembered is what is written, so that a row made now and one made again later are the same
        text = message(experiment)
        written = parse_message(text)
        final = self.checkout.commit_tree(text, f"{commit}^{{tree}}", parent)
        self.checkout.update_refs(
            f"create {REFS}/{self.tag}/{experiment.number:04d} {final}",
            f"update {PROGRAMS}/{experiment.program} {experiment.program}",
            *([f"update refs/heads/{self.branch} {final}"] if experiment.status == "keep" else []),
        )
        entry = (final, written)
        self.history.append(entry)
        append(self.table, row(*entry))
        return final

    def reconcile(self) -> None:
        """Make branch and results.tsv agree with the refs, once the jobs of a driver that died are gone. This is how a
        run resumes."""
        with waiting_lock(self.alive):
            pass
        self.history = read_history(self.checkout, self.tag)
        branch = f"refs/heads/{self.branch}"
        self.checkout.unlock(branch, f"{REFS}/{self.tag}/*")
        tip = self.checkout.resolve(branch)
        if tip and not self.checkout.contains(self.base, tip):
            raise UserError(
                f"the branch {self.branch} has commits that are no experiments: keep them with "
                f"`git branch mine {tip}`, then `git update-ref -d {branch}`"
            )
        self.checkout.update_refs(f"update {branch} {self.base}")
        self.rebuild()

    def rebuild(self) -> None:
        """Make results.tsv what the refs of all tags say. Lines that are not from there are put aside, not lost."""
        with self.writing():
            entries = sorted(read_history(self.checkout), key=lambda e: (e[1].finished, e[1].tag, e[1].number))
            table = HEADER + "".join(row(*entry) for entry in entries)
            found = self.table.read_text(encoding="utf-8", errors="replace") if self.table.exists() else ""
            if found == table:
                return
            whole = found[: found.rfind("\n") + 1]  # a torn last line is ours
            if set(whole.splitlines()) - set(table.splitlines()):
                aside = self.table.with_name(f"results.tsv.{datetime.now(UTC):%Y%m%d-%H%M%S}.bak")
                aside.write_text(found, encoding="utf-8")
            write_whole(self.table, table)


def read_history(repo: Repo, tag: str = "*") -> list[tuple[str, Experiment]]:
    """Recorded experiments of one tag, or of all, in the order of their numbers."""
    history = []
    for ref, commit, text in repo.messages(f"{REFS}/{tag}/*"):
        try:
            history.append((commit, parse_message(text)))
        except ValueError as error:
            raise UserError(f"{ref} is {error}; `git update-ref -d {ref}` removes it") from None
    return sorted(history, key=lambda entry: entry[1].number)


def row(commit: str, experiment: Experiment) -> str:
    """One line of results.tsv: upstream's five columns, then ours. No number is 0 there, an unknown cost is empty."""
    e = experiment
    cells = (
        commit[:10],
        f"{e.val_bpb or 0:.6f}",
        f"{e.memory_gb or 0:.1f}",
        e.status,
        # a quote would make a reader of the table swallow the lines up to the next one
        " ".join(e.headline.replace('"', "'").split()),
        e.tag,
        f"{e.number}",
        f"{e.minutes:.1f}",
        "" if e.cost_usd is None else f"{e.cost_usd:.4f}",
        f"{e.lines}",
    )
    return "\t".join(cells) + "\n"


def append(table: Path, line: str) -> None:
    """Append a whole line and have it on disk; a torn last line is cut off first, since it would glue onto this one."""
    with table.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write((HEADER if not whole else "").encode() + line.encode())
        file.flush()
        os.fsync(file.fileno())
