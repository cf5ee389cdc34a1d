"""A project to experiment in: the real driver, a real git repository, an arena and a train.py of milliseconds."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoresearch.jobs.sandbox import find_rungs
from autoresearch.journal.experiment import Experiment, parse_message
from autoresearch.task import read_task

os.environ["AUTORESEARCH_ARENA"] = "demo"  # read by prepare.py when it is imported
VISIBLE_GPUS = {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the demo arena is for a CPU
# Threads that spin while they wait take the cores of the tests beside; read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job ignores both, and so would
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # every process that the tests start and interrupt

BECOME = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
ROOT = Path(__file__).resolve().parent.parent
TASK = read_task(ROOT)

# Stands in for the arena where the arena is beside the point: it answers the driver as prepare.py does.
QUICK_PREPARE = """\
import json, os, pathlib, sys
if sys.argv[1:] == ["--judge"]:
    claimed, score = float(os.environ["AUTORESEARCH_SCORE"]), float(open(os.environ["AUTORESEARCH_MODEL"]).read())
    if abs(claimed - score) > 0.0005:
        sys.exit(f"claims val_bpb {claimed:.6f}, and its model scores {score:.6f}")
    print(f"val_bpb: {score:.6f}\\nval_bpb_upstream: {score:.6f}\\nsealed_bpb: {score + 0.1:.6f}")
else:
    print("ready:", json.dumps({"name": os.environ["AUTORESEARCH_ARENA"], "budget": 1.0, "data": "d0",
          "folder": str(pathlib.Path.home() / "cache" / "quick")}))
"""

# Stands in for training where training is beside the point: it scores what its constant says.
QUICK_TRAIN = """\
VAL_BPB = 1.0     # [0.5, 2.0] the score
EXTRA = 0
EXTRA = 0

import os
with open(os.environ["AUTORESEARCH_MODEL"], "w") as file:
    file.write(str(VAL_BPB))
print("---")
print(f"val_bpb:          {VAL_BPB:.6f}")
print(f"val_bpb_upstream: {VAL_BPB:.6f}")
print("training_seconds: 1.0")
print("total_seconds:    0.2")
print("peak_vram_mb:     512.0")
print("mfu_percent:      n/a")
print("total_tokens_M:   0.500")
print("num_steps:        10")
print("num_params_M:     0.100")
print("depth:            2")
print("evaluation_seconds: 0.1")
"""


@dataclass(frozen=True)
class Project:
    root: Path
    env: dict[str, str]
    options: tuple[str, ...] = ()  # of every run
    prefix: tuple[str, ...] = ()  # of every command

    def command(self, *args: str) -> list[str]:
        runs = not args or args[0].startswith("-") or args[0] in ("run", "doctor")
        return [
            *self.prefix,
            sys.executable,
            "loop.py",
            *args,
            *(["--no-report"] if runs else []),
            *(self.options if runs or args[0] == "audit" else []),
        ]  # which takes two seconds

    def loop(self, *args: str, code: int = 0, timeout: float = 250) -> str:
        """Run loop.py to its end and return what it printed; the exit code must be the expected one."""
        done = subprocess.run(
            self.command(*args),
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def research(
        self, agent: str, experiments: int = 1, code: int = 0, tag: str = "t", timeout: float = 250
    ) -> str:
        """Run some experiments with a shell command for an agent."""
        args = (
            "--tag",
            tag,
            "--arena",
            "demo",
            "--agent",
            agent,
            "--experiments",
            str(experiments),
        )
        return self.loop(*args, code=code, timeout=timeout)

    def start(self, agent: str, *args: str, experiments: int = 1) -> subprocess.Popen[bytes]:
        """Start a driver to be killed."""
        command = self.command(
            "--tag=t", "--arena=demo", f"--agent={agent}", f"--experiments={experiments}", *args
        )
        return subprocess.Popen(
            command, cwd=self.root, env=self.env, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def git(self, *args: str) -> str:
        return subprocess.run(
            [*self.prefix, "git", *args],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def pace(self, **pace: float) -> None:
        """Shorten the waits and limits of the drivers that start from now on."""
        known = json.loads(self.env.get("AUTORESEARCH_PACE", "{}"))
        self.env["AUTORESEARCH_PACE"] = json.dumps(known | pace)

    def patch(self, name: str, old: str, new: str) -> None:
        """Change a line of this copy of the project."""
        text = (self.root / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def rows(self) -> list[dict[str, str]]:
        header, *lines = (self.root / "results.tsv").read_text().splitlines()
        return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]

    def check(self, tag: str = "t") -> None:
        """What holds after any run, killed or not: refs, rows, branch, tree and processes agree."""
        refs = dict(
            line.split()
            for line in self.git(
                "for-each-ref", "--format=%(refname) %(objectname)", f"refs/autoresearch/{tag}"
            ).splitlines()
        )
        rows = [row for row in self.rows() if row["tag"] == tag]
        assert [f"refs/autoresearch/{tag}/{int(row['experiment']):04d}" for row in rows] == sorted(
            refs
        )
        assert [row["commit"] for row in rows] == [refs[name][:10] for name in sorted(refs)]
        kept = [row["commit"] for row in rows if row["status"] == "keep"]
        log = self.git(
            "log",
            "--first-parent",
            "--format=%H",
            f"--max-count={len(kept)}",
            f"autoresearch/{tag}",
        ).splitlines()
        assert [commit[:10] for commit in log] == kept[::-1]
        assert self.processes() == []

    def left(self, name: str) -> bool:
        """Whether a run has left a file among its temporary ones, which are all that it can write."""
        return any(self.root.glob(f"runs/*/*/tmp/{name}"))

    def processes(self) -> list[str]:
        """Command lines of what the driver's jobs left running."""
        found = []
        for pid in self.pids():
            with suppress(OSError):  # gone meanwhile
                found.append(Path(f"/proc/{pid}/cmdline").read_text())
        return found

    def pids(self) -> list[int]:
        """Processes that work below this project's folder."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").readlink().is_relative_to(self.root):
                    found.append(int(process.name))
        return found


def copy_project(folder: Path) -> None:
    for name in ("loop.py", "train.py", "prepare.py", "program.md", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("autoresearch", "gpt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    task = (folder / "pyproject.toml").read_text()  # one seed, where the rule is beside the point
    assert "seeds = 2 " in task
    (folder / "pyproject.toml").write_text(task.replace("seeds = 2 ", "seeds = 1 "))


def clean_environment(home: Path) -> dict[str, str]:
    """No identity, no configuration, no keys of whoever runs the tests."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TZ": "UTC",
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        "AUTORESEARCH_PACE": json.dumps({"pause": 3.0}),  # a busy machine stands still for a second
    }


