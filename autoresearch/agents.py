"""The coding agents: each a row of a table, and how one is asked. What it changed is for git to say."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from autoresearch import process, replies
from autoresearch.records import Failed, Hopeless, Reply, Trouble, Usage, UserError, one_line
from autoresearch.replies import Answer, Output, classify

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Agent:
    """A command that edits train.py where it stands and says what it did.

    In `command`, `env`, `files` and `stdin`, {tree} is its working directory, {glob} the same as a pattern that matches
    just it, {folder} the experiment's folder, {side} a file that it may write beside its output, {prompt} the text of
    the prompt and {file} the file that holds it. The word {model} becomes `flag` and the model that a person named, or
    nothing.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Output], Answer] = replies.read_text
    install: str = ""
    flag: str = "--model"
    stdin: str = "{file}"
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # written into the experiment's folder first
    model: str | None = None
    price: tuple[float, float, float] | None = None  # dollars for a million tokens: input, cached input, output


PRESETS = {agent.name: agent for agent in (
    Agent(
        "claude",
        ("claude", "-p", "--output-format", "json", "--safe-mode", "--no-session-persistence",
         "--tools", "Read,Edit,Write,Grep,Glob", "--permission-mode", "dontAsk",
         "--allowedTools", "Edit(/{glob}/train.py)", "--max-turns", "30", "--max-budget-usd", "1", "{model}"),
        replies.read_claude, "npm install -g @anthropic-ai/claude-code",
        env={"CLAUDE_CODE_MAX_RETRIES": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
             "CLAUDE_CODE_DISABLE_AUTO_MEMORY": "1"},
    ),
    Agent(
        "codex",
        ("codex", "exec", "--json", "--ephemeral", "--sandbox", "workspace-write", "--disable", "plugins",
         "-c", "sandbox_workspace_write.exclude_slash_tmp=true",
         "-c", "sandbox_workspace_write.exclude_tmpdir_env_var=true", "-o", "{side}", "{model}", "-"),
        replies.read_codex, "npm install -g @openai/codex",
    ),
)}  # fmt: skip
BUILT_IN = {
    # -P: the worktree, which is its working directory, is not where its code comes from
    "random": Agent("random", (sys.executable, "-P", "-m", "autoresearch.random_agent"), env={"PYTHONPATH": str(ROOT)}),
}


# -----------------------------------------------------------------------------
# Which agent


def find_agent(text: str | None, model: str | None = None) -> Agent:
    """An agent by its name, or any shell command; of none, the first that is installed. UserError when there is none,
    or none of that name."""
    if text is None:
        installed = [agent for agent in PRESETS.values() if shutil.which(agent.command[0])]
        if not installed:
            names = ", ".join(PRESETS)
            raise UserError(f"no coding agent is installed ({names}): give --agent 'any command', or --agent random", 2)
        agent = installed[0]
    elif text in PRESETS:
        agent = PRESETS[text]
        if not shutil.which(agent.command[0]):
            raise UserError(f"{agent.command[0]} is not on the PATH: {agent.install}", 2)
    elif text in BUILT_IN:
        agent = BUILT_IN[text]
    else:
        agent = shell_command(text)
    if model and "{model}" not in agent.command:
        raise UserError(f"--model is for the agents that have one ({', '.join(PRESETS)})", 2)
    return replace(agent, model=model, price=read_prices().get(model or agent.name))


def shell_command(text: str) -> Agent:
    """Any command line; UserError when its first word is no command."""
    plain = re.match(r"\s*([\w./+-]+)(\s|$)", text)  # the first word, unless it is more shell than word
    if not text.strip() or (plain and not is_command(plain[1])):
        names = ", ".join([*PRESETS, *BUILT_IN])
        raise UserError(f"unknown agent {one_line(text, 80)!r}: give one of {names}, or a command that is installed", 2)
    return Agent(one_line(text, 80), ("/bin/sh", "-c", text))


def is_command(word: str) -> bool:
    """Whether the shell knows the word: a program, a builtin or one of its keywords."""
    known = subprocess.run(["/bin/sh", "-c", 'command -v -- "$0"', word], capture_output=True, cwd=ROOT, check=False)
    return known.returncode == 0


def read_prices() -> dict[str, tuple[float, float, float]]:
    """The table [tool.autoresearch.prices] of pyproject.toml: by a model's or an agent's name, dollars for a million
    tokens of input, cached input and output. UserError for anything else in it."""
    try:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        prices = table.get("tool", {}).get("autoresearch", {}).get("prices", {})
        rows = {name: tuple(map(float, row)) for name, row in prices.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"pyproject.toml: [tool.autoresearch.prices] cannot be read: {one_line(str(error))}") from None
    for name, row in rows.items():
        if len(row) != 3 or min(row) < 0:
            raise UserError(f"pyproject.toml: the price of {name} must be three numbers: input, cached input, output")
    return rows  # type: ignore[return-value]  # their length was looked at


# -----------------------------------------------------------------------------
# One call


