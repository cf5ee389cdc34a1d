"""The one door to git: the verbs on the person's checkout, and the trees that are made from it."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from autoresearch.files import make_accessible, remove

# A hook or an alias that starts the loop exports GIT_DIR and its kin: obeying them would work on another repository.
# What names a person, a program or a file of settings stays.
KEPT = ("GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_SSH", "GIT_SSL_", "GIT_EXEC_PATH", "GIT_CONFIG_GLOBAL",
        "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")  # fmt: skip
# Hooks, signing keys and colours are for the person; our commits are on disk before a ref says so (core.fsync).
OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false", "-c", "core.quotePath=false",
           "-c", "core.fsmonitor=false", "-c", "core.sparseCheckout=false", "-c", "core.fsync=committed",
           "-c", "core.splitIndex=false",
           "-c", "gc.auto=0", "-c", "color.ui=false", "--no-optional-locks", "--no-replace-objects")  # fmt: skip
IDENTITY = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "autoresearch"), ("EMAIL", "autoresearch@localhost"))}  # fmt: skip
MAX_PROGRAM = 1_000_000  # bytes of train.py


class GitError(Exception):
    """A git command that failed, with everything it said."""

    def __init__(self, command: tuple[str, ...], code: int, out: str, err: str):
        verb = next((word for word in command if not word.startswith("-")), "")
        super().__init__(f"git {verb}: {(err or out).strip()} (exit {code} of `git {' '.join(command)}`)")
        self.err = err


@dataclass(frozen=True)
class Repo:
    """The person's checkout: read, and given commits and refs of ours; files, index and branches of theirs stay."""

    tree: Path
    git_dir: Path
    common_dir: Path  # which holds the objects; another one than `git_dir` where this is a worktree

    @classmethod
    def at(cls, tree: Path) -> "Repo":
        """The repository that a directory is the top of; GitError when it is not."""
        ask = ("rev-parse", "--path-format=absolute", "--show-toplevel", "--git-dir", "--git-common-dir")
        top, git_dir, common_dir = (Path(line) for line in run_git("-C", str(tree), *ask).splitlines())
        if top != tree.resolve():
            raise GitError(("rev-parse",), 1, "", f"{tree} lies inside the repository {top}")
        return cls(top, git_dir, common_dir)

    def git(self, *args: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
        return run_git(*self.where, *args, stdin=stdin, env=env, cwd=self.tree)

    @property
    def where(self) -> tuple[str, ...]:
        return f"--git-dir={self.git_dir}", f"--work-tree={self.tree}"

    # --- reading

    def resolve(self, name: str) -> str | None:
        """The commit that a name stands for, or None."""
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
        except GitError:
            return None

    def messages(self, prefix: str) -> list[tuple[str, str, str]]:
        """(ref, commit, message) of every ref under a prefix, sorted by name."""
        out = self.git("for-each-ref", "--format=%(refname)%00%(objectname)%00%(contents)%00%00", prefix)
        records = [record.lstrip("\n").split("\0") for record in out.split("\0\0") if record.strip()]
        return [(ref, commit, text) for ref, commit, text in records]

    def refs(self, prefix: str) -> list[str]:
        """The names of the refs at or under a prefix, whether or not they stand for something."""
        return self.git("for-each-ref", "--format=%(refname)", prefix).split()

    def holds(self, commit: str, path: str) -> bool:
        """Whether a commit has a file of that name."""
        return self.succeeds("cat-file", "-e", f"{commit}:{path}")

    def contains(self, commit: str, ancestor: str) -> bool:
        """Whether the history of `commit` includes `ancestor`; each includes itself."""
        return self.succeeds("merge-base", "--is-ancestor", ancestor, commit)

    def allows(self, ref: str) -> bool:
        """Whether git would take this for the name of a ref."""
        return self.succeeds("check-ref-format", ref)

    def head_branch(self) -> str:
        """The full name of the branch that HEAD is on, empty when it is on none."""
        return self.git("symbolic-ref", "HEAD").strip() if self.succeeds("symbolic-ref", "--quiet", "HEAD") else ""

    def succeeds(self, *args: str) -> bool:
        try:
            self.git(*args)
        except GitError:
            return False
        return True

    def show(self, commit: str, path: str) -> bytes:
        """A file's content in a commit."""
        return git_bytes(*self.where, "cat-file", "blob", f"{commit}:{path}")

    def dirty(self, *paths: str) -> list[str]:
        """Those of the paths that differ from HEAD, untracked ones included."""
        out = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *paths)
        return [entry[3:] for entry in out.split("\0") if entry]

    def lines_changed(self, base: str, commit: str, path: str) -> tuple[int, int]:
        """Lines added to and removed from a file between two commits."""
        out = self.git("diff", "--numstat", "--no-renames", "--no-ext-diff", "--text", base, commit, "--", path).split()
        added, removed = (int(count) if count.isdecimal() else 0 for count in (out or ("0", "0"))[:2])  # "-" is binary
        return added, removed

    # --- writing

    def commit_tree(self, text: str, tree: str, parent: str) -> str:
        command = ("commit-tree", "--no-gpg-sign", tree, "-p", parent)
        return self.git(*command, stdin=text, env=self.identity).strip()

    @cached_property
    def identity(self) -> dict[str, str]:
        """The person's name where git knows one, else the project's; by the environment, never by git's settings."""
        if self.succeeds("config", "user.name") and self.succeeds("config", "user.email"):
            return {}
        return {name: os.environ.get(name, value) for name, value in IDENTITY.items()}

    def store(self, text: str) -> str:
        """Write a text as a blob and return its hash; nothing keeps it but a ref."""
        return self.git("hash-object", "-w", "--stdin", stdin=text).strip()

    def unlock(self, *refs: str) -> None:
        """Remove the locks that a killed git left on refs which nobody else writes; a pattern may hold a `*`."""
        for lock in (lock for ref in refs for lock in self.common_dir.glob(f"{ref}.lock")):
            lock.unlink()

    def update_refs(self, *commands: str) -> None:
        """All of these commands of `git update-ref --stdin`, or none: GitError."""
        self.git("update-ref", "--stdin", stdin="".join(f"{command}\n" for command in commands))


