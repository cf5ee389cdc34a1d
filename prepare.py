"""
The arena: everything an experiment may not change. Text, tokenizer, batches, the clock, the evaluation.

    uv run prepare.py --arena demo      make the files of one arena; a second call finds them and does nothing

train.py imports three names from here: ARENA (the facts), TrainLoader (batches, and the clock) and finish
(the evaluation and the summary). The agent edits train.py and nothing else, so what is counted, timed and
scored in this file is the same for every experiment.
"""

import argparse
import ast
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import random
import re
import resource
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
import pyarrow
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.utils._python_dispatch import TorchDispatchMode

from autoresearch.files import UserError, cache
from gpt import text
from gpt.download import download
from gpt.text import SPECIAL_TOKENS, Piece, Tokenizer

IMPORTED = time.perf_counter()

# -----------------------------------------------------------------------------
# The arenas


SPLITS = ("train", "val", "sealed")
CLIMBMIX_VAL = 40 * 2**19       # tokens, as upstream scores


@dataclass(frozen=True)
class Arena:
    """One fixed contest: experiments are comparable when they ran in the same arena, and only then."""

    name: str
    sequence_len: int       # T, tokens in a row
    vocab_size: int         # V, special tokens included
    budget: float           # seconds of training
    val_tokens: int         # scored validation tokens; as many again are sealed
    held_out: float = 0.0   # share of the text that is drawn for validation, and as much for the sealed set
    counted: bool = False   # whether the budget is counted work (see Work), and not seconds of wall clock
    seed: int = 42          # order of the training text and the model's start; the driver's, never the agent's

    @property
    def bos(self) -> int:
        """The token that starts every document."""
        return self.vocab_size - len(SPECIAL_TOKENS)

    @property
    def eval_rows(self) -> int:
        """Rows in one evaluation batch, the (B, T) that `finish` calls the model with."""
        return max(min(2**15, self.val_tokens // 64) // self.sequence_len, 1)

    @property
    def val_rows(self) -> int:
        return self.val_tokens // self.sequence_len

    @property
    def is_folder(self) -> bool:
        """Whether the text is the user's own."""
        return os.sep in self.name

    @property
    def folder(self) -> Path:
        return cache() / (f"{Path(self.name).name}-{text.digest(self.name)}" if self.is_folder else self.name)



ARENAS = {
    arena.name: arena
    for arena in (
        Arena("climbmix", sequence_len=2048, vocab_size=8192, budget=300.0, val_tokens=CLIMBMIX_VAL),
        Arena("tinystories", sequence_len=512, vocab_size=4096, budget=300.0, val_tokens=2**20),
        Arena("python", sequence_len=2048, vocab_size=8192, budget=300.0, val_tokens=2**22, held_out=1 / 8),
        Arena("demo", sequence_len=256, vocab_size=1024, budget=15.0, val_tokens=2**16, held_out=1 / 16,
              counted=True),
    )
}
DEFAULT_ARENA = "climbmix"


def find_arena(name: str) -> Arena:
    """An arena by its name, or the one of a folder by its path; UserError when there is none."""
    if name in ARENAS:
        return ARENAS[name]
    folder = Path(name).expanduser().resolve()
    if os.sep not in name or not folder.is_dir():
        choices = ", ".join(ARENAS)
        raise UserError(f"unknown arena {name!r}: choose one of {choices}, or a folder of your own, as in ./texts", 2)
    arena = replace(ARENAS["climbmix"], name=str(folder))
    made = load_manifest(arena).get("settings", {})
    return replace(arena, val_tokens=made.get("val_tokens", 2**20), held_out=made.get("held_out", 0.0))


def fail(reason: str, code: int = 1) -> NoReturn:
    """End the process with one line: the driver records it as the reason."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(code)


# -----------------------------------------------------------------------------
# Where the text comes from: for each split, the pieces that it consists of

Text = dict[str, list[Piece]]
SHARDS = 16     # of climbmix, unless said: 4 GB of text, and 1e9 tokens


def find_text(arena: Arena, shards: int, progress: Progress) -> Text:
    """Have the text of an arena on disk; UserError when it cannot be had."""
    if arena.is_folder:
        return own_text(arena)
    if arena.name == "climbmix":
        return climbmix(shards)
    if arena.name == "tinystories":
        return tinystories()
    return python_sources(arena, progress)


def climbmix(shards: int) -> Text:
    """The first shards for training; validation is the last one and the sealed set the last but one, always."""
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), 6542, 6541)]
    folder = cache() / "downloads" / "climbmix-400b-shuffle"
    download("karpathy/climbmix-400b-shuffle", names, folder, grow=1.5)
    *train, val, sealed = (text.cut_parquet(folder / name) for name in names)
    return {"train": [piece for shard in train for piece in shard], "val": val, "sealed": sealed}


def tinystories() -> Text:
    folder, name = cache() / "downloads" / "tinystories-gpt4-clean", "tinystories_gpt4_clean.parquet"
    download("karpathy/tinystories-gpt4-clean", [name], folder, grow=1.5)
    rows = {"sealed": (0, 10_000), "val": (10_000, 20_000), "train": (20_000, sys.maxsize)}
    return {split: text.cut_parquet(folder / name, *rows[split]) for split in SPLITS}


def own_files(arena: Arena) -> list[Path]:
    found = (path for path in Path(arena.name).rglob("*") if path.suffix in (".parquet", ".txt") and path.is_file())
    if not (files := sorted(found)):
        raise UserError(f"{arena.name} has no .parquet or .txt file")
    return files


def own_arena(arena: Arena) -> Arena:
    """Size the held-out sets by the text: a 32nd of it each, as a power of two, and drawn with some to spare."""
    size = sum(text.size_of(path) for path in own_files(arena))
    tokens = size / 4       # about, in a vocabulary of this size
    least = 64 * arena.sequence_len
    if tokens / 32 < least:
        needed = 32 * 4 * least / 1e6
        raise UserError(f"{arena.name} has {size / 1e6:.1f} MB of text, and an arena needs {needed:.0f} MB")
    val_tokens = min(2 ** int(math.log2(tokens / 32)), CLIMBMIX_VAL)
    return replace(arena, val_tokens=val_tokens, held_out=2 * val_tokens / tokens)


def own_text(arena: Arena) -> Text:
    """Each document is held out or not by a hash of itself, so that equal ones stay together."""
    files = own_files(arena)
    pieces = text.cut_txt(path for path in files if path.suffix == ".txt")
    pieces += [piece for path in files if path.suffix == ".parquet" for piece in text.cut_parquet(path)]
    h = arena.held_out
    shares = {"train": (2 * h, 1.0), "val": (0.0, h), "sealed": (h, 2 * h)}
    return {split: [replace(piece, share=shares[split]) for piece in pieces] for split in SPLITS}


def python_sources(arena: Arena, progress: Progress) -> Text:
    """The Python sources of this environment, the same on every machine with the same packages."""
    pieces = {}
    for split, documents in collect(arena, progress).items():
        path = arena.folder / f"{split}-{text.digest(documents)}.parquet"
        if not path.exists():
            with whole(path) as fresh:
                table = pyarrow.table({"text": documents})
                pq.write_table(table, fresh, row_group_size=2**12, compression="zstd")
        pieces[split] = text.cut_parquet(path)
    return pieces


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
    draw = text.draw(path)
    return "val" if draw < held_out else "sealed" if draw < 2 * held_out else "train"


def cut(source: str, size: int) -> Iterator[str]:
    """Cut a source file at blank lines, or between lines where there are none for long, into documents of at most
    `size` characters, so that most fit in a row whole; only a line can be longer."""
    document = ""
    blocks = re.split(r"(?<=\n\n)", source)
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
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):       # deliberately broken files are part of the standard library's tests
            continue
        split = documents[split_of(path.relative_to(root).as_posix(), arena.held_out)]
        for document in cut(source, size=2 * arena.sequence_len):
            if document not in seen:
                seen.add(document)
                split.append(document)
    return documents


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


def split_long(document: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Split a document into pieces of at most `width` tokens that each start with its BOS: one that never fits would be
    cropped and, worse, wait in the packer's buffer until nothing else is left in it."""
    if len(document) <= width:
        yield document
        return
    bos, rest = document[:1], document[1:]
    for start in range(0, len(rest), width - 1):
        yield np.concatenate([bos, rest[start : start + width - 1]])


class Documents:
    """The documents of some token files, by number; read from disk as they are asked for."""

    def __init__(self, folder: Path, stems: list[str]):
        self.tokens: list[np.ndarray] = []
        self.file: np.ndarray       # of each document
        self.start: np.ndarray
        self.stop: np.ndarray
        with reading():
            offsets = [np.load(folder / f"{stem}.npy") for stem in stems]
            for stem, ends in zip(stems, offsets, strict=True):
                path = folder / f"{stem}.bin"
                # np.asarray: slices of a plain array cost a third of slices of a memmap, which cannot be empty
                self.tokens.append(np.asarray(np.memmap(path, np.uint16, "r")) if ends[-1] else np.empty(0, np.uint16))
        self.file = np.repeat(np.arange(len(stems)), [len(ends) - 1 for ends in offsets])
        self.start = np.concatenate([ends[:-1] for ends in offsets])
        self.stop = np.concatenate([ends[1:] for ends in offsets])

    def shuffled(self, rng: np.random.Generator, width: int) -> Iterator[np.ndarray]:
        """Every document once, in an order of `rng`'s, cut to at most `width` tokens."""
        order = rng.permutation(len(self.file))
        for file, start, stop in zip(self.file[order], self.start[order], self.stop[order], strict=True):
            yield from split_long(self.tokens[file][start:stop], width)


def pack_rows(documents: Iterator[np.ndarray], rows: int, width: int) -> np.ndarray:
    """Pack documents into (rows, width) uint16 once and for all; UserError when they do not suffice."""
    packer = Packer(documents)
    packed = np.empty((rows, width), dtype=np.uint16)
    try:
        for row in packed:
            packer.fill(row)
    except StopIteration:
        raise UserError(f"too little held-out text for {rows} rows of {width} tokens: add more") from None
    return packed


# -----------------------------------------------------------------------------
# Making an arena. A file's name holds a hash of all that it depends on, and it is there whole or not at all: whatever
# stops the work, the next call does what is left, and a changed setting makes what it must and no more.

FORMAT = 2  # of the files below; another number makes them again


def settings(arena: Arena) -> dict[str, object]:
    """What the files depend on. The budget and the seed change nothing on disk."""
    facts = asdict(arena)
    return {"format": FORMAT, **{k: facts[k] for k in ("name", "sequence_len", "vocab_size", "val_tokens", "held_out")}}


def load_manifest(arena: Arena) -> dict:
    """The manifest as it stands, empty when there is none that can be read."""
    try:
        with reading():
            manifest = json.loads((arena.folder / "manifest.json").read_text())
        return manifest if isinstance(manifest, dict) else {}
    except PermissionError:
        raise
    except (OSError, ValueError):
        return {}


def read_manifest(arena: Arena) -> dict | None:
    """The manifest when every file it lists is there with its size and was made with today's settings, else None."""
    manifest = load_manifest(arena)
    try:
        whole = all((arena.folder / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items())
    except (OSError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PermissionError):
            raise
        return None
    return manifest if whole and manifest.get("settings") == settings(arena) else None


def prepare(arena: Arena, shards: int | None = None) -> dict:
    """Make the files of an arena unless they are there, and return the manifest. Two callers wait for each other.

    `shards` is for climbmix; None leaves what is there. UserError when the text cannot be had or does not suffice.
    """
    arena.folder.mkdir(parents=True, exist_ok=True)
    with locked(arena.folder.with_name(arena.folder.name + ".lock")):
        if arena.is_folder:
            arena = own_arena(arena)
        before = load_manifest(arena)
        source = find_source(arena, shards, before)
        for name in before.get("files", {}):
            if (arena.folder / name).exists() and describe(arena.folder / name) != before["files"][name]:
                (arena.folder / name).unlink()      # damaged, and trusted by its name if it stayed
        if read_manifest(arena) and before["source"] == source:
            print(f"{arena.name}: already prepared, nothing to do")
            return before
        return build(arena, source)


def find_source(arena: Arena, shards: int | None, before: dict) -> dict[str, object]:
    """What the text is taken from, as far as it can change."""
    if arena.is_folder:
        files = [(str(path), path.stat()) for path in own_files(arena)]
        return {"files": text.digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])}
    if arena.name == "climbmix":
        return {"shards": shards or before.get("source", {}).get("shards", SHARDS)}
    return {}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name to write to; the file gets its own when it is on disk."""
    fresh = path.with_name(path.name + ".new")
    yield fresh
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.replace(path)


def build(arena: Arena, source: dict) -> dict:
    """Make what is missing: the tokenizer, a token file and its offsets for each piece, val and sealed rows, and last
    the manifest, which names them all."""
    folder = arena.folder
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        pieces = find_text(arena, source.get("shards", 0), progress)
        tokenizer = make_tokenizer(arena, pieces["train"], progress)
        stems = {
            split: [f"{split}-{text.digest(FORMAT, tokenizer.name, piece.identity)}" for piece in pieces[split]]
            for split in SPLITS
        }
        pairs = (pair for split in SPLITS for pair in zip(stems[split], pieces[split], strict=True))
        jobs = {folder / stem: piece for stem, piece in pairs}
        there = {path.name for path in folder.iterdir()}
        missing = {stem: jobs[stem] for stem in jobs if not {f"{stem.name}.bin", f"{stem.name}.npy"} <= there}
        list(progress.track(text.tokenize(tokenizer, missing), total=len(missing), description="tokenize"))
        rows = {split: make_rows(arena, split, stems) for split in ("val", "sealed")}
    files = [tokenizer.name, *(f"{stem.name}{end}" for stem in jobs for end in (".bin", ".npy")), *rows.values()]
    texts = {Path(path).name for piece in jobs.values() for path in piece.paths if Path(path).parent == folder}
    described = {name: describe(folder / name) for name in sorted({*files, *texts})}
    manifest = {
        "settings": settings(arena),
        "source": source,
        # names the content, so that numbers from other files are never compared
        "data": text.digest([described[name]["sha256"] for name in files]),
        "tokenizer": tokenizer.name,
        "train": stems["train"],
        **rows,
        "tokens": {split: sum(described[f"{stem}.bin"]["bytes"] // 2 for stem in stems[split]) for split in SPLITS},
        "files": described,
    }
    with whole(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        if path.name not in described and path.name != "manifest.json":
            path.unlink()
    return manifest


def make_tokenizer(arena: Arena, pieces: list[Piece], progress: Progress) -> Path:
    """Train the tokenizer on the first pieces that hold enough text: later ones do not change it."""
    enough = pieces[: 2 * text.TRAIN_CHARACTERS // text.PIECE]
    path = arena.folder / f"tokenizer-{text.digest(FORMAT, arena.vocab_size, [p.identity for p in enough])}.json"
    if not path.exists():
        tracked = progress.track(enough, description="train the tokenizer")
        with whole(path) as fresh:
            documents = (document for piece in tracked for document in piece.documents())
            Tokenizer.train(documents, arena.vocab_size).save(fresh)
    return path


def make_rows(arena: Arena, split: str, stems: dict[str, list[str]]) -> str:
    """Pack the rows of a held-out split and store them, so that no batch size can drop or reorder them."""
    trained = stems["train"] if arena.held_out else []      # what the rows must not share a document with
    facts = (FORMAT, stems[split], trained, arena.val_tokens, arena.sequence_len)
    name = f"{split}-{text.digest(*facts)}-rows.npy"
    if not (arena.folder / name).exists():
        width, rng = arena.sequence_len + 1, np.random.default_rng(0)
        documents = list(Documents(arena.folder, stems[split]).shuffled(rng, width))
        if trained:     # whole documents differ, but long ones were split: two tables may share a row of zeros
            found = {document.tobytes() for document in documents}
            found.intersection_update(d.tobytes() for d in Documents(arena.folder, trained).shuffled(rng, width))
            documents = [document for document in documents if document.tobytes() not in found]
        with whole(arena.folder / name) as fresh, fresh.open("wb") as file:
            np.save(file, pack_rows(iter(documents), arena.val_rows, width))
    return name


def describe(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# -----------------------------------------------------------------------------
# The doors to the text: in a run that counts, train.py gets it from the loader, whose clock runs, or not at all

_readers = 0


@contextmanager
def reading() -> Iterator[None]:
    """While this file itself opens the arena's files."""
    global _readers
    _readers += 1
    try:
        yield
    finally:
        _readers -= 1


def guard(arena: Arena) -> None:
    """Refuse everybody else the files that an arena is made of, for the life of this process (PEP 578).

    It sees what Python opens. What a program in C opens, or another process, it does not: the sealed score shows that.
    """
    closed = [f"{folder.resolve()}{os.sep}" for folder in (arena.folder, cache() / "downloads", Path(arena.name))]
    closed = closed if arena.is_folder else closed[:2]

    def refuse(event: str, facts: tuple) -> None:
        if event == "open" and not _readers and isinstance(facts[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(facts[0]))
            if any(path.startswith(folder) for folder in closed):
                fail(f"train.py opened {Path(path).name} of the arena itself: text comes from the TrainLoader alone")

    sys.addaudithook(refuse)


# -----------------------------------------------------------------------------
# Training batches, and the clock


def arena_from_environment() -> Arena:
    """The arena and seed that the driver chose: AUTORESEARCH_ARENA and AUTORESEARCH_SEED."""
    name, seed = os.environ.get("AUTORESEARCH_ARENA", DEFAULT_ARENA), os.environ.get("AUTORESEARCH_SEED", "42")
    if not seed.isdecimal() or int(seed) >= 2**63:
        fail(f"AUTORESEARCH_SEED must be a whole number below 2**63, not {seed!r}")
    try:
        return replace(find_arena(name), seed=int(seed))
    except UserError as error:
        fail(f"AUTORESEARCH_ARENA: {error}", error.code)


ARENA = arena_from_environment()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache() / "compiled"))     # torch's own is lost with /tmp
if "AUTORESEARCH_TICKS" in os.environ:      # the driver is watching
    guard(ARENA)


