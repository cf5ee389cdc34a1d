"""On a card of card.py: warm train.py up, take one more step, during which nothing may compile, and evaluate.

Its last line is a JSON object: kernels of Triton, products and GB that a step launches, peaks of memory in GiB, and the
seconds that importing and the warm-up take, of which all is tracing, compiling and loading. GB is what
Triton's kernels read and write: each argument as far as the kernel reaches, twice where it is changed in place; of the
tables the gradient, and as many rows, read and written. Products, attention and sorting, whose kernels come with torch,
are not in it.
"""

import ctypes
import functools
import json
import math
import os
import sys
import time
import traceback

start = time.perf_counter()

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # noqa: E402

torch.compile = functools.partial(torch.compile, fullgraph=True)  # a break in a graph is an error

import train  # noqa: E402

imported = time.perf_counter()
moved = 0
launch, table_update = CachingAutotuner.run, train.table_update


def metered(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    global moved
    named = dict(zip(self.triton_meta["signature"], args, strict=False))
    reach = math.prod(value for name, value in named.items() if name.endswith("numel"))
    for name, value in named.items():
        if isinstance(value, torch.Tensor):
            size = min(value.numel(), reach) * value.itemsize
            moved += size * (2 if name.startswith("in_out") else 1)
    return launch(self, *args, **kwargs)


def metered_tables(weight, square, index, grad, lr, step):  # type: ignore[no-untyped-def]
    global moved
    moved += grad.nbytes * (1 + 2 * weight.itemsize // grad.itemsize)
    table_update(weight, square, index, grad, lr, step)


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
    warm, warmed = torch.cuda.max_memory_allocated(), time.perf_counter()
    optimizers = train.make_optimizers(model)
    torch._dynamo.config.error_on_recompile = True
    CachingAutotuner.run, train.table_update = metered, metered_tables
    tokens = torch.randint(train.V, (max(rows, train.ARENA.eval_rows), train.T + 1), device="cuda")
    x, y = tokens[:rows, :-1].clone(), tokens[:rows, 1:].clone()
    torch.cuda.reset_peak_memory_stats()
    before, moved = launched(), 0
    train.schedule(optimizers, 1, 0.5)
    train.train_step(model, optimizers, x, y, micro_rows)
    after, gigabytes, step = launched(), moved / 1e9, torch.cuda.max_memory_allocated()
    with torch.no_grad():
        train.compiled(model.eval())(tokens[: train.ARENA.eval_rows, 1:].clone())
    kernels, products = (b - a for a, b in zip(before, after, strict=True))
    figures = {"kernels": kernels, "products": products, "GB": round(gigabytes, 1), "micro_rows": micro_rows,
               "step_GiB": round(step / 2**30, 2), "peak_GiB": round(max(warm, step) / 2**30, 2),
               "import_s": round(imported - start, 1), "warm_up_s": round(warmed - imported, 1)}  # fmt: skip
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