@dataclass(frozen=True)
class AgentTree:
    """An agent's working tree: a repository of its own that shares the checkout's objects and nothing else, made anew
    for each call.

    Whatever the agent does to its `.git`, to hooks, filters or settings has no effect: we see what it changed through
    an index of our own and the checkout's settings, and its files alone reach the checkout.
    """

    checkout: Repo
    path: Path
    index: Path

    def hand_out(self, commit: str) -> None:
        """Put the files of a commit there, and nothing else."""
        remove(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # what `git clone --shared` makes, but without a remote to push to, or its question whose repository that is
        form = "sha256" if len(commit) == 64 else "sha1"
        run_git("init", "--quiet", "--template=", f"--object-format={form}", str(self.path))
        alternates = self.path / ".git/objects/info/alternates"
        alternates.parent.mkdir(exist_ok=True)
        alternates.write_text(f"{self.checkout.common_dir / 'objects'}\n")
        shallow = self.checkout.common_dir / "shallow"  # where the history of a shallow clone ends
        if shallow.exists():
            shutil.copy(shallow, self.path / ".git/shallow")
        checkout_tree(self.checkout.git_dir, commit, self.path, self.index)
        (self.path / ".git/HEAD").write_text(f"{commit}\n")
        shutil.copy(self.index, self.path / ".git/index")

    def discard(self) -> None:
        """Remove it: a full disk must not wait for the next call."""
        remove(self.path)

    def changed(self) -> list[str]:
        """Every path that differs from what was handed out: edited, deleted, new. A tree that is gone says nothing."""
        if self.path.is_symlink() or not self.path.is_dir():
            return []
        return changed_files(self.checkout.git_dir, self.path, self.index, "--others", "--exclude-standard")

    def commit(self, text: str, parent: str, path: str) -> str:
        """Make a commit of `parent` with what was handed out and this file as it is now; no branch moves."""
        self.git("add", "--force", "--", path)
        return self.checkout.commit_tree(text, self.git("write-tree").strip(), parent)

    def read(self, path: str) -> bytes | None:
        """A plain file that is no longer than a program; None for anything else."""
        file = self.path / path
        plain = file.is_file() and not file.is_symlink() and file.stat().st_size <= MAX_PROGRAM
        return file.read_bytes() if plain else None

    def git(self, *args: str) -> str:
        return tree_git(self.checkout.git_dir, self.path, self.index, *args)


def tree_git(git_dir: Path, tree: Path, index: Path, *args: str) -> str:
    """Run git on a tree as a repository sees it through an index that is not the repository's."""
    where = f"--git-dir={git_dir}", f"--work-tree={tree}"
    return run_git(*where, *args, env={"GIT_INDEX_FILE": str(index)}, cwd=tree)


def checkout_tree(git_dir: Path, commit: str, tree: Path, index: Path) -> None:
    """Write the files of a commit, filters applied as in any checkout, into a folder, and what they were into an
    index."""
    tree.mkdir(parents=True, exist_ok=True)
    for old in (index, index.with_name(f"{index.name}.lock")):  # the second by a git that was killed
        old.unlink(missing_ok=True)
    tree_git(git_dir, tree, index, "read-tree", "--reset", "-u", commit)


def changed_files(git_dir: Path, tree: Path, index: Path, *also: str) -> list[str]:
    """Paths of a tree that are not what an index says of them; `also` are options of `git ls-files`."""
    make_accessible(tree)
    out = tree_git(git_dir, tree, index, "ls-files", "-z", "--modified", "--deleted", *also)
    return sorted({path for path in out.split("\0") if path})


def run_git(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    return git_bytes(*args, stdin=stdin, env=env, cwd=cwd).decode(errors="replace")


def git_bytes(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> bytes:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name.startswith(KEPT)}
    environment = kept | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8", **(env or {})}
    done = subprocess.run(
        ["git", *OPTIONS, *args],
        input=stdin.encode(errors="replace"),
        capture_output=True,
        env=environment,
        cwd=cwd,
        check=False,
        start_new_session=True,  # Ctrl-C is for us: git finishes what it is at
    )
    if done.returncode:
        out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        raise GitError(args, done.returncode, out, err)
    return done.stdout
