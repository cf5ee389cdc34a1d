"""What happens to a night by itself: the driver waits, mends or says who is in the way, and nothing is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUICK_PREPARE, Project, experiment, needs_namespaces, wait_for

from autoresearch.task import NOT_FINITE

NEXT = """echo "NEXT = '$AUTORESEARCH_EXPERIMENT'" >> train.py; echo go on"""
TRAIN = "cat ../../../../head.py train.py > x; mv x train.py; echo an idea"


def once(project: Project, what: str, number: int = 2) -> str:
    """An agent that does something the first time it is asked for one experiment, and else goes on."""
    return f"if [ $AUTORESEARCH_EXPERIMENT = {number:04d} ] && mkdir ../../../../once; then {what}; exit; fi; {NEXT}"


# --- trouble with the agent


@pytest.mark.parametrize(
    "trouble",
    [
        "echo Not logged in >&2; exit 1",
        "exit 3",
        "true",
        "echo 'API Error: 529 Overloaded' >&2; exit 1",
        "kill -9 $$",
    ],
)
def test_in_the_night_it_waits_and_goes_on(impatient: Project, trouble: str) -> None:
    """As long as it takes: the agent brings nothing six times, and is then itself again."""
    count = impatient.root.parent / "count"
    agent = f"""
    if [ $AUTORESEARCH_EXPERIMENT = 0002 ] && [ "$(cat {count} | wc -l)" -lt 6 ]; then echo >> {count}; {trouble}
    else {NEXT}; fi
    """
    count.touch()
    said = impatient.research(agent, experiments=2)
    assert "waiting until" in said
    assert [row["description"] for row in impatient.rows()] == ["baseline", "go on", "go on"]
    assert (impatient.root / "runs/t/0002/prompt-6.md").exists()
    impatient.check()


def test_the_agent_is_told_that_it_brought_nothing_again(impatient: Project) -> None:
    impatient.research("echo I would rather not", code=1)
    prompts = [(impatient.root / f"runs/t/0001/prompt-{i}.md").read_text() for i in (0, 1, 3)]
    assert ["in a row that brought nothing" in text for text in prompts] == [False, True, True]
    assert "(call 3 in a row that brought nothing)" in prompts[2]


# --- pauses of the driver itself

# A train.py that takes two seconds for its training, by real time, and says so.
SLOW = """
import time
start = time.perf_counter()
open(os.environ["TMPDIR"] + "/training", "a").close()
time.sleep(2)
TOOK = time.perf_counter() - start
"""


@pytest.mark.parametrize("frozen", ["the driver", "all of it"])
def test_a_pause_of_the_driver_blames_no_program(impatient: Project, frozen: str) -> None:
    """Stopped for longer than a run may take: alone, so that it misses the run, or with the run, as in a container that
    is frozen. The agent is not asked to repair anything, and the experiment gets its number."""
    (impatient.root.parent / "slow.py").write_text(SLOW)
    agent = """
    sed -i -e 's|^import os$|import os; exec(open("SLOW").read())|' \\
        -e 's/^print("training_seconds.*/print(f"training_seconds: {TOOK:.1f}")/' train.py
    echo a slow idea
    """.replace("SLOW", str(impatient.root.parent / "slow.py"))
    driver = impatient.start(agent)
    try:
        wait_for(lambda: impatient.left("training"))
        time.sleep(0.5)
        stopped = [driver.pid, *(impatient.pids() if frozen == "all of it" else [])]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        assert driver.wait(timeout=60) == 0
    finally:
        driver.kill()
        driver.wait()
    row = impatient.rows()[1]
    assert (row["description"], row["val_bpb"]) == ("a slow idea", "1.000000")
    assert experiment(impatient, 1).repairs == 0
    assert not (impatient.root / "runs/t/0001/prompt-1.md").exists()
    impatient.check()


# --- limits


def test_a_limit_within_a_repair(project: Project) -> None:
    """An agent that is busy when asked for a repair is not asked again after the limit."""
    project.pace(backoff=1000.0, max_backoff=1000.0, grace=0.2)
    agent = """
    if [ $AUTORESEARCH_ATTEMPT = 0 ]; then echo 'raise ValueError("no")' >> train.py; echo odd
    else echo 'API Error: 529 Overloaded' >&2; exit 1; fi
    """
    said = project.loop("--tag=t", "--arena=demo", f"--agent={agent}", "--hours=0.003")
    assert "waiting until" in said
    assert [row["status"] for row in project.rows()] == ["keep", "crash"]
    assert not (project.root / "runs/t/0001/prompt-2.md").exists()
    project.check()


def claude_that_costs(project: Project, dollars: float) -> None:
    result = json.dumps({"type": "result", "result": "an idea", "total_cost_usd": dollars})
    fakes = project.root.parent / "fakes"
    fakes.mkdir()
    (fakes / "claude").write_text(f"#!/bin/sh\n{NEXT}\ncat <<'EOF'\n{result}\nEOF\n")
    (fakes / "claude").chmod(0o755)
    project.env["PATH"] = f"{fakes}:{project.env['PATH']}"


def test_dollars(project: Project) -> None:
    claude_that_costs(project, 0.5)
    said = project.loop("--tag=t", "--arena=demo", "--agent=claude", "--dollars=1")
    assert "stopped: $1.00 of $1 are spent" in said and len(project.rows()) == 3


def test_a_cost_that_is_no_number(project: Project) -> None:
    """Nobody knows what it cost; a limit in dollars is not undone by that, and the record stays readable."""
    claude_that_costs(project, float("nan"))
    project.loop("--tag=t", "--arena=demo", "--agent=claude", "--dollars=1", "--experiments=1")
    assert experiment(project, 1).usage.cost_usd is None
    assert json.loads(project.loop("status", "--json"))["figures"]["dollars"] is None


def test_dollars_for_the_gpu(project: Project) -> None:
    args = ("--tag=t", "--arena=demo", "--dollars=0.3", "--gpu-dollars-per-hour=3600")
    said = project.loop(*args, f"--agent={NEXT}; sleep 0.4")
    assert " of $0.3 are spent" in said and len(project.rows()) == 1
    assert experiment(project, 0).facts["gpu_usd_per_hour"] == 3600.0


def test_dollars_that_nobody_counts(project: Project) -> None:
    said = project.loop("--tag=t", "--arena=demo", f"--agent={NEXT}", "--dollars=1", code=2)
    assert "does not say what a call costs: only --gpu-dollars-per-hour can be counted" in said
    claude_that_costs(project, 0.5)
    (project.root.parent / "fakes/claude").rename(project.root.parent / "fakes/codex")
    said = project.loop("--tag=t", "--arena=demo", "--agent=codex", "--dollars=1", code=2)
    assert '[tool.autoresearch.prices] of pyproject.toml: "codex" = [' in said
    assert not (project.root / "runs").exists()


@pytest.mark.parametrize(
    ("head", "reason", "repairs"),
    [
        ("import time; time.sleep(1000)", "killed at the limit of 5 s", 0),
        (
            "print('step 3  50.0%  loss nan', flush=True); import time; time.sleep(9)",
            "the loss is not finite: 50.0%",
            2,
        ),
    ],
)
def test_a_doomed_run_is_cut_short(
    impatient: Project, head: str, reason: str, repairs: int
) -> None:
    impatient.pace(quiet=1.0)
    (impatient.root.parent / "head.py").write_text(head + "\n")
    mend = """echo "N = '$(date +%N)'" >> train.py; echo mended"""
    impatient.research(f"if [ $AUTORESEARCH_ATTEMPT = 0 ]; then {TRAIN}; else {mend}; fi")
    crash = experiment(impatient, 1).crash
    assert crash is not None and crash.startswith(reason)


@pytest.mark.parametrize(
    ("line", "doomed"),
    [
        ("step 3  50.0%  loss nan", True),
        ("step 3  50.0%  loss: -inf  81,200 tok/s", True),
        ("step 3  50.0%  loss 1.5  info", False),
        ("step 3  50.0%  loss information", False),
        ("step 0  0.0%  loss 9.01  best val loss: inf", False),
        ("loss nan is what we fear", False),
    ],
)
def test_not_finite(line: str, doomed: bool) -> None:
    assert bool(NOT_FINITE.search(line)) == doomed


# --- the terminal, signals, clocks


def test_ctrl_c_twice(project: Project, tmp_path: Path) -> None:
    """The second must not break into the clearing up of the first."""
    ready = tmp_path / "ready"
    (tmp_path / "head.py").write_text(f"import time; open({str(ready)!r}, 'w'); time.sleep(1000)\n")
    driver = project.start(TRAIN, "--no-isolation")
    wait_for(ready.exists)
    for signum in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        driver.send_signal(signum)
        time.sleep(0.03)
    assert driver.wait(timeout=30) == 130
    project.check()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away(project: Project, ignored: bool) -> None:
    """The driver clears up and ends; under nohup it goes on, though nobody can see it."""
    ours, theirs = os.openpty()
    agent = f"while [ ! -e ../../../../go ]; do sleep 0.05; done; {NEXT}"
    command = project.command("--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=2")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        driver = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=project.root,
            env=project.env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(theirs)
    wait_for((project.root / "runs/t/0001/prompt-0.md").exists)
    os.close(ours)
    time.sleep(0.2)
    (project.root.parent / "go").touch()
    assert driver.wait(timeout=30) == (0 if ignored else 130)
    assert len(project.rows()) == (3 if ignored else 1)
    project.check()


JUMP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, ts);
    char *jump = getenv("JUMP"), *when = getenv("JUMP_WHEN");
    if (clock == CLOCK_REALTIME && jump && !access(when, F_OK)) ts->tv_sec += atoi(jump);
    return result;
}
"""


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler to make a clock that jumps"
)
@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_clock_that_jumps(impatient: Project, tmp_path: Path, seconds: int) -> None:
    """A day back or forth while the driver waits: it neither waits for a day, nor is anything out of order."""
    (tmp_path / "jump.c").write_text(JUMP)
    library = str(tmp_path / "jump.so")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "jump.c"), "-ldl"], check=True
    )
    when = tmp_path / "when"
    impatient.env.update(LD_PRELOAD=library, JUMP=str(seconds), JUMP_WHEN=str(when))
    agent = once(
        impatient, f"(sleep 0.2; touch {when}) & sleep 0.3; echo '529 Overloaded' >&2; exit 1"
    )
    said = impatient.research(agent, experiments=3, timeout=60)
    assert "waiting until" in said
    assert [row["experiment"] for row in impatient.rows()] == ["0", "1", "2", "3"]
    finished = [experiment(impatient, i).finished for i in range(4)]
    assert finished == sorted(finished)
    impatient.check()


