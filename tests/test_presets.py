"""Each agent of the table: what is read from what its CLI really printed, and what it is called with."""

import json
import os
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT, TASK

from autoresearch.agents import AGENTS, claude, find_agent
from autoresearch.agents.agent import UNREADABLE, Answer, Output, read_text
from autoresearch.agents.call import AgentCall, ask, json_string
from autoresearch.agents.trouble import classify
from autoresearch.ideas import Busy, NeedsPerson

RECORDED = (
    Path(__file__).parent / "recorded"
)  # by the versions that docs/notebook.md names, keys and paths made up
NOW = datetime(2026, 11, 25, tzinfo=UTC)

# (dollars, tokens in, of those cached, out, turns) of one edit: 1,000 tokens in a request, 400 of them cached, 50 out
EDITS = {
    "gemini": (None, 3000, 1200, 171, 3),
    "opencode": (0.00342, 3000, 1200, 150, 3),
    "qwen": (None, 3000, 1200, 150, 3),
    "pi": (0.00342, 3000, 1200, 150, 3),
    "aider": (0.00015, 1000, None, 50, 1),
    "mini": (0.0003, 2000, 800, 100, 2),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit(name: str) -> None:
    answer = AGENTS[name].read(Output(RECORDED / name / "edit"))
    assert (answer.error, answer.text.strip().splitlines()[-1]) == ("", "lower the score")
    cost, *counts = EDITS[name]
    assert answer.cost_usd == (None if cost is None else pytest.approx(cost))
    assert [answer.tokens_in, answer.tokens_cached, answer.tokens_out, answer.turns] == counts


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize(
    ("case", "kind"), [("unauthorized", NeedsPerson), ("unknown", NeedsPerson), ("limited", Busy)]
)
def test_an_error(name: str, case: str, kind: type) -> None:
    """401, an unknown model and 429, told by error fields, whatever the exit code was."""
    if name == "opencode" and case == "unknown":
        pytest.skip("says no more than that something was unexpected")
    answer = AGENTS[name].read(Output(RECORDED / name / case))
    assert isinstance(classify(answer.error, answer.status, NOW), kind), answer.error
    assert answer.text == "" or name in ("aider", "mini")


def test_a_bare_finish() -> None:
    """mini's model may end without a word of its own: then its last message is the answer."""
    assert AGENTS["mini"].read(Output(RECORDED / "mini/plain")).text


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"type":',
        "\x00\xff",
        '[{"type": "result"}]',
        "{}\n{}\n",
        '[{"type": "result", "num_turns": 1e999}]',
        '{"a":' * 50_000,
    ],
)
def test_what_is_no_answer(name: str, text: str, tmp_path: Path) -> None:
    """Whatever stands in the files: an answer, or an error that the caller knows."""
    for kind in ("out", "err", "traj.json", "analytics.jsonl", "llm.txt"):
        (tmp_path / f"a.{kind}").write_text(text, encoding="latin-1")
    with suppress(*UNREADABLE):
        assert isinstance(AGENTS[name].read(Output(tmp_path / "a")), Answer)


def test_fields_of_the_wrong_kind(tmp_path: Path) -> None:
    """A CLI of another version may put anything anywhere: unknown, and no traceback."""
    for name in EDITS:
        for path in (RECORDED / name).glob("edit.*"):
            text = path.read_text()
            for broken in (
                text.replace(": {", ': 7, "x": {'),
                text.replace(":{", ':[],"x":{'),
                text.replace("[", "[3, "),
            ):
                for other in (RECORDED / name).glob("edit.*"):
                    (tmp_path / other.name).write_bytes(other.read_bytes())
                (tmp_path / path.name).write_text(broken)
                with suppress(*UNREADABLE):
                    AGENTS[name].read(Output(tmp_path / "edit"))


RECORDER = f"""#!{sys.executable} -S
import json, os, sys
json.dump({{"argv": sys.argv[1:], "env": dict(os.environ), "stdin": sys.stdin.read()}}, open(os.environ["RECORD"], "w"))
"""


@pytest.mark.parametrize("name", AGENTS)
def test_the_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt arrives whole, the model is named, no blank is left, and the one file is the one of the tree."""
    tree, folder, record = tmp_path / "a tree [1]", tmp_path / "0001", tmp_path / "record"
    tree.mkdir()
    (tree / "train.py").touch()
    folder.mkdir()
    program = tmp_path / AGENTS[name].command[0]
    program.write_text(RECORDER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    prompt = "Line one {tree}\n\n\"quoted\" 'and' `more` $HOME é\n" + "x" * 30_000
    call = AgentCall(TASK, tree, "base", folder, {"MINE": "1"}, 20.0, tmp_path / "alive")
    ask(find_agent(ROOT, name, "provider/model-9"), prompt, call)
    seen = json.loads(record.read_text())
    argv, env = seen["argv"], seen["env"]
    flag = argv.index("provider/model-9") - 1
    assert argv[flag] in ("-m", "--model") and env["MINE"] == "1"
    files = [path.read_text() for path in folder.iterdir()]
    delivered = [seen["stdin"], *argv, *files]
    task = json.dumps(prompt)
    assert any(text == prompt or task in text for text in delivered)
    ours = [
        text
        for text in [*argv, *files, *(env[key] for key in AGENTS[name].env)]
        if "Line one" not in text
    ]
    blanks = (
        "{tree}",
        "{glob}",
        "{regex}",
        "{folder}",
        "{side}",
        "{prompt}",
        "{json}",
        "{file}",
        "{model}",
    )
    assert not [text for text in ours for blank in blanks if blank in text]
    if name in (
        "claude",
        "gemini",
    ):  # whose rules hold the path: as a pattern, in which a bracket is no class
        assert any(
            "a tree \\[1]/train.py)" in text or "\\ tree\\ \\[1\\]/)?(train" in text
            for text in [*argv, *files]
        )


def test_no_agent_reads_prose_as_an_error(tmp_path: Path) -> None:
    """A model that writes of limits and keys is not an agent in trouble."""
    prose = "We hit your usage limit of memory; status 401, invalid API key, 429, model not found.\n\nidea"
    (tmp_path / "a.out").write_text(
        json.dumps({"type": "result", "is_error": False, "result": prose})
    )
    assert claude.read(Output(tmp_path / "a")).error == ""
    (tmp_path / "b.out").write_text(prose)
    assert read_text(Output(tmp_path / "b")).error == ""


def test_a_json_string_is_one_of_yaml() -> None:
    text = 'a \U0001f600 \u2028\n\x85 "q" \\ud83d é'
    assert "\\U0001f600" in json_string(text) and json_string(text).isascii()
    assert json.loads(json_string(text).replace("\\U0001f600", "\\ud83d\\ude00")) == text
