"""
What the arena costs: tokenizing on one core and on all, the feeder, the evaluation beside a plain pass, the guard.

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
from dataclasses import asdict
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
from gpt import client, graph, make, text  # noqa: E402
from gpt.tokenizer import Tokenizer  # noqa: E402
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


FEEDER = """
import sys
from dataclasses import replace
import gpt.feed
from gpt.arena import ARENAS, load_manifest
gpt.feed.read_manifest = load_manifest     # its token files serve rows of any length
ARENAS["{0}"] = replace(ARENAS["{0}"], sequence_len=2048, counted=True)
sys.exit(gpt.feed.main())
"""


def feeding() -> None:
    """Rows of 2048 tokens from the feeder, on one core, while we only read."""
    first, *others = sorted(os.sched_getaffinity(0))
    client.FEEDER = [sys.executable, "-c", FEEDER.format(ARENA.name)]
    for rows in (2**17 // 2048, 2**19 // 2048):
        feed = client.Feed()
        os.sched_setaffinity(feed.process.pid, {first})
        os.sched_setaffinity(0, others or {first})
        feed.ask(b"o", rows)
        feed.ask(b"g", 11, send=lambda feed: feed.write(b'{"bytes":0}'))
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < 5:
            feed.ask(b"b")
            steps += 1
        speed = steps * rows * 2048 / (time.perf_counter() - start) / 1e6
        print(f"feeder, {rows} rows of 2048: {speed:.1f}M tokens/s from one core")
        feed.close()
    os.sched_setaffinity(0, {first, *others})


def evaluating(network: torch.nn.Module, rows: np.ndarray, lengths: tuple) -> None:
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
        prepare.evaluate(network, rows, lengths, torch.device(train.DEVICE))

    took = [(seconds(plain), seconds(ours)) for _ in range(6)][1:]
    ratios = [b / a for a, b in took]
    times = f"plain pass {median(a for a, _ in took):.2f} s, evaluation with probes {median(b for _, b in took):.2f} s"
    print(
        f"{times}; ratio {median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} turns)"
    )


def guarding(network: torch.nn.Module, rows: np.ndarray, lengths: tuple) -> None:
    """A model's way out, and its score in a process of its own."""
    x = torch.from_numpy(rows[: ARENA.eval_rows, :-1].astype(np.int64)).to(train.DEVICE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exporting = seconds(lambda: graph.export(network, x))
        again = seconds(lambda: graph.export(network, x))
        exported = graph.export(network, x)
        (folder / "graph.json").write_bytes(exported.text)
        with (folder / "weights.bin").open("wb", buffering=0) as file:
            writing = seconds(lambda: graph.write_tensors(network, exported, file))
        score, _ = prepare.evaluate(network, rows, lengths, torch.device(train.DEVICE))
        told = {"AUTORESEARCH_MODEL": name, "AUTORESEARCH_SCORE": str(score)}
        judge = partial(
            subprocess.run,
            [sys.executable, "prepare.py", "--judge"],
            cwd=ROOT,
            env=os.environ | told,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        judging = seconds(judge)
    print(
        f"graph out {exporting:.2f} s the first time, {again:.2f} s the second; weights out {writing:.2f} s, "
        f"{exported.size / writing / 1e6:.0f} MB/s; scoring in a process of its own {judging:.1f} s"
    )


SHORT = """
import os, sys
from dataclasses import replace
import gpt.feed
from gpt.arena import ARENAS
ARENAS["{0}"] = replace(ARENAS["{0}"], budget=0.1, counted=False)
os.environ["AUTORESEARCH_MODEL"], gpt.feed.LATE = "{1}", 1000
sys.exit(gpt.feed.main())
"""


def leaving() -> None:
    """4 GB of weights, as those of the large cards, through the feeder to a file, and mapped from it."""
    network = torch.nn.Embedding(2_000_000, 1024, dtype=torch.bfloat16)
    network.weight.data.fill_(1.0)
    exported = graph.export(network, torch.zeros(1, 8, dtype=torch.int64))
    with tempfile.TemporaryDirectory() as name:
        client.FEEDER = [sys.executable, "-c", SHORT.format(ARENA.name, name)]
        feed = client.Feed()
        feed.ask(b"o", 1)
        text = exported.text
        feed.ask(b"g", len(text), send=lambda pipe: pipe.write(text))
        while feed.ask(b"b"):
            time.sleep(0.02)
        before = peak_of("self")
        send = partial(graph.write_tensors, network, exported)
        writing = seconds(lambda: feed.ask(b"w", exported.size, send=send))
        more, feeder = peak_of("self") - before, peak_of(feed.process.pid)
        feed.close()
        path = Path(name, "weights.bin")
        mapping = seconds(
            lambda: graph.read_tensors(path, graph.Graph.read(path.with_name("graph.json")))
        )
    print(
        f"{exported.size / 1e9:.1f} GB of weights out in {writing:.1f} s, {more:.0f} MB more memory in the run, "
        f"{feeder:.0f} MB in the feeder; mapped in {mapping:.2f} s"
    )


def peak_of(process: int | str) -> float:
    """The most memory that a process ever had, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1000


def main() -> None:
    manifest = make.prepare(ARENA)
    tokenizing(manifest)
    memory(manifest)
    feeding()
    torch.manual_seed(ARENA.seed)
    network, rows = (
        train.compiled(train.GPT().to(train.DEVICE)).eval(),
        np.load(ARENA.folder / manifest["val"]),
    )
    lengths = Tokenizer.load(ARENA.folder / manifest["tokenizer"]).byte_lengths()
    evaluating(network, rows, lengths)
    guarding(network, rows, lengths)


if __name__ == "__main__":
    main()