# --- the disk, the data, the record


def on_a_small_disk(project: Project, agent: str, meanwhile: str) -> str:
    """Run five experiments on a disk of 100 MB while a script happens to it; the project is what that leaves."""
    project.pace(min_free=20_000_000)
    folder = project.root.parent
    script = f"""
        mkdir {folder}/disk; mount -t tmpfs -o size=100m none {folder}/disk || exit 99
        cp -a {project.root} {folder}/disk/; cd {folder}/disk/project
        "$@" > {folder}/said 2>&1 & driver=$!
        {meanwhile}
        wait $driver; code=$?
        rm -rf {project.root}; cp -a {folder}/disk/project {project.root}; exit $code
    """
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    command = project.command("--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=5")
    done = subprocess.run([*inside, *command], env=project.env, cwd=project.root, timeout=100)
    said = (folder / "said").read_text()
    assert done.returncode == 0, said
    return said


def rows_that(count: int) -> str:
    return (
        f'until [ "$(cat results.tsv 2> /dev/null | wc -l)" -ge {count + 2} ]; do sleep 0.02; done'
    )


@needs_namespaces
@pytest.mark.parametrize("who", ["agent", "training"])
def test_a_process_that_fills_the_disk(impatient: Project, who: str) -> None:
    fill = "head -c 90M /dev/zero > big; sleep 100"
    (impatient.root.parent / "head.py").write_text(f"import os; os.system({fill!r})\n")
    head = f"cat {impatient.root.parent}/head.py train.py > x; mv x train.py; echo fill"
    said = on_a_small_disk(impatient, once(impatient, fill if who == "agent" else head), "")
    full = "since the disk was full: " if who == "training" else "changed more than train.py: big"
    assert full in said
    assert [row["experiment"] for row in impatient.rows()] == ["0", "1", "2", "3", "4", "5"]
    impatient.research(NEXT)
    impatient.check()


