"""On a card of card.py: warm train.py up, take one more step, during which nothing may compile, and evaluate.

Its last line is a JSON object: kernels of Triton, products and GB that a step launches, peaks of memory in GiB. GB is what
Triton's kernels read and write: each argument as far as the kernel reaches, twice where it is changed in place. Products
and attention, whose kernels come with torch, are not in it.
"""

import ctypes
import functools
import json
import math
import os
import sys
import traceback

import torch
import torch._dynamo
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

torch.compile = functools.partial(torch.compile, fullgraph=True)  # a break in a graph is an error

import train  # noqa: E402

moved = 0
launch = CachingAutotuner.run


def metered(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    global moved
    reach = math.prod(size for size in self.size_hints.values() if size > 0)
    for name, value in zip(self.triton_meta["signature"], args, strict=False):
        if isinstance(value, torch.Tensor):
            size = min(value.numel(), reach) * value.itemsize
            moved += size * (2 if name.startswith("in_out") else 1)
    return launch(self, *args, **kwargs)


def launched() -> tuple[int, int]:
    library = ctypes.CDLL(None)
    return tuple(
        ctypes.c_int.in_dll(library, f"card_{name}").value for name in ("kernels", "products")
    )


def main() -> None:
    global moved
    train.check_constants()
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_per_process_memory_fraction(train.MEMORY_SHARE)
    rows = train.BATCH // train.T
    model = train.GPT()
    micro_rows = train.warm_up(model, min(train.BATCH, train.MICRO_BATCH) // train.T)
    warm = torch.cuda.max_memory_allocated()
    optimizers = train.make_optimizers(model)
    torch._dynamo.config.error_on_recompile = True
    CachingAutotuner.run = metered
    x = torch.randint(train.V, (rows, train.T + 1), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before, moved = launched(), 0
    train.schedule(optimizers, 1, 0.5)
    train.train_step(model, optimizers, x[:, :-1].clone(), x[:, 1:].clone(), micro_rows)
    after, gigabytes, step = launched(), moved / 1e9, torch.cuda.max_memory_allocated()
    with torch.no_grad():
        train.compiled(model.eval())(x[: train.ARENA.eval_rows, 1:].clone())
    kernels, products = (b - a for a, b in zip(before, after, strict=True))
    figures = {"kernels": kernels, "products": products, "GB": round(gigabytes, 1), "micro_rows": micro_rows,
               "step_GiB": round(step / 2**30, 2), "peak_GiB": round(max(warm, step) / 2**30, 2)}  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    code = 1
    try:
        main()
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)  # the real libraries are not prepared to be taken down
