"""The agents' table: which one is taken, how each is called, what is read from what it printed, and bad commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TASK, Project
from test_bad_input import one_line

from autoresearch.agents import AGENTS, shell_command
from autoresearch.agents.call import AgentCall, ask, read_answer, spent_on
from autoresearch.ideas import Busy, Fruitless, NeedsPerson, Reply


def call(folder: Path, command: str, limit: float = 20.0) -> Reply:
    return ask(
        shell_command(command),
        "do it",
        AgentCall(TASK, folder, "base", folder, {}, limit, folder / "alive"),
    )


def fake(project: Project, name: str, script: str) -> None:
    """Put a program of that name first on the project's PATH; it is logged in."""
    folder = project.root.parent / "fakes"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\ncase "$*" in *status) exit 0;; esac\n{script}\n')
    (folder / name).chmod(0o755)
    if str(folder) not in project.env["PATH"]:
        project.env["PATH"] = f"{folder}:/usr/bin:/bin"


def test_an_agent_that_trusts_pwd(project: Project) -> None:
    """Some take it for the directory that they are in, whatever that is; a shell would put it right."""
    fake(project, "claude", "")
    (project.root.parent / "fakes/claude").write_text(f"""#!{sys.executable}
import os, sys
if sys.argv[-1] == "status":
    sys.exit()
with open(os.environ["PWD"] + "/train.py", "a") as file:
    file.write("EXTRA = 1\\n")
print({RESULT!r})
""")
    mine = (project.root / "train.py").read_text()
    project.env["PWD"] = str(project.root)
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--experiments=1")
    assert (project.root / "train.py").read_text() == mine
    assert project.git("show", f"{project.rows()[1]['commit']}:train.py").endswith("EXTRA = 1")


BETTER = "sed -i 's/^VAL_BPB = 1.0/VAL_BPB = 0.9/' train.py"
RESULT = json.dumps(
    {"type": "result", "is_error": False, "result": "Because.\n\nlower it", "total_cost_usd": 0.25}
)


def test_the_first_that_is_installed(project: Project) -> None:
    """Without --agent: the first of the table, said on the first line."""
    fake(project, "codex", "exit 1")
    fake(project, "claude", f"{BETTER}; printf %s '{RESULT}'")
    said = project.loop("--tag=t", "--arena=demo", "--experiments=1")
    assert "agent claude, the first installed of claude, codex, " in said.splitlines()[0]
    assert project.rows()[1]["cost_usd"] == "0.2500"
    project.check()


def test_a_model_is_passed_through(project: Project) -> None:
    fake(
        project, "claude", f"echo \"$@\" > {project.root}/runs/argv; {BETTER}; printf %s '{RESULT}'"
    )
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--model=opus 9", "--experiments=1")
    argv = (project.root / "runs/argv").read_text().strip()
    assert (
        argv.endswith("--model opus 9")
        and f"--allowedTools Edit(/{project.root}/runs/t/tree/train.py)" in argv
    )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "claude: its output cannot be read: no JSON, but nothing"),
        ("sorry, no JSON today", "its output cannot be read: no JSON, but sorry, no JSON today"),
        ('{"type": "result", "resu', "its output cannot be read"),
        ("[1, 2]", "its output cannot be read"),
        ('{"type": "other"}', "its output cannot be read: no result"),
        ('{"type": "result", "result": 7, "usage": "none"}', "no line of train.py is different"),
    ],
)
def test_output_that_is_not_what_was_promised(project: Project, answer: str, words: str) -> None:
    """No edit came with it: five such answers end the run in one line, and each transcript is kept."""
    fake(project, "claude", f"printf %s '{answer}'")
    said = project.loop("--tag=t", "--arena=demo", "--agent=claude", code=1)
    assert words.removeprefix("claude: ") in one_line(said)
    assert (project.root / "runs/t/0001/agent-4.out").read_text().strip() == answer
    project.check()


def test_an_edit_with_output_that_cannot_be_read(project: Project) -> None:
    """The diff is the truth: an edit is an experiment whatever was said of it."""
    fake(project, "claude", f"{BETTER}; printf 'not JSON \\377\\000'")
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--experiments=1")
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]
    assert project.rows()[1]["description"] == "not described: VAL_BPB 1.0 -> 0.9"


def test_not_utf8(tmp_path: Path) -> None:
    reply = call(tmp_path, r"printf 'reason \377\n\nidea \376\033[31m'")
    assert reply.description == "idea \N{REPLACEMENT CHARACTER}" and reply.trouble is None


def test_a_command_that_waits_for_a_terminal(tmp_path: Path) -> None:
    reply = call(tmp_path, "read answer < /dev/tty")
    assert isinstance(reply.trouble, Fruitless) and "/dev/tty" in reply.trouble.why
    assert call(tmp_path, "cat > /dev/null; read answer || echo nobody").description == "nobody"


@pytest.mark.parametrize(
    ("command", "words"), [("true; gone --fast", "gone"), ("true; ./plain", "ermission denied")]
)
def test_a_command_that_cannot_be_run(tmp_path: Path, command: str, words: str) -> None:
    (tmp_path / "plain").write_text("echo hi\n")
    trouble = call(tmp_path, command).trouble
    assert isinstance(trouble, NeedsPerson) and words in trouble.why


@pytest.mark.parametrize("command", ["./plain", "/nowhere/agent", "no-such-agent -p"])
def test_a_command_that_is_none(project: Project, command: str) -> None:
    (project.root / "plain").write_text("echo hi\n")
    words = (
        f"no program at {command}: no such file, or `chmod +x"
        if "/" in command
        else f"unknown agent '{command}'"
    )
    assert words in one_line(project.research(command, code=2))


