"""Around each job, a process of its own: it runs a command under limits and leaves nothing of it behind.

Covered: whatever the command starts dies at its end and at its limit, and when the driver or the command is killed with
SIGKILL, also what left its group and session and wiped its environment. Not covered: a command that kills or stops its
keeper.
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
from dataclasses import dataclass
from pathlib import Path

from autoresearch.files import STOPS, remove, uninterrupted
from autoresearch.pace import PACE, clock

PDEATHSIG, SUBREAPER = 1, 36  # linux/prctl.h


@dataclass(frozen=True)
class Exit:
    """How a command ended: `code` as subprocess has it (negative is a signal), None when it was killed, and why.

    `paused` is for how many of the seconds the keeper itself was stopped, as in a frozen container or on a suspended
    laptop: what went wrong meanwhile may be nobody's fault.
    """

    code: int | None
    seconds: float
    why: str = ""
    paused: float = 0.0


class NotStarted(OSError):
    """The command is not there, is no program, or cannot be given these arguments."""


def become_keeper(driver: int) -> None:
    """Adopt whatever our children leave behind, and end with the driver, whose process this is. For the main thread."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1)
    for signum in STOPS:
        signal.signal(signum, lambda *_: sys.exit(143))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # which the driver deferred while it started this
    prctl(PDEATHSIG, signal.SIGTERM)
    if os.getppid() != driver:  # it died before it was asked for
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
    """Run a command in a session of its own, output to files. However this returns, all that descends from us is dead.

    Standard error joins standard output unless `err` is given. Ten times a second, and once after the end, `watch` may
    return why to kill the command; `limit` in seconds, too much output and a full disk kill it too, `politely` after
    signals that let it say a last word. The limit leaves out the time in which we were stopped. A command that cannot
    be started is a NotStarted. `PWD` is `cwd`, since some programs take it for where they are.
    """
    start = looked = clock()
    paused = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)  # an agent may have removed it, or put a pipe in the place of a log
    for log in {out, err or out}:
        remove(log)
    with stdin.open("rb") as stdin_file, out.open("wb") as out_file, (err or out).open("ab") as err_file:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**env, "PWD": str(cwd)},
                stdin=stdin_file,
                stdout=out_file,
                stderr=err_file if err else subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in an argument
            raise NotStarted(getattr(error, "strerror", "") or str(error)) from None
        try:
            die_first(process.pid)
            code, why = None, ""
            while code is None and not why:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=max(min(start + paused + limit - clock(), 0.1), 0))
                why = watch() or excess(out.parent, out, err or out)
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
                for path in {out, err or out}:
                    with suppress(OSError):  # it may have removed even those, or put something else there
                        os.truncate(path, min(path.stat().st_size, PACE.max_output))
    return Exit(code, clock() - start, "" if code is not None else why, paused)


def excess(folder: Path, *files: Path) -> str:
    """Why a command that prints to these files, on the disk of a folder, has to end, if it has."""
    if any(file.exists() and file.stat().st_size > PACE.max_output for file in files):
        return f"since it printed more than {PACE.max_output // 1_000_000} MB"
    with suppress(FileNotFoundError):  # it may have removed the folder too
        if (free := shutil.disk_usage(folder).free) < PACE.min_free:
            return f"since the disk was full: {free // 1_000_000} MB were left"
    return ""


def die_first(pid: int) -> None:
    """Let the kernel take this process, and not the driver, when memory runs out. Only Linux knows how."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def kill_descendants() -> None:
    """Kill all that descends from this process, and wait until it is gone; what hangs in the kernel, as by a GPU that
    fell off the bus, dies when the kernel lets it."""
    give_up = time.monotonic() + PACE.grace
    while (found := descendants()) and time.monotonic() < give_up:
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def descendants() -> set[int]:
    """Processes below this one, zombies included."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # gone meanwhile
                # pid (name) state parent ...; the name may hold anything, blanks and brackets included
                parents[int(entry.name)] = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
    found, fresh = set[int](), {os.getpid()}
    while fresh := {pid for pid, parent in parents.items() if parent in fresh}:
        found |= fresh
    return found
