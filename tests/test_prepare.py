"""The arena: what it keeps apart, what it counts, and what it catches."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import prepare
from autoresearch.trial import read_summary
from prepare import ARENA, Packer, Tokenizer, TrainLoader, cut, evaluate, finish, pack_rows, split_long

TINY = prepare.Arena("tiny", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=256, held_out=0.2)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> prepare.Arena:
    """An arena over a hundred small files, and what must not end up in it."""
    sources = tmp_path / "sources"
    (sources / "package/__pycache__").mkdir(parents=True)
    for i in range(100):
        (sources / f"package/module_{i}.py").write_text(
            f"def f_{i}(x):\n    return x + {i}\n\n" + f"y_{i} = {i * i}\n" * 20
        )
    (sources / "copy.py").write_text((sources / "package/module_7.py").read_text())
    (sources / "broken.py").write_bytes(b"\xff\xfe not utf-8")
    (sources / "package/__pycache__/module.py").write_text("cached = 1\n")
    monkeypatch.setattr(prepare, "source_roots", lambda arena: [sources])
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return TINY


def test_prepare_twice(tiny: prepare.Arena, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare.prepare(tiny)
    times = {path.name: path.stat().st_mtime_ns for path in tiny.folder.iterdir()}
    assert prepare.prepare(tiny) == manifest
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in tiny.folder.iterdir()} == times
    assert sorted(times) == ["manifest.json", "offsets.npy", "sealed.npy", "tokenizer.json", "train.bin", "val.npy"]


def test_prepare_again_what_was_changed(tiny: prepare.Arena) -> None:
    """A file of the right size and the wrong content."""
    before = prepare.prepare(tiny)
    rows = np.load(tiny.folder / "val.npy")
    np.save(tiny.folder / "val.npy", rows * 0)
    assert prepare.prepare(tiny) == before and (np.load(tiny.folder / "val.npy") == rows).all()


@pytest.mark.parametrize("name", ["train.bin", "val.npy", "manifest.json"])
def test_prepare_again_what_is_torn(tiny: prepare.Arena, name: str) -> None:
    before = prepare.prepare(tiny)
    path = tiny.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert prepare.read_manifest(tiny) is None
    assert prepare.prepare(tiny) == before  # the same sources make the same files
    assert path.read_bytes() == whole


def test_prepare_again_with_other_settings(tiny: prepare.Arena) -> None:
    prepare.prepare(tiny)
    assert prepare.read_manifest(replace(tiny, vocab_size=280)) is None
    assert prepare.read_manifest(replace(tiny, budget=9.0, seed=7)) is not None


def test_splits_share_nothing(tiny: prepare.Arena) -> None:
    with prepare.Progress(disable=True) as progress:
        documents = prepare.collect(tiny, progress)
    texts = [text for split in prepare.SPLITS for text in documents[split]]
    assert len(texts) == len(set(texts)) and all(documents[split] for split in prepare.SPLITS)
    assert not any("cached" in text or "not utf-8" in text for text in texts)
    assert all(any(f"f_{i}(x)" in text for text in texts) for i in range(100))


def test_too_little_text(tiny: prepare.Arena) -> None:
    with pytest.raises(ValueError, match="too little held-out text"):
        prepare.prepare(replace(tiny, val_tokens=2**16))
    assert not tiny.folder.exists()


def test_cut_loses_nothing() -> None:
    text = "\n\n\n".join(f"class C{i}:\n    a = 1\n\n    b = 2" for i in range(50)) + "\n"
    pieces = list(cut(text, 60))
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 60
    table = "".join(f"    {i}: 'x',\n" for i in range(100))
    assert "".join(cut(table, 60)) == table and max(map(len, cut(table, 60))) <= 60


def test_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the quick brown fox 123456\n" * 50, "żółć 🦊"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    json.loads((tmp_path / "tokenizer.json").read_text())
    every_byte = bytes(range(256))
    single = [loaded.encoding.encode_single_token(bytes([byte])) for byte in every_byte]
    assert loaded.encoding.decode_bytes(single) == every_byte
    for text in ["", " ", "the fox", "żółć 🦊 \x00\u2028", "<|bos|>", "12345", "\r\n\t  x"]:
        (ids,) = loaded.encode_documents([text])
        assert ids[0] == loaded.bos and loaded.bos not in ids[1:]
        assert loaded.encoding.decode(ids[1:].tolist()) == text
        exact, _ = loaded.byte_lengths()
        assert sum(exact[i] for i in ids) == len(text.encode())


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents that start with 0 and go on with their own number."""
    return [np.array([0] + [i + 1] * (length - 1), dtype=np.uint16) for i, length in enumerate(lengths)]


