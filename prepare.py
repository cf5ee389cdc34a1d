"""
The arena: everything an experiment may not change. Text, tokenizer, batches, the clock, the evaluation.

    uv run prepare.py --arena demo      make the files of one arena; a second call finds them and does nothing

train.py imports three names from here: ARENA (the facts), TrainLoader (batches, and the clock) and finish
(the evaluation and the summary). The agent edits train.py and nothing else, so what is counted, timed and
scored in this file is the same for every experiment.
"""

import argparse
import base64
import fcntl
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import sysconfig
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import rustbpe
import tiktoken
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

IMPORTED = time.perf_counter()

# -----------------------------------------------------------------------------
# The arenas


@dataclass(frozen=True)
class Arena:
    """One fixed contest: experiments are comparable when they ran in the same arena, and only then."""

    name: str
    sequence_len: int       # T, tokens in a row
    vocab_size: int         # V, special tokens included
    budget: float           # seconds of training
    val_tokens: int         # scored validation tokens; as many again are sealed
    held_out: float         # share of the files that goes to validation, and as much to the sealed set
    seed: int = 42          # order of the training text and the model's start; the driver's, never the agent's

    @property
    def bos(self) -> int:
        """The token that starts every document."""
        return self.vocab_size - len(SPECIAL_TOKENS)

    @property
    def eval_rows(self) -> int:
        """Rows in one evaluation batch, the (B, T) that `finish` calls the model with."""
        return min(2**15, self.val_tokens // 8) // self.sequence_len

    @property
    def val_rows(self) -> int:
        return self.val_tokens // self.sequence_len

    @property
    def folder(self) -> Path:
        cache = os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch"
        return Path(cache) / self.name


ARENAS = {
    arena.name: arena
    for arena in (
        Arena("python", sequence_len=2048, vocab_size=8192, budget=300.0, val_tokens=2**22, held_out=1 / 8),
        Arena("demo", sequence_len=256, vocab_size=1024, budget=15.0, val_tokens=2**16, held_out=1 / 16),
    )
}
DEFAULT_ARENA = "python"


def arena_from_environment() -> Arena:
    """The arena and seed that the driver chose: AUTORESEARCH_ARENA and AUTORESEARCH_SEED."""
    name, seed = os.environ.get("AUTORESEARCH_ARENA", DEFAULT_ARENA), os.environ.get("AUTORESEARCH_SEED", "42")
    if name not in ARENAS:
        fail(f"unknown arena {name!r} in AUTORESEARCH_ARENA: choose one of {', '.join(sorted(ARENAS))}")
    if not seed.isdecimal() or int(seed) >= 2**63:
        fail(f"AUTORESEARCH_SEED must be a whole number below 2**63, not {seed!r}")
    return replace(ARENAS[name], seed=int(seed))


def fail(reason: str, code: int = 1) -> NoReturn:
    """End the process with one line: the driver records it as the reason."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(code)


ARENA = arena_from_environment()

# -----------------------------------------------------------------------------
# Text: the Python sources of this environment, the same on every machine with the same packages

SPLITS = ("train", "val", "sealed")


def source_roots(arena: Arena) -> list[Path]:
    """Folders whose .py files are the text of an arena."""
    paths = sysconfig.get_paths()
    installed = ["purelib", "platlib"] if arena.name == "python" else []
    return [Path(folder) for folder in dict.fromkeys(paths[key] for key in ["stdlib", *installed])]


def source_files(root: Path) -> list[Path]:
    """Every .py file under a root, sorted; packages that were installed into the standard library's folder left out."""
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not foreign.intersection(p.relative_to(root).parts))


