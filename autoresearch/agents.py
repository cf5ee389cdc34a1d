"""Which coding agent is taken, and how it is asked once. What it changed is for git to say."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from autoresearch import replies
from autoresearch.files import tail
from autoresearch.jobs import Job
from autoresearch.jobs.keeper import Exit
from autoresearch.presets import BUILT_IN, PRESETS, ROOT, Agent
from autoresearch.records import Failed, Hopeless, Reply, Trouble, Usage, UserError, one_line
from autoresearch.replies import Answer, Output, classify

# -----------------------------------------------------------------------------
# Which agent


def find_agent(text: str | None, model: str | None = None) -> Agent:
    """An agent by its name, or any shell command; of none, the first that is installed. UserError when there is none,
    or none of that name."""
    if text is None:
        installed = [agent for agent in PRESETS.values() if shutil.which(agent.command[0])]
        if not installed:
            names = ", ".join(PRESETS)
            cure = f"{PRESETS['claude'].install}, or give --agent 'any command' or --agent random"
            raise UserError(f"no coding agent is installed ({names}): {cure}", 2)
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
    """Any command line; UserError when its first word is no command. A path counts from here, and not from where the
    agent works."""
    name = one_line(text, 80)
    plain = re.match(r"\s*([\w./+-]+)(?=\s|$)", text)  # the first word, unless it is more shell than word
    if plain and os.sep in plain[1] and not is_command(plain[1]):
        raise UserError(f"no program at {plain[1]}: no such file, or `chmod +x {plain[1]}`", 2)
    if not text.strip() or (plain and not is_command(plain[1])):
        names = ", ".join([*PRESETS, *BUILT_IN])
        raise UserError(f"unknown agent {name!r}: give one of {names}, or a command that is installed", 2)
    if plain and os.sep in plain[1]:
        text = shlex.quote(str(Path(plain[1]).absolute())) + text[plain.end() :]
    return Agent(name, ("/bin/sh", "-c", text), verbatim=True)


def is_command(word: str) -> bool:
    """Whether a word is the path of a program, or the shell knows it: a program, a builtin or one of its keywords."""
    if os.sep in word:
        return Path(word).is_file() and os.access(word, os.X_OK)
    known = subprocess.run(["/bin/sh", "-c", 'command -v -- "$0"', word], capture_output=True, cwd=ROOT, check=False)
    return known.returncode == 0


def read_prices() -> dict[str, tuple[float, float, float]]:
    """The table [tool.autoresearch.prices] of pyproject.toml: by a model's or an agent's name, dollars for a million
    tokens of input, cached input and output. UserError for anything else in it."""
    try:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        prices = table.get("tool", {}).get("autoresearch", {}).get("prices", {})
        rows = dict(prices)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"pyproject.toml: [tool.autoresearch.prices] cannot be read: {one_line(str(error))}") from None
    for name, row in rows.items():
        match row:
            case [int() | float(), int() | float(), int() | float()] if all(0 <= price < math.inf for price in row):
                rows[name] = tuple(row)
            case _:
                form = f'"{name}" = [input, cached input, output], the name in quotes'
                raise UserError(f"pyproject.toml: the price of {name} must be three numbers: {form}")
    return rows


# -----------------------------------------------------------------------------
# One call


@dataclass(frozen=True)
class AgentCall:
    """Where one call happens: the agent's tree, the commit it starts from, the experiment's folder, what the
    environment adds, a limit in seconds, and the lock that every living job shares."""

    tree: Path
    base: str
    folder: Path
    env: dict[str, str]
    limit: float
    alive: Path


CALLS = "calls.jsonl"  # in an experiment's folder: what each call cost, those that brought nothing included


def ask(agent: Agent, prompt: str, call: AgentCall) -> Reply:
    """Call the agent once, fresh, under its hard limit. Prompt, transcript and cost stay in the experiment's folder."""
    call.folder.mkdir(parents=True, exist_ok=True)
    turn = len(list(call.folder.glob("prompt-*.md")))
    file, output = call.folder / f"prompt-{turn}.md", Output(call.folder / f"agent-{turn}")
    file.write_text(prompt, encoding="utf-8")
    words = {
        "tree": str(call.tree), "glob": re.sub(r"([\[*])", r"\\\1", str(call.tree)), "regex": re.escape(str(call.tree)),
        "folder": str(call.folder), "side": str(output.prefix), "file": str(file), "prompt": prompt,
        "json": json_string(prompt),
    }  # fmt: skip
    for name, text in agent.files.items():
        (call.folder / name).write_text(fill(text, words), encoding="utf-8")
    env = {**os.environ, **{name: fill(text, words) for name, text in agent.env.items()}, **call.env}
    spec = {
        "kind": "call", "command": command_of(agent, words), "cwd": str(call.tree), "limit": call.limit,
        "stdin": fill(agent.stdin, words), "out": str(output.path("out")), "err": str(output.path("err")),
        "alive": str(call.alive),
    }  # fmt: skip
    found = Job(call.folder, spec, env).result()
    if found is None:
        return Reply("", "", Usage(0.0), Failed(f"the job of {agent.name} is lost"))
    if "not_started" in found:
        return Reply("", "", Usage(0.0), Hopeless(f"{agent.name} cannot be started: {found['not_started']}"))
    ended = Exit(**found)
    try:
        answer, unreadable = agent.read(output), ""
    except replies.UNREADABLE as error:
        answer, unreadable = Answer(), str(error)
    usage = usage_of(agent, answer, ended.seconds)
    call.folder.mkdir(parents=True, exist_ok=True)  # once more: the agent may have removed it
    with (call.folder / CALLS).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({"base": call.base, **asdict(usage)}) + "\n")
    trouble = judge(agent, answer, unreadable, ended, output)
    return Reply(*read_answer(answer.text), usage, trouble, cut_short=bool(answer.error) and ended.code is not None)