class Work(TorchDispatchMode):
    """Counts what torch does, in seconds that a small CPU would take: 100 GFLOP/s in matrix products, 15 GB/s for what
    operators read and write, and 10 us for each.

    A CPU is shared, and a budget of 15 seconds of its time is 40 steps or 90, as its other work has it. Counted, the
    same program and seed takes the same steps on any machine. What torch does not see, as NumPy, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seconds += flops_of(func.overloadpacket.__name__, args, out) / 100e9
        if not func.is_view:
            self.seconds += 10e-6 + size_of((*args, *kwargs.values(), out)) / 15e9
        return out


def flops_of(name: str, args: tuple, out: object) -> int:
    """Of an operator of aten, as torch.utils.flop_counter has them. That would load Triton, which takes a third of a
    second, and fills the log after an error: the last line of it is the reason that a run failed."""
    if name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm"):
        return 2 * out.numel() * args[name in ("addmm", "baddbmm")].shape[-1]
    if name == "convolution":
        return 2 * (args[0] if args[6] else out).numel() * args[1][0].numel()       # 6: whether it is transposed
    if name == "convolution_backward":
        return 4 * (args[1] if args[7] else args[0]).numel() * args[2][0].numel()
    if name.startswith("_scaled_dot_product"):
        back = "backward" in name       # by five products, of which three are as wide as q
        q, k, v = args[1:4] if back else args[:3]
        width = 3 * q.shape[-1] + 2 * v.shape[-1] if back else q.shape[-1] + v.shape[-1]
        return 2 * q.numel() // q.shape[-1] * k.shape[-2] * width
    return 0


def size_of(values: Iterable[object]) -> int:
    """Bytes of all tensors among some values, and in lists of them."""
    return sum(v.nbytes if isinstance(v, torch.Tensor) else size_of(v) if isinstance(v, list | tuple) else 0
               for v in values)


class Clock:
    """The budget of this process. It starts when the first training text is read, by whichever door.

    To the driver, who has a clock of its own, its start is reported as `(`, each batch as `.` and the end of the budget
    as `)`, by way of a pipe (its number is in AUTORESEARCH_TICKS).
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.stopped: float | None = None
        self.seconds: float | None = None   # of training, once the budget is spent
        self.work = Work() if ARENA.counted else None
        self.loader: TrainLoader | None = None
        self.ticks = int(os.environ.get("AUTORESEARCH_TICKS", "-1"))

    def start(self) -> None:
        if self.started is None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.report(b"(")
            self.started = time.perf_counter()
            if self.work:
                self.work.__enter__()

    def elapsed(self) -> float:
        if self.seconds is not None:
            return self.seconds
        if self.started is None:
            return 0.0
        return self.work.seconds if self.work else time.perf_counter() - self.started

    def stop(self) -> None:
        if self.seconds is None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds, self.stopped = self.elapsed(), time.perf_counter()
            if self.work:
                self.work.__exit__(None, None, None)
            self.report(b")")

    def report(self, tick: bytes) -> None:
        if self.ticks >= 0:
            os.write(self.ticks, tick)


