"""`python -m autoresearch.jobs FOLDER` does the job that job.json in the folder describes; without
a folder it waits for one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from autoresearch.files import remove, uninterrupted, waiting_lock, write_whole
from autoresearch.jobs import LOG, OUTCOME, SPEC
from autoresearch.jobs.keeper import NotStarted, become_keeper, keep, kill_descendants


def wait_for_order() -> Path:
    """Load what a job needs; then its environment and its folder come by standard input, and what
    is said goes to a log there."""
    become_keeper(os.getppid())
    import autoresearch.jobs.job  # noqa: F401

    if not (order := sys.stdin.read()):
        sys.exit()
    told = json.loads(order)
    os.environ.clear()
    os.environ.update(told["env"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(Path(told["folder"], LOG), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for output in (1, 2):
        os.dup2(log, output)
    return Path(told["folder"])


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
        main(Path(sys.argv[1]) if sys.argv[1:] else wait_for_order())
    finally:  # a signal may come between a start and what guards it
        with uninterrupted():
            kill_descendants()
