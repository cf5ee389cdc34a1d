"""Waits and limits, in one place; a test shortens them by AUTORESEARCH_PACE, as JSON."""

import json
import os
import time
from typing import NamedTuple


class Pace(NamedTuple):
    """Seconds and bytes."""

    backoff: float = 60.0  # before the first retry; doubled for each that follows
    max_backoff: float = 1800.0
    shortest_limit: float = 120.0  # of a run, unless twice its budget is more
    quiet: float = 180.0  # between two batches, after which a run is given up
    grace: float = 5.0  # for a process to end by itself, after each of two signals
    pause: float = 1.0  # between two looks of a keeper: with more, it was stopped itself
    gpu_release: float = 30.0  # for the GPU to take back the memory of a killed process
    max_output: int = 64_000_000  # of a process
    min_free: int = 500_000_000  # on the disk, for the driver's record


PACE = Pace(**json.loads(os.environ.get("AUTORESEARCH_PACE", "{}")))


def clock() -> float:
    """Seconds that nobody can set, and that pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
