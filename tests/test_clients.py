"""The real Claude Code and Codex, as a user has them, against a scripted model on loopback: what each lets the agent
do, what it says when things go wrong, and what the driver makes of it."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import ROOT, Project, experiment
from model_server import Change, Fail, ModelServer, Move, Say, Script, Shell, Stall, Truncate
from ten_experiments import QUICK, plan, script

PACKAGES = {"claude": "@anthropic-ai/claude-code@2.1.330", "codex": "@openai/codex@0.169.0"}
LINE = "VAL_BPB = 1.0     # [0.5, 2.0] the score"
BETTER = Change("train.py", LINE, LINE.replace("1.0", "0.9", 1))
WORSE = Change("train.py", LINE, LINE.replace("1.0", "1.1", 1))
DONE = Say("It should learn more from each token.\n\nlower the score")

Play = Callable[[Script], ModelServer]


@pytest.fixture(params=PACKAGES)
def client(request: pytest.FixtureRequest) -> str:
    return needed(request.param)


def needed(name: str) -> str:
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed: npm install -g {PACKAGES[name]}")
    return name


@pytest.fixture
def play(project: Project) -> Iterator[Play]:
    """Start a model for the project's clients, which have a home of their own, a dummy key, and few retries."""
    servers = []

    def start(script: Script) -> ModelServer:
        server = ModelServer(script).__enter__()
        servers.append(server)
        project.env.update(addresses(server, Path(project.env["HOME"])))
        return server

    yield start
    for server in servers:
        server.__exit__()


def addresses(server: ModelServer, home: Path) -> dict[str, str]:
    (home / ".codex").mkdir(exist_ok=True)
    (home / ".codex/config.toml").write_text(
        f"""
        model_provider = "scripted"
        check_for_update_on_startup = false
        analytics.enabled = false
        [model_providers.scripted]
        name = "scripted"
        base_url = "{server.url}/v1"
        env_key = "SCRIPTED_KEY"
        wire_api = "responses"
        request_max_retries = 0
        stream_max_retries = 0
        """
    )
    return {"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": "dummy", "SCRIPTED_KEY": "dummy"}


def always(*moves: Move) -> Script:
    """The same moves in every call; the last one again and again."""
    return lambda _, turn: moves[min(turn, len(moves) - 1)]


def test_an_edit_that_is_kept(project: Project, client: str, play: Play) -> None:
    """The answer's words and what the CLI says of its cost reach the record; nothing is left outside train.py."""
    play(always(BETTER, DONE))
    project.research(client)
    e = experiment(project, 1)
    assert (e.verdict, e.score, e.description) == ("keep", 0.9, "lower the score")
    assert e.reason == "It should learn more from each token."
    assert e.change.words == "VAL_BPB 1.0 -> 0.9"
    assert (e.agent, e.usage.calls) == (client, 1)
    cached = {"claude": 60, "codex": 60}[client]
    assert (e.usage.tokens_in, e.usage.tokens_cached, e.usage.tokens_out) == (
        {"claude": 260, "codex": 200}[client],
        cached,
        40,
    )
    if client == "claude":
        assert (
            e.usage.cost_usd is not None
            and 0 < e.usage.cost_usd < 0.1
            and e.usage.turns
            and e.usage.model
            and "claude" in e.usage.model
        )
    else:
        assert e.usage.cost_usd is None and project.rows()[1]["cost_usd"] == ""  # unknown is not 0
    project.check()


def test_an_edit_that_is_discarded(project: Project, client: str, play: Play) -> None:
    play(always(WORSE, DONE))
    project.research(client)
    assert (experiment(project, 1).verdict, experiment(project, 1).score) == ("discard", 1.1)
    project.check()


def test_another_file(project: Project, client: str, play: Play) -> None:
    """Claude Code refuses the edit itself; Codex makes it, and it is never trained."""
    play(
        always(
            BETTER,
            Change("prepare.py", "import json, os, pathlib, sys", "import os, sys, json"),
            DONE,
        )
    )
    project.research(client)
    e = experiment(project, 1)
    if client == "claude":
        assert e.verdict == "keep"
        assert '"permission_denials":[{' in (project.root / "runs/t/0001/agent-0.out").read_text()
    else:
        assert e.crash == "changed more than train.py: prepare.py"
    project.check()


