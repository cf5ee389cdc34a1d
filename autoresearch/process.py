"""Start a process, wait for it under a limit, and leave nothing of it behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "AUTORESEARCH_RUN"  # in the environment of everything we start: how orphans are found


@dataclass(frozen=True)
class Exit:
    """How a process ended: `code` as subprocess has it (negative is a signal), None when the limit ended it."""

    code: int | None
    seconds: float


def run(
    command: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    limit: float,
    mark: Path,
    out: Path,
    err: Path | None = None,
    stdin: Path = Path(os.devnull),
    pass_fds: tuple[int, ...] = (),
    watch: Callable[[], None] = lambda: None,
) -> Exit:
    """Run a command in a session of its own, output to files. However this returns, everything it started is dead.

    Standard error joins standard output unless `err` is given. `watch` is called all the while, ten times a second, and
    once after the end. Not found is an OSError.
    """
    start = time.monotonic()
    with stdin.open("rb") as stdin_file, out.open("wb") as out_file, (err or out).open("ab") as err_file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**env, MARK: str(mark)},
            stdin=stdin_file,
            stdout=out_file,
            stderr=err_file if err else subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        try:
            code = None
            while code is None and (left := start + limit - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(left, 0.1))
                watch()
        finally:
            kill_group(process)
            sweep(mark)
    return Exit(code, time.monotonic() - start)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; the group can outlive its leader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sweep(mark: Path) -> None:
    """Kill every process that carries a run's mark and is not this one: orphans that left their group included.

    Not guaranteed: a process that wiped its environment, or that another user owns, is not found.
    """
    give_up = time.monotonic() + 5  # a process stuck in the kernel dies when the kernel lets it
    while (orphans := marked(mark)) and time.monotonic() < give_up:
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def marked(mark: Path) -> list[int]:
    """Living processes whose environment carries the mark, this one aside."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another user's
            continue
        if wanted in variables:  # a zombie's environment reads as empty
            found.append(int(entry.name))
    return found


def tail(path: Path, size: int = 4000) -> str:
    """The end of a log, at most `size` bytes of it, read without loading the rest."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - size, 0))
        return file.read(size).decode("utf-8", errors="replace")
