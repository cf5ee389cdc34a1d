"""The arena: what it keeps apart, what it counts, and what it catches."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import prepare
from autoresearch.files import UserError
from autoresearch.task import read_numbers
from gpt import text
from prepare import (
    ARENA,
    Clock,
    Packer,
    Tokenizer,
    TrainLoader,
    cut,
    evaluate,
    finish,
    pack_rows,
    split_long,
)

TINY = prepare.Arena(
    "tiny", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=256, held_out=0.2
)


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


def stamps(arena: prepare.Arena) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in arena.folder.iterdir()}


def test_prepare_twice(tiny: prepare.Arena, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare.prepare(tiny)
    times = stamps(tiny)
    assert prepare.prepare(tiny) == manifest
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert stamps(tiny) == times and times.keys() == manifest["files"].keys() | {"manifest.json"}


@pytest.mark.parametrize("role", ["val", "tokenizer", "train"])
def test_prepare_again_what_was_changed(tiny: prepare.Arena, role: str) -> None:
    """A file of the right size and the wrong content: it alone is made again, and as it was."""
    before, times = prepare.prepare(tiny), stamps(tiny)
    name = before["train"][0] + ".bin" if role == "train" else before[role]
    content = (tiny.folder / name).read_bytes()
    (tiny.folder / name).write_bytes(content[:-2] + bytes(2))
    if role == "train":
        (tiny.folder / name).with_suffix(".npy").unlink()
    assert prepare.prepare(tiny) == before and (tiny.folder / name).read_bytes() == content
    again = {other for other, time in stamps(tiny).items() if times[other] != time}
    assert again <= {name, name.replace(".bin", ".npy"), "manifest.json"}


@pytest.mark.parametrize("name", ["train.bin", "val.npy", "manifest.json"])
def test_prepare_again_what_is_torn(tiny: prepare.Arena, name: str) -> None:
    before = prepare.prepare(tiny)
    path = tiny.folder / {"train.bin": before["train"][0] + ".bin", "val.npy": before["val"]}.get(
        name, name
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert prepare.read_manifest(tiny) is None
    assert prepare.prepare(tiny) == before  # the same sources make the same files
    assert path.read_bytes() == whole


def test_another_setting_makes_what_it_must_and_no_more(tiny: prepare.Arena) -> None:
    before = prepare.prepare(tiny)
    assert prepare.read_manifest(replace(tiny, budget=9.0, seed=7)) is not None
    fewer = replace(tiny, val_tokens=128)
    assert prepare.read_manifest(fewer) is None
    rows = prepare.prepare(fewer)
    assert rows["files"].keys() ^ before["files"].keys() == {
        rows["val"],
        rows["sealed"],
        before["val"],
        before["sealed"],
    }
    assert rows["data"] != before["data"]
    words = prepare.prepare(replace(tiny, vocab_size=280))
    assert words["files"].keys() & before["files"].keys() == {
        name for name in before["files"] if name.endswith(".parquet")
    }


# A process of its own that makes the tiny arena out of many pieces, to be killed
MAKE = """
import sys, prepare
from gpt import text
text.PIECE = 1
arena = prepare.Arena("tiny", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=256, held_out=0.2)
prepare.source_roots = lambda arena: [prepare.Path(sys.argv[1])]
write_table = prepare.pq.write_table
prepare.pq.write_table = lambda table, path, row_group_size, **options: write_table(table, path, 25, **options)
print(prepare.prepare(arena)["data"])
"""


def make(sources: Path, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MAKE, str(sources)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_finished(tiny: prepare.Arena, tmp_path: Path) -> None:
    """SIGKILL in the middle of tokenizing: the next call keeps what is there, and the end is the same."""
    folder, kept = tmp_path / "killed/tiny", set()
    for wanted in (1, 4):
        process = make(tmp_path / "sources", tmp_path / "killed")
        while len(list(folder.glob("train-*.npy"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (folder / "manifest.json").exists()
        time.sleep(1.0)  # what its children were at
        assert kept <= {(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()}
        kept = {(path.name, path.stat().st_mtime_ns) for path in folder.glob("train-*.npy")}
    data, said = make(tmp_path / "sources", tmp_path / "killed").communicate()
    assert data, said
    assert kept <= {(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert data == make(tmp_path / "sources", tmp_path / "fresh").communicate()[0]


def test_two_at_once(tiny: prepare.Arena, tmp_path: Path) -> None:
    both = [make(tmp_path / "sources", tmp_path / "cache") for _ in range(2)]
    said = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said[1] == f"tiny: already prepared, nothing to do\n{said[0]}"


def test_splits_share_nothing(tiny: prepare.Arena) -> None:
    with prepare.Progress(disable=True) as progress:
        documents = prepare.collect(tiny, progress)
    texts = [text for split in prepare.SPLITS for text in documents[split]]
    assert len(texts) == len(set(texts)) and all(documents[split] for split in prepare.SPLITS)
    assert not any("cached" in text or "not utf-8" in text for text in texts)
    assert all(any(f"f_{i}(x)" in text for text in texts) for i in range(100))


def test_too_little_text(tiny: prepare.Arena) -> None:
    with pytest.raises(UserError, match="too little held-out text"):
        prepare.prepare(replace(tiny, val_tokens=2**16))
    assert prepare.load_manifest(tiny) == {}
    with pytest.raises(UserError, match="too little text for a vocabulary of 8192 tokens"):
        prepare.prepare(replace(tiny, vocab_size=8192))


def test_cut_loses_nothing() -> None:
    text = "\n\n\n".join(f"class C{i}:\n    a = 1\n\n    b = 2" for i in range(50)) + "\n"
    pieces = list(cut(text, 60))
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 60
    table = "".join(f"    {i}: 'x',\n" for i in range(100))
    assert "".join(cut(table, 60)) == table and max(map(len, cut(table, 60))) <= 60


def test_tokenizer_round_trips(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([(ROOT / "loop.py").read_text(), "żółć 🦊"], 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    json.loads((tmp_path / "tokenizer.json").read_text())
    every_byte = bytes(range(256))
    single = [loaded.encoding.encode_single_token(bytes([byte])) for byte in every_byte]
    assert loaded.encoding.decode_bytes(single) == every_byte
    exact, _ = loaded.byte_lengths()
    texts = [
        "",
        " ",
        "the fox",
        "żółć 🦊 \x00\u2028",
        "<|bos|>",
        "12345",
        "\r\n\t  x",
        " " * 10**6,
        "🦊 " * 10**5,
    ]
    for original in texts:
        ids = loaded.encode(original)
        assert ids.dtype == np.uint16 and ids[0] == loaded.bos and loaded.bos not in ids[1:]
        assert loaded.encoding.decode(ids[1:].tolist()) == original
        assert sum(exact[i] for i in ids) == len(original.encode())


def test_numbers_are_split_into_pairs() -> None:
    tokenizer = Tokenizer.train(["1234567890 " * 100], 265)
    assert max(len(token.strip()) for token in tokenizer.tokens if token.strip().isdigit()) == 2


def test_tokenizer_reads_no_more_than_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "TRAIN_CHARACTERS", 25_000)
    lengths = [len(excerpt) for excerpt in text.excerpts("x" * 20_000 for _ in range(9))]
    assert lengths == [10_000, 10_000, 5_000]


def documents(*lengths: int) -> list[np.ndarray]:
    """Documents that start with 0 and go on with their own number."""
    return [
        np.array([0] + [i + 1] * (length - 1), dtype=np.uint16) for i, length in enumerate(lengths)
    ]


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
    rows = pack_rows(iter(documents(*range(2, 200))), 40, 33)
    assert rows.shape == (40, 33) and (rows[:, 0] == 0).all()
    assert (rows == pack_rows(iter(documents(*range(2, 200))), 40, 33)).all()


@pytest.fixture(autouse=True)
def fresh_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has one clock and one loader; each test has its own."""
    monkeypatch.setattr(prepare, "CLOCK", Clock())


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> prepare.Arena:
    """The demo arena with a budget of a fifth of a second."""
    arena = replace(ARENA, budget=0.2)
    monkeypatch.setattr(prepare, "ARENA", arena)
    return arena


