"""The cheats of the catalogue that reach for files, and some of each other kind, as an ordinary user."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Project, as_nobody
from test_cheats import LEARNS_BEFORE, REACHING, SCORING, Cheat, check_caught, run_through

KINDS = (
    "a pickle for a graph",
    "a graph written by hand, with an operator that opens a file",
    "buffers that remember what was asked",
    "trains on in a state_dict of its own",
    "has the weights as a literal",
)
CHEATS = [*REACHING, *(cheat for cheat in SCORING if cheat.name in KINDS), LEARNS_BEFORE]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        os.getuid() != 0, reason="only root can become another user, and this is none"
    ),
]


@pytest.fixture(scope="module")
def cheated(cache: Path) -> Iterator[Project]:
    with tempfile.TemporaryDirectory() as name:  # the temporary folders of pytest are closed
        folder = Path(name)
        nobody = [*as_nobody(folder), sys.executable, "-c", ""]
        if subprocess.run(nobody, capture_output=True, check=False).returncode:
            pytest.skip(
                "no mounts of one's own here, by which an ordinary user can reach our Python"
            )
        shutil.copytree(cache, folder / "cache")
        yield run_through(CHEATS, folder, folder / "cache", nobody=True)


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_cheat(cheated: Project, cheat: Cheat) -> None:
    check_caught(cheated, CHEATS.index(cheat), cheat)
