"""
Run the driver of the project in this directory, and have it kill itself right before or after a stage of an experiment.

    python kill_at.py STAGE before|after EXPERIMENT [loop.py's arguments]

The stages are wrapped here, in the process that is to die; the driver itself knows nothing of it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import loop
from autoresearch import desk
from autoresearch.journal import git, journal

# Where a stage is found, and in which experiment it is first come to; -1 is the start
STAGES: dict[str, tuple[Any, str, int]] = {
    "tree": (git.AgentTree, "hand_out", 0),
    "agent": (desk, "ask", 1),
    "commit": (git.AgentTree, "commit", 1),
    "run": (desk.Desk, "measure", 0),
    "verdict": (desk.Desk, "write_up", 0),
    "record": (journal.Journal, "record", 0),
    "refs": (git.Repo, "update_refs", -1),
    "row": (journal, "append", 0),
}


def main(stage: str, when: str, experiment: str, *argv: str) -> int:
    owner, name, now = STAGES[stage]
    original = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal now
        now += 1
        if now - 1 == int(experiment) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if now - 1 == int(experiment):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)
    return loop.main([*argv])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
