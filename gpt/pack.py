"""Packing: rows that start with BOS and hold no padding."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from autoresearch.files import UserError


class Packer:
    """Fills rows from a stream of documents: the largest that fits goes in, else the shortest is
    cropped.

    The idea is upstream's best-fit packing. Each document starts with BOS, so each row does too.
    """

    BUFFER = 1000  # documents to choose from

    def __init__(self, documents: Iterator[np.ndarray]):
        self.documents = documents
        self.lengths: list[int] = []  # sorted
        self.waiting: list[np.ndarray] = []  # in the same order

    def fill(self, row: np.ndarray) -> None:
        """Write a whole row in place; StopIteration when the stream has run dry."""
        start = 0
        while start < len(row):
            document = self.take(len(row) - start)
            row[start : start + len(document)] = document
            start += len(document)

    def take(self, space: int) -> np.ndarray:
        while (
            len(self.waiting) < self.BUFFER and (document := next(self.documents, None)) is not None
        ):
            i = bisect_right(self.lengths, len(document))
            self.lengths.insert(i, len(document))
            self.waiting.insert(i, document)
        if not self.waiting:
            raise StopIteration
        i = max(bisect_right(self.lengths, space) - 1, 0)
        self.lengths.pop(i)
        return self.waiting.pop(i)[:space]


def split_long(document: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Split a document into pieces of at most `width` tokens that each start with its BOS: one that
    never fits would be cropped and, worse, wait in the packer's buffer until nothing else is left
    in it."""
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
        self.file: np.ndarray  # of each document
        self.start: np.ndarray
        self.stop: np.ndarray
        offsets = [np.load(folder / f"{stem}.npy") for stem in stems]
        for stem, ends in zip(stems, offsets, strict=True):
            path = folder / f"{stem}.bin"
            # slices of a plain array cost a third of slices of a memmap, which cannot be empty
            empty = np.empty(0, np.uint16)
            self.tokens.append(np.asarray(np.memmap(path, np.uint16, "r")) if ends[-1] else empty)
        self.file = np.repeat(np.arange(len(stems)), [len(ends) - 1 for ends in offsets])
        self.start = np.concatenate([ends[:-1] for ends in offsets])
        self.stop = np.concatenate([ends[1:] for ends in offsets])

    def shuffled(self, rng: np.random.Generator, width: int) -> Iterator[np.ndarray]:
        """Every document once, in an order of `rng`'s, cut to at most `width` tokens."""
        order = rng.permutation(len(self.file))
        for file, start, stop in zip(
            self.file[order], self.start[order], self.stop[order], strict=True
        ):
            yield from split_long(self.tokens[file][start:stop], width)


def pack_rows(documents: Iterator[np.ndarray], rows: int, width: int) -> np.ndarray:
    """Pack documents into (rows, width) uint16; UserError when they do not suffice."""
    packer = Packer(documents)
    packed = np.empty((rows, width), dtype=np.uint16)
    try:
        for row in packed:
            packer.fill(row)
    except StopIteration:
        raise UserError(
            f"too little held-out text for {rows} rows of {width} tokens: add more"
        ) from None
    return packed