def test_a_commit_of_its_own(project: Project, client: str, play: Play) -> None:
    """Neither gets at git: one has no shell, the other a read-only .git. The edit counts, the commit is not there."""
    play(always(BETTER, Shell("git commit --quiet --all --message=mine; git branch mine"), DONE))
    project.research(client)
    assert experiment(project, 1).verdict == "keep"
    assert "mine" not in project.git("log", "--all", "--format=%s") + project.git("branch")
    project.check()


def test_no_edit(project: Project, client: str, play: Play) -> None:
    play(always(Say("I would rather not.")))
    said = project.research(client, code=1)
    assert said.count("no experiment: no line of train.py is different: I would rather not.") == 5
    assert f"error: {client} brought nothing 5 times in a row" in said
    assert (
        "It brought nothing: no line of train.py is different"
        in (project.root / "runs/t/0001/prompt-1.md").read_text()
    )  # each call's prompt and transcript stay
    project.check()


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (
            Fail(401, "authentication_error", "invalid x-api-key"),
            r"Invalid API key|401 Unauthorized",
        ),
        (
            Fail(404, "not_found_error", "The model `m` does not exist"),
            r"selected model \(m\)|model `m` does not exist",
        ),
    ],
)
def test_what_only_a_person_can_mend(
    project: Project, client: str, play: Play, fail: Fail, words: str
) -> None:
    server = play(always(fail))
    args = ("--tag=t", "--arena=demo", "--experiments=3", f"--agent={client}", "--model=m")
    last = project.loop(*args, code=1).splitlines()[-1]
    assert last.startswith(f"error: {client}: ") and re.search(words, last)
    assert server.requests <= 3 and server.models == {"m"}
    assert len(project.rows()) == 1
    project.check()


def test_usage_limit(project: Project, client: str, play: Play) -> None:
    """It waits, names the reason, and records nothing."""
    reset = (datetime.now(UTC) + timedelta(hours=2)).replace(second=0, microsecond=0)
    headers = {"anthropic-ratelimit-unified-status": "rejected", "anthropic-ratelimit-unified-reset": f"{reset:%s}",
               "anthropic-ratelimit-unified-representative-claim": "five_hour"}  # fmt: skip
    play(
        always(
            Fail(
                429, "usage_limit_reached", "limit", {"resets_at": int(reset.timestamp())}, headers
            )
        )
    )
    if client == "claude":  # a subscription, whose message names the time
        del project.env["ANTHROPIC_API_KEY"]
        project.env["CLAUDE_CODE_OAUTH_TOKEN"] = "sk-ant-oat01-dummy"
    log = project.root / "log"
    with log.open("w") as out:
        command = project.command("--tag=t", "--arena=demo", f"--agent={client}")
        driver = subprocess.Popen(command, cwd=project.root, env=project.env, stdout=out)
        try:
            deadline = time.monotonic() + 60
            while "waiting until" not in log.read_text():
                assert time.monotonic() < deadline and driver.poll() is None, log.read_text()
                time.sleep(0.05)
        finally:
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(timeout=30) == 130
    assert re.search(r"waiting until .*limit", log.read_text())
    assert len(project.rows()) == 1
    project.check()


@pytest.mark.parametrize(
    "trouble",
    [
        Fail(429, "rate_limit_error", "slow down"),
        Fail(529, "overloaded_error", "Overloaded"),
        Truncate(),
    ],
    ids=["429", "529", "truncated"],
)
def test_what_passes_by_itself(project: Project, client: str, play: Play, trouble: Move) -> None:
    """A half-made edit is dropped with the call; the next call, after a while, makes the experiment."""
    project.pace(backoff=0.2)
    calls = []

    def script(prompt: str, turn: int) -> Move:
        calls.extend([prompt] if turn == 0 else [])
        broken = len(calls) < 3
        return (WORSE if broken else BETTER) if turn == 0 else trouble if broken else DONE

    play(script)
    said = project.research(client)
    assert said.count("waiting until") == 2
    assert [row["status"] for row in project.rows()] == ["keep", "keep"]
    e = experiment(project, 1)
    assert (e.score, e.usage.calls) == (0.9, 3)  # what failed was paid for, too
    project.check()


