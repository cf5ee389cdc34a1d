"""The driver killed with SIGKILL at every stage, then started again: nothing is lost, nothing is left."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK_TRAIN, Project, needs_namespaces, wait_for

SCORE = "0.$((11000 - 1$AUTORESEARCH_EXPERIMENT))"  # lower each time
BETTER = f'sed -i "s/^VAL_BPB = [0-9.]*/VAL_BPB = {SCORE}/" train.py; echo $AUTORESEARCH_EXPERIMENT'


def kill_when(
    project: Project, agent: str, ready: Path, *args: str, signum: int = signal.SIGKILL
) -> int:
    """Start a driver, signal it alone once a file exists, and return its exit code."""
    driver = project.start(agent, *args)
    wait_for(lambda: ready.exists() or project.left("ready"))
    os.kill(driver.pid, signum)
    return driver.wait(timeout=30)


@pytest.mark.parametrize("stage", ["agent", "training"])
def test_killed_in_the_middle(project: Project, tmp_path: Path, stage: str) -> None:
    """The processes of a half-done experiment die with the driver, isolated or not, and nothing else is left of it."""
    project.research(BETTER, experiments=1)
    before, branch = project.rows(), project.git("rev-parse", "autoresearch/t")
    ready = tmp_path / "ready"
    commit = "git -c user.name=a -c user.email=a@b commit -qam mine"
    nap = "import os, time; open(os.environ['TMPDIR'] + '/ready', 'w'); os.fork() or os.setsid(); time.sleep(1000)"
    agents = {
        "agent": f"echo '# half' >> train.py; {commit}; touch {ready}; setsid sleep 1000 & sleep 1000",
        "training": f'sed -i "1i {nap}" train.py; echo sleepy',
    }
    assert kill_when(project, agents[stage], ready, "--no-isolation") == -signal.SIGKILL
    wait_for(lambda: not project.processes())
    assert project.git("rev-parse", "autoresearch/t") == branch
    project.research(BETTER, experiments=1)
    assert project.rows()[:2] == before
    assert [row["status"] for row in project.rows()] == ["keep", "keep", "keep"]
    project.check()


@needs_namespaces
def test_an_isolated_training_dies_with_its_driver(project: Project, tmp_path: Path) -> None:
    """Also what left its group, its session and its environment behind, and nobody has to start the driver again."""
    ready = tmp_path / "ready"
    hide = f"sh -c '(setsid env -i sleep 999.{os.getpid()} &)'; touch $TMPDIR/ready"
    (tmp_path / "hide.py").write_text(f"import os, time; os.system({hide!r}); time.sleep(1000)\n")
    agent = "cat ../../../../hide.py train.py > x; mv x train.py; echo hide"
    assert kill_when(project, agent, ready) == -signal.SIGKILL
    wait_for(
        lambda: (
            not project.processes()
            and subprocess.run(["pgrep", "-f", f"999.{os.getpid()}"]).returncode
        )
    )
    project.research(BETTER)
    project.check()


def test_locks_of_a_git_that_was_killed(project: Project) -> None:
    """On our refs, and on the indexes of the agent's tree and of a run: nothing waits for them."""
    project.research(BETTER)
    refs, folder = project.root / ".git/refs", project.root / "runs/t"
    program = project.git("rev-parse", "HEAD:program.md").strip()
    (folder / "0002").mkdir()
    for lock in (
        refs / "heads/autoresearch/t.lock",
        refs / "autoresearch/t/0002.lock",
        refs / f"autoresearch-program/{program}.lock",
        folder / "index.lock",
        folder / "0002/index.lock",
    ):
        lock.touch()
    project.research(BETTER)
    assert [row["status"] for row in project.rows()] == ["keep"] * 3
    project.check()


