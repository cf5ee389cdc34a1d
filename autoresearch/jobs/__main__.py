"""`python -m autoresearch.jobs FOLDER` does the job that job.json in the folder describes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from autoresearch.files import remove, uninterrupted, waiting_lock, write_whole
from autoresearch.jobs import OUTCOME, SPEC
from autoresearch.jobs.keeper import NotStarted, become_keeper, keep, kill_descendants


def main(folder: Path) -> None:
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    become_keeper(spec["driver"])
    with waiting_lock(Path(spec["alive"]), shared=True):
        if spec["kind"] == "call":
            outcome = call(spec)
        else:
            from autoresearch.jobs.job import run

            outcome = run(spec, folder)
        folder.mkdir(parents=True, exist_ok=True)  # an agent may have removed it
        remove(folder / OUTCOME)
        write_whole(folder / OUTCOME, json.dumps(outcome))


def call(spec: dict[str, Any]) -> dict[str, Any]:
    """An agent's call: a command with the whole environment, ended politely at its limit."""
    paths: dict[str, Any] = {name: Path(spec[name]) for name in ("cwd", "stdin", "out", "err")}
    try:
        ended = keep(spec["command"], env=os.environ, limit=spec["limit"], politely=True, **paths)
        return ended._asdict()
    except NotStarted as error:
        return {"not_started": str(error)}


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    finally:  # a signal may come between a start and what guards it
        with uninterrupted():
            kill_descendants()
