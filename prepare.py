"""
The arena: everything an experiment may not change. Batches, the evaluation, the score.

    uv run prepare.py --arena demo      make the files of one arena; a second call finds them and does nothing

train.py imports three names from here: ARENA (the facts), TrainLoader (batches, and the clock) and finish
(the evaluation and the summary). The agent edits train.py and nothing else, so what is counted, timed and
scored is the same for every experiment. gpt/ holds the rest: the text (make.py), and the feeder (feed.py), a process
of its own that hands out batches, and owns clock and count.
"""

import argparse
import ast
import importlib
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from autoresearch.files import UserError, cache
from gpt import graph
from gpt.arena import ARENAS, SHARDS, SPLITS, fail, find_arena, load_manifest
from gpt.card import peak_tflops
from gpt.client import Feed, connect
from gpt.meter import Work
from gpt.tokenizer import Tokenizer

IMPORTED = time.perf_counter()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache() / "compiled"))     # torch's own is lost with /tmp

try:
    FEED, ARENA = connect()
except UserError as error:
    fail(str(error), error.code)

# -----------------------------------------------------------------------------
# Training batches


class TrainLoader:
    """Batches of packed training text, for exactly the arena's budget of seconds.

    Yields `(x, y)`, each int64 of shape (rows, T) on `device`; `rows` is one whole optimizer step, to be cut into
    micro-batches by the caller. The clock is the feeder's: it starts when the first batch is drawn, and when the budget
    is spent there is no more. So compile and warm up before, on random tokens, and `register` the model. On a GPU the
    CPU is held at most two batches ahead, so that the clock reads what the GPU has done. The same seed gives the same
    rows.
    """

    AHEAD = 2

    def __init__(self, rows: int, device: str | torch.device):
        if rows < 1:
            raise ValueError(f"a batch needs at least one row, not {rows}")
        if FEED is None and "AUTORESEARCH_FACTS" in os.environ:
            fail("a TrainLoader was opened in a process that train.py started: open it in the first one")
        self.feed = FEED or Feed()
        self.feed.ask(b"o", rows)
        self.device = torch.device(device)
        pinned = self.device.type == "cuda"
        self.shape = (rows, ARENA.sequence_len + 1)
        # a buffer is filled again only after the batch that used it was consumed
        self.buffers = [torch.empty(self.shape, dtype=torch.int64, pin_memory=pinned) for _ in range(self.AHEAD + 1)]
        self.consumed: list[torch.cuda.Event] = []
        self.work = Work() if ARENA.counted else None
        self.told = self.at = 0.0           # the feeder's clock, and when it was read on ours
        self.running = False
        self.steps = 0      # batches handed out
        self.model: torch.nn.Module | None = None
        self.graph: graph.Graph | None = None

    @property
    def tokens(self) -> int:
        return self.steps * self.shape[0] * ARENA.sequence_len

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(self.elapsed() / ARENA.budget, 1.0)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        if self.running:
            return self.work.seconds if self.work else self.told + time.perf_counter() - self.at
        return self.told

    def mfu_percent(self, flops_per_token: float) -> str:
        """Model FLOPs utilization so far, `n/a` where the GPU's peak is unknown."""
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return f"{100 * flops_per_token * self.tokens / self.elapsed() / (peak * 1e12):.2f}" if peak else "n/a"

    def report(self, step: int, loss: float, flops_per_token: float) -> None:
        """Print a line of progress, as the driver reads it."""
        speed, left = self.tokens / self.elapsed(), max(ARENA.budget - self.elapsed(), 0.0)
        print(f"step {step:5d}  {self.progress:6.1%}  loss {loss:.4f}  {speed:,.0f} tok/s  "
              f"mfu {self.mfu_percent(flops_per_token)}  {left:.0f} s left", flush=True)

    def register(self, model: torch.nn.Module) -> None:
        """Hand in the graph of the model that will be scored, after warming up and before the first batch.

        `model(x)` takes int64 tokens (eval_rows, T) and returns logits (eval_rows, T, V). `finish` may get another
        module with the same tensors, as an average of the weights. SystemExit where it is not one fixed sequence of
        torch's operators, or calls what a score must not rest on.
        """
        check_size(Path(__file__).with_name("train.py"))
        x = torch.randint(ARENA.bos, (ARENA.eval_rows, ARENA.sequence_len), device=self.device,
                          generator=torch.Generator(self.device).manual_seed(0))
        try:
            self.graph = graph.export(model, x)
        except graph.GraphError as error:
            fail(str(error))
        text = self.graph.text
        self.feed.ask(b"g", len(text), send=lambda feed: feed.write(text))
        self.model = model

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.wait()
        content = self.feed.ask(b"b", seconds=self.elapsed())
        self.told, self.at = self.feed.seconds, time.perf_counter()
        if not content:
            self.stop()
            raise StopIteration
        buffer = self.buffers[self.steps % len(self.buffers)]
        buffer.numpy()[:] = np.frombuffer(content, np.uint16).reshape(self.shape)
        self.steps += 1
        batch = buffer.to(self.device, non_blocking=True)
        x, y = batch[:, :-1].clone(), batch[:, 1:].clone()     # the buffer is used again
        if self.steps == 1:
            expect_ignorance(self.model, x, y)
            self.running = True
            if self.work:
                self.work.__enter__()
        return x, y

    def wait(self) -> None:
        """Mark the work launched so far, and wait until at most AHEAD batches of it are unfinished."""
        if self.device.type == "cuda":
            self.consumed.append(torch.cuda.Event())
            self.consumed[-1].record()
            ahead = self.AHEAD if self.elapsed() < self.steps else 1    # steps of seconds would end late
            while len(self.consumed) >= ahead:
                self.consumed.pop(0).synchronize()

    def stop(self) -> None:
        if self.running and self.work:
            self.work.__exit__(None, None, None)
        self.running = False

    def leave(self, model: torch.nn.Module) -> None:
        """Hand in the weights of a model: by the names of the graph, and nothing else."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = self.elapsed()
        self.stop()
        if self.graph is None:
            fail("the model was not registered before the first batch: register(model) hands in its graph")
        try:
            self.feed.ask(b"w", self.graph.size, seconds, send=lambda feed: graph.write_tensors(model, self.graph, feed))
        except graph.GraphError as error:
            fail(f"the model passed to finish is not the registered one: {error}")


@torch.no_grad()
def expect_ignorance(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """SystemExit where a model that has seen no batch yet knows the text: it predicts the first one better than counting
    its tokens does, and better than the same with all tokens renamed, which a model that copies what it reads does not
    mind."""
    some = torch.arange(ARENA.eval_rows, device=x.device) % len(x)     # any other shape would compile again
    names = torch.arange(ARENA.vocab_size, device=x.device)
    names[: ARENA.bos] = torch.randperm(ARENA.bos, generator=torch.Generator().manual_seed(0)).to(x.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    loss = score(model, x[some], y[some]).mean().item()
    renamed = score(model, names[x[some]], names[y[some]]).mean().item()
    for module, mode in modes:
        module.training = mode
    shares = torch.unique(y, return_counts=True)[1] / y.numel()
    # of so few tokens it comes out short (Miller and Madow, 1955)
    unigrams = -(shares * shares.log()).sum().item() + (len(shares) - 1) / (2 * y.numel())
    if loss < unigrams and loss < renamed - 0.1:
        fail(f"before its first step the model predicts the text (loss {loss:.2f}) better than counting tokens does"
             f" ({unigrams:.2f}): all that it knows must come from the TrainLoader")


# -----------------------------------------------------------------------------
# The evaluation: logits in, everything else is counted here

Logits = Callable[[torch.Tensor], torch.Tensor]
PROBED = 16     # one batch in so many
# How far a log-probability may move under a probe: nothing but rounding. On a GPU, bfloat16 rounds coarsely.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.25}
# Rounding has no sign, so the mean over many predictions shows a leak that is smaller than it: in nats, and in errors
LEAK, LEAK_ERRORS = 1e-3, 5.0
AGREE = 0.0005          # bits per byte between a compiled model in its own process and its exported graph


@torch.no_grad()
def evaluate(model: Logits, rows: np.ndarray, lengths: tuple[list[int], list[int]], device: torch.device) -> tuple[float, float]:
    """Bits per byte of `model` on packed rows (R, T+1): by exact byte `lengths` of tokens, and by those upstream takes.

    `model(x)` gets int64 tokens (B, T) alone and returns logits (B, T, V). The loss is taken here, in float32, and
    summed in float64 over the bytes of every target; special tokens are left out. SystemExit when the model is not
    causal, mixes rows, answers the same question differently, or gives no finite number. R is a multiple of B.
    """
    size = ARENA.eval_rows
    assert len(rows) % size == 0
    exact, upstream = (torch.tensor(counts, device=device) for counts in lengths)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    starts = range(0, len(rows), size)
    # nobody can know which batches these are; the score is the same
    probed = set(random.SystemRandom().sample(starts, max(len(starts) // PROBED, 1)))
    leaks: list[torch.Tensor] = []
    for start in starts:
        batch = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device)
        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        losses = score(model, x, y)
        if start in probed:
            leaks.append(probe(model, x, y, losses))
            again = x, y, losses
        nats += losses[exact[y] > 0].double().sum()
        counts += torch.stack([exact[y].sum(), upstream[y].sum()])
    x, y, losses = again
    expect_same(score(model, x, y), losses, AGAIN)
    expect_no_leak(torch.cat(leaks).double())
    bits, (exact_bytes, upstream_bytes) = nats.item() / math.log(2), counts.tolist()
    if not math.isfinite(bits):
        fail("the validation loss is not finite")
    return bits / exact_bytes, bits / upstream_bytes


def score(model: Logits, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Loss in nats of each target, float32 (B, T). The logits are widened a few rows at a time, to bound the memory."""
    logits = model(x)
    if logits.shape != (*x.shape, ARENA.vocab_size):
        fail(f"model(x) must return logits of shape {(*x.shape, ARENA.vocab_size)}, not {tuple(logits.shape)}")
    if type(logits) is not torch.Tensor:    # a subclass would bring its own arithmetic
        fail(f"model(x) must return a plain tensor, not {type(logits).__name__}")
    per_row = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, y, strict=True)]
    return torch.stack(per_row)


