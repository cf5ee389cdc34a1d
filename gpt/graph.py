"""
A model without its program: what leaves a training to be scored elsewhere.

A graph is JSON: operators of PyTorch by name, in order, with their arguments. Weights are raw bytes
in a file of their own, behind a header that the graph determines. Neither can hold code.

    graph = export(model, x)                before training: notes what one forward pass does
    file.write(graph.text)
    write_tensors(model, graph, file)       after it: the parameters and buffers that the graph uses
    graph = Graph.read(path)                elsewhere
    logits = graph.bind(read_tensors(path, graph), device)(x)
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import RawIOBase
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from gpt.operators import GraphError, Operator, address, check_call, execute, find_operator

Tensors = Mapping[str, torch.Tensor]
Logits = Callable[[torch.Tensor], torch.Tensor]

FORMAT = 1
MAX_GRAPH = 2**23  # bytes of JSON
MAX_CONSTANTS = 4096  # bytes of all tensors that forward makes of Python numbers
ALIGN = 64  # bytes, of each tensor in its file
CHUNK = 2**26  # bytes that are on their way from a GPU to the file

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.complex32, torch.complex64, torch.complex128, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    )
}
FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

# -----------------------------------------------------------------------------
# Arguments as JSON


@dataclass(frozen=True)
class Ref:
    """The value of a node, or one of its values."""

    name: str
    item: int | None = None


def encode(value: Any, ref: Callable[[torch.Tensor], Ref]) -> Any:
    """An argument as JSON; GraphError for one that is no data."""
    match value:
        case torch.Tensor():
            found = ref(value)
            return {"get": found.name} | ({} if found.item is None else {"item": found.item})
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case complex():
            return {"complex": str(value)}
        case list() | tuple():
            return [encode(item, ref) for item in value]
        case torch.device():
            return {"device": value.type}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {type(value).__name__: str(value).removeprefix("torch.")}
    raise GraphError(f"an operator takes a {type(value).__name__}: use tensors and numbers")


def decode(value: Any, known: set[str], nested: bool = False) -> Any:
    """What `encode` wrote, with a Ref for a tensor. No list holds a list, nor a Ref what is not
    `known`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() if not nested:
            return [decode(item, known, nested=True) for item in value]
        case {"get": str(name)} if name not in known:
            raise GraphError(f"{name[:80]} is used before it is there")
        case {"get": str(name), "item": int(item)}:
            return Ref(name, item)
        case {"get": str(name)}:
            return Ref(name)
        case {"float": "inf" | "-inf" | "nan" as number}:
            return float(number)
        case {"complex": str(number)}:
            return complex(number)
        case {"device": "cpu" | "cuda" as kind}:
            return torch.device(kind)
        case {"dtype": str(name)} if name in DTYPES:
            return DTYPES[name]
        case {"memory_format": str(name)} if name in FORMATS:
            return FORMATS[name]
        case {"layout": "strided"}:
            return torch.strided
    raise GraphError(f"{str(value)[:80]} is no argument")