CLOCK = Clock()

# Dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets and white papers, by the driver's full name of a
# GPU: an L4 is no L40, and neither a laptop's chip nor a slice of a card (MIG) is the card. The GB10 is left out, for
# which NVIDIA gives no such figure.
PEAK_TFLOPS = {
    "B300 SXM6 AC": 2250.0, "B200": 2250.0, "GB200": 2500.0, "GB300": 2500.0,
    "GH200 480GB": 989.5, "GH200 144G HBM3e": 989.5, "H200": 989.5, "H200 NVL": 835.5, "H100 80GB HBM3": 989.5,
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H800": 989.5, "H20": 148.0,
    "A100-SXM4-40GB": 312.0, "A100-SXM4-80GB": 312.0, "A100-PCIE-40GB": 312.0, "A100 80GB PCIe": 312.0,
    "A800-SXM4-80GB": 312.0, "A800 80GB PCIe": 312.0, "A30": 165.0, "A40": 149.7, "A10": 125.0,
    "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8, "RTX 6000 Ada Generation": 364.2, "RTX A6000": 154.8,
    "GeForce RTX 5090": 209.5, "GeForce RTX 5080": 112.6, "GeForce RTX 5070 Ti": 87.9, "GeForce RTX 5070": 61.7,
    "GeForce RTX 4090": 165.2, "GeForce RTX 4090 D": 147.1, "GeForce RTX 4080": 97.5, "GeForce RTX 4070": 58.3,
    "GeForce RTX 4060": 30.2,
    "GeForce RTX 3090": 71.0, "GeForce RTX 3080": 59.5, "GeForce RTX 3070": 40.6, "GeForce RTX 3060": 25.5,
}


