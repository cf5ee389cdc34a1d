"""The one door to git: the verbs on one working tree."""

import os
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A hook or an alias that starts the loop exports GIT_DIR and its kin; obeying them would work on another repository.
FOREIGN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX",
           "GIT_NAMESPACE", "GIT_CEILING_DIRECTORIES", "GIT_CONFIG_PARAMETERS", "GIT_CONFIG_COUNT")  # fmt: skip
# Hooks and signing keys are for the commits of the user; ours are on disk before a ref says so (core.fsync).
OPTIONS = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false", "-c", "core.quotePath=false",
           "-c", "core.fsmonitor=false", "-c", "core.sparseCheckout=false", "-c", "core.fsync=committed",
           "-c", "gc.auto=0", "--no-optional-locks", "--no-replace-objects")  # fmt: skip
IDENTITY = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "autoresearch"), ("EMAIL", "autoresearch@localhost"))}  # fmt: skip

MAX_FILE = 100_000_000  # bytes of a file of the tree that are read at all


class GitError(Exception):
    """A git command that failed, with everything it said."""

    def __init__(self, command: tuple[str, ...], code: int, out: str, err: str):
        verb = next((word for word in command if not word.startswith("-")), "")
        super().__init__(f"git {verb}: {(err or out).strip()} (exit {code} of `git {' '.join(command)}`)")
        self.code = code
        self.err = err