def split_of(path: str, held_out: float) -> str:
    """Assign a file to train, val or sealed by a hash of its path: stable when other files come and go."""
    draw = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < held_out else "sealed" if draw < 2 * held_out else "train"


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a source file at blank lines, or between lines where there are none for long, into documents of at most
    `size` characters, so that most fit in a row whole; only a line can be longer."""
    document = ""
    blocks = re.split(r"(?<=\n\n)", text)
    for block in (part for b in blocks for part in (b.splitlines(keepends=True) if len(b) > size else [b])):
        if document and len(document) + len(block) > size:
            yield document
            document = ""
        document += block
    if document.strip():
        yield document


def collect(arena: Arena, progress: Progress) -> dict[str, list[str]]:
    """Read the documents of each split. Text seen before is dropped, so no split shares a document with another."""
    files = [(root, path) for root in source_roots(arena) for path in source_files(root)]
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for root, path in progress.track(files, description="read sources"):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):       # deliberately broken files are part of the standard library's tests
            continue
        split = documents[split_of(path.relative_to(root).as_posix(), arena.held_out)]
        for document in cut(text, size=2 * arena.sequence_len):
            if document not in seen:
                seen.add(document)
                split.append(document)
    return documents


# -----------------------------------------------------------------------------
# Tokenizer: trained by rustbpe, run by tiktoken, kept as JSON

# They come after the ordinary tokens; BOS is the first of them.
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
# GPT-4's split, but numbers in groups of one or two digits: a small vocabulary has no room for a thousand triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back: any string and any bytes round-trip."""

    def __init__(self, tokens: list[bytes], pattern: str):
        self.tokens = tokens
        self.pattern = pattern
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.bos = len(tokens)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
        return cls([token for _, token in ranks], SPLIT_PATTERN)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        stored = json.loads(path.read_text())
        return cls([base64.b64decode(token) for token in stored["tokens"]], stored["pattern"])

    def save(self, path: Path) -> None:
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        path.write_text(json.dumps({"pattern": self.pattern, "special": SPECIAL_TOKENS, "tokens": tokens}))

    def encode_documents(self, documents: list[str]) -> list[np.ndarray]:
        """Encode each document into uint16 ids that start with BOS."""
        encoded = self.encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)
        return [np.array([self.bos, *ids], dtype=np.uint16) for ids in encoded]

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """Bytes of each token, exact and as upstream counts them (a token that is not UTF-8 by itself reads as
        U+FFFD, 3 bytes for each replacement). Special tokens have none."""
        exact = [len(token) for token in self.tokens]
        upstream = [len(token.decode("utf-8", errors="replace").encode()) for token in self.tokens]
        none = [0] * len(SPECIAL_TOKENS)
        return exact + none, upstream + none


# -----------------------------------------------------------------------------
# Packing: rows that start with BOS and hold no padding


class Packer:
    """Fills rows from a stream of documents: the largest that fits goes in, else the shortest is cropped.

    The idea is upstream's best-fit packing. Each document starts with BOS, so each row does too.
    """

    BUFFER = 1000   # documents to choose from

    def __init__(self, documents: Iterator[np.ndarray]):
        self.documents = documents
        self.lengths: list[int] = []        # sorted
        self.waiting: list[np.ndarray] = []  # in the same order

    def fill(self, row: np.ndarray) -> None:
        """Write a whole row in place; StopIteration when the stream has run dry."""
        start = 0
        while start < len(row):
            document = self.take(len(row) - start)
            row[start : start + len(document)] = document
            start += len(document)

    def take(self, space: int) -> np.ndarray:
        while len(self.waiting) < self.BUFFER and (document := next(self.documents, None)) is not None:
            i = bisect_right(self.lengths, len(document))
            self.lengths.insert(i, len(document))
            self.waiting.insert(i, document)
        if not self.waiting:
            raise StopIteration
        i = max(bisect_right(self.lengths, space) - 1, 0)
        self.lengths.pop(i)
        return self.waiting.pop(i)[:space]


def pack_rows(documents: list[np.ndarray], rows: int, width: int) -> np.ndarray:
    """Pack shuffled documents into (rows, width) uint16 once and for all; ValueError when they do not suffice."""
    order = np.random.default_rng(0).permutation(len(documents))
    packer = Packer(documents[i] for i in order)
    packed = np.empty((rows, width), dtype=np.uint16)
    try:
        for row in packed:
            packer.fill(row)
    except StopIteration:
        raise ValueError(f"too little held-out text for {rows} rows of {width} tokens") from None
    return packed


# -----------------------------------------------------------------------------
# Making an arena: built in a folder beside it and renamed when whole

FORMAT = 1  # of the files below; another number makes them again


def settings(arena: Arena) -> dict[str, object]:
    """What the files depend on. The budget and the seed change nothing on disk."""
    facts = asdict(arena)
    return {"format": FORMAT, **{k: facts[k] for k in ("name", "sequence_len", "vocab_size", "val_tokens", "held_out")}}


def read_manifest(arena: Arena) -> dict | None:
    """The manifest when every file it lists is there whole and was made with today's settings, else None."""
    try:
        manifest = json.loads((arena.folder / "manifest.json").read_text())
        sizes = {name: (arena.folder / name).stat().st_size for name in manifest["files"]}
        expected = {name: file["bytes"] for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PermissionError):
            raise
        return None
    return manifest if sizes == expected and manifest.get("settings") == settings(arena) else None