def refs(value: Any) -> Iterator[str]:
    """Names of the nodes that an argument needs."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list):
        for item in value:
            yield from refs(item)


# -----------------------------------------------------------------------------
# The parts of a graph


@dataclass
class Node:
    """One call, of an operator, or of "cond" or "flex_attention", which have blocks."""

    name: str
    call: Operator | str
    args: list[Any]
    kwargs: dict[str, Any]
    blocks: list["Block"]
    free: list[str] = field(default_factory=list)  # what nothing needs after it

    def needs(self) -> set[str]:
        inner = chain.from_iterable(block.needs() for block in self.blocks)
        return {*refs([*self.args, *self.kwargs.values()]), *inner}


@dataclass
class Block:
    """Nodes in order, which see what lies around the block too."""

    inputs: list[str]
    nodes: list[Node]
    outputs: list[Any]

    def needs(self) -> set[str]:
        return {*refs(self.outputs), *chain.from_iterable(node.needs() for node in self.nodes)}

    def plan(self) -> None:
        """Note after which node each value can go."""
        own, later = {node.name for node in self.nodes}, set(refs(self.outputs))
        for node in reversed(self.nodes):
            needs = node.needs()
            node.free = sorted((({node.name} | needs) & own) - later)
            later |= needs


# arguments of those with blocks, and the inputs of each block
WITH_BLOCKS = {"cond": (1, [0, 0]), "flex_attention": (4, [5, 4])}


def parse_block(data: Any, known: set[str]) -> Block:
    """A block in which `known` names are there already; GraphError for one that may not run."""
    known, nodes = {*known}, []
    for name in data["inputs"]:
        add_name(name, known)
    for entry in data["nodes"]:
        nodes.append(parse_node(entry, known))
        add_name(nodes[-1].name, known)
    block = Block(data["inputs"], nodes, decode(data["outputs"], known))
    block.plan()
    return block


def parse_node(entry: Any, known: set[str]) -> Node:
    args = [decode(value, known) for value in entry["args"]]
    kwargs = {key: decode(value, known) for key, value in entry.get("kwargs", {}).items()}
    blocks = [parse_block(block, known) for block in entry.get("blocks", [])]
    call = entry["op"]
    if call in WITH_BLOCKS:
        if (len(args), [len(block.inputs) for block in blocks]) != WITH_BLOCKS[call] or kwargs:
            raise GraphError(f"{call} is called with arguments that it does not take")
    else:
        call = find_operator(call)
        check_call(call, args, kwargs)
    return Node(entry["name"], call, args, kwargs, blocks)


def add_name(name: Any, known: set[str]) -> None:
    if not re.fullmatch(r"n\d+", name) or name in known:
        raise GraphError(f"{name[:80]} is no new name of a node")
    known.add(name)


@dataclass(frozen=True)
class Spec:
    """A parameter or buffer. `order` sorts its dimensions by stride, the longest first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    tied: tuple[str, ...] = ()  # other names of the same tensor

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str, *tied: str) -> "Spec":
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
        return cls(name, dtype_name(tensor), tuple(tensor.shape), tuple(order), tied)

    @classmethod
    def parse(cls, data: Any) -> "Spec":
        lists = [tuple(data[key]) for key in ("shape", "order", "tied")]
        spec = cls(data["name"], data["dtype"], *lists)
        sizes = all(type(size) is int and 0 <= size < 2**48 for size in spec.shape)
        if not sizes or sorted(spec.order) != [*range(len(spec.shape))] or spec.dtype not in DTYPES:
            raise GraphError(f"{str(data)[:200]} describes no tensor")
        if not re.fullmatch(r"[\w.\- ]{1,500}", spec.name):
            raise GraphError(f"{spec.name[:80]!r} is no name of a tensor: use letters, digits, _")
        return spec

    @property
    def bytes(self) -> int:
        return int(math.prod(self.shape)) * DTYPES[self.dtype].itemsize


def dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or name not in DTYPES:
        raise GraphError(f"a tensor is {tensor.dtype}, {tensor.layout}: use a plain one")
    return name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 (N,), on its device."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)


def shaped(data: torch.Tensor, dtype: str, shape: Iterable[int]) -> torch.Tensor:
    """A tensor over bytes, uint8 (N,). Bools are made anew: a byte may be neither 0 nor 1."""
    tensor = data != 0 if dtype == "bool" else data.view(DTYPES[dtype])
    return tensor.view(tuple(shape))


def write_constant(tensor: torch.Tensor) -> dict[str, Any]:
    data = base64.b64encode(raw(tensor).cpu().numpy().tobytes()).decode()
    return {"dtype": dtype_name(tensor), "shape": list(tensor.shape), "data": data}


def read_constant(entry: Any) -> torch.Tensor:
    data = base64.b64decode(entry["data"], validate=True)
    return shaped(torch.tensor(list(data), dtype=torch.uint8), entry["dtype"], entry["shape"])


# -----------------------------------------------------------------------------
# The graph


