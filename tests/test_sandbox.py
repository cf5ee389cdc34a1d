"""What a run may see and touch, on each rung of the ladder, as root and as an ordinary user. Real processes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import BECOME, Project

from autoresearch.jobs.compiled import KEPT, keep_compiled, start_from_kept
from autoresearch.jobs.sandbox import CONFINE, Sandbox, descend, fault, find_rungs, lent_paths

USERS = ["root", "nobody"] if os.getuid() == 0 else [""]
PYTHON = "/usr/bin/python3"  # an ordinary user cannot run one in the home of root
RUNGS = {"namespaces": 0, "Landlock alone": 1}
ALL = [(rung, user) for rung in RUNGS for user in USERS]
everywhere = pytest.mark.parametrize("box", ALL, ids="-".join, indirect=True)

# Says of each line of Python whether it ran
TRY = """
import json, os, socket, subprocess, sys
results = []
for line in json.loads(sys.argv[1]):
    try:
        exec(line)
        results.append(True)
    except (OSError, subprocess.SubprocessError):
        results.append(False)
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Box:
    """A home with a key, a checkout in it, and a run of that in a sandbox."""

    home: Path
    sandbox: Sandbox
    user: str

    @property
    def checkout(self) -> Path:
        return self.home / "checkout"

    @property
    def tree(self) -> Path:
        return self.checkout / "runs/t/0001/tree"

    def run(self, *words: str, read: tuple[str, ...] = (".",)) -> subprocess.CompletedProcess[str]:
        lent, own = lent_paths(self.checkout, read), self.tree.parent
        command = self.sandbox.command(words, lent, [self.tree, own / "tmp", own / "out"])
        become = BECOME if self.user == "nobody" else []
        env = self.sandbox.environment(own / "tmp")
        return subprocess.run([*become, *command], cwd=self.tree, env=env, capture_output=True, text=True, timeout=60)  # fmt: skip

    def tries(self, *lines: str, read: tuple[str, ...] = (".",)) -> list[bool]:
        done = self.run(PYTHON, "-c", TRY, json.dumps(lines), read=read)
        assert done.returncode == 0, done.stderr
        found: list[bool] = json.loads(done.stdout)
        return found