def prepare(arena: Arena) -> dict:
    """Make the files of an arena unless they are there, and return the manifest. Two callers wait for each other."""
    arena.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(arena.folder.with_suffix(".lock")):
        manifest = read_manifest(arena)
        if manifest and manifest["files"] == {name: describe(arena.folder / name) for name in manifest["files"]}:
            print(f"{arena.name}: already prepared, nothing to do")
            return manifest
        fresh = arena.folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        manifest = build(arena, fresh)
        os.sync()       # whole on disk before it counts
        shutil.rmtree(arena.folder, ignore_errors=True)
        fresh.rename(arena.folder)
        return manifest


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(arena: Arena, folder: Path) -> dict:
    """Write tokenizer.json, train.bin, offsets.npy, val.npy, sealed.npy and, last, manifest.json into a folder."""
    label = TextColumn("{task.description:<22}")
    columns = (label, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        documents = collect(arena, progress)
        training = progress.track(documents["train"], description="train the tokenizer")
        tokenizer = Tokenizer.train(training, arena.vocab_size)
        tokens = {split: encode(tokenizer, documents[split], arena, f"encode {split}", progress) for split in SPLITS}
    if len(tokenizer.tokens) + len(SPECIAL_TOKENS) != arena.vocab_size:
        raise ValueError(f"too little text for a vocabulary of {arena.vocab_size}")
    trained = {ids.tobytes() for ids in tokens["train"]}      # pieces of long lines can be equal, a row of zeros say
    for split in ("val", "sealed"):
        tokens[split] = [ids for ids in tokens[split] if ids.tobytes() not in trained]
    tokenizer.save(folder / "tokenizer.json")
    np.concatenate(tokens["train"]).tofile(folder / "train.bin")
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, tokens["train"])]))
    for split in ("val", "sealed"):
        np.save(folder / f"{split}.npy", pack_rows(tokens[split], arena.val_rows, arena.sequence_len + 1))
    manifest = {
        "settings": settings(arena),
        "documents": {split: len(documents[split]) for split in SPLITS},
        "tokens": {split: int(sum(map(len, tokens[split]))) for split in SPLITS},
        "files": {path.name: describe(path) for path in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def encode(
    tokenizer: Tokenizer, documents: list[str], arena: Arena, label: str, progress: Progress
) -> list[np.ndarray]:
    """Encode documents; those that are longer than a row become several, since one that never fits would be cropped
    and, worse, wait in the packer's buffer until nothing else is left in it."""
    chunks = [documents[i : i + 1024] for i in range(0, len(documents), 1024)]
    encoded = (ids for chunk in progress.track(chunks, description=label) for ids in tokenizer.encode_documents(chunk))
    return [piece for ids in encoded for piece in split_long(ids, arena.sequence_len + 1)]


def split_long(document: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Split a document into pieces of at most `width` tokens that each start with its BOS."""
    bos, text = document[:1], document[1:]
    for start in range(0, max(len(text), 1), width - 1):
        yield np.concatenate([bos, text[start : start + width - 1]])


def describe(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# -----------------------------------------------------------------------------
# Training batches, and the clock


class TrainLoader:
    """Batches of packed training text, for exactly the arena's budget of wall-clock seconds.

    Yields `(x, y)`, each int64 of shape (rows, T) on `device`; `rows` is one whole optimizer step, to be cut into
    micro-batches by the caller. The clock starts when the first batch is drawn and the loader stops yielding when
    the budget is spent, so compile and warm up before, on random tokens. A process has one clock, however many
    loaders. On a GPU the CPU is held at most two batches ahead, so that the clock reads what the GPU has done. The
    same seed gives the same rows.
    """

    AHEAD = 2
    started: float | None = None    # of all loaders of the process: a second one gets no second budget

    def __init__(self, rows: int, device: str | torch.device):
        if rows < 1:
            raise ValueError(f"a batch needs at least one row, not {rows}")
        if read_manifest(ARENA) is None:
            fail(f"the arena {ARENA.name!r} is not prepared: run `uv run prepare.py --arena {ARENA.name}`")
        self.device = torch.device(device)
        self.packer = Packer(training_documents(ARENA))
        pinned = self.device.type == "cuda"
        shape = (rows, ARENA.sequence_len + 1)
        # a buffer is filled again only after the batch that used it was consumed
        self.buffers = [torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(self.AHEAD + 1)]
        self.consumed: list[torch.cuda.Event] = []
        self.seconds = 0.0  # of training, final once the loader has stopped
        self.steps = 0      # batches handed out
        self.stopped = False

    @property
    def tokens(self) -> int:
        return self.steps * self.buffers[0].shape[0] * ARENA.sequence_len

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(self.elapsed() / ARENA.budget, 1.0)

    def elapsed(self) -> float:
        if self.stopped:
            return self.seconds
        return 0.0 if self.started is None else time.perf_counter() - self.started

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if TrainLoader.started is None:
            self.synchronize()
            TrainLoader.started = time.perf_counter()
        self.wait()
        if self.stopped or self.elapsed() >= ARENA.budget:
            self.stop()
            raise StopIteration
        buffer = self.buffers[self.steps % len(self.buffers)]
        for row in buffer.numpy():
            self.packer.fill(row)
        self.steps += 1
        batch = buffer.to(self.device, non_blocking=True)
        return batch[:, :-1].clone(), batch[:, 1:].clone()     # the buffer is used again

    def wait(self) -> None:
        """Mark the work launched so far, and wait until at most AHEAD batches of it are unfinished."""
        if self.device.type == "cuda":
            self.consumed.append(torch.cuda.Event())
            self.consumed[-1].record()
            if len(self.consumed) >= self.AHEAD:
                self.consumed.pop(0).synchronize()

    def stop(self) -> None:
        if not self.stopped:
            self.synchronize()
            self.seconds = self.elapsed()
            self.stopped = True

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def training_documents(arena: Arena) -> Iterator[np.ndarray]:
    """Walk through the training documents for ever, each epoch in an order of its own."""
    # np.asarray: slices of a plain array cost a third of slices of a memmap
    tokens = np.asarray(np.memmap(arena.folder / "train.bin", dtype=np.uint16, mode="r"))
    offsets = np.load(arena.folder / "offsets.npy")
    rng = np.random.default_rng(arena.seed)
    while True:
        for i in rng.permutation(len(offsets) - 1):
            yield tokens[offsets[i] : offsets[i + 1]]


# -----------------------------------------------------------------------------
# The evaluation: logits in, everything else is counted here

Logits = Callable[[torch.Tensor], torch.Tensor]
PROBE_BATCHES = 2
AGAIN = "scoring a batch again gives another answer"
# How far a log-probability may move under a probe: nothing but rounding. On a GPU, bfloat16 rounds coarsely.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.25}


@torch.no_grad()
def evaluate(model: Logits, rows: np.ndarray, device: torch.device) -> tuple[float, float]:
    """Validation bits per byte of `model` on packed rows (R, T+1): exact, and as upstream counts bytes.

    `model(x)` gets int64 tokens (B, T) alone and returns logits (B, T, V). The loss is taken here, in float32, and
    summed in float64 over the bytes of every target; special tokens are left out. SystemExit when the model is not
    causal, mixes rows, answers the same question differently, or gives no finite number. R is a multiple of B.
    """
    size = ARENA.eval_rows
    assert len(rows) % size == 0
    tokenizer = Tokenizer.load(ARENA.folder / "tokenizer.json")
    exact, upstream = (torch.tensor(lengths, device=device) for lengths in tokenizer.byte_lengths())
    nats = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    starts = range(0, len(rows), size)
    probed = set(random.SystemRandom().sample(starts, PROBE_BATCHES))    # nobody can know which; the score is the same
    for start in starts:
        batch = torch.from_numpy(rows[start : start + size].astype(np.int64)).to(device)
        x, y = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        losses = score(model, x, y)
        if start in probed:
            probe(model, x, y, losses)
            again = x, y, losses
        nats += losses[exact[y] > 0].double().sum()
        counts += torch.stack([exact[y].sum(), upstream[y].sum()])
    x, y, losses = again
    expect_same(score(model, x, y), losses, AGAIN)
    bits, (exact_bytes, upstream_bytes) = nats.item() / math.log(2), counts.tolist()
    if not math.isfinite(bits):
        fail("the validation loss is not finite")
    return bits / exact_bytes, bits / upstream_bytes


def score(model: Logits, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Loss in nats of each target, float32 (B, T). The logits are widened a few rows at a time, to bound the memory."""
    logits = model(x)
    if logits.shape != (*x.shape, ARENA.vocab_size):
        fail(f"model(x) must return logits of shape {(*x.shape, ARENA.vocab_size)}, not {tuple(logits.shape)}")
    per_row = [F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, y, strict=True)]
    return torch.stack(per_row)


def probe(model: Logits, x: torch.Tensor, y: torch.Tensor, losses: torch.Tensor) -> None:
    """Change what a prediction must not see, and expect it to stay: nothing, then other rows, then later tokens."""
    expect_same(score(model, x, y), losses, AGAIN)
    rng = torch.Generator().manual_seed(int(x.sum()))
    noise = torch.randint(ARENA.bos, x.shape, generator=rng).to(x)
    others = torch.rand((len(x), 1), generator=rng).to(x.device) < 0.5
    others[0], others[-1] = True, False
    mine = ~others.expand_as(x)
    changed = score(model, torch.where(others, noise, x), y)
    expect_same(changed[mine], losses[mine], "the rows are not independent: other rows change a row's predictions")
    cuts = torch.randint(x.shape[1], (len(x), 1), generator=rng).to(x)
    cuts[0], cuts[-1] = 0, x.shape[1] - 2
    later = torch.arange(x.shape[1], device=x.device) > cuts
    changed = score(model, torch.where(later, noise, x), y)
    expect_same(changed[~later], losses[~later], "the model is not causal: later tokens change earlier predictions")


def expect_same(now: torch.Tensor, before: torch.Tensor, reason: str) -> None:
    moved = (now - before).abs().max().item()
    if not moved <= TOLERANCE[now.device.type]:     # worded so that NaN fails
        fail(f"{reason} (a log-probability moved by {moved:.4g})")


# -----------------------------------------------------------------------------
# The summary

# Dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets; the first name found in the GPU's name counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.5, "H200": 989.5, "B200": 2250.0, "A100": 312.0,
    "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}


def finish(model: torch.nn.Module, loader: TrainLoader, *, depth: int, flops_per_token: float, **facts: object) -> None:
    """Evaluate the trained model and print the summary block that the driver reads; the last call of train.py.

    `model(x)` takes int64 tokens (B, T) and returns logits (B, T, V). `flops_per_token` is what one training token
    costs forward and backward, for MFU alone. Further facts are printed below the block's own lines. Steps, tokens,
    seconds and memory are counted here; SystemExit when the clock has not run out or a probe fails.
    """
    loader.wait()
    if loader.elapsed() < ARENA.budget:
        fail(f"finish was called {ARENA.budget - loader.elapsed():.1f} s before the budget was spent")
    loader.stop()
    if (late := time.perf_counter() - TrainLoader.started - loader.seconds) > 5:
        fail(f"finish was called {late:.1f} s after the budget was spent")
    model.eval()
    val_bpb, val_bpb_upstream = evaluate(model, np.load(ARENA.folder / "val.npy"), loader.device)
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "val_bpb_upstream": f"{val_bpb_upstream:.6f}",
        "training_seconds": f"{loader.seconds:.1f}",
        "total_seconds": f"{process_age():.1f}",
        "peak_vram_mb": f"{peak_memory_mb(loader.device):.1f}",
        "mfu_percent": mfu_percent(flops_per_token, loader),
        "total_tokens_M": f"{loader.tokens / 1e6:.3f}",
        "num_steps": loader.steps,
        "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}",
        "depth": depth,
    }
    if repeated := summary.keys() & facts.keys():
        raise ValueError(f"finish prints {', '.join(sorted(repeated))} itself")
    lines = [f"{name + ':':<18}{value}" for name, value in (summary | facts).items()]
    print("---", *lines, sep="\n", flush=True)


def mfu_percent(flops_per_token: float, loader: TrainLoader) -> str:
    name = torch.cuda.get_device_name(loader.device) if loader.device.type == "cuda" else "cpu"
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    return f"{100 * flops_per_token * loader.tokens / loader.seconds / (peak * 1e12):.2f}" if peak else "n/a"


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files of one arena; a second call does nothing.")
    choices = ", ".join(sorted(ARENAS))
    parser.add_argument("--arena", default=ARENA.name, help=f"one of {choices} (default: {ARENA.name})")
    name = parser.parse_args().arena
    if name not in ARENAS:
        fail(f"unknown arena {name!r}: choose one of {choices}", code=2)
    start = time.perf_counter()
    try:
        manifest = prepare(arena := ARENAS[name])
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        where = error.filename or arena.folder
        fail(f"cannot write {where}: {error.strerror or error}; AUTORESEARCH_CACHE moves the cache")
    tokens = ", ".join(f"{manifest['tokens'][split] / 1e6:.1f}M {split}" for split in SPLITS)
    print(f"{arena.name}: tokens {tokens} ({time.perf_counter() - start:.0f} s)")
    # the driver reads this last line; `data` names these very files, so that numbers from others are never compared
    data = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()[:12]
    facts = {"name": arena.name, "budget": arena.budget, "data": data, "folder": str(arena.folder)}
    print("ready:", json.dumps(facts))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
