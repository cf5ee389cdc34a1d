"""
How long the report of a night takes to write, and to load in a browser.

    uv run python -m benchmarks.report_bench                  1,000 experiments
    uv run python -m benchmarks.report_bench --experiments 100

The history is made up, with descriptions, diffs and logs as long as real ones; git really holds it.
"""

import random
import re
import shutil
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from autoresearch.cli import Parser, natural_number
from autoresearch.ideas import Change, Usage
from autoresearch.journal.experiment import Experiment, message
from autoresearch.journal.git import Repo
from autoresearch.journal.journal import read_history
from autoresearch.task import Arena, Machine, read_task
from autoresearch.view import report

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def main() -> None:
    parser = Parser(description="Time the report of a long night.")
    parser.add_argument("--experiments", type=natural_number, default=1000, help="default: 1000")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = make_history(folder, options.experiments)
        start = time.perf_counter()
        history = read_history(checkout, "t")
        read = time.perf_counter() - start
        picture, page = report.write_report(checkout, read_task(ROOT), history, folder / "runs/t")
        written = time.perf_counter() - start
        print(
            f"{len(history)} experiments: read from git in {read:.2f} s, report written in {written:.2f} s"
        )
        print(
            f"report.html {page.stat().st_size / 1e6:.1f} MB, progress.png {picture.stat().st_size / 1e3:.0f} kB"
        )
        if chromium := shutil.which("chromium"):
            print("loaded in", ", ".join(f"{load(chromium, page):.2f} s" for _ in range(3)))


def make_history(folder: Path, count: int) -> Repo:
    """A repository with a night's refs, each with its own train.py, and a folder with the logs."""
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    checkout, rng, best = Repo.at(folder), random.Random(0), 1.0
    text = (ROOT / "train.py").read_text().splitlines()
    base = commit_file(checkout, text, "start", None)
    now = datetime(2026, 11, 24, 22, tzinfo=UTC)
    for number in range(count):
        changed = list(text)
        for at in rng.sample(range(len(text)), 6 if number else 0):
            changed[at] += f"  # {rng.random()} <b>"
        kept = number == 0 or rng.random() < 0.05
        score = best - (0.001 if number else 0.0) if kept else best + rng.random() / 50
        e = Experiment(
            number=number, verdict="keep" if kept else "discard",
            description=f"idea {number}: " + "word " * 12, reason="because " * 60,
            scores={42: score}, incumbent=best if number else None, change=Change("DEPTH 6 -> 7", "s", 6, 6),
            facts={"run_seconds": 318, "training_seconds": 300, "sealed_bpb": score, "memory_gb": 40, "steps": 2000},
            repairs=0, agent="claude", usage=Usage(40.0, cost_usd=0.1), seed=42,
            arena=Arena("climbmix", 300.0, "d"), machine=Machine("H200", "600", "2.15"), program="p", tag="t",
            finished=(now + timedelta(seconds=345 * number)).isoformat(),
        )  # fmt: skip
        final = commit_file(checkout, changed, message(e), base)
        checkout.update_refs(f"create refs/autoresearch/t/{number:04d} {final}")
        own = folder / f"runs/t/{number:04d}"
        own.mkdir(parents=True)
        (own / "run.log").write_text(
            "step 1234  50.0%  loss 3.2145  81,200 tok/s  eta 2:30\n" * 200
        )
        if kept:
            best, text, base = score, changed, final
    return checkout


def commit_file(checkout: Repo, lines: list[str], text: str, parent: str | None) -> str:
    blob = checkout.git("hash-object", "-w", "--stdin", stdin="\n".join(lines) + "\n").strip()
    tree = checkout.git("mktree", stdin=f"100644 blob {blob}\ttrain.py\n").strip()
    parents = ("-p", parent) if parent else ()
    return checkout.git("commit-tree", tree, *parents, stdin=text, env=checkout.identity).strip()


def load(chromium: str, page: Path) -> float:
    """Seconds from the start of the navigation to the load event, with all scripts run."""
    timed = page.with_name("timed.html")
    script = "<script>onload = () => { document.body.dataset.ms = performance.now(); }</script>"
    timed.write_text(page.read_text() + script)
    command = [
        chromium,
        *FLAGS,
        f"--user-data-dir={page.parent / 'browser'}",
        "--dump-dom",
        f"file://{timed}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-ms="([\d.]+)"', done.stdout)
    assert found, "the page did not load"
    return float(found[1]) / 1000


if __name__ == "__main__":
    main()
