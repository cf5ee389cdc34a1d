"""train.py on a CPU: the parts, and real runs of seconds under the real loop."""

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_checks
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Project, experiment, make_real_project
from torch.nn.attention.varlen import varlen_attn

import train
from gpt import card
from prepare import ARENA

BOS = ARENA.bos


def some_tokens(rows: int = 3) -> torch.Tensor:
    """Row 0 holds two documents, row 1 four, one of them a lone BOS; the others hold one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(BOS, (rows, train.T), generator=generator)
    x[:, 0] = BOS
    x[0, 100] = x[1, 7] = x[1, 200] = x[1, 201] = BOS
    return x


def trained_a_little() -> train.GPT:
    """Output projections start at zero; a step makes the layers matter."""
    model = train.GPT()
    optimizers = train.make_optimizers(model)
    for _ in range(2):
        train.train_step(model, optimizers, some_tokens(), some_tokens(), micro_rows=3)
    return model


# Attention and documents


@pytest.mark.parametrize("most", [16, 3])
def test_offsets_and_mask_see_the_same_documents(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's offsets and the CPU's mask are two forms of one thing, also where a row has more documents than are
    told apart."""
    monkeypatch.setattr(train, "MAX_DOCUMENTS", most)
    x = torch.cat([some_tokens(), torch.full((1, train.T), BOS)])
    offsets = train.document_offsets(x)
    assert offsets[0] == 0 and offsets[-1] == x.numel() and (offsets.diff() >= 0).all()
    document = torch.searchsorted(
        offsets, torch.arange(x.numel(), dtype=torch.int32), right=True
    ).view(x.shape)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    expected = (document[:, :, None] == document[:, None, :]) & causal
    assert (train.document_mask(x, train.T)[:, 0] == expected).all()
    assert [len(row.unique()) for row in document] == [2, min(4, most), 1, most]
    assert len(offsets) == len(train.document_offsets(some_tokens(4) * 0)) == 4 * most + 1


def varlen_by_loops(q, k, v, starts, _, longest, __, window_size):  # type: ignore[no-untyped-def]
    """What torch's varlen_attn promises, one sequence after the other: (tokens, HEADS, HEAD_DIM) in and out."""
    outs = []
    for start, end in itertools.pairwise(starts.tolist()):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        q1, k1, v1 = (t[start:end].transpose(0, 1) for t in (q, k, v))
        mask = (back >= 0) & (back <= window_size[0])
        outs.append(F.scaled_dot_product_attention(q1, k1, v1, attn_mask=mask).transpose(0, 1))
    return torch.cat(outs)