class Graph:
    """What a model does with x (B, T), int64."""

    def __init__(self, data: Any):
        """Parse JSON; GraphError or any other where it is not what `export` writes."""
        if data["format"] != FORMAT:
            raise GraphError(f"it has format {data['format']}, and {FORMAT} is read")
        self.data = data
        self.shape = tuple(data["x"])
        self.specs = [Spec.parse(entry) for entry in data["tensors"]]
        self.constants = [read_constant(entry) for entry in data["constants"]]
        if sum(tensor.nbytes for tensor in self.constants) > MAX_CONSTANTS:
            raise GraphError(f"it holds constants of more than {MAX_CONSTANTS} bytes")
        tensors = {f"t{i}" for i in range(len(self.specs))}
        constants = {f"c{i}" for i in range(len(self.constants))}
        self.block = parse_block(data["block"], {"x"} | tensors | constants)
        if len(self.block.outputs) != 1 or self.block.inputs:
            raise GraphError("it must have one output")

    @classmethod
    def read(cls, path: Path) -> "Graph":
        """What `export` wrote; GraphError for any other file."""
        try:
            if path.stat().st_size > MAX_GRAPH:
                raise GraphError(f"it has more than {MAX_GRAPH} bytes")
            return cls(json.loads(path.read_bytes()))
        except GraphError as error:
            raise GraphError(f"the graph cannot be used: {error}") from None
        except Exception as error:  # whatever a file that lies leads to
            raise GraphError(f"the graph cannot be read: {brief(error)}") from None

    @property
    def text(self) -> bytes:
        """What `read` reads."""
        return json.dumps(self.data, allow_nan=False).encode()

    @property
    def size(self) -> int:
        """Bytes that `write_tensors` writes."""
        return len(self.header()) + sum(padded(spec.bytes) for spec in self.specs)

    def header(self) -> bytes:
        """What the file of its tensors begins with."""
        tensors = [asdict(spec) for spec in self.specs]
        text = json.dumps({"format": FORMAT, "tensors": tensors}) + "\n"
        return text.rjust(padded(len(text))).encode()

    def bind(self, tensors: Tensors, device: torch.device | str) -> Logits:
        """The model as a function of x, int64 (B, T), on this device, whatever it was made on.

        The function raises GraphError where the graph breaks a rule that shows only when it runs,
        and what its operators raise.
        """
        device = torch.device(device)
        values = {f"t{i}": tensors[spec.name].to(device) for i, spec in enumerate(self.specs)}
        values |= {f"c{i}": tensor.to(device) for i, tensor in enumerate(self.constants)}

        @torch.no_grad()
        def model(x: torch.Tensor) -> torch.Tensor:
            if x.shape != self.shape or x.dtype != torch.int64:
                raise GraphError(f"x must be int64 {self.shape}, not {x.dtype} {tuple(x.shape)}")
            start = values | {"x": x}
            protected = {address(tensor) for tensor in start.values()} - {0}
            logits = Run(device, protected).block(self.block, start)[0]
            if not isinstance(logits, torch.Tensor):
                raise GraphError("the graph returns no tensor")
            return logits

        return model