@needs_namespaces
@pytest.mark.parametrize(
    ("happens", "words"),
    [
        ("fallocate -l 90M ../other; sleep 2; rm ../other", "MB are free on the disk of"),
        (
            "until mount -o remount,ro .. 2> /dev/null; do :; done; sleep 2; mount -o remount,rw ..",
            "ead-only file system",
        ),
    ],
)
def test_a_disk_that_is_full_or_read_only_for_a_while(
    impatient: Project, happens: str, words: str
) -> None:
    """What was recorded is there, what was not happens later; the driver waits."""
    said = on_a_small_disk(impatient, f"sleep 0.3; {NEXT}", f"{rows_that(1)}; {happens}")
    assert "waiting until" in said and words in said
    assert [row["experiment"] for row in impatient.rows()] == ["0", "1", "2", "3", "4", "5"]
    impatient.research(NEXT)
    impatient.check()


@pytest.mark.parametrize("gone", [False, True])
def test_a_data_file_that_goes_missing(impatient: Project, gone: bool) -> None:
    """It is made again before the next run, which is not to blame; while it cannot be made, the driver waits."""
    data, refuse = (
        Path(impatient.env["HOME"]) / "cache/quick/val.bin",
        impatient.root.parent / "refuse",
    )
    make = f"""
import os
if sys.argv[1:] != ["--judge"] and not os.path.exists({str(data)!r}):
    if os.path.exists({str(refuse)!r}):
        os.remove({str(refuse)!r})
        sys.exit("error: no text to be had")
    os.makedirs({str(data.parent)!r}, exist_ok=True)
    open({str(data)!r}, "w").close()
"""
    impatient.write("prepare.py", QUICK_PREPARE.replace("if sys", make + "if sys", 1))
    train = (impatient.root / "train.py").read_text()
    impatient.write("train.py", train + f"open({str(data)!r})\n")
    impatient.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "data")
    said = impatient.research(
        once(impatient, f"rm {data}; {'touch ' + str(refuse) if gone else 'true'}; {NEXT}"), 3
    )
    assert ("waiting until" in said) == gone
    assert [row["status"] for row in impatient.rows()] == ["keep", "discard", "discard", "discard"]
    impatient.check()


