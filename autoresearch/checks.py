"""What must hold before a run starts; each refusal is one line that names the cure."""

import math
import re
import shutil
from argparse import Namespace
from pathlib import Path

from autoresearch import gpu
from autoresearch.git import GitError, Repo
from autoresearch.ledger import REFS, Ledger
from autoresearch.pace import PACE
from autoresearch.presets import Agent
from autoresearch.records import Arena, Machine, UserError, one_line
from autoresearch.trial import check_syntax

CAPABILITY = 8.0  # of the oldest GPUs with bfloat16, which train.py needs


def open_checkout(root: Path) -> Repo:
    try:
        checkout = Repo.at(root)
    except GitError as error:
        if "safe.directory" in error.err:
            cure = f"`git config --global --add safe.directory {root}`"
            raise UserError(
                f"{root} belongs to another user, and git wants your word that you trust it: {cure}"
            ) from None
        commit = "git -c user.name=me -c user.email=me@localhost commit -m start"
        cure = f"`cd {root} && git init && git add -A && {commit}` makes it one"
        raise UserError(f"{root} is not a git repository of its own: {cure} ({one_line(error.err, 80)})") from None
    if checkout.resolve("HEAD") is None:
        raise UserError("the repository has no commit yet: `git add -A && git commit -m start`")
    return checkout


def check_prices(agent: Agent, options: Namespace) -> None:
    """A limit in dollars needs to know what is spent."""
    if options.dollars < math.inf and not (agent.dollars or agent.price or options.gpu_dollars_per_hour):
        name, table = agent.model or agent.name, "[tool.autoresearch.prices] of pyproject.toml"
        cure = "only --gpu-dollars-per-hour can be counted" if agent.verbatim else (
            f'put the price of its tokens into {table}: "{name}" = [input, cached input, output]'
        )  # fmt: skip
        raise UserError(f"--dollars: {agent.name} does not say what a call costs: {cure}", 2)


def check_gpu(machine: Machine) -> int:
    """The GPU must be new enough, which is told before a download, and ours alone. Returns the MiB of its memory that
    are in use all the same, say for a desktop."""
    check_capability(machine)
    if others := gpu.users(machine):
        raise UserError(f"{others}: stop that first, or take another GPU with --gpu N")
    return gpu.used(machine)


def check_capability(machine: Machine) -> None:
    if (capability := gpu.capability(machine)) and capability < CAPABILITY:
        why = f"compute capability {capability:g}, and train.py needs {CAPABILITY:g} (Ampere, 2020) or newer"
        raise UserError(f"{machine.gpu} has {why}: take another GPU with --gpu N, or try --demo")


def check_disk(folder: Path) -> None:
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
    if broken := check_syntax(checkout.tree / "train.py"):
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
