"""Start a process, wait for it under limits, and leave nothing of it behind."""

import ctypes
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from autoresearch.pace import PACE

MARK = "AUTORESEARCH_RUN"  # in the environment of everything we start: how orphans of a killed driver are found
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # by which a person ends the driver


@dataclass(frozen=True)
class Exit:
    """How a process ended: `code` as subprocess has it (negative is a signal), None when it was killed, and why.

    `paused` is for how many of the seconds this process itself was stopped, as by SIGSTOP, a frozen container or a
    suspended laptop: what went wrong meanwhile may be nobody's fault.
    """

    code: int | None
    seconds: float
    why: str = ""
    paused: float = 0.0


class NotStarted(OSError):
    """The command is not there, is no program, or cannot be given these arguments."""


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
    watch: Callable[[], str] = str,
    politely: bool = False,
) -> Exit:
    """Run a command in a session of its own, output to files. However this returns, everything it started is dead.

    Standard error joins standard output unless `err` is given. `watch` is called ten times a second, and once after the
    end: what it returns is why to kill the process, as are `limit` in seconds, too much output and a disk that fills
    up. `politely` means after signals that let it say a last word. A command that cannot be started is a NotStarted.
    The limit leaves out the time in which we were stopped. `PWD` is `cwd`: some programs take it for where they are.
    """
    adopt_orphans()
    others = descendants()
    start = looked = clock()
    paused = 0.0
    out.parent.mkdir(parents=True, exist_ok=True)  # an agent may have removed it
    with stdin.open("rb") as stdin_file, out.open("wb") as out_file, (err or out).open("ab") as err_file:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**env, "PWD": str(cwd), MARK: str(mark)},
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
                before, looked = looked, clock()
                paused += looked - before if looked - before > PACE.pause else 0.0
                late = f"at the limit of {limit:g} s" if looked - start - paused >= limit else ""
                why = watch() or excess(mark, out, err or out) or late
            for signum in (signal.SIGINT, signal.SIGTERM) if code is None and politely else ():
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signum)
                    process.wait(timeout=PACE.grace)
        finally:
            with uninterrupted():
                kill_group(process)
                sweep(mark, others)
                for path in {out, err or out}:
                    with suppress(OSError):  # it may have removed even those, or put something else there
                        os.truncate(path, min(path.stat().st_size, PACE.max_output))
    return Exit(code, clock() - start, "" if code is not None else why, paused)


def clock() -> float:
    """Seconds that nobody can set, and that pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def excess(folder: Path, *files: Path) -> str:
    """Why a process that prints to these files, on the disk of a folder, has to end, if it has."""
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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal but SIGKILL in: what comes meanwhile is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, so that leaving its group and session hides nothing."""
    pr_set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its group; the group can outlive its leader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # stuck in the kernel, as by a GPU that is gone
        process.wait(timeout=PACE.grace)


def sweep(mark: Path, others: frozenset[int] | None = None) -> None:
    """Kill what carries a run's mark, and what descends from this process, but for those `others` that did before.

    Not guaranteed: a process that wiped its environment and whose driver was killed, or that another user owns, is not
    found.
    """
    give_up = time.monotonic() + 5  # a process stuck in the kernel dies when the kernel lets it
    while (orphans := marked(mark) | (descendants(others) if others is not None else set())) and (
        time.monotonic() < give_up
    ):
        for pid in orphans:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def marked(mark: Path) -> set[int]:
    """Living processes whose environment carries the mark, this one aside."""
    wanted = f"{MARK}={mark}".encode()
    # a zombie's environment reads as empty
    return {pid for pid in processes() if pid != os.getpid() and wanted in read(pid, "environ").split(b"\0")}


def descendants(others: frozenset[int] = frozenset()) -> frozenset[int]:
    """Processes below this one, zombies included, but for those others and what is below them."""
    # pid (name) state parent ...; the name may hold anything, blanks and brackets included
    parents = {pid: int(line.rpartition(b")")[2].split()[1]) for pid in processes() if (line := read(pid, "stat"))}
    found, fresh = set[int](), {os.getpid()}
    while fresh := {pid for pid, parent in parents.items() if parent in fresh and pid not in others}:
        found |= fresh
    return frozenset(found)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return b""


def tail(path: Path, size: int = 4000) -> str:
    """The end of a log, at most `size` bytes of it, read without loading the rest; empty when somebody removed it, or
    put a pipe, a link or a folder in its place."""
    with suppress(OSError), open(path, "rb", opener=open_plainly) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            file.seek(max(status.st_size - size, 0))
            return file.read(size).decode("utf-8", errors="replace")
    return ""


def open_plainly(path: str, flags: int) -> int:
    """As an opener of `open`: a pipe is not waited for, a link not followed."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
