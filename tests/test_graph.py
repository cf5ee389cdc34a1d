"""A model without its program: every honest model leaves and answers the same, and nothing else comes back."""

import base64
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpt.graph import Graph, GraphError, export, read_tensors, write_tensors

pytestmark = pytest.mark.slow

B, T, V, D = 3, 32, 50, 16


def some_tokens() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def write(model: Any, graph: Graph, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        write_tensors(model, graph, file)


# Honest models


class Model(nn.Module):
    """Embedding, a body that each test has its own of, and a head that is tied to the embedding."""

    def __init__(self, body: Callable[..., torch.Tensor] | None = None, *parts: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight
        self.parts = nn.ModuleList(parts)
        self.scale = nn.Parameter(torch.randn(D))
        self.register_buffer("table", torch.randn(T, D), persistent=False)
        self.body = body or (lambda model, h, x: h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self, self.embed(x), x))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h)
        return h.relu().square()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def heads(h: torch.Tensor) -> torch.Tensor:
    return h.unflatten(-1, (2, -1)).transpose(1, 2)


def complex_rotary(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    turn = torch.polar(
        torch.ones(T, D // 2), torch.arange(T)[:, None] / torch.arange(1, D // 2 + 1)
    )
    return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def half_rotary(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Into memory that torch.empty gave."""
    turned = torch.empty_like(h)
    turned[..., ::2], turned[..., 1::2] = -h[..., 1::2], h[..., ::2]
    return h * model.table.cos() + turned * model.table.sin()


def in_place(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    shifted = torch.zeros_like(h)
    shifted[:, 1:] = h[:, :-1]
    shifted.add_(1).mul_(model.scale)
    shifted[x == 3] = 7.0
    shifted += torch.tensor([0.5, float("-inf"), float("nan")])[0]
    counts = torch.tensor(1.0)
    counts += x.sum()
    return shifted / counts


def causal_conv(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return model.parts[0](F.pad(h.transpose(1, 2), (3, 0))).transpose(1, 2)


def windows(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.pad(h, (0, 0, 3, 0)).unfold(1, 4, 1).mean(-1)


def scan(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gates = model.scale.sigmoid().expand_as(h).log()
    return (h.exp().log() - gates.cumsum(1)).logcumsumexp(1) + h.cumsum(1).cummax(1).values


def mixture(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    weights, chosen = model.parts[0](h).softmax(-1).topk(2, dim=-1)
    gates = torch.zeros(*h.shape[:2], 4).scatter(-1, chosen, weights)
    outputs = torch.stack([expert(h) for expert in model.parts[1:]], dim=-1)
    return torch.einsum("btde,bte->btd", outputs, gates)


def sorted_mixture(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Tokens by expert, in as many slots for each."""
    expert = model.parts[0](h).argmax(-1).flatten()
    order = expert.argsort(stable=True)
    slots = h.flatten(0, 1)[order].unflatten(0, (4, -1))
    weights = torch.stack([part.weight for part in model.parts[1:]])
    done = torch.bmm(slots, weights).flatten(0, 1)
    return torch.zeros_like(done).index_copy(0, order, done).view_as(h)


def branches(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    def positive(h: torch.Tensor) -> torch.Tensor:
        inner = torch.cond(h.mean() > 9, lambda h: h * 2, lambda h: h + model.scale, (h,))
        return inner.sin() * model.table

    return torch.cond(h.sum() > 0, positive, lambda h: h.float(), (h,))


def masked_flex(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    document = (x == 0).cumsum(1)
    mask = create_block_mask(
        lambda b, _, q, k: (q >= k) & (document[b, q] == document[b, k]), B, 1, T, T, device="cpu"
    )
    q = heads(h)
    bent = flex_attention(
        q, q, q, score_mod=lambda s, b, n, i, j: s + model.scale[n] * (i - j), block_mask=mask
    )
    return bent.transpose(1, 2).flatten(2)


def modes(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h = h * 2
    with torch.enable_grad():
        h = h * 3
    with torch.autocast("cpu", torch.bfloat16):
        h = model.parts[0](h)
    return torch.vmap(lambda row: row * row.norm())(h.float())


def low_precision(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float8 weights, used in bfloat16."""
    weight = model.scale.outer(model.scale).to(torch.float8_e4m3fn)
    return F.linear(h.bfloat16(), weight.bfloat16()).float()


def scaled_mm(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    one = torch.tensor(1.0)
    left, right = (
        h.flatten(0, 1).to(torch.float8_e4m3fn),
        model.parts[0].weight.to(torch.float8_e4m3fn),
    )
    return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16).float().view_as(h)


def attention(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    first = F.scaled_dot_product_attention(heads(h), heads(h), heads(h), is_causal=True)
    second = F.scaled_dot_product_attention(heads(h), heads(h), heads(h), attn_mask=mask, scale=0.3)
    return (first + second).transpose(1, 2).flatten(2)


def lazy(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A table that is made when it is first needed; what export leaves behind can be trained on."""
    if not hasattr(model, "angles"):
        model.angles = torch.arange(T * D).view(T, D).float() * 1e-3
    return h * model.angles


class Submodule(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def ensemble(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sum(part(h) for part in model.parts) / len(model.parts)


def first_part(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = model.parts[0](h)
    return out[0] if isinstance(out, tuple) else out


def norms(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h = model.parts[0](h.transpose(1, 2)).transpose(1, 2)
    return model.parts[3](model.parts[2](model.parts[1](h)))


def multihead(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    return model.parts[0](h, h, h, attn_mask=mask, need_weights=False)[0]


def encoder(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return model.parts[0](
        h, src_mask=nn.Transformer.generate_square_subsequent_mask(T), is_causal=True
    )


def spectrum(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A causal convolution by FFT."""
    kernel = torch.fft.rfft(model.table.exp().neg(), n=2 * T, dim=0)
    return torch.fft.irfft(torch.fft.rfft(h, n=2 * T, dim=1) * kernel, n=2 * T, dim=1)[:, :T]


def hashed(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    pair = torch.where(x == 0, 0, F.pad(x[:, :-1], (1, 0), value=3)) * 1_000_003 ^ x
    return h + F.embedding((pair >> 2) % V, model.embed.weight)


def demo() -> nn.Module:
    import train

    model = train.GPT()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(Model(first_part, nn.Linear(D, D)))


HONEST: dict[str, Callable[[], nn.Module]] = {
    "train.py's": demo,
    "an average of weights": averaged,
    "compiled": lambda: torch.compile(Model(first_part, nn.Linear(D, D)), backend="eager"),
    "compiled within": lambda: Model(first_part, torch.compile(nn.Linear(D, D), backend="eager")),
    "a compiled function": lambda: Model(
        lambda model, h, x: torch.compile(torch.sin, backend="eager")(h)
    ),
    "an ensemble": lambda: Model(ensemble, *(nn.Linear(D, D) for _ in range(3))),
    "an autograd function": lambda: Model(lambda model, h, x: Square.apply(h)),
    "torch.cond": lambda: Model(branches),
    "flex_attention": lambda: Model(masked_flex),
    "modes": lambda: Model(modes, nn.Linear(D, D)),
    "float8": lambda: Model(low_precision),
    "scaled_mm": lambda: Model(scaled_mm, nn.Linear(D, D)),
    "complex rotary": lambda: Model(complex_rotary),
    "half rotary": lambda: Model(half_rotary),
    "in place": lambda: Model(in_place),
    "attention": lambda: Model(attention),
    "GRU": lambda: Model(first_part, nn.GRU(D, D, batch_first=True)),
    "LSTM": lambda: Model(first_part, nn.LSTM(D, D, 2, batch_first=True, dropout=0.1)),
    "dropout": lambda: Model(first_part, nn.Dropout(0.5)),
    "norms": lambda: Model(
        norms, nn.BatchNorm1d(D), nn.LayerNorm(D), nn.RMSNorm(D), nn.Linear(D, D)
    ),
    "convolution": lambda: Model(causal_conv, nn.Conv1d(D, D, 4, groups=2)),
    "windows": lambda: Model(windows),
    "scan": lambda: Model(scan),
    "experts": lambda: Model(mixture, nn.Linear(D, 4), *(nn.Linear(D, D) for _ in range(4))),
    "sorted experts": lambda: Model(
        sorted_mixture, nn.Linear(D, 4), *(nn.Linear(D, D) for _ in range(4))
    ),
    "MultiheadAttention": lambda: Model(multihead, nn.MultiheadAttention(D, 2, batch_first=True)),
    "TransformerEncoderLayer": lambda: Model(
        encoder, nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)
    ),
    "FFT": lambda: Model(spectrum),
    "hashes": lambda: Model(hashed),
    "weight norm": lambda: Model(
        first_part, nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
    ),
    "a lazy table": lambda: Model(lazy),
    "tokens alone": lambda: Model(lambda model, h, x: F.one_hot(x % D, D).float()),
}


@pytest.mark.filterwarnings(
    "ignore"
)  # torch's own, of flex_attention that is not compiled and of Dynamo
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_answers_the_same(name: str, tmp_path: Path) -> None:
    model = HONEST[name]()
    x = some_tokens()
    if name == "train.py's":
        x = torch.randint(1024, (2, 256), generator=torch.Generator().manual_seed(1))
    model.train()
    (tmp_path / "graph.json").write_bytes(export(model, x).text)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for tensor in model.state_dict().values():  # it is trained after that
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn(tensor.shape))
    graph = Graph.read(tmp_path / "graph.json")
    write(model, graph, tmp_path / "tensors")
    scored = graph.bind(read_tensors(tmp_path / "tensors", graph), "cpu")
    with torch.no_grad():
        for tokens in (x, x.flip(1), x):
            torch.testing.assert_close(scored(tokens), model.eval()(tokens), rtol=1e-5, atol=1e-5)
    if name == "a lazy table":
        model.train()(x).sum().backward()


def test_each_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    """Any dtype, shape and order of dimensions, an empty and a large one; a mask stays a mask."""
    model = Model(lambda model, h, x: h + sum(getattr(model, name).float().mean() for name in made))
    made = {}
    for name in (
        "float64",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "uint8",
        "bool",
    ):
        made[f"a_{name}"] = torch.arange(30).view(5, 6).to(getattr(torch, name))
    made["a_scalar"] = torch.tensor(2.0)
    made["a_column"] = torch.randn(6, 5).t()
    made["a_strided"] = torch.randn(4, 6, 5)[:, ::2].transpose(0, 2)
    made["an_expanded"] = torch.randn(4, 1).expand(4, 3)
    made["a_large"] = torch.randn(2**25 + 3)
    for name, tensor in made.items():
        model.register_buffer(name, tensor)
    model.register_buffer("a_complex", torch.randn(3, 2, dtype=torch.complex64).conj())
    model.register_buffer("unused", torch.zeros(10))
    body = model.body
    model.body = lambda model, h, x: body(model, h, x) + model.a_complex.abs().mean()
    graph = export(model, some_tokens())
    (tmp_path / "graph.json").write_bytes(graph.text)
    write(model, graph, tmp_path / "tensors")
    back = read_tensors(tmp_path / "tensors", Graph.read(tmp_path / "graph.json"))
    assert back.keys() == {"embed.weight", "a_complex", *made}
    for name, tensor in back.items():
        mine = getattr(model, name) if name != "embed.weight" else model.embed.weight
        assert tensor.dtype == mine.dtype and torch.equal(
            tensor.double() if tensor.is_floating_point() else tensor,
            mine.double() if tensor.is_floating_point() else mine,
        )
    assert back["a_column"].stride() == made["a_column"].stride()
    logits = graph.bind(back, "cpu")(some_tokens())
    torch.testing.assert_close(logits, model(some_tokens()))
    state = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    write(state, graph, tmp_path / "tensors")  # two of the same content are as good as one
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(GraphError, match="were one tensor before training"):
        write(state, graph, tmp_path / "tensors")


def test_memory_is_freed_after_the_last_use(tmp_path: Path) -> None:
    model = Model(lambda model, h, x: h.sin().cos().exp() + h)
    graph = export(model, some_tokens())
    freed = [name for node in graph.block.nodes for name in node.free]
    assert sorted(freed) == sorted(
        {node.name for node in graph.block.nodes} - {graph.block.outputs[0].name}
    )


def test_nothing_slow_is_imported(tmp_path: Path) -> None:
    """Dynamo, SymPy and Triton take seconds, in every run."""
    code = f"""
import sys, torch
from pathlib import Path
from gpt.graph import *
model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
graph = export(model, torch.arange(6).view(2, 3))
with open({str(tmp_path / "tensors")!r}, "wb", 0) as file:
    write_tensors(model, graph, file)
graph.bind(read_tensors(Path({str(tmp_path / "tensors")!r}), graph), "cpu")(torch.zeros(2, 3, dtype=torch.int64))
assert not sys.modules.keys() & {{"torch._dynamo", "sympy", "triton", "torch.export._trace"}}
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Models that cannot be scored


def remember(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    model.table.add_(1)
    return h * model.table


def branch(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h if h.sum() > 0 else -h


def by_numpy(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h + torch.from_numpy(x.numpy() % 7).sum()


def attribute(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * model.plain


def with_attribute() -> Model:
    model = Model(attribute)
    model.plain = torch.ones(D)
    return model


def calls(model: Model, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    model.calls = getattr(model, "calls", 0) + 1
    return h * model.calls


class Tuple(Model):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


LARGE = [torch.randn(T, 100 * D)]
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a buffer that changes": (
        lambda: Model(remember),
        "add_.Tensor changes a parameter, a buffer or the input",
    ),
    "the input changes": (
        lambda: Model(lambda model, h, x: h + x.zero_()[..., None]),
        "zero_.default changes",
    ),
    "statistics": (
        lambda: Model(
            lambda model, h, x: F.batch_norm(h, torch.zeros(T), torch.ones(T), training=True)
        ),
        "aten.batch_norm.default is in training mode",
    ),
    "dropout": (
        lambda: Model(lambda model, h, x: F.dropout(h)),
        "dropout.default is in training mode",
    ),
    "dropout in attention": (
        lambda: Model(lambda model, h, x: F.scaled_dot_product_attention(h, h, h, dropout_p=0.1)),
        "drops at random",
    ),
    "noise": (
        lambda: Model(lambda model, h, x: h + torch.randn_like(h)),
        "randn_like.default is random",
    ),
    "a branch": (lambda: Model(branch), "takes a number out of a tensor.*torch.cond"),
    "an item": (
        lambda: Model(lambda model, h, x: h * h.sum().item()),
        "takes a number out of a tensor",
    ),
    "NumPy": (lambda: Model(by_numpy), "no numpy"),
    "a list": (lambda: Model(lambda model, h, x: h * sum(x[0].tolist())), "no tolist"),
    "counted calls": (lambda: Model(calls), "the same in each call"),
    "shapes of data": (
        lambda: Model(lambda model, h, x: h + x.nonzero().sum()),
        "shape depends on data",
    ),
    "as_strided": (
        lambda: Model(lambda model, h, x: h + h.as_strided((D,), (1,))),
        "use view, unfold or gather",
    ),
    "a plain attribute": (with_attribute, "plain is a plain tensor: use register_buffer"),
    "a global": (
        lambda: Model(lambda model, h, x: h + LARGE[0][:, :D]),
        r"a tensor \(32, 1600\) from elsewhere",
    ),
    "an operator of its own": (
        lambda: Model(lambda model, h, x: torch.ops.graph_test.mine(h)),
        "graph_test.mine.default is no operator of PyTorch",
    ),
    "two results": (Tuple, r"forward must return logits \(B, T, V\) alone, and returns \('tuple'"),
    "an error": (lambda: Model(lambda model, h, x: h @ h), "RuntimeError: "),
    "a file": (
        lambda: Model(
            lambda model, h, x: h + torch.from_file("/etc/passwd", size=1, dtype=torch.uint8)
        ),
        "from_file.default is not among the operators",
    ),
}


@torch.library.custom_op("graph_test::mine", mutates_args=())
def mine(h: torch.Tensor) -> torch.Tensor:
    return h.clone()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_scored_is_told_why(name: str, tmp_path: Path) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(
        GraphError, match=f"^the model cannot be exported to be scored: .*{reason}"
    ) as caught:
        export(make(), some_tokens())
    assert "\n" not in str(caught.value) and not (tmp_path / "graph.json").exists()


# Files that lie


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """The graph and the tensors of an honest model."""
    folder = tmp_path_factory.mktemp("exported")
    model = Model(in_place)
    graph = export(model, some_tokens())
    (folder / "graph.json").write_bytes(graph.text)
    write(model, graph, folder / "tensors")
    return json.loads((folder / "graph.json").read_text()), (folder / "tensors").read_bytes()


def node(op: str, *args: Any, name: str = "n1", **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "args": list(args), "kwargs": kwargs}


def graph_of(*nodes: Any, **changes: Any) -> dict[str, Any]:
    block = {"inputs": [], "nodes": list(nodes), "outputs": [{"get": "n1"}]}
    return {"format": 1, "x": [B, T], "tensors": [], "constants": [], "block": block} | changes


def spec(**changes: Any) -> dict[str, Any]:
    return {"name": "w", "dtype": "float32", "shape": [2], "order": [0], "tied": []} | changes


X = {"get": "x"}
LIES: dict[str, tuple[Any, str]] = {
    "from_file": (
        graph_of(node("aten.from_file.default", "/etc/passwd")),
        "not among the operators",
    ),
    "a method of Python": (graph_of(node("aten.__class__", X)), "is no operator of PyTorch"),
    "a method of an operator": (
        graph_of(node("aten.add.__class__", X)),
        "is no operator on tensors",
    ),
    "a method of operators": (
        graph_of(node("aten.__class__.default", X)),
        "not among the operators",
    ),
    "another namespace": (graph_of(node("prim.PythonOp.default", X)), "is no operator of PyTorch"),
    "another of attention": (
        graph_of(node("torch_attn._varlen_attn_backward.default", X)),
        "not among",
    ),
    "Python": (graph_of(node("os.system.default", "true")), "is no operator of PyTorch"),
    "a random one": (graph_of(node("aten.bernoulli.default", X)), "is random"),
    "a random one in place": (graph_of(node("aten.normal_.default", X)), "is random"),
    "dropout": (graph_of(node("aten.dropout.default", X, 0.5, train=True)), "is in training mode"),
    "statistics": (
        graph_of(node("aten.batch_norm.default", X, X, X, X, X, True, 0.1, 0.1, False)),
        "training mode",
    ),
    "dropout twice": (
        graph_of(node("aten.dropout.default", X, 0.5, True, train=False)),
        "does not take",
    ),
    "out": (graph_of(node("aten.add.out", X, X, out=X)), "form of it that cannot be scored"),
    "a number": (graph_of(node("aten.add.int", 1, 2)), "is no operator on tensors"),
    "a list that is sorted in place": (
        graph_of(node("aten.sort.int", [2, 1])),
        "form of it that cannot be scored",
    ),
    "resize": (graph_of(node("aten.resize_.default", X, [9])), "not among the operators"),
    "set": (graph_of(node("aten.set_.source_Tensor", X, X)), "not among the operators"),
    "foreach": (graph_of(node("aten._foreach_add_.Scalar", [X], 1)), "not among the operators"),
    "memory as it is": (graph_of(node("aten.empty_strided.default", [2], [1])), "use torch.zeros"),
    "as_strided": (
        graph_of(node("aten.as_strided.default", X, [9], [1], 10**6)),
        "addresses memory freely",
    ),
    "bools of bytes": (
        graph_of(node("aten.view.dtype", X, {"dtype": "bool"})),
        "makes bools of bytes",
    ),
    "the future": (
        graph_of(node("aten.neg.default", {"get": "n2"}), node("aten.neg.default", X, name="n2")),
        "n2 is used before it is there",
    ),
    "itself": (graph_of(node("aten.neg.default", {"get": "n1"})), "n1 is used before"),
    "a name twice": (graph_of(*[node("aten.neg.default", X)] * 2), "n1 is no new name"),
    "a name of another kind": (graph_of(node("aten.neg.default", X, name="x")), "x is no new name"),
    "a branch from within another": (
        graph_of(
            {
                **node("cond", X),
                "blocks": [
                    {
                        "inputs": [],
                        "nodes": [node("aten.neg.default", X, name="n2")],
                        "outputs": [{"get": "n2"}],
                    },
                    {"inputs": [], "nodes": [], "outputs": [{"get": "n2"}]},
                ],
            }
        ),
        "n2 is used before it is there",
    ),
    "cond of one branch": (graph_of({**node("cond", X), "blocks": []}), "does not take"),
    "a sparse layout": (
        graph_of(node("aten.zeros.default", [2], layout={"layout": "sparse_coo"})),
        "is no argument",
    ),
    "a quantized dtype": (
        graph_of(node("aten.zeros.default", [2], dtype={"dtype": "qint8"})),
        "is no argument",
    ),
    "another device": (
        graph_of(node("aten.zeros.default", [2], device={"device": "meta"})),
        "is no argument",
    ),
    "a number for a dtype": (
        graph_of(node("aten.zeros.default", [2], dtype=-2)),
        "takes a dtype for dtype",
    ),
    "a number for a device": (
        graph_of(node("aten.to.prim_Device", X, None, -2)),
        "cannot be scored",
    ),
    "lists in lists": (graph_of(node("aten.cat.default", [[X]])), "is no argument"),
    "a path": (graph_of(tensors=[spec(name="../../etc/passwd")]), "is no name of a tensor"),
    "a negative size": (graph_of(tensors=[spec(shape=[-4])]), "describes no tensor"),
    "dimensions twice": (
        graph_of(tensors=[spec(shape=[2, 2], order=[0, 0])]),
        "describes no tensor",
    ),
    "an object for a dtype": (graph_of(tensors=[spec(dtype="Tensor")]), "describes no tensor"),
    "a huge constant": (
        graph_of(constants=[{"dtype": "uint8", "shape": [6000], "data": "AAAA" * 2000}]),
        "constants of more than 4096 bytes",
    ),
    "a constant of another size": (
        graph_of(constants=[{"dtype": "uint8", "shape": [7], "data": "AAAA"}]),
        "RuntimeError",
    ),
    "another format": (graph_of(format=2), "it has format 2"),
    "a list": ([1], "TypeError"),
    "nothing": ({}, "KeyError"),
    "no JSON": (b"\x80\x04\x95.", "UnicodeDecodeError"),
    "deep JSON": (b"[" * 10**6, "RecursionError"),
    "deep blocks": (b'{"block":' * 10**5, "RecursionError"),
    "not a number": (b'{"format": NaN}', "has format nan"),
    "a zip file": (None, "UnicodeDecodeError"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_graph_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    data, reason = LIES[name]
    path = tmp_path / "graph.json"
    if data is None:
        torch.save({"x": 1}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(GraphError, match=f"^the graph cannot be (used|read): .*{reason}"):
        Graph.read(path)


def test_a_pickle_is_not_run(tmp_path: Path, exported: tuple[dict[str, Any], bytes]) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it-ran"),)

    for name in ("graph.json", "tensors"):
        torch.save(Payload(), tmp_path / name)
    with pytest.raises(GraphError, match="cannot be read"):
        Graph.read(tmp_path / "graph.json")
    graph = Graph(exported[0])
    with pytest.raises(GraphError, match="must be a file of"):
        read_tensors(tmp_path / "tensors", graph)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data + bytes(64), r"must be a file of \d+ bytes"),
        (lambda data: data[:-64], r"must be a file of \d+ bytes"),
        (lambda data: b"", r"must be a file of \d+ bytes, and are 0"),
        (
            lambda data: data.replace(b'"shape": [50, 16]', b'"shape": [16, 50]', 1),
            "another header",
        ),
        (lambda data: data.replace(b"embed.weight", b"../../weight", 1), "another header"),
        (lambda data: b"PK\x03\x04" + data[4:], "another header"),
    ],
)
def test_tensors_that_are_not_the_graphs_are_refused(
    change: Callable[[bytes], bytes],
    reason: str,
    tmp_path: Path,
    exported: tuple[dict[str, Any], bytes],
) -> None:
    graph, data = Graph(exported[0]), exported[1]
    (tmp_path / "tensors").write_bytes(data)
    assert read_tensors(tmp_path / "tensors", graph).keys() == {"embed.weight", "scale"}
    (tmp_path / "tensors").write_bytes(change(data))
    with pytest.raises(GraphError, match=reason):
        read_tensors(tmp_path / "tensors", graph)
    (tmp_path / "tensors").unlink()
    with pytest.raises(GraphError, match="and are None"):
        read_tensors(tmp_path / "tensors", graph)


def test_nothing_is_remembered_when_it_runs(tmp_path: Path) -> None:
    """Also through a view, and of constants and tokens."""
    constant = {"dtype": "int64", "shape": [1], "data": "AAAAAAAAAAA="}
    for of in ("t0", "c0", "x"):
        view = node("aten.view.default", {"get": of}, [-1], name="n2")
        nodes = [view, node("aten.add_.Scalar", {"get": "n2"}, 1)]
        graph = Graph(graph_of(*nodes, tensors=[spec()], constants=[constant]))
        with pytest.raises(GraphError, match="must not remember"):
            graph.bind({"w": torch.zeros(2)}, "cpu")(some_tokens())


def test_what_is_empty_is_zero() -> None:
    graph = Graph(graph_of(node("aten.empty.memory_format", [2**20])))
    kept = [torch.full((2**20,), 7.0) for _ in range(4)]
    del kept
    assert not graph.bind({}, "cpu")(some_tokens()).any()


@pytest.mark.parametrize(
    ("ends", "longest"),
    [([0, 9], 9), ([1, 8], 8), ([0, 9, 8], 9), ([0, 8], 4), ([-1, 8], 9), ([0, 7], 8)],
)
def test_offsets_that_leave_the_tokens_are_refused(ends: list[int], longest: int) -> None:
    """On a GPU the kernel would read what lies behind."""
    entry = {"dtype": "int32", "shape": [len(ends)], "data": ""}
    entry["data"] = base64.b64encode(
        torch.tensor(ends, dtype=torch.int32).numpy().tobytes()
    ).decode()
    q, c = {"get": "t0"}, {"get": "c0"}
    varlen = node("torch_attn._varlen_attn.default", q, q, q, c, c, longest, longest)
    varlen["args"] += [False, None, [-1, -1], False, None, None]
    graph = Graph(
        graph_of(varlen, tensors=[spec(shape=[8, 2, 4], order=[0, 1, 2])], constants=[entry])
    )
    with pytest.raises(GraphError, match=r"offsets|offsets of groups leave"):
        graph.bind({"w": torch.zeros(8, 2, 4)}, "cpu")(some_tokens())


def test_another_shape_of_tokens_is_refused(exported: tuple[dict[str, Any], bytes]) -> None:
    model = Graph(exported[0]).bind(
        {"embed.weight": torch.zeros(V, D), "scale": torch.zeros(D)}, "cpu"
    )
    with pytest.raises(
        GraphError, match=re.escape("x must be int64 (3, 32), not torch.int64 (3, 16)")
    ):
        model(some_tokens()[:, :16])
    with pytest.raises(IndexError):
        model(some_tokens() + V)
