"""
A night with every outcome, and its record as it was first written: what changes the record shows here. The order of a
message's trailers may change, so they are sorted.

    AUTORESEARCH_GOLDEN=write uv run pytest tests/test_golden.py     takes today's record for the right one
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

from conftest import Project, wait_for

HERE = Path(__file__).parent / "golden"
VARIES = (
    r"^((?:[\w-]+-seconds|Run-seconds|Finished|Torch|Program|Task): ).*"  # but not what it is about
)


def record(project: Project, tag: str) -> str:
    """results.tsv, then of each ref its parent, its files and its message; without times and hashes of commits."""
    rows = [line.split("\t") for line in (project.root / "results.tsv").read_text().splitlines()]
    table = ["\t".join([*row[1:7], *row[8:]]) for row in rows]
    listed = project.git(
        "for-each-ref", "--format=%(refname) %(objectname)", f"refs/autoresearch/{tag}"
    ).split("\n")
    refs = dict(line.split() for line in listed)
    names = {commit: ref for ref, commit in refs.items()}
    parts = []
    for ref, commit in refs.items():
        parent = project.git("rev-parse", f"{commit}^")
        files = project.git("diff", "--name-status", parent, commit)
        message = sort_trailers(project.git("log", "-1", "--format=%B", commit))
        message = re.sub(VARIES, r"\1*", message, flags=re.MULTILINE)
        train = project.git("rev-parse", f"{commit}:train.py")
        parts.append(
            f"{ref} on {names.get(parent, 'the start')}: {files or 'nothing'}, train.py {train[:10]}\n\n{message}"
        )
    branch = project.git("rev-parse", f"autoresearch/{tag}")
    return (
        "\n".join(table) + "\n\n" + "\n\n".join(parts) + f"\n\nthe branch is at {names[branch]}\n"
    )


def sort_trailers(message: str) -> str:
    *body, trailers = message.split("\n\n")
    return "\n\n".join([*body, "\n".join(sorted(trailers.split("\n")))])


def test_the_golden_night(impatient: Project, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    impatient.env["GOLDEN"] = str(calls)
    shutil.copy(HERE / "agent.py", calls)
    impatient.env["PYTHON"] = sys.executable
    agent = '"$PYTHON" "$GOLDEN/agent.py"'
    impatient.research(agent, experiments=12)
    driver = impatient.start(agent, experiments=9)
    wait_for(lambda: impatient.left("training"))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    impatient.research(agent, experiments=2)
    impatient.check()
    golden = HERE / "night.txt"
    if os.environ.get("AUTORESEARCH_GOLDEN") == "write":
        golden.write_text(record(impatient, "t"))
    assert record(impatient, "t") == golden.read_text()
