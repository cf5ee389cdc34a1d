"""The arena: what it keeps apart, what it counts, and what it catches."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.optim.swa_utils import AveragedModel

import prepare
from autoresearch.files import UserError
from autoresearch.task import read_numbers
from gpt import card, client, make, tokenizer
from gpt.arena import SPLITS, Arena, load_manifest, read_manifest
from gpt.make import cut
from gpt.pack import Packer, pack_rows, split_long
from gpt.tokenizer import Tokenizer
from prepare import ARENA, TrainLoader, evaluate, finish

TINY = Arena("tiny", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=256, held_out=0.2)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arena:
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
    monkeypatch.setattr(make, "source_roots", lambda arena: [sources])
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    return TINY


def stamps(arena: Arena) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in arena.folder.iterdir()}


def test_prepare_twice(tiny: Arena, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make.prepare(tiny)
    times = stamps(tiny)
    assert make.prepare(tiny) == manifest
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert stamps(tiny) == times and times.keys() == manifest["files"].keys() | {"manifest.json"}


@pytest.mark.parametrize("role", ["val", "tokenizer", "train"])
def test_prepare_again_what_was_changed(tiny: Arena, role: str) -> None:
    """A file of the right size and the wrong content: it alone is made again, and as it was."""
    before, times = make.prepare(tiny), stamps(tiny)
    name = before["train"][0] + ".bin" if role == "train" else before[role]
    content = (tiny.folder / name).read_bytes()
    (tiny.folder / name).write_bytes(content[:-2] + bytes(2))
    if role == "train":
        (tiny.folder / name).with_suffix(".npy").unlink()
    assert make.prepare(tiny) == before and (tiny.folder / name).read_bytes() == content
    again = {other for other, time in stamps(tiny).items() if times[other] != time}
    assert again <= {name, name.replace(".bin", ".npy"), "manifest.json"}


@pytest.mark.parametrize("name", ["train.bin", "val.npy", "manifest.json"])
def test_prepare_again_what_is_torn(tiny: Arena, name: str) -> None:
    before = make.prepare(tiny)
    path = tiny.folder / {"train.bin": before["train"][0] + ".bin", "val.npy": before["val"]}.get(
        name, name
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert read_manifest(tiny) is None
    assert make.prepare(tiny) == before  # the same sources make the same files
    assert path.read_bytes() == whole


def test_another_setting_makes_what_it_must_and_no_more(tiny: Arena) -> None:
    before = make.prepare(tiny)
    assert read_manifest(replace(tiny, budget=9.0, seed=7)) is not None
    fewer = replace(tiny, val_tokens=128)
    assert read_manifest(fewer) is None
    rows = make.prepare(fewer)
    assert rows["files"].keys() ^ before["files"].keys() == {
        rows["val"],
        rows["sealed"],
        before["val"],
        before["sealed"],
    }
    assert rows["data"] != before["data"]
    words = make.prepare(replace(tiny, vocab_size=280))
    assert words["files"].keys() & before["files"].keys() == {
        name for name in before["files"] if name.endswith(".parquet")
    }


# A process of its own that makes the tiny arena out of many pieces, to be killed
MAKE = """
import sys
from pathlib import Path
from gpt import make, text
from gpt.arena import Arena
text.PIECE = 1
arena = Arena("tiny", sequence_len=16, vocab_size=300, budget=1.0, val_tokens=256, held_out=0.2)
make.source_roots = lambda arena: [Path(sys.argv[1])]
write_table = make.pq.write_table
make.pq.write_table = lambda table, path, row_group_size, **options: write_table(table, path, 25, **options)
print(make.prepare(arena)["data"])
"""


def start_making(sources: Path, cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MAKE, str(sources)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_finished(tiny: Arena, tmp_path: Path) -> None:
    """SIGKILL in the middle of tokenizing: the next call keeps what is there, and the end is the same."""
    folder, kept = tmp_path / "killed/tiny", set()
    for wanted in (1, 4):
        process = start_making(tmp_path / "sources", tmp_path / "killed")
        while len(list(folder.glob("train-*.npy"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9 and not (folder / "manifest.json").exists()
        time.sleep(1.0)  # what its children were at
        assert kept <= {(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()}
        kept = {(path.name, path.stat().st_mtime_ns) for path in folder.glob("train-*.npy")}
    data, said = start_making(tmp_path / "sources", tmp_path / "killed").communicate()
    assert data, said
    assert kept <= {(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert data == start_making(tmp_path / "sources", tmp_path / "fresh").communicate()[0]


def test_two_at_once(tiny: Arena, tmp_path: Path) -> None:
    both = [start_making(tmp_path / "sources", tmp_path / "cache") for _ in range(2)]
    said = sorted(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said[1] == f"tiny: already prepared, nothing to do\n{said[0]}"


def test_splits_share_nothing(tiny: Arena) -> None:
    with make.Progress(disable=True) as progress:
        documents = make.collect(tiny, progress)
    texts = [text for split in SPLITS for text in documents[split]]
    assert len(texts) == len(set(texts)) and all(documents[split] for split in SPLITS)
    assert not any("cached" in text or "not utf-8" in text for text in texts)
    assert all(any(f"f_{i}(x)" in text for text in texts) for i in range(100))


def test_too_little_text(tiny: Arena) -> None:
    with pytest.raises(UserError, match="too little held-out text"):
        make.prepare(replace(tiny, val_tokens=2**16))
    assert load_manifest(tiny) == {}
    with pytest.raises(UserError, match="too little text for a vocabulary of 8192 tokens"):
        make.prepare(replace(tiny, vocab_size=8192))


def test_cut_loses_nothing() -> None:
    text = "\n\n\n".join(f"class C{i}:\n    a = 1\n\n    b = 2" for i in range(50)) + "\n"
    pieces = list(cut(text, 60))
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 60
    table = "".join(f"    {i}: 'x',\n" for i in range(100))
    assert "".join(cut(table, 60)) == table and max(map(len, cut(table, 60))) <= 60


def test_tokenizer_round_trips(tmp_path: Path) -> None:
    trained = Tokenizer.train([(ROOT / "loop.py").read_text(), "żółć 🦊"], 300)
    trained.save(tmp_path / "tokenizer.json")
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
    trained = Tokenizer.train(["1234567890 " * 100], 265)
    assert max(len(token.strip()) for token in trained.tokens if token.strip().isdigit()) == 2


def test_tokenizer_reads_no_more_than_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "TRAIN_CHARACTERS", 25_000)
    lengths = [len(excerpt) for excerpt in tokenizer.excerpts("x" * 20_000 for _ in range(9))]
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


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Arena:
    """The demo arena with a budget of a fifth of a second."""
    arena = replace(ARENA, budget=0.2, counted=False)
    monkeypatch.setattr(prepare, "ARENA", arena)
    code = (
        "import gpt.feed, sys; from gpt.arena import ARENAS, Arena; "
        f"ARENAS['demo'] = Arena(**{asdict(arena)!r}); sys.exit(gpt.feed.main())"
    )
    monkeypatch.setattr(client, "FEEDER", [sys.executable, "-c", code])
    return arena


@pytest.fixture(autouse=True)
def feeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ends the feeders that a test started."""
    found: list[prepare.Feed] = []

    class Feed(prepare.Feed):
        def __init__(self) -> None:
            super().__init__()
            found.append(self)

    monkeypatch.setattr(prepare, "Feed", Feed)
    yield
    for feed in found:
        feed.close()


