"""One driver a tag, and one a GPU: locks that die with their process, and say who holds them."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autoresearch.records import UserError


def cache() -> Path:
    """Where the arenas are, and the locks of devices."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch")


def of_device(device: str) -> Path:
    """The lock of a GPU, by its UUID, or of the CPU."""
    try:
        cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {cache()}: {error.strerror}; AUTORESEARCH_CACHE moves the cache") from None
    return cache() / f"{device}.lock"


@contextmanager
def hold(path: Path, what: str, task: str) -> Iterator[None]:
    """Hold a lock file for this process; UserError that names the holder when there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open() as file:  # for reading, since what is open for writing keeps a disk from being unmounted
        for last in (False, False, True):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    raise UserError(f"{what} is taken by {holder(path) or 'another process'}") from None
                time.sleep(0.1)  # who merely asks for the holder has it for an instant
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}, {task}")
        yield


def holder(path: Path) -> str | None:
    """Who holds a lock file now, or None."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return path.read_text() or "another process"
