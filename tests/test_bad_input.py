"""What a person can get wrong: one line that names the cure, exit code 2 or 1, and nothing done."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import QUICK_TRAIN, Project

COMMIT = (
    "-c",
    "user.name=a",
    "-c",
    "user.email=a@b",
    "commit",
    "--quiet",
    "--all",
    "--message=change",
)


def one_line(said: str) -> str:
    (line,) = [
        line for line in said.splitlines() if not line[:2].isdecimal()
    ]  # events start with the time
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--agent=true", "--tag=a b"], 2, "cannot be part of a branch's name"),
        (["--agent=true", "--tag=../x"], 2, "cannot be part of a branch's name"),
        (["--agent=true", "--tag=x.lock"], 2, "cannot be part of a branch's name"),
        (
            ["--agent=no-such-agent --fast"],
            2,
            "unknown agent 'no-such-agent --fast': give one of claude, ",
        ),
        (["--agent="], 2, "unknown agent"),
        (["--agent=codex"], 2, "codex is not on the PATH: npm install -g @openai/codex"),
        (
            ["--agent=true", "--model=m"],
            2,
            "--model is for the agents that have one (claude, codex",
        ),
        ([], 2, "no coding agent is installed (claude, codex"),
        (["--agent=true", "--experiments=-1"], 2, "'-1' is not a whole number, 0 or more"),
        (["--agent=true", "--hours=nan"], 2, "'nan' is not a positive number"),
        (["--agent=true", "--train-timeout=60"], 2, "at least 120"),
        (["--agent=true", "--what"], 2, "unrecognized arguments: --what"),
        (["dance"], 2, "invalid choice: 'dance'"),
        (["status", "--tag=/etc"], 2, "cannot be part of a branch's name"),
        (["status", "--tag=never"], 1, "no experiments yet under refs/autoresearch/never"),
        (["--agent=true"], 1, "no NVIDIA GPU found"),  # before a download is begun
    ],
)
def test_command_line(
    project: Project, args: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.env["PATH"] = without_gpu(project)
    assert words in one_line(project.loop(*args, code=code))


def without_gpu(project: Project) -> str:
    """A PATH without nvidia-smi, so that the test says the same on a machine with a GPU."""
    folder = project.root.parent / "bin"
    folder.mkdir()
    for name in ("git", "true", "sh"):
        found = subprocess.run(
            ["/bin/sh", "-c", f"command -v {name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        (folder / name).symlink_to(found if found.startswith("/") else f"/bin/{name}")
    return str(folder)


def test_unknown_arena(project: Project) -> None:
    """By the real prepare.py, which knows the arenas."""
    (project.root / "prepare.py").write_text(
        (Path(__file__).parent.parent / "prepare.py").read_text()
    )
    project.git(*COMMIT)
    gpu = project.root.parent / "gpu/nvidia-smi"  # as on a machine that has one
    gpu.parent.mkdir()
    gpu.write_text("#!/bin/sh\necho A GPU, 1.0, GPU-1\n")
    gpu.chmod(0o755)
    project.env["PATH"] = f"{gpu.parent}:{project.env['PATH']}"
    said = project.loop("--agent=true", "--arena=moon", code=2)
    assert (
        "unknown arena 'moon': choose one of climbmix, tinystories, python, demo, or a folder"
        in one_line(said)
    )


def test_unwritable_cache(project: Project) -> None:
    (project.root / "prepare.py").write_text(
        (Path(__file__).parent.parent / "prepare.py").read_text()
    )
    project.git(*COMMIT)
    project.env["AUTORESEARCH_CACHE"] = "/proc/nowhere"
    assert "AUTORESEARCH_CACHE moves the cache" in one_line(
        project.loop("--agent=true", "--arena=demo", code=1)
    )


def test_not_a_repository(project: Project) -> None:
    (project.root / ".git").rename(project.root / "git-away")
    assert "git init" in one_line(project.research("true", code=1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_a_repository_of_another_user(project: Project) -> None:
    """Git's own cure, and it works."""
    subprocess.run(["chown", "-R", "nobody", project.root], check=True)
    line = one_line(project.research("true", code=1))
    assert "git init" not in line
    cure = line.split("`")[1]
    assert cure == f"git config --global --add safe.directory {project.root}"
    subprocess.run(cure.split(), env=project.env, check=True)
    project.research("echo 'X = 1' >> train.py; echo idea")
    assert len(project.rows()) == 2


def test_inside_another_repository(project: Project) -> None:
    (project.root / ".git").rename(project.root.parent / ".git")
    assert "git init" in one_line(project.research("true", code=1))


