"""git: the verbs on the person's checkout, and the trees that are made from it."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from autoresearch.files import make_accessible, remove
from autoresearch.task import MAX_FILE

# A hook or an alias that starts the loop exports GIT_DIR and its kin: they would lead to another
# repository. The names of a person, a program or a settings file stay.
KEPT = (
    "GIT_AUTHOR_", "GIT_COMMITTER_", "GIT_SSH", "GIT_SSL_", "GIT_EXEC_PATH", "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM",
)  # fmt: skip
# Hooks, signing keys and colours are for the person. Our commits are on disk before a ref names
# them.
SETTINGS = {
    "core.hooksPath": "/dev/null", "commit.gpgSign": "false", "core.quotePath": "false",
    "core.fsmonitor": "false", "core.sparseCheckout": "false", "core.splitIndex": "false",
    "core.fsync": "committed", "gc.auto": "0", "color.ui": "false", "checkout.workers": "4",
}  # fmt: skip
OPTIONS = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
OPTIONS += ["--no-optional-locks", "--no-replace-objects"]
Env = dict[str, str]
IDENTITY = {
    "GIT_AUTHOR_NAME": "autoresearch", "GIT_AUTHOR_EMAIL": "autoresearch@localhost",
    "GIT_COMMITTER_NAME": "autoresearch", "GIT_COMMITTER_EMAIL": "autoresearch@localhost",
}  # fmt: skip


class GitError(Exception):
    """A git command that failed, with everything it said."""

    def __init__(self, command: tuple[str, ...], code: int, out: str, err: str):
        verb = next((word for word in command if not word.startswith("-")), "")
        called = f"exit {code} of `git {' '.join(command)}`"
        super().__init__(f"git {verb}: {(err or out).strip()} ({called})")
        self.err = err


@dataclass(frozen=True)
class Repo:
    """The person's checkout. We read it, and add commits and refs of ours; its files, its index and
    its branches stay as they are."""

    tree: Path
    git_dir: Path
    common_dir: Path  # with the objects; differs from `git_dir` in a worktree

    @classmethod
    def at(cls, tree: Path) -> "Repo":
        """The repository that a directory is the top of; GitError when it is not."""
        asked = "--path-format=absolute --show-toplevel --git-dir --git-common-dir"
        found = run_git("-C", str(tree), "rev-parse", *asked.split()).splitlines()
        top, git_dir, common_dir = map(Path, found)
        if top != tree.resolve():
            raise GitError(("rev-parse",), 1, "", f"{tree} lies inside the repository {top}")
        return cls(top, git_dir, common_dir)

    def git(self, *args: str, stdin: str = "", env: Env | None = None) -> str:
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

    def messages(self, prefix: str) -> list[list[str]]:
        """[ref, commit, message] of every ref under a prefix, sorted by name."""
        form = "--format=%(refname)%00%(objectname)%00%(contents)%00%00"
        records = self.git("for-each-ref", form, prefix).split("\0\0")
        return [record.lstrip("\n").split("\0") for record in records if record.strip()]

    def refs(self, prefix: str) -> list[str]:
        """The names of the refs at or under a prefix, even of those that lead nowhere."""
        return self.git("for-each-ref", "--format=%(refname)", prefix).split()

    def succeeds(self, *args: str) -> bool:
        try:
            self.git(*args)
        except GitError:
            return False
        return True

    def show(self, commit: str, path: str) -> bytes:
        """A file's content in a commit; empty for none."""
        try:
            return read_blob(self.git_dir, f"{commit}:{path}")
        except GitError:
            return b""

    def blobs(self, commit: str) -> dict[str, str]:
        """Mode, kind and hash of each file in a commit."""
        entries = names(git_bytes(*self.where, "ls-tree", "-rz", "--full-tree", commit))
        return {path: facts for facts, _, path in (entry.partition("\t") for entry in entries)}

    def changed(self) -> list[str]:
        """The paths that differ from HEAD, or are not in it."""
        rows = self.git("status", "--porcelain", "--no-renames", "-z", "--untracked-files=all")
        return [row[3:] for row in rows.split("\0")[:-1]]

    def unknown(self) -> list[str]:
        """Files and whole folders that git does not know, ignored ones too."""
        command = ("ls-files", "-z", "--others", "--directory")
        return names(git_bytes(*self.where, *command, cwd=self.tree))

    def lines_changed(self, base: str, commit: str) -> dict[str, tuple[int, int]]:
        """Lines added to and removed from each file that differs; 0 for a binary file."""
        options = ("--numstat", "-z", "--no-renames", "--no-ext-diff", "--text")
        rows = names(git_bytes(*self.where, "diff", *options, base, commit, cwd=self.tree))
        counts = (row.split("\t", 2) for row in rows)
        return {path: (number(added), number(removed)) for added, removed, path in counts}

    # --- writing

    def commit_tree(self, text: str, tree: str, parent: str) -> str:
        command = ("commit-tree", "--no-gpg-sign", tree, "-p", parent)
        return self.git(*command, stdin=text, env=self.identity).strip()

    @cached_property
    def identity(self) -> dict[str, str]:
        """The person's name where git knows one, else the project's, by the environment alone."""
        if self.succeeds("config", "user.name") and self.succeeds("config", "user.email"):
            return {}
        return {name: os.environ.get(name, value) for name, value in IDENTITY.items()}

    def store(self, text: str) -> str:
        """Write a text as a blob, which only a ref keeps, and return its hash."""
        return self.git("hash-object", "-w", "--stdin", stdin=text).strip()

    def hide(self, *patterns: str) -> None:
        """Have git ignore files of ours, by a list that is not a file of the person's."""
        exclude = self.common_dir / "info/exclude"
        exclude.parent.mkdir(exist_ok=True)
        known = exclude.read_text(errors="replace").splitlines() if exclude.exists() else []
        if fresh := [pattern for pattern in patterns if pattern not in known]:
            with exclude.open("a") as file:
                file.write("\n".join(["", *fresh, ""]))  # the last line may have no end

    def unlock(self, *refs: str) -> None:
        """Remove the locks that a killed git left on refs of ours; a pattern may hold a `*`."""
        for ref in refs:
            for lock in self.common_dir.glob(f"{ref}.lock"):
                lock.unlink()

    def update_refs(self, *commands: str) -> None:
        """All of these commands of `git update-ref --stdin`, or none: GitError."""
        self.git("update-ref", "--stdin", stdin="".join(f"{command}\n" for command in commands))


