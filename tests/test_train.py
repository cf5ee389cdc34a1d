"""train.py on a CPU: the parts, and real runs of seconds under the real loop."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Project, make_real_project

import train
from prepare import ARENA


def test_orthogonalize() -> None:
    """Singular values that span a factor of a hundred all end within 30% of 1, in wide, tall and square matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 64, 64), (2, 32, 128), (2, 128, 32)]:
        u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrices = u * torch.logspace(-2, 0, s.size(1)) @ v
        values = torch.linalg.svdvals(train.orthogonalize(matrices))
        assert values.min() > 0.7 and values.max() < 1.3


def some_tokens(rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(ARENA.bos, (rows, ARENA.sequence_len), generator=generator)
    x[:, 0] = ARENA.bos
    x[0, 100] = x[1, 7] = x[1, 200] = x[1, 201] = ARENA.bos
    return x


def test_offsets_and_mask_see_the_same_documents() -> None:
    """The GPU's offsets and the CPU's mask are two forms of one thing."""
    x = some_tokens()
    offsets = train.document_offsets(x)
    assert offsets[0] == 0 and offsets[-1] == x.numel() and (offsets.diff() >= 0).all()
    document = torch.searchsorted(offsets, torch.arange(x.numel(), dtype=torch.int32), right=True).view(x.shape)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    expected = (document[:, :, None] == document[:, None, :]) & causal
    assert (train.document_mask(x, train.T)[:, 0] == expected).all()
    assert len(offsets) == len(train.document_offsets(some_tokens(3) * 0)) == 3 * (train.T // 32) + 1


def test_offsets_of_a_row_with_more_documents_than_slots() -> None:
    x = torch.full((2, train.T), ARENA.bos)
    offsets = train.document_offsets(x)
    assert (offsets.diff() >= 0).all() and offsets[-1] == x.numel()
    assert train.T in offsets.tolist() and offsets.diff().max() <= train.T


def trained_a_little() -> train.GPT:
    """Output projections start at zero; a step makes the layers matter."""
    torch.manual_seed(0)
    model = train.GPT()
    optimizers = train.make_optimizers(model)
    for _ in range(2):
        train.train_step(model, optimizers, some_tokens()[:, :], some_tokens())
    return model


def test_attention_stays_within_documents_and_is_causal() -> None:
    model, x = trained_a_little(), some_tokens()
    with torch.no_grad():
        before = model(x)
        other = x.clone()
        other[0, 1:100] = (other[0, 1:100] + 1) % ARENA.bos  # the first document of the first row
        after = model(other)
    changed = (before != after).any(dim=2)
    assert changed[0, 1:100].all() and not changed[0, 100:].any() and not changed[1:].any()


def test_every_parameter_is_initialised() -> None:
    """With fresh memory poisoned, nothing of it is left in a new model."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        model = train.GPT()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_warm_up_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = train.GPT()
    before = copy.deepcopy(model.state_dict())
    train.warm_up(model, model, rows=2)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_micro_batches_make_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(ARENA.bos, (4, train.T), generator=torch.Generator().manual_seed(0))
    weights = []
    for micro in (4, 1):
        monkeypatch.setattr(train, "MICRO_BATCH", micro * train.T)
        torch.manual_seed(0)
        model = train.GPT()
        loss = train.train_step(model, train.make_optimizers(model), x, x)
        weights.append((loss, model.head.weight.detach().clone()))
    assert weights[0][0] == pytest.approx(weights[1][0].item(), rel=1e-5)
    assert torch.allclose(weights[0][1], weights[1][1], atol=1e-4)


@pytest.fixture
def real_project(tmp_path: Path, cache: Path) -> Project:
    return make_real_project(tmp_path, cache, budget=3.0)


def test_demo_end_to_end(real_project: Project) -> None:
    """Real text, real training, the offline agent: rows with real numbers, and a branch that agrees."""
    said = real_project.loop("--demo", "--experiments=1")
    assert "demo: already prepared" not in said  # prepare.py's chatter is not the driver's
    rows = real_project.rows()
    assert [row["experiment"] for row in rows] == ["0", "1"]
    assert rows[0]["status"] == "keep" and all(row["status"] in ("keep", "discard") for row in rows)
    assert all(2.0 < float(row["val_bpb"]) < 4.13 for row in rows)  # 4.13: nothing learned, log2(1024) / 2.42 bytes
    diff = real_project.git("diff", "--unified=0", "main", rows[1]["commit"], "--", "train.py")
    assert diff.count("\n+") <= 3 and rows[1]["description"].split()[0] in diff
    real_project.check("demo")


def test_diverged_loss_is_a_crash(real_project: Project) -> None:
    text = (real_project.root / "train.py").read_text()
    assert "loss = model(*part)" in text
    real_project.write("train.py", text.replace("loss = model(*part)", "loss = torch.nan * model(*part)"))
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=real_project.root, env=real_project.env | {"AUTORESEARCH_ARENA": "demo"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: the loss diverged: nan")
