"""One list of checks: `doctor` prints them all, a start stops at the first that fails."""

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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from statistics import stdev

from autoresearch.agents import AGENTS, find_agent
from autoresearch.agents.agent import Agent
from autoresearch.files import (
    CODE,
    UserError,
    cache,
    check_free,
    check_room,
    lock_of_device,
    one_line,
)
from autoresearch.ideas import Run
from autoresearch.jobs import Job, gpu
from autoresearch.jobs.compiled import cache_environment
from autoresearch.jobs.job import Conditions, run_spec
from autoresearch.jobs.sandbox import NONE, Sandbox, descend, fault, find_rungs, lend
from autoresearch.journal.changes import syntax_error
from autoresearch.journal.experiment import show
from autoresearch.journal.git import AgentTree, GitError, Repo, run_git
from autoresearch.journal.journal import FOLDER, REFS, TABLE, Journal, read_history
from autoresearch.pace import PACE
from autoresearch.task import FILES, Arena, Machine, Task, set_up
from autoresearch.view.figures import count

CAPABILITY = 8.0  # of the oldest GPUs with bfloat16, which train.py needs
SMALL = 8_000  # MB of GPU memory: the recipe was made for this much
ROOM = 10_000_000_000  # bytes for climbmix, its tokens, models and logs
OURS = (FOLDER, TABLE, ".venv", "node_modules")  # untracked, and no loss to a clean tree
LOADED = 6_000_000_000  # bytes of memory for a training and its guard


@dataclass(frozen=True)
class Setup:
    """The parts of a run with some options, each found when it is first needed."""

    root: Path
    task: Task
    options: argparse.Namespace
    seed: int

    @cached_property
    def checkout(self) -> Repo:
        return open_checkout(self.root)

    @cached_property
    def journal(self) -> Journal:
        return Journal(self.checkout, self.options.tag, self.task)

    @cached_property
    def agent(self) -> Agent:
        return find_agent(self.root, self.options.agent, self.options.model)

    @cached_property
    def machine(self) -> Machine:
        found = gpu.find_machine(self.needs_gpu, self.options.gpu)
        if self.root == CODE:
            with suppress(metadata.PackageNotFoundError):
                return replace(found, torch=metadata.version("torch"))
        return found

    @property
    def needs_gpu(self) -> bool:
        return self.task.gpu and self.options.arena != "demo"

    @cached_property
    def sandbox(self) -> Sandbox:
        """The best one in which the GPU works, if it is needed."""
        if self.options.no_isolation:
            return NONE
        rungs = find_rungs(self.root, self.task.network, self.task.env)
        return descend(rungs, self.gpu_fault) if self.needs_gpu else next(rungs)

    def gpu_fault(self, sandbox: Sandbox) -> str:
        """Why the GPU does not work in a sandbox, if it does not. `machine` has used it before
        without one: that makes its device files, which a sandboxed program cannot."""
        if not self.machine.gpu:
            return ""
        if self.root != CODE:
            return fault(sandbox, ["nvidia-smi", "--list-gpus"])
        try:
            ask_gpt(sandbox, "torch", "cuda")
        except (UserError, subprocess.SubprocessError) as error:
            return one_line(str(error), 300)
        return ""

    def prepare(self, tree: AgentTree, start: str, quietly: bool = False) -> Arena:
        """Run the task's `setup` on a commit, in a tree that is removed after it."""
        env = {name: text for name, text in os.environ.items() if name != "AUTORESEARCH_ARENA"}
        if self.options.arena:
            env["AUTORESEARCH_ARENA"] = self.options.arena
        tree.hand_out(start)
        try:
            return set_up(self.task, tree.path, lend(self.root, env), quietly)
        finally:
            tree.discard()

    def conditions(self, start: str, arena: Arena) -> Conditions:
        """What runs have in common, as the arena is now."""
        timed = arena.budget and not arena.counted
        usual = max(PACE.shortest_limit, 2 * arena.budget) if timed else self.task.timeout
        limit = self.options.train_timeout or usual
        if limit <= arena.budget:
            short = f"--train-timeout {limit:g} ends a run before its budget"
            raise UserError(f"{short} of {arena.budget:g} s", 2)
        return Conditions(
            self.task, self.root, start, arena, self.needs_gpu, self.seed, limit, self.sandbox
        )


