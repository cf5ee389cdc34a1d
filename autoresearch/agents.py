"""The coding agents: what each is called by, and how one is asked. What it changed is for git to say."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from autoresearch import process
from autoresearch.records import Reply, UserError, one_line

ROOT = Path(__file__).resolve().parent.parent


FILES = (("prompt", "md"), ("agent", "out"), ("agent", "err"))


@dataclass(frozen=True)
class Agent:
    """A command that reads a prompt on standard input, edits train.py where it stands, and says what it did."""

    name: str
    command: tuple[str, ...]


BUILT_IN = {
    # -P: the worktree, which is its working directory, is not where its code comes from
    "random": Agent("random", (sys.executable, "-P", "-m", "autoresearch.random_agent")),
}


@dataclass(frozen=True)
class AgentCall:
    """Where one call happens: the worktree, the experiment's folder, which turn of it, what the environment adds, a
    limit in seconds, and the mark of the processes."""

    tree: Path
    folder: Path
    turn: int
    env: dict[str, str]
    limit: float
    mark: Path


def find_agent(text: str) -> Agent:
    """A built-in agent by its name, else any shell command; UserError when its first word is no command."""
    if text in BUILT_IN:
        return BUILT_IN[text]
    plain = re.match(r"\s*([\w./+-]+)(\s|$)", text)  # the first word, unless it is more shell than word
    if not text.strip() or (plain and not is_command(plain[1])):
        names = ", ".join(sorted(BUILT_IN))
        raise UserError(f"unknown agent {one_line(text, 80)!r}: give {names}, or a command that is installed", 2)
    return Agent(one_line(text, 80), ("/bin/sh", "-c", text))


def is_command(word: str) -> bool:
    """Whether the shell knows the word: a program, a builtin or one of its keywords."""
    known = subprocess.run(["/bin/sh", "-c", 'command -v -- "$0"', word], capture_output=True, cwd=ROOT, check=False)
    return known.returncode == 0


def ask(agent: Agent, prompt: str, call: AgentCall) -> Reply:
    """Call the agent once, fresh, under its hard limit. Prompt and transcript of the turn stay in the folder."""
    prompt_file, out, err = (call.folder / f"{name}-{call.turn}.{kind}" for name, kind in FILES)
    prompt_file.write_text(prompt, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)} if agent.name in BUILT_IN else dict(os.environ)
    ended = process.run(
        list(agent.command), cwd=call.tree, env=env | call.env, limit=call.limit, mark=call.mark,
        stdin=prompt_file, out=out, err=err,
    )  # fmt: skip
    description, reason = read_answer(process.tail(out, 20_000))
    if ended.code is None:
        error = f"the agent was stopped after {call.limit:g} s"
    elif ended.code:
        said = one_line(process.tail(err) or process.tail(out), 300) or "no output"
        error = f"the agent ended with exit code {ended.code}: {said}"
    else:
        error = ""
    return Reply(description, reason, ended.seconds, error)


def read_answer(text: str) -> tuple[str, str]:
    """The idea is the last non-empty line of an answer, the reason the paragraph before it; both bounded."""
    lines = text.rstrip().splitlines()
    if not lines:
        return "", ""
    paragraphs = "\n".join(lines[:-1]).rstrip().split("\n\n")
    return one_line(lines[-1].strip("#*`- ")), one_line(paragraphs[-1], 1000)
