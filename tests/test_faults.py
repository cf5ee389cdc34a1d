"""What agents and trainings do to a night, each really done: contained, recorded, and the next experiment runs."""

import os
import subprocess

import pytest
from conftest import Project

NEXT = """echo "NEXT = '$AUTORESEARCH_EXPERIMENT'" >> train.py; echo go on"""
DEEP = 'python3 -c \'import os\nfor _ in range(3000): os.mkdir("d"); os.chdir("d")\''
FAULTS = {
    "hang": "trap '' INT TERM HUP; while :; do sleep 0.1; done",
    "fork": "for i in 1 2 3; do (trap '' TERM; sleep 998 & sleep 998) & done; sleep 998",
    "daemonize": "setsid sh -c 'setsid env -i sleep 998 & sleep 998' & setsid sleep 998; sleep 998",
    "flood": "yes",
    "write into .git": "g=$(git rev-parse --git-common-dir) || exit; for f in config HEAD; do echo junk > $g/$f; done;"
    "mkdir -p $g/hooks; printf '#!/bin/sh\nexit 1' > $g/hooks/reference-transaction; chmod +x $g/hooks/*",
    "make git bare": "git config core.bare true; git config core.worktree /nowhere",
    "commit": "echo x > new; git add -A; git -c user.name=a -c user.email=a@b commit -qm mine; git tag mine",
    "delete the worktree": 'cd /; rm -rf "$OLDPWD"',
    "delete the run's folder": 'cd /; rm -rf "$OLDPWD/.."',
    "delete the experiment's folder": "rm -rf ../0001 ../tmp",
    "delete the branch": "git checkout -q --detach; git branch -q -D autoresearch/t; git branch -q autoresearch/t/x",
    "take the branch's name": "git checkout -q --detach; git branch -q -D autoresearch/t; git branch -q autoresearch",
    "break the branch": "echo junk > $(git rev-parse --git-common-dir || echo .)/refs/heads/autoresearch/t",
    "huge files": "truncate -s 1T prepare.py; truncate -s 1T new; truncate -s 1T train.py",
    "unreadable files": "mkdir -p a/b; touch a/b/c; chmod 000 a/b/c a/b a prepare.py; chmod 000 .",
    "deep folders": DEEP,
    "odd names": "touch \"$(printf 'a\\nb\\tc\\377')\" ' ' '\"'; mkfifo pipe; ln -s / root; ln -s loop loop",
}


@pytest.mark.parametrize("who", ["agent", "training"])
@pytest.mark.parametrize("fault", FAULTS)
def test_contained(impatient: Project, fault: str, who: str) -> None:
    project = impatient
    script = project.root.parent / "fault.sh"
    nap = f"sleep 998.{os.getpid()}"  # not that of another test run
    script.write_text(FAULTS[fault].replace("sleep 998", nap) + "\n")
    head = f"import os; os.system('sh {script}')"
    misbehave = f". {script}" if who == "agent" else f'sed -i "1i {head}" train.py; echo misbehave'
    agent = f"if [ ! -e {script}.done ]; then touch {script}.done; {misbehave}; exit; fi; {NEXT}"
    args = ("--tag=t", "--arena=demo", f"--agent={agent}", "--experiments=2", "--agent-timeout=2")
    project.loop(*args)
    assert [row["description"] for row in project.rows()][-1] == "go on"
    assert subprocess.run(["pgrep", "-f", nap], capture_output=True).returncode == 1
    project.research(
        NEXT.replace("$A", "again $A")
    )  # and a driver that starts afterwards finds everything in order
    project.check()
    for log in (project.root / "runs/t").glob("0*/*"):
        assert log.stat().st_size <= 64_000_000
