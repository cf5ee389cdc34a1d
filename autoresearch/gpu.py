"""The GPU that experiments run on: which one, and who else uses it. nvidia-smi is asked, so that the driver needs no
CUDA of its own."""

import os
import subprocess
import time
from contextlib import suppress
from importlib.metadata import version

from autoresearch.records import Machine, UserError, one_line

ROOM = 512  # MiB that a desktop may take, or give back, without being called a use
ANSWER = 60.0  # seconds that nvidia-smi is given
PATIENCE = 30.0  # seconds in which a killed process gives its memory back


def find_machine(arena: str, number: int | None) -> Machine:
    """Name the GPU of that number, else the one that CUDA_VISIBLE_DEVICES puts first, its driver, and torch; UserError
    when there is none but the arena needs one."""
    if number is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    if arena == "demo":
        return Machine("", "", version("torch"))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    try:
        (found,) = query("--query-gpu=name,driver_version,uuid", gpu)
        name, driver, uuid = found
    except (OSError, ValueError):
        missing = f"no NVIDIA GPU found (nvidia-smi --id={gpu})"
        raise UserError(f"{missing}, and every arena but demo needs one: here, try --demo") from None
    # After a boot the first program to use CUDA has this tool make its device file, by rights that an isolated training
    # does not have.
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["nvidia-modprobe", "-u", "-c=0"], capture_output=True, timeout=60, check=False)
    return Machine(name, driver, version("torch"), uuid)


def query(what: str, gpu: str) -> list[list[str]]:
    """Ask nvidia-smi for rows of cells; OSError when it has no answer."""
    command = ["nvidia-smi", f"--id={gpu}", what, "--format=csv,noheader,nounits"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=ANSWER)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a GPU that fell off the bus holds it in the kernel
        raise OSError(f"nvidia-smi has not answered for {ANSWER:g} s") from None
    if process.returncode:
        raise OSError(f"nvidia-smi fails: {one_line(out or err or f'exit code {process.returncode}', 300)}")
    return [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]


def capability(machine: Machine) -> float | None:
    """The compute capability, say 9.0; None without a GPU, and where nvidia-smi is too old to tell."""
    try:
        return float(query("--query-gpu=compute_cap", machine.uuid)[0][0]) if machine.gpu else None
    except (OSError, ValueError, IndexError):
        return None


def used(machine: Machine) -> int:
    """MiB of the GPU's memory that are in use; 0 without a GPU."""
    return sum(megabytes(row[0]) for row in query("--query-gpu=memory.used", machine.uuid)) if machine.gpu else 0


def megabytes(cell: str) -> int:
    return int(cell) if cell.isdecimal() else 0  # "[N/A]" where the system does not tell


def users(machine: Machine, idle: int | None = None) -> str:
    """Who holds memory of the GPU, in words; empty when it is free, which is waited for a little.

    `idle` is what was in use when it was known to be free.
    """
    end = time.monotonic() + PATIENCE
    while (said := holders(machine, idle)) and time.monotonic() < end:
        time.sleep(0.5)
    return said


def holders(machine: Machine, idle: int | None) -> str:
    if not machine.gpu:
        return ""
    try:
        apps = query("--query-compute-apps=pid,process_name,used_memory", machine.uuid)
        taken = sum(megabytes(row[-1]) for row in apps)
        unknown = 0 if idle is None else used(machine) - idle - taken
    except OSError as error:
        return str(error)
    if taken > ROOM:
        names = ", ".join(f"process {pid} ({' '.join(name)}, {memory} MiB)" for pid, *name, memory in apps)
        return f"{machine.gpu} is in use by {one_line(names, 300)}"
    return f"{unknown} MiB of {machine.gpu} are held by no process that nvidia-smi names" if unknown > ROOM else ""