class Warn(str):
    """A finding that does not stop a run, and that a person should know."""


def examine(setup: Setup) -> Iterator[tuple[str, str, str]]:
    """Make every check, even if others fail: its name, `ok`, `warn` or `fail`, and what it says. A
    finding of two of them comes once; one that does not concern the task says nothing."""
    heard = {""}
    for what, check in CHECKS.items():
        try:
            said = check(setup)
            state = "warn" if isinstance(said, Warn) else "ok"
        except Exception as error:
            state, said = "fail", explain(error)
        if said not in heard:
            yield what, state, said
        heard.add(said)


def require(setup: Setup) -> None:
    """Make the checks before a start; UserError at the first that fails."""
    for what, check in CHECKS.items():
        if what not in ("run", "measure", "torch", "data"):  # the start finds out by doing it
            check(setup)


def explain(error: Exception) -> str:
    """An error in one line; an unforeseen one with its type and place."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, GitError | OSError | subprocess.SubprocessError):
        return one_line(str(error), 500)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}:{line}"
    said = f"{type(error).__name__}: {error} (in {place}, a mistake of this program)"
    return one_line(said, 500)


# --------------------------------------------------------------------------------------------------
# The list. A check returns its finding, or raises.


def check_git(setup: Setup) -> str:
    checkout, tag = setup.checkout, setup.options.tag
    check_name(checkout, tag)
    branch = f"refs/heads/autoresearch/{tag}"
    if checkout.resolve("refs/heads/autoresearch"):
        cure = "`git branch -m autoresearch another-name`"
        raise UserError(f"a branch named autoresearch is in the way: {cure}", 2)
    if below := checkout.refs(f"{branch}/"):
        raise UserError(f"{below[0]} is in the way of the run's branch: take another --tag", 2)
    if checkout.git("rev-parse", "--symbolic-full-name", "HEAD").strip() == branch:
        why = f"your checkout is on autoresearch/{tag}, which the loop moves"
        raise UserError(f"{why}: `git switch -` first")
    if not checkout.refs(f"{REFS}/{tag}"):
        check_committed(checkout, setup.task)
    check_free(setup.journal.lock, f"the run {tag}")
    return f"{run_git('version').strip()}; the run would be {tag}"


def check_task(setup: Setup) -> str:
    task, held = setup.task, setup.checkout.blobs("HEAD")
    runs = [word for word in task.measure.split() if task.may_edit(word)]
    if runs and not task.guard:
        promise = "what it prints is a promise and not a measurement: a guard can check it"
        return Warn(f"`{task.measure}` rests on {runs[0]}, which may be edited: {promise}")
    if unset := [name for name in task.env if name not in os.environ]:
        return Warn(f"env = {', '.join(unset)} is not set here")
    if not (setup.root / "program.md").exists():
        return Warn("there is no program.md: write what agents should know and try")
    editable = sum(map(task.may_edit, held))
    return f"{task.goal}; {task.what}: {editable} of {len(held)} files"


def check_agent(setup: Setup) -> str:
    agent, options = setup.agent, setup.options
    if agent.name == "random" and not (setup.root / "train.py").exists():
        raise UserError("--agent random and --demo step through train.py, which is not there", 2)
    known = agent.dollars or agent.price or options.gpu_dollars_per_hour
    if options.dollars < math.inf and not known:
        table = "[tool.autoresearch.prices] of pyproject.toml"
        form = f'"{agent.model or agent.name}" = [input, cached input, output]'
        cure = f"put the price of its tokens into {table}: {form}"
        if agent.verbatim:
            cure = "only --gpu-dollars-per-hour can be counted"
        raise UserError(f"--dollars: {agent.name} does not say what a call costs: {cure}", 2)
    return agent.name if agent.verbatim else f"{agent.name}, {shutil.which(agent.command[0])}"


def check_login(setup: Setup) -> str:
    agent = setup.agent
    if agent.name not in AGENTS:
        return f"{agent.name} needs none that is known"
    if not agent.status:
        return Warn(f"{agent.name} cannot be asked; `loop.py --experiments 1` shows it")
    try:
        nowhere = subprocess.DEVNULL
        subprocess.run(agent.status, capture_output=True, timeout=60, check=True, stdin=nowhere)
    except subprocess.SubprocessError:
        raise UserError(f"{agent.name} is not logged in: `{agent.login}`") from None
    return f"{agent.name} says that it is logged in"


def check_gpu(setup: Setup) -> str:
    machine = setup.machine
    check_free(lock_of_device(machine.uuid or "cpu"), machine.gpu or "the CPU")
    if not machine.gpu:
        return "none is needed"
    capability, memory = gpu.capability(machine), gpu.memory(machine, "total")
    ours = setup.root == CODE
    if ours and capability and capability < CAPABILITY:
        needed = f"train.py needs {CAPABILITY:g} (Ampere, 2020) or newer"
        why = f"{machine.gpu} has compute capability {capability:g}, and {needed}"
        raise UserError(f"{why}: take another GPU with --gpu N, or try --demo")
    if users := gpu.users(machine):
        raise UserError(f"{users}: stop that first, or take another GPU with --gpu N")
    size = f"{memory} MB" if memory else "memory not reported"
    facts = f"{machine.gpu}, driver {machine.driver}, compute capability {capability}, {size}"
    if ours and memory and memory < SMALL:
        return Warn(f"{facts}: less than {SMALL} MB; try --arena tinystories")
    return facts


def check_resumed(setup: Setup) -> str:
    """A run goes on only under its first conditions; the start checks those of the data."""
    journal = setup.journal
    journal.experiments = read_history(setup.checkout, journal.tag)
    if not journal.experiments:
        return "a new one"
    arena = Arena(setup.options.arena, data=journal.experiments[0].arena.data)
    check_comparable(journal, arena, setup.machine, setup.seed)
    return f"goes on after {count(journal.next_number - 1)}"


def check_torch(setup: Setup) -> str:
    if setup.root != CODE:
        return ""
    cuda = setup.needs_gpu and shutil.which("nvidia-smi")
    return ask_gpt(setup.sandbox, "torch", "cuda" if cuda else "")


def check_measure(setup: Setup) -> str:
    """Measure three times, each in a clean tree, and have the guard look at the first."""
    if setup.root == CODE:
        return "the first experiment, the baseline, makes it"
    task = setup.task
    runs = measure_thrice(setup)
    scores = [run.score or 0.0 for run in runs]
    seconds = sum(run.facts["run_seconds"] for run in runs) / len(runs)
    said = f"{task.metric} {', '.join(map(show, scores))}; {seconds:.1f} s each"
    if (spread := stdev(scores)) > 0 and not task.duels:
        # of a gain, which is the difference of two scores
        said += f"; set noise = {spread * math.sqrt(2):.2g}, or better from more runs"
        said += "; if it drifts with the machine, as a latency does, duels = 5"
    if editable := find_editable(setup.root):
        cure = "start `measure` with PYTHONPATH=. or so"
        return Warn(f"{said}; {editable} is imported from your checkout, not from the edit: {cure}")
    return said


def measure_thrice(setup: Setup) -> list[Run]:
    """Three runs of what the person committed; UserError where one has no score."""
    checkout, runs = setup.checkout, list[Run]()
    commit = checkout.resolve("HEAD") or ""
    with tempfile.TemporaryDirectory() as tmp:
        tree = AgentTree(checkout, Path(tmp, "tree"))
        arena = setup.prepare(tree, commit, quietly=True)
        conditions = setup.conditions(commit, arena)
        for number in range(3):
            alive, worst = Path(tmp, "alive"), setup.task.worst
            seeded = replace(conditions, seed=setup.seed + number)
            spec = run_spec(seeded, checkout, alive, commit, "", -worst if runs else worst)
            outcome = Job(Path(tmp, str(number)), spec, os.environ).result() or {}
            lost = {"crash": outcome.get("trouble", "its job is lost")}
            run = Run(**outcome.get("run", lost))
            if run.score is None:
                unknown = [path for path in checkout.unknown() if not path.startswith(OURS)]
                missed = "No such file" in run.crash or "not found" in run.crash
                lacks = one_line(", ".join(unknown), 100) if missed else ""
                why = f"(a clean tree lacks {lacks}: $AUTORESEARCH_CHECKOUT is yours)"
                raise UserError(f"{run.crash} {why}" if lacks else run.crash)
            runs.append(run)
    return runs


def find_editable(root: Path) -> str:
    """The first package of a repository's .venv that Python imports from the checkout itself."""
    for told in root.glob(".venv/lib/python*/site-packages/*.dist-info/direct_url.json"):
        with suppress(ValueError, KeyError):
            source = json.loads(told.read_text())
            if source["dir_info"]["editable"] and source["url"] == root.as_uri():
                return told.parent.name.partition("-")[0]
    return ""


