"""
A night in minutes: the real driver, git and processes over many experiments; only the training takes no time.

    uv run python -m benchmarks.soak [--experiments 1000] [--kills 200] [--files 0]

First an undisturbed run: what an experiment costs beside agent and training, and what memory the driver has, in its
first and its last tenth, and that results.tsv and refs are exact. Then the same experiments with the driver killed at
random instants and started again: the history must be the same. With --files the repository holds so many more.
"""

import argparse
import random
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

from autoresearch.journal.experiment import Experiment
from autoresearch.journal.git import Repo
from autoresearch.journal.journal import read_history
from tests.conftest import Project, commit_all, make_quick_project

# Ideas that follow from seed and number: better ones, worse ones, one in forty that crashes, one that is rejected.
AGENT = """
n=$((AUTORESEARCH_SEED * 1000 + 1$AUTORESEARCH_EXPERIMENT - 10000))
sed -i "s/^VAL_BPB = [0-9.]*/VAL_BPB = $(awk "BEGIN { srand($n); print 0.5 + rand() }")/" train.py
case $((n % 40)) in 7) echo "raise ValueError($AUTORESEARCH_ATTEMPT)" >> train.py;; 23) echo x > other;; esac
echo "idea $AUTORESEARCH_EXPERIMENT"
"""


def add_files(project: Project, count: int) -> None:
    """Commit so many small files, a hundred in a folder."""
    for number in range(count):
        file = project.root / f"many/{number // 100}/{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n" * 20)
    if count:
        commit_all(project)


def memory(pid: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def history(project: Project) -> list[Experiment]:
    return read_history(Repo.at(project.root))


def undisturbed(project: Project, count: int) -> None:
    """Run so many experiments, and print what the driver itself took."""
    driver, resident = project.start(AGENT, experiments=count), []
    while driver.poll() is None:
        try:
            resident.append(memory(driver.pid))
        except (OSError, IndexError):  # it has just ended
            break
        time.sleep(0.2)
    assert driver.wait() == 0
    project.check()
    experiments = history(project)
    assert [e.number for e in experiments] == list(range(count + 1))
    ends = [datetime.fromisoformat(e.finished).timestamp() for e in experiments]
    own = [
        later - earlier - 60 * e.minutes
        for earlier, later, e in zip(ends, ends[1:], experiments[1:], strict=False)
    ]
    tenth = max(count // 10, 1)
    for name, part in (("all", own), ("first tenth", own[:tenth]), ("last tenth", own[-tenth:])):
        print(
            f"{name:12s} {len(part):4d} experiments: median {statistics.median(part):.3f} s, worst {max(part):.3f} s"
        )
    tenth = max(len(resident) // 10, 1)
    early, late = (
        statistics.median(resident[tenth : 2 * tenth]),
        statistics.median(resident[-tenth:]),
    )
    print(
        f"driver's memory: {early:.1f} MB in the second tenth, {late:.1f} MB in the last, {max(resident):.1f} MB most"
    )


def killed(project: Project, kills: int) -> list[Experiment]:
    """Kill the driver so many times at random instants, starting it again each time; then let it do one more."""
    rng = random.Random(0)
    for _ in range(kills):
        driver = project.start(AGENT, experiments=kills * 10)
        time.sleep(rng.uniform(0.1, 2.0))
        driver.kill()
        driver.wait()
    print(f"{kills} kills, {len(history(project))} experiments recorded on the way")
    project.research(AGENT)
    project.check()
    return history(project)


def facts(e: Experiment) -> tuple[object, ...]:
    return e.number, e.verdict, e.score, e.description, e.crash, e.change, e.repairs, e.incumbent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiments", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--files", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        calm, rough = make_quick_project(Path(one)), make_quick_project(Path(two))
        for project in (calm, rough):  # a person's Python keeps its bytecode
            del project.env["PYTHONDONTWRITEBYTECODE"]
            add_files(project, options.files)
        undisturbed(calm, options.experiments)
        found = killed(rough, options.kills)[: options.experiments + 1]
        expected = history(calm)[: len(found)]
        same = [facts(e) for e in found] == [facts(e) for e in expected]
        verdicts = {v: sum(e.verdict == v for e in found) for v in ("keep", "discard", "crash")}
        print(f"history of {len(found)} equal to the undisturbed one: {same} ({verdicts})")
        left = subprocess.run(
            ["pgrep", "-fc", str(rough.root)], capture_output=True, text=True, check=False
        )
        print(f"processes left: {left.stdout.strip()}")
        assert same


if __name__ == "__main__":
    main()
