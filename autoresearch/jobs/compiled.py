"""The compiled kernels of a study. A run is a foreign program, which could leave anything among
what it compiles to the next one, as weights: so what the baseline compiled, a person's program, is
all that later runs start with.

Triton's caches hold absolute paths, so all runs of a study compile in one folder, one after the
other.
"""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from autoresearch.files import remove

KEPT, OWN = "compiled", "compiling"  # in the folder of a study: of the baseline, and of a run
MAX_BYTES = 4_000_000_000  # a cache that is larger is not kept


def cache_environment(folder: Path) -> dict[str, str]:
    """Where compilers put what they made."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
    }


def start_from_kept(study: Path) -> Path:
    """The folder that a run compiles in, with a copy of what the baseline has compiled. Where
    that cannot be copied, the run compiles again."""
    remove(study / OWN)
    if (study / KEPT).is_dir():
        # it follows no link and opens no pipe, which shutil would
        copy = ["cp", "-R", "-P", "--reflink=auto", "--", str(study / KEPT), str(study / OWN)]
        if subprocess.run(copy, capture_output=True, check=False).returncode:
            remove(study / OWN)
    (study / OWN).mkdir(exist_ok=True)
    return study / OWN


def keep_compiled(study: Path) -> None:
    """Keep what the last run has compiled. Killed halfway, the next run compiles again."""
    with suppress(OSError, RecursionError):  # it holds whatever the run put there
        if 0 < size_of(study / OWN) <= MAX_BYTES:
            remove(study / KEPT)
            (study / OWN).rename(study / KEPT)


def size_of(folder: Path) -> int:
    """Bytes of all files in it; links count as themselves."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths)
