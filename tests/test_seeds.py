"""Two seeds for a keep, by the real driver: what runs twice, what is recorded, a kill in the second run, a new seed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

from conftest import Project, experiment, wait_for

# The same idea scores otherwise with each seed, and tells which it had
SEEDED = """\
seed = int(os.environ["AUTORESEARCH_SEED"])
VAL_BPB += 0.1 * (seed - 42)
with open(os.environ["TMPDIR"] + "/../seeds", "a") as file:
    file.write(f"{seed} ")
"""
SLOW = """\
if seed == 43 and VAL_BPB < 1.1:
    open(os.environ["HOME"] + "/second", "w")
    __import__("time").sleep(30)
"""
AGENT = """
case $AUTORESEARCH_EXPERIMENT in
0001) n=0.9;; 0002) n=0.95;; *) n=1.$AUTORESEARCH_EXPERIMENT;;
esac
sed -i "s/^VAL_BPB = [0-9.]*/VAL_BPB = $n/" train.py; echo idea $n
"""


def two_seeds(project: Project, more: str = "") -> Project:
    project.patch("pyproject.toml", "seeds = 1 ", "seeds = 2 ")
    project.patch("train.py", "import os\n", "import os\n" + SEEDED + more)
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "two seeds")
    return replace(project, options=("--no-isolation",))  # to write down the seeds


def seeds(project: Project, number: int) -> str:
    return (project.root / f"runs/t/{number:04d}/seeds").read_text().strip()


def test_what_gains_runs_twice(project: Project) -> None:
    project = two_seeds(project)
    project.research(AGENT, experiments=2)
    assert [seeds(project, n) for n in range(3)] == ["42 43", "42 43", "42"]
    assert [row["status"] for row in project.rows()] == ["keep", "keep", "discard"]
    assert [row["val_bpb"] for row in project.rows()] == ["1.000000", "0.900000", "0.950000"]
    kept, worse = experiment(project, 1), experiment(project, 2)
    assert kept.scores == {42: 0.9, 43: 1.0} and kept.incumbent == 1.05
    assert worse.scores == {42: 0.95} and worse.incumbent == 0.9
    assert "Score-43: 1.000000" in project.git(
        "log", "-1", "--format=%B", "refs/autoresearch/t/0001"
    )
    prompt = project.loop("prompt", "--tag=t")
    assert "1 keep 0.900000 (-0.100000): idea 0.9" in prompt and "mean of 2 runs" in prompt
    project.check()


def test_killed_in_the_second_run(project: Project) -> None:
    """It has not happened: the next driver asks again, and nothing is there twice."""
    project = two_seeds(project, SLOW)
    driver = project.start(AGENT, experiments=1)
    wait_for((Path(project.env["HOME"]) / "second").exists)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert [row["status"] for row in project.rows()] == ["keep"]
    project.research("sed -i 's/^VAL_BPB = .*/VAL_BPB = 1.5/' train.py; echo worse")
    assert [row["status"] for row in project.rows()] == ["keep", "discard"]
    project.check()


def test_the_incumbent_runs_again(project: Project) -> None:
    """After fifteen experiments without a keep, with a seed of its own, which is the first from then on."""
    project = two_seeds(project)
    worse = 'sed -i "s/^VAL_BPB = .*/VAL_BPB = 1.$AUTORESEARCH_EXPERIMENT/" train.py; echo worse'
    said = project.research(worse, experiments=16)
    again, last = experiment(project, 16), experiment(project, 17)
    assert again.description == "the incumbent again, with seed 44" and again.verdict == "keep"
    assert [*again.scores.items()] == [(44, 1.2), (42, 1.0)] and again.gain is None
    assert seeds(project, 16) == "44" and seeds(project, 17) == "44" and last.seed == 44
    assert "16 experiments done" in said
    project.check()


def test_audit(project: Project) -> None:
    project = two_seeds(project)
    project.research(AGENT, experiments=1)
    said = project.loop("audit", "--tag=t", "--audit=2")
    assert "0 experiments done; the audit finds a gain of 0.1 ± " in said
    ran = [
        (project.root / f"runs/t/audit/{name}").read_text().split()
        for name in ("seeds", "rival/seeds")
    ]
    assert ran == [["44", "45"], ["44", "45"]]
    assert len(project.rows()) == 2
    project.loop("report", "--tag=t")
    page = (project.root / "runs/t/report.html").read_text()
    assert (
        "gain, run again with new seeds" in page and "A gain of 0.1 is claimed; run again" in page
    )
    project.research("true", experiments=0, tag="u")
    assert "nothing was kept beside the baseline" in project.loop("audit", "--tag=u", code=1)
    assert "no experiments yet" in project.loop("audit", "--tag=never", code=1)