def peak_tflops(gpu: str) -> float | None:
    """What a GPU of that name can do at best; None for one that is not known."""
    return PEAK_TFLOPS.get(gpu.removeprefix("NVIDIA "))


class TrainLoader:
    """Batches of packed training text, for exactly the arena's budget of wall-clock seconds.

    Yields `(x, y)`, each int64 of shape (rows, T) on `device`; `rows` is one whole optimizer step, to be cut into
    micro-batches by the caller. The clock starts when the first batch is drawn and the loader stops yielding when
    the budget is spent, so compile and warm up before, on random tokens. A process has one loader. On a GPU the CPU
    is held at most two batches ahead, so that the clock reads what the GPU has done. The same seed gives the same rows.
    """

    AHEAD = 2

    def __init__(self, rows: int, device: str | torch.device):
        if rows < 1:
            raise ValueError(f"a batch needs at least one row, not {rows}")
        if CLOCK.loader is not None:
            fail("a second TrainLoader was opened, and a run has one: draw all batches from that")
        if (manifest := read_manifest(ARENA)) is None:
            fail(f"the arena {ARENA.name!r} is not prepared: run `uv run prepare.py --arena {ARENA.name}`")
        CLOCK.loader = self
        self.device = torch.device(device)
        self.packer = Packer(training_documents(ARENA, manifest["train"]))
        pinned = self.device.type == "cuda"
        shape = (rows, ARENA.sequence_len + 1)
        # a buffer is filled again only after the batch that used it was consumed
        self.buffers = [torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(self.AHEAD + 1)]
        self.consumed: list[torch.cuda.Event] = []
        self.steps = 0      # batches handed out

    @property
    def tokens(self) -> int:
        return self.steps * self.buffers[0].shape[0] * ARENA.sequence_len

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(self.elapsed() / ARENA.budget, 1.0)

    def elapsed(self) -> float:
        """Seconds of training so far."""
        return CLOCK.elapsed()

    def mfu_percent(self, flops_per_token: float) -> str:
        """Model FLOPs utilization so far, `n/a` where the GPU's peak is unknown."""
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return f"{100 * flops_per_token * self.tokens / self.elapsed() / (peak * 1e12):.2f}" if peak else "n/a"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.wait()
        if CLOCK.elapsed() >= ARENA.budget:
            CLOCK.stop()
            raise StopIteration
        buffer = self.buffers[self.steps % len(self.buffers)]
        for row in buffer.numpy():
            self.packer.fill(row)
        self.steps += 1
        CLOCK.report(b".")
        batch = buffer.to(self.device, non_blocking=True)
        return batch[:, :-1].clone(), batch[:, 1:].clone()     # the buffer is used again

    def wait(self) -> None:
        """Mark the work launched so far, and wait until at most AHEAD batches of it are unfinished."""
        if self.device.type == "cuda":
            self.consumed.append(torch.cuda.Event())
            self.consumed[-1].record()
            if len(self.consumed) >= self.AHEAD:
                self.consumed.pop(0).synchronize()


