"""Files that are whole or not there, the end of a log, and locks that die with their process and name their owner."""

import fcntl
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoresearch.records import UserError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # by which a person ends the driver


def remove(path: Path) -> None:
    """Remove whatever is at a path: a file, a pipe, a link, a folder of any depth, or nothing. A folder that cannot be
    removed, as root can make its files, is moved aside."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    make_accessible(path)
    subprocess.run(["rm", "-rf", "--", str(path)], capture_output=True, check=False)
    if path.exists():
        path.rename(path.with_name(f"{path.name}-aside-{time.time_ns()}"))


def make_accessible(tree: Path) -> None:
    """Give back the permissions that an agent took, so that git can read the tree and it can be removed."""
    subprocess.run(["chmod", "-R", "u+rwX", "--", str(tree)], capture_output=True, check=False)


def write_whole(path: Path, text: str) -> None:
    """Give a file this content, on disk, in one step: a reader sees the old one or the new one."""
    fresh = path.with_name(f"{path.name}.new")
    remove(fresh)
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def tail(path: Path, size: int = 4000) -> str:
    """The end of a log, at most `size` bytes of it; empty where there is none, or something that is no plain file."""
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
    """Defer all signals by which a person ends the driver until this block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cache() -> Path:
    """Where the arenas are, and the locks of devices."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def lock_of_device(device: str) -> Path:
    """The lock of a GPU, by its UUID, or of the CPU."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {cache()}: {error.strerror}; AUTORESEARCH_CACHE moves the cache") from None
    return cache() / f"{device}.lock"


@contextmanager
def lock(path: Path, what: str, task: str) -> Iterator[None]:
    """Hold a lock file for this process; UserError that names its owner when there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open() as file:  # for reading, since a file that is open for writing keeps a disk from being unmounted
        for last in (False, False, True):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise UserError(f"{what} is taken by {lock_owner(path) or 'another process'}") from None
                time.sleep(0.1)  # whoever merely asks for the owner holds it for an instant
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}, {task}")
        yield


def lock_owner(path: Path) -> str | None:
    """Who holds a lock file now, or None."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return path.read_text() or "another process"


@contextmanager
def waiting_lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold a lock file, alone or beside others who share it, waiting as long as that takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