def test_the_way_to_the_gpus_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients by way of offsets are those of the dense mask, by the very check that a GPU is put to."""
    monkeypatch.setattr(train, "ATTENTION", "varlen")
    monkeypatch.setattr(train, "varlen_attn", varlen_by_loops, raising=False)
    for window in (1, 64, train.T):
        assert max(gpu_checks.attention_errors(some_tokens(), window)) < 1e-5


def test_the_real_kernels_take_and_give_these_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operator, on tensors without content."""
    monkeypatch.setattr(train, "ATTENTION", "varlen")
    monkeypatch.setattr(train, "varlen_attn", varlen_attn, raising=False)
    q, k, v = (
        torch.empty(3, train.T, 2, 64, device="meta", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    out = train.attend(q, k, v, train.document_offsets(some_tokens()).to("meta"), window=64)
    assert out.shape == q.shape
    out.backward(torch.empty_like(q))
    assert q.grad is not None and q.grad.shape == q.shape


def plain_rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoFormer's rotation (arXiv 2104.09864, equation 34), on halves instead of neighbours."""
    a, b = x.chunk(2, dim=-1)
    angles = torch.arange(x.size(1))[:, None] / base ** (
        torch.arange(0, x.size(-1), 2) / x.size(-1)
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def plain_loss(
    model: train.GPT, x: torch.Tensor, y: torch.Tensor, found: torch.Tensor
) -> torch.Tensor:
    """The model written down the long way, in the precision of its weights."""
    h = start = train.norm(F.embedding(x, model.embed))
    values = F.embedding(x, model.values).view(*x.shape, len(model.valued), 1, train.WIDTH)
    extras = torch.cat((values, found.view(*x.shape, *model.tables.shape)), dim=3)
    for i, layer in enumerate(model.layers):
        h = model.residual[i] * h + model.skip[i] * start
        normed = train.norm(h)
        q, k, v = (normed @ part.T for part in layer.qkv)
        q, k, v = (t.view(*x.shape, train.HEADS, train.HEAD_DIM) for t in (q, k, v))
        if i in model.valued:
            gate = 2 * torch.sigmoid(normed[..., : train.GATE_CHANNELS] @ layer.gate.T)
            sources = extras[:, :, model.valued.index(i)].view(
                *x.shape, -1, train.HEADS, train.HEAD_DIM
            )
            v = v + (gate.view(*x.shape, -1, train.HEADS, 1) * sources).sum(2)
        if layer.window == train.T:
            half, before = train.HEAD_DIM // 2, k.roll(1, dims=1)
            before[:, 0] = 0
            before[x == BOS] = k[x == BOS]
            slow = [c for c in range(train.HEAD_DIM) if c % half >= (1 - train.KEY_SHIFT) * half]
            channels = range(train.HEAD_DIM)
            k = torch.stack([(before if c in slow else k)[..., c] for c in channels], dim=-1)
        q, k = (train.QK_SCALE * train.norm(plain_rotate(t, train.ROPE_BASE)) for t in (q, k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / train.HEAD_DIM**0.5
        hidden = ~train.document_mask(x, layer.window)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        h = h + torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ layer.out.T
        h = h + F.relu(train.norm(h) @ layer.up.T - train.MLP_SHIFT).square() @ layer.down.T
    logits = train.SOFTCAP * torch.tanh(train.norm(h) @ model.head.T / train.SOFTCAP_KNEE)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("masked", [True, False])
def test_the_model_is_the_one_on_paper(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of a step, short windows and whole rows, beside the same written naively."""
    monkeypatch.setattr(train, "DOCUMENT_MASK", masked)
    monkeypatch.setattr(train, "DEPTH", 3)
    model, x = train.GPT(), some_tokens()
    y = x.roll(-1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    assert len(set(model.windows)) == 2 and len(model.valued) == 2
    found = F.embedding(model.tables.find(x), model.tables.weight).requires_grad_()
    expected = plain_loss(model, x, y, found)
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    grads["tables"] = found.grad.view(-1)  # type: ignore[union-attr]
    model.zero_grad()
    recorder = Recorder(model)
    loss = train.train_step(model, [recorder], x, y, micro_rows=3)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert recorder.grads.keys() == grads.keys()
    for name, grad in grads.items():
        most = 1e-6 + 1e-5 * grad.abs().max()  # a scalar's gradient is a sum of all tokens
        assert (recorder.grads[name].view_as(grad) - grad).abs().max() < most, name
        assert grad.abs().max() > 1e-5, name  # so that this can fail


def test_without_the_document_mask_a_row_is_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "DOCUMENT_MASK", False)
    x = some_tokens()
    assert set(train.document_offsets(x).tolist()) == {0, train.T, 2 * train.T, 3 * train.T}
    assert (
        train.document_mask(x, train.T)[:, 0]
        == torch.ones(train.T, train.T, dtype=torch.bool).tril()
    ).all()


def test_predictions_stay_within_documents_and_are_causal() -> None:
    """Neither attention nor an n-gram reaches across."""
    model, x = trained_a_little(), some_tokens()
    with torch.no_grad():
        before = model(x)
        other = x.clone()
        other[0, 1:100] = (other[0, 1:100] + 1) % BOS  # the first document of the first row
        after = model(other)
    changed = (before != after).any(dim=2)
    assert changed[0, 1:100].all() and not changed[0, 100:].any() and not changed[1:].any()


def test_flops_are_those_of_the_products() -> None:
    """Six for each weight of a matrix product, and twelve for each key of a window in each channel."""
    model = train.GPT()
    others = (model.embed, model.values, model.tables.weight, model.residual, model.skip)
    weights = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in others)
    assert train.flops_per_token(model) == 6 * weights + 12 * train.WIDTH * sum(model.windows)


# N-gram tables


def test_a_table_row_depends_on_its_ngram_alone() -> None:
    """Of each token that is changed, see which of the rows behind it move: bigrams reach one back, trigrams two."""
    tables, x = train.NgramTables(2), some_tokens()
    moved = torch.zeros(4, len(train.NGRAMS))
    for at in range(20, 90):
        other = x.clone()
        other[0, at] = (other[0, at] + 1) % BOS
        found = (tables.find(x) != tables.find(other))[0].view(train.T, 2, len(train.NGRAMS), 2)
        assert not found[:at].any() and not found[at + 3 :].any()
        moved += found[at : at + 4].float().mean((1, 3))
    assert torch.equal(
        (moved > 69).float(), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    )


def test_ngrams_start_anew_with_each_document() -> None:
    """Behind a BOS the rows are those of a document at the start of a row."""
    tables, x = train.NgramTables(2), some_tokens()
    alone = torch.full_like(x[:1], BOS)
    alone[0, : train.T - 100] = x[0, 100:]
    assert torch.equal(tables.find(x)[0, 100:], tables.find(alone)[0, : train.T - 100])


def test_hashes_spread_and_differ_between_tables() -> None:
    """As many rows are hit as random draws would hit, and what shares a row in one table does not in the next."""
    tables = train.NgramTables(2)
    x = torch.randint(BOS, (64, train.T), generator=torch.Generator().manual_seed(0))
    found = (tables.find(x) - tables.offsets).flatten(0, 1)
    draws, rows = len(found), tables.rows
    expected = rows * (1 - math.exp(-draws / rows))
    for table in found.unbind(1):
        assert table.min() >= 0 and table.max() < rows
        assert abs(len(table.unique()) / expected - 1) < 0.02
    pairs = found[:, 0] * rows + found[:, 1]
    assert len(pairs.unique()) > 0.95 * len((x[:, :-1] * train.V + x[:, 1:]).unique())


def test_table_update_is_dense_rmsprop_by_rows() -> None:
    """Rows that occur often, once and never, beside the same step on a dense gradient."""
    generator = torch.Generator().manual_seed(0)
    weight, square = (
        torch.randn(500, 8, generator=generator),
        torch.rand(500, generator=generator) * 1e-3,
    )
    index = torch.cat(
        [torch.randint(300, (200,), generator=generator), torch.zeros(50, dtype=torch.int64)]
    )
    grad = torch.randn(250, 8, generator=generator)
    dense = torch.zeros_like(weight).index_add(0, index, grad)
    second = train.TABLE_BETA2 * square + (1 - train.TABLE_BETA2) * dense.square().mean(1)
    expected = weight - 0.1 * dense / (second / (1 - train.TABLE_BETA2**7)).sqrt()[:, None]
    train.table_update(weight, square, index, grad, 0.1, 7)
    assert torch.allclose(square, second) and torch.allclose(weight, expected, rtol=1e-4, atol=1e-5)
    assert (weight[300:] == expected[300:]).all()


def test_the_kernel_of_the_tables_is_the_reference() -> None:
    """In Triton's interpreter, on a CPU: rows that occur often, once and never; columns that are no power of two."""
    pytest.importorskip("triton")
    steps = """
import torch
import train
generator = torch.Generator().manual_seed(0)
index = torch.cat([torch.randint(300, (200,), generator=generator), torch.full((50,), 7)])
start = torch.randn(500, 40, generator=generator), torch.rand(500, generator=generator) * 1e-3
grad, found = torch.randn(250, 40, generator=generator), []
for train.DEVICE in ("cpu", "cuda"):
    weight, square = (tensor.clone() for tensor in start)
    for step in (1, 2):
        train.table_update(weight, square, index, grad, 0.1, step)
    found += [weight, square]
assert (found[0] != start[0]).any(1).sum() == len(index.unique())
for reference, ours in zip(found[:2], found[2:]):
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", steps], env=env, check=True)


# Loss and optimizers


def test_the_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and both gradients, with a last chunk that is not full, as a share of more tokens."""
    monkeypatch.setattr(train, "LOSS_CHUNK", 32)
    generator = torch.Generator().manual_seed(0)
    model, h = train.GPT(), torch.randn(100, train.WIDTH, generator=generator).requires_grad_()
    y = torch.randint(train.V, (100,), generator=generator)
    model.head.data.normal_(generator=generator)
    loss, grad = train.head_loss(model, h, y, tokens=300)
    ours = loss, grad, model.head.grad
    model.zero_grad()
    logits = train.SOFTCAP * torch.tanh(h @ model.head.T / train.SOFTCAP_KNEE)
    true = F.cross_entropy(logits, y) / 3
    true.backward()
    for one, other in zip(ours, (true, h.grad, model.head.grad), strict=True):
        assert one is not None and other is not None
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_other_logits_are_trained_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that changes how they are capped changes one place, and a parameter that it adds there learns."""
    model, x = trained_a_little(), some_tokens()
    y, model.bias = x.roll(-1, 1), torch.nn.Parameter(torch.linspace(-1, 1, train.V))

    def logits(self: train.GPT, h: torch.Tensor) -> torch.Tensor:
        return 5 * torch.tanh(train.linear(h, self.head)) + self.bias

    monkeypatch.setattr(train.GPT, "logits", logits)
    with torch.no_grad():
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    recorder = Recorder(model)
    loss = train.train_step(model, [recorder], x, y, micro_rows=3).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert recorder.grads["bias"].abs().max() > 0


def test_training_and_scoring_see_the_same_model() -> None:
    """The loss of a training step is that of the logits which the evaluation gets."""
    model, x = trained_a_little(), some_tokens()
    y = x.roll(-1, 1)
    with torch.no_grad():
        expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss = train.train_step(model, [Recorder(model)], x, y, micro_rows=3).item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_orthogonalize() -> None:
    """Singular values that span a factor of a hundred all end within 30% of 1, in tall and square matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 64, 64), (2, 128, 32)]:
        u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        matrices = u * torch.logspace(-2, 0, s.size(1)) @ v
        values = torch.linalg.svdvals(train.orthogonalize(matrices))
        assert values.min() > 0.7 and values.max() < 1.3


def test_muon_evens_out_its_neurons() -> None:
    """The rows of a step end with one length, and the whole step keeps its norm."""
    generator, shape = torch.Generator().manual_seed(0), (2, 96, 24)
    grads = torch.randn(shape, generator=generator) * torch.logspace(-2, 0, 96)[:, None]
    plain = train.orthogonalize(grads)
    weights, momenta, squares = torch.zeros(shape), grads.clone(), torch.zeros(2, 96, 1)
    scalars = torch.ones(2, 1, 1), torch.tensor(0.95), torch.tensor(0.0)
    train.muon_update(weights, grads, momenta, squares, *scalars)
    assert weights.norm(dim=(1, 2)) == pytest.approx(plain.norm(dim=(1, 2)), rel=0.01)
    before, after = (
        rows.std(1) / rows.mean(1) for rows in (plain.norm(dim=2), weights.norm(dim=2))
    )
    assert (before > 0.3).all() and (after < 1e-3).all()


def test_muon_takes_matrices_as_they_lie() -> None:
    """A wide matrix takes the step of its transpose, and a tall one a longer step: four times as many rows, twice."""
    generator = torch.Generator().manual_seed(0)
    tall = torch.nn.Parameter(torch.randn(96, 24, generator=generator))
    stack = torch.nn.Parameter(torch.stack([tall.detach().clone(), tall.detach().clone()]))
    wide = torch.nn.Parameter(tall.detach().T.clone())
    tall.grad = torch.randn(96, 24, generator=generator)
    wide.grad, stack.grad = tall.grad.T.clone(), torch.stack([tall.grad, tall.grad])
    before = tall.detach().clone()
    optimizer = train.Muon([tall, wide, stack], lr=0.01)
    optimizer.decay = 0.0
    optimizer.step()
    step, sideways = tall.detach() - before, wide.detach().T - before
    assert torch.allclose(step, 2 * sideways, atol=1e-6) and step.abs().max() > 1e-4
    assert torch.equal(stack[0], tall) and torch.equal(stack[1], tall)


class Recorder:
    """In the place of an optimizer: keeps the gradients that a step comes with."""

    def __init__(self, model: train.GPT):
        self.model = model

    def step(self, rows: torch.Tensor, grad: torch.Tensor) -> None:
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.grads, self.rows = grads | {"tables": grad}, rows


def test_micro_batches_make_the_same_step() -> None:
    """The gradient of every parameter, of the tables too, whether a batch goes through at once or in unequal parts."""
    model, x = trained_a_little(), some_tokens(4)
    steps = []
    for micro_rows in (4, 1, 3):
        recorder = Recorder(model)
        loss = train.train_step(model, [recorder], x, x, micro_rows)
        assert torch.equal(recorder.rows, model.tables.find(x))
        steps.append(recorder.grads | {"loss": loss})
    assert len(steps[0]) == len(list(model.parameters())) + 1
    for other in steps[1:]:
        for name, grad in steps[0].items():
            assert (grad - other[name]).abs().max() < 1e-4 * grad.abs().max(), name


@pytest.mark.parametrize(
    "constants",
    [
        {"NGRAMS": (), "DEPTH": 1},
        {"NGRAMS": (3,), "DEPTH": 3},
        {"DOCUMENT_MASK": False, "WINDOWS": "L"},
        {"MAX_DOCUMENTS": 1, "HEADS": 1, "SHORT_WINDOW": 0.0},
    ],
)
def test_constants_that_leave_something_out(
    constants: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps, in one part and in several, and the evaluation."""
    for name, value in constants.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "WIDTH", train.HEADS * train.HEAD_DIM)
    model, x = train.GPT(), some_tokens(4)
    optimizers = train.make_optimizers(model)
    losses = [
        train.train_step(model, optimizers, x, x.roll(-1, 1), micro_rows).item()
        for micro_rows in (4, 1)
    ]
    assert losses[0] == pytest.approx(math.log(train.V), abs=0.1) and math.isfinite(losses[1])
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_nothing_of_a_step_is_kept_into_the_next() -> None:
    """What the first step of a warm-up takes is what every later one takes."""
    assert all(parameter.grad is None for parameter in trained_a_little().parameters())


# Before the clock starts


def test_every_parameter_is_initialised() -> None:
    """With fresh memory poisoned, nothing of it is left in a new model."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        model = train.GPT()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def out_of_memory_above(rows: int) -> Callable[..., torch.Tensor]:
    """A training step that fails as one does on a GPU, half done, when it gets more rows at a time."""
    step = train.train_step

    def short(model, optimizers, x, y, micro_rows):  # type: ignore[no-untyped-def]
        if micro_rows > rows:
            model.head.grad = torch.full_like(model.head, torch.nan)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        assert all(parameter.grad is None for parameter in model.parameters())
        return step(model, optimizers, x, y, micro_rows)

    return short


@pytest.mark.parametrize("fits", [16, 4])
def test_warm_up_leaves_no_trace(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: weights, gradients and random numbers are those of a model that was never warmed up, also where
    memory did not suffice at first."""
    fresh = train.GPT()
    drawn = torch.rand(3)
    model = train.GPT()
    monkeypatch.setattr(train, "train_step", out_of_memory_above(fits))
    assert train.warm_up(model, micro_rows=16) == fits
    assert torch.equal(torch.rand(3), drawn)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(
        torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_a_row_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train_step", out_of_memory_above(0))
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(train.GPT(), micro_rows=16)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("BATCH", 1000, "BATCH and MICRO_BATCH must be multiples of 256, the tokens in a row"),
        ("MICRO_BATCH", 100, "BATCH and MICRO_BATCH must be multiples of 256, the tokens in a row"),
        ("MICRO_BATCH", 3 * 256, "MICRO_BATCH must divide BATCH"),
        ("HEAD_DIM", 33, "HEAD_DIM must be a multiple of 8 up to 256"),
        ("HEAD_DIM", 264, "HEAD_DIM must be a multiple of 8 up to 256"),
        ("NGRAMS", 2, "NGRAMS must be a tuple, as in (2, 3), (2,) or ()"),
        ("NGRAMS", (2, 0), "NGRAMS must be a tuple, as in (2, 3), (2,) or ()"),
        ("WINDOWS", "", "WINDOWS must be letters S and L, at least one"),
        ("WINDOWS", "SSl", "WINDOWS must be letters S and L, at least one"),
    ],
)
def test_constants_that_do_not_fit(
    name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.check_constants()
    monkeypatch.setattr(train, name, value)
    with pytest.raises(AssertionError, match=re.escape(reason)):
        train.check_constants()


def test_a_parameter_that_nothing_initialises() -> None:
    """What the module itself has set, the warm-up would have changed."""

    class Normed(train.Layer):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.norm = torch.nn.LayerNorm(train.WIDTH)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Layer", Normed)
        with pytest.raises(
            AssertionError, match=r"leaves out layers.0.norm.weight, layers.0.norm.bias, layers.1"
        ):
            train.GPT()


def test_every_parameter_is_stepped_once() -> None:
    """A new gain, of a layer too and as a column, is in the last group; tied weights are told."""
    model = train.GPT()
    model.gain = torch.nn.Parameter(torch.ones(train.WIDTH))
    model.layers[0].gains = torch.nn.Parameter(torch.ones(train.HEADS, 1))
    optimizers = train.make_optimizers(model)
    stepped = [id(p) for optimizer in optimizers for p in optimizer.parameters]
    assert sorted(stepped) == sorted(map(id, model.parameters()))
    last = [id(p) for p in optimizers[-1].parameters]
    assert {id(model.gain), id(model.layers[0].gains), id(model.residual)} == {*last}
    model.head = model.embed
    with pytest.raises(AssertionError, match="two optimizers step one parameter"):
        train.make_optimizers(model)


@pytest.mark.parametrize(
    ("name", "still"), [("WARMDOWN", train.Muon), ("ADAM_WARMDOWN", train.AdamW)]
)
def test_rates_that_never_fall(name: str, still: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warmdown of no length: those rates stay, the others fall all the way."""
    monkeypatch.setattr(train, name, 0.0)
    optimizers = train.make_optimizers(train.GPT())
    train.schedule(optimizers, step=10, progress=1.0)
    for optimizer in optimizers:
        stays = isinstance(optimizer, still | train.RowRMSProp)
        assert optimizer.lr == pytest.approx(optimizer.start_lr * (1 if stays else train.FINAL_LR))


def test_a_gpu_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = replace(ARENA, name="climbmix")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(SystemExit):
        card.find_device(large)
    said = "error: the Tesla T4 has compute capability 7.5, and train.py needs 8.0 or newer"
    assert capsys.readouterr().err.startswith(said)
    assert card.find_device(ARENA) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert card.find_device(large) == "cuda"


@pytest.mark.parametrize(
    ("gib", "tflops", "found"),
    [
        (7.7, 15.3, (4, 2, 2**14, 32)),  # RTX 3050, of which no table has the TFLOP/s
        (7.6, 30.2, (6, 3, 2**15, 16)),  # RTX 4060
        (11.6, 25.5, (6, 3, 2**14, 32)),  # RTX 3060
        (23.5, 165.2, (6, 4, 2**16, 64)),  # RTX 4090
        (22.0, 121.0, (6, 4, 2**16, 64)),  # L4
        (79.1, 312.0, (6, 4, 2**17, 64)),  # A100
        (79.1, 989.5, (6, 5, 2**17, 64)),  # H100
        (180.0, 2250.0, (6, 5, 2**17, 64)),  # B200
        (0.5, 1.0, (4, 2, 2**14, 2)),
    ],
)
def test_sizes_follow_the_card(gib: float, tflops: float, found: tuple[int, ...]) -> None:
    assert card.sizes(gib, tflops, 8192) == found
    tables = 12 * 8192 * 128 * found[1] * found[3]  # bytes
    assert tables <= gib * 2**30 / 7


@pytest.mark.parametrize(
    ("release", "segments"),
    [
        ("6.8.0-45-generic", "expandable_segments:True"),
        ("5.15.167.4-microsoft-standard-WSL2", "None"),
    ],
)
def test_the_allocator_under_wsl(release: str, segments: str) -> None:
    code = f"""
import os
os.uname = lambda: os.uname_result(("Linux", "box", {release!r}, "#1", "x86_64"))
import train
print(os.environ.get("PYTORCH_ALLOC_CONF"))
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == segments


def test_no_gpu_at_all() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train.py"], env=os.environ | {"AUTORESEARCH_ARENA": "climbmix"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    expected = "error: no NVIDIA GPU found, and the arena climbmix needs one; AUTORESEARCH_ARENA=demo runs on any CPU\n"
    assert done.stderr == expected


# Real runs


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
    # nothing learned is 4.13, log2(1024) / 2.42 bytes; beside other work a run of 3 s may learn nothing
    assert all(1.0 < float(row["val_bpb"]) < 6.0 for row in rows)
    diff = real_project.git("diff", "--unified=0", "main", rows[1]["commit"], "--", "train.py")
    assert diff.count("\n+") <= 3 and rows[1]["description"].split()[0] in diff
    real_project.check("demo")
    log = (real_project.root / "runs/demo/0000/run.log").read_text()
    for name in ("DEPTH", "BATCH", "TABLE_ROWS", "NGRAMS", "WARMDOWN"):
        assert f"{name}={getattr(train, name)}" in log
    assert re.search(
        r"^step +0 +[\d.]+%  loss 6\.9\d+  [\d,]+ tok/s  mfu n/a  [0-3] s left$", log, re.MULTILINE
    )
    assert experiment(real_project, 0, "demo").facts["startup_seconds"] > 0
    for name in ("evaluation_seconds", "compile_seconds"):
        assert re.search(rf"^{name}: +[\d.]+$", log, re.MULTILINE)
    assert re.search(r"^attention: +dense$", log, re.MULTILINE)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_diverged_loss_is_a_crash(tmp_path: Path, cache: Path, value: str) -> None:
    """Within a step: the second loss is bad, and a third batch is never drawn."""
    real_project = make_real_project(
        tmp_path, cache, budget=60.0
    )  # two steps fit on a busy machine, too
    text = (real_project.root / "train.py").read_text()
    step = "        losses.append(train_step("
    assert text.count(step) == 1
    bad = f"        print('step', step)\n        losses.append((torch.{value} if step == 1 else 1) * train_step("
    real_project.write("train.py", text.replace(step, bad))
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=real_project.root, env=real_project.env | {"AUTORESEARCH_ARENA": "demo"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == f"error: the loss diverged: {value}\n"
    assert re.findall(r"^step (\d+)$", done.stdout, re.MULTILINE) == ["0", "1"]