def registered(rows: int) -> tuple[TrainLoader, "Bigram"]:
    loader, model = TrainLoader(rows, "cpu"), Bigram()
    loader.register(model)
    return loader, model


def test_the_loader_ends_with_the_budget(quick: Arena) -> None:
    loader, _ = registered(4)
    assert loader.progress == 0.0
    batches = list(loader)
    assert loader.elapsed() >= 0.2 and loader.progress == 1.0
    assert loader.steps == len(batches) and loader.tokens == len(batches) * 4 * 256
    x, y = batches[-1]
    assert (
        x.shape == y.shape == (4, 256) and x.dtype == torch.int64 and (x[:, 1:] == y[:, :-1]).all()
    )
    assert (x[:, 0] == ARENA.bos).all()
    with pytest.raises(StopIteration):
        next(loader)


def test_counted_work_is_the_same_on_a_busy_machine(cache: Path) -> None:
    """Two beside each other on every core take the steps, and get to the score, of one alone."""
    feeder = (
        "import gpt.feed, sys; from dataclasses import replace; from gpt.arena import ARENAS; "
        "ARENAS['demo'] = replace(ARENAS['demo'], budget=1.0); sys.exit(gpt.feed.main())"
    )
    code = (
        "import dataclasses, gpt.client, prepare, runpy, sys; "
        "prepare.ARENA = dataclasses.replace(prepare.ARENA, budget=1.0); "
        f"gpt.client.FEEDER = [sys.executable, '-c', {feeder!r}]; "
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
from gpt import meter
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
print("triton" in sys.modules)
from torch.utils.flop_counter import flop_registry

class Both(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        theirs = flop_registry.get(func._overloadpacket)
        print(func, meter.flops_of(func.overloadpacket.__name__, args, out), theirs(*args, **(kwargs or {}), out_val=out) if theirs else 0)
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


def rows_of(rows: int, batches: int) -> torch.Tensor:
    loader, _ = registered(rows)
    return torch.cat([next(loader)[0] for _ in range(batches)])


def test_the_seed_alone_orders_the_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows_of(2, 2)
    assert (first == rows_of(2, 2)).all() and (first == rows_of(4, 1)).all()
    monkeypatch.setenv("AUTORESEARCH_SEED", "7")
    assert (first != rows_of(2, 2)).any()


def test_training_text_is_not_validation_text(cache: Path) -> None:
    """No row of the validation or sealed set can be found in the training tokens."""
    stems = load_manifest(ARENA)["train"]
    train = b"".join((ARENA.folder / f"{stem}.bin").read_bytes() for stem in stems)
    val, sealed = rows_in("val"), rows_in("sealed")
    assert val.shape == sealed.shape == (256, 257)
    for row in np.concatenate([val, sealed]):
        assert row.tobytes() not in train


def rows_in(split: str) -> np.ndarray:
    return np.load(ARENA.folder / load_manifest(ARENA)[split])


def lengths() -> tuple[list[int], list[int]]:
    return Tokenizer.load(ARENA.folder / load_manifest(ARENA)["tokenizer"]).byte_lengths()


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
    model, rows = Bigram(), rows_in("val").astype(np.int64)
    exact, upstream = (np.array(n) for n in lengths())
    x, y = rows[:, :-1], rows[:, 1:]
    losses = -torch.log_softmax(model.table.detach().double(), dim=1).numpy()[x, y]
    bits = losses[exact[y] > 0].sum() / math.log(2)
    expected = bits / exact[y].sum(), bits / upstream[y].sum()
    assert evaluate(model, rows.astype(np.uint16), lengths(), torch.device("cpu")) == pytest.approx(
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
    model, rows = Bigram(), rows_in("val")
    with pytest.raises(SystemExit):
        evaluate(lambda x: cheat(model, x), rows, lengths(), torch.device("cpu"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_leak_below_the_tolerance(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: int
) -> None:
    """On a GPU rounding hides a small leak in each prediction, but not in the mean of many; noise alone is no leak."""
    monkeypatch.setitem(prepare.TOLERANCE, "cpu", 0.25)
    model, rows, rng = Bigram(), rows_in("val"), torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        peek = 0.05 * F.one_hot(torch.roll(x, -1, dims=1), 1024) if tokens else 0.0
        return model(x) + 0.01 * torch.randn(*x.shape, 1024, generator=rng) + peek

    if tokens:
        with pytest.raises(SystemExit):
            evaluate(noisy, rows, lengths(), torch.device("cpu"))
        assert "predictions are 0.0" in capsys.readouterr().err
    else:
        evaluate(noisy, rows, lengths(), torch.device("cpu"))


def test_finish_prints_what_the_driver_reads(
    quick: Arena, capsys: pytest.CaptureFixture[str]
) -> None:
    loader, model = registered(2)
    steps = sum(1 for _ in loader)
    finish(model, loader, depth=1, flops_per_token=1.0, note="mine")
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
    assert card.peak_tflops(gpu) == peak


def test_an_average_of_the_weights_may_be_scored(
    quick: Arena,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another module with the registered one's tensors; its weights are the ones that leave."""
    *command, code = client.FEEDER
    told = f"import os; os.environ['AUTORESEARCH_MODEL'] = {str(tmp_path)!r}; "
    monkeypatch.setattr(client, "FEEDER", [*command, told + code])
    monkeypatch.setenv("AUTORESEARCH_MODEL", str(tmp_path))
    loader, model = registered(2)
    average = AveragedModel(model)
    for _ in loader:
        with torch.no_grad():
            model.table.mul_(0.9)
        average.update_parameters(model)
    finish(average, loader, depth=1, flops_per_token=1.0)
    score = read_numbers(capsys.readouterr().out, "val_bpb")["val_bpb"]
    monkeypatch.setenv("AUTORESEARCH_SCORE", str(score))
    prepare.judge()
    assert f"val_bpb: {score:.6f}" in capsys.readouterr().out


class Knowing(Bigram):
    """It knows the pairs of the text's tokens, from the text itself."""

    def __init__(self) -> None:
        super().__init__()
        counts = torch.zeros(1024, 1024)
        for stem in load_manifest(ARENA)["train"]:
            text = torch.from_numpy(
                np.fromfile(ARENA.folder / f"{stem}.bin", np.uint16).astype(int)
            )
            counts.index_put_((text[:-1], text[1:]), torch.ones(1), accumulate=True)
        self.table = torch.nn.Parameter((counts + 0.1).log())


class Copying(Bigram):
    """It has learned nothing, and bets on what followed the same token earlier in the row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        same = (x[:, 1:, None] == x[:, None, :-1]).float().tril()
        followed = F.one_hot(x[:, 1:], 1024).float()
        found = F.pad(same, (0, 0, 1, 0)) @ followed + 0 * self.table[x]
        return (found + 0.003).log()


def test_a_model_that_knows_the_text(quick: Arena, capsys: pytest.CaptureFixture[str]) -> None:
    loader = TrainLoader(16, "cpu")
    loader.register(Knowing())
    with pytest.raises(SystemExit):
        next(loader)
    assert "before its first step the model predicts the text (loss " in capsys.readouterr().err
    loader = TrainLoader(16, "cpu")
    model = torch.nn.Sequential(Copying(), torch.nn.Dropout().eval())
    loader.register(model)
    next(loader)
    assert model.training and not model[1].training


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1\n" * 30_000, "train.py has 180 kB, and may have 128"),
        (f"y = 1\nx = {list(range(2000))}", "a literal of 10890 bytes in line 2"),
        (f"x = b{'a' * 5000!r}", "a literal of 5003 bytes in line 1, and may have 4096"),
        (f"x = {'1' * 4200}", "a literal of 4200 bytes"),
    ],
)
def test_no_room_for_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, reason: str
) -> None:
    (tmp_path / "train.py").write_text(source)
    with pytest.raises(SystemExit):
        prepare.check_size(tmp_path / "train.py")
    assert reason in capsys.readouterr().err
    prepare.check_size(ROOT / "train.py")


def test_finish_before_the_budget_is_spent(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader, model = registered(2)
    next(loader)
    with pytest.raises(SystemExit):
        finish(model, loader, depth=1, flops_per_token=1.0)
    assert "before the budget was spent" in capsys.readouterr().err


def test_finish_refuses_a_fact_it_counts_itself(quick: Arena) -> None:
    loader, model = registered(2)
    list(loader)
    with pytest.raises(ValueError, match="finish prints num_steps itself"):
        finish(model, loader, depth=1, flops_per_token=1.0, num_steps=10**6)


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
