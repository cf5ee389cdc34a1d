"""The process around each job: it runs a command under limits and leaves nothing of it behind.

Covered: all that the command starts dies at its end and at its limit, and when the driver or the
command is killed with SIGKILL, even if it left its group and session and wiped its environment.
Not covered: a command that kills or stops its keeper.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from autoresearch.files import STOPS, remove, uninterrupted
from autoresearch.jobs import wait
from autoresearch.pace import PACE, clock

PDEATHSIG, SUBREAPER = 1, 36  # linux/prctl.h


class Exit(NamedTuple):
    """How a command ended: `code` as subprocess has it, or None and why it was killed.

    `paused`: seconds in which the keeper itself was stopped, as in a frozen container or on a
    suspended laptop. An error in that time may be nobody's fault.
    """

    code: int | None
    seconds: float
    why: str = ""
    paused: float = 0.0


class NotStarted(OSError):
    """The command does not exist, is no program, or cannot take these arguments."""


def become_keeper(driver: int) -> None:
    """Adopt the orphans of our children, and end with the driver. For the main thread."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1)
    for signum in STOPS:
        signal.signal(signum, lambda *_: sys.exit(143))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # the driver blocks them while it starts us
    prctl(PDEATHSIG, signal.SIGTERM)
    if os.getppid() != driver:  # it died before the line above
        sys.exit(143)


def keep(
    command: list[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    limit: float,
    out: Path,
    err: Path | None = None,
    stdin: Path = Path(os.devnull),
    pass_fds: tuple[int, ...] = (),
    watch: Callable[[], str] = str,
    politely: bool = False,
) -> Exit:
    """Run a command in a session of its own, its output to files. However this returns, all our
    descendants are dead.

    Standard error joins standard output unless `err` is given. `limit` is in seconds, pauses left
    out; too much output and a full disk end the command too, and so does `watch`, called ten times
    a second and once after the end, by returning why. `politely` sends signals first that let it
    say a last word. NotStarted where the command cannot be started.
    """
    out.parent.mkdir(parents=True, exist_ok=True)  # the agent may have removed it
    logs = {out, err or out}
    for log in logs:
        remove(log)  # the agent may have put a pipe there
    start = looked = clock()
    paused, code, why = 0.0, None, ""
    with stdin.open("rb") as source, out.open("wb") as sink, (err or out).open("ab") as errors:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**env, "PWD": str(cwd)},  # some programs take it for their directory
                stdin=source,
                stdout=sink,
                stderr=errors if err else subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in an argument
            raise NotStarted(getattr(error, "strerror", "") or str(error)) from None
        try:
            die_first(process.pid)
            while code is None and not why:
                left = start + paused + limit - clock()
                if wait(process, max(min(left, 0.1), 0)):
                    code = process.returncode
                why = watch() or excess(logs)
                before, looked = looked, clock()
                paused += looked - before if looked - before > PACE.pause else 0.0
                if looked - start - paused >= limit:
                    why = why or f"at the limit of {limit:g} s"
            for signum in (signal.SIGINT, signal.SIGTERM) if code is None and politely else ():
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signum)
                    process.wait(timeout=PACE.grace)
        finally:
            with uninterrupted():
                kill_descendants()
                for log in logs:
                    with suppress(OSError):  # it may have removed it, or put something else there
                        os.truncate(log, min(log.stat().st_size, PACE.max_output))
    return Exit(code, clock() - start, "" if code is not None else why, paused)


def excess(logs: set[Path]) -> str:
    """Why a command that writes these logs has to end, if it has: too much output, a full disk."""
    if any(log.exists() and log.stat().st_size > PACE.max_output for log in logs):
        return f"since it printed more than {PACE.max_output // 1_000_000} MB"
    with suppress(FileNotFoundError):  # it may have removed the folder too
        free = min(shutil.disk_usage(log.parent).free for log in logs)
        if free < PACE.min_free:
            return f"since the disk was full: {free // 1_000_000} MB were left"
    return ""


def die_first(pid: int) -> None:
    """Let the kernel take this process, and not the driver, when memory runs out."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def kill_descendants() -> None:
    """Kill all descendants of this process and wait until they are gone; one that hangs in the
    kernel, as by a GPU that fell off the bus, dies when the kernel lets it."""
    give_up = time.monotonic() + PACE.grace
    while (found := descendants()) and time.monotonic() < give_up:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def descendants() -> set[int]:
    """All descendants of this process, zombies included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            # pid (name) state parent ...; the name may hold anything, blanks and brackets included
            fields = stat.read_bytes().rpartition(b")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    found, fresh = set[int](), {os.getpid()}
    while fresh := {pid for pid, parent in parents.items() if parent in fresh}:
        found |= fresh
    return found
