"""What a run may see of the machine: an agent wrote train.py, and nobody reads it before it runs.

Covered, where the kernel allows all of it: a run changes its tree, its temporary files, its output
and its compile cache; it reads the system, Python and what the task lends it, nothing else below
the home; it has no network but a loopback, no socket in the file system, no other process.
`Sandbox.missing` says what of that does not hold here. Not covered: a fault of the kernel.
"""

import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from autoresearch.files import CODE, one_line

# The environment that training needs: none of it opens a door. All else stays with the driver.
NEEDED = re.compile(
    r"PATH|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH"
    r"|CC|CXX|VIRTUAL_ENV|PYTHON\w+|CUDA_\w+|NVIDIA_\w+|CUDNN_\w+|CUBLAS_\w+|TORCH\w*|PYTORCH_\w+"
    r"|TRITON_\w+|OMP_\w+|MKL_\w+|KMP_\w+|AUTORESEARCH_(CACHE|SEED)"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH(?!OR)", re.IGNORECASE)

# util-linux: namespaces of its own for users, processes, files, shared memory. When the keeper
# dies, the kernel kills everything in it, whatever it did to hide. The capabilities are for
# confine.py, which drops them.
NAMESPACES = (
    *("setpriv", "--pdeathsig=KILL", "unshare", "--user", "--map-current-user", "--keep-caps"),
    *("--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "--ipc"),
)
CONFINE = (sys.executable, "-IS", str(Path(__file__).with_name("confine.py")))

SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/libx32", "/lib64", "/opt", "/proc", "/sys",
    "/nix", "/gnu/store", "/run/current-system", "/run/opengl-driver",
)  # fmt: skip
DEVICES = (
    "null", "zero", "full", "random", "urandom", "shm", "nvidia*", "dri", "dxg",
)  # fmt: skip
# What programs of a folder in PATH are made of, beside it: a Python, a Node, pyenv, uv, pipx
BESIDE = (
    "lib", "lib64", "libexec", "include", "versions", "version", "share/uv/python",
    "share/uv/tools", "share/pipx",
)  # fmt: skip
OURS = ("runs", "results.tsv")  # in the checkout


@dataclass(frozen=True)
class Sandbox:
    """How a run is sandboxed: a command prefix that ends in options of confine.py, empty where
    there is no sandbox; whether the environment is filtered, but for some names; and why the
    sandbox is incomplete, if it is."""

    prefix: tuple[str, ...]
    bare: bool
    missing: str = ""
    names: tuple[str, ...] = ()

    def environment(self, tmp: Path) -> dict[str, str]:
        """The environment of a run, with a folder for temporary files, and for its home."""
        if not self.bare:
            return {**os.environ, "TMPDIR": str(tmp)}
        (tmp / "home").mkdir(exist_ok=True)
        return self.filtered() | {"TMPDIR": str(tmp), "HOME": str(tmp / "home")}

    def filtered(self) -> dict[str, str]:
        """The part of our environment that a run may know."""
        return {
            name: value
            for name, value in os.environ.items()
            if name in self.names or (NEEDED.fullmatch(name) and not SECRET.search(name))
        }

    def command(
        self, words: Sequence[str], read: Iterable[Path] = (), write: Iterable[Path] = ()
    ) -> list[str]:
        """A command in the sandbox, which may read and write these files and folders besides."""
        if not self.prefix:
            return [*words]
        paths = [*(f"--read={path}" for path in read), *(f"--write={path}" for path in write)]
        return [*self.prefix, *paths, "--", *words]


NONE = Sandbox((), bare=False, missing="--no-isolation")


def find_rungs(
    root: Path | None = None, network: bool = False, names: tuple[str, ...] = ()
) -> Iterator[Sandbox]:
    """The sandboxes that this kernel allows, the best first, each tried: for runs of a checkout,
    with the network or without, with these names of the environment besides those that are needed.
    The last is none."""
    net = () if network else ("--net",)
    loopback, no_sockets = ((), ()) if network else (("--loopback",), ("--no-sockets",))
    unshare = (*NAMESPACES, *net, "--", *CONFINE, "--namespaces", *loopback)
    alone = (*CONFINE, *no_sockets)
    others = "a run sees your other processes"
    no_users = f"no user namespaces: {others}"
    if not network:
        no_users += ", and has no sockets, which a DataLoader's workers need"
    no_files = "no Landlock: a run can change what it may read"
    paths, open_home = system_paths(root)
    abi, why = landlock(), ""
    if 0 < abi < 3:
        open_home.append("Linux is older than 6.2: a run can empty your files")
    for prefix, lacks in ((unshare, ""), (alone, no_users), ((*unshare, "--abi=0"), no_files)):
        if abi == 0 and prefix[-1] != "--abi=0":
            continue
        if prefix == alone and abi < 6:
            lacks = f"{lacks}, and can signal them"
        missing = "; ".join(filter(None, [lacks, *open_home]))
        sandbox = Sandbox((*prefix, *paths), True, missing, names)
        if failed := fault(sandbox, ["true"]):
            why = why or failed
        else:
            yield sandbox
    yield Sandbox((), True, why or "the GPU works in no sandbox", names)


def descend(rungs: Iterable[Sandbox], fails: Callable[[Sandbox], str]) -> Sandbox:
    """The best sandbox in which something works that runs need, as the GPU does: it never costs a
    person the night. `fails` returns why it does not, or nothing. Where it works in none, the
    sandbox is not to blame, and the best one stays."""
    best, why = None, ""
    for sandbox in rungs:
        best = best or sandbox
        if not (failed := fails(sandbox)):
            said = f"in a stricter sandbox: {why}" if why else ""
            return replace(sandbox, missing="; ".join(filter(None, [sandbox.missing, said])))
        why = why or failed
    return best or NONE


def fault(sandbox: Sandbox, command: Sequence[str], read: Iterable[Path] = ()) -> str:
    """Why a command fails in a sandbox, in a line; nothing if it works there."""
    with tempfile.TemporaryDirectory() as tmp:
        words = sandbox.command(command, read, [Path(tmp)])
        env = sandbox.environment(Path(tmp))
        try:
            subprocess.run(
                words, env=env, cwd=tmp, capture_output=True, text=True, check=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()
            return one_line(said.rpartition("\n")[2].removeprefix("error: "))
    return ""


def landlock() -> int:
    """The version of Landlock in this kernel, 0 without it."""
    from autoresearch.jobs.confine import landlock_abi

    try:
        return landlock_abi()
    except OSError:
        return 0


# --------------------------------------------------------------------------------------------------
# Paths. Landlock knows no exceptions: what is hidden in a folder is left out of a list.


def all_but(folder: Path, hidden: set[Path]) -> Iterator[Path]:
    """A folder, or what it holds but for these."""
    real = folder.resolve()
    if not any(path.is_relative_to(real) for path in hidden):
        yield folder
    elif real not in hidden and folder.is_dir():
        for path in sorted(folder.iterdir()):
            yield from all_but(path, hidden)


def system_paths(root: Path | None) -> tuple[list[str], list[str]]:
    """The options for what every run needs of the system, and why that opens too much, if so."""
    home, open_home = Path.home().resolve(), []
    hidden = {home, *([root] if root else [])}
    if any(Path(path).is_relative_to(home) for path in SYSTEM):
        open_home.append(f"HOME is {home}: a run can read it")
        hidden.discard(home)
    env = os.environ
    folders = [path for path in env.get("PATH", os.defpath).split(":") if path]
    named = [*SYSTEM, sys.executable, sys.prefix, sys.base_prefix, *folders]
    named += [str(Path(path).parent / name) for path in folders for name in BESIDE]
    for name in ("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "PYTHONPATH"):
        named += env.get(name, "").split(":")
    # of root's own files in /etc, a run needs none
    named += [str(p) for p in Path("/etc").iterdir() if p.name != "ssh" and open_to_all(p)]
    paths = dict.fromkeys(Path(path) for path in named if path.startswith("/"))
    whole = {path for path in paths if not path.is_symlink()}
    found = (path for path in paths if path.exists() and whole.isdisjoint(path.parents))
    read = [p for path in found for p in all_but(path, hidden)]
    write = [path for name in DEVICES for path in sorted(Path("/dev").glob(name))]
    return [*(f"--read={path}" for path in read), *(f"--write={path}" for path in write)], open_home


def open_to_all(path: Path) -> bool:
    return path.exists() and bool(path.stat().st_mode & stat.S_IROTH)


def lent_paths(root: Path, names: Iterable[str]) -> list[Path]:
    """What of a checkout, and of what lies elsewhere, the runs of a task may read, by its key
    `read`; with the packages that are installed in the checkout. What is not there is left out."""
    hidden = {path for path in root.iterdir() if path.name.startswith(".") or path.name in OURS}
    python = (root / ".venv/bin/python").resolve()
    lent = [root / ".venv", python.parent.parent, root / "node_modules"]
    for name in names:
        path = (root / Path(name).expanduser()).resolve()
        lent += all_but(path, hidden - {path} | {root / ".git"})
    return [path for path in lent if path.exists()]


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
