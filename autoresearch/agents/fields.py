"""Fields of JSON that another program wrote, by dotted paths; unknown if it has something else."""

import json
import math
from typing import Any

Json = Any


def parse(line: str) -> Json:
    try:
        return json.loads(line)
    except ValueError:
        return None


def get(value: Json, path: str) -> Json:
    """A value deep in objects, or None where one of the steps is missing."""
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def string(value: Json, path: str) -> str:
    found = get(value, path)
    return found if isinstance(found, str) else ""


def amount(values: list[Json], *paths: str) -> float | None:
    """The sum of numbers at these paths in these objects; None where there is none."""
    found = [get(value, path) for value in values for path in paths]
    numbers = [n for n in found if isinstance(n, int | float) and not isinstance(n, bool)]
    known = [number for number in numbers if 0 <= number < math.inf]
    return float(sum(known)) if known else None


def count(values: list[Json], *paths: str) -> int | None:
    total = amount(values, *paths)
    return None if total is None else int(total)
