"""
What a coding agent costs beside its own time, and whether it matters which one makes the edits.

    uv run python -m benchmarks.agents_bench            the adapter and the prompt; a minute
    uv run python -m benchmarks.agents_bench --ten      ten scripted experiments by each agent, trained on the demo
                                                        arena; twenty minutes or more

Claude Code and Codex are the real ones, where they are installed, and speak to a scripted model on loopback.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import Project, clean_environment, commit_all, copy_project  # noqa: E402
from model_server import Change, ModelServer, Say  # noqa: E402
from ten_experiments import DEMO, SLOW, plan, put, script  # noqa: E402
from test_clients import PACKAGES, addresses  # noqa: E402
from test_prompt import night  # noqa: E402

from autoresearch.agents import AGENTS, prompt  # noqa: E402
from autoresearch.agents.call import AgentCall, ask, command_of  # noqa: E402
from autoresearch.journal.experiment import Experiment  # noqa: E402
from autoresearch.journal.git import Repo  # noqa: E402
from autoresearch.journal.journal import read_history  # noqa: E402
from autoresearch.task import read_task  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ten", action="store_true", help="the ten experiments, trained for real")
    parser.add_argument("--calls", type=int, default=10, help="calls by each way (default: 10)")
    options = parser.parse_args()
    installed = [name for name in PACKAGES if shutil.which(name)]
    if options.ten:
        ten_experiments([*installed, "command"])
    else:
        prompt_time()
        for name in installed:
            adapter_time(name, options.calls)


def prompt_time() -> None:
    history = night(1000)
    times = [
        timed(lambda: prompt.brief(read_task(ROOT), "# Program\n", history)) for _ in range(20)
    ]
    text = prompt.brief(read_task(ROOT), "# Program\n", history)
    print(
        f"prompt from 1,000 experiments: median {statistics.median(times) * 1000:.0f} ms, {len(text):,} characters"
    )


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def adapter_time(name: str, calls: int) -> None:
    """The same command by subprocess alone and through the adapter, in turns."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ModelServer(lambda _, turn: EDIT if turn == 0 else Say("x")) as server,
    ):
        tree, home = Path(folder) / "tree", Path(folder) / "home"
        tree.mkdir()
        home.mkdir()
        (tree / "train.py").write_text("A = 1\n")
        subprocess.run(
            ["git", "init", "--quiet", str(tree)], check=True
        )  # Codex works in nothing else
        env = clean_environment(home) | addresses(server, home)
        agent, call = (
            AGENTS[name],
            AgentCall(
                read_task(ROOT), tree, "base", Path(folder), {}, 100.0, Path(folder) / "alive"
            ),
        )
        command = command_of(agent, {"glob": str(tree), "side": f"{folder}/side"}, call)
        direct = partial(
            subprocess.run, command, cwd=tree, env=env | agent.env, input=b"x", capture_output=True
        )
        alone, adapted = [], []
        with mock.patch.dict("os.environ", env, clear=True):
            for _ in range(calls):
                alone.append(timed(lambda: direct().check_returncode()))
                adapted.append(timed(lambda: ask(agent, "x", call)))
        a, b = statistics.median(alone), statistics.median(adapted)
        print(
            f"{name}: alone {a:.2f} s, through the adapter {b:.2f} s, added {b - a:+.3f} s (medians of {calls})"
        )


EDIT = Change("train.py", "A = 1", "A = 1")


def ten_experiments(agents: list[str]) -> None:
    """One run for each agent, one after the other; each decision beside what the script expects."""
    rows = []
    for name in agents:
        with tempfile.TemporaryDirectory() as folder:
            rows.append([f"{e.verdict} {e.score or 0:.4f}" for e in run_ten(name, Path(folder))])
    expected = ["keep", *(idea.status for idea in DEMO)]
    print(f"{'':4s}{'expected':10s}" + "".join(f"{name:18s}" for name in agents))
    for number, outcomes in enumerate(zip(*rows, strict=True)):
        print(
            f"{number:<4d}{expected[number]:10s}"
            + "".join(f"{outcome:18s}" for outcome in outcomes)
        )
    same = all([outcome.split()[0] for outcome in row] == expected for row in rows)
    print("the same decisions" if same else "NOT the same decisions")


def run_ten(name: str, folder: Path) -> list[Experiment]:
    root = folder / "project"
    root.mkdir()
    copy_project(root)
    text = (root / "train.py").read_text()
    for constant, value in SLOW.items():
        text, _ = put(text, constant, value)
    (root / "train.py").write_text(text)
    edits = plan(text, DEMO)
    (folder / "plan.json").write_text(json.dumps(edits))
    command = f"{sys.executable} {ROOT}/tests/ten_experiments.py {folder}/plan.json"
    with ModelServer(script(edits)) as server:
        cache = Path.home() / ".cache/autoresearch"
        env = (
            clean_environment(folder)
            | addresses(server, folder)
            | {"AUTORESEARCH_CACHE": str(cache)}
        )
        project = commit_all(Project(root.resolve(), env))
        print(
            project.research(command if name == "command" else name, experiments=10, timeout=3600),
            flush=True,
        )
    return read_history(Repo.at(root))


if __name__ == "__main__":
    main()
