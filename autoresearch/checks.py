"""What a run needs, as one list of checks: `doctor` prints them all, a start ends at the first that fails."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from autoresearch.agents import find_agent
from autoresearch.files import cache, lock_of_device, lock_owner
from autoresearch.git import GitError, Repo, run_git
from autoresearch.jobs import gpu, sandbox
from autoresearch.ledger import REFS, Ledger, read_history
from autoresearch.pace import PACE
from autoresearch.presets import PRESETS, Agent
from autoresearch.records import Arena, Machine, UserError, one_line
from autoresearch.task import check_syntax

CAPABILITY = 8.0  # of the oldest GPUs with bfloat16, which train.py needs
SMALL = 8_000  # MB of GPU memory that the recipe was made for, at least
ROOM = 10_000_000_000  # bytes for climbmix, its tokens, models and logs
LOADED = 6_000_000_000  # bytes of memory that a training with its referee takes


@dataclass(frozen=True)
class Setup:
    """What a run with some options would use, each part found when it is first needed."""

    root: Path
    options: argparse.Namespace
    seed: int

    @cached_property
    def checkout(self) -> Repo:
        return open_checkout(self.root)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.checkout, self.options.tag)

    @cached_property
    def agent(self) -> Agent:
        return find_agent(self.options.agent, self.options.model)

    @cached_property
    def machine(self) -> Machine:
        return gpu.find_machine(self.options.arena, self.options.gpu)

    @cached_property
    def walls(self) -> sandbox.Isolation:
        return sandbox.NONE if self.options.no_isolation else sandbox.find_isolation()


State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. A run cannot start with a `fail`."""

    what: str
    state: State
    said: str


class Warn(str):
    """What a check says of something that a run can start with, and a person should know."""


def examine(setup: Setup) -> Iterator[Finding]:
    """Make every check, whatever becomes of the others. What two of them say is said once."""
    heard = set[str]()
    for what, check in CHECKS.items():
        state: State
        try:
            said = check(setup)
            state = "warn" if isinstance(said, Warn) else "ok"
        except Exception as error:
            said, state = explain(error), "fail"
        if said not in heard:
            yield Finding(what, state, said)
        heard.add(said)


def require(setup: Setup) -> None:
    """Make the checks before a start; UserError at the first that fails."""
    for what, check in CHECKS.items():
        if what not in ("run", "torch", "data"):  # which the start finds out next, by mending, training and preparing
            check(setup)


