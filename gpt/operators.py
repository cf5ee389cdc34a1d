"""
The operators of PyTorch that a graph may call, and how: none opens files, draws random numbers,
reads memory that it was not given, or remembers anything.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Operator = torch._ops.OpOverload

# Of `aten`. With a trailing underscore they write to their first argument.
NAMES = frozenset(
    """
    abs acos acosh adaptive_avg_pool1d add addbmm addcdiv addcmul addmm addmv addr alias all amax
    amin aminmax angle any arange argmax argmin argsort asin asinh atan atan2 atanh atleast_1d
    atleast_2d atleast_3d avg_pool1d baddbmm batch_norm bilinear bitwise_and bitwise_left_shift
    bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bmm broadcast_tensors
    broadcast_to bucketize cat cdist ceil celu chunk clamp clamp_max clamp_min clip clone
    column_stack complex concat concatenate conj conj_physical constant_pad_nd contiguous conv1d
    conv2d convolution copy copysign cos cosh cosine_similarity count_nonzero cross cummax cummin
    cumprod cumsum detach diag diag_embed diagonal diagonal_scatter diff dist div divide dot dropout
    dstack einsum elu embedding empty empty_like eq erf erfc erfinv exp exp2 expand expand_as expm1
    eye feature_dropout fft_fft fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifftn
    fft_ifftshift fft_ihfft fft_irfft fft_irfftn fft_rfft fft_rfftfreq fft_rfftn fill flatten flip
    fliplr flipud float_power floor floor_divide fmax fmin fmod frac full full_like gather ge gelu
    glu greater greater_equal group_norm gru gt hardshrink hardsigmoid hardswish hardtanh heaviside
    hstack hypot imag index index_add index_copy index_fill index_put index_reduce index_select
    inner isclose isfinite isin isinf isnan isneginf isposinf kron kthvalue layer_norm ldexp le
    leaky_relu lerp less less_equal lgamma linalg_inv linalg_matmul linalg_matrix_norm
    linalg_matrix_power linalg_multi_dot linalg_norm linalg_qr linalg_solve linalg_solve_triangular
    linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax
    logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit logspace
    logsumexp lstm lt mH mT masked_fill masked_scatter matmul matrix_exp max max_pool1d maximum mean
    median meshgrid min minimum mish mm moveaxis movedim msort mul multiply mv nan_to_num nansum
    narrow narrow_copy native_group_norm native_layer_norm ne neg negative new_empty new_full
    new_ones new_zeros nextafter norm not_equal numpy_T one_hot ones ones_like outer pad
    pairwise_distance permute pixel_shuffle pixel_unshuffle polar positive pow prelu prod rad2deg
    ravel real reciprocal relu relu6 remainder repeat repeat_interleave reshape reshape_as
    resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub scalar_tensor
    scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select
    select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_scatter softmax
    softplus softshrink sort special_erf special_erfc special_expit special_expm1 special_log1p
    special_logsumexp special_xlogy split split_with_sizes sqrt square squeeze stack std std_mean
    sub subtract sum swapaxes swapdims t take take_along_dim tan tanh tensor_split tensordot
    threshold tile to topk trace transpose tril tril_indices triu triu_indices true_divide trunc
    type_as unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze var
    var_mean vdot view view_as view_as_complex view_as_real vstack where xlogy zero zeros zeros_like
    __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__
    _conj _grouped_mm _int_mm _log_softmax _safe_softmax _scaled_mm _softmax _to_copy _unsafe_view
    _weight_norm
    """.split()  # noqa: SIM905
)
EMPTY = ("empty", "empty_like", "new_empty")
GROUPED = "aten._grouped_mm.default"
VARLEN = "torch_attn._varlen_attn.default"  # registered by torch.nn.attention.varlen

KINDS: dict[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}

# What others do, and what to do instead
REASONS = {
    r"_local_scalar_dense|item|is_nonzero|equal|allclose|_is_a.._true": "takes a number out of a"
    " tensor: forward must not branch on data, which torch.where and torch.cond can",
    r"argwhere|masked_select|nonzero.*|_?unique.*|bincount": "has a result whose shape depends on"
    " data: use masks",
    r"as_strided.*": "addresses memory freely: use view, unfold or gather",
    r"empty_.*|new_empty_.*": "takes memory as it is: use torch.zeros",
}


class GraphError(ValueError):
    """A model that cannot leave, or a file that is none: one line with the reason and the cure."""


def find_operator(name: str) -> Operator:
    """The operator of a name as in `aten.add.Tensor`; GraphError unless a graph may call it."""
    parts = re.fullmatch(r"(aten|torch_attn)\.(\w+)\.(\w+)", name, re.ASCII)
    if not parts:
        raise GraphError(f"{name[:80]} is no operator of PyTorch: write it in PyTorch's own")
    namespace, base, overload = parts.groups()
    if name == VARLEN:
        importlib.import_module("torch.nn.attention.varlen")  # seconds
    elif namespace != "aten" or not {base, base.removesuffix("_")} & NAMES:
        raise GraphError(f"{name} {why_not(base, overload)}")
    operator = look_up(namespace, base, overload)
    if operator is None or not all("Tensor" in str(value.type) for value in returns(operator)):
        raise GraphError(f"{name} is no operator on tensors")
    written = [i for i, argument in enumerate(operator._schema.arguments) if argument.is_write]
    if (
        overload == "data"
        or overload.startswith("prim_")
        or (written and (written != [0] or not is_in_place(base)))
    ):
        raise GraphError(f"{name} is a form of it that cannot be scored: use its plain form")
    return operator


def look_up(namespace: str, base: str, overload: str) -> Operator | None:
    packet = getattr(getattr(torch.ops, namespace), base, None)
    operator = getattr(packet, overload, None)
    return operator if isinstance(operator, Operator) else None


def returns(operator: Operator) -> list[Any]:
    return list(operator._schema.returns)


def is_in_place(base: str) -> bool:
    return base.startswith("__i") or (base.endswith("_") and not base.startswith("__"))


def why_not(base: str, overload: str) -> str:
    for pattern, reason in REASONS.items():
        if re.fullmatch(pattern, base):
            return reason
    tags = getattr(look_up("aten", base, overload), "tags", ())
    if torch.Tag.nondeterministic_seeded in tags:
        return "is random: asked twice, a model must answer the same"
    return "is not among the operators that can be scored: use others"


def check_call(operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """GraphError where an operator is called in a way that is random, remembers or is unsafe."""
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(given) != len(args) + len(kwargs):
        raise GraphError(f"{operator} is called with arguments that it does not take")
    for argument in operator._schema.arguments:  # a number would do for these, and is not checked
        kind = KINDS.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
        if kind and not isinstance(given.get(argument.name), kind | None):
            raise GraphError(f"{operator} takes a {kind.__name__} for {argument.name}")
    # in training mode, batch_norm would update its statistics, which its schema does not tell
    if given.get("train") or given.get("training"):
        raise GraphError(f"{operator} is in training mode: it must follow self.training")
    if given.get("dropout_p"):
        raise GraphError(f"{operator} drops at random: pass dropout_p=0.0 unless self.training")
    if str(operator) == "aten.view.dtype" and given.get("dtype") is torch.bool:
        raise GraphError(f"{operator} makes bools of bytes: compare with 0")
    paged = [given.get(name) for name in ("seqused_k", "block_table")]
    if str(operator) == VARLEN and paged != [None, None]:
        raise GraphError(f"{operator} takes seqused_k and block_table: leave them out")


def execute(
    operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], protected: set[int]
) -> Any:
    """Call an operator that may be called. Nothing is written to storages at `protected` addresses,
    and nothing is left uninitialized; GraphError where one tries."""
    if operator._schema.is_mutable and address(args[0]) in protected:
        raise GraphError(
            f"{operator} changes a parameter, a buffer or the input, and a scored model must not "
            "remember: clone it first, and update buffers only while self.training"
        )
    if str(operator) == VARLEN:
        check_varlen(*args, **kwargs)
    if str(operator) == GROUPED:
        check_grouped(*args, **kwargs)
    result = operator(*args, **kwargs)
    if operator._opname in EMPTY:
        result.zero_()
    return result


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def check_varlen(
    query: Any,
    key: Any,
    value: Any,
    ends_q: Any,
    ends_k: Any,
    max_q: int,
    max_k: int,
    *_: Any,
    **__: Any,
) -> None:
    check_ends(ends_q, len(query), max_q)
    check_ends(ends_k, min(len(key), len(value)), max_k)
    if ends_q[0] != 0 or ends_k[0] != 0:
        raise GraphError("varlen_attn is called with offsets that do not start at 0")


def check_grouped(left: Any, right: Any, offs: Any = None, *_: Any, **__: Any) -> None:
    if offs is not None:
        sizes = {(2, 3): left.shape[0], (3, 2): right.shape[-1], (2, 2): left.shape[-1]}
        check_ends(offs, sizes[left.dim(), right.dim()], 2**31)


def check_ends(ends: torch.Tensor, total: int, longest: int) -> None:
    """GraphError unless groups cover `total` rows: the kernels do not check it themselves."""
    lengths = ends.diff()
    if ends[0] < 0 or ends[-1] != total or lengths.lt(0).any() or lengths.gt(longest).any():
        raise GraphError("offsets of groups leave the tensor")