def test_data_that_somebody_merely_touched(project: Project) -> None:
    """`setup` looks at it once more, and nobody is to blame."""
    data = Path(project.env["HOME"]) / "cache/quick/val.bin"
    data.parent.mkdir(parents=True)
    data.touch()
    said = project.research(once(project, f"touch {data}; {NEXT}", number=1), experiments=2)
    assert "trouble" not in said
    assert [row["status"] for row in project.rows()] == ["keep", "discard", "discard"]


@pytest.mark.parametrize("put", ["mkfifo $l", "mkdir $l", "ln -s /dev/zero $l"])
def test_a_log_that_is_no_file_any_more(impatient: Project, put: str) -> None:
    """The limit holds, and what is read is not what somebody put there."""
    script = impatient.root.parent / "put.sh"
    script.write_text(f"l=$(readlink /proc/self/fd/1); rm $l; {put}; sleep 100\n")
    (impatient.root.parent / "head.py").write_text(f"import os; os.system('sh {script}')\n")
    replace(impatient, options=("--no-isolation",)).research(TRAIN, timeout=60)
    assert (experiment(impatient, 1).crash or "").startswith("killed")


@pytest.mark.parametrize("config", ["home/.gitconfig", "project/.git/config"])
def test_a_git_that_fails_loses_nothing(project: Project, config: str) -> None:
    """Every ref looks broken to a git that cannot read its own configuration."""
    project.research(NEXT, experiments=2)
    refs, table = project.git("for-each-ref"), (project.root / "results.tsv").read_bytes()
    path = project.root.parent / config
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + b"[user\n")
    project.research(NEXT, code=1)
    path.write_bytes(before)
    assert project.git("for-each-ref") == refs
    project.research(NEXT)
    assert (project.root / "results.tsv").read_bytes().startswith(table)
    project.check()


def test_another_tag_that_a_person_removed_stays_removed(project: Project) -> None:
    project.research(NEXT, tag="old")
    for ref in project.git(
        "for-each-ref", "--format=%(refname)", "refs/autoresearch/old"
    ).splitlines():
        project.git("update-ref", "-d", ref)
    project.research(NEXT)
    assert [row["tag"] for row in project.rows()] == ["t", "t"]
    assert "old" in next(project.root.glob("results.tsv.*.bak")).read_text()


