"""What the doctor says of compiling for a GPU, in the sandbox of a run, on a card that is not here; see card.py."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from card import ROOT, environment, missing

from autoresearch import checks
from autoresearch.files import UserError
from autoresearch.jobs.sandbox import find_rungs

pytestmark = pytest.mark.skipif(missing() != "", reason=missing())


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card in the environment of this process and of the sandbox."""
    for name, value in environment("3060", tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def ask() -> str:
    return checks.ask_gpt(next(find_rungs(names=("LD_PRELOAD", "FAKE_CARD"))), "torch", "cuda")


def test_all_is_there(card: Path) -> None:
    assert "built for CUDA" in ask()


def test_no_compiler(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (card / "bin").mkdir()
    for name in ("sh", "unshare", "setpriv", "uname"):
        (card / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(card / "bin"))
    with pytest.raises(UserError, match=r"cannot compile: .*C compiler.*apt install gcc"):
        ask()


def test_no_headers_of_python(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = card / "cc"
    compiler.write_text(f"""#!/bin/sh
for word; do
    shift
    case $word in -I*/include/python3*) ;; *) set -- "$@" "$word";; esac
done
exec {shutil.which("cc")} "$@"
""")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(UserError, match=r"cannot compile: Python.h: No such file.*python3-dev"):
        ask()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_no_room(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = card / "disk"
    disk.mkdir()
    code = subprocess.run(
        ["du", "-sk", "gpt", "autoresearch"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size = (
        sum(int(line.split()[0]) for line in code.stdout.splitlines()) + 64
    )  # kB, of which 64 for the compiler
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        with pytest.raises(UserError, match=r"cannot compile: .*No space left.*: make room at"):
            ask()
    finally:
        subprocess.run(["umount", disk], check=True)