def test_killed_in_the_baseline(project: Project, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    nap = f"import os, time\nif not os.path.exists({str(ready)!r}):\n    open(os.environ['TMPDIR'] + '/ready', 'w'); time.sleep(1000)\n"
    project.write("train.py", nap + QUICK_TRAIN)
    project.git(
        "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "a nap the first time"
    )
    assert kill_when(project, BETTER, ready) == -signal.SIGKILL
    ready.touch()
    project.research(BETTER)
    assert [row["description"] for row in project.rows()] == ["baseline", "0001"]
    project.check()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop(project: Project, tmp_path: Path, signum: int) -> None:
    """Training is stopped, the tree put back, the exit code says interrupted; nothing needs mending."""
    ready = tmp_path / "ready"
    nap = "import os, time; open(os.environ['TMPDIR'] + '/ready', 'w'); time.sleep(1000)"
    agent = f'sed -i "1i {nap}" train.py; echo sleepy'
    assert kill_when(project, agent, ready, signum=signum) == 130
    assert [row["status"] for row in project.rows()] == ["keep"]
    project.check()
    project.research(BETTER)
    project.check()


def test_nohup(project: Project, tmp_path: Path) -> None:
    """A hang-up that the caller chose to ignore stays ignored."""
    go = tmp_path / "go"
    agent = f"while [ ! -e {go} ]; do sleep 0.05; done; echo 'X = 1' >> train.py; echo on"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        driver = project.start(agent)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for((project.root / "runs/t/0001/prompt-0.md").exists)
    driver.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    go.touch()
    assert driver.wait(timeout=30) == 0
    project.check()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("stage", "experiment"),
    [
        ("refs", -1),  # at the start, of the branch
        ("refs", 0),
        ("tree", 1),
        ("agent", 1),
        ("commit", 1),
        ("run", 1),
        ("verdict", 1),
        ("record", 1),
        ("refs", 1),
        ("row", 1),
    ],
)
def test_killed_at_every_stage(project: Project, stage: str, experiment: int, when: str) -> None:
    """What has a ref is finished, and has one row; the rest has not happened, and happens when the driver is back."""
    args = ("--tag=t", "--arena=demo", f"--agent={BETTER}", "--experiments=2", "--no-report")
    command = [
        sys.executable,
        str(Path(__file__).with_name("kill_at.py")),
        stage,
        when,
        str(experiment),
        *args,
    ]
    assert subprocess.run(command, cwd=project.root, env=project.env).returncode == -signal.SIGKILL
    finished = len(project.git("for-each-ref", "refs/autoresearch/t").splitlines())
    recorded = stage == "row" or (
        stage in ("refs", "record") and when == "after" and experiment >= 0
    )
    assert finished == max(experiment, 0) + recorded
    project.research(BETTER, experiments=2 - max(finished - 1, 0))
    kept = [
        (row["experiment"], row["status"], row["val_bpb"], row["description"])
        for row in project.rows()
    ]
    assert kept == [("0", "keep", "1.000000", "baseline")] + [
        (str(i), "keep", f"0.{1000 - i}000", f"{i:04d}") for i in (1, 2)
    ]
    project.check()


def test_killed_at_random(project: Project) -> None:
    """Fifteen kills at random instants of a run; then its history is what an undisturbed run would have."""
    rng = random.Random(0)
    for _ in range(15):
        driver = project.start(BETTER, experiments=9)
        time.sleep(rng.uniform(0.3, 2.5))
        driver.kill()
        driver.wait()
        lines = project.root / "results.tsv"
        if lines.exists() and len(lines.read_text().splitlines()) > 8:
            break
    project.research(BETTER, experiments=1)
    rows = project.rows()
    assert [row["experiment"] for row in rows] == [str(i) for i in range(len(rows))]
    assert [row["description"] for row in rows[1:]] == [f"{i:04d}" for i in range(1, len(rows))]
    assert len(rows) > 3
    project.check()


def test_a_second_driver_is_told_who_holds_the_tag(project: Project, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    driver = project.start(f"touch {ready}; sleep 1000")
    try:
        wait_for(ready.exists)
        said = project.research(BETTER, code=1)
        assert f"process {driver.pid} " in said and "the run t is taken by" in said
        assert f"running, process {driver.pid}" in project.loop("status", "--tag=t")
    finally:
        driver.terminate()
        assert driver.wait(timeout=30) == 130
    project.check()