def test_a_mistake_of_the_driver_does_not_end_the_night(impatient: Project) -> None:
    head = "    if edit.reply.cut_short and"
    impatient.patch(
        "loop.py", head, "    assert edit.reply.description != 'odd', 'not foreseen'\n" + head
    )
    said = impatient.research(once(impatient, "echo odd"), experiments=2)
    assert "AssertionError: not foreseen (in loop.py:" in said
    assert [row["description"] for row in impatient.rows()] == ["baseline", "go on", "go on"]
    impatient.check()


# --- the GPU


def fake_gpu(project: Project) -> Path:
    """An nvidia-smi that tells of a GPU whose use is the content of a file, for as many questions as another says."""
    folder = project.root.parent / "gpu"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"""#!/bin/sh
cd {folder}
case "$*" in
--list-gpus) echo "GPU 0: A GPU (UUID: GPU-1)";;
*--loop*) while :; do cat clocks; sleep 0.1; done;;
*compute-apps*)
    left=$(cat left 2> /dev/null || echo 0)
    if [ $left -gt 0 ]; then echo $((left - 1)) > left; cat apps; else echo 100 > used; fi;;
*memory.used*) cat used;;
*) echo "A GPU, 570.1, GPU-1";;
esac
""")
    (folder / "nvidia-smi").chmod(0o755)
    (folder / "used").write_text("100")
    (folder / "apps").write_text("")
    (folder / "clocks").write_text("")
    project.env["PATH"] = f"{folder}:{project.env['PATH']}"
    project.pace(gpu_release=0.1)
    return folder


def test_a_gpu_in_use_is_named_with_its_process(impatient: Project) -> None:
    gpu = fake_gpu(impatient)
    (gpu / "left").write_text("100")
    (gpu / "apps").write_text("4711, /usr/bin/python3, 5120\n4712, Xorg, [N/A]\n")
    said = impatient.loop("--tag=t", "--arena=python", f"--agent={NEXT}", code=1)
    assert (
        "A GPU is in use by process 4711 (/usr/bin/python3, 5120 MiB), process 4712 (Xorg, [N/A] MiB)"
        in said
    )
    assert "--gpu N" in said


@pytest.mark.parametrize(
    ("apps", "used", "words"),
    [
        ("4711, python3, 5120", "5220", "in use by process 4711 (python3, 5120 MiB)"),
        ("", "7100", "7000 MiB of A GPU are held by no process"),
    ],
)
def test_the_gpu_must_be_free_before_the_next_run(
    impatient: Project, apps: str, used: str, words: str
) -> None:
    gpu = fake_gpu(impatient)
    busy = f"echo '{apps}' > {gpu}/apps; echo {used} > {gpu}/used; echo 4 > {gpu}/left"
    said = impatient.loop(
        "--tag=t",
        "--arena=python",
        f"--agent={once(impatient, f'{busy}; {NEXT}')}",
        "--experiments=3",
    )
    waiting = said.index("waiting until")
    assert words in said and said.index("0002 asking") < waiting < said.index("0002 running")
    assert len(impatient.rows()) == 4


@pytest.mark.parametrize(
    ("clocks", "facts"),
    [
        (
            "1755, 640.5, 60, 0x0000000000000004\n1200, 410.5, 80, 0x0000000000000044\n",
            (1477.5, 525.5, 70.0, 50.0),
        ),
        ("2400, [N/A], [N/A], [N/A]\n", (2400, None, None, None)),
        (
            'Field "clocks_event_reasons.active" is not a valid field to query.\n',
            (None, None, None, None),
        ),
    ],
)
def test_clocks_are_recorded(
    project: Project, clocks: str, facts: tuple[float | None, ...]
) -> None:
    """The usual clock and power, and how much of a run heat slowed; 0x4 is the card's usual limit of power."""
    gpu = fake_gpu(project)
    (gpu / "clocks").write_text(clocks)
    project.loop("--tag=t", "--arena=python", "--agent=true", "--experiments=0")
    found = experiment(project, 0)
    assert found.facts.get("void_runs", 0.0) == (1.0 if facts[-1] else 0.0)  # it ran again, once
    got = map(found.facts.get, ("gpu_mhz", "gpu_watts", "gpu_celsius", "gpu_slowed_percent"))
    for value, fact in zip(got, facts, strict=True):
        assert value == fact if fact is None else value == pytest.approx(fact, rel=0.2)
    project.check()


