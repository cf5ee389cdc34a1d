"""What work costs: the counted seconds of a CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch does, in seconds that a small CPU would take: 100 GFLOP/s in matrix
    products, 15 GB/s for what operators read and write, and 10 us for each.

    A CPU is shared, and a budget of 15 seconds of its time is 40 steps or 90, as its other work has
    it. Counted, the same program and seed takes the same steps on any machine. What torch does not
    see, as NumPy, is not counted.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, as modes have it, imports Dynamo, which takes seconds

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.seconds += flops_of(func.overloadpacket.__name__, args, out) / 100e9
        if not func.is_view:
            self.seconds += 10e-6 + size_of((*args, *kwargs.values(), out)) / 15e9
        return out


def flops_of(name: str, args: Any, out: Any) -> Any:
    """Of an operator of aten, as torch.utils.flop_counter has them. That would load Triton, which
    takes a third of a second, and fills the log after an error: the last line of it is the reason
    that a run failed."""
    if name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm"):
        return 2 * out.numel() * args[name in ("addmm", "baddbmm")].shape[-1]
    if name == "convolution":
        transposed = args[6]
        return 2 * (args[0] if transposed else out).numel() * args[1][0].numel()
    if name == "convolution_backward":
        transposed = args[7]
        return 4 * args[1 if transposed else 0].numel() * args[2][0].numel()
    if name.startswith("_scaled_dot_product"):
        back = "backward" in name  # by five products, of which three are as wide as q
        q, k, v = args[1:4] if back else args[:3]
        width = 3 * q.shape[-1] + 2 * v.shape[-1] if back else q.shape[-1] + v.shape[-1]
        return 2 * q.numel() // q.shape[-1] * k.shape[-2] * width
    return 0


def size_of(values: Iterable[object]) -> int:
    """Bytes of all tensors among some values, and in lists of them."""
    total = 0
    for value in values:
        if isinstance(value, torch.Tensor):
            total += value.nbytes
        elif isinstance(value, list | tuple):
            total += size_of(value)
    return total