def test_a_stream_that_stalls(project: Project, client: str, play: Play) -> None:
    play(always(BETTER, Stall()))
    project.loop(
        "--tag=t", "--arena=demo", f"--agent={client}", "--experiments=1", "--agent-timeout=4"
    )
    assert experiment(project, 1).verdict == "keep"  # the edit was made, and is as good as any
    assert experiment(project, 1).description == "not described: VAL_BPB 1.0 -> 0.9"
    project.check()


def test_a_reply_of_megabytes(project: Project, client: str, play: Play) -> None:
    play(always(BETTER, Say("word " * 1_000_000 + "\n\nlower the score")))
    project.research(client)
    e = experiment(project, 1)
    assert e.description == "lower the score" and len(e.reason) <= 1000
    project.check()


def test_a_loop_of_tools_without_end(project: Project, client: str, play: Play) -> None:
    """Claude Code is given thirty turns; for Codex, which knows no such limit, our own is the end. What it had edited
    by then is an experiment like any other."""
    server = play(always(BETTER, Shell("ls")))
    project.loop(
        "--tag=t", "--arena=demo", f"--agent={client}", "--experiments=1", "--agent-timeout=4"
    )
    assert experiment(project, 1).verdict == "keep" and server.requests > 3
    transcript = (project.root / "runs/t/0001/agent-0.out").read_text()
    assert client == "codex" or "Reached maximum number of turns (30)" in transcript
    project.check()


def test_a_child_that_daemonizes(project: Project, client: str, play: Play) -> None:
    """Whatever an agent's shell leaves in sessions of its own is gone with the call."""
    nap = f"sleep 1234.{time.monotonic_ns() % 10**9}"
    leave = f"setsid sh -c 'env -i {nap} & {nap}' > /dev/null 2>&1 & touch {{}}; sleep 1"
    play(always(BETTER, Shell(leave.format("started")), Shell("rm started"), DONE))
    project.research(client)
    assert experiment(project, 1).verdict == "keep"
    left = subprocess.run(["pgrep", "--full", nap], capture_output=True, text=True)
    assert left.stdout == ""
    project.check()


@pytest.mark.parametrize("agent", ["claude", "codex", "command"])
def test_ten_experiments(project: Project, play: Play, agent: str) -> None:
    """The same ten ideas come to the same ten decisions by whichever hand; also trained for real, in benchmarks."""
    edits = plan((project.root / "train.py").read_text(), QUICK)
    if agent == "command":
        (project.root.parent / "plan.json").write_text(json.dumps(edits))
        agent = f"{sys.executable} {ROOT}/tests/ten_experiments.py {project.root.parent}/plan.json"
    else:
        play(script(edits))
    said = project.research(needed(agent) if agent in PACKAGES else agent, experiments=10)
    assert [row["status"] for row in project.rows()[1:]] == [idea.status for idea in QUICK]
    assert said.count("0003 the same program as experiment 2") == 1
    calls = [experiment(project, number).usage.calls for number in range(1, 11)]
    assert calls == [1, 1, 2, 2, 2, 1, 2, 1, 2, 1]
    project.check()


def test_the_doctor_asks_whether_it_is_logged_in(project: Project, client: str, play: Play) -> None:
    args = ("doctor", "--arena=demo", f"--agent={client}")
    assert f"{client} is not logged in" in project.loop(*args, code=1)
    play(always(DONE))
    assert f"{client} says that it is logged in" in " ".join(project.loop(*args).split())


def test_the_price_table(project: Project, play: Play) -> None:
    """Tokens become dollars by the user's own prices: of 2 x 100 in, 30 each were cached, and 20 each went out."""
    needed("codex")
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("\n[tool.autoresearch.prices]\ncodex = [1000, 100, 10000]\n")
    play(always(BETTER, DONE))
    project.research("codex")
    assert experiment(project, 1).usage.cost_usd == pytest.approx(
        (140 * 1000 + 60 * 100 + 40 * 10000) / 1e6
    )
    assert project.rows()[1]["cost_usd"] == "0.5460"
