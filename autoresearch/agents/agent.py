"""An agent as data: its command line, and the reader of its output."""

import json
import math
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoresearch.files import one_line, tail
from autoresearch.ideas import Usage
from autoresearch.pace import PACE

Json = Any
SILENT = "no reason given"
# errors of a reader where a CLI of another version put something else
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Answer(Usage):
    """What an output says of a call and of its usage. `error` comes from error fields alone, never
    from the model's prose, and `status` is its HTTP status."""

    text: str = ""
    error: str = ""
    status: int | None = None


@dataclass(frozen=True)
class Output:
    """The files that a call left, all with one prefix: standard output (out), standard error (err),
    and those that a CLI was told to write beside them."""

    prefix: Path

    def path(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}")

    def text(self, kind: str = "out", size: int = PACE.max_output) -> str:
        return tail(self.path(kind), size)

    def objects(self, kind: str = "out") -> list[Json]:
        """The JSON objects of a file, one a line, or a list of them, or one; ValueError if none."""
        text = self.text(kind)
        whole = parse(text)
        if whole is None:
            whole = [parse(line) for line in text.splitlines() if line.startswith("{")]
        values = whole if isinstance(whole, list) else [whole]
        found = [value for value in values if isinstance(value, dict)]
        if not found:
            raise ValueError(f"no JSON, but {one_line(text, 200) or 'nothing'}")
        return found

    def last_error(self) -> Json:
        """The object with an `error` with which some CLIs end standard error; ValueError."""
        text = self.text("err", 100_000)
        starts = re.finditer(r"^(?:\[ERROR\] )?(\{)", text, re.MULTILINE)
        for start in reversed([found.start(1) for found in starts]):
            with suppress(ValueError):
                value, _ = json.JSONDecoder().raw_decode(text, start)
                if "error" in value:
                    return dict(value["error"])
        raise ValueError(f"no JSON, but {one_line(text[-200:]) or 'nothing'}")


def read_text(output: Output) -> Answer:
    """Any command: its output is the answer, and its cost is unknown."""
    return Answer(text=re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text(size=20_000)))


def words(line: str) -> tuple[str, ...]:
    """A command line in words, as a shell has it."""
    return tuple(shlex.split(line))


@dataclass(frozen=True)
class Agent:
    """A command that edits files where they stand and says what it did.

    `command`, `env`, `files` and `stdin` may hold, in braces: `tree` for its working directory,
    `glob` and `regex` for patterns of that, `folder` for the experiment's folder, `side` for a path
    there without its ending, `file` for the file of the prompt, `json` for the prompt as a JSON
    string, `what` for what may be edited in words, `edits` for that as `edit` has it. `{model}`
    becomes `flag` and the name of the model, or nothing, and `{files}` a `--file` for each file.

    `edit` may hold `path`, a pattern of what may be edited, and `path_regex`; `between` joins them.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[Output], Answer] = read_text
    install: str = ""
    flag: str = "--model"
    stdin: str = "{file}"
    edit: str = ""
    between: str = ","
    env: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # written into the experiment's folder
    verbatim: bool = False  # a person's own command, in which braces are the shell's
    status: tuple[str, ...] = ()  # exits with 0 when logged in; empty where it cannot be asked
    login: str = ""  # the cure
    dollars: bool = False  # whether it says what a call cost
    model: str | None = None
    price: tuple[float, float, float] | None = None  # of a million tokens: in, cached in, out


# --------------------------------------------------------------------------------------------------
# Fields of JSON that another program wrote, by dotted paths; unknown if it has something else


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
