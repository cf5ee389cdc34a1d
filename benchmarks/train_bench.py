"""
train.py as it stands beside `reference`: upstream's published shape and rates, run by our own code.

    uv run benchmarks/train_bench.py                        with a GPU: climbmix, its five minutes each
    uv run benchmarks/train_bench.py --arena python --budget 60 --seeds 42 43
    uv run benchmarks/train_bench.py --try 'MLP_SHIFT=0.0' --try 'DEPTH=9 HEADS=4'

Each column is train.py with some of its constants replaced, run as a process of its own on the same arena and seed,
one after the other. Without a GPU it is the demo arena, and each column gets the same number of tokens instead of the
same time: what is compared is how much it learns. --jobs runs several at a time with one thread each, to screen ideas;
their times then mean nothing.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

# karpathy/autoresearch, train.py as published: 8 layers x 512, no n-gram tables, attention across documents
REFERENCE = {
    "DEPTH": "pick(2, 4, 6, 8, 8, 8)", "HEADS": "pick(2, 2, 3, 4, 4, 4)",
    "BATCH": "pick(2**12, 2**15, 2**16, 2**17, 2**18, 2**19)",
    "MICRO_BATCH": "pick(2**12, 2**13, 2**14, 2**15, 2**17, 2**18)",
    "WINDOWS": "'SSSL'", "SHORT_WINDOW": "0.5", "DOCUMENT_MASK": "False", "MLP_SHIFT": "0.0", "ROPE_BASE": "10000.0",
    "QK_SCALE": "1.0", "SOFTCAP": "15.0", "SOFTCAP_KNEE": "15.0", "NGRAMS": "()", "SKIP_INIT": "0.1",
    "EMBEDDING_LR": "0.6", "HEAD_LR": "0.004", "RESIDUAL_LR": "0.005", "SKIP_LR": "0.5", "MATRIX_LR": "0.04",
    "WEIGHT_DECAY": "0.2", "WARMDOWN": "0.5", "ADAM_WARMDOWN": "0.5", "FINAL_LR": "0.0",
}  # fmt: skip

ROWS = ("val_bpb", "tokens/s", "mfu_percent", "num_steps", "total_tokens_M", "num_params_M", "peak_vram_mb",
        "startup_seconds", "compile_seconds", "training_seconds", "evaluation_seconds", "total_seconds")  # fmt: skip


def with_constants(source: str, constants: dict[str, str]) -> str:
    """The program with some of its constants replaced."""
    for name, value in constants.items():
        source, found = re.subn(rf"^{name}(\s*)= .*$", rf"{name}\1= {value}", source, flags=re.MULTILINE)
        if found != 1:
            raise SystemExit(f"error: train.py has {found} constants {name}")
    return source


def variant(text: str) -> dict[str, str]:
    """The constants of `NAME=VALUE NAME=VALUE`, where no value holds a space."""
    if not all(re.fullmatch(r"[A-Z_0-9]+=\S+", pair) for pair in text.split()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 'NAME=VALUE NAME=VALUE'")
    constants = dict(pair.split("=", 1) for pair in text.split())
    with_constants((ROOT / "train.py").read_text(), constants)
    return constants


def measure(constants: dict[str, str], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Run train.py with these constants and return the figures of its summary block."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "train.py"
        program.write_text(with_constants((ROOT / "train.py").read_text(), constants))
        limits = ["--budget", str(options.budget), "--tokens", str(options.tokens)]
        env = os.environ | {"AUTORESEARCH_ARENA": options.arena, "AUTORESEARCH_SEED": str(seed)}
        if options.jobs > 1:
            env |= {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--run", str(program), *limits], env=env, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{constants} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    block = re.findall(r"^(\w+): +([\d.]+)$", done.stdout.rpartition("---")[2], re.MULTILINE)
    figures = {name: float(value) for name, value in block}
    return figures | {"tokens/s": figures["total_tokens_M"] * 1e6 / figures["training_seconds"]}


def run(program: Path, budget: float, tokens: int) -> None:
    """In a process of its own: train.py for another budget, or for a number of tokens."""
    sys.path.insert(0, str(ROOT))
    import prepare

    class TokenClock(prepare.Clock):
        """Time goes by in tokens, as far as the loader and the schedules know."""

        def elapsed(self) -> float:
            if self.seconds is not None or self.loader is None:
                return super().elapsed()
            return prepare.ARENA.budget * self.loader.tokens / tokens

        def stop(self) -> None:
            if self.seconds is None and self.started is not None:
                self.seconds = time.perf_counter() - self.started
                prepare.ARENA = replace(prepare.ARENA, budget=self.seconds)

    if budget:
        prepare.ARENA = replace(prepare.ARENA, budget=budget)
    if tokens:
        prepare.CLOCK = TokenClock()
    runpy.run_path(str(program), run_name="__main__")


def show(columns: dict[str, list[dict[str, float]]], title: str) -> None:
    """A row for each figure, averaged over the seeds, and how the later columns compare with the first."""
    table, first = Table(title=title, title_justify="left"), next(iter(columns))
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for row in ROWS:
        cells = []
        for name, runs in columns.items():
            if any(row not in figures for figures in runs):
                cells.append("n/a")
                continue
            value = mean(figures[row] for figures in runs)
            spread = f" ±{stdev([figures[row] for figures in runs]):.4f}" if row == "val_bpb" and len(runs) > 1 else ""
            base = mean(figures.get(row, 0.0) for figures in columns[first])
            ratio = f" (x{value / base:.3f})" if name != first and base else ""
            cells.append((f"{value:.4f}" if row == "val_bpb" else f"{value:,.1f}") + spread + ratio)
        table.add_row(row, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arena", default="climbmix" if gpu else "demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of training (default: the arena's)")
    parser.add_argument("--tokens", type=int, default=0 if gpu else 2**20, help="train for so many tokens instead")
    parser.add_argument("--try", dest="tries", action="append", default=[], type=variant, metavar="'NAME=VALUE ...'")
    parser.add_argument("--no-reference", action="store_true", help="leave the column `reference` out")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.budget, options.tokens)
        return
    variants = {} if options.no_reference else {"reference": REFERENCE}
    variants |= {"train.py": {}, **{" ".join(f"{k}={v}" for k, v in tried.items()): tried for tried in options.tries}}
    subprocess.run([sys.executable, ROOT / "prepare.py", "--arena", options.arena], check=True)
    jobs = [(name, seed) for seed in options.seeds for name in variants]
    columns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda job: measure(variants[job[0]], job[1], options), jobs)
        for (name, seed), figures in zip(jobs, done, strict=True):
            print(f"{name}, seed {seed}: val_bpb {figures['val_bpb']:.4f}", file=sys.stderr, flush=True)
            columns[name].append(figures)
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    each = f"{options.tokens:,} tokens" if options.tokens else f"{options.budget or 'the budget in'} s"
    show(columns, f"{options.arena}, {each} each, seeds {options.seeds}, {machine}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
