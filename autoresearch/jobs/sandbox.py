"""What a training may see of the machine. An agent wrote train.py, and nobody reads it before it runs.

Not guaranteed: it runs as the user, and can read and write the user's files.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What training needs of the environment: none of it opens a door. Whatever else there is stays with the driver.
NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|XDG_CACHE_HOME|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|CC|CXX|VIRTUAL_ENV"
    r"|PYTHON\w+|CUDA_\w+|NVIDIA_\w+|CUDNN_\w+|CUBLAS_\w+|TORCH\w*|PYTORCH_\w+|TRITON_\w+|OMP_\w+|MKL_\w+|KMP_\w+"
    r"|AUTORESEARCH_(CACHE|SEED)"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)

# util-linux: namespaces of its own for users, network (not even loopback), processes and /proc. When the driver dies,
# the kernel kills everything in it, whatever it did to hide.
NAMESPACES = (
    "setpriv", "--pdeathsig=KILL", "unshare", "--user", "--map-current-user", "--net", "--pid", "--fork",
    "--kill-child=SIGKILL", "--mount-proc", "--",
)  # fmt: skip


@dataclass(frozen=True)
class Isolation:
    """How a training is started: the words before its command, whether its environment is cut down, and why there is
    no more of it than that."""

    prefix: tuple[str, ...]
    bare: bool
    missing: str = ""

    def environment(self, tmp: Path) -> dict[str, str]:
        """What a training inherits; temporary files go to a folder that is emptied."""
        if not self.bare:
            return {**os.environ, "TMPDIR": str(tmp)}
        needed = {name: value for name, value in os.environ.items() if NEEDED.fullmatch(name)}
        return {name: value for name, value in needed.items() if not SECRET.search(name)} | {"TMPDIR": str(tmp)}


NONE = Isolation((), bare=False, missing="--no-isolation")


def find_isolation() -> Isolation:
    """As much isolation as this kernel allows, found out by trying."""
    try:
        subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return Isolation((), bare=True, missing=said.strip().splitlines()[-1])
    return Isolation(NAMESPACES, bare=True)
