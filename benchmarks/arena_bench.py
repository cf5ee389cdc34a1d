"""
What the arena costs: tokenizing on one core and on all, the loader, the evaluation beside a plain pass, the referee.

    uv run benchmarks/arena_bench.py [--arena demo]

The model is train.py's as it stands, fresh.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser()
parser.add_argument("--arena", default="demo")
os.environ["AUTORESEARCH_ARENA"] = parser.parse_args().arena
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402
from gpt import text  # noqa: E402
from prepare import ARENA  # noqa: E402


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def tokenizing(manifest: dict) -> None:
    """The arena's own text, in pieces small enough to be shared out, on one core and on all."""
    text.PIECE = 4_000_000
    path = ARENA.folder / next(
        name for name in manifest["files"] if name.startswith("train-") and "parquet" in name
    )
    pieces, cores = text.cut_parquet(path), os.sched_getaffinity(0)
    size = sum(
        text.size_of(Path(path)) for path in {path for piece in pieces for path in piece.paths}
    )
    took = {}
    for some in ({min(cores)}, cores):
        os.sched_setaffinity(0, some)
        with tempfile.TemporaryDirectory() as folder:
            jobs = {Path(folder) / f"{i}": piece for i, piece in enumerate(pieces)}
            took[len(some)] = seconds(
                lambda jobs=jobs: list(text.tokenize(ARENA.folder / manifest["tokenizer"], jobs))
            )
    speeds = ", ".join(f"{size / s / 1e6:.1f} MB/s of text on {n} cores" for n, s in took.items())
    print(f"tokenizing {len(pieces)} pieces: {speeds}")


def memory(manifest: dict) -> None:
    """Of a tokenizing process, at its peak, for pieces of two sizes: not ru_maxrss, which a child inherits."""
    tokenizer = str(ARENA.folder / manifest["tokenizer"])
    path = ARENA.folder / next(
        name for name in manifest["files"] if name.startswith("train-") and "parquet" in name
    )
    code = "from gpt import text; text.main(); print(open('/proc/self/status').read())"
    for text.PIECE in (4_000_000, 16_000_000):
        piece = text.cut_parquet(path)[0]
        with tempfile.TemporaryDirectory() as folder:
            job = {"tokenizer": tokenizer, "stem": f"{folder}/0", "piece": asdict(piece)}
            command = [sys.executable, "-c", code]
            out = subprocess.run(
                command, cwd=ROOT, input=json.dumps(job), capture_output=True, text=True, check=True
            )
        peak = int(re.findall(r"VmHWM:\s*(\d+)", out.stdout)[0]) / 2**10
        print(f"tokenizing a piece of {text.PIECE / 1e6:.0f} MB: {peak:.0f} MB at its peak")


def loading() -> None:
    """From one core, at two sizes of a batch."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's would fight for the one core
    prepare.ARENA = replace(ARENA, budget=5.0)
    for rows in (2**17 // ARENA.sequence_len, 2**19 // ARENA.sequence_len):
        prepare.CLOCK = prepare.Clock()
        loader = prepare.TrainLoader(rows, "cpu")
        took = seconds(lambda loader=loader: sum(1 for _ in loader))
        print(
            f"loader, {rows} rows of {ARENA.sequence_len}: {loader.tokens / took / 1e6:.1f}M tokens/s from one core"
        )
    prepare.ARENA = ARENA
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)


def evaluating(network: torch.nn.Module, rows: np.ndarray) -> None:
    """The same rows and the same loss, without counting and without probes; by turns, since machines are noisy."""

    @torch.no_grad()
    def plain() -> None:
        nats = torch.zeros((), device=train.DEVICE)
        for start in range(0, len(rows), ARENA.eval_rows):
            batch = torch.from_numpy(rows[start : start + ARENA.eval_rows].astype(np.int64)).to(
                train.DEVICE
            )
            for logits, y in zip(network(batch[:, :-1].contiguous()), batch[:, 1:], strict=True):
                nats += F.cross_entropy(logits.float(), y, reduction="sum")

    def ours() -> None:
        prepare.evaluate(network, rows, torch.device(train.DEVICE))

    took = [(seconds(plain), seconds(ours)) for _ in range(6)][1:]
    ratios = [b / a for a, b in took]
    times = f"plain pass {median(a for a, _ in took):.2f} s, evaluation with probes {median(b for _, b in took):.2f} s"
    print(
        f"{times}; ratio {median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} turns)"
    )


def refereeing(network: torch.nn.Module, rows: np.ndarray) -> None:
    x = torch.from_numpy(rows[: ARENA.eval_rows, :-1].astype(np.int64)).to(train.DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt2"
        exporting = seconds(lambda: prepare.export(network, x, model))
        score, _ = prepare.evaluate(network, rows, torch.device(train.DEVICE))
        told = {"AUTORESEARCH_MODEL": str(model), "AUTORESEARCH_SCORE": str(score)}
        judge = partial(
            subprocess.run,
            [sys.executable, "prepare.py", "--judge"],
            cwd=ROOT,
            env=os.environ | told,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        judging = seconds(judge)
        size = model.stat().st_size / 2**20
    print(
        f"referee: export {exporting:.1f} s ({size:.0f} MB), scoring in a process of its own {judging:.1f} s"
    )


def main() -> None:
    manifest = prepare.prepare(ARENA)
    tokenizing(manifest)
    memory(manifest)
    loading()
    torch.manual_seed(ARENA.seed)
    network, rows = train.compiled(train.GPT().to(train.DEVICE)).eval(), prepare.load_rows("val")
    evaluating(network, rows)
    refereeing(network, rows)


if __name__ == "__main__":
    main()