def test_packing_takes_the_largest_that_fits_else_crops_the_shortest() -> None:
    packer = Packer(iter(documents(3, 5, 7, 9)))
    row = np.empty(10, dtype=np.int64)
    packer.fill(row)  # 9 fits, then the shortest fills what is left
    assert row.tolist() == [0, 4, 4, 4, 4, 4, 4, 4, 4, 0]
    packer.fill(row)  # 7, then 5 cropped
    assert row.tolist() == [0, 3, 3, 3, 3, 3, 3, 0, 2, 2]
    with pytest.raises(StopIteration):
        packer.fill(row)


def test_long_documents_are_split_without_loss() -> None:
    for length in (1, 2, 9, 10, 11, 100):
        document = np.array([7, *range(100, 99 + length)], dtype=np.uint16)
        pieces = list(split_long(document, 10))
        assert all(piece[0] == 7 and len(piece) <= 10 for piece in pieces)
        assert [token for piece in pieces for token in piece[1:]] == document[1:].tolist()


def test_packed_rows_are_full_and_start_documents() -> None:
    rows = pack_rows(documents(*range(2, 200)), 40, 33)
    assert rows.shape == (40, 33) and (rows[:, 0] == 0).all()
    assert (rows == pack_rows(documents(*range(2, 200)), 40, 33)).all()


@pytest.fixture(autouse=True)
def fresh_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one clock; each test has its own."""
    monkeypatch.setattr(TrainLoader, "started", None)


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> prepare.Arena:
    """The demo arena with a budget of a fifth of a second."""
    arena = replace(ARENA, budget=0.2)
    monkeypatch.setattr(prepare, "ARENA", arena)
    return arena


def test_loader_is_the_clock(quick: prepare.Arena) -> None:
    loader = TrainLoader(4, "cpu")
    assert loader.progress == 0.0
    batches = list(loader)
    assert 0.2 <= loader.seconds < 2.0 and loader.progress == 1.0
    assert loader.steps == len(batches) and loader.tokens == len(batches) * 4 * 256
    x, y = batches[-1]
    assert x.shape == y.shape == (4, 256) and x.dtype == torch.int64 and (x[:, 1:] == y[:, :-1]).all()
    assert (x[:, 0] == ARENA.bos).all()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_second_loader_gets_no_second_budget(quick: prepare.Arena) -> None:
    assert list(TrainLoader(4, "cpu"))
    assert list(TrainLoader(4, "cpu")) == []


def test_finish_long_after_the_budget(quick: prepare.Arena, capsys: pytest.CaptureFixture[str]) -> None:
    """Training that goes on with batches of its own after the loader has stopped."""
    loader = TrainLoader(4, "cpu")
    list(loader)
    TrainLoader.started -= 10
    with pytest.raises(SystemExit):
        finish(Bigram(), loader, depth=1, flops_per_token=1.0)
    assert "s after the budget was spent" in capsys.readouterr().err


def test_the_seed_alone_orders_the_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.cat([next(TrainLoader(2, "cpu"))[0], next(TrainLoader(2, "cpu"))[0]])
    assert (first[:2] == first[2:]).all()
    together, loader = next(TrainLoader(4, "cpu"))[0], TrainLoader(2, "cpu")
    assert (together == torch.cat([next(loader)[0], next(loader)[0]])).all()
    monkeypatch.setattr(prepare, "ARENA", replace(ARENA, seed=7))
    assert (next(TrainLoader(2, "cpu"))[0] != first[:2]).any()


def test_training_text_is_not_validation_text(cache: Path) -> None:
    """No row of the validation or sealed set can be found in the training tokens."""
    train = (cache / "demo/train.bin").read_bytes()
    val, sealed = (np.load(cache / f"demo/{name}.npy") for name in ("val", "sealed"))
    assert val.shape == sealed.shape == (256, 257)
    for row in np.concatenate([val, sealed]):
        assert row.tobytes() not in train


class Bigram(torch.nn.Module):
    """A model that is all it should be: its logits depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x]


