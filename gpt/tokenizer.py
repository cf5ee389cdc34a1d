"""The tokenizer: trained by rustbpe, run by tiktoken, kept as JSON."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from autoresearch.files import UserError

# They come after the ordinary tokens; BOS is the first of them.
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>")
# GPT-4's split, but numbers in groups of one or two digits: a small vocabulary has no room for a
# thousand triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TRAIN_CHARACTERS = 1_000_000_000  # that the tokenizer is trained on, at most
TRAIN_DOCUMENT = (
    10_000  # characters of each document for that: no single one shall shape the vocabulary
)
SLICE = 100_000  # characters encoded at a time: the regular expression gives up on a million blanks


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
        """Train on the start of each document, until TRAIN_CHARACTERS; UserError when the text is
        too short."""
        import rustbpe  # which no run needs

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(
            excerpts(documents), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN
        )
        ranks = sorted((rank, bytes(token)) for token, rank in bpe.get_mergeable_ranks())
        if len(ranks) + len(SPECIAL_TOKENS) != vocab_size:
            raise UserError(f"too little text for a vocabulary of {vocab_size} tokens: add more")
        return cls([token for _, token in ranks], SPLIT_PATTERN)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        stored = json.loads(path.read_text())
        return cls([base64.b64decode(token) for token in stored["tokens"]], stored["pattern"])

    def save(self, path: Path) -> None:
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        path.write_text(
            json.dumps({"pattern": self.pattern, "special": SPECIAL_TOKENS, "tokens": tokens})
        )

    def encode(self, document: str) -> np.ndarray:
        """Encode a document into uint16 ids that start with BOS."""
        slices = [document[start : start + SLICE] for start in range(0, len(document), SLICE)]
        ids = [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in slices]
        return np.concatenate([[self.bos], *ids]).astype(np.uint16)

    def byte_lengths(self) -> tuple[list[int], list[int]]:
        """Bytes of each token, exact and as upstream counts them (a token that is not UTF-8 by
        itself reads as U+FFFD, 3 bytes for each replacement). Special tokens have none."""
        exact = [len(token) for token in self.tokens]
        upstream = [len(token.decode("utf-8", errors="replace").encode()) for token in self.tokens]
        none = [0] * len(SPECIAL_TOKENS)
        return exact + none, upstream + none


def excerpts(documents: Iterable[str]) -> Iterator[str]:
    left = TRAIN_CHARACTERS
    for document in documents:
        excerpt = document[: min(TRAIN_DOCUMENT, left)]
        left -= len(excerpt)
        yield excerpt
        if not left:
            return


def digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
