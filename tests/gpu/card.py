"""Cards that are not here: torch allocates, traces, compiles to cubins and launches for them, and nothing is computed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# As torch and NVIDIA's programming guide have them: name, compute capability, multiprocessors, bytes of memory, and bytes
# of shared memory that a block can have
CARDS = {
    "3050": ("NVIDIA GeForce RTX 3050", "8.6", 20, 8_225_000_000, 101376),
    "3060": ("NVIDIA GeForce RTX 3060", "8.6", 28, 12_487_000_000, 101376),
    "4090": ("NVIDIA GeForce RTX 4090", "8.9", 128, 25_244_000_000, 101376),
    "A100": ("NVIDIA A100-SXM4-80GB", "8.0", 108, 84_975_000_000, 166912),
    "H100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 84_943_000_000, 232448),
    "5090": ("NVIDIA GeForce RTX 5090", "12.0", 170, 33_662_000_000, 101376),
}


def missing() -> str:
    """Why no card can be made up here, if so."""
    if shutil.which("cc") is None:
        return "no C compiler (cc)"
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return "" if torch.version.cuda else "torch is built without CUDA"


def environment(card: str, folder: Path) -> dict[str, str]:
    """The environment in which Python finds that card; its libraries and caches are made in a folder."""
    import triton

    headers = Path(triton.__file__).parent / "backends/nvidia/include"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-w",
        "-O1",
        "-I",
        headers,
        "-o",
        folder / "card.so",
        HERE / "card.c",
    ]
    subprocess.run(command, check=True)
    for name in ("libcuda.so", "libcuda.so.1"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("card.so")
    hidden = ("CUDA_VISIBLE_DEVICES", "AUTORESEARCH_FEED", "AUTORESEARCH_FACTS")
    return {name: value for name, value in os.environ.items() if name not in hidden} | {
        "FAKE_CARD": ";".join(map(str, CARDS[card])),
        "LD_PRELOAD": str(folder / "card.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # which maps memory by the driver
        "AUTORESEARCH_ARENA": "climbmix",
        "AUTORESEARCH_CACHE": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def compile_for(card: str, folder: Path, source: str) -> dict[str, float]:
    """Compile a train.py and take two steps of it on a card; see steps.py, whose figures are returned. RuntimeError with
    its last words where it failed."""
    (folder / "train.py").write_text(source)
    env = environment(card, folder) | {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, HERE / "steps.py"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-500:]}\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
