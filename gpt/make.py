"""Making an arena: text, tokenizer, token files, held-out rows, and the manifest that names them.

A file's name holds a hash of all that it depends on, and it is there whole or not at all: whatever
stops the work, the next call does what is left, and a changed setting makes what it must and no
more.
"""

import fcntl
import json
import math
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoresearch.files import UserError, cache
from gpt import text
from gpt.arena import (
    CLIMBMIX_VAL,
    FORMAT,
    SHARDS,
    SPLITS,
    Arena,
    Manifest,
    describe,
    load_manifest,
    read_manifest,
    settings,
)
from gpt.download import download
from gpt.pack import Documents, pack_rows
from gpt.text import Piece
from gpt.tokenizer import TRAIN_CHARACTERS, Tokenizer, digest

# -----------------------------------------------------------------------------
# Where the text comes from: for each split, the pieces that it consists of

Text = dict[str, list[Piece]]


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
    """The first shards for training; validation is the last one and the sealed set the last but
    one, always."""
    names = [f"shard_{i:05d}.parquet" for i in (*range(shards), 6542, 6541)]
    folder = cache() / "downloads" / "climbmix-400b-shuffle"
    download("karpathy/climbmix-400b-shuffle", names, folder, grow=1.5)
    *train, val, sealed = (text.cut_parquet(folder / name) for name in names)
    return {"train": [piece for shard in train for piece in shard], "val": val, "sealed": sealed}


def tinystories() -> Text:
    folder, name = (
        cache() / "downloads" / "tinystories-gpt4-clean",
        "tinystories_gpt4_clean.parquet",
    )
    download("karpathy/tinystories-gpt4-clean", [name], folder, grow=1.5)
    rows = {"sealed": (0, 10_000), "val": (10_000, 20_000), "train": (20_000, sys.maxsize)}
    return {split: text.cut_parquet(folder / name, *rows[split]) for split in SPLITS}


def own_files(arena: Arena) -> list[Path]:
    found = (
        path
        for path in Path(arena.name).rglob("*")
        if path.suffix in (".parquet", ".txt") and path.is_file()
    )
    if not (files := sorted(found)):
        raise UserError(f"{arena.name} has no .parquet or .txt file")
    return files


def own_arena(arena: Arena) -> Arena:
    """Size the held-out sets by the text: a 32nd of it each, as a power of two, and drawn with some
    to spare."""
    size = sum(text.size_of(path) for path in own_files(arena))
    tokens = size / 4  # about, in a vocabulary of this size
    least = 64 * arena.sequence_len
    if tokens / 32 < least:
        needed = 32 * 4 * least / 1e6
        raise UserError(
            f"{arena.name} has {size / 1e6:.1f} MB of text, and an arena needs {needed:.0f} MB"
        )
    val_tokens = min(2 ** int(math.log2(tokens / 32)), CLIMBMIX_VAL)
    return replace(arena, val_tokens=val_tokens, held_out=2 * val_tokens / tokens)


def own_text(arena: Arena) -> Text:
    """Each document is held out or not by a hash of itself, so that equal ones stay together."""
    files = own_files(arena)
    pieces = text.cut_txt(path for path in files if path.suffix == ".txt")
    pieces += [
        piece for path in files if path.suffix == ".parquet" for piece in text.cut_parquet(path)
    ]
    h = arena.held_out
    shares = {"train": (2 * h, 1.0), "val": (0.0, h), "sealed": (h, 2 * h)}
    return {split: [replace(piece, share=shares[split]) for piece in pieces] for split in SPLITS}


def python_sources(arena: Arena, progress: Progress) -> Text:
    """The Python sources of this environment, the same on every machine with the same packages."""
    pieces = {}
    for split, documents in collect(arena, progress).items():
        path = arena.folder / f"{split}-{digest(documents)}.parquet"
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
    """Every .py file under a root, sorted; without packages that were installed into the standard
    library's folder."""
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(
        p for p in root.rglob("*.py") if not foreign.intersection(p.relative_to(root).parts)
    )


def split_of(path: str, held_out: float) -> str:
    """Assign a file to train, val or sealed by a hash of its path: other files change nothing."""
    draw = text.draw(path)
    return "val" if draw < held_out else "sealed" if draw < 2 * held_out else "train"


def cut(source: str, size: int) -> Iterator[str]:
    """Cut a source file at blank lines, or between lines where there are none for long, into
    documents of at most `size` characters, so that most fit in a row whole; only a line can be
    longer."""
    document = ""
    blocks = re.split(r"(?<=\n\n)", source)
    for block in (
        part for b in blocks for part in (b.splitlines(keepends=True) if len(b) > size else [b])
    ):
        if document and len(document) + len(block) > size:
            yield document
            document = ""
        document += block
    if document.strip():
        yield document


def collect(arena: Arena, progress: Progress) -> dict[str, list[str]]:
    """Read the documents of each split. Text seen before is dropped, so that no two splits share a
    document."""
    files = [(root, path) for root in source_roots(arena) for path in source_files(root)]
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for root, path in progress.track(files, description="read sources"):
        try:
            source = path.read_text(encoding="utf-8")
        except (
            UnicodeDecodeError,
            OSError,
        ):  # deliberately broken files are part of the standard library's tests
            continue
        split = documents[split_of(path.relative_to(root).as_posix(), arena.held_out)]
        for document in cut(source, size=2 * arena.sequence_len):
            if document not in seen:
                seen.add(document)
                split.append(document)
    return documents