@dataclass(frozen=True)
class Repo:
    """One working tree. `git_dir` and `tree` are given to git in so many words, so that nothing in the tree can
    point it elsewhere; `common_dir` is what worktrees share."""

    tree: Path
    git_dir: Path
    common_dir: Path

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

    def message(self, commit: str) -> str:
        return self.git("log", "-1", "--format=%B", commit)

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

    def blob(self, commit: str, path: str) -> str:
        """The hash of a file's content in a commit."""
        return self.git("rev-parse", f"{commit}:{path}").strip()

    def store(self, text: str, refs: str) -> str:
        """Keep a text as a blob, for ever by a ref of its own under `refs`, and return its hash."""
        blob = self.git("hash-object", "-w", "--stdin", stdin=text).strip()
        self.git("update-ref", f"{refs}/{blob}", blob)
        return blob

    def show(self, commit: str, path: str) -> bytes:
        """A file's content in a commit."""
        return git_bytes(*self.where, "cat-file", "blob", f"{commit}:{path}")

    def dirty(self, *paths: str) -> list[str]:
        """Those of the paths that differ from HEAD, untracked ones included."""
        out = self.git("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", *paths)
        return [entry[3:] for entry in out.split("\0") if entry]

    def blobs(self, commit: str) -> dict[str, tuple[str, int]]:
        """Hash and size of each plain file of a commit."""
        entries = [entry.split("\t", 1) for entry in self.git("ls-tree", "-r", "-l", "-z", commit).split("\0") if entry]
        plain = (entry for entry in entries if entry[0].startswith("100") and not {"\n", "\ufffd"} & set(entry[1]))
        return {path: (facts.split()[2], int(facts.split()[3])) for facts, path in plain}

    def altered(self, commit: str) -> list[tuple[str, str]]:
        """(path, blob) of each file of a commit that is not in the tree byte for byte, whatever filters git applies."""
        blobs = self.blobs(commit)
        # by size first, since hashing a file that somebody blew up to a terabyte would take the night
        present = [path for path, (_, size) in blobs.items() if size_of(self.tree / path) == size]
        names = "".join(f"{path}\n" for path in present)
        found = self.git("hash-object", "--no-filters", "--stdin-paths", stdin=names).split()
        same = {path for path, blob in zip(present, found, strict=True) if blobs[path][0] == blob}
        return [(path, blob) for path, (blob, _) in blobs.items() if path not in same]

    def lines_changed(self, base: str, commit: str, path: str) -> tuple[int, int]:
        """Lines added to and removed from a file between two commits."""
        out = self.git("diff", "--numstat", "--no-renames", "--no-ext-diff", "--text", base, commit, "--", path).split()
        added, removed = (int(count) if count.isdecimal() else 0 for count in (out or ("0", "0"))[:2])  # "-" is binary
        return added, removed

    # --- the worktree

    def worktree(self, path: Path, branch: str, start: str) -> "Repo":
        """Open the worktree at `path` on `branch`; made, or made again, at `start` where it is missing or broken."""
        own = read_worktree(path, self.common_dir)
        if own is None:
            remove_tree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.forget_moved(branch)
            self.succeeds("worktree", "remove", "--force", "--force", str(path))  # what git remembers, even if locked
            self.git("worktree", "add", "--quiet", "--force", "-B", branch, str(path), start)
            own = read_worktree(path, self.common_dir)
        assert own is not None
        for lock in own.git_dir.glob("*.lock"):
            lock.unlink()  # left by a git that was killed
        return own

    def forget_moved(self, branch: str) -> None:
        """Drop what git remembers of worktrees on a branch that are not there, say since the project was moved."""
        for entry in (self.common_dir / "worktrees").glob("*"):
            with suppress(OSError):
                link = Path((entry / "gitdir").read_text().strip())
                if (entry / "HEAD").read_text().strip() == f"ref: refs/heads/{branch}" and (
                    not link.is_file() or link.read_text().strip() != f"gitdir: {entry}"
                ):
                    remove_tree(entry)

    def works(self) -> bool:
        """Whether git still takes this for the repository that it was."""
        try:
            return Repo.at(self.tree) == self
        except GitError:
            return False

    def put_back(self, path: Path, content: bytes) -> bool:
        """Give a file of git's own folder the content that it had, if it is damaged; what it has now is put aside.
        Returns whether it was."""
        if not self.is_damaged(path):
            return False
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_bytes(content)
        if path.exists():
            path.rename(path.with_name(f"{path.name}-aside-{time.time_ns()}"))
        fresh.rename(path)
        return True

    def is_damaged(self, path: Path) -> bool:
        """Whether git cannot use its `config`, `HEAD` or `packed-refs`, or is told there that this is no working
        tree."""
        if not path.is_file():
            return True
        if path.name == "packed-refs":  # judged by itself: git also fails for a single ref of somebody's
            return not re.fullmatch(rb"((#.*|\^[0-9a-f]{40,64}|[0-9a-f]{40,64} refs/\S+)\n)+", path.read_bytes())
        if path.name == "HEAD":
            return not re.match(r"ref: refs/|[0-9a-f]{40}", path.read_text(errors="replace"))
        try:
            settings = run_git("config", "--file", str(path), "--list", env={"GIT_CONFIG_GLOBAL": os.devnull})
        except GitError:
            return True
        return bool(re.search(r"^core\.(bare=true|worktree=)", settings, re.MULTILINE))

    def clear(self, branch: str) -> list[str]:
        """Put aside what stands in the way of a branch, and name it: a ref that is broken, branches below its name, or
        one that is called as the first part of it."""
        broken = self.discard_broken(f"refs/heads/{branch}")
        above = f"refs/heads/{branch.partition('/')[0]}"
        ways = [entry for entry in self.messages(above) if entry[0] == above] + self.messages(f"refs/heads/{branch}/")
        for ref, commit, _ in ways:
            aside = f"refs/autoresearch-aside/{time.time_ns()}/{ref.removeprefix('refs/heads/')}"
            self.git("update-ref", aside, commit)
            self.git("update-ref", "-d", ref)
        return broken + [ref for ref, _, _ in ways]

    def unlock(self, *refs: str) -> None:
        """Remove what a killed git left of its locks on refs that nobody else writes; a pattern may hold a `*`."""
        for lock in (lock for ref in refs for lock in self.common_dir.glob(f"{ref}.lock")):
            lock.unlink()

    def discard_broken(self, prefix: str) -> list[str]:
        """Remove the refs at or under a prefix that stand for no object, so that they can be made again. git itself
        refuses to touch them. Returns their names."""
        if not self.works():  # or a git that fails for another reason would make every ref look broken
            return []
        top = self.common_dir / prefix
        files = [
            file for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file() and file.suffix != ".lock"
        ]
        names = {file.relative_to(self.common_dir).as_posix(): file for file in files}
        with suppress(GitError):  # all in one call, as long as none is broken
            listed = {ref for ref, _, _ in self.messages(prefix)}
            names = {name: file for name, file in names.items() if name not in listed}
        broken = {name: file for name, file in names.items() if not self.succeeds("cat-file", "-e", name)}
        if not self.works():
            return []
        for name, file in broken.items():
            aside = self.common_dir / "autoresearch-aside" / f"{name}-{time.time_ns()}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            file.rename(aside)
        return sorted(broken)

    def attach(self, branch: str, commit: str) -> None:
        """Point HEAD at the branch and the branch and index at a commit, whatever happened to them; files stay."""
        self.git("symbolic-ref", "HEAD", f"refs/heads/{branch}")
        self.git("update-ref", f"refs/heads/{branch}", commit)
        (self.git_dir / "index").unlink(missing_ok=True)  # a fresh index has no assume-unchanged flags to hide edits
        self.git("read-tree", commit)

    def changed(self, branch: str, base: str) -> list[str]:
        """Every path that differs from `base`: edited, deleted, new, or committed by somebody else meanwhile."""
        make_accessible(self.tree)
        self.attach(branch, base)
        for path, (_, size) in self.blobs(base).items():
            if size_of(self.tree / path) > max(size, MAX_FILE):
                (self.tree / path).unlink()  # changed it is, and comparing a terabyte would take the night
        edited = self.git("diff", "--name-only", "-z", "--no-renames", "--no-ext-diff", base)
        new = self.git("ls-files", "--others", "--exclude-standard", "-z")
        return sorted({path for path in (edited + new).split("\0") if path})

    def commit(self, text: str, parent: str, files: tuple[str, ...] = ()) -> str:
        """Make a commit of `parent`'s files with these ones as they are in the tree now; no branch moves."""
        self.git("read-tree", parent)
        present = [name for name in files if (self.tree / name).is_file() and not (self.tree / name).is_symlink()]
        if present:
            self.git("add", "--force", "--", *present)
        return self.commit_tree(text, self.git("write-tree").strip(), parent)

    def commit_tree(self, text: str, tree: str, parent: str) -> str:
        return self.git("commit-tree", "--no-gpg-sign", tree, "-p", parent, stdin=text, env=self.identity()).strip()

    def identity(self) -> dict[str, str]:
        """The user's name where git knows one, else the project's, by environment and never by git's configuration."""
        if self.succeeds("config", "user.name") and self.succeeds("config", "user.email"):
            return {}
        return {name: os.environ.get(name, value) for name, value in IDENTITY.items()}

    def create(self, ref: str, commit: str) -> None:
        """Make a ref; GitError when there is one of that name."""
        self.git("update-ref", ref, commit, "0" * len(commit))

    def reset(self, branch: str, commit: str) -> None:
        """Put branch and tree back to a commit and remove everything else, ignored files included."""
        make_accessible(self.tree)
        self.attach(branch, commit)
        try:
            self.git("reset", "--quiet", "--hard", commit)
            self.git("clean", "--quiet", "-ffdx")
        except GitError:  # folders deeper than git can go
            for entry in self.tree.iterdir():
                if entry.name != ".git":
                    remove_tree(entry)
            self.git("reset", "--quiet", "--hard", commit)
        for path, blob in self.altered(commit):  # by a filter that somebody put into git's own folder
            (self.tree / path).write_bytes(git_bytes(*self.where, "cat-file", "blob", blob))


