"""
Noting what a model does: every operator that runs in one forward pass, from real tensors.

This is no tracing of Python: torch.export would need Dynamo, whose import alone takes longer than
the demo's whole start. What a forward pass reads from data outside of PyTorch would be frozen, so
`gpt.graph.export` compares the graph with the model on other tokens.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from gpt.graph import (
    FORMAT,
    MAX_CONSTANTS,
    Graph,
    Ref,
    Spec,
    encode,
    flex,
    plain,
    state_of,
    write_constant,
)
from gpt.operators import GraphError, address, check_call, execute, find_operator

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Recorder(TorchDispatchMode):
    """Notes operators as they run. Autograd must be off and is above it: composites come whole."""

    supports_higher_order_operators = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, as modes have it, imports Dynamo

    def __init__(self, state: Mapping[str, torch.Tensor], x: torch.Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: Any = WeakTensorKeyDictionary()  # names of each parameter and buffer
        for name, tensor in state.items():
            others = self.state.get(tensor, ())  # type: ignore[no-untyped-call]
            self.state[tensor] = (*others, name)
        self.refs: Any = WeakTensorKeyDictionary({x: Ref("x")})
        self.protected = {address(tensor) for tensor in (x, *state.values())} - {0}
        self.specs: list[Spec] = []
        self.constants: list[torch.Tensor] = []  # kept, so that no other takes their addresses
        self.nodes: list[dict[str, Any]] = []
        self.count = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(kind not in PLAIN for kind in types):
            return NotImplemented  # a subclass; what it consists of comes here next
        if operator is torch.ops.aten.lift_fresh.default:
            operator = torch.ops.aten.clone.default  # of a constant, which forward may write to
        find_operator(str(operator))
        check_call(operator, args, kwargs)
        node = {
            "op": str(operator),
            "args": encode(args, self.ref),
            "kwargs": {name: encode(value, self.ref) for name, value in kwargs.items()},
        }
        return self.note(node, execute(operator, args, kwargs, self.protected))

    def note(self, node: dict[str, Any], result: Any) -> Any:
        """Append a node, and remember where its result comes from."""
        name = self.fresh()
        self.nodes.append({"name": name, **node})
        if isinstance(result, torch.Tensor):
            self.refs.setdefault(result, Ref(name))
            return result
        for i, item in enumerate(result):
            if isinstance(item, torch.Tensor):
                self.refs.setdefault(item, Ref(name, i))
        return result

    def fresh(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def ref(self, tensor: torch.Tensor) -> Ref:
        """Where a tensor comes from; one that no operator made is of the model, or a constant."""
        if tensor not in self.refs:
            if names := self.state.get(tensor):
                self.specs.append(Spec.of(tensor, *names))
                self.refs[tensor] = Ref(f"t{len(self.specs) - 1}")
            else:
                self.constants.append(tensor)
                self.protected |= {address(tensor)} - {0}
                self.refs[tensor] = Ref(f"c{len(self.constants) - 1}")
        found: Ref = self.refs[tensor]
        return found

    def block(
        self, function: Callable[..., Any], args: Iterable[Any], inputs: Sequence[Any] = ()
    ) -> tuple[dict[str, Any], Any]:
        """What a function does, and what it returns. `inputs` are those args that have no name."""
        outer, self.nodes = self.nodes, []
        names = [self.fresh() for _ in inputs]
        for name, tensor in zip(names, inputs, strict=True):
            self.refs[tensor] = Ref(name)
        try:
            with self:
                results = function(*args)
            outputs = encode(listed(results), self.ref)
            return {"inputs": names, "nodes": self.nodes, "outputs": outputs}, results
        finally:
            self.nodes = outer


def listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, list | tuple) else [results]


@torch.ops.higher_order.cond.py_impl(Recorder)
def record_cond(mode: Recorder, which: Any, true: Any, false: Any, operands: Any) -> Any:
    """Both branches are noted. They see what lies around them, so operands are not passed on."""
    if not isinstance(which, torch.Tensor):
        with mode:
            return (true if which else false)(*operands)
    branches = [mode.block(function, operands) for function in (true, false)]
    results = branches[0 if which else 1][1]
    fresh = [tensor.detach() for tensor in listed(results)]  # known by the node, not the branch
    blocks = [block for block, _ in branches]
    mode.note({"op": "cond", "args": [encode(which, mode.ref)], "blocks": blocks}, fresh)
    return fresh if isinstance(results, list | tuple) else fresh[0]


@flex_operator.py_impl(Recorder)
def record_flex(
    mode: Recorder,
    query: Any,
    key: Any,
    value: Any,
    score: Any,
    mask: Any,
    scale: float,
    options: Any,
    score_more: Any = (),
    mask_more: Any = (),
) -> Any:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    start, *at = (query.new_zeros((), dtype=torch.int32) for _ in range(5))
    start = start.float()
    with TransformGetItemToIndex():  # else table[i], with a tensor i, takes a number out of it
        scored, _ = mode.block(score, [start, *at, *score_more], [start, *at])
        at = [index.clone() for index in at]
        masked, _ = mode.block(mask[-1], [*at, *mask_more], at)
    args = [*encode([query, key, value], mode.ref), encode(scale, mode.ref)]
    result = flex(
        query,
        key,
        value,
        scale,
        lambda *given: score(*given, *score_more),
        lambda *given: mask[-1](*given, *mask_more),
    )
    return mode.note({"op": "flex_attention", "args": args, "blocks": [scored, masked]}, result)


def record(model: torch.nn.Module, x: torch.Tensor) -> Graph:
    """What `model(x)` does in eval mode; any exception where it cannot be noted."""
    model = plain(model)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), eager(), warnings.catch_warnings(action="ignore"):
            graph = note_forward(model, x)
            expect_same(model, graph, x.maximum(x.roll(1, 1)).flip(1))
            return graph
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def eager() -> Iterator[None]:
    """Compile nothing, and do not import Dynamo, which takes seconds."""
    compiler, fast = torch.compile, torch.backends.mha.get_fastpath_enabled()
    torch.compile = lambda model=None, **_: model or (lambda model: model)  # type: ignore[assignment]
    torch.backends.mha.set_fastpath_enabled(False)  # which is one operator for a whole layer
    loaded = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if loaded else nullcontext():
            yield
    finally:
        torch.compile = compiler
        torch.backends.mha.set_fastpath_enabled(fast)


def note_forward(model: torch.nn.Module, x: torch.Tensor) -> Graph:
    recorder = Recorder(state_of(model), x)
    with torch._C._AutoDispatchBelowAutograd():
        block, logits = recorder.block(model, [x])
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[:2] != x.shape:
        kind = type(logits).__name__, *getattr(logits, "shape", ())
        raise GraphError(f"forward must return logits (B, T, V) alone, and returns {kind}")
    expect_buffers(model, recorder.constants)
    data = {
        "format": FORMAT,
        "x": x.shape,
        "tensors": [asdict(spec) for spec in recorder.specs],
        "constants": [write_constant(tensor) for tensor in recorder.constants],
        "block": block,
    }
    return Graph(json.loads(json.dumps(data)))  # read as it will be read


def expect_buffers(model: torch.nn.Module, constants: list[torch.Tensor]) -> None:
    """GraphError for tensors that are no parameters or buffers, and may be large or change."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if any(value is tensor for tensor in constants):
                where = f"{prefix}.{name}".removeprefix(".")
                raise GraphError(f"{where} is a plain tensor: use register_buffer")
    if sum(tensor.nbytes for tensor in constants) > MAX_CONSTANTS:
        shape = tuple(max(constants, key=lambda tensor: tensor.nbytes).shape)
        raise GraphError(f"forward uses a tensor {shape} from elsewhere: use register_buffer")


def expect_same(model: torch.nn.Module, graph: Graph, x: torch.Tensor) -> None:
    """GraphError unless the graph answers as the model does, at some of the tokens."""
    some = slice(None, None, max(x.shape[1] // 16, 1))
    expected = model(x)[:, some].float()
    logits = graph.bind(state_of(model), x.device)(x)[:, some].float()
    near = 0.01 * expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    if not torch.allclose(logits, expected, rtol=0.01, atol=near, equal_nan=True):
        raise GraphError(
            "its graph gives other logits than forward, which must consist of operators on tensors,"
            " the same in each call: no numpy, no tolist, no kernels of its own"
        )
