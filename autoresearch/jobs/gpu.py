"""The GPU of the experiments: which one, its users, its clock. nvidia-smi answers, without CUDA."""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoresearch.files import UserError, one_line, remove, tail
from autoresearch.pace import PACE
from autoresearch.task import Machine

ROOM = 512  # MiB that a desktop may take or give back
ANSWER = 60.0  # seconds that nvidia-smi may take
Slices = dict[str, tuple[str, str]]


def find_machine(needed: bool, number: int | None) -> Machine:
    """The GPU of that number, else the first of CUDA_VISIBLE_DEVICES; of a card that is cut into
    slices (MIG) the one that CUDA would take. UserError without one, unless none is needed."""
    if number is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    if not needed:
        return Machine()
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    try:
        slices = find_slices()
        card, _ = slices.get(gpu, (gpu, ""))
        ((name, driver, card),) = query("--query-gpu=name,driver_version,uuid", card)
    except (OSError, ValueError):
        missing = f"no NVIDIA GPU found (nvidia-smi --id={gpu})"
        raise UserError(f"{missing}, and the task needs one: here, try --demo") from None
    of_card = [uuid for uuid, (on, _) in slices.items() if on == card]
    uuid = gpu if gpu in slices else next(iter(of_card), card)
    if uuid in slices:
        name = f"{name} {slices[uuid][1]}"
    # After a boot the first program to use CUDA has this tool make its device file, with rights
    # that a sandboxed run does not have.
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-modprobe", "-u", "-c=0"]
        subprocess.run(command, capture_output=True, timeout=60, check=False)
    return Machine(name, driver, uuid=uuid, card=card)


def find_slices() -> Slices:
    """By the UUID of each slice (MIG): the UUID of its card, and its kind, say `MIG 1g.10gb`."""
    slices, card = Slices(), ""
    try:
        listed = ask("--list-gpus")
    except OSError:  # one card of many that does not answer is enough for that
        return {}
    for kind, uuid in re.findall(r"^ *(GPU|MIG \S+) .*\(UUID: (\S+)\)", listed, re.MULTILINE):
        if kind == "GPU":
            card = uuid
        else:
            slices[uuid] = card, kind
    return slices


def query(fields: str, gpu: str) -> list[list[str]]:
    """Ask nvidia-smi of a GPU for rows of cells; OSError without an answer."""
    rows = ask(f"--id={gpu}", fields, "--format=csv,noheader,nounits").splitlines()
    return [[cell.strip() for cell in row.split(",")] for row in rows if row.strip()]


def ask(*args: str) -> str:
    """Run nvidia-smi and return its output; OSError when it fails, or does not answer."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(["nvidia-smi", *args], stdout=pipe, stderr=pipe, text=True)
    try:
        out, err = process.communicate(timeout=ANSWER)
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting: a GPU that fell off the bus holds it in the kernel
        raise OSError(f"nvidia-smi has not answered for {ANSWER:g} s") from None
    if process.returncode:
        said = one_line(out or err or f"exit code {process.returncode}", 300)
        raise OSError(f"nvidia-smi fails: {said}")
    return out


def capability(machine: Machine) -> float | None:
    """The compute capability, say 9.0; None without a GPU, or where nvidia-smi is too old."""
    with suppress(OSError, ValueError, IndexError):
        return float(query("--query-gpu=compute_cap", machine.card)[0][0]) if machine.gpu else None
    return None


def memory(machine: Machine, kind: str) -> int:
    """MiB of the GPU, `total` or `used`; 0 without one, for a slice, and for the CPU's own."""
    if not machine.gpu or machine.is_slice:
        return 0
    return sum(megabytes(row[0]) for row in query(f"--query-gpu=memory.{kind}", machine.card))


def megabytes(cell: str) -> int:
    return int(cell) if cell.isdecimal() else 0  # "[N/A]" where the system does not know


def users(machine: Machine, idle: int | None = None) -> str:
    """Who uses the GPU; empty if it is free within 30 s. `idle`: MiB in use when it was free."""
    end = time.monotonic() + PACE.gpu_release
    while (found := find_users(machine, idle)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def find_users(machine: Machine, idle: int | None) -> str:
    if not machine.gpu or machine.is_slice:  # users of other slices do no harm
        return ""
    try:
        apps = query("--query-compute-apps=pid,process_name,used_memory", machine.card)
        taken = sum(megabytes(row[-1]) for row in apps)
        unknown = 0 if idle is None else memory(machine, "used") - idle - taken
    except OSError as error:
        return str(error)
    if taken > ROOM:
        names = [f"process {pid} ({' '.join(name)}, {size} MiB)" for pid, *name, size in apps]
        return f"{machine.gpu} is in use by {one_line(', '.join(names), 300)}"
    if unknown > ROOM:
        return f"{unknown} MiB of {machine.gpu} are held by no process that nvidia-smi names"
    return ""


# --------------------------------------------------------------------------------------------------
# How it ran

EVERY = 10  # seconds between two readings
SLOWED = 0x08 | 0x20 | 0x40 | 0x80  # NVML's reasons: hardware, heat (software, hardware), power
DECIMAL, MASK = re.compile(r"\d{1,9}(\.\d+)?"), re.compile(r"0x[0-9a-fA-F]{16}")


@contextmanager
def observed(card: str, log: Path) -> Iterator[None]:
    """Have nvidia-smi log the GPU's clock in MHz, its power in watts, its temperature in degrees
    Celsius, and NVML's reasons for a lower clock, as long as the block runs."""
    if not card:
        yield
        return
    fields = "--query-gpu=clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
    form = "--format=csv,noheader,nounits"
    command = ["nvidia-smi", f"--id={card}", fields, form, f"--loop={EVERY}"]
    remove(log)
    nowhere = subprocess.DEVNULL
    with log.open("xb") as out:
        process = subprocess.Popen(command, stdin=nowhere, stdout=out, stderr=nowhere)
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # it may hang in the kernel
            process.wait(timeout=5)


def read_observed(log: Path) -> dict[str, float]:
    """The median clock, power and temperature of a run, and the percent of it that heat or the
    power supply slowed the GPU; missing readings, such as `[N/A]`, are left out."""
    from statistics import median  # here, since every run imports this module

    rows = [line.split(", ") for line in tail(log, 1_000_000).splitlines()]
    rows = [row for row in rows if len(row) == 4]
    facts = {}
    for column, name in enumerate(("gpu_mhz", "gpu_watts", "gpu_celsius")):
        if known := [float(row[column]) for row in rows if DECIMAL.fullmatch(row[column])]:
            facts[name] = median(known)
    reasons = [int(row[3], 16) for row in rows if MASK.fullmatch(row[3])]
    if reasons:
        slowed = sum(bool(mask & SLOWED) for mask in reasons)
        facts["gpu_slowed_percent"] = 100 * slowed / len(reasons)
    return facts
