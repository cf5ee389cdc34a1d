"""
What the driver itself costs: seconds of an experiment that neither the agent nor train.py used.

    uv run python -m benchmarks.driver_bench [--experiments 50]

The real driver, git and processes; only the training takes no time. Printed for the first and the last tenth of the
run, so that growth with the length of the history shows.
"""

import argparse
import statistics
import tempfile
from datetime import datetime
from pathlib import Path

from autoresearch.git import Repo
from autoresearch.ledger import read_history
from tests.conftest import QUICK_PREPARE, QUICK_TRAIN, Project, clean_environment, commit_all, copy_project

AGENT = """echo "X = '$AUTORESEARCH_EXPERIMENT'" >> train.py; echo an idea"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiments", type=int, default=50)
    count = parser.parse_args().experiments
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        root.mkdir()
        copy_project(root)
        (root / "prepare.py").write_text(QUICK_PREPARE)
        (root / "train.py").write_text(QUICK_TRAIN)
        project = commit_all(Project(root.resolve(), clean_environment(Path(folder))))
        project.research(AGENT, experiments=count, timeout=count * 5 + 60)
        experiments = [experiment for _, experiment in read_history(Repo.at(root))]
    ends = [datetime.fromisoformat(e.finished).timestamp() for e in experiments]
    own = [b - a - e.agent_seconds - e.run_seconds for a, b, e in zip(ends, ends[1:], experiments[1:], strict=False)]
    tenth = max(len(own) // 10, 1)
    for name, part in (("all", own), ("first tenth", own[:tenth]), ("last tenth", own[-tenth:])):
        print(f"{name:12s} {len(part):4d} experiments: median {statistics.median(part):.3f} s, worst {max(part):.3f} s")


if __name__ == "__main__":
    main()