@pytest.fixture
def box(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    rung, user = request.param
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "home"
        files = (".ssh/id_x", ".bashrc", "checkout/.git/config", "checkout/.env", "checkout/data/a", "checkout/runs/t/0002/b")  # fmt: skip
        for name in files:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text("x\n")
        for name in ("tree", "tmp", "out"):
            (home / "checkout/runs/t/0001" / name).mkdir(parents=True)
        monkeypatch.setenv("HOME", str(home))
        rungs = list(find_rungs(home / "checkout"))
        if len(rungs) < 4:
            pytest.skip("this kernel does not allow all rungs")
        sandbox = rungs[RUNGS[rung]]
        made = Box(home, sandbox, user)
        made.sandbox.environment(made.tree.parent / "tmp")  # makes a home there
        if user == "nobody":
            prefix = [PYTHON if word == sys.executable else word for word in sandbox.prefix]
            script = Path(folder) / "confine.py"
            script.write_text(Path(CONFINE[-1]).read_text())
            prefix = [str(script) if word == CONFINE[-1] else word for word in prefix]
            made = replace(made, sandbox=replace(sandbox, prefix=tuple(prefix)))
            subprocess.run(["chown", "-R", "nobody", folder], check=True)
        yield made


@everywhere
def test_files(box: Box) -> None:
    """It reads the system and what it is lent, writes its own folders, and nothing else."""
    hidden = (".ssh/id_x", ".bashrc", "checkout/.git/config", "checkout/.env", "checkout/runs/t/0002/b")  # fmt: skip
    refused = [f"open({str(box.home / name)!r})" for name in hidden]
    refused += [f"open({str(box.home / name)!r}, 'a')" for name in (*hidden, ".profile", "checkout/data/a")]  # fmt: skip
    refused += [f"os.truncate({str(box.checkout / 'data/a')!r}, 0)"]
    refused += [f"os.unlink({str(box.checkout / 'data/a')!r})", "open('/usr/lib/x', 'w')", "open('/etc/shadow')"]  # fmt: skip
    refused += [f"os.rename('f', {str(box.checkout / 'data/f')!r})", "open('/proc/sys/kernel/core_pattern', 'w')"]  # fmt: skip
    if "--namespaces" not in box.sandbox.prefix:  # there, it holds what is lent and no more
        refused += [f"os.listdir({str(box.home)!r})"]
    allowed = ["open('f', 'w')", "open('../out/f', 'w')", "open(os.environ['TMPDIR'] + '/f', 'w')"]
    allowed += ["open(os.path.expanduser('~/f'), 'w')", "open('/dev/null', 'w')"]  # fmt: skip
    allowed += [f"open({str(box.checkout / 'data/a')!r})", "open('/etc/passwd')", "open('/dev/shm/f', 'w')"]  # fmt: skip
    allowed += ["os.unlink('/dev/shm/f')", "open('/proc/self/maps')"]
    if box.user != "nobody":  # whose standard error is a pipe of root here
        allowed += ["open('/dev/stderr', 'w')"]
    results = box.tries(*refused, *allowed)
    assert [line for line, ran in zip(refused, results, strict=False) if ran] == []
    assert [
        line for line, ran in zip(allowed, results[len(refused) :], strict=True) if not ran
    ] == []


@everywhere
def test_what_a_task_lends(box: Box) -> None:
    """`read = []` lends nothing of the checkout, a path outside only that."""
    data, other = f"open({str(box.checkout / 'data/a')!r})", f"open({str(box.home / '.bashrc')!r})"
    assert box.tries(data, other, read=()) == [False, False]
    assert box.tries(data, other, read=("data", "~/.bashrc", "~/nowhere")) == [True, True]


@everywhere
def test_sockets(box: Box) -> None:
    """None of another program, in the file system or outside; pairs work, and in namespaces one's own."""
    path = box.home / "s"
    with socket.socket(socket.AF_UNIX) as near, socket.create_server(("127.0.0.1", 0)) as far:
        near.bind(str(path))
        near.listen()
        path.chmod(0o777)
        port = far.getsockname()[1]
        found = box.tries(
            f"socket.socket(socket.AF_UNIX).connect({str(path)!r})",
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
            "socket.socketpair()",
            "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 1)",
            "s = socket.socket(socket.AF_UNIX); s.bind('own'); s.listen(); socket.socket(socket.AF_UNIX).connect('own')",
        )
    own = box.sandbox.missing == ""
    assert found == [False, False, False, True, own, own]


CALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
add_key = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
for number in (425, add_key):
    libc.syscall(number, b"user", b"x", b"x", 1, -3)
    print(errno.errorcode[ctypes.get_errno()], end=" ")
print({line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm", "CapInh", "NoNewPrivs"))})
"""


@everywhere
def test_no_io_uring_no_keyring_no_capability(box: Box) -> None:
    said = box.run(PYTHON, "-c", CALLS)
    assert said.stdout.startswith("EACCES EACCES ") and "'1'" in said.stdout, said.stderr
    assert said.stdout.count("'") == 4 and "0000000000000000" in said.stdout


@everywhere
def test_other_processes(box: Box) -> None:
    """In namespaces they cannot be seen; in both neither their environment nor their death is in reach."""
    sleeper = [*(BECOME if box.user == "nobody" else []), "sleep", "60"]
    with subprocess.Popen(sleeper, env={**os.environ, "API_KEY": "k"}) as other:
        try:
            see, environ, kill = box.tries(
                f"open('/proc/{other.pid}/comm').read() == 'sleep\\n' or os.stat('/gone')",
                f"open('/proc/{other.pid}/environ').read()",
                f"os.kill({other.pid}, 9)",
            )
        finally:
            other.kill()
    assert not environ and not kill and (not see or box.sandbox.missing != "")


@everywhere
def test_programs(box: Box) -> None:
    """What runs do: child processes, pools, git, pytest where it is installed."""
    (box.tree / "pool.py").write_text(
        "import multiprocessing, subprocess\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.Pool(2) as pool:\n"
        "        print(pool.map(abs, [-1, -2]), multiprocessing.Array('i', 1)[:])\n"
        "    print(subprocess.run(['git', 'status'], capture_output=True, text=True).returncode)\n"
    )
    done = box.run(PYTHON, "pool.py")
    assert done.stdout == "[1, 2] [0]\n128\n", done.stderr
    if box.user != "nobody":
        (box.tree / "test_a.py").write_text("def test_a(tmp_path): (tmp_path / 'f').write_text('')")
        done = box.run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_a.py")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("abi", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("box", [("Landlock alone", USERS[0])], ids=["alone"], indirect=True)
def test_old_kernels(box: Box, abi: int) -> None:
    """Each knows fewer rights: the first no moves between folders, the first two no truncate."""
    old = replace(box, sandbox=replace(box.sandbox, prefix=(*box.sandbox.prefix, f"--abi={abi}")))
    key, move = (
        f"open({str(box.home / '.ssh/id_x')!r})",
        "open('f', 'w'); os.rename('f', '../out/f')",
    )
    empty = f"os.truncate({str(box.checkout / 'data/a')!r}, 0)"
    assert old.tries(key, move, empty) == [False, abi >= 2, abi < 3]


def test_the_ladder(tmp_path: Path) -> None:
    """A device that only a looser rung lets a run open costs the stricter ones, and it is said."""
    rungs = list(find_rungs(tmp_path))
    device = tmp_path / "device"
    device.write_text("")
    asked = ["cat", str(device)]
    found = descend(rungs, lambda sandbox: fault(sandbox, asked))
    assert found.prefix == () and "in a stricter sandbox: cat: " in found.missing
    assert descend(rungs, lambda _: "broken anyhow") == rungs[0]
    assert descend(rungs, lambda _: "") == rungs[0]


@pytest.mark.parametrize(
    ("home", "words"), [("/", "HOME is /: a run can read it"), ("/usr", "HOME is /usr: ")]
)
def test_an_odd_home(
    home: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert words in next(find_rungs(tmp_path)).missing


def test_a_home_in_a_system_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left out of what a run reads of that folder."""
    monkeypatch.setenv("HOME", "/usr/share")
    options = next(find_rungs()).prefix
    assert "--read=/usr" not in options and "--read=/usr/bin" in options
    assert not [option for option in options if option.startswith("--read=/usr/share")]


def test_compiled_code_is_copied_as_it_is(tmp_path: Path) -> None:
    """A run starts from what was kept, links stay links, and what it adds stays its own."""
    (start_from_kept(tmp_path) / "a").write_text("1")
    keep_compiled(tmp_path)
    own = start_from_kept(tmp_path)
    assert (own / "a").read_text() == "1"
    (own / "a").write_text("2")
    assert (start_from_kept(tmp_path) / "a").read_text() == "1"
    (own / "link").symlink_to("/etc/passwd")
    os.mkfifo(own / "pipe")
    keep_compiled(tmp_path)
    own = start_from_kept(tmp_path)
    assert (own / "link").is_symlink() and (own / "pipe").is_fifo()
    for path in own.iterdir():
        path.unlink()
    keep_compiled(tmp_path)  # nothing compiled: what there was stays
    assert (tmp_path / KEPT / "a").exists()


def test_only_the_baseline_leaves_what_it_compiled(project: Project) -> None:
    """An edit finds that, and leaves nothing to the next one, kept or not."""
    note = "folder = os.environ['TORCHINDUCTOR_CACHE_DIR']; os.makedirs(folder, exist_ok=True); "
    note += "print(os.listdir(folder)); open(f'{folder}/{VAL_BPB}', 'w').write('x')"
    project.patch("train.py", "import os\n", f"import os\n{note}\n")
    project.git("-c", "user.name=P", "-c", "user.email=p@e.org", "commit", "-qam", "compiles")
    agent = "sed -i 's/^VAL_BPB = .*/VAL_BPB = 0.'$((9 - ${AUTORESEARCH_EXPERIMENT#000}))'/' train.py; echo lower"
    project.research(agent, experiments=2)
    assert [row["status"] for row in project.rows()] == ["keep"] * 3
    for number, found in enumerate(("[]", "['1.0']", "['1.0']")):
        assert (project.root / f"runs/t/{number:04d}/run.log").read_text().startswith(found)