@dataclass(frozen=True)
class AgentCall:
    """Where one call happens: the worktree, the commit it starts from, the experiment's folder, what the environment
    adds, a limit in seconds, and the mark of the processes."""

    tree: Path
    base: str
    folder: Path
    env: dict[str, str]
    limit: float
    mark: Path


CALLS = "calls.jsonl"  # in an experiment's folder: what each call cost, those that brought nothing included


def ask(agent: Agent, prompt: str, call: AgentCall) -> Reply:
    """Call the agent once, fresh, under its hard limit. Prompt, transcript and cost stay in the experiment's folder."""
    turn = len(list(call.folder.glob("prompt-*.md")))
    file, out, err, side = (call.folder / name for name in (
        f"prompt-{turn}.md", f"agent-{turn}.out", f"agent-{turn}.err", f"agent-{turn}.side"))  # fmt: skip
    file.write_text(prompt, encoding="utf-8")
    words = {
        "tree": str(call.tree), "glob": re.sub(r"([\[*])", r"\\\1", str(call.tree)), "folder": str(call.folder),
        "side": str(side), "prompt": prompt, "file": str(file),
    }  # fmt: skip
    for name, text in agent.files.items():
        (call.folder / name).write_text(fill(text, words), encoding="utf-8")
    env = {**os.environ, **{name: fill(text, words) for name, text in agent.env.items()}, **call.env}
    try:
        ended = process.run(
            command_of(agent, words), cwd=call.tree, env=env, limit=call.limit, mark=call.mark,
            stdin=Path(fill(agent.stdin, words)), out=out, err=err, politely=True,
        )  # fmt: skip
    except OSError as error:
        return Reply("", "", Usage(0.0), Hopeless(f"{agent.name} cannot be started: {error.strerror}"))
    try:
        answer, unreadable = agent.read(Output(out, err, side)), ""
    except ValueError as error:
        answer, unreadable = Answer(), str(error)
    usage = usage_of(agent, answer, ended.seconds)
    with (call.folder / CALLS).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({"base": call.base, **asdict(usage)}) + "\n")
    return Reply(*read_answer(answer.text), usage, judge(agent, answer, unreadable, ended, err, call.limit))


def command_of(agent: Agent, words: dict[str, str]) -> list[str]:
    model = [agent.flag, agent.model] if agent.model else []
    return [word for part in agent.command for word in (model if part == "{model}" else [fill(part, words)])]


def fill(text: str, words: dict[str, str]) -> str:
    """Put words for their names in braces; other braces, as JSON has them, stay."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)


def usage_of(agent: Agent, answer: Answer, seconds: float) -> Usage:
    """What a call cost, by the CLI's own word, else by its tokens and the price that a person gave."""
    cost = answer.cost_usd
    if cost is None and agent.price and answer.tokens_in is not None and answer.tokens_out is not None:
        cached = answer.tokens_cached or 0
        amounts = (answer.tokens_in - cached, cached, answer.tokens_out)
        cost = sum(tokens * price for tokens, price in zip(amounts, agent.price, strict=True)) / 1e6
    return Usage(
        seconds, cost, answer.tokens_in, answer.tokens_cached, answer.tokens_out, answer.turns,
        answer.model or agent.model,
    )  # fmt: skip


def judge(
    agent: Agent, answer: Answer, unreadable: str, ended: process.Exit, err: Path, limit: float
) -> Trouble | None:
    """What went wrong with a call: our limit first, then what its error fields say whatever the exit code, then that,
    then output that is not what the CLI promises."""
    if ended.code is None:
        return Failed(f"{agent.name} was stopped after {limit:g} s")
    now = datetime.now().astimezone()
    if answer.error:
        return classify(answer.error, answer.status, now)
    said = [line for line in process.tail(err).splitlines() if line.strip()]
    if ended.code in (126, 127):  # the shell's: not executable, not found
        return Hopeless(one_line(said[-1] if said else f"exit code {ended.code}", 300))
    if ended.code:
        trouble = classify(said[-1] if said else "", None, now)
        return replace(trouble, why=f"exit code {ended.code}: {trouble.why or answer.text[-200:] or 'no output'}")
    return Failed(f"its output cannot be read: {unreadable}") if unreadable else None


def spent_on(folder: Path, base: str) -> Usage:
    """What all calls cost together that were made in an experiment's folder from a commit, also before a restart."""
    text = process.tail(folder / CALLS, 1_000_000) if (folder / CALLS).exists() else ""
    calls = [call for line in text.splitlines() if isinstance(call := replies.parse(line), dict)]
    mine = [Usage(**call) for call in calls if call.pop("base", None) == base]
    return sum(mine, start=Usage(0.0, calls=0))


def read_answer(text: str) -> tuple[str, str]:
    """The idea is the last non-empty line of an answer, the reason the paragraph before it; both bounded."""
    lines = text.rstrip().splitlines()
    if not lines:
        return "", ""
    paragraphs = "\n".join(lines[:-1]).rstrip().split("\n\n")
    return one_line(lines[-1].strip("#*`- ")), one_line(paragraphs[-1], 1000)
