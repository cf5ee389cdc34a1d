"""Text to tokens: documents from files, and token files written by one process for each core.

python -m gpt.text < job.json what such a process runs; nothing here imports torch, so it starts
fast
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as pq

from autoresearch.files import UserError, one_line
from gpt.tokenizer import Tokenizer, digest

# -----------------------------------------------------------------------------
# Documents


@dataclass(frozen=True)
class Piece:
    """A part of the text, as much as one process takes at a time: some rows of a .parquet file or
    whole .txt files, and of their documents the share whose hash falls into [low, high)."""

    paths: tuple[str, ...]
    rows: tuple[int, int] | None = None
    share: tuple[float, float] = (0.0, 1.0)

    @property
    def identity(self) -> str:
        """Changes with the files: their names, sizes and times."""
        stats = [(Path(path).name, Path(path).stat()) for path in self.paths]
        return digest(
            [(name, s.st_size, s.st_mtime_ns) for name, s in stats], self.rows, self.share
        )

    def documents(self) -> Iterator[str]:
        for path in self.paths:
            if path.endswith(".txt"):
                found = read_txt(Path(path))
            else:
                found = read_parquet(Path(path), *(self.rows or (0, sys.maxsize)))
            if self.share == (0.0, 1.0):
                yield from filter(str.strip, found)
            else:
                low, high = self.share
                yield from (
                    document
                    for document in found
                    if document.strip() and low <= draw(document) < high
                )


def draw(text: str) -> float:
    """A number in [0, 1) that a text always draws: equal documents end up in the same split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


BATCH = 256  # rows of a parquet file in memory at a time


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {one_line(str(error))}") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, but {', '.join(file.schema_arrow.names)}")
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"the column `text` of {path} holds {kind}, and not strings")
    return file


def read_parquet(path: Path, start: int, stop: int) -> Iterator[str]:
    """The column `text` of the rows in [start, stop), a batch at a time."""
    with open_parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if first < stop and first + size > start:
                for batch in file.iter_batches(
                    BATCH, row_groups=[group], columns=["text"], use_threads=False
                ):
                    low, high = max(start - first, 0), min(stop - first, len(batch))
                    if low < high:
                        yield from filter(None, batch.column(0).slice(low, high - low).to_pylist())
                    first += len(batch)
            else:
                first += size


SECTION = (
    2**14
)  # characters: a longer .txt file becomes several documents, so that some of it can be held out


def read_txt(path: Path) -> Iterator[str]:
    """A .txt file as one document, or as sections that end at a blank line, or a line, if there is
    one."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rest = ""
            while block := file.read(SECTION):
                rest += block
                while len(rest) > SECTION:
                    end = max(rest.rfind("\n\n", 1, SECTION) + 2, 2)
                    end = end if end > 2 else rest.rfind("\n", 1, SECTION) + 1 or SECTION
                    yield rest[:end]
                    rest = rest[end:]
            yield rest
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert or remove it"
        ) from None


def size_of(path: Path) -> int:
    """Bytes of text in a file, before any compression."""
    if path.suffix == ".txt":
        return path.stat().st_size
    with open_parquet(path) as file:
        column = file.schema_arrow.names.index("text")
        groups = range(file.num_row_groups)
        return sum(
            file.metadata.row_group(group).column(column).total_uncompressed_size
            for group in groups
        )


PIECE = 16_000_000  # bytes of text, some seconds of one core


def cut_parquet(path: Path, start: int = 0, stop: int = sys.maxsize) -> list[Piece]:
    """Cut rows of a .parquet file into pieces at row groups: those are read as a whole anyway."""
    cuts, size, row = [start], 0, 0
    with open_parquet(path) as file:
        column = file.schema_arrow.names.index("text")
        stop = min(stop, file.metadata.num_rows)
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            row += group.num_rows
            size += group.column(column).total_uncompressed_size if row > start else 0
            if size >= PIECE and row < stop:
                cuts.append(row)
                size = 0
    return [Piece((str(path),), rows) for rows in zip(cuts, [*cuts[1:], stop], strict=True)]


def cut_txt(paths: Iterable[Path]) -> list[Piece]:
    """Bundle small .txt files; a large one is a piece of its own."""
    pieces: list[Piece] = []
    bundle: list[str] = []
    size = 0
    for path in paths:
        bundle.append(str(path))
        size += path.stat().st_size
        if size >= PIECE:
            pieces.append(Piece(tuple(bundle)))
            bundle, size = [], 0
    return [*pieces, Piece(tuple(bundle))] if bundle else pieces


# -----------------------------------------------------------------------------
# Token files: for a stem, stem.bin with uint16 ids and then stem.npy with where each document
# starts, and the end


def tokenize(tokenizer: Path, jobs: dict[Path, Piece]) -> Iterator[Path]:
    """Write the token files of each stem, one process for each core; yields a stem when it is done.

    Memory is bounded by the batches that the processes hold. A file is there whole or not at all.
    """

    def work(stem: Path, piece: Piece) -> Path:
        job = json.dumps({"tokenizer": str(tokenizer), "stem": str(stem), "piece": asdict(piece)})
        command = [sys.executable, "-m", "gpt.text"]
        here = Path(__file__).resolve().parent.parent
        done = subprocess.run(
            command, cwd=here, input=job, capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"tokenizing failed: {lines[-1].removeprefix('error: ')}")
        return stem

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield from pool.map(work, *zip(*jobs.items(), strict=True)) if jobs else ()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_tokens(tokenizer: Tokenizer, piece: Piece, stem: Path) -> None:
    fresh = stem.with_name(f"{stem.name}.{os.getpid()}.new")
    lengths = [0]
    documents = piece.documents()
    with fresh.open("wb") as file:
        while batch := list(islice(documents, BATCH)):
            encoded = [tokenizer.encode(document) for document in batch]
            lengths += map(len, encoded)
            np.concatenate(encoded).tofile(file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(stem.with_suffix(".bin"))
    with fresh.open("wb") as file:
        np.save(file, np.cumsum(lengths, dtype=np.int64))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(stem.with_suffix(".npy"))


def main() -> int:
    job = json.load(sys.stdin)
    piece = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in job["piece"].items()
    }
    try:
        write_tokens(Tokenizer.load(Path(job["tokenizer"])), Piece(**piece), Path(job["stem"]))
    except (UserError, OSError, pyarrow.ArrowException) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
