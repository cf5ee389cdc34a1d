"""
train.py as it stands beside `reference`: upstream's published shape and rates, run by our own code.

    uv run benchmarks/train_bench.py                        with a GPU: climbmix, its five minutes each
    uv run benchmarks/train_bench.py --arena python --budget 60 --seeds 42 43
    uv run benchmarks/train_bench.py --try 'MLP_SHIFT=0.0' --try 'DEPTH=9 HEADS=4'
    uv run benchmarks/train_bench.py --meter H100           what a step launches, moves and takes there; no GPU is needed

Each column is train.py with some of its constants replaced, run as a process of its own on the same arena and seed,
one after the other; a column that fails is left out, and the reason told. Without a GPU it is the demo arena, and each
column gets the same number of tokens instead of the same time, unless --budget gives one: what is compared is how much
it learns. --jobs runs several at a time with one thread each, to screen ideas; their times then mean nothing.
"""

import argparse
import ast
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/gpu"))
from card import CARDS, compile_for, missing  # noqa: E402

CPU_TOKENS = 2**20
FEW_TOKENS = 2**18  # below it a column shows that it runs, and no more

# karpathy/autoresearch, train.py as published: 8 layers x 512, no n-gram tables, attention across documents
REFERENCE = {
    "DEPTH": "pick(2, 8)", "HEADS": "pick(2, 4)", "BATCH": "pick(2**12, 4 * GPU[2])",
    "MICRO_BATCH": "pick(2**12, 2**18)",
    "WINDOWS": "'SSSL'", "SHORT_WINDOW": "0.5", "DOCUMENT_MASK": "False", "MLP_SHIFT": "0.0", "ROPE_BASE": "10000.0",
    "QK_SCALE": "1.0", "KEY_SHIFT": "0.0", "SOFTCAP": "15.0", "SOFTCAP_KNEE": "15.0", "NGRAMS": "()", "SKIP_INIT": "0.1",
    "EMBEDDING_LR": "0.6", "HEAD_LR": "0.004", "RESIDUAL_LR": "0.005", "SKIP_LR": "0.5", "MATRIX_LR": "0.04",
    "WEIGHT_DECAY": "0.2", "WARMDOWN": "0.5", "ADAM_WARMDOWN": "0.5", "FINAL_LR": "0.0",
}  # fmt: skip

ROWS = ("val_bpb", "tokens/s", "mfu_percent", "num_steps", "total_tokens_M", "num_params_M", "peak_vram_mb",
        "compile_seconds", "training_seconds", "evaluation_seconds", "total_seconds")  # fmt: skip
METERED = (
    "kernels",
    "products",
    "GB",
    "micro_rows",
    "step_GiB",
    "peak_GiB",
    "import_s",
    "warm_up_s",
)


def constants_of(source: str) -> set[str]:
    """The constants of a program: what it sets in one line, by `pick` or not, and does not compute from other names."""
    found = set()
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], lineno=first, end_lineno=last) if (
                name.isupper()
            ):
                if first == last and {
                    n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)
                } <= {"pick", "GPU"}:
                    found.add(name)
    return found


def with_constants(source: str, constants: dict[str, str]) -> str:
    """The program with some of its constants replaced."""
    assert constants.keys() <= constants_of(source)
    for name, value in constants.items():
        line = re.search(rf"^{name}\s*= .*$", source, re.MULTILINE)
        assert line, name
        source = source[: line.start()] + f"{name} = {value}" + source[line.end() :]
    return source


