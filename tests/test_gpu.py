"""train.py on a GPU, each check in a process that sees one: the other tests are for a CPU and hide it."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, VISIBLE_GPUS

pytestmark = [
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("check", ["attention", "tables", "warm_up", "memory", "referee"])
def test_on_a_gpu(check: str) -> None:
    env = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    } | VISIBLE_GPUS
    command = [sys.executable, ROOT / "tests/gpu_checks.py", check]
    done = subprocess.run(
        command, env=env | {"AUTORESEARCH_ARENA": "python"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
