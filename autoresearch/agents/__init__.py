"""The coding agents: by name, or any shell command."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

from autoresearch.agents import aider, claude, codex, gemini, mini, opencode, pi, qwen
from autoresearch.agents.agent import Agent, Answer, Output, read_text
from autoresearch.files import CODE, UserError, one_line, tail
from autoresearch.task import MAX_FILE

# In the order of preference. Each is confined to the task's files as far as its command line
# goes, and leaves retries to the driver where it can.
NAMED = (claude, codex, gemini, opencode, aider, qwen, pi, mini)
AGENTS: dict[str, Agent] = {module.AGENT.name: module.AGENT for module in NAMED}
Price = tuple[float, float, float]


def read_free(output: Output) -> Answer:
    """The built-in agent's: as any command, but it costs nothing."""
    return replace(read_text(output), cost_usd=0.0)


# -P: its code does not come from the tree, which is its working directory
SEARCH = (sys.executable, "-P", "-m", "autoresearch.agents.random_search")
RANDOM = Agent("random", SEARCH, read_free, env={"PYTHONPATH": str(CODE)}, dollars=True)


def find_agent(root: Path, text: str | None, model: str | None = None) -> Agent:
    """An agent by its name, or any shell command; by default the first that is installed; with a
    repository's prices. UserError when there is none, or none of that name."""
    if text is None:
        installed = [agent for agent in AGENTS.values() if shutil.which(agent.command[0])]
        if not installed:
            cure = f"{claude.AGENT.install}, or give --agent 'any command' or --agent random"
            raise UserError(f"no coding agent is installed ({', '.join(AGENTS)}): {cure}", 2)
        agent = installed[0]
    elif text in AGENTS:
        agent = AGENTS[text]
        if not shutil.which(agent.command[0]):
            raise UserError(f"{agent.command[0]} is not on the PATH: {agent.install}", 2)
    else:
        agent = RANDOM if text == "random" else shell_command(text)
    if model and "{model}" not in agent.command:
        raise UserError(f"--model is for the agents that have one ({', '.join(AGENTS)})", 2)
    return replace(agent, model=model, price=read_prices(root).get(model or agent.name))


def shell_command(text: str) -> Agent:
    """Any command line; UserError when its first word is no command. A path is relative to the
    current folder, not to the agent's tree."""
    name = one_line(text, 80)
    first = re.match(r"\s*([\w./+-]+)(?=\s|$)", text)  # the first word, unless it is more shell
    if first and os.sep in first[1]:
        word = first[1]
        if not shutil.which(word):
            raise UserError(f"no program at {word}: no such file, or `chmod +x {word}`", 2)
        text = shlex.quote(str(Path(word).absolute())) + text[first.end() :]
    elif not text.strip() or (first and not is_command(first[1])):
        names = ", ".join([*AGENTS, "random"])
        cure = f"give one of {names}, or a command that is installed"
        raise UserError(f"unknown agent {name!r}: {cure}", 2)
    return Agent(name, ("/bin/sh", "-c", text), verbatim=True)


def is_command(word: str) -> bool:
    """Whether the shell knows a word, even as a builtin."""
    command = ["/bin/sh", "-c", 'command -v -- "$0"', word]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def read_prices(root: Path) -> dict[str, Price]:
    """The table [tool.autoresearch.prices] of pyproject.toml: by a model's or an agent's name, the
    dollars for a million tokens of input, cached input and output; UserError."""
    try:
        table = tomllib.loads(tail(root / "pyproject.toml", MAX_FILE))
        rows = dict(table.get("tool", {}).get("autoresearch", {}).get("prices", {}))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = "pyproject.toml: [tool.autoresearch.prices]"
        raise UserError(f"{where} cannot be read: {one_line(str(error))}") from None
    for name, row in rows.items():
        match row:
            case [int() | float(), int() | float(), int() | float()]:
                if all(0 <= price < math.inf for price in row):
                    continue
        form = f'"{name}" = [input, cached input, output], the name in quotes'
        raise UserError(f"pyproject.toml: the price of {name} must be three numbers: {form}")
    return {name: tuple(row) for name, row in rows.items()}