def check_isolation(setup: Setup) -> str:
    if missing := setup.sandbox.missing:
        exposed = "" if setup.sandbox.prefix else ": a run will have all that you have"
        return Warn(f"{missing}{exposed}; see What is not promised in README.md")
    net = "the" if setup.task.network else "no"
    return f"a run will have {net} network, see no other process, and open no file but its own"


def check_disk(setup: Setup) -> str:
    check_room(setup.root)
    cache = lock_of_device("cpu").parent  # which this makes, or says why not
    folders = {folder.stat().st_dev: folder for folder in (setup.root, cache)}.values()
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    said = ", ".join(f"{room / 1e9:.0f} GB free at {folder}" for folder, room in free.items())
    if setup.needs_gpu and min(free.values()) < ROOM:
        return Warn(f"{said}: less than {ROOM / 1e9:.0f} GB")
    return said


def check_memory(setup: Setup) -> str:
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    said = f"{free / 1e9:.0f} GB free"
    if free < LOADED:
        return Warn(f"{said}: less than {LOADED / 1e9:.0f} GB, close other programs")
    return said


def check_data(setup: Setup) -> str:
    return ask_gpt(NONE, "data", setup.options.arena) if setup.root == CODE else ""


def ask_gpt(sandbox: Sandbox, *args: str) -> str:
    """Have `gpt.check` make a check, in the sandbox of a run and with empty compile caches."""
    with tempfile.TemporaryDirectory() as tmp:
        env = sandbox.environment(Path(tmp)) | cache_environment(Path(tmp))
        env["AUTORESEARCH_CACHE"] = str(cache())
        for name in ("gpt", "autoresearch"):  # a run has its code in a tree, and sees no other
            shutil.copytree(CODE / name, Path(tmp, name))
        shutil.copy(CODE / "prepare.py", tmp)
        check = [sys.executable, "-m", "gpt.check", *args]
        command = sandbox.command(check, write=[Path(tmp)])
        done = subprocess.run(
            command, cwd=tmp, env=env, capture_output=True, text=True, timeout=300, check=False
        )
    said = (done.stderr if done.returncode else done.stdout).strip().rpartition("\n")[2]
    kind, _, words = said.partition(": ")
    if done.returncode and kind == "error":
        raise UserError(words)
    if done.returncode:
        raise UserError(f"torch does not load: {one_line(said, 300)}: `uv sync` installs it again")
    return Warn(words) if kind == "warning" else said


