"""What a run on this machine needs, checked before the night: each with what is wrong and how to mend it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from autoresearch import checks, gpu, isolation, locks
from autoresearch.agents import find_agent
from autoresearch.git import GitError, run_git
from autoresearch.ledger import LOCK, Ledger, read_history
from autoresearch.options import whole
from autoresearch.presets import PRESETS
from autoresearch.records import Arena, Machine, UserError, one_line

SMALL = 8_000  # MB of GPU memory under which nothing of the recipe was thought of
ROOM = 10_000_000_000  # bytes for climbmix, its tokens, models and logs
LOADED = 6_000_000_000  # bytes of memory that a training with its referee takes
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

# What torch can do here, asked of torch itself: its version, what it was built for, why an operator does not run (which
# names a driver that is too old), and why a function does not compile, as without a C compiler for Triton.
TORCH = """
import json, sys, warnings, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "unusable": "", "uncompiled": ""}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    step = "unusable"
    try:
        x = torch.zeros(8, device=sys.argv[1])
        x.sum().item()
        step = "uncompiled"
        torch.compile(lambda x: x.sin() + 1)(x)
    except Exception as error:
        facts[step] = " ".join([str(error).splitlines()[0], *(str(w.message).splitlines()[0] for w in said)])
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the table. A `fail` is what a run could not start with."""

    what: str
    state: Literal["ok", "warn", "fail"]
    said: str


def examine(root: Path, options: Namespace) -> Iterator[Finding]:
    """Check what `loop.py run` with these options would need."""
    for what, check in CHECKS.items():
        try:
            yield from check(root, options)
        except Exception as error:  # whatever is odd here, the rest of the table is wanted too
            said = str(error) if isinstance(error, UserError | GitError | OSError) else repr(error)
            yield Finding(what, "fail", one_line(said, 500))


def check_git(root: Path, options: Namespace) -> Iterator[Finding]:
    checkout = checks.open_checkout(root)
    checks.check_tag(checkout, options.tag)
    ledger = Ledger(checkout, options.tag, print)
    if ledger.is_new():
        checks.check_committed(checkout)
    if holder := locks.holder(root / "runs" / options.tag / LOCK):
        yield Finding("git", "fail", f"{options.tag} is run by {holder}: another --tag for another run")
    else:
        yield Finding("git", "ok", f"{run_git('version').strip()}; the run would be {options.tag}")


def check_gpu(root: Path, options: Namespace) -> Iterator[Finding]:
    machine = gpu.find_machine(options.arena, options.gpu)
    if holder := locks.holder(locks.of_device(machine.uuid or "cpu")):
        yield Finding("GPU", "fail", f"{machine.gpu or 'the CPU'} is taken by {holder}")
    check_resumed(root, options, machine)
    if not machine.gpu:
        yield Finding("GPU", "ok", "the demo arena needs none")
        return
    checks.check_capability(machine)
    memory = gpu.memory(machine)
    size = f"{memory} MB" if memory else "memory not told"
    facts = f"{machine.gpu}, driver {machine.driver}, compute capability {gpu.capability(machine)}, {size}"
    if memory and memory < SMALL:
        yield Finding("GPU", "warn", f"{facts}: less than {SMALL} MB; try --arena tinystories")
    else:
        yield Finding("GPU", "ok", facts)
    if others := gpu.holders(machine, None):
        yield Finding("GPU", "fail", f"{others}: stop that first, or take another GPU with --gpu N")


def check_resumed(root: Path, options: Namespace, machine: Machine) -> None:
    """A run goes on only under the conditions that it started with; the data's own are checked when it starts."""
    ledger = Ledger(checks.open_checkout(root), options.tag, print)
    ledger.history = read_history(ledger.checkout, options.tag)
    if ledger.history:
        arena = Arena(options.arena, 0.0, ledger.history[0][1].data, Path())
        checks.check_comparable(ledger, arena, machine, whole(os.environ.get("AUTORESEARCH_SEED", "42")))


def check_torch(root: Path, options: Namespace) -> Iterator[Finding]:
    there = options.arena != "demo" and shutil.which("nvidia-smi")
    yield try_torch("cuda" if there else "", isolation.NONE if options.no_isolation else isolation.find_isolation())