def measure(
    constants: dict[str, str], seed: int, options: argparse.Namespace
) -> dict[str, float] | str:
    """Run train.py with these constants. Returns the figures of its summary block, or why there are none, in a line."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "train.py"
        program.write_text(with_constants((ROOT / "train.py").read_text(), constants))
        limit = ["--tokens", str(options.tokens)] if options.tokens else []
        limit += ["--budget", str(options.budget)] if options.budget else []
        env = os.environ | {"AUTORESEARCH_ARENA": options.arena, "AUTORESEARCH_SEED": str(seed)}
        if options.jobs > 1:
            env |= {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "--run", str(program), *limit],
            env=env,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or "it said nothing"
        return f"ended with {done.returncode}: {said.splitlines()[-1]}"
    block = re.findall(r"^(\w+): +([\d.]+)$", done.stdout.rpartition("---")[2], re.MULTILINE)
    figures = {name: float(value) for name, value in block}
    if "val_bpb" not in figures:
        return "it printed no summary"
    if seconds := figures["training_seconds"]:  # of a single step they are 0.0
        figures["tokens/s"] = figures["total_tokens_M"] * 1e6 / seconds
    return figures


def measure_all(
    variants: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Figures of the variants that finished with every seed. Tells of each run, also of one that failed."""
    jobs = [(name, seed) for seed in options.seeds for name in variants]
    columns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda job: measure(variants[job[0]], job[1], options), jobs)
        for (name, seed), figures in zip(jobs, done, strict=True):
            if isinstance(figures, str):
                print(f"error: {name}, seed {seed}: {figures}", file=sys.stderr, flush=True)
                continue
            print(
                f"{name}, seed {seed}: val_bpb {figures['val_bpb']:.4f}",
                file=sys.stderr,
                flush=True,
            )
            columns[name].append(figures)
    return {name: runs for name, runs in columns.items() if len(runs) == len(options.seeds)}


FEEDER = """
import sys
from gpt.arena import ARENAS, Arena
import gpt.feed
ARENAS[{0[name]!r}] = Arena(**{0!r})
sys.exit(gpt.feed.main())
"""


def run(program: Path, budget: float | None, tokens: int | None) -> None:
    """In a process of its own: train.py for another budget, or for a number of tokens."""
    sys.path.insert(0, str(ROOT))
    import prepare
    from gpt import client

    class Loader(prepare.TrainLoader):
        """Time goes by in tokens, and is told in seconds in the end."""

        started = 0.0

        def elapsed(self) -> float:
            if self.steps and not self.running:
                return time.perf_counter() - self.started
            self.started = self.started or time.perf_counter()
            return prepare.ARENA.budget * self.tokens / tokens

    # of a number of tokens the run itself knows how many are left, as of counted work
    arena = replace(prepare.ARENA, budget=budget or prepare.ARENA.budget)
    prepare.ARENA = replace(arena, counted=arena.counted and not tokens)
    told = replace(arena, counted=arena.counted or bool(tokens))
    client.FEEDER = [sys.executable, "-c", FEEDER.format(asdict(told))]
    if tokens:
        prepare.TrainLoader = Loader
    runpy.run_path(str(program), run_name="__main__")


def meter(variants: dict[str, dict[str, str]], card: str) -> dict[str, list[dict[str, float]]]:
    """What a step of those that compile takes on a card that need not be here; see tests/gpu/card.py."""
    columns, source = {}, (ROOT / "train.py").read_text()
    for name, constants in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                program = with_constants(source, constants)
                columns[name] = [compile_for(card, Path(folder), program)]
            except RuntimeError as error:
                print(f"error: {name}: {str(error).splitlines()[-1]}", file=sys.stderr)
    return columns