def run_git(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    return git_bytes(*args, stdin=stdin, env=env, cwd=cwd).decode(errors="replace")


def git_bytes(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> bytes:
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8", **(env or {})}
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


def read_worktree(path: Path, common_dir: Path) -> Repo | None:
    """The worktree at a path when it is one of this repository's and git can use it, else None."""
    try:
        if path.is_symlink():
            return None
        own = Path((path / ".git").read_text().removeprefix("gitdir: ").strip())
        if own.parent != common_dir / "worktrees":
            return None
        repo = Repo(path, own, common_dir)
        repo.git("rev-parse", "--git-dir")
        return repo
    except (OSError, ValueError, GitError):
        return None


def size_of(path: Path) -> int:
    """Bytes of a plain file; -1 for anything else."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


def make_accessible(tree: Path) -> None:
    """Give back the permissions that somebody took from us, so that git can read and clean the tree."""
    subprocess.run(["chmod", "-R", "u+rwX", "--", str(tree)], capture_output=True, check=False)


def remove_tree(path: Path) -> None:
    """Remove whatever is at a path; of a link, the link. What cannot be removed, as root can make a file, is moved
    aside. By the tools that know paths of any depth."""
    if not path.is_symlink():
        make_accessible(path)
    subprocess.run(["rm", "-rf", "--", str(path)], capture_output=True, check=False)
    if path.is_symlink() or path.exists():
        path.rename(path.with_name(f"{path.name}-aside-{time.time_ns()}"))