def test_loader_is_the_clock(quick: prepare.Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.pipe()
    monkeypatch.setattr(prepare.CLOCK, "ticks", theirs)
    loader = TrainLoader(4, "cpu")
    assert loader.progress == 0.0
    batches = list(loader)
    assert prepare.CLOCK.seconds >= 0.2 and loader.progress == 1.0
    assert loader.steps == len(batches) and loader.tokens == len(batches) * 4 * 256
    x, y = batches[-1]
    assert (
        x.shape == y.shape == (4, 256) and x.dtype == torch.int64 and (x[:, 1:] == y[:, :-1]).all()
    )
    assert (x[:, 0] == ARENA.bos).all()
    with pytest.raises(StopIteration):
        next(loader)
    assert os.read(ours, 2**16) == b"(" + b"." * len(batches) + b")"  # what the driver sees


def test_the_clock_starts_when_text_is_read(quick: prepare.Arena) -> None:
    """By any door: the loader's first batch, or what is behind it."""
    loader = TrainLoader(4, "cpu")
    assert prepare.CLOCK.started is None
    next(loader.packer.documents)
    assert prepare.CLOCK.started is not None


def test_counted_work_is_the_same_on_a_busy_machine(cache: Path) -> None:
    """Two beside each other on every core take the steps, and get to the score, of one alone."""
    code = (
        "import dataclasses, prepare, runpy; "
        "prepare.ARENA = dataclasses.replace(prepare.ARENA, budget=1.0); "
        "runpy.run_path('train.py', run_name='__main__')"
    )

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    logs = [start().communicate()[0]]
    logs += [process.communicate()[0] for process in [start(), start()]]
    found = [read_numbers(log, "val_bpb") for log in logs]
    assert {n["num_steps"] for n in found} == {found[0]["num_steps"]}
    assert max(abs(n["val_bpb"] - found[0]["val_bpb"]) for n in found) < 0.005


COUNT = """
import sys, torch, prepare
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
print("triton" in sys.modules)
from torch.utils.flop_counter import flop_registry

class Both(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        theirs = flop_registry.get(func._overloadpacket)
        print(func, prepare.flops_of(func.overloadpacket.__name__, args, out), theirs(*args, **(kwargs or {}), out_val=out) if theirs else 0)
        return out

new = lambda *shape: torch.randn(*shape, requires_grad=True)
with Both():
    (new(3, 4) @ new(4, 5)).sum().backward()
    torch.baddbmm(new(2, 3, 5), new(2, 3, 4), new(2, 4, 5)).sum().backward()
    torch.addmm(new(3, 5), new(3, 4), new(4, 5)).sum().backward()
    F.scaled_dot_product_attention(new(1, 2, 8, 4), new(1, 2, 6, 4), new(1, 2, 6, 4)).sum().backward()
    F.conv1d(new(2, 6, 10), new(8, 6, 3), padding=1).sum().backward()
    F.conv_transpose1d(new(2, 6, 10), new(6, 5, 3)).sum().backward()
"""


def test_flops_are_those_that_torch_counts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded, *lines = done.stdout.splitlines()
    assert loaded == "False"  # Triton is not loaded for it
    counted = [line.split()[-2:] for line in lines]
    assert sum(ours != "0" for ours, _ in counted) == 15
    assert all(ours == theirs for ours, theirs in counted)


def test_finish_long_after_the_budget(
    quick: prepare.Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training that goes on with batches of its own after the loader has stopped."""
    loader = TrainLoader(4, "cpu")
    list(loader)
    prepare.CLOCK.stopped -= 10
    with pytest.raises(SystemExit):
        finish(Bigram(), loader, depth=1, flops_per_token=1.0)
    assert "s after the budget was spent" in capsys.readouterr().err


def rows_of(monkeypatch: pytest.MonkeyPatch, rows: int, batches: int) -> torch.Tensor:
    monkeypatch.setattr(prepare, "CLOCK", Clock())
    loader = TrainLoader(rows, "cpu")
    return torch.cat([next(loader)[0] for _ in range(batches)])


def test_the_seed_alone_orders_the_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows_of(monkeypatch, 2, 2)
    assert (first == rows_of(monkeypatch, 2, 2)).all() and (
        first == rows_of(monkeypatch, 4, 1)
    ).all()
    monkeypatch.setattr(prepare, "ARENA", replace(ARENA, seed=7))
    assert (first != rows_of(monkeypatch, 2, 2)).any()


def test_training_text_is_not_validation_text(cache: Path) -> None:
    """No row of the validation or sealed set can be found in the training tokens."""
    stems = prepare.load_manifest(ARENA)["train"]
    train = b"".join((ARENA.folder / f"{stem}.bin").read_bytes() for stem in stems)
    val, sealed = (prepare.load_rows(split) for split in ("val", "sealed"))
    assert val.shape == sealed.shape == (256, 257)
    for row in np.concatenate([val, sealed]):
        assert row.tobytes() not in train


class Bigram(torch.nn.Module):
    """A model that is all it should be: its logits depend on the token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x]


def test_evaluation_is_exact(cache: Path) -> None:
    """Against a plain float64 sum over every token."""
    model, rows = Bigram(), prepare.load_rows("val").astype(np.int64)
    exact, upstream = (np.array(n) for n in prepare.load_tokenizer().byte_lengths())
    x, y = rows[:, :-1], rows[:, 1:]
    losses = -torch.log_softmax(model.table.detach().double(), dim=1).numpy()[x, y]
    bits = losses[exact[y] > 0].sum() / math.log(2)
    expected = bits / exact[y].sum(), bits / upstream[y].sum()
    assert evaluate(model, rows.astype(np.uint16), torch.device("cpu")) == pytest.approx(
        expected, rel=1e-6
    )
    assert expected[1] < expected[0]  # upstream counts more bytes


def leaky(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    later = torch.roll(x, -1, dims=1)
    return model(x) + 0.01 * model(later)


def mixing(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    return model(x) + 0.01 * model(torch.roll(x, 1, dims=0))


def restless(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    return model(x) + 0.01 * torch.randn(1, 1, 1024)


def growing(model: Bigram, x: torch.Tensor) -> torch.Tensor:
    """Only the last call is different: 64 batches, 4 probes, and then one batch again."""
    model.calls = getattr(model, "calls", 0) + 1  # type: ignore[assignment]
    return model(x) * (1 if model.calls <= 68 else 1.01)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [
        (leaky, "the model is not causal"),
        (mixing, "the rows are not independent"),
        (restless, "scoring a batch again gives another answer"),
        (growing, "scoring a batch again gives another answer"),
        (lambda model, x: model(x) * math.nan, "(a log-probability moved by nan)"),
        (lambda model, x: model(x)[:, :-1], "model(x) must return logits of shape (4, 256, 1024)"),
        (
            lambda model, x: model(x).as_subclass(torch.nn.Parameter),
            "must return a plain tensor, not Parameter",
        ),
    ],
)
def test_probes(
    cache: Path, capsys: pytest.CaptureFixture[str], cheat: Callable, reason: str
) -> None:
    model, rows = Bigram(), prepare.load_rows("val")
    with pytest.raises(SystemExit):
        evaluate(lambda x: cheat(model, x), rows, torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_leak_below_the_tolerance(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """On a GPU rounding hides a small leak in each prediction, but not in the mean of many; noise alone is no leak."""
    monkeypatch.setitem(prepare.TOLERANCE, "cpu", 0.25)
    model, rows, rng = Bigram(), prepare.load_rows("val"), torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        peek = 0.05 * F.one_hot(torch.roll(x, -1, dims=1), 1024) if tokens else 0.0
        return model(x) + 0.01 * torch.randn(*x.shape, 1024, generator=rng) + peek

    if tokens:
        with pytest.raises(SystemExit):
            evaluate(noisy, rows, torch.device("cpu"))
        assert "predictions are 0.0" in capsys.readouterr().err
    else:
        evaluate(noisy, rows, torch.device("cpu"))


def test_finish_prints_what_the_driver_reads(
    quick: prepare.Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = TrainLoader(2, "cpu")
    steps = sum(1 for _ in loader)
    finish(Bigram(), loader, depth=1, flops_per_token=1.0, note="mine")
    out = capsys.readouterr().out
    summary = read_numbers(out, "val_bpb")
    assert (summary["num_steps"], summary["depth"]) == (steps, 1) and "mfu_percent" not in summary
    assert (
        summary["num_params_M"] == pytest.approx(1.049)
        and summary["peak_vram_mb"] > 50
        and summary["total_seconds"] > 0.2
    )
    assert "note:             mine" in out


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("A100-SXM4-80GB", 312.0),  # as older drivers name it
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 147.1),
        ("NVIDIA GeForce RTX 3060", 25.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GB10", None),
        ("GRID A100D-10C", None),
        ("Some future card", None),
    ],
)
def test_a_gpu_has_its_own_peak_or_none(gpu: str, peak: float | None) -> None:
    """Each name as the driver gives it; never the peak of another card."""
    assert prepare.peak_tflops(gpu) == peak


EXPORT = """
import sys, torch, prepare
from pathlib import Path
model = torch.nn.Embedding(2**20, 96)   # 384 MiB
model.weight.note = slice(0, 3)         # what a program may hang on a parameter is none of the weights
x = torch.zeros(1, 8, dtype=torch.int64)
prepare.export(torch.nn.Embedding(8, 8), x, Path(sys.argv[1]))      # imports what exporting needs
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) // 1024
before = peak()
prepare.export(model, x, Path(sys.argv[1]))
print(peak() - before)
loaded = prepare.load_exported(Path(sys.argv[1])).module()
assert torch.equal(loaded(x), model(x)) and [name for name, _ in loaded.named_parameters()] == ["weight"]
"""


def test_exporting_copies_no_weights(tmp_path: Path) -> None:
    """A model of gigabytes must not need as many again to be written down."""
    command = [sys.executable, "-c", EXPORT, tmp_path / "model.pt2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 and (tmp_path / "model.pt2").stat().st_size > 384 * 2**20


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
    """train.py by hand, before prepare.py: one line that names the command, and no warm-up before it."""
    env = {**os.environ, "AUTORESEARCH_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: the arena 'demo' is not prepared: run `uv run prepare.py --arena demo`\n"
    )


def test_upstreams_own_train_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare.check_train(ROOT / "train.py")
    other = tmp_path / "train.py"
    other.write_text(
        "from kernels import get_kernel\nfrom prepare import TIME_BUDGET, evaluate_bpb\n"
    )
    with pytest.raises(SystemExit):
        prepare.check_train(other)
    said = capsys.readouterr().err
    assert said.startswith("error: train.py imports TIME_BUDGET, evaluate_bpb from prepare.py, and")
    assert said.count("\n") == 1
