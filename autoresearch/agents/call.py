"""One call of an agent. git says what it changed."""

import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from autoresearch.agents.agent import UNREADABLE, Agent, Answer, Output, parse
from autoresearch.agents.trouble import classify
from autoresearch.files import one_line, tail
from autoresearch.ideas import Fruitless, NeedsPerson, Reply, Trouble, Usage
from autoresearch.jobs import Job
from autoresearch.jobs.keeper import Exit
from autoresearch.task import Task, as_regex

FILES = 50  # named to an agent that has to be told of each
CALLS = "calls.jsonl"  # in an experiment's folder: the usage of each call, fruitless ones included


@dataclass(frozen=True)
class AgentCall:
    """Where one call happens: the task, the agent's tree, the commit it starts from, the
    experiment's folder, additions to the environment, a limit in seconds, the lock that all living
    jobs share."""

    task: Task
    tree: Path
    base: str
    folder: Path
    env: dict[str, str]
    limit: float
    alive: Path


def ask(agent: Agent, prompt: str, call: AgentCall) -> Reply:
    """Call the agent once, fresh. Prompt, transcript and cost stay in the experiment's folder."""
    call.folder.mkdir(parents=True, exist_ok=True)
    turn = len(list(call.folder.glob("prompt-*.md")))
    file, output = call.folder / f"prompt-{turn}.md", Output(call.folder / f"agent-{turn}")
    file.write_text(prompt, encoding="utf-8")
    blanks = {
        "tree": str(call.tree),
        "glob": re.sub(r"([\[*])", r"\\\1", str(call.tree)),
        "regex": re.escape(str(call.tree)),
        "folder": str(call.folder),
        "side": str(output.prefix),
        "file": str(file),
        "json": json_string(prompt),
        "what": call.task.what,
    }
    blanks["edits"] = edits(agent, call.task.files, blanks)
    for name, text in agent.files.items():
        (call.folder / name).write_text(fill(text, blanks), encoding="utf-8")
    own = {name: fill(text, blanks) for name, text in agent.env.items()}
    spec = {
        "kind": "call",
        "command": command_of(agent, blanks, call),
        "cwd": str(call.tree),
        "limit": call.limit,
        "stdin": fill(agent.stdin, blanks),
        "out": str(output.path("out")),
        "err": str(output.path("err")),
        "alive": str(call.alive),
    }
    found = Job(call.folder, spec, {**os.environ, **own, **call.env}).result()
    if found is None:
        return Reply(trouble=Fruitless(f"the job of {agent.name} is lost"))
    if why := found.get("not_started"):
        return Reply(trouble=NeedsPerson(f"{agent.name} cannot be started: {why}"))
    ended = Exit(**found)
    try:
        answer, unreadable = agent.read(output), ""
    except UNREADABLE as error:
        answer, unreadable = Answer(), str(error)
    usage = usage_of(agent, answer, ended.seconds)
    call.folder.mkdir(parents=True, exist_ok=True)  # once more: the agent may have removed it
    with (call.folder / CALLS).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({"base": call.base, **asdict(usage)}) + "\n")
    trouble = find_trouble(agent, answer, unreadable, ended, output)
    cut_short = bool(answer.error) and ended.code is not None
    return Reply(*read_answer(answer.text), usage, trouble, cut_short)


def command_of(agent: Agent, blanks: dict[str, str], call: AgentCall) -> list[str]:
    if agent.verbatim:
        return list(agent.command)
    command = []
    for word in agent.command:
        if word == "{model}":
            command += [agent.flag, agent.model] if agent.model else []
        elif word == "{files}":
            inside = (path.relative_to(call.tree) for path in sorted(call.tree.rglob("*")))
            found = [str(path) for path in inside if call.task.may_edit(str(path))]
            command += [word for path in found[:FILES] for word in ("--file", path)]
        else:
            command.append(fill(word, blanks))
    return command


def edits(agent: Agent, patterns: tuple[str, ...], blanks: dict[str, str]) -> str:
    """What may be edited, as the agent's own permissions have it."""
    whole = [pattern + "**" if pattern.endswith("/") else pattern for pattern in patterns]
    rows = [{**blanks, "path": path, "path_regex": as_regex(path)} for path in whole]
    return agent.between.join(fill(agent.edit, row) for row in rows)


def fill(text: str, blanks: dict[str, str]) -> str:
    """Fill the blanks, names in braces; other braces, as JSON has them, stay."""
    return re.sub(r"\{(\w+)\}", lambda found: blanks.get(found[1], found[0]), text)


def json_string(text: str) -> str:
    """A text as a JSON string that is also one of YAML, which knows no surrogate pairs."""

    def word(found: re.Match[str]) -> str:
        return json.dumps(found[0])[1:-1] if found[0][0] <= "\uffff" else f"\\U{ord(found[0]):08x}"

    return '"' + re.sub("[\0-\uffff]+|.", word, text) + '"'


def usage_of(agent: Agent, answer: Answer, seconds: float) -> Usage:
    """What a call cost, by the CLI's own figure, or by its tokens and the person's price."""
    cost, fresh, cached = answer.cost_usd, answer.tokens_in, answer.tokens_cached or 0
    if cost is None and agent.price and fresh is not None and answer.tokens_out is not None:
        amounts = (fresh - cached, cached, answer.tokens_out)
        cost = sum(tokens * price for tokens, price in zip(amounts, agent.price, strict=True)) / 1e6
    told = {f.name: getattr(answer, f.name) for f in fields(Usage)}
    ours = {"seconds": seconds, "calls": 1, "cost_usd": cost, "model": answer.model or agent.model}
    return Usage(**told | ours)


def find_trouble(
    agent: Agent, answer: Answer, unreadable: str, ended: Exit, output: Output
) -> Trouble | None:
    """Why a call failed: by our limit, the CLI's error field, its exit code, unreadable output."""
    now = datetime.now().astimezone()
    trouble = classify(answer.error, answer.status, now) if answer.error else None
    if ended.code is None:
        late = f"{agent.name} was stopped {ended.why}"
        # with what it waited for, say a network
        return replace(trouble, why=f"{late}: {trouble.why}") if trouble else Fruitless(late)
    if trouble:
        return trouble
    said = [line for line in output.text("err", 4000).splitlines() if line.strip()]
    if ended.code in (126, 127):  # the shell's: not executable, not found
        return NeedsPerson(one_line(said[-1] if said else f"exit code {ended.code}", 300))
    if ended.code:
        trouble = classify(said[-1] if said else "", None, now)
        why = trouble.why or one_line(answer.text[-200:]) or "no output"
        return replace(trouble, why=f"exit code {ended.code}: {why}")
    return Fruitless(f"its output cannot be read: {one_line(unreadable)}") if unreadable else None


def spent_on(folder: Path, base: str) -> Usage:
    """What all calls cost in an experiment's folder from this commit, also before a restart."""
    names = {f.name for f in fields(Usage)}
    spent = Usage()
    for line in tail(folder / CALLS, 1_000_000).splitlines():
        call = parse(line)
        # leave out a line of another version, or torn by a kill
        if isinstance(call, dict) and call.pop("base", None) == base and call.keys() == names:
            spent += Usage(**call)
    return spent


def read_answer(text: str) -> tuple[str, str]:
    """The idea is the last line of an answer that says something, the reason the text before."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("```")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        return "", ""
    paragraphs = "\n".join(lines[:-1]).rstrip().split("\n\n")
    return one_line(lines[-1].strip("#*`- ")), one_line(paragraphs[-1], 1000)