def training_documents(arena: Arena, stems: list[str]) -> Iterator[np.ndarray]:
    """Walk through the training documents without end, each epoch in an order of its own. This is the first door to the
    text, so it starts the clock."""
    documents, rng = Documents(arena.folder, stems), np.random.default_rng(arena.seed)
    CLOCK.start()
    while True:
        yield from documents.shuffled(rng, arena.sequence_len + 1)


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
def evaluate(model: Logits, rows: np.ndarray, device: torch.device) -> tuple[float, float]:
    """Bits per byte of `model` on packed rows (R, T+1): exact, and as upstream counts bytes.

    `model(x)` gets int64 tokens (B, T) alone and returns logits (B, T, V). The loss is taken here, in float32, and
    summed in float64 over the bytes of every target; special tokens are left out. SystemExit when the model is not
    causal, mixes rows, answers the same question differently, or gives no finite number. R is a multiple of B.
    """
    size = ARENA.eval_rows
    assert len(rows) % size == 0
    exact, upstream = (torch.tensor(lengths, device=device) for lengths in load_tokenizer().byte_lengths())
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


def load_tokenizer() -> Tokenizer:
    with reading():
        return Tokenizer.load(ARENA.folder / load_manifest(ARENA)["tokenizer"])


def load_rows(split: str) -> np.ndarray:
    """The packed rows of `val` or `sealed`, uint16 (val_rows, T+1)."""
    with reading():
        return np.load(ARENA.folder / load_manifest(ARENA)[split])


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
    """Evaluate the trained model, leave it to the referee and print the summary block; the last call of train.py.

    `model(x)` takes int64 tokens (B, T) and returns logits (B, T, V). `flops_per_token` is what one training token
    costs forward and backward, for MFU alone. Further facts are printed below the block's own lines. Steps, tokens,
    seconds and memory are counted here; SystemExit when the clock has not run out, a probe fails, or a model that
    would be kept cannot be exported.
    """
    loader.wait()
    if CLOCK.elapsed() < ARENA.budget:
        fail(f"finish was called {ARENA.budget - CLOCK.elapsed():.1f} s before the budget was spent")
    CLOCK.stop()
    model.eval()
    if (late := time.perf_counter() - CLOCK.stopped) > 2 + ARENA.budget / 100:
        fail(f"finish was called {late:.1f} s after the budget was spent")
    before, rows, start = checksums(model), load_rows("val"), time.perf_counter()
    val_bpb, val_bpb_upstream = evaluate(model, rows, loader.device)
    evaluation_seconds = time.perf_counter() - start
    if checksums(model) != before:
        fail("the model changed while it was scored")
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "val_bpb_upstream": f"{val_bpb_upstream:.6f}",
        "training_seconds": f"{CLOCK.seconds:.1f}",
        "total_seconds": "",
        "peak_vram_mb": f"{peak_memory_mb(loader.device):.1f}",
        "mfu_percent": loader.mfu_percent(flops_per_token),
        "total_tokens_M": f"{loader.tokens / 1e6:.3f}",
        "num_steps": loader.steps,
        "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f}",
        "depth": depth,
        "startup_seconds": f"{process_age() - (time.perf_counter() - CLOCK.started):.1f}",
        "evaluation_seconds": f"{evaluation_seconds:.1f}",
    }
    if repeated := summary.keys() & facts.keys():
        raise ValueError(f"finish prints {', '.join(sorted(repeated))} itself")
    if val_bpb <= float(os.environ.get("AUTORESEARCH_BAR", "-inf")):
        x = torch.from_numpy(rows[: ARENA.eval_rows, :-1].astype(np.int64)).to(loader.device)
        export(model, x, Path(os.environ["AUTORESEARCH_MODEL"]))
    summary["total_seconds"] = f"{process_age():.1f}"
    lines = [f"{name + ':':<17} {value}" for name, value in (summary | facts).items()]
    print("---", *lines, sep="\n", flush=True)


