"""Kernels of our own for a GPU, in Triton, which is slow to import: for train.py alone."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


def row_rmsprop(
    weight: torch.Tensor,
    square: torch.Tensor,
    index: torch.Tensor,
    grad: torch.Tensor,
    lr: float,
    correction: float,
    share: float,
) -> None:
    """Step the rows of `weight` (R, C) that `index` (N,) names by the gradient `grad` (N, C), in
    place, with sums in float32: `square` (R,) grows by `share` of the mean square of a row's
    gradient, and a row moves by lr times its gradient over the root of square / correction.

    Each row is read and written once, however often it occurs: sorted, its first place does the
    work of all.
    """
    index, order = index.int().sort(stable=True)
    columns = grad.size(1)
    block = triton.next_power_of_2(columns)
    sizes = len(index), lr, correction, share, columns, block
    step_row[(len(index),)](weight, square, index, order, grad, *sizes, num_warps=2)


@triton.jit  # type: ignore[untyped-decorator]
def step_row(  # type: ignore[no-untyped-def]
    weight, square, index, order, grad, places, lr, correction, share,
    columns: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(index + place).to(tl.int64)
    if tl.load(index + place - 1, mask=place > 0, other=-1) != row:
        column = tl.arange(0, block)
        inside = column < columns
        total = tl.zeros([block], tl.float32)
        while tl.load(index + place, mask=place < places, other=-1) == row:
            here = grad + tl.load(order + place) * columns + column
            total += tl.load(here, mask=inside, other=0).to(tl.float32)
            place += 1
        fresh = tl.load(square + row) + share * tl.sum(total * total, 0) / columns
        tl.store(square + row, fresh)
        here = weight + row * columns + column
        old = tl.load(here, mask=inside).to(tl.float32)
        spread = tl.sqrt(fresh / correction) + 1e-10
        tl.store(here, old - lr * total / spread, mask=inside)