@dataclass
class AgentTree:
    """An agent's working tree: a repository of its own that shares the checkout's objects and
    nothing else, made anew for each call.

    Whatever the agent does to its `.git`, to hooks, filters or settings has no effect: we look at
    its files through an index of our own and the checkout's settings.
    """

    checkout: Repo
    path: Path
    index: bytes = b""  # as it was handed out: the agent can reach the file

    def hand_out(self, commit: str) -> None:
        """Put the files of a commit there, and nothing else."""
        remove(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # `git clone --shared` would leave a remote to push to, and ask whose repository that is
        form = "sha256" if len(commit) == 64 else "sha1"
        run_git("init", "--quiet", "--template=", f"--object-format={form}", str(self.path))
        alternates = self.path / ".git/objects/info/alternates"
        alternates.parent.mkdir(exist_ok=True)
        alternates.write_text(f"{self.checkout.common_dir / 'objects'}\n")
        shallow = self.checkout.common_dir / "shallow"  # the ends of a shallow clone's history
        if shallow.exists():
            shutil.copy(shallow, self.path / ".git/shallow")
        self.index = checkout_tree(self.checkout.git_dir, commit, self.path)
        (self.path / ".git/HEAD").write_text(f"{commit}\n")
        shutil.copy(self.path.with_name("index"), self.path / ".git/index")

    def discard(self) -> None:
        """Remove it now, since it may fill the disk."""
        remove(self.path)

    def changed(self) -> list[str]:
        """All paths edited, deleted or new since they were handed out; none of a lost tree."""
        if self.path.is_symlink() or not self.path.is_dir():
            return []
        new = ("--others", "--exclude-standard")
        return changed_files(self.checkout.git_dir, self.path, self.index, *new)

    def commit(self, text: str, parent: str, paths: Iterable[str]) -> str:
        """Make a commit on `parent`: the files handed out, and these as they are now."""
        git_dir, listed = self.checkout.git_dir, b"\0".join(os.fsencode(path) for path in paths)
        named = ("--literal-pathspecs", "add", "--all", "--force", "--pathspec-file-nul")
        tree_git(git_dir, self.path, *named, "--pathspec-from-file=-", stdin=listed)
        tree = tree_git(git_dir, self.path, "write-tree").decode().strip()
        return self.checkout.commit_tree(text, tree, parent)

    def has(self, path: str) -> bool:
        return os.path.lexists(self.path / path)

    def read(self, path: str) -> bytes | None:
        """The content of a plain file of a bounded length, else None."""
        file = self.path / path
        plain = file.is_file() and not file.is_symlink() and file.stat().st_size <= MAX_FILE
        return file.read_bytes() if plain else None


@lru_cache(maxsize=8)  # the incumbent's file is asked for again and again
def read_blob(git_dir: Path, name: str) -> bytes:
    return git_bytes(f"--git-dir={git_dir}", "cat-file", "blob", name)


def number(cell: str) -> int:
    return int(cell) if cell.isdecimal() else 0


def names(out: bytes) -> list[str]:
    """The records of an output with -z; a name that is not UTF-8 stays the name of its file."""
    return [os.fsdecode(record) for record in out.split(b"\0")[:-1]]


def tree_git(git_dir: Path, tree: Path, *args: str, stdin: bytes = b"") -> bytes:
    """Run git on a tree, as a repository sees it through the index beside that tree."""
    where, index = (f"--git-dir={git_dir}", f"--work-tree={tree}"), tree.with_name("index")
    return git_bytes(*where, *args, stdin=stdin, env={"GIT_INDEX_FILE": str(index)}, cwd=tree)


def checkout_tree(git_dir: Path, commit: str, tree: Path) -> bytes:
    """Write the files of a commit, filters applied. Returns the index with their state."""
    tree.mkdir(parents=True, exist_ok=True)
    for name in ("index", "index.lock"):  # a killed git leaves the second
        remove(tree.with_name(name))
    tree_git(git_dir, tree, "read-tree", "--reset", "-u", commit)
    return tree.with_name("index").read_bytes()


def changed_files(git_dir: Path, tree: Path, index: bytes, *options: str) -> list[str]:
    """Paths of a tree that differ from its index, which lies beside it as it was, whatever a
    program has made of that file. The options are of `git ls-files`."""
    make_accessible(tree)
    remove(tree.with_name("index"))
    tree.with_name("index").write_bytes(index)
    out = tree_git(git_dir, tree, "ls-files", "-z", "--modified", "--deleted", *options)
    return sorted({*names(out)})


def run_git(*args: str, stdin: str = "", env: Env | None = None, cwd: Path | None = None) -> str:
    told = stdin.encode(errors="replace")
    return git_bytes(*args, stdin=told, env=env, cwd=cwd).decode(errors="replace")


def git_bytes(
    *args: str, stdin: bytes = b"", env: Env | None = None, cwd: Path | None = None
) -> bytes:
    """The output of a git command; GitError."""
    foreign = [name for name in os.environ if name.startswith("GIT_") and not name.startswith(KEPT)]
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        ["git", *OPTIONS, *args],
        input=stdin,
        capture_output=True,
        env={**kept, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8", **(env or {})},
        cwd=cwd,
        check=False,
        start_new_session=True,  # Ctrl-C is for us: git finishes its work
    )
    if done.returncode:
        out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        raise GitError(args, done.returncode, out, err)
    return done.stdout