def command_of(agent: Agent, words: dict[str, str]) -> list[str]:
    if agent.verbatim:
        return list(agent.command)
    model = [agent.flag, agent.model] if agent.model else []
    return [word for part in agent.command for word in (model if part == "{model}" else [fill(part, words)])]


def fill(text: str, words: dict[str, str]) -> str:
    """Put words for their names in braces; other braces, as JSON has them, stay."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)


def json_string(text: str) -> str:
    """A text as a JSON string that is also one of YAML, which knows no surrogate pairs."""

    def word(found: re.Match[str]) -> str:
        return json.dumps(found[0])[1:-1] if found[0][0] <= "\uffff" else f"\\U{ord(found[0]):08x}"

    return '"' + re.sub("[\0-\uffff]+|.", word, text) + '"'


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


def judge(agent: Agent, answer: Answer, unreadable: str, ended: Exit, output: Output) -> Trouble | None:
    """What went wrong with a call: our limit first, then what its error fields say whatever the exit code, then that,
    then output that is not what the CLI promises."""
    now = datetime.now().astimezone()
    told = classify(answer.error, answer.status, now) if answer.error else None
    if ended.code is None:
        late = f"{agent.name} was stopped {ended.why}"
        # what it was waiting for, say a network
        return replace(told, why=f"{late}: {told.why}") if told else Failed(late)
    if told:
        return told
    said = [line for line in output.text("err", 4000).splitlines() if line.strip()]
    if ended.code in (126, 127):  # the shell's: not executable, not found
        return Hopeless(one_line(said[-1] if said else f"exit code {ended.code}", 300))
    if ended.code:
        trouble = classify(said[-1] if said else "", None, now)
        why = trouble.why or one_line(answer.text[-200:]) or "no output"
        return replace(trouble, why=f"exit code {ended.code}: {why}")
    return Failed(f"its output cannot be read: {one_line(unreadable)}") if unreadable else None


def spent_on(folder: Path, base: str) -> Usage:
    """What all calls cost together that were made in an experiment's folder from a commit, also before a restart."""
    text = tail(folder / CALLS, 1_000_000)
    calls = [call for line in text.splitlines() if isinstance(call := replies.parse(line), dict)]
    names = {f.name for f in fields(Usage)}  # a line of another version, or torn by a kill, is left out
    mine = [call for call in calls if call.pop("base", None) == base and call.keys() == names]
    return sum((Usage(**call) for call in mine), start=Usage(0.0, calls=0))


def read_answer(text: str) -> tuple[str, str]:
    """The idea is the last non-empty line of an answer, the reason the paragraph before it; both bounded."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("```")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        return "", ""
    paragraphs = "\n".join(lines[:-1]).rstrip().split("\n\n")
    return one_line(lines[-1].strip("#*`- ")), one_line(paragraphs[-1], 1000)