def show(
    columns: dict[str, list[dict[str, float]]], title: str, rows: Sequence[str] = ROWS
) -> None:
    """A row for each figure, averaged over the seeds, and how the later columns compare with the first."""
    table, first = Table(title=title, title_justify="left"), next(iter(columns))
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        cells = []
        for name, runs in columns.items():
            if any(row not in figures for figures in runs):
                cells.append("n/a")
                continue
            value = mean(figures[row] for figures in runs)
            spread = (
                f" ±{stdev([figures[row] for figures in runs]):.4f}"
                if row == "val_bpb" and len(runs) > 1
                else ""
            )
            base = mean(figures.get(row, 0.0) for figures in columns[first])
            ratio = f" (x{value / base:.3f})" if name != first and base else ""
            cells.append((f"{value:.4f}" if row == "val_bpb" else f"{value:,.1f}") + spread + ratio)
        table.add_row(row, *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


class Parser(argparse.ArgumentParser):
    """Tells a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help tells more\n")


def whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least {least}")
        return int(text)

    return number


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def variant(text: str) -> dict[str, str]:
    """The constants of `NAME=VALUE NAME=VALUE`, where no value holds a space."""
    pairs = text.split()
    if not pairs or not all(re.fullmatch(r"[A-Z_0-9]+=\S+", pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 'NAME=VALUE NAME=VALUE', values without blanks"
        )
    constants = dict(pair.split("=", 1) for pair in pairs)
    if absent := constants.keys() - constants_of((ROOT / "train.py").read_text()):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(absent))}: no such constant at the top of train.py"
        )
    return constants


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, arena = parser.add_argument, "climbmix" if gpu else "demo"
    add(
        "--arena",
        default=arena,
        help=f"what to train on; without a GPU only demo (default: {arena})",
    )
    add(
        "--seeds",
        type=whole(0),
        nargs="+",
        default=[42],
        metavar="S",
        help="each column runs with each (default: 42)",
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--budget", type=positive, metavar="S", help="seconds of training (default: the arena's)"
    )
    few = f"tokens of training, whatever the time (default: {CPU_TOKENS:,} in demo, else the budget counts)"
    limit.add_argument("--tokens", type=whole(1), metavar="N", help=few)
    add("--try", dest="tries", action="append", default=[], type=variant, metavar="'NAME=VALUE ...'",
        help="a column with these constants; may be given again (default: none)")  # fmt: skip
    add(
        "--no-reference",
        action="store_true",
        help="leave the column `reference` out (default: it comes first)",
    )
    add("--jobs", type=whole(1), default=1, metavar="N", help="how many run at a time (default: 1)")
    about = "compile for this card, without training, and count what a step takes: "
    add("--meter", choices=[*CARDS], metavar="CARD", help=about + ", ".join(CARDS))
    add("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:
        return options
    absent = REFERENCE.keys() - constants_of((ROOT / "train.py").read_text())
    if absent and not options.no_reference:
        parser.error(
            f"train.py has lost {', '.join(sorted(absent))}, which `reference` sets: add --no-reference"
        )
    if options.meter and (lacks := missing()):
        parser.error(f"--meter: {lacks}")
    if not options.meter and not gpu and options.arena != "demo":
        parser.error(
            f"no NVIDIA GPU found, and only the arena demo runs without one, not {options.arena}"
        )
    if options.arena == "demo" and not options.budget:
        options.tokens = options.tokens or CPU_TOKENS
    return options


def title(options: argparse.Namespace) -> str:
    machine = "CPU" if options.arena == "demo" else torch.cuda.get_device_name()
    budget = f"{options.budget:g} s" if options.budget else "the arena's budget"
    each = f"{options.tokens:,} tokens" if options.tokens else budget
    return (
        f"{options.arena}, {each} each, seeds {options.seeds}, {machine}, torch {torch.__version__}"
    )


def train_all(
    variants: dict[str, dict[str, str]], options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Make the arena, train each variant, show the figures of those that finished, and return them."""
    if code := subprocess.run(
        [sys.executable, ROOT / "prepare.py", "--arena", options.arena]
    ).returncode:
        raise SystemExit(code)  # it has said why
    finished = measure_all(variants, options)
    if finished:
        show(finished, title(options))
        if options.tokens and options.tokens < FEW_TOKENS:
            print(
                f"These are fewer than {FEW_TOKENS:,} tokens: the columns run, but how they compare means nothing."
            )
    return finished


def main() -> None:
    options = parse()
    if options.run:
        run(options.run, options.budget, options.tokens)
        return
    variants = {} if options.no_reference else {"reference": REFERENCE}
    variants |= {
        "train.py": {},
        **{" ".join(f"{k}={v}" for k, v in tried.items()): tried for tried in options.tries},
    }
    if options.meter:
        finished = meter(variants, options.meter)
        if finished:
            show(finished, options.meter, METERED)
    else:
        finished = train_all(variants, options)
    if finished.keys() != variants.keys():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
