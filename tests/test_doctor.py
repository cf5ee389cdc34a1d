"""What the doctor says of a machine: each finding by really breaking that one thing."""

import socket
from pathlib import Path

import pytest
from conftest import ROOT, Project, wait_for
from test_bad_input import without_gpu

GPU = "A GPU, 570.1, GPU-1"


def findings(project: Project, *args: str, code: int) -> dict[str, str]:
    """The first line of each finding, by its name: its state and what is said, as far as it fits."""
    project.env["COLUMNS"] = "400"
    lines = project.loop("doctor", *args, code=code).splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in reversed(lines)}


def fake_smi(
    project: Project,
    cap: str = "9.0",
    memory: str = "81559",
    apps: str = "",
    gpus: str = "GPU 0: A GPU (UUID: GPU-1)",
) -> None:
    folder = project.root.parent / "smi"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"""#!/bin/sh
case "$*" in
--list-gpus) echo "{gpus}";;
*--id=MIG*) echo "No devices were found"; exit 6;;
*compute_cap*) echo "{cap}";;
*memory.total*) echo "{memory}";;
*compute-apps*) printf '{apps}';;
*memory.used*) echo 100;;
*) echo "{GPU}";;
esac
""")
    (folder / "nvidia-smi").chmod(0o755)
    project.env["PATH"] = f"{folder}:{project.env['PATH']}"


def test_all_is_well_for_the_demo(project: Project) -> None:
    found = findings(project, "--demo", code=0)
    first = ["git", "task", "agent", "login", "GPU", "run", "measure"]
    names = [*first, "torch", "isolation", "disk", "memory", "data"]
    assert list(found) == names[::-1]
    assert all(said.startswith(("ok", "warn")) for said in found.values())
    assert "the run would be demo" in found["git"] and not (project.root / "runs").exists()


def test_what_is_missing(project: Project) -> None:
    """No GPU, no agent, an edit that is not committed, and no way to the data."""
    project.env["PATH"] = without_gpu(project)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    project.env["HF_ENDPOINT"] = f"http://127.0.0.1:{port}"  # where nobody listens now
    with (project.root / "train.py").open("a") as file:
        file.write("# mine\n")
    found = findings(project, code=1)
    assert "fail train.py has changes that are not committed: `git commit` or" in found["git"]
    assert "fail no NVIDIA GPU found" in found["GPU"] and "try --demo" in found["GPU"]
    assert "HF_ENDPOINT names a mirror" in found["data"] and found["data"].startswith("fail")
    assert found["agent"].startswith("fail no coding agent is installed")


@pytest.mark.parametrize(
    ("smi", "state", "words"),
    [
        ({}, "ok", "A GPU, driver 570.1, compute capability 9.0, 81559 MB"),
        ({"cap": "7.5"}, "fail", "has compute capability 7.5, and train.py needs 8"),
        ({"memory": "6144"}, "warn", "--arena tinystories"),
        (
            {"memory": "[N/A]", "cap": "12.1"},
            "ok",
            "A GPU, driver 570.1, compute capability 12.1, memory not reported",
        ),
    ],
)
def test_a_gpu(project: Project, smi: dict[str, str], state: str, words: str) -> None:
    fake_smi(project, **smi)
    found = findings(project, "--arena=python", "--agent=true", code=1)  # since torch cannot use it
    assert found["GPU"].startswith(state) and words in found["GPU"]
    assert (
        found["torch"].startswith("fail")
        and "uv pip install torch --torch-backend=auto" in found["torch"]
    )


SLICED = """GPU 0: A GPU (UUID: GPU-0)
GPU 1: A GPU (UUID: GPU-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-a)
  MIG 1g.10gb     Device  1: (UUID: MIG-b)"""


@pytest.mark.parametrize(
    ("visible", "name"),
    [("", "A GPU MIG 3g.40gb"), ("GPU-1", "A GPU MIG 3g.40gb"), ("MIG-b", "A GPU MIG 1g.10gb")],
)
def test_a_slice_of_a_gpu(project: Project, visible: str, name: str) -> None:
    """Asked about by its card, since nvidia-smi knows no other; whoever uses the other slices is not in the way."""
    fake_smi(project, gpus=SLICED, apps="4711, python3, 5120\\n")
    if visible:
        project.env["CUDA_VISIBLE_DEVICES"] = visible
    found = findings(project, "--arena=python", "--agent=true", code=1)
    assert found["GPU"] == f"ok {name}, driver 570.1, compute capability 9.0, memory not reported"


def test_an_old_gpu_is_told_before_a_download(project: Project) -> None:
    fake_smi(project, cap="7.5")
    said = project.loop("--tag=t", "--arena=python", "--agent=true", code=1)
    assert (
        "needs 8 (Ampere, 2020) or newer: take another GPU with --gpu N" in said
        and "preparing" not in said
    )


def test_a_gpu_in_use(project: Project) -> None:
    fake_smi(project, apps="4711, python3, 5120\\n")
    project.pace(gpu_release=0.1)
    said = project.loop("doctor", "--arena=python", "--agent=true", code=1)
    assert "in use by process 4711 (python3," in " ".join(said.split())


@pytest.mark.parametrize(
    ("code", "state"), [(0, "ok claude says"), (1, "fail claude is not logged in: `claude auth")]
)
def test_login(project: Project, code: int, state: str) -> None:
    """The CLI's own answer, by its exit code; tests/test_clients.py asks the real one."""
    fakes = project.root.parent / "fakes"
    fakes.mkdir()
    (fakes / "claude").write_text(f'#!/bin/sh\n[ "$*" = "auth status" ] && exit {code}\n')
    (fakes / "claude").chmod(0o755)
    project.env["PATH"] = f"{fakes}:{project.env['PATH']}"
    found = findings(project, "--arena=demo", "--agent=claude", code=code)
    assert found["login"].startswith(state)


def test_what_another_driver_holds(project: Project) -> None:
    ready = project.root.parent / "ready"
    driver = project.start(f"touch {ready}; sleep 1000")
    try:
        wait_for(ready.exists)
        found = findings(project, "--demo", code=1)
        assert "fail the CPU is taken by process" in found["GPU"] and "run t" in found["GPU"]
        found = findings(project, "--demo", "--tag=t", code=1)
        assert "fail the run t is taken by process" in found["git"]
    finally:
        driver.terminate()
        driver.wait()


def test_a_run_that_would_not_go_on(project: Project) -> None:
    project.research("echo 'X = 1' >> train.py")
    project.env["AUTORESEARCH_SEED"] = "7"
    assert (
        "t ran with seed 42, and this is 7" in findings(project, "--demo", "--tag=t", code=1)["run"]
    )


def test_an_unknown_arena_and_a_broken_manifest(project: Project) -> None:
    project.write("prepare.py", (ROOT / "prepare.py").read_text())
    project.git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "the real one")
    fake_smi(project)
    found = findings(project, "--arena=tinystory", "--agent=true", code=1)
    assert "unknown arena 'tinystory': one of climbmix, tinystories, python, demo" in found["data"]
    manifest = Path(project.env["HOME"]) / ".cache/autoresearch/demo/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("")
    found = findings(project, "--demo", code=1)
    assert "is damaged: a start makes the arena again" in found["data"] and found[
        "agent"
    ].startswith("ok")


def test_a_cache_that_cannot_be_written(project: Project) -> None:
    project.env["AUTORESEARCH_CACHE"] = "/proc/nowhere"
    found = findings(project, "--demo", code=1)
    assert (
        "fail cannot write /proc/nowhere: " in found["GPU"]
        and "AUTORESEARCH_CACHE moves" in found["GPU"]
    )
