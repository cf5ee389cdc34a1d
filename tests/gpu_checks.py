"""
What only a GPU can show of train.py, each check in a process of its own; test_gpu.py runs them where there is one.

    AUTORESEARCH_ARENA=python uv run tests/gpu_checks.py attention
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import train
from gpt import graph
from prepare import ARENA


def some_tokens(rows: int) -> torch.Tensor:
    """Random tokens in documents of very unequal length, a few of a single token."""
    x = torch.randint(ARENA.bos, (rows, train.T), device=train.DEVICE)
    starts = (
        torch.rand(x.shape, device=train.DEVICE)
        < torch.logspace(-4, -2, rows, device=train.DEVICE)[:, None]
    )
    starts[:, 0] = starts[:, 700 % train.T] = starts[:, 701 % train.T] = True
    return torch.where(starts, ARENA.bos, x)


def error(ours: torch.Tensor, true: torch.Tensor) -> float:
    return ((ours.float() - true).norm() / true.norm()).item()


def attention_errors(x: torch.Tensor, window: int) -> list[float]:
    """Of the output and of the gradients in q, k and v, against dense attention in float32."""
    shape = (*x.shape, train.HEADS, train.HEAD_DIM)
    leaves = [
        torch.randn(shape, device=train.DEVICE, dtype=train.DTYPE).requires_grad_()
        for _ in range(3)
    ]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    ours = train.compiled(train.attend)(*leaves, train.documents_of(x, [window]), window)
    q, k, v = (t.transpose(1, 2) for t in wide)
    true = F.scaled_dot_product_attention(
        q, k, v, attn_mask=train.document_mask(x, window)
    ).transpose(1, 2)
    towards = torch.randn_like(true)
    ours.backward(towards.to(ours.dtype))
    true.backward(towards)
    return [error(ours, true), *(error(a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))]


def attention() -> None:
    """Every backend that is present, short windows and whole rows."""
    torch.backends.cuda.matmul.allow_tf32 = False
    backends = [train.ATTENTION, *(["varlen"] if "FA3" in train.ATTENTION else [])]
    for backend in backends:
        if backend != train.ATTENTION:
            torch.nn.attention.restore_flash_attention_impl()
        for window in sorted(set(train.GPT().windows)):
            errors = attention_errors(some_tokens(4), window)
            print(f"{backend}, window {window}: {errors}")
            assert max(errors) < 0.02


def tables() -> None:
    """The step of the n-gram tables, with rows that occur a thousand times, is the dense one."""
    rows, width, found = 2**16, 320, 2**15
    weight, square = (
        torch.randn(rows, width, device=train.DEVICE),
        torch.zeros(rows, device=train.DEVICE),
    )
    dense_weight, dense_square = weight.clone(), square.clone()
    for step in range(1, 4):
        index = torch.cat(
            [torch.randint(rows, (found // 2,)), torch.randint(16, (found // 2,))]
        ).to(train.DEVICE)
        grad = torch.randn(found, width, device=train.DEVICE).to(train.DTYPE)
        train.table_update(weight, square, index, grad, 0.1, step)
        total = torch.zeros_like(dense_weight).index_add(0, index, grad.float())
        dense_square = train.TABLE_BETA2 * dense_square + (
            1 - train.TABLE_BETA2
        ) * total.square().mean(1)
        spread = (dense_square / (1 - train.TABLE_BETA2**step)).sqrt() + 1e-10
        dense_weight -= 0.1 * total / spread[:, None]
    assert error(square, dense_square) < 1e-5 and error(weight, dense_weight) < 1e-5


def warm_up() -> None:
    """It leaves no trace, and after it nothing is compiled again."""
    fresh = {name: tensor.clone() for name, tensor in train.GPT().state_dict().items()}
    model = train.GPT()
    micro_rows = train.warm_up(model, min(train.BATCH, train.MICRO_BATCH) // train.T)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    torch._dynamo.config.error_on_recompile = True
    optimizers = train.make_optimizers(model)
    for step in range(3):
        train.schedule(optimizers, step, step / 3)
        x = some_tokens(train.BATCH // train.T)
        loss = train.train_step(model, optimizers, x, x.roll(-1, 1), micro_rows)
        assert loss.isfinite()
    with torch.no_grad():
        train.compiled(model.eval())(some_tokens(ARENA.eval_rows))


def memory() -> None:
    """Where memory is short, the micro-batch is halved until it suffices, and the batch stays."""
    model = train.GPT()
    with torch.no_grad():
        train.compiled(model.eval())(some_tokens(ARENA.eval_rows))
    evaluation = torch.cuda.max_memory_allocated()
    # the evaluation must fit, and on a small card takes more than a step: so a batch that is large enough
    while (peak := warmed_up(model)) < 1.5 * evaluation:
        train.BATCH *= 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        0.75 * peak / torch.cuda.get_device_properties(0).total_memory
    )
    assert train.warm_up(model, train.BATCH // train.T) < train.BATCH // train.T


def warmed_up(model: train.GPT) -> int:
    """Bytes that a warm-up takes at its peak, with the whole batch at once."""
    rows = train.BATCH // train.T
    assert train.warm_up(model, rows) == rows
    return torch.cuda.max_memory_allocated()


def referee() -> None:
    """A trained model, compiled and as the graph that the guard reads, gives the same loss."""
    model = train.GPT()
    optimizers = train.make_optimizers(model)
    for _ in range(5):
        x = some_tokens(train.BATCH // train.T)
        train.train_step(
            model, optimizers, x, x.roll(-1, 1), min(train.BATCH, train.MICRO_BATCH) // train.T
        )
    network, x = train.compiled(model.eval()), some_tokens(ARENA.eval_rows)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported, weights = graph.export(network, x), Path(folder) / "weights.bin"
        with weights.open("wb", buffering=0) as file:
            graph.write_tensors(network, exported, file)
        loaded = exported.bind(graph.read_tensors(weights, exported), train.DEVICE)
        losses = [
            F.cross_entropy(m(x).flatten(0, 1), x.roll(-1, 1).flatten()).item()
            for m in (network, loaded)
        ]
    print(losses)
    assert abs(losses[0] - losses[1]) < 5e-4


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
