"""The history of a study: git refs are the truth, and results.tsv is made from them."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from autoresearch.files import CODE, UserError, uninterrupted, waiting_lock, write_whole
from autoresearch.journal.experiment import OLD, Experiment, best_of, exact, message, parse_message
from autoresearch.journal.git import Repo
from autoresearch.task import COLUMNS, Task

TABLE = "results.tsv"
FOLDER = ".autoresearch"  # of a driven repository; a `runs` there might be taken for its own
LOCK = "lock"  # in a run's folder
REFS = "refs/autoresearch"
PROGRAMS = "refs/autoresearch-program"  # every program.md and every task that was ever in force
FORMULA = ("=", "+", "-", "@")  # what a cell begins with that a spreadsheet computes


class Record:
    """What a study has found so far, in the order of the verdicts, and what follows from that."""

    def __init__(self, start: str):
        self.start = start  # the commit that the baseline is made of
        self.experiments: list[Experiment] = []

    @property
    def tried(self) -> dict[str, Experiment]:
        """The first experiment of each program, by its fingerprint. A run that was killed says
        little of its program, so that one may run again."""
        done = [e for e in reversed(self.experiments) if not e.crash.startswith("killed")]
        return {e.change.source: e for e in done if e.change.source}

    @property
    def next_number(self) -> int:
        return self.experiments[-1].number + 1 if self.experiments else 0

    @property
    def kept(self) -> list[Experiment]:
        return [e for e in self.experiments if e.verdict == "keep"]

    @property
    def base(self) -> str:
        """The commit that the next experiment starts from: the last one kept, or the start."""
        return self.kept[-1].commit if self.kept else self.start

    @property
    def incumbent_scores(self) -> Mapping[int, float]:
        """By seed; the first is the one that every idea runs with."""
        return self.kept[-1].scores if self.kept else {}

    @property
    def new_seed(self) -> int:
        """One that nothing has run with."""
        return 1 + max(seed for e in self.experiments for seed in (e.seed, *e.scores))

    @property
    def dry(self) -> int:
        """Experiments since the last keep."""
        return self.next_number - 1 - self.kept[-1].number if self.kept else 0

    @property
    def best(self) -> Experiment | None:
        """The best ever kept; a tie that was kept later is a little worse."""
        return best_of(self.kept)

    def now(self) -> str:
        """The time, or just after the last record: a clock set back must not reorder rows."""
        time = datetime.now(UTC)
        if self.experiments:
            last = datetime.fromisoformat(self.experiments[-1].finished)
            time = max(time, last + timedelta(microseconds=1))
        return time.isoformat(timespec="microseconds")


class Journal(Record):
    """The record of one tag, which `reconcile` reads first, its branch, its folder."""

    def __init__(self, checkout: Repo, tag: str, task: Task):
        super().__init__(checkout.resolve("HEAD") or "")
        self.checkout = checkout
        self.tag = tag
        self.task = task
        self.branch = f"autoresearch/{tag}"
        self.folder = runs_of(checkout.tree) / tag
        self.lock = self.folder / LOCK
        self.alive = self.folder / "alive"  # the lock that every job of the tag shares
        self.table = checkout.tree / TABLE
        self.blobs: dict[str, str] = {}  # of the texts that were stored

    @property
    def header(self) -> str:
        first, *others = COLUMNS
        return "\t".join([first, self.task.metric, *others]) + "\n"

    def store(self, text: str) -> str:
        """The blob of a text, a program.md or a task."""
        if text not in self.blobs:
            self.blobs[text] = self.checkout.store(text)
        return self.blobs[text]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold results.tsv, and defer signals: only SIGKILL can come between a ref and its row."""
        with uninterrupted(), waiting_lock(self.folder.parent / "results.lock"):
            yield

    def record(self, experiment: Experiment, parent: str, commit: str) -> Experiment:
        """Make the files of `commit` a child of `parent` with the experiment's trailers,
        permanently. Returns what git holds of it now. To be called within `writing`.

        The ref is the moment of truth: before it nothing has happened, after it all can be mended.
        """
        # hold the record as it reads from git, so that a row made again later is the same
        text = message(experiment)
        final = self.checkout.commit_tree(text, f"{commit}^{{tree}}", parent)
        written = replace(parse_message(text), commit=final)
        keep, blobs = experiment.verdict == "keep", (experiment.program, experiment.task)
        self.checkout.update_refs(
            f"create {REFS}/{self.tag}/{experiment.number:04d} {final}",
            *(f"update {PROGRAMS}/{blob} {blob}" for blob in blobs if blob),
            *([f"update refs/heads/{self.branch} {final}"] if keep else []),
        )
        self.experiments.append(written)
        append(self.table, self.header, row(written))
        return written

    def reconcile(self) -> None:
        """Read the history, and make branch and results.tsv agree with it: the way to resume. Waits
        until the jobs of a driver that died are gone."""
        with waiting_lock(self.alive):
            pass
        self.experiments = read_history(self.checkout, self.tag)
        branch = f"refs/heads/{self.branch}"
        self.checkout.unlock(branch, f"{REFS}/{self.tag}/*")
        tip = self.checkout.resolve(branch)
        if tip and not self.checkout.succeeds("merge-base", "--is-ancestor", tip, self.base):
            raise UserError(
                f"the branch {self.branch} has commits that are no experiments: keep them with "
                f"`git branch mine {tip}`, then `git update-ref -d {branch}`"
            )
        self.checkout.update_refs(f"update {branch} {self.base}")
        self.rebuild()

    def rebuild(self) -> None:
        """Make results.tsv what the refs of all tags say; put lines of another origin aside."""
        with self.writing():
            self.checkout.unlock(f"{PROGRAMS}/*")
            all_tags = read_history(self.checkout)
            all_tags.sort(key=lambda e: (e.finished, e.tag, e.number))
            table = self.header + "".join(map(row, all_tags))
            found = ""
            if self.table.exists():
                found = self.table.read_text(encoding="utf-8", errors="replace")
            if found == table:
                return
            whole = found[: found.rfind("\n") + 1]  # a torn last line is ours
            known = {*table.splitlines()}
            if [line for line in whole.splitlines()[1:] if line not in known]:
                aside = f"results.tsv.{datetime.now(UTC):%Y%m%d-%H%M%S}.bak"
                shutil.copy(self.table, self.table.with_name(aside))
            write_whole(self.table, table)