def test_braces_are_the_shells_own(project: Project) -> None:
    """Nothing of the prompt becomes code: what stands in braces in a person's command is a variable of theirs."""
    project.write("program.md", f"`touch {project.root}/pwned` $(touch {project.root}/pwned)\n")
    project.research(
        f'prompt="$(cat)"; file=$(mktemp); printf %s "${{prompt}}" > ${{file}}; {BETTER}; echo "${{folder}}ok"'
    )
    assert project.rows()[1]["description"] == "ok"
    assert not (project.root / "pwned").exists()


def test_a_path_counts_from_where_the_person_stands(project: Project) -> None:
    folder = project.root / "my agents"
    folder.mkdir()
    (folder / "mine.sh").write_text(f"#!/bin/sh\n{BETTER}; echo option $1\n")
    (folder / "mine.sh").chmod(0o755)
    said = subprocess.run(
        [sys.executable, "../loop.py", "--tag=t", "--arena=demo", "--agent=./mine.sh --fast", "--experiments=1"],
        cwd=folder, env=project.env, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert project.rows()[1]["description"] == "option --fast"


def test_an_error_that_came_with_an_edit(project: Project) -> None:
    """A command's last words are no verdict on an edit that it made; a CLI's own error field is."""
    project.research(f"{BETTER}; echo 'fatal: Authentication failed' >&2; exit 128")
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]
    failed = json.dumps(
        {"type": "result", "is_error": True, "result": "Not logged in", "total_cost_usd": 0}
    )
    fake(project, "claude", f"echo 'X = 2' >> train.py; printf %s '{failed}'; exit 1")
    assert "claude: Not logged in" in one_line(
        project.loop("--tag=t", "--arena=demo", "--agent=claude", code=1)
    )
    assert len(project.rows()) == 2


def test_a_time_to_retry_does_not_shorten_the_wait(tmp_path: Path) -> None:
    for words in (
        "retry in 0.1s",
        "retry in 1.2.3 s",
        "retry in 99999999999999s",
        "try again at Dec 31st, 9999 1:00 PM",
    ):
        assert isinstance(
            call(tmp_path, f"echo 'limit reached, {words}' >&2; exit 1").trouble, Busy
        )


def test_a_preset_that_vanished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    trouble = ask(
        AGENTS["claude"],
        "x",
        AgentCall(TASK, tmp_path, "base", tmp_path, {}, 9.0, tmp_path / "alive"),
    ).trouble
    assert trouble == NeedsPerson("claude cannot be started: No such file or directory")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            "codex = [1, 2]",
            'the price of codex must be three numbers: "codex" = [input, cached input, output]',
        ),
        ("codex = 'cheap'", "must be three numbers"),
        ("gpt-6.1-x = [1, 1, 1]", '"gpt-6" = [input, cached input, output], the name in quotes'),
        ("codex = 5", "must be three numbers"),
        ("codex = [1, 2, -3]", "must be three numbers"),
        ("codex = [1, 2, nan]", "must be three numbers"),
        ("= 3", "pyproject.toml"),
    ],
)
def test_prices_that_are_none(project: Project, table: str, words: str) -> None:
    with (project.root / "pyproject.toml").open("a") as file:
        file.write(f"\n[tool.autoresearch.prices]\n{table}\n")
    assert words in one_line(project.research("true", code=1))


def test_calls_before_a_restart_are_paid_for(project: Project) -> None:
    """What failed, and what a driver asked for that died, is in the bill of the experiment that came of it."""
    fake(project, "claude", f"printf %s '{RESULT}'")
    project.loop(
        "--tag=t", "--arena=demo", "--agent=claude", code=1
    )  # five calls that brought nothing
    fake(project, "claude", f"{BETTER}; printf %s '{RESULT}'")
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--experiments=1")
    assert project.rows()[1]["cost_usd"] == "1.5000"
    assert "spent: $1.50 (agent $1.50)" in project.loop("status")
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--experiments=0")
    assert spent_on(project.root / "runs/t/0001", "another commit").calls is None


def test_told_of_a_repetition(project: Project) -> None:
    """The same program with a new comment goes back once, with the earlier result; twice is no experiment."""
    agent = f'{BETTER}; echo "# $(date +%N)" >> train.py; echo lower it'
    project.research(agent)
    said = project.research(agent, code=1)
    assert "0002 the same program as experiment 1; asking once more" in said
    request = (project.root / "runs/t/0002/prompt-1.md").read_text()
    assert "the one of experiment 1, which is known: keep, 0.900000, lower it" in request
    assert len(project.rows()) == 2
    project.check()


def test_stopped_while_it_waited_for_a_network(project: Project) -> None:
    """What it said until our limit counts: an outage is waited for, and is no stall."""
    project.pace(backoff=0.2)
    lost = json.dumps(
        {"type": "error", "message": "Reconnecting... waiting for network (Connection failed)"}
    )
    again = f'[ -e {project.root}/runs/up ] && exec sh -c "{BETTER}"; touch {project.root}/runs/up'
    fake(project, "codex", f"{again}; printf '%s\\n' '{lost}'; sleep 1000")
    said = project.loop(
        "--tag=t", "--arena=demo", "--agent=codex", "--experiments=1", "--agent-timeout=1"
    )
    assert (
        "codex was stopped at the limit of 1 s: Reconnecting... waiting for network" in said
        and "no experiment" not in said
    )
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]


FENCED = "Why.\n\n```\nidea\n```\n"


@pytest.mark.parametrize(
    "answer", ["Why.\n\nidea", FENCED, FENCED.replace("```", "```text", 1), "Why.\n\n**idea**\n\n"]
)
def test_the_last_line(answer: str) -> None:
    assert read_answer(answer) == ("idea", "Why.")
