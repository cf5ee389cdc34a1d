"""The GPU that experiments run on: which one, who else uses it, how fast its clock was. nvidia-smi says all of it, so
that the driver needs no CUDA of its own."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from autoresearch.files import remove, tail
from autoresearch.pace import PACE
from autoresearch.records import Machine, UserError, one_line

ROOM = 512  # MiB that a desktop may take, or give back, without being called a use
ANSWER = 60.0  # seconds that nvidia-smi is given


def find_machine(arena: str, number: int | None) -> Machine:
    """Name the GPU of that number, else the one that CUDA_VISIBLE_DEVICES puts first, its driver, and torch; of a card
    that is cut into slices (MIG) the slice that CUDA would take. UserError when there is none but the arena needs one.
    """
    if number is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    if arena == "demo":
        return Machine("", "", version("torch"))
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    try:
        slices = find_slices()
        card, _ = slices.get(gpu, (gpu, ""))
        ((name, driver, card),) = query("--query-gpu=name,driver_version,uuid", card)
        uuid = gpu if gpu in slices else next((uuid for uuid, (on, _) in slices.items() if on == card), card)
        name = f"{name} {slices[uuid][1]}" if uuid in slices else name
    except (OSError, ValueError):
        missing = f"no NVIDIA GPU found (nvidia-smi --id={gpu})"
        raise UserError(f"{missing}, and every arena but demo needs one: here, try --demo") from None
    # After a boot the first program to use CUDA has this tool make its device file, by rights that an isolated training
    # does not have.
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(["nvidia-modprobe", "-u", "-c=0"], capture_output=True, timeout=60, check=False)
    return Machine(name, driver, version("torch"), uuid, card)


def find_slices() -> dict[str, tuple[str, str]]:
    """For the UUID of each slice (MIG) on this machine, the UUID of its card, and what it is, say `MIG 1g.10gb`."""
    slices, card = {}, ""
    try:
        listed = ask("--list-gpus").splitlines()
    except OSError:  # one card of many that does not answer is enough for that
        return {}
    for line in listed:
        if found := re.match(r"\s*(GPU|MIG \S+) .*\(UUID: (\S+)\)", line):
            if found[1] == "GPU":
                card = found[2]
            else:
                slices[found[2]] = card, found[1]
    return slices


def query(what: str, gpu: str) -> list[list[str]]:
    """Ask nvidia-smi of a GPU for rows of cells; OSError when it has no answer."""
    rows = ask(f"--id={gpu}", what, "--format=csv,noheader,nounits").splitlines()
    return [[cell.strip() for cell in row.split(",")] for row in rows if row.strip()]


def ask(*args: str) -> str:
    """Run nvidia-smi and return what it prints; OSError when it fails, or does not answer."""
    command = ["nvidia-smi", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=ANSWER)
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a GPU that fell off the bus holds it in the kernel
        raise OSError(f"nvidia-smi has not answered for {ANSWER:g} s") from None
    if process.returncode:
        raise OSError(f"nvidia-smi fails: {one_line(out or err or f'exit code {process.returncode}', 300)}")
    return out


def capability(machine: Machine) -> float | None:
    """The compute capability, say 9.0; None without a GPU, and where nvidia-smi is too old to tell."""
    try:
        return float(query("--query-gpu=compute_cap", machine.card)[0][0]) if machine.gpu else None
    except (OSError, ValueError, IndexError):
        return None


def memory(machine: Machine) -> int | None:
    """MiB of the GPU's memory; None for a slice, whose card alone is told, and where it is the CPU's own (GB10)."""
    if machine.is_slice:
        return None
    try:
        return megabytes(query("--query-gpu=memory.total", machine.card)[0][0]) or None
    except (OSError, IndexError):
        return None


def used(machine: Machine) -> int:
    """MiB of the GPU's memory that are in use; 0 where that is not told, as of a slice, and without a GPU."""
    if not machine.gpu or machine.is_slice:
        return 0
    return sum(megabytes(row[0]) for row in query("--query-gpu=memory.used", machine.card))


def megabytes(cell: str) -> int:
    return int(cell) if cell.isdecimal() else 0  # "[N/A]" where the system does not tell


def users(machine: Machine, idle: int | None = None) -> str:
    """Who holds memory of the GPU, in words; empty when it is free, which is waited for a little.

    `idle` is what was in use when it was known to be free.
    """
    end = time.monotonic() + PACE.gpu_release
    while (said := holders(machine, idle)) and time.monotonic() < end:
        time.sleep(0.5)
    return said


def holders(machine: Machine, idle: int | None) -> str:
    if not machine.gpu or machine.is_slice:  # the users of other slices are no concern of ours
        return ""
    try:
        apps = query("--query-compute-apps=pid,process_name,used_memory", machine.card)
        taken = sum(megabytes(row[-1]) for row in apps)
        unknown = 0 if idle is None else used(machine) - idle - taken
    except OSError as error:
        return str(error)
    if taken > ROOM:
        names = ", ".join(f"process {pid} ({' '.join(name)}, {memory} MiB)" for pid, *name, memory in apps)
        return f"{machine.gpu} is in use by {one_line(names, 300)}"
    return f"{unknown} MiB of {machine.gpu} are held by no process that nvidia-smi names" if unknown > ROOM else ""


# ----------------------------------------------------------------------------------------------------------------------
# How it ran

EVERY = 10  # seconds between two readings
SLOWED = 0x08 | 0x20 | 0x40 | 0x80  # of NVML's reasons: hardware, software by heat, hardware by heat, power brake
NUMBER = re.compile(r"0x[0-9a-fA-F]{16}|\d{1,9}(\.\d+)?")


@contextmanager
def observed(card: str, log: Path) -> Iterator[None]:
    """Have nvidia-smi write the GPU's clock in MHz, its power in watts and NVML's reasons for a lower clock into a log,
    as long as the block runs. Missing readings are left out."""
    if not card:
        yield
        return
    what = "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--id={card}", what, "--format=csv,noheader,nounits", f"--loop={EVERY}"]
    remove(log)
    with log.open("xb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # a GPU that fell off the bus holds it in the kernel
            process.wait(timeout=5)


def read_observed(log: Path) -> dict[str, Any]:
    """The usual clock and power of a run, and the percent of it that the GPU was slowed by heat or its power supply;
    nothing where nothing was written."""
    rows = [row.split(",") for row in tail(log, 1_000_000).splitlines()]
    facts = {"gpu_mhz": numbers(rows, 0), "gpu_watts": numbers(rows, 1)}
    found = {name: median(values) for name, values in facts.items() if values}
    if reasons := numbers(rows, 2):
        found["gpu_slowed_percent"] = 100 * sum(bool(int(reason) & SLOWED) for reason in reasons) / len(reasons)
    return found


def numbers(rows: list[list[str]], column: int) -> list[float]:
    """The numbers of a column, decimal or as `0x...`; anything else, such as `[N/A]`, is left out."""
    cells = [row[column].strip() for row in rows if len(row) == 3]
    return [float(int(c, 16)) if c.startswith("0x") else float(c) for c in cells if NUMBER.fullmatch(c)]
