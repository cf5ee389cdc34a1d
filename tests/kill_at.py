"""
Run the driver of the project in this directory, and have it kill itself right before or after one of its effects.

    python kill_at.py EFFECT before|after N [loop.py's arguments]      at the N-th time

The effects are wrapped here, in the process that is to die; the driver itself knows nothing of it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
import loop
from autoresearch import git, ledger

EFFECTS: dict[str, tuple[Any, str]] = {
    "reset": (git.Repo, "reset"),
    "agent": (loop, "ask"),
    "commit": (git.Repo, "commit"),
    "train": (loop, "run_training"),
    "referee": (loop, "review"),
    "amend": (git.Repo, "commit_tree"),
    "ref": (git.Repo, "create"),
    "row": (ledger, "append"),
}


def main(effect: str, when: str, number: str, *argv: str) -> int:
    owner, name = EFFECTS[effect]
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)
    return loop.main([*argv])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
