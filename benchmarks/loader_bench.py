"""
How fast TrainLoader feeds training: tokens a second from one core, and its share of a training step.

    uv run benchmarks/loader_bench.py [--arena python] [--seconds 5]
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--arena", default="python")
parser.add_argument("--seconds", type=float, default=5.0)
options = parser.parse_args()
os.environ["AUTORESEARCH_ARENA"] = options.arena
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import prepare  # noqa: E402

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
prepare.prepare(prepare.ARENA)
prepare.ARENA = replace(prepare.ARENA, budget=options.seconds)
for rows in (2**17 // prepare.ARENA.sequence_len, 2**19 // prepare.ARENA.sequence_len):
    prepare.TrainLoader.started = None  # a clock for each
    loader, start = prepare.TrainLoader(rows, "cpu"), time.perf_counter()
    for _ in loader:
        pass
    speed = loader.tokens / (time.perf_counter() - start)
    print(f"{options.arena}, T {prepare.ARENA.sequence_len}, {rows} rows: {speed / 1e6:.1f}M tokens/s from one core")