@dataclass(frozen=True)
class Run:
    """One evaluation of a graph."""

    device: torch.device
    protected: set[int]  # addresses of storages

    def block(self, block: Block, values: dict[str, Any]) -> list[Any]:
        """The outputs of a block, given its inputs and what lies around it."""
        for node in block.nodes:
            values[node.name] = self.call(node, values)
            for name in node.free:
                del values[name]
        return [self.fill(value, values) for value in block.outputs]

    def call(self, node: Node, values: dict[str, Any]) -> Any:
        args = [self.fill(value, values) for value in node.args]
        kwargs = {name: self.fill(value, values) for name, value in node.kwargs.items()}
        if node.call == "cond":
            return self.block(node.blocks[0 if args[0] else 1], dict(values))
        if node.call == "flex_attention":
            return flex(*args, *(self.function(block, values) for block in node.blocks))
        assert isinstance(node.call, Operator)
        return execute(node.call, args, kwargs, self.protected)

    def function(self, block: Block, values: dict[str, Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return self.block(block, values | dict(zip(block.inputs, args, strict=True)))[0]

        return call

    def fill(self, value: Any, values: dict[str, Any]) -> Any:
        """An argument, with tensors in place of references."""
        match value:
            case Ref(name, item):
                return values[name] if item is None else values[name][item]
            case torch.device():
                return self.device
            case list():
                return [self.fill(item, values) for item in value]
        return value


def flex(query: Any, key: Any, value: Any, scale: float, score: Any, mask: Any) -> Any:
    """Attention with dense scores: blocks of a mask only save time."""
    no_blocks = (query.shape[-2], key.shape[-2], *[None] * 14, mask)
    return flex_operator(query, key, value, score, no_blocks, scale, {})


# -----------------------------------------------------------------------------
# Export


def export(model: nn.Module, x: torch.Tensor) -> Graph:
    """Write down what `model(x)` does in eval mode, for x of this shape, int64 (B, T).

    The model runs twice, and the graph once on other tokens, to see that both answer the same: so
    x should be varied. GraphError, with the reason and the cure, where a model cannot be scored.
    """
    from gpt.record import record  # which needs this file; what scores does not need it

    try:
        return record(model, x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, GraphError) else brief(error)
        raise GraphError(f"the model cannot be exported to be scored: {reason}") from error


def plain(model: nn.Module) -> nn.Module:
    """What torch.compile, an average of weights or a way to train in parallel has wrapped."""
    if isinstance(model, AveragedModel | nn.DataParallel | DistributedDataParallel):
        return plain(model.module)
    wrapped: Any = getattr(model, "_orig_mod", None)
    return plain(wrapped) if wrapped is not None else model


def state_of(model: nn.Module | Tensors) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each under all its names."""
    if not isinstance(model, nn.Module):
        return dict(model)
    model = plain(model)
    parameters = model.named_parameters(remove_duplicate=False)
    state = chain(parameters, model.named_buffers(remove_duplicate=False))
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state}


def brief(error: BaseException) -> str:
    """An exception in a line: those of torch are pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


# -----------------------------------------------------------------------------
# Tensors


def padded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def write_tensors(model: nn.Module | Tensors, graph: Graph, file: RawIOBase) -> None:
    """Write what the graph uses of a model, or of its state by name, and nothing else, to a file or
    a pipe.

    GraphError where a tensor is not of the kind that it was when the graph was made.
    """
    state = state_of(model)
    write_all(file, memoryview(graph.header()))
    for spec in graph.specs:
        tensor = expect_spec(state, spec)
        for chunk in torch.split(raw(tensor.permute(spec.order)), CHUNK):
            write_all(file, chunk.cpu().numpy().data)
        write_all(file, memoryview(bytes(padded(spec.bytes) - spec.bytes)))


def expect_spec(state: Tensors, spec: Spec) -> torch.Tensor:
    tensor = state.get(spec.name)
    if tensor is None or (dtype_name(tensor), tuple(tensor.shape)) != (spec.dtype, spec.shape):
        now = "gone" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise GraphError(f"{spec.name} was {spec.dtype} {spec.shape} before training, and is {now}")
    for name in spec.tied:
        if (other := state.get(name)) is not tensor and not same(tensor, other):
            raise GraphError(f"{spec.name} and {name} were one tensor before training")
    return tensor


def same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and bool((tensor == other).all())


def write_all(file: RawIOBase, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # one call writes 2 GiB at most


def read_tensors(path: Path, graph: Graph) -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote for this graph, mapped into memory: it is read when it is used.

    GraphError for a file that is not exactly that.
    """
    header, size = graph.header(), graph.size
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise GraphError(f"the tensors must be a file of {size} bytes, and are {found}")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if data[: len(header)].numpy().tobytes() != header:
        raise GraphError("the tensors have another header than the graph needs")
    tensors, start = {}, len(header)
    for spec in graph.specs:
        shape = [spec.shape[dim] for dim in spec.order]
        flat = shaped(data[start : start + spec.bytes], spec.dtype, shape)
        tensors[spec.name] = flat.permute([spec.order.index(dim) for dim in range(len(shape))])
        start += padded(spec.bytes)
    return tensors
