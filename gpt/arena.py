"""The arenas: the facts of each contest, and the manifest of its files."""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from autoresearch.files import UserError, cache
from gpt.tokenizer import SPECIAL_TOKENS, digest

SPLITS = ("train", "val", "sealed")
SHARDS = 16  # of climbmix, unless said: 4 GB of text, and 1e9 tokens
CLIMBMIX_VAL = 40 * 2**19  # tokens, as upstream scores


@dataclass(frozen=True)
class Arena:
    """One fixed contest: experiments compare when they ran in the same arena, and only then."""

    name: str
    sequence_len: int  # T, tokens in a row
    vocab_size: int  # V, special tokens included
    budget: float  # seconds of training
    val_tokens: int  # scored validation tokens; as many again are sealed
    held_out: float = (
        0.0  # share of the text that is drawn for validation, and as much for the sealed set
    )
    counted: bool = (
        False  # whether the budget is counted work (see Work), and not seconds of wall clock
    )
    seed: int = (
        42  # order of the training text and the model's start; the driver's, never the agent's
    )

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
        return cache() / (
            f"{Path(self.name).name}-{digest(self.name)}" if self.is_folder else self.name
        )


ARENAS = {
    arena.name: arena
    for arena in (
        Arena(
            "climbmix", sequence_len=2048, vocab_size=8192, budget=300.0, val_tokens=CLIMBMIX_VAL
        ),
        Arena("tinystories", sequence_len=512, vocab_size=4096, budget=300.0, val_tokens=2**20),
        Arena(
            "python",
            sequence_len=2048,
            vocab_size=8192,
            budget=300.0,
            val_tokens=2**22,
            held_out=1 / 8,
        ),
        Arena(
            "demo",
            sequence_len=256,
            vocab_size=1024,
            budget=15.0,
            val_tokens=2**16,
            held_out=1 / 16,
            counted=True,
        ),
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
        raise UserError(
            f"unknown arena {name!r}: choose one of {choices}, or a folder of your own, as ./texts",
            2,
        )
    arena = replace(ARENAS["climbmix"], name=str(folder))
    made = load_manifest(arena).get("settings", {})
    return replace(
        arena, val_tokens=made.get("val_tokens", 2**20), held_out=made.get("held_out", 0.0)
    )


def fail(reason: str, code: int = 1) -> NoReturn:
    """End the process with one line: the driver records it as the reason."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(code)


FORMAT = 2  # of an arena's files; another number makes them again
Manifest = dict[str, Any]


def settings(arena: Arena) -> dict[str, object]:
    """What the files depend on. The budget and the seed change nothing on disk."""
    facts = asdict(arena)
    return {
        "format": FORMAT,
        **{k: facts[k] for k in ("name", "sequence_len", "vocab_size", "val_tokens", "held_out")},
    }


def load_manifest(arena: Arena) -> Manifest:
    """The manifest as it stands, empty when there is none that can be read."""
    try:
        manifest = json.loads((arena.folder / "manifest.json").read_text())
        return manifest if isinstance(manifest, dict) else {}
    except PermissionError:
        raise
    except (OSError, ValueError):
        return {}


def read_manifest(arena: Arena) -> Manifest | None:
    """The manifest, if every file it lists is there with its size and was made with these settings;
    else None."""
    manifest = load_manifest(arena)
    try:
        whole = all(
            (arena.folder / name).stat().st_size == file["bytes"]
            for name, file in manifest["files"].items()
        )
    except (OSError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PermissionError):
            raise
        return None
    return manifest if whole and manifest.get("settings") == settings(arena) else None


def describe(path: Path) -> Manifest:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def from_environment() -> Arena:
    """The arena and seed that the driver chose: AUTORESEARCH_ARENA and AUTORESEARCH_SEED."""
    name = os.environ.get("AUTORESEARCH_ARENA", DEFAULT_ARENA)
    seed = os.environ.get("AUTORESEARCH_SEED", "42")
    if not seed.isdecimal() or int(seed) >= 2**63:
        raise UserError(f"AUTORESEARCH_SEED must be a whole number below 2**63, not {seed!r}")
    try:
        return replace(find_arena(name), seed=int(seed))
    except UserError as error:
        raise UserError(f"AUTORESEARCH_ARENA: {error}", error.code) from None
