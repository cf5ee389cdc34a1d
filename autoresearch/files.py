"""Files written whole, the end of a log, locks that name their owner, one line of foreign text."""

import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoresearch.pace import PACE

CODE = Path(__file__).resolve().parent.parent  # where `autoresearch` is imported from
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # end the driver


class UserError(Exception):
    """Something a person has to mend; one line that names the cure. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def one_line(text: str, limit: int = 200) -> str:
    """Foreign text as a bounded line without control characters, safe for a terminal or a table.

    >>> one_line("a\\tb\\x1b[31m")
    'a b [31m'
    """
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def printable(text: str) -> str:
    """Foreign text with its lines, without control characters."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return re.sub(r"\n{3,}", "\n\n", plain)


def remove(path: Path) -> None:
    """Remove a file, pipe, link, or folder of any depth, if there is one. A folder that resists, as
    root can make its files, is moved aside."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):  # an agent may take permissions away, and nest folders
        make_accessible(path)
        subprocess.run(["rm", "-rf", "--", str(path)], capture_output=True, check=False)
    if path.exists():
        path.rename(path.with_name(f"{path.name}-aside-{time.time_ns()}"))


def make_accessible(tree: Path) -> None:
    """Give back the permissions that an agent took, so that git can read and we can remove."""
    subprocess.run(["chmod", "-R", "u+rwX", "--", str(tree)], capture_output=True, check=False)


def write_whole(path: Path, content: str | bytes) -> None:
    """Give a file this content, on disk, in one step: a reader sees the old one or the new one."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    data = content.encode(errors="replace") if isinstance(content, str) else content
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def check_room(folder: Path) -> None:
    """UserError where a disk has no room for an experiment and its record."""
    if (free := shutil.disk_usage(folder).free) < 2 * PACE.min_free:
        short = f"only {free // 1_000_000} MB are free on the disk of {folder}"
        raise UserError(f"{short}: make room for 1 GB at least")


def tail(path: Path, size: int = 4000) -> str:
    """The last `size` bytes of a log; empty for no file, or one that is not plain."""
    with suppress(OSError), open(path, "rb", opener=open_plainly) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            file.seek(max(status.st_size - size, 0))
            return file.read(size).decode("utf-8", errors="replace")
    return ""


def open_plainly(path: str, flags: int) -> int:
    """An opener for `open` that neither waits for a pipe nor follows a link."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer SIGINT, SIGTERM, SIGHUP and SIGQUIT until this block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cache() -> Path:
    """The folder of the arenas, and of the locks of devices."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def lock_of_device(device: str) -> Path:
    """The lock of a GPU, by its UUID, or of the CPU."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cure = "AUTORESEARCH_CACHE moves the cache"
        raise UserError(f"cannot write {cache()}: {error.strerror}; {cure}") from None
    return cache() / f"{device}.lock"


@contextmanager
def lock(path: Path, what: str, task: str) -> Iterator[None]:
    """Hold a lock file for this process; UserError that names its owner, if another has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open() as file:  # for reading: a file open for writing keeps a disk mounted
        for _ in range(3):  # `lock_owner` holds it for an instant
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise UserError(f"{what} is taken by {lock_owner(path) or 'another process'}")
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}, {task}")
        yield


def lock_owner(path: Path) -> str | None:
    """The owner of a lock file, or None."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return path.read_text() or "another process"


def check_free(path: Path, what: str) -> None:
    """UserError that names the owner of a lock file, if it has one."""
    if owner := lock_owner(path):
        raise UserError(f"{what} is taken by {owner}: wait for it, or stop it")


@contextmanager
def waiting_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock file, alone or shared with others, however long that takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