def test_evaluation_is_exact(cache: Path) -> None:
    """Against a plain float64 sum over every token."""
    model, rows = Bigram(), np.load(cache / "demo/val.npy").astype(np.int64)
    exact, upstream = (np.array(n) for n in Tokenizer.load(cache / "demo/tokenizer.json").byte_lengths())
    x, y = rows[:, :-1], rows[:, 1:]
    losses = -torch.log_softmax(model.table.detach().double(), dim=1).numpy()[x, y]
    bits = losses[exact[y] > 0].sum() / math.log(2)
    expected = bits / exact[y].sum(), bits / upstream[y].sum()
    assert evaluate(model, rows.astype(np.uint16), torch.device("cpu")) == pytest.approx(expected, rel=1e-6)
    assert expected[1] < expected[0]  # upstream counts more bytes


def leaky(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    later = torch.roll(x, -1, dims=1)
    return model(x) + 0.01 * model(later)


def mixing(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    return model(x) + 0.01 * model(torch.roll(x, 1, dims=0))


def restless(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    return model(x) + 0.01 * torch.randn(1, 1, 1024)


def growing(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    model.calls = getattr(model, "calls", 0) + 1  # type: ignore[assignment]
    return model(x) * (1 if model.calls <= 14 else 1.01)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [
        (leaky, "the model is not causal"),
        (mixing, "the rows are not independent"),
        (restless, "scoring a batch again gives another answer"),
        (growing, "scoring a batch again gives another answer"),
        (lambda model, x: model(x) * math.nan, "(a log-probability moved by nan)"),
        (lambda model, x: model(x)[:, :-1], "model(x) must return logits of shape (32, 256, 1024)"),
    ],
)
def test_probes(cache: Path, capsys: pytest.CaptureFixture[str], cheat: Callable, reason: str) -> None:
    model, rows = Bigram(), np.load(cache / "demo/val.npy")
    with pytest.raises(SystemExit):
        evaluate(lambda x: cheat(model, x), rows, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


def test_finish_prints_what_the_driver_reads(quick: prepare.Arena, capsys: pytest.CaptureFixture[str]) -> None:
    loader = TrainLoader(2, "cpu")
    steps = sum(1 for _ in loader)
    finish(Bigram(), loader, depth=1, flops_per_token=1.0, note="mine")
    out = capsys.readouterr().out
    summary = read_summary(out, quick.budget)
    assert (summary.num_steps, summary.depth, summary.mfu_percent) == (steps, 1, None)
    assert summary.num_params_M == pytest.approx(1.049) and summary.peak_vram_mb > 50 and summary.total_seconds > 0.2
    assert "note:             mine" in out


def test_finish_before_the_budget_is_spent(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader = TrainLoader(2, "cpu")
    next(loader)
    with pytest.raises(SystemExit):
        finish(Bigram(), loader, depth=1, flops_per_token=1.0)
    assert "before the budget was spent" in capsys.readouterr().err


def test_finish_refuses_a_fact_it_counts_itself(quick: prepare.Arena) -> None:
    loader = TrainLoader(2, "cpu")
    list(loader)
    with pytest.raises(ValueError, match="finish prints num_steps itself"):
        finish(Bigram(), loader, depth=1, flops_per_token=1.0, num_steps=10**6)


def test_not_prepared(tmp_path: Path) -> None:
    """train.py by hand, before prepare.py: one line that names the command."""
    env = {**os.environ, "AUTORESEARCH_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "train.py"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the arena 'demo' is not prepared: run `uv run prepare.py --arena demo`\n"