def runs_of(root: Path) -> Path:
    """The folder of all runs in a repository."""
    return root / ("runs" if root == CODE else FOLDER)


def read_history(repo: Repo, tag: str = "*") -> list[Experiment]:
    """The experiments of one tag, or of all, in the order of their numbers."""
    history = []
    for ref, commit, text in repo.messages(f"{REFS}/{tag}/*"):
        try:
            history.append(replace(parse_message(text), commit=commit))
        except ValueError as error:
            raise UserError(f"{ref} is {error}; `git update-ref -d {ref}` removes it") from None
    return sorted(history, key=lambda e: e.number)


def row(e: Experiment) -> str:
    """One line of results.tsv: upstream's five columns, then ours. A crash of upstream's task
    scores 0, as upstream has it; what is unknown is empty."""
    cost, nothing = e.usage.cost_usd, exact(OLD, 0.0) if e.goal == OLD else ""
    cells = (
        e.commit[:10],
        nothing if e.score is None else exact(e.goal, e.score),
        f"{e.facts.get('memory_gb', 0):.1f}",
        e.verdict,
        # a quote would make a reader of the table swallow the lines up to the next one
        as_text(" ".join(e.headline.replace('"', "'").split())),
        e.tag,
        str(e.number),
        f"{e.minutes:.1f}",
        "" if cost is None else f"{cost:.4f}",
        str(e.change.lines),
    )
    return "\t".join(cells) + "\n"


def as_text(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula.

    >>> as_text("-1 layer"), as_text("a layer less")
    ("'-1 layer", 'a layer less')
    """
    return f"'{cell}" if cell.startswith(FORMULA) else cell


def from_text(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell.startswith(FORMULA, 1) else cell


def append(table: Path, header: str, line: str) -> None:
    """Append a whole line and have it on disk. A torn last line is cut off first."""
    with table.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write((header if not whole else "").encode() + line.encode())
        file.flush()
        os.fsync(file.fileno())