def try_torch(device: str, walls: isolation.Isolation) -> Finding:
    """Run and compile something small on a device, inside the walls of a training, nothing of it compiled before."""
    with tempfile.TemporaryDirectory() as tmp:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": tmp, "TRITON_CACHE_DIR": tmp}
        done = subprocess.run(
            [*walls.prefix, sys.executable, "-c", TORCH, device], env=walls.environment(Path(tmp)) | fresh,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if done.returncode:
        return Finding("torch", "fail", f"does not load: {one_line(done.stderr[-300:])}: `uv sync` installs it again")
    facts = json.loads(done.stdout.strip().rpartition("\n")[2])
    built = f"{facts['version']}, built for {'CUDA ' + facts['cuda'] if facts['cuda'] else 'the CPU alone'}"
    if not device:
        return Finding("torch", "ok", f"{built}; not tried, without a GPU")
    if facts["unusable"]:
        cure = "`uv pip install torch --torch-backend=auto`, then `uv run --no-sync loop.py`"
        return Finding("torch", "fail", f"{built}, cannot use the GPU: {one_line(facts['unusable'], 300)}: {cure}")
    if facts["uncompiled"]:
        cure = "`apt install gcc python3-dev` brings a C compiler and Python.h, or CC names a compiler"
        return Finding("torch", "fail", f"{built}, cannot compile: {one_line(facts['uncompiled'], 300)}: {cure}")
    return Finding("torch", "ok", built)


def check_isolation(root: Path, options: Namespace) -> Iterator[Finding]:
    missing = isolation.NONE.missing if options.no_isolation else isolation.find_isolation().missing
    if missing:
        cure = "train.py will have the network and see other processes; see What is not promised in README.md"
        yield Finding("isolation", "warn", f"{missing}: {cure}")
    else:
        yield Finding("isolation", "ok", "train.py will have no network and see no other process")


def check_disk(root: Path, options: Namespace) -> Iterator[Finding]:
    checks.check_disk(root)
    locks.of_device("cpu")  # makes the folder of the cache, or says why not
    for folder in {folder.stat().st_dev: folder for folder in (root, locks.cache())}.values():
        free = shutil.disk_usage(folder).free
        short = options.arena != "demo" and free < ROOM
        said = f"{free / 1e9:.0f} GB free at {folder}"
        yield Finding("disk", "warn" if short else "ok", said + (f": less than {ROOM / 1e9:.0f} GB" if short else ""))


def check_memory(root: Path, options: Namespace) -> Iterator[Finding]:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    short = free < LOADED
    said = f"{free / 1e9:.0f} GB free" + (f": less than {LOADED / 1e9:.0f} GB, close other programs" if short else "")
    yield Finding("memory", "warn" if short else "ok", said)


def check_data(root: Path, options: Namespace) -> Iterator[Finding]:
    """Whether the arena is there, and if not, whether it can be had; its files are checked when the run starts."""
    known = re.findall(r'Arena\("(\w+)"', (root / "prepare.py").read_text(encoding="utf-8"))
    manifest = locks.cache() / options.arena / "manifest.json"
    if os.sep in options.arena:
        there = Path(options.arena).is_dir()
        yield Finding("data", "ok" if there else "fail", f"{options.arena}{'' if there else ': no such folder'}")
    elif known and options.arena not in known:
        yield Finding("data", "fail", f"unknown arena {options.arena!r}: one of {', '.join(known)}, or ./a/folder")
    elif manifest.exists():
        size = sum(file["bytes"] for file in json.loads(manifest.read_text())["files"].values())
        yield Finding("data", "ok", f"arena {options.arena}, {size / 1e9:.2f} GB at {manifest.parent}")
    elif options.arena in ("demo", "python"):
        yield Finding("data", "ok", f"arena {options.arena} will be made of sources that are here")
    else:
        import requests  # a start of the driver need not wait for these two

        from autoresearch.hub import find_endpoint

        endpoint = find_endpoint()
        try:
            requests.head(endpoint, timeout=10)
        except requests.RequestException as error:
            cure = "HF_ENDPOINT names a mirror; `--arena python` (on a GPU) and `--demo` need no network"
            yield Finding("data", "fail", f"{endpoint} cannot be reached ({type(error).__name__}): {cure}")
            return
        ahead = f"`uv run prepare.py --arena {options.arena}` does it ahead"
        yield Finding("data", "warn", f"arena {options.arena} is to be downloaded from {endpoint}: {ahead}")


def check_agent(root: Path, options: Namespace) -> Iterator[Finding]:
    agent = find_agent(options.agent, options.model)
    checks.check_prices(agent, options)
    name = agent.name + (f", {shutil.which(agent.command[0])}" if not agent.verbatim else "")
    yield Finding("agent", "ok", name)
    if not agent.status:
        if agent.name in PRESETS:
            yield Finding("login", "warn", f"{agent.name} cannot be asked; `loop.py --experiments 1` shows it")
        return
    try:
        done = subprocess.run(agent.status, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
        known = done.returncode == 0
    except subprocess.TimeoutExpired:
        known = False
    if known:
        yield Finding("login", "ok", f"{agent.name} says that it is logged in")
    else:
        yield Finding("login", "fail", f"{agent.name} is not logged in: `{agent.login}`")


CHECKS: dict[str, Callable[[Path, Namespace], Iterator[Finding]]] = {
    "git": check_git, "GPU": check_gpu, "torch": check_torch, "isolation": check_isolation, "disk": check_disk,
    "memory": check_memory, "data": check_data, "agent": check_agent,
}  # fmt: skip


def table(findings: list[Finding]) -> Table:
    rows = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        rows.add_row(Text(finding.what), Text(finding.state, STYLES[finding.state]), Text(finding.said))
    return rows