def explain(error: Exception) -> str:
    """An error in one line; one that nobody foresaw with its type and place, for whoever mends this program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, GitError | OSError | argparse.ArgumentTypeError):
        return one_line(str(error), 500)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return one_line(f"{type(error).__name__}: {error} (in {place}, a mistake of this program)", 500)


# ----------------------------------------------------------------------------------------------------------------------
# The list. A check returns what it found; what it cannot accept is an exception.


def check_git(setup: Setup) -> str:
    check_tag(setup.checkout, setup.options.tag)
    if setup.ledger.is_new():
        check_committed(setup.checkout)
    if holder := lock_owner(setup.ledger.lock):
        raise UserError(f"the run {setup.options.tag} is taken by {holder}: another --tag for another run")
    return f"{run_git('version').strip()}; the run would be {setup.options.tag}"


def check_agent(setup: Setup) -> str:
    agent = setup.agent
    check_prices(agent, setup.options)
    return agent.name + (f", {shutil.which(agent.command[0])}" if not agent.verbatim else "")


def check_login(setup: Setup) -> str:
    agent = setup.agent
    if not agent.status:
        shows = f"{agent.name} cannot be asked; `loop.py --experiments 1` shows it"
        return Warn(shows) if agent.name in PRESETS else f"{agent.name} needs none that is known"
    try:
        done = subprocess.run(agent.status, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise UserError(f"{agent.name} is not logged in: `{agent.login}`")
    return f"{agent.name} says that it is logged in"


def check_gpu(setup: Setup) -> str:
    machine = setup.machine
    if holder := lock_owner(lock_of_device(machine.uuid or "cpu")):
        raise UserError(f"{machine.gpu or 'the CPU'} is taken by {holder}")
    if not machine.gpu:
        return "the demo arena needs none"
    capability, memory = gpu.capability(machine), gpu.memory(machine)
    if capability and capability < CAPABILITY:
        why = f"compute capability {capability:g}, and train.py needs {CAPABILITY:g} (Ampere, 2020) or newer"
        raise UserError(f"{machine.gpu} has {why}: take another GPU with --gpu N, or try --demo")
    if others := gpu.users(machine):
        raise UserError(f"{others}: stop that first, or take another GPU with --gpu N")
    size = f"{memory} MB" if memory else "memory not reported"
    facts = f"{machine.gpu}, driver {machine.driver}, compute capability {capability}, {size}"
    if memory and memory < SMALL:
        return Warn(f"{facts}: less than {SMALL} MB; try --arena tinystories")
    return facts


def check_resumed(setup: Setup) -> str:
    """A run goes on only under the conditions that it started with; its start checks those of the data."""
    ledger = setup.ledger
    ledger.history = read_history(setup.checkout, setup.options.tag)
    if not ledger.history:
        return "a new one"
    arena = Arena(setup.options.arena, 0.0, ledger.history[0][1].data, Path())
    check_comparable(ledger, arena, setup.machine, setup.seed)
    return f"goes on after {len(ledger.history)} experiments"


def check_torch(setup: Setup) -> str:
    there = setup.options.arena != "demo" and shutil.which("nvidia-smi")
    return try_torch("cuda" if there else "", setup.walls)


def check_isolation(setup: Setup) -> str:
    if missing := setup.walls.missing:
        cure = "train.py will have the network and see other processes; see What is not promised in README.md"
        return Warn(f"{missing}: {cure}")
    return "train.py will have no network and see no other process"


def check_disk(setup: Setup) -> str:
    check_room(setup.root)
    lock_of_device("cpu")  # makes the folder of the cache, or says why not
    folders = {folder.stat().st_dev: folder for folder in (setup.root, cache())}.values()
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    said = ", ".join(f"{room / 1e9:.0f} GB free at {folder}" for folder, room in free.items())
    short = setup.options.arena != "demo" and min(free.values()) < ROOM
    return Warn(f"{said}: less than {ROOM / 1e9:.0f} GB") if short else said


def check_memory(setup: Setup) -> str:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    said = f"{free / 1e9:.0f} GB free"
    return Warn(f"{said}: less than {LOADED / 1e9:.0f} GB, close other programs") if free < LOADED else said


def check_data(setup: Setup) -> str:
    """Whether the arena is there, and if not, whether it can be had; the start of a run checks its files."""
    arena: str = setup.options.arena
    known = re.findall(r'Arena\("(\w+)"', (setup.root / "prepare.py").read_text(encoding="utf-8"))
    manifest = cache() / arena / "manifest.json"
    if os.sep in arena:
        if not Path(arena).is_dir():
            raise UserError(f"{arena}: no such folder")
        return arena
    if known and arena not in known:
        raise UserError(f"unknown arena {arena!r}: one of {', '.join(known)}, or ./a/folder")
    if manifest.exists():
        size = sum(int(file["bytes"]) for file in json.loads(manifest.read_text())["files"].values())
        return f"arena {arena}, {size / 1e9:.2f} GB at {manifest.parent}"
    if arena in ("demo", "python"):
        return f"arena {arena} will be made of sources that are here"
    import requests  # a start of the driver need not wait for these two

    from autoresearch.hub import find_endpoint

    endpoint = find_endpoint()
    try:
        requests.head(endpoint, timeout=10)
    except requests.RequestException as error:
        cure = "HF_ENDPOINT names a mirror; `--arena python` (on a GPU) and `--demo` need no network"
        raise UserError(f"{endpoint} cannot be reached ({type(error).__name__}): {cure}") from None
    return Warn(f"arena {arena} is to be downloaded from {endpoint}: `uv run prepare.py --arena {arena}` does it ahead")


CHECKS: dict[str, Callable[[Setup], str]] = {
    "git": check_git, "agent": check_agent, "login": check_login, "GPU": check_gpu, "run": check_resumed,
    "torch": check_torch, "isolation": check_isolation, "disk": check_disk, "memory": check_memory, "data": check_data,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
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


def try_torch(device: str, walls: sandbox.Isolation) -> str:
    """Run and compile something small on a device, isolated like a training, with empty compile caches.
    UserError for what does not work; without a device, torch's version alone."""
    with tempfile.TemporaryDirectory() as tmp:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": tmp, "TRITON_CACHE_DIR": tmp}
        done = subprocess.run(
            [*walls.prefix, sys.executable, "-c", TORCH, device], env=walls.environment(Path(tmp)) | fresh,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if done.returncode:
        raise UserError(f"torch does not load: {one_line(done.stderr[-300:])}: `uv sync` installs it again")
    facts = json.loads(done.stdout.strip().rpartition("\n")[2])
    built = f"{facts['version']}, built for {'CUDA ' + facts['cuda'] if facts['cuda'] else 'the CPU alone'}"
    if not device:
        return f"{built}; not tried, without a GPU"
    if facts["unusable"]:
        cure = "`uv pip install torch --torch-backend=auto`, then `uv run --no-sync loop.py`"
        raise UserError(f"{built}, cannot use the GPU: {one_line(facts['unusable'], 300)}: {cure}")
    if facts["uncompiled"]:
        cure = "`apt install gcc python3-dev` brings a C compiler and Python.h, or CC names a compiler"
        raise UserError(f"{built}, cannot compile: {one_line(facts['uncompiled'], 300)}: {cure}")
    return built


# ----------------------------------------------------------------------------------------------------------------------
# Single conditions; each refusal is one line that names the cure


def open_checkout(root: Path) -> Repo:
    try:
        checkout = Repo.at(root)
    except GitError as error:
        if "safe.directory" in error.err:
            trust = f"`git config --global --add safe.directory {shlex.quote(str(root))}`"
            raise UserError(f"{root} belongs to another user, and git works there once you trust it: {trust}") from None
        commit = "git -c user.name=me -c user.email=me@localhost commit -m start"
        cure = f"`cd {root} && git init && git add -A && {commit}` makes it one"
        raise UserError(f"{root} is not a git repository of its own: {cure} ({one_line(error.err, 80)})") from None
    if checkout.resolve("HEAD") is None:
        raise UserError("the repository has no commit yet: `git add -A && git commit -m start`")
    return checkout


def check_prices(agent: Agent, options: argparse.Namespace) -> None:
    """A limit in dollars needs to know what is spent."""
    if options.dollars < math.inf and not (agent.dollars or agent.price or options.gpu_dollars_per_hour):
        name, table = agent.model or agent.name, "[tool.autoresearch.prices] of pyproject.toml"
        cure = "only --gpu-dollars-per-hour can be counted" if agent.verbatim else (
            f'put the price of its tokens into {table}: "{name}" = [input, cached input, output]'
        )  # fmt: skip
        raise UserError(f"--dollars: {agent.name} does not say what a call costs: {cure}", 2)


def check_room(folder: Path) -> None:
    if (free := shutil.disk_usage(folder).free) < 2 * PACE.min_free:
        raise UserError(f"only {free // 1_000_000} MB are free on the disk of {folder}: make room for 1 GB at least")


def check_tag(checkout: Repo, tag: str) -> None:
    branch = f"refs/heads/autoresearch/{tag}"
    check_name(checkout, tag)
    if checkout.resolve("refs/heads/autoresearch"):
        raise UserError("a branch named autoresearch is in the way: `git branch -m autoresearch another-name`", 2)
    if below := checkout.refs(f"{branch}/"):
        raise UserError(f"{below[0]} is in the way of the branch autoresearch/{tag}: take another --tag", 2)
    if checkout.head_branch() == branch:
        raise UserError(f"your checkout is on autoresearch/{tag}, which the loop moves: `git switch -` first")


def check_name(checkout: Repo, tag: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag) or not checkout.allows(f"refs/heads/autoresearch/{tag}"):
        raise UserError(f"--tag {tag!r} cannot be part of a branch's name: use letters, digits, '-' and '_'", 2)


def check_committed(checkout: Repo) -> None:
    """A run starts from the user's last commit: what they changed since would silently not be in it."""
    for name in ("train.py", "prepare.py"):
        if checkout.dirty(name):
            raise UserError(f"{name} has changes that are not committed: `git commit` or `git stash` them first")
        if not checkout.holds("HEAD", name):
            raise UserError(f"{name} is not in the last commit: `git add {name} && git commit`")
    if broken := check_syntax((checkout.tree / "train.py").read_bytes()):
        raise UserError(broken.reason)


def check_comparable(ledger: Ledger, arena: Arena, machine: Machine, seed: int) -> None:
    """Numbers are compared within one arena and its files, on one GPU, with one torch and one seed."""
    if not ledger.history:
        return
    if not ledger.kept:
        raise UserError(f"{ledger.tag} has lost its baseline, {REFS}/{ledger.tag}/0000: take another --tag")
    first = ledger.history[0][1]
    for name, then, now in (
        ("arena", first.arena, arena.name),
        ("data", first.data, arena.data),
        ("GPU", first.gpu or "none", machine.gpu or "none"),
        ("torch", first.torch, machine.torch),
        ("seed", first.seed, seed),
    ):
        if then != now:
            raise UserError(f"{ledger.tag} ran with {name} {then}, and this is {now}: take another --tag")