def commit_all(project: Project) -> Project:
    who = ("-c", "user.name=A Person", "-c", "user.email=person@example.org")
    project.git("init", "--quiet", "--initial-branch=main")
    project.git("add", "--all")
    project.git(*who, "commit", "--quiet", "--message=start")
    return project


def make_quick_project(folder: Path) -> Project:
    """The driver as it is, with an arena and a train.py that take no time."""
    root, home = folder / "project", folder / "home"
    root.mkdir()
    home.mkdir()
    copy_project(root)
    (root / "prepare.py").write_text(QUICK_PREPARE)
    (root / "train.py").write_text(QUICK_TRAIN)
    task = (root / "pyproject.toml").read_text()  # no feeder, where there is nothing to feed
    task = re.sub("^feed = .*\n", "", task, flags=re.MULTILINE)
    task = re.sub("^read = .*\n", 'read = [".."]\n', task, flags=re.MULTILINE)  # scripts of a test
    (root / "pyproject.toml").write_text(task)
    return commit_all(Project(root.resolve(), clean_environment(home)))


# What starts a driver, trains, or imports torch; `pytest -m "not slow"` leaves it out
SLOW_FIXTURES = {"project", "impatient", "reported", "cheated", "cache"}
SLOW_MODULES = {"jobs", "train", "prepare", "referee", "doctor", "gpu", "bench", "download", "text"}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        module = item.path.stem.removeprefix("test_")
        if SLOW_FIXTURES & {*item.fixturenames} or module in SLOW_MODULES:
            item.add_marker("slow")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_quick_project(tmp_path)


@pytest.fixture
def impatient(project: Project) -> Project:
    """A driver whose waits and limits take seconds."""
    project.pace(backoff=0.5, max_backoff=1.0, shortest_limit=5.0, grace=0.2)
    return project


def experiment(project: Project, number: int, tag: str = "t") -> Experiment:
    """What git holds of an experiment."""
    return parse_message(
        project.git("log", "-1", "--format=%B", f"refs/autoresearch/{tag}/{number:04d}")
    )


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def as_nobody(folder: Path) -> tuple[str, ...]:
    """A prefix that runs a command as an ordinary user who owns a folder, and who can reach that and our Python
    wherever they are: in mounts of its own, a closed folder on the way shows these alone."""
    paths = [folder.resolve(), Path(sys.prefix), Path(sys.base_prefix), ROOT]
    closed = {p for path in paths for p in path.parents if not p.stat().st_mode & stat.S_IXOTH}
    covered = [path for path in paths if closed & {*path.parents}]
    lines = ["set -e", "mount -t tmpfs none /mnt"]
    for number, path in enumerate(covered):
        lines.append(f"mkdir /mnt/{number}; mount --bind {path} /mnt/{number}")
    lines += [f"mount -t tmpfs -o mode=755 none {p}" for p in closed if not closed & {*p.parents}]
    for number, path in enumerate(covered):
        lines.append(f"mkdir -p {path}; mount --bind /mnt/{number} {path}")
    subprocess.run(["chown", "-R", "nobody", folder], check=True)
    lines.append(f'{shlex.join(BECOME)} "$@"')
    return ("unshare", "--mount", "/bin/sh", "-c", "; ".join(lines), "sh")


needs_namespaces = pytest.mark.skipif(
    next(find_rungs()).missing != "", reason="this kernel allows no namespaces"
)


def make_real_project(folder: Path, cache: Path, budget: float, counted: bool = True) -> Project:
    """The whole project as it is, but for a budget shorter than the demo's fifteen seconds, of counted work or not."""
    root = folder / "project"
    root.mkdir()
    copy_project(root)
    text = (root / "gpt/arena.py").read_text()
    assert "budget=15.0" in text and "counted=True" in text
    text = text.replace("budget=15.0", f"budget={budget}").replace(
        "counted=True", f"counted={counted}"
    )
    (root / "gpt/arena.py").write_text(text)
    return commit_all(
        Project(root.resolve(), clean_environment(folder) | {"AUTORESEARCH_CACHE": str(cache)})
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the demo arena, made by prepare.py as a user would make it."""
    os.environ["AUTORESEARCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), "--arena", "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokenize" in done.stderr  # progress
    return Path(os.environ["AUTORESEARCH_CACHE"])