def checksums(model: torch.nn.Module) -> list[float]:
    return [tensor.sum(dtype=torch.float64).item() for tensor in model.state_dict().values()]   # no wide copy


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
# The referee's half: a model without its program


@torch.no_grad()
def export(model: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    """Write graph and weights of `model(x)` for x of this shape; SystemExit when torch.export cannot.

    torch.export.save would hold a copy of the weights while it writes them, which are gigabytes: so it gets the graph
    alone, with empty tensors in their places.
    """
    model = getattr(model, "_orig_mod", model)      # what torch.compile wrapped
    try:
        program, graph = torch.export.export(model, (x,)), io.BytesIO()
        # detached, since torch.save writes what a program hung on a parameter, which may be no tensor
        weights = {name: tensor.detach() for name, tensor in program.state_dict.items()}
        program.state_dict.update({name: hollow(tensor) for name, tensor in program.state_dict.items()})
        torch.export.save(program, graph)
        torch.save({"graph": torch.frombuffer(graph.getbuffer(), dtype=torch.uint8), "weights": weights}, path)
    except Exception as error:
        fail(f"the model cannot be exported, which the referee needs (torch.export): {brief(error)}")


def hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor or parameter of the same kind that holds nothing."""
    empty = torch.empty(0, dtype=tensor.dtype)
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """What `export` wrote, the weights mapped from the file into memory as they are needed."""
    parts = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    program = torch.export.load(io.BytesIO(parts["graph"].numpy()))
    for name, tensor in parts["weights"].items():
        parameter = isinstance(program.state_dict[name], torch.nn.Parameter)
        program.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    return program


def brief(error: Exception) -> str:
    """An exception in a line: those of torch are pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def judge() -> None:
    """Score the exported model on validation and sealed rows, and print the scores.

    The model lies at AUTORESEARCH_MODEL. SystemExit where there is none, and where its score is not the one that
    train.py printed (AUTORESEARCH_SCORE).
    """
    path, claimed = Path(os.environ["AUTORESEARCH_MODEL"]), float(os.environ["AUTORESEARCH_SCORE"])
    if not path.is_file():
        fail("it left no model to score: finish was not called, or not ours")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        importlib.import_module("torch.nn.attention.varlen")    # registers an operator that the graph may hold
    torch.set_float32_matmul_precision("high")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"   # a pickle would be a program
    try:
        program = load_exported(path)
    except Exception as error:
        fail(f"the exported model cannot be loaded: {brief(error)}")
    for node in program.graph.nodes:
        operator = isinstance(node.target, torch._ops.OperatorBase)
        if node.op == "call_function" and not operator and node.target.__module__ not in ("_operator", "math"):
            fail(f"the exported graph calls {node.target}, which is no operator")
    model = program.module().to(device)
    val_bpb, val_bpb_upstream = evaluate(model, load_rows("val"), device)
    if not abs(claimed - val_bpb) <= AGREE:
        fail(f"claims val_bpb {claimed:.6f}, and its model scores {val_bpb:.6f}")
    sealed_bpb, _ = evaluate(model, load_rows("sealed"), device)
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
        manifest = prepare(arena, options.shards)
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
