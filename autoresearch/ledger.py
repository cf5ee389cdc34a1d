"""The experiment history: git refs and trailers are the truth, results.tsv is their projection."""

import fcntl
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from autoresearch.git import GitError, Repo
from autoresearch.process import sweep, uninterrupted
from autoresearch.records import Dropped, Event, Experiment, Mended, UserError, message, parse_message

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\ttag\texperiment\tminutes\tcost_usd\tlines\n"
LOCK = "lock"  # in a run's folder
REFS = "refs/autoresearch"
PROGRAMS = "refs/autoresearch-program"  # every program.md that was ever in force


class Ledger:
    """What one tag has: its record, its branch, its folder with the worktree. `history` holds (commit, experiment),
    oldest first, once `reload` has read it; the baseline is its first. What had to be mended is shown."""

    def __init__(self, checkout: Repo, tag: str, show: Callable[[Event], None]):
        self.checkout = checkout
        self.tag = tag
        self.show = show
        self.branch = f"autoresearch/{tag}"
        self.folder = checkout.tree / "runs" / tag
        self.lock = self.folder / LOCK
        self.in_flight = self.folder / "in-flight"
        self.table = checkout.tree / "results.tsv"
        self.history: list[tuple[str, Experiment]] = []
        files = (checkout.common_dir / "config", checkout.git_dir / "HEAD", checkout.common_dir / "packed-refs")
        self.git_files = {path: path.read_bytes() for path in files if path.exists()}

    def is_new(self) -> bool:
        return not self.checkout.refs(f"{REFS}/{self.tag}") and all(tag != self.tag for _, tag, _ in self.rows())

    def rows(self) -> list[tuple[str, str, str]]:
        """Commit, tag and number of the rows of results.tsv, as they stand there."""
        table = self.table.read_text(encoding="utf-8", errors="replace") if self.table.exists() else ""
        rows = [line.split("\t") for line in table.splitlines()[1:]]
        return [(row[0], row[5], row[6]) for row in rows if len(row) == HEADER.count("\t") + 1]

    def reload(self) -> None:
        """Read the record again. A ref that was lost or damaged is made again from the commit that results.tsv has of
        it. Another tag without any ref was removed by a person, and stays removed."""
        git = self.checkout
        broken = git.discard_broken(REFS)
        git.discard_broken(f"refs/heads/{self.branch}")  # it follows from the record
        present = set(git.refs(REFS))
        tags = {self.tag, *(ref.split("/")[2] for ref in present.union(broken))}
        for commit, tag, number in self.rows():
            ref = f"{REFS}/{tag}/{number.zfill(4)}"
            if tag in tags and ref not in present and git.allows(ref) and is_experiment(git, commit, tag, number):
                git.create(ref, git.resolve(commit) or commit)
                self.show(Mended(f"{ref} was lost or damaged: made again from the commit in results.tsv"))
        found = read_history(git, self.tag)
        if self.history and not found:
            raise UserError(f"the record of {self.tag} is gone from git while it runs, and results.tsv has not got it")
        self.history = found

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

    def worktree(self) -> Repo:
        """Open the worktree, made again if somebody broke it, and without the locks of a git that was killed. Where git
        itself does not work any more, its own files are what they were at the start."""
        self.checkout.unlock(f"refs/heads/{self.branch}", f"{REFS}/{self.tag}/*")
        if not self.checkout.works():
            self.put_back()
        try:
            return self.open_tree()
        except GitError:
            self.put_back()
            for ref in self.checkout.clear(self.branch):
                self.show(Mended(f"{ref} was in the way: put aside"))
            return self.open_tree()

    def put_back(self) -> None:
        for path, content in self.git_files.items():
            if self.checkout.put_back(path, content):
                self.show(Mended(f"{path} was damaged: put back as it was at the start, what it was beside it"))

    def open_tree(self) -> Repo:
        tree = self.checkout.worktree(self.folder / "tree", self.branch, self.base)
        tree.git("update-ref", f"refs/heads/{self.branch}", self.base)
        return tree

    def stand(self) -> None:
        """Put branch and worktree on the base, and remove everything else from the tree."""
        self.worktree().reset(self.branch, self.base)

    def now(self) -> str:
        """The time of day, but never earlier than the last record's: a clock set back must not reorder results.tsv."""
        time = datetime.now(UTC)
        if self.history:
            last = datetime.fromisoformat(self.history[-1][1].finished)
            time = max(time, last + timedelta(microseconds=1))
        return time.isoformat(timespec="microseconds")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold results.tsv, and let no signal in: between the ref and its row nothing but SIGKILL can come."""
        with uninterrupted(), locked(self.table):
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
        self.checkout.create(f"{REFS}/{self.tag}/{experiment.number:04d}", final)
        entry = (final, written)
        self.history.append(entry)
        append(self.table, row(*entry))
        return final

    def reconcile(self) -> None:
        """Make processes, branch, worktree and results.tsv agree with the refs. This is how a run resumes."""
        sweep(self.folder)
        self.reload()
        tip = self.checkout.resolve(f"refs/heads/{self.branch}")
        commits = {commit for commit, _ in self.history}
        expected = tip is None or self.checkout.contains(self.base, tip) or tip in commits
        if not expected and not self.in_flight.exists():
            raise UserError(
                f"the branch {self.branch} has commits that are no experiments: keep them with "
                f"`git branch mine {tip}`, then `git update-ref -d refs/heads/{self.branch}`"
            )
        self.stand()
        if tip and not expected:
            self.show(Dropped(tip))
        self.in_flight.unlink(missing_ok=True)
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
            fresh = self.table.with_name("results.tsv.new")
            fresh.write_text(table, encoding="utf-8")
            fresh.replace(self.table)


def read_history(repo: Repo, tag: str = "*") -> list[tuple[str, Experiment]]:
    """Recorded experiments of one tag, or of all, in the order of their numbers."""
    history = []
    for ref, commit, text in repo.messages(f"{REFS}/{tag}/*"):
        try:
            history.append((commit, parse_message(text)))
        except ValueError as error:
            raise UserError(f"{ref} is {error}; `git update-ref -d {ref}` removes it") from None
    return sorted(history, key=lambda entry: entry[1].number)


def is_experiment(repo: Repo, commit: str, tag: str, number: str) -> bool:
    try:
        found = parse_message(repo.message(commit))
    except (GitError, ValueError):
        return False
    return (found.tag, str(found.number)) == (tag, number)


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


@contextmanager
def locked(table: Path) -> Iterator[None]:
    """Hold the table: drivers of other tags write it too. The lock is a file of its own, as the table is replaced."""
    path = table.parent / "runs" / "results.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
