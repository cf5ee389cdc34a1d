"""Text of one's own: what is read from .parquet and .txt files, how it is cut and held out, and what is refused."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoresearch.files import UserError
from gpt import arena as arenas
from gpt import make, pack, text
from gpt import tokenizer as tokens
from gpt.tokenizer import Tokenizer


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(300)]
    return [f"{seed}/{i} {' '.join(rng.choices(words, k=30))}\n" for i in range(count)]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, in arenas of rows of 16 tokens."""
    shape = arenas.Arena("climbmix", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=2**12)
    monkeypatch.setitem(arenas.ARENAS, "climbmix", shape)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text, "PIECE", 50_000)
    (tmp_path / "texts/more").mkdir(parents=True)
    return tmp_path / "texts"


def all_documents(arena: arenas.Arena, manifest: dict) -> dict[str, list[str]]:
    """The documents of each split, read back from the token files."""
    tokenizer = Tokenizer.load(arena.folder / manifest["tokenizer"])
    found: dict[str, list[str]] = {}
    for split in arenas.SPLITS:
        names = sorted(
            name for name in manifest["files"] if name.startswith(split) and name.endswith(".bin")
        )
        documents = pack.Documents(arena.folder, [name.removesuffix(".bin") for name in names])
        spans = zip(documents.file, documents.start, documents.stop, strict=True)
        found[split] = [
            tokenizer.encoding.decode(documents.tokens[f][a + 1 : b].tolist()) for f, a, b in spans
        ]
    return found


def test_a_folder_of_ones_own(small: Path) -> None:
    """Parquet and text files, in folders below too: no document is lost, none is in two splits, equal ones together."""
    lines = sentences(3000)
    pq.write_table(
        pa.table({"n": range(2000), "text": lines[:2000]}), small / "a.parquet", row_group_size=300
    )
    pq.write_table(
        pa.table({"text": [*lines[1500:2500], None, "", "  "]}), small / "more/b.parquet"
    )
    for i, line in enumerate(lines[2500:]):
        (small / f"more/{i}.txt").write_text(line)
    (small / "notes.md").write_text("not text of the arena")
    arena = arenas.find_arena(str(small))
    manifest = make.prepare(arena)
    assert arenas.find_arena(str(small)) == make.own_arena(arena)  # what train.py sees
    found = all_documents(arena, manifest)
    assert sorted(line for lines in found.values() for line in lines) == sorted(
        [*lines, *lines[1500:2000]]
    )
    assert not set(found["train"]) & set(found["val"]) and not set(found["val"]) & set(
        found["sealed"]
    )
    rows = manifest["settings"]["val_tokens"] // 16
    for split in ("val", "sealed"):
        assert np.load(arena.folder / manifest[split]).shape == (rows, 17)
        assert 0.03 < len(found[split]) / 3500 < 0.2
    assert len(manifest["train"]) > 3  # several processes had work


def test_a_changed_folder_is_noticed(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(400):
        (small / f"{i}.txt").write_text("\n".join(sentences(6, i)))
    arena = arenas.find_arena(str(small))
    before = make.prepare(arena)
    assert make.prepare(arenas.find_arena(str(small))) == before
    assert "nothing to do" in capsys.readouterr().out
    (small / "400.txt").write_text("\n".join(sentences(6, 400)))
    after = make.prepare(arenas.find_arena(str(small)))
    assert after["data"] != before["data"]
    found = all_documents(arenas.find_arena(str(small)), after)
    assert sum("400/5 " in document for documents in found.values() for document in documents) == 1


def test_shards_of_climbmix(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards leave tokenizer, validation and what was tokenized alone; a later call need not be told of them."""
    folder = tmp_path / "cache/downloads/climbmix-400b-shuffle"
    folder.mkdir(parents=True)
    for i in (0, 1, 2, 6541, 6542):
        pq.write_table(pa.table({"text": sentences(400, i)}), folder / f"shard_{i:05d}.parquet")
    for module in (make, tokens):
        monkeypatch.setattr(module, "TRAIN_CHARACTERS", 40_000)
    arena = arenas.find_arena("climbmix")
    two = make.prepare(arena, shards=2)
    three = make.prepare(arena, shards=3)
    assert [three[role] for role in ("tokenizer", "val", "sealed")] == [
        two[role] for role in ("tokenizer", "val", "sealed")
    ]
    assert two["train"] == three["train"][: len(two["train"])] and len(three["train"]) > len(
        two["train"]
    )
    assert make.prepare(arena) == three and make.prepare(arena, shards=2) == two
    found = all_documents(arena, two)
    assert all(document.startswith("6542/") for document in found["val"])
    assert all(document.startswith("6541/") for document in found["sealed"])


def test_a_large_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    original = "\n\n".join("".join(sentences(20, i)) for i in range(100)) + "a long line " * 20_000
    (tmp_path / "a.txt").write_text(original)
    sections = list(text.read_txt(tmp_path / "a.txt"))
    assert (
        "".join(sections) == original
        and max(map(len, sections)) <= text.SECTION
        and len(sections) > 5
    )
    assert sections[0].endswith("\n\n")


def test_rows_of_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into pieces at any rows, every row is read once and in order."""
    lines = sentences(1000)
    pq.write_table(pa.table({"text": lines}), tmp_path / "a.parquet", row_group_size=90)
    monkeypatch.setattr(text, "PIECE", 20_000)
    for start, stop in ((0, 10**9), (100, 200), (0, 1), (999, 1000), (95, 640)):
        pieces = text.cut_parquet(tmp_path / "a.parquet", start, stop)
        assert [line for piece in pieces for line in piece.documents()] == lines[start:stop]
    assert len(text.cut_parquet(tmp_path / "a.parquet")) > 3


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        make.prepare(arenas.find_arena(str(folder)))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_refused(small: Path) -> None:
    assert refusal(small / "nowhere").startswith("unknown arena")
    assert refusal(small) == f"{small} has no .parquet or .txt file"
    (small / "a.txt").write_text("short")
    assert "MB of text, and an arena needs" in refusal(small)
    (small / "b.txt").write_bytes("".join(sentences(2000)).encode() + b"\xff")
    assert f"{small}/b.txt is not UTF-8 text" in refusal(small)
    (small / "b.txt").unlink()
    (small / "c.parquet").write_bytes(b"PAR1")
    assert f"{small}/c.parquet cannot be read as parquet" in refusal(small)
    pq.write_table(pa.table({"content": ["a"]}), small / "c.parquet")
    assert refusal(small) == f"{small}/c.parquet has no column `text`, but content"
    pq.write_table(pa.table({"text": [1, 2]}), small / "c.parquet")
    assert refusal(small) == f"the column `text` of {small}/c.parquet holds int64, and not strings"


def test_a_folder_is_told_from_a_name(small: Path) -> None:
    assert not arenas.find_arena("demo").is_folder
    with pytest.raises(UserError, match="unknown arena 'texts'"):
        arenas.find_arena("texts")
    assert replace(arenas.find_arena(f"{small}/"), name="x") == replace(
        arenas.find_arena(str(small)), name="x"
    )
