"""What the sandbox costs a run: milliseconds until a command has run, by rung.

uv run benchmarks/sandbox_bench.py
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autoresearch.jobs.sandbox import NAMESPACES, NONE, find_rungs, lent_paths

ROOT = Path(__file__).resolve().parent.parent
TURNS = 40


def milliseconds(command: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    best, *others, _ = find_rungs(ROOT)
    with tempfile.TemporaryDirectory() as tmp:
        read = lent_paths(ROOT, ["."])
        commands = {
            "plain": NONE.command(["true"]),
            "namespaces alone": [*NAMESPACES, "--net", "--", "true"],
            "the best sandbox": best.command(["true"], read, [Path(tmp)]),
        }
        for sandbox in others:
            commands[sandbox.missing] = sandbox.command(["true"], read, [Path(tmp)])
        times = {name: list[float]() for name in commands}
        for _ in range(TURNS):
            for name, command in commands.items():
                times[name].append(milliseconds(command, tmp))
    plain = median(times["plain"])
    for name, found in times.items():
        print(f"{median(found):6.1f} ms  +{median(found) - plain:.1f}  {name}")


if __name__ == "__main__":
    main()
