"""GPUs: what one can do at best, what suits it, and whether train.py runs on it."""

import math
from contextlib import suppress

import torch
import torch.nn.attention

from gpt.arena import Arena, fail

# Dense bfloat16 TFLOP/s with float32 sums, from NVIDIA's data sheets and white papers, by the
# driver's full name of a GPU: an L4 is no L40, and neither a laptop's chip nor a slice of a card
# (MIG) is the card. The GB10 is left out, for which NVIDIA gives no such figure.
PEAK_TFLOPS = {
    "B300 SXM6 AC": 2250.0, "B200": 2250.0, "GB200": 2500.0, "GB300": 2500.0,
    "GH200 480GB": 989.5, "GH200 144G HBM3e": 989.5, "H200": 989.5, "H200 NVL": 835.5,
    "H100 80GB HBM3": 989.5, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H800": 989.5, "H20": 148.0,
    "A100-SXM4-40GB": 312.0, "A100-SXM4-80GB": 312.0, "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0, "A800-SXM4-80GB": 312.0, "A800 80GB PCIe": 312.0,
    "A30": 165.0, "A40": 149.7, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX PRO 6000 Blackwell Workstation Edition": 503.8, "RTX 6000 Ada Generation": 364.2,
    "RTX A6000": 154.8, "GeForce RTX 5090": 209.5, "GeForce RTX 5080": 112.6,
    "GeForce RTX 5070 Ti": 87.9, "GeForce RTX 5070": 61.7, "GeForce RTX 4090": 165.2,
    "GeForce RTX 4090 D": 147.1, "GeForce RTX 4080": 97.5, "GeForce RTX 4070": 58.3,
    "GeForce RTX 4060": 30.2, "GeForce RTX 3090": 71.0, "GeForce RTX 3080": 59.5,
    "GeForce RTX 3070": 40.6, "GeForce RTX 3060": 25.5,
}  # fmt: skip
OLDEST = 8, 0  # compute capability: Ampere, the first with bfloat16


def peak_tflops(gpu: str) -> float | None:
    """What a GPU of that name can do at best; None for one that is not known."""
    return PEAK_TFLOPS.get(gpu.removeprefix("NVIDIA "))


def find_device(arena: Arena) -> str:
    """`cpu` for the demo, which is sized for one; else `cuda`, or SystemExit where none will do."""
    if arena.name == "demo":
        return "cpu"
    instead = "AUTORESEARCH_ARENA=demo runs on any CPU"
    if not torch.cuda.is_available():
        fail(f"no NVIDIA GPU found, and the arena {arena.name} needs one; {instead}")
    if (capability := torch.cuda.get_device_capability()) < OLDEST:
        card = f"the {torch.cuda.get_device_name()} has compute capability"
        has, needs = (".".join(map(str, version)) for version in (capability, OLDEST))
        fail(f"{card} {has}, and train.py needs {needs} or newer; {instead}")
    return "cuda"


def find_attention(device: str) -> str:
    """The kernels that attention runs on: `dense` on a CPU, flash attention's `varlen`, or
    `varlen, FA3` on Hopper where its package is installed, which this makes the one in use."""
    if device == "cpu":
        return "dense"
    if torch.cuda.get_device_capability()[0] == 9:
        # its package is not there, or does not fit this torch
        with suppress(ImportError, OSError, RuntimeError):
            torch.nn.attention.activate_flash_attention_impl("FA3")
            return "varlen, FA3"
    return "varlen"


def suited(arena: Arena, device: str) -> tuple[int, int, int, int]:
    """What suits the GPU that is here; see `sizes`. One that no table knows is guessed at by its
    memory."""
    if device == "cpu":
        return sizes(8.0, 1.0, arena.vocab_size)
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return sizes(gib, peak_tflops(torch.cuda.get_device_name()) or 2 * gib, arena.vocab_size)


def sizes(gib: float, tflops: float, vocab_size: int) -> tuple[int, int, int, int]:
    """Layers, heads of 128 channels, tokens in a step, and rows of an n-gram table over the
    vocabulary, for a GPU of so much memory and so many bfloat16 TFLOP/s.

    What it computes in five minutes sets the model and the batch; its memory the tables, which take
    a seventh of it at most. Estimates, but for 80 GB and 989: docs/notebook.md, under train.py.

    >>> sizes(79.1, 989.5, 8192)
    (6, 5, 131072, 64)
    >>> sizes(11.6, 25.5, 8192)
    (6, 3, 16384, 32)
    """
    heads = 2 + sum(tflops > limit for limit in (20, 60, 600))
    batch = 2 ** (14 + sum(tflops > limit for limit in (28, 50, 250)))
    row = 12 * vocab_size * heads * 128  # bytes in all tables: 3 layers, 2 lengths, bfloat16
    rows = 2 ** int(math.log2(max(gib * 2**30 / 7 / row, 1)))
    return 4 if tflops <= 20 else 6, heads, batch, min(rows, 64)
