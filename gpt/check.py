"""
The checks of GPT training for `doctor`: a line with the finding, or exit code 1 and an error.

    python -m gpt.check torch [cuda]        run and compile something small on a device
    python -m gpt.check data ARENA          whether the arena is there, and if not, at hand
"""

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autoresearch.files import UserError, cache, one_line
from gpt.arena import ARENAS, DEFAULT_ARENA

# A C compiler's last words, say of a header that it lacks
FATAL = re.compile(r"fatal error: (.*)|: (No space left.*)")


def check_torch(device: str) -> str:
    """The version of torch, and what it is built for; UserError where it does not work."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    built = f"{torch.__version__}, built for {built}"
    if not device:
        return f"{built}; not tried, without a GPU"
    with warnings.catch_warnings(record=True) as warned, compiler_heard() as heard:
        warnings.simplefilter("always")
        problem = "cannot use the GPU"
        cure = "`uv pip install torch --torch-backend=auto`, then `uv run --no-sync loop.py`"
        try:
            x = torch.zeros(8, device=device)
            x.sum().item()
            problem = "cannot compile"  # as without a C compiler, which Triton needs
            cure = "`apt install gcc python3-dev` brings a C compiler and Python.h, or CC names one"
            torch.compile(lambda x: x.sin() + 1)(x)
        except Exception as error:
            why = [str(error), *(str(warning.message) for warning in warned)]
            words = " ".join(text.splitlines()[0] for text in why if text)
            if said := FATAL.search(heard()):
                words = said[1] or said[2]
            if "No space left" in words:
                cure = f"make room at {tempfile.gettempdir()}, where compilers put what they make"
            raise UserError(f"{built}, {problem}: {one_line(words, 300)}: {cure}") from None
    return built


@contextmanager
def compiler_heard() -> Iterator[Callable[[], str]]:
    """Catch what other programs say on standard error; yields a function that returns it."""
    ours = os.dup(2)
    with open(os.memfd_create("heard"), "rb") as file:  # noqa: PTH123  # in memory: a disk may be full
        os.dup2(file.fileno(), 2)

        def heard() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield heard
        finally:
            os.dup2(ours, 2)


def check_data(arena: str) -> str:
    """Where the arena is, or what will make it; a start checks its files."""
    arena = arena or DEFAULT_ARENA
    manifest = cache() / arena / "manifest.json"
    if os.sep in arena:
        if not Path(arena).is_dir():
            raise UserError(f"{arena}: no such folder")
        return arena
    if arena not in ARENAS:
        raise UserError(f"unknown arena {arena!r}: one of {', '.join(ARENAS)}, or ./a/folder")
    if manifest.exists():
        try:
            files = json.loads(manifest.read_text())["files"].values()
            size = sum(int(file["bytes"]) for file in files)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{manifest} is damaged: a start makes the arena again") from None
        return f"arena {arena}, {size / 1e9:.2f} GB at {manifest.parent}"
    if arena in ("demo", "python"):
        return f"arena {arena} will be made of sources that are here"
    import requests

    from gpt.download import find_endpoint

    endpoint = find_endpoint()
    try:
        requests.head(endpoint, timeout=10)
    except requests.RequestException as error:
        cure = (
            "HF_ENDPOINT names a mirror; `--arena python` (on a GPU) and `--demo` need no network"
        )
        raise UserError(f"{endpoint} cannot be reached ({type(error).__name__}): {cure}") from None
    ahead = f"`uv run prepare.py --arena {arena}` does it ahead"
    return f"warning: arena {arena} is to be downloaded from {endpoint}: {ahead}"


def main() -> None:
    what, argument = sys.argv[1], "".join(sys.argv[2:])
    try:
        print(check_torch(argument) if what == "torch" else check_data(argument))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