CHECKS: dict[str, Callable[[Setup], str]] = {
    "git": check_git, "task": check_task, "agent": check_agent, "login": check_login,
    "GPU": check_gpu, "run": check_resumed, "measure": check_measure, "torch": check_torch,
    "isolation": check_isolation, "disk": check_disk, "memory": check_memory, "data": check_data,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Single conditions; each refusal is one line that names the cure


def top_of(folder: Path) -> Path:
    """The top of the repository that a folder lies in, else the folder."""
    folder = folder.expanduser().resolve()
    try:
        return Path(run_git("-C", str(folder), "rev-parse", "--show-toplevel").strip())
    except GitError:
        return folder


def open_checkout(root: Path) -> Repo:
    try:
        checkout = Repo.at(root)
    except GitError as error:
        why = f"{root} is not a git repository of its own"
        commit = "git -c user.name=me -c user.email=me@localhost commit -m start"
        cure = f"`cd {root} && git init && git add -A && {commit}` makes it one"
        if "safe.directory" in error.err:
            why = f"{root} belongs to another user, and git works there once you trust it"
            cure = f"`git config --global --add safe.directory {shlex.quote(str(root))}`"
        raise UserError(f"{why}: {cure} ({one_line(error.err, 80)})") from None
    if checkout.resolve("HEAD") is None:
        raise UserError("the repository has no commit yet: `git add -A && git commit -m start`")
    return checkout


def check_name(checkout: Repo, tag: str) -> None:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", tag)
    if not plain or not checkout.succeeds("check-ref-format", f"refs/heads/autoresearch/{tag}"):
        why = f"--tag {tag!r} cannot be part of a branch's name"
        raise UserError(f"{why}: use letters, digits, '-' and '_'", 2)


def check_committed(checkout: Repo, task: Task) -> None:
    """A run starts from the user's last commit: later changes would silently not be in it."""
    held = checkout.blobs("HEAD")
    lines = " ".join((task.measure, task.guard, task.setup)).split()
    named = {word for word in lines if (checkout.tree / word).is_file()} | {*task.files} & {*held}
    named |= {FILES[0]}  # a task that is not committed is no one's but of this moment
    for name in sorted(path for path in checkout.changed() if task.may_edit(path) or path in named):
        if name in held:
            cure = "`git commit` or `git stash` them first"
            raise UserError(f"{name} has changes that are not committed: {cure}")
        raise UserError(f"{name} is not in the last commit: `git add {name} && git commit`")
    if TABLE in held:
        cure = f"`git rm --cached {TABLE}`, and commit"
        raise UserError(f"{TABLE} is tracked, and the loop writes its own there: {cure}")
    if ".gitmodules" in held:
        cure = "commit their files in their place"
        raise UserError(f"the repository has submodules, which a clean tree lacks: {cure}")
    if not any(map(task.may_edit, held)):
        raise UserError(f"files = {task.what} matches no file of the last commit")
    if task.only_file and (
        wrong := syntax_error(task.what, checkout.show(checkout.resolve("HEAD") or "", task.what))
    ):
        raise UserError(wrong[0])


def check_comparable(journal: Journal, arena: Arena, machine: Machine, seed: int) -> None:
    """Scores compare within one arena and its files, on one GPU, with one torch and one seed."""
    if not journal.experiments:
        return
    if not journal.kept:
        lost = f"{journal.tag} has lost its baseline, {REFS}/{journal.tag}/0000"
        raise UserError(f"{lost}: take another --tag")
    first, task = journal.experiments[0], json.loads(journal.task.text)
    told = {"seeds": 1, "duels": 0}  # of an older record, which says nothing of them
    if first.task:
        told |= json.loads(journal.checkout.git("cat-file", "blob", first.task))
    for name, then, now in (
        *((key, value, task[key]) for key, value in told.items() if key in task),
        ("arena", first.arena.name, arena.name),
        ("data", first.arena.data, arena.data),
        ("GPU", first.machine.gpu or "none", machine.gpu or "none"),
        ("torch", first.machine.torch, machine.torch),
        ("seed", first.seed, seed),
    ):
        if then != now and now != "":
            ran = f"{journal.tag} ran with {name} {then}, and this is {now}"
            raise UserError(f"{ran}: take another --tag")