def test_two_drivers_on_one_device(project: Project, tmp_path: Path) -> None:
    """Of two tags: their numbers would spoil each other."""
    ready = tmp_path / "ready"
    driver = project.start(f"touch {ready}; sleep 1000")
    try:
        wait_for(ready.exists)
        said = project.research(NEXT, code=1, tag="other")
        assert f"the CPU is taken by process {driver.pid} on " in said and "run t" in said
        assert (
            not (project.root / "runs/other/tree").exists()
            and project.git("branch", "--list", "*other") == ""
        )
    finally:
        driver.terminate()
        assert driver.wait(timeout=30) == 130


# --- isolation


LOOK = """
import os, resource, socket, sys
def reach(port):
    try:
        return socket.create_connection(("127.0.0.1", port), 1) and "reached"
    except OSError:
        return "no"
own = socket.create_server(("127.0.0.1", 0))
keys = sorted(name for name in os.environ if "SECRET" in name or "KEY" in name or name == "ODD")
print("error:", keys, reach(PORT), reach(own.getsockname()[1]), "stdin", len(sys.stdin.read()), "cores", resource.getrlimit(resource.RLIMIT_CORE)[0],
      "pids", os.getpid() < 10 and sum(name.isdigit() for name in os.listdir("/proc")) < 10)
sys.exit(1)
"""


@needs_namespaces
@pytest.mark.parametrize("isolated", [True, False])
def test_isolation(project: Project, isolated: bool) -> None:
    """No keys, no network but its own loopback, nothing to read, no core dumps, no sight of other processes; unless a person says so."""
    project.env.update(ANTHROPIC_API_KEY="k", TORCH_SECRET="s", ODD="o")
    with socket.create_server(("127.0.0.1", 0)) as server:
        (project.root.parent / "head.py").write_text(
            LOOK.replace("PORT", str(server.getsockname()[1]))
        )
        args = ("--tag=t", "--arena=demo", f"--agent={TRAIN}", "--experiments=1")
        said = project.loop(*args, *(() if isolated else ("--no-isolation",)))
    crash = experiment(project, 1).crash
    if isolated:
        assert crash == "[] no reached stdin 0 cores 0 pids True" and "runs without network" in said
    else:
        assert (
            crash
            == "['ANTHROPIC_API_KEY', 'ODD', 'TORCH_SECRET'] reached reached stdin 0 cores 0 pids False"
        )
        assert "runs WITH the network" in said and "(--no-isolation)" in said
    project.check()


def test_where_the_kernel_allows_no_namespaces(project: Project) -> None:
    """It is said, with the kernel's reason, and the environment is cut down all the same."""
    fakes = project.root.parent / "fakes"
    fakes.mkdir()
    (fakes / "unshare").write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2; exit 1\n"
    )
    (fakes / "unshare").chmod(0o755)
    project.env.update(PATH=f"{fakes}:{project.env['PATH']}", API_KEY="k")
    (project.root.parent / "head.py").write_text(
        "import os; assert 'API_KEY' not in os.environ, 'seen'\n"
    )
    said = project.research(TRAIN)
    assert "runs without network (no user namespaces: a run sees your other processes" in said
    assert not experiment(project, 1).crash


def test_temporary_files_are_gone(project: Project) -> None:
    (project.root.parent / "head.py").write_text("import tempfile; print(tempfile.mkstemp()[1])\n")
    project.research(TRAIN)
    path = Path((project.root / "runs/t/0001/run.log").read_text().splitlines()[0])
    assert path.is_relative_to(project.root / "runs/t/0001/tmp") and not path.exists()


@needs_namespaces
def test_as_process_1_of_a_container_it_kills_nothing_foreign(project: Project) -> None:
    """A process that was there before the driver, and is a child of it, outlives calls and runs."""
    alive = project.root.parent / "alive"
    agent = f"kill -0 2 && touch {alive}-$AUTORESEARCH_EXPERIMENT; "
    agent += "echo \"X = '$AUTORESEARCH_EXPERIMENT'\" >> train.py; echo idea"
    command = project.command(
        "--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=2", "--no-isolation"
    )
    container = [
        "unshare",
        "--user",
        "--map-current-user",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
    ]
    done = subprocess.run(
        [*container, 'sleep 100 & exec "$@"', "sh", *command],
        cwd=project.root, env=project.env, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in sorted(project.root.parent.glob("alive-*"))] == [
        "alive-0001",
        "alive-0002",
    ]