AGAIN = "scoring a batch again gives another answer"


def probe(model: Logits, x: torch.Tensor, y: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Keep a random start of each row, of some rows nothing, and change all other tokens: the predictions within what
    was kept must stay. Returns by how much the last of them got worse in each row, in nats."""
    rng = torch.Generator().manual_seed(random.SystemRandom().getrandbits(63))
    noise = torch.randint(ARENA.bos, x.shape, generator=rng).to(x)
    last = torch.randint(-1, x.shape[1] - 1, (len(x), 1), generator=rng).to(x.device)
    last[0] = x.shape[1] - 2
    kept = torch.arange(x.shape[1], device=x.device) <= last
    now = score(model, torch.where(kept, x, noise), y)
    moved = (now - losses)[kept].abs().max().item()
    if not moved <= TOLERANCE[x.device.type]:       # worded so that NaN fails; now find out what it was
        expect_same(score(model, x, y), losses, AGAIN)
        mine = (last == x.shape[1] - 2).expand_as(x)
        alone = score(model, torch.where(mine, x, noise), y)
        expect_same(alone[mine], losses[mine], "the rows are not independent: other rows change a row's predictions")
        expect_same(now[kept], losses[kept], "the model is not causal: later tokens change earlier predictions")
    some = last[:, 0] >= 0
    return (now - losses).gather(1, last.clamp(min=0))[some, 0]


def expect_same(now: torch.Tensor, before: torch.Tensor, reason: str) -> None:
    moved = (now - before).abs().max().item()
    if not moved <= TOLERANCE[now.device.type]:
        fail(f"{reason} (a log-probability moved by {moved:.4g})")


def expect_no_leak(worse: torch.Tensor) -> None:
    """The next token was changed behind each of these predictions: on average they must not be worse for it."""
    mean = worse.mean().item()
    error = worse.std().item() / len(worse) ** 0.5
    if mean > LEAK and mean > LEAK_ERRORS * error:
        fail(f"the model is not causal: predictions are {mean:.4g} nats worse when the token they predict is hidden")


# -----------------------------------------------------------------------------
# The summary

def finish(model: torch.nn.Module, loader: TrainLoader, *, depth: int, flops_per_token: float, **facts: object) -> None:
    """Hand in the weights of the trained model, score it and print the summary block; the last call of train.py.

    `model(x)` takes int64 tokens (B, T) and returns logits (B, T, V); it is the registered one, or has the same
    tensors. `flops_per_token` is what one training token costs forward and backward, for MFU alone. Further facts are
    printed below the block's own lines. SystemExit when the clock has not run out, the weights come late, or a probe
    fails.
    """
    model.eval()
    loader.leave(model)
    start = time.perf_counter()
    rows = np.frombuffer(loader.feed.ask(b"v"), np.uint16).reshape(-1, ARENA.sequence_len + 1)
    val_bpb, val_bpb_upstream = evaluate(model, rows, loader.feed.lengths, loader.device)
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "val_bpb_upstream": f"{val_bpb_upstream:.6f}",
        "training_seconds": f"{loader.elapsed():.1f}",
        "total_seconds": f"{process_age():.1f}",
        "peak_vram_mb": f"{peak_memory_mb(loader.device):.1f}",
        "mfu_percent": loader.mfu_percent(flops_per_token),
        "total_tokens_M": f"{loader.tokens / 1e6:.3f}",
        "num_steps": loader.steps,
        "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}",
        "depth": depth,
        "evaluation_seconds": f"{time.perf_counter() - start:.1f}",
    }
    if repeated := summary.keys() & facts.keys():
        raise ValueError(f"finish prints {', '.join(sorted(repeated))} itself")
    lines = [f"{name + ':':<17} {value}" for name, value in (summary | facts).items()]
    print("---", *lines, sep="\n", flush=True)


def peak_memory_mb(device: torch.device) -> float:
    """Peak GPU memory in MiB; without a GPU, that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def process_age() -> float:
    """Seconds since this process started, imports included (proc(5), field 22 of stat); else since this import."""
    if not Path("/proc/self/stat").exists():
        return time.perf_counter() - IMPORTED
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


# -----------------------------------------------------------------------------
# The guard: a model without its program


def judge() -> None:
    """Score the model that the feeder took, from graph and weights, on validation and sealed rows; print the scores.

    SystemExit where it left none, and where its score is not the one that train.py printed (AUTORESEARCH_SCORE).
    """
    folder, claimed = Path(os.environ["AUTORESEARCH_MODEL"]), float(os.environ["AUTORESEARCH_SCORE"])
    if not (folder / "weights.bin").is_file():
        fail("it left no model to score: finish was not called, or not ours")
    check_size(Path(__file__).with_name("train.py"))
    manifest = load_manifest(ARENA)
    rows = {split: np.load(ARENA.folder / manifest[split]) for split in ("val", "sealed")}
    lengths = Tokenizer.load(ARENA.folder / manifest["tokenizer"]).byte_lengths()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        importlib.import_module("torch.nn.attention.varlen")    # registers an operator that the graph may hold
    torch.set_float32_matmul_precision("high")
    try:
        program = graph.Graph.read(folder / "graph.json")
        model = program.bind(graph.read_tensors(folder / "weights.bin", program), device)
    except graph.GraphError as error:
        fail(str(error))
    val_bpb, val_bpb_upstream = evaluate(model, rows["val"], lengths, device)
    if not abs(claimed - val_bpb) <= AGREE:
        fail(f"claims val_bpb {claimed:.6f}, and its model scores {val_bpb:.6f}")
    sealed_bpb, _ = evaluate(model, rows["sealed"], lengths, device)
    scores = {"val_bpb": val_bpb, "val_bpb_upstream": val_bpb_upstream, "sealed_bpb": sealed_bpb}
    print("---", *(f"{name}: {value:.6f}" for name, value in scores.items()), sep="\n", flush=True)


# -----------------------------------------------------------------------------


def check_train(source: Path) -> None:
    """Fail for a train.py that was written for another prepare.py, as upstream's is."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # told where it runs
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "prepare"]
    names = [name.name for node in imports for name in node.names if name.name not in globals()]
    if names:
        here = "ARENA, TrainLoader and finish"
        cure = "in the repository that it comes from, `autoresearch -C FOLDER` runs it as it is"
        fail(f"train.py imports {', '.join(names)} from prepare.py, and here that has {here}: {cure}")


MAX_TRAIN, MAX_LITERAL = 128_000, 4096     # bytes
LITERALS = ast.Constant | ast.JoinedStr | ast.List | ast.Tuple | ast.Set | ast.Dict


def check_size(source: Path) -> None:
    """Fail for a train.py that has room for weights or for a table of answers."""
    program = source.read_bytes()
    if len(program) > MAX_TRAIN:
        fail(f"train.py has {len(program) / 1000:.0f} kB, and may have {MAX_TRAIN // 1000}: a model learns in its time")
    starts = [0, *accumulate(map(len, program.splitlines(keepends=True)))]
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, LITERALS):
            size = starts[node.end_lineno - 1] + node.end_col_offset - starts[node.lineno - 1] - node.col_offset
            if size > MAX_LITERAL:
                fail(f"train.py has a literal of {size} bytes in line {node.lineno}, and may have {MAX_LITERAL}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files of one arena; a second call does nothing.")
    choices = f"{', '.join(ARENAS)}, or a folder with .parquet (column `text`) or .txt files"
    parser.add_argument("--arena", default=ARENA.name, help=f"{choices} (default: {ARENA.name})")
    parser.add_argument("--shards", type=int, help=f"of climbmix, to train on (default: those there, or {SHARDS})")
    parser.add_argument("--judge", action="store_true", help="score an exported model, as the guard of the task does")
    options = parser.parse_args()
    if options.judge:
        judge()
        return
    if options.shards is not None and not 1 <= options.shards <= 6541:
        fail(f"--shards must be from 1 to 6541, not {options.shards}", code=2)
    start = time.perf_counter()
    check_train(Path(__file__).with_name("train.py"))
    arena = find_arena(options.arena)
    try:
        manifest = importlib.import_module("gpt.make").prepare(arena, options.shards)
    except OSError as error:
        where = error.filename or arena.folder
        fail(f"cannot write {where}: {error.strerror or error}; AUTORESEARCH_CACHE moves the cache")
    tokens = ", ".join(f"{manifest['tokens'][split] / 1e6:.1f}M {split}" for split in SPLITS)
    print(f"{arena.name}: tokens {tokens} ({time.perf_counter() - start:.0f} s)")
    # the driver reads this last line
    facts = {"name": arena.name, "budget": arena.budget, "data": manifest["data"], "folder": str(arena.folder),
             "counted": arena.counted}
    print("ready:", json.dumps(facts))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error), error.code)
    except KeyboardInterrupt:
        sys.stderr.flush()
        os._exit(130)       # downloads in other threads would hold an orderly exit up; their parts are safe
