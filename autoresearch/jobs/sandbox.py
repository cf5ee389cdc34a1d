"""What a run may see of the machine: an agent wrote train.py, and nobody reads it before it runs.

Not covered: it runs as the user, and can read and write the user's files.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from autoresearch.files import CODE

# The environment that training needs: none of it opens a door. All else stays with the driver.
NEEDED = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|XDG_CACHE_HOME|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH"
    r"|CC|CXX|VIRTUAL_ENV|PYTHON\w+|CUDA_\w+|NVIDIA_\w+|CUDNN_\w+|CUBLAS_\w+|TORCH\w*|PYTORCH_\w+"
    r"|TRITON_\w+|OMP_\w+|MKL_\w+|KMP_\w+|AUTORESEARCH_(CACHE|SEED)"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)

# util-linux: namespaces of its own for users, network, processes and /proc. When the keeper dies,
# the kernel kills everything in it, whatever it did to hide. A new network has its loopback down:
# bring `lo` up (SIOCSIFFLAGS, IFF_UP | IFF_RUNNING: linux/if.h), then drop the capability for it.
LOOPBACK = """
import fcntl, os, socket, sys
fcntl.ioctl(socket.socket(), 0x8914, b"lo".ljust(16, b"\\0") + b"\\x41\\0" + bytes(22))
drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--"]
os.execvp("setpriv", [*drop, *sys.argv[1:]])
"""
NAMESPACES = (
    *("setpriv", "--pdeathsig=KILL", "unshare", "--user", "--map-current-user"),
    *("--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc"),
)
NETWORK = (*NAMESPACES, "--")
NO_NETWORK = (*NAMESPACES, "--keep-caps", "--net", "--", sys.executable, "-ISc", LOOPBACK)


@dataclass(frozen=True)
class Sandbox:
    """How a run is sandboxed: a command prefix, whether the environment is filtered, but for some
    names, and why the sandbox is incomplete, if it is."""

    prefix: tuple[str, ...]
    bare: bool
    missing: str = ""
    names: tuple[str, ...] = ()

    def environment(self, tmp: Path) -> dict[str, str]:
        """The environment of a run, with a folder for temporary files."""
        env = dict(os.environ)
        if self.bare:
            env = {
                name: value
                for name, value in os.environ.items()
                if name in self.names or (NEEDED.fullmatch(name) and not SECRET.search(name))
            }
        return env | {"TMPDIR": str(tmp)}


NONE = Sandbox((), bare=False, missing="--no-isolation")


def find_sandbox(network: bool = False, names: tuple[str, ...] = ()) -> Sandbox:
    """The best sandbox that this kernel allows, by trying it: with the network or without, with
    these names of the environment besides those that are needed."""
    prefix = NETWORK if network else NO_NETWORK
    try:
        command = [*prefix, "true"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return Sandbox((), True, said.strip().splitlines()[-1], names)
    return Sandbox(prefix, True, "", names)


def lend(root: Path, env: dict[str, str]) -> dict[str, str]:
    """An environment with what a repository has installed beside its files, which a fresh tree
    lacks: programs, Python packages; and where untracked data lies."""
    folders = [root / ".venv/bin", root / "node_modules/.bin"]
    if root == CODE:
        folders.append(Path(sys.executable).parent)
    path = os.pathsep.join([*(str(f) for f in folders if f.is_dir()), env.get("PATH", os.defpath)])
    lent = {"PATH": path, "AUTORESEARCH_CHECKOUT": str(root)}
    if (root / ".venv").is_dir():
        lent |= {"UV_PROJECT_ENVIRONMENT": str(root / ".venv"), "UV_NO_SYNC": "1"}
    return env | lent