def test_no_commit_yet(project: Project) -> None:
    project.git("update-ref", "-d", "HEAD")
    assert "no commit yet" in one_line(project.research("true", code=1))


@pytest.mark.parametrize("name", ["train.py", "prepare.py"])
def test_uncommitted_edit(project: Project, name: str) -> None:
    with (project.root / name).open("a") as file:
        file.write("# mine\n")
    assert f"{name} has changes that are not committed" in one_line(
        project.research("true", code=1)
    )
    assert (project.root / name).read_text().endswith("# mine\n")


def test_a_commit_of_a_persons_on_the_branch(project: Project) -> None:
    """It is neither lost nor trained: the person is told how to keep it, and the cure works."""
    project.research("date >> notes; false", code=0)
    project.git("switch", "--quiet", "autoresearch/t")
    project.write("train.py", QUICK_TRAIN + "# by hand\n")
    project.git(*COMMIT)
    project.git("switch", "--quiet", "main")
    tip = project.git("rev-parse", "autoresearch/t")
    line = one_line(project.research("true", code=1))
    assert project.git("rev-parse", "autoresearch/t") == tip
    keep, drop = (part.split("`")[0] for part in line.split("`git ")[1:])
    project.git(*keep.split())
    project.git(*drop.split())
    project.research("date >> notes; false")
    assert project.git("rev-parse", "mine") == tip
    project.check()


def test_a_branch_in_the_way(project: Project) -> None:
    project.git("branch", "autoresearch")
    assert "git branch -m autoresearch" in one_line(project.research("true", code=2))


def test_branches_in_the_way(project: Project) -> None:
    project.git("branch", "autoresearch/t/x")
    assert "refs/heads/autoresearch/t/x is in the way" in one_line(project.research("true", code=2))


def test_checkout_on_the_runs_branch(project: Project) -> None:
    project.git("checkout", "--quiet", "-b", "autoresearch/t")
    assert "git switch" in one_line(project.research("true", code=1))


@pytest.mark.parametrize("what", ["arena", "seed"])
def test_what_cannot_be_compared(project: Project, what: str) -> None:
    """A run goes on only under the conditions that it started with."""
    project.research("echo 'X = 1' >> train.py")
    arena = "other" if what == "arena" else "demo"
    project.env["AUTORESEARCH_SEED"] = "7" if what == "seed" else "42"
    if what == "arena":
        text = (project.root / "autoresearch/jobs/gpu.py").read_text()
        project.write("autoresearch/jobs/gpu.py", text.replace("if not needed:", "if True:"))
    said = one_line(project.loop("--tag=t", f"--arena={arena}", "--agent=true", code=1))
    assert f"t ran with {what} " in said and "take another --tag" in said
    # the start that was refused leaves a true word, and the facts of the run
    status = project.loop("status", "--tag=t")
    assert f"stopped: t ran with {what} " in status and "1 s each" in status


def test_a_seed_that_is_none(project: Project) -> None:
    project.env["AUTORESEARCH_SEED"] = "x"
    said = one_line(project.research("true", code=2))
    assert "AUTORESEARCH_SEED: 'x' is not a whole number" in said


def test_train_py_that_does_not_compile(project: Project) -> None:
    project.write("train.py", "def broken(:\n")
    project.git(*COMMIT)
    assert "train.py does not compile: SyntaxError: invalid syntax (line 1)" in one_line(
        project.research("true", code=1)
    )
    assert not (project.root / "runs").exists()


SUMMARY = QUICK_TRAIN[QUICK_TRAIN.index("print") :]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("", "val_bpb was not printed"),
        (QUICK_TRAIN + SUMMARY, "val_bpb was printed 2 times"),
        (SUMMARY.replace("{VAL_BPB:.6f}", "nan"), "val_bpb is not a finite number: nan"),
        (SUMMARY.replace("{VAL_BPB:.6f}", "-inf"), "val_bpb is not a finite number: -inf"),
        (SUMMARY.replace("{VAL_BPB:.6f}", "low"), "val_bpb is not a finite number: low"),
        ("import ctypes; ctypes.string_at(0)", "killed by signal 11"),
        ("import sys; sys.exit(3)", "exit code 3, no output"),
    ],
)
def test_no_summary_to_believe(project: Project, train: str, words: str) -> None:
    project.write("train.py", train + "\n")
    project.git(*COMMIT)
    said = one_line(project.research("true", code=1))
    assert "there is no baseline" in said and words in said
    assert project.git("for-each-ref", "refs/autoresearch") == ""
    assert project.rows() == []