# -----------------------------------------------------------------------------
# The files


def prepare(arena: Arena, shards: int | None = None) -> Manifest:
    """Make the files of an arena unless they are there, and return the manifest. Two callers wait
    for each other.

    `shards` is for climbmix; None leaves what is there. UserError when the text cannot be had or
    does not suffice.
    """
    arena.folder.mkdir(parents=True, exist_ok=True)
    with locked(arena.folder.with_name(arena.folder.name + ".lock")):
        if arena.is_folder:
            arena = own_arena(arena)
        before = load_manifest(arena)
        source = find_source(arena, shards, before)
        for name in before.get("files", {}):
            if (arena.folder / name).exists() and describe(arena.folder / name) != before["files"][
                name
            ]:
                (arena.folder / name).unlink()  # damaged, and trusted by its name if it stayed
        if read_manifest(arena) and before["source"] == source:
            print(f"{arena.name}: already prepared, nothing to do")
            return before
        return build(arena, source)


def find_source(arena: Arena, shards: int | None, before: Manifest) -> dict[str, object]:
    """What the text is taken from, as far as it can change."""
    if arena.is_folder:
        files = [(str(path), path.stat()) for path in own_files(arena)]
        return {"files": digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])}
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


def build(arena: Arena, source: Manifest) -> Manifest:
    """Make what is missing: the tokenizer, a token file and its offsets for each piece, val and
    sealed rows, and last the manifest, which names them all."""
    folder = arena.folder
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        pieces = find_text(arena, source.get("shards", 0), progress)
        tokenizer = make_tokenizer(arena, pieces["train"], progress)
        stems = {
            split: [
                f"{split}-{digest(FORMAT, tokenizer.name, piece.identity)}"
                for piece in pieces[split]
            ]
            for split in SPLITS
        }
        pairs = (pair for split in SPLITS for pair in zip(stems[split], pieces[split], strict=True))
        jobs = {folder / stem: piece for stem, piece in pairs}
        there = {path.name for path in folder.iterdir()}
        missing = {
            stem: jobs[stem]
            for stem in jobs
            if not {f"{stem.name}.bin", f"{stem.name}.npy"} <= there
        }
        list(
            progress.track(
                text.tokenize(tokenizer, missing), total=len(missing), description="tokenize"
            )
        )
        rows = {split: make_rows(arena, split, stems) for split in ("val", "sealed")}
    files = [
        tokenizer.name,
        *(f"{stem.name}{end}" for stem in jobs for end in (".bin", ".npy")),
        *rows.values(),
    ]
    texts = {
        Path(path).name
        for piece in jobs.values()
        for path in piece.paths
        if Path(path).parent == folder
    }
    described = {name: describe(folder / name) for name in sorted({*files, *texts})}
    manifest = {
        "settings": settings(arena),
        "source": source,
        # names the content, so that numbers from other files are never compared
        "data": digest([described[name]["sha256"] for name in files]),
        "tokenizer": tokenizer.name,
        "train": stems["train"],
        **rows,
        "tokens": {
            split: sum(described[f"{stem}.bin"]["bytes"] // 2 for stem in stems[split])
            for split in SPLITS
        },
        "files": described,
    }
    with whole(folder / "manifest.json") as path:
        path.write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        if path.name not in described and path.name != "manifest.json":
            path.unlink()
    return manifest


def make_tokenizer(arena: Arena, pieces: list[Piece], progress: Progress) -> Path:
    """Train the tokenizer on the first pieces that hold enough text: others do not change it."""
    enough = pieces[: 2 * TRAIN_CHARACTERS // text.PIECE]
    path = (
        arena.folder
        / f"tokenizer-{digest(FORMAT, arena.vocab_size, [p.identity for p in enough])}.json"
    )
    if not path.exists():
        tracked = progress.track(enough, description="train the tokenizer")
        with whole(path) as fresh:
            documents = (document for piece in tracked for document in piece.documents())
            Tokenizer.train(documents, arena.vocab_size).save(fresh)
    return path


def make_rows(arena: Arena, split: str, stems: dict[str, list[str]]) -> str:
    """Pack the rows of a held-out split and store them: no batch size can drop or reorder them."""
    trained = (
        stems["train"] if arena.held_out else []
    )  # what the rows must not share a document with
    facts = (FORMAT, stems[split], trained, arena.val_tokens, arena.sequence_len)
    name = f"{split}-{digest(*facts)}-rows.npy"
    if not (arena.folder / name).exists():
        width, rng = arena.sequence_len + 1, np.random.default_rng(0)
        documents = list(Documents(arena.folder, stems[split]).shuffled(rng, width))
        if (
            trained
        ):  # whole documents differ, but long ones were split: two tables may share a row of zeros
            found = {document.tobytes() for document in documents}
            found.intersection_update(
                d.tobytes() for d in Documents(arena.folder, trained).shuffled(rng, width)
            )
            documents = [document for document in documents if document.tobytes() not in found]
        with whole(arena.folder / name) as fresh, fresh.open("wb") as file:
            np.save(file, pack_rows(iter(documents), arena.val_rows, width))
    return name
