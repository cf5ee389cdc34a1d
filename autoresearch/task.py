"""The task: which files may change, how they are measured; numbers out of a log."""

import json
import math
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from autoresearch.files import UserError, one_line

FILES = ("autoresearch.toml", "pyproject.toml")  # where a task stands, the first that is there
# Of results.tsv; the metric's own column is the second
COLUMNS = (
    "commit", "memory_gb", "status", "description", "tag", "experiment", "minutes", "cost_usd",
    "lines",
)  # fmt: skip
MAX_FILE = 1_000_000  # bytes, twenty times what a person can hold in their head
UPSTREAM = {"files": ["train.py"], "measure": "uv run train.py", "lower": "val_bpb", "gpu": True}
FORM = """\
[tool.autoresearch]
files = ["src/rank.py"]      # what may change: paths, *, **, folder/
measure = "python bench.py"  # prints `seconds: 1.5`
lower = "seconds"            # or higher"""


def trailer(name: str, form: str = "s", **default: Any) -> Any:
    """A dataclass field that the commit message of an experiment holds as a trailer."""
    return field(metadata={"trailer": name, "form": form}, **default)


@dataclass(frozen=True)
class Task:
    """What is improved and how it is measured. The defaults are those of the keys in TOML.

    `files`: paths, `*`, `**` and `folder/`. `measure`, `guard`, `setup`, `feed`: shell lines.
    `seeds`: how many runs with seeds of their own a keep rests on. `duels`: how often an edit has
    to beat the incumbent side by side. `noise`: the standard deviation of a gain; `timeout` is in
    seconds. `read`: what runs may read of the checkout, and outside of it.
    """

    files: tuple[str, ...]
    measure: str
    metric: str
    higher: bool = False
    guard: str = ""
    setup: str = ""
    feed: str = ""
    seeds: int = 1
    duels: int = 0
    noise: float = 0.0
    timeout: float = 600.0
    network: bool = False
    env: tuple[str, ...] = ()
    read: tuple[str, ...] = (".",)
    gpu: bool = False

    @property
    def goal(self) -> str:
        """The direction and the metric, say `lower loss`."""
        return f"{'higher' if self.higher else 'lower'} {self.metric}"

    @property
    def text(self) -> str:
        """As the record holds it."""
        return json.dumps(asdict(self), indent=1)

    @property
    def what(self) -> str:
        """What may change, in words."""
        return ", ".join(self.files)

    @property
    def only_file(self) -> str:
        """The file that may change, where that is a single one; else empty."""
        several = len(self.files) > 1 or re.search(r"[*?]|/$", self.what)
        return "" if several else self.what

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(as_regex, self.files)), re.DOTALL)

    def may_edit(self, path: str) -> bool:
        return bool(self.pattern.fullmatch(path))

    @property
    def worst(self) -> float:
        """What any score beats; no score beats its negative."""
        return -math.inf if self.higher else math.inf

    def gain(self, score: float, than: float) -> float:
        """How much better a score is than another one."""
        return score - than if self.higher else than - score


def as_regex(pattern: str) -> str:
    """
    >>> re.fullmatch(as_regex("src/**/*.py"), "src/a/b.py") is not None
    True
    """
    if pattern.endswith("/"):
        pattern += "**"
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def read_task(root: Path) -> Task:
    """The task of a repository, upstream's where there is none; UserError for a wrong one."""
    import tomllib  # here, since every run imports this module

    for name in FILES:
        try:
            table = tomllib.loads((root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {one_line(str(error))}") from None
        inner = {} if name == "pyproject.toml" else table
        table = table.get("tool", {}).get("autoresearch", inner)
        if found := {key: value for key, value in table.items() if key != "prices"}:
            return make_task(found, name)
    if not (root / "train.py").exists():
        raise UserError(f"{root} has no task; pyproject.toml takes lines like these:\n{FORM}")
    return make_task(UPSTREAM, "the usual task")


def is_of(kind: Any, value: Any) -> bool:
    """Whether a value of TOML fits a field of Task."""
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def make_task(table: dict[str, Any], where: str) -> Task:
    """A task from its keys; UserError names what is wrong with them."""
    own = {f.name: f.type for f in fields(Task) if f.name not in ("metric", "higher")}
    kinds = {"files": own.pop("files"), "measure": str, "lower": str, "higher": str, **own}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join([*kinds, "prices"])
            raise UserError(f"{where}: unknown key {key}; the keys are {known}")
        if not is_of(kinds[key], value):
            kind = getattr(kinds[key], "__name__", "list").replace("tuple", "list")
            raise UserError(f"{where}: {key} = {value!r} is of the wrong kind: it is a {kind}")
        if kinds[key] in (int, float) and not 0 <= value < math.inf:
            raise UserError(f"{where}: {key} = {value!r} is no number of 0 or more")
    for key in ("timeout", "seeds"):
        if table.get(key) == 0:
            raise UserError(f"{where}: {key} = 0 leaves nothing to measure")
    if table.get("duels") and table.get("seeds", 1) > 1:
        raise UserError(f"{where}: seeds are for scores that hold, and duels for those that drift")
    metrics = [key for key in ("lower", "higher") if key in table]
    if len(metrics) != 1:
        said = "both lower and higher" if metrics else "neither lower nor higher"
        raise UserError(f"{where}: {said}: the metric has one direction")
    for key in ("files", "measure"):
        if not table.get(key):
            form = next(line for line in FORM.splitlines() if line.startswith(key))
            raise UserError(f"{where}: {key} is missing: {form}")
    metric = table[metrics[0]]
    if not re.fullmatch(r"[A-Za-z]\w{0,39}", metric) or metric in COLUMNS:
        raise UserError(
            f"{where}: {metric!r} cannot be a metric: letters, digits and _, and no column"
        )
    values = {key: value for key, value in table.items() if key not in metrics}
    values |= {key: tuple(values[key]) for key in ("files", "env", "read") if key in values}
    return Task(metric=metric, higher=metrics == ["higher"], **values)


# --------------------------------------------------------------------------------------------------
# Where it is measured


@dataclass(frozen=True)
class Arena:
    """What `setup` made ready, by its line `ready: {json}`: data by name and version, the budget of
    a run in seconds, the folder of files that no run may change; whether the seconds are `counted`
    work, which no clock can check."""

    name: str = trailer("Arena", default="")
    budget: float = trailer("Budget-seconds", ".0f", default=0.0)
    data: str = trailer("Data", default="")
    folder: Path | None = None
    counted: bool = False


@dataclass(frozen=True)
class Machine:
    """Where experiments run. All but `torch` are empty without a GPU.

    `uuid` names the GPU to CUDA, `card` to nvidia-smi: they differ for a slice of a card (MIG).
    """

    gpu: str = trailer("Gpu", default="")
    driver: str = trailer("Gpu-driver", default="")
    torch: str = trailer("Torch", default="")
    uuid: str = ""
    card: str = ""

    @property
    def is_slice(self) -> bool:
        return self.uuid != self.card


def set_up(task: Task, tree: Path, env: dict[str, str], quietly: bool = False) -> Arena:
    """Run `setup` in a tree, and take the facts from its last line. Unless `quietly`, it talks to
    the terminal itself, and a UserError for what it refused adds nothing."""
    asked = Arena(env.get("AUTORESEARCH_ARENA", ""))
    if not task.setup:
        return asked
    pipe = subprocess.PIPE
    done = subprocess.run(
        ["/bin/sh", "-c", task.setup], cwd=tree, env=env, text=True, check=False,
        stdout=pipe, stderr=pipe if quietly else None,
    )  # fmt: skip
    if done.returncode:
        if not quietly:
            print(done.stdout, end="", file=sys.stderr, flush=True)
        log = done.stdout + (done.stderr or "")
        said = read_failure(done.returncode, log) if quietly else ""
        killed = done.returncode < 0 or done.returncode > 128
        raise UserError("setup was killed by a signal" if killed else said, done.returncode % 128)
    kind, _, facts = done.stdout.strip().rpartition("\n")[2].partition(": ")
    if kind != "ready":
        return asked
    try:
        found = json.loads(facts)
        folder = found.get("folder") and Path(found["folder"])
        known = {name: found[name] for name in ("budget", "data", "counted") if name in found}
        return Arena(found["name"], folder=folder, **known)
    except (ValueError, KeyError, TypeError, AttributeError):
        why = 'name, and may have "budget", "data", "folder" and "counted"'
        raise UserError(f'the line `ready: {{...}}` of setup needs a "name": {why}') from None


# --------------------------------------------------------------------------------------------------
# A log: the lines along the way, and the numbers at its end

MAX_LOG = 4_000_000  # bytes of the log's end that are searched for progress
PROGRESS = re.compile(r"([\d.]+)%.*?\bloss\D{0,3}([\d.]{1,12})(?:.*?\b([\d,]{1,15}) tok/s)?")
MAX_LINE = 300  # characters; no line of progress is longer
NOT_FINITE = re.compile(r"[\d.]+%(?:(?!\bloss)[^\r\n])*\bloss\W{0,3}(nan|inf)\b", re.IGNORECASE)
NUMBER = re.compile(r"^(?:METRIC +([A-Za-z]\w{0,39}) *=|([A-Za-z]\w{0,39}):)[ \t]*(\S+)$", re.M)
MAX_NUMBERS = 64


def read_numbers(log: str, metric: str, optional: bool = False) -> dict[str, float]:
    """The `name: number` and `METRIC name=number` lines of a log, after the last `---` alone if
    there is one. ValueError for a metric that is missing, unless it is optional, printed twice, or
    not finite.

    >>> read_numbers("depth: 2\\nqps: 12.5\\n", "qps")
    {'depth': 2.0, 'qps': 12.5}
    """
    parts = re.split(r"^---$", log, flags=re.MULTILINE)
    *earlier, lines = [[(a or b, text) for a, b, text in NUMBER.findall(part)] for part in parts]
    names = [name for part in [*earlier[1:], lines] for name, _ in part]  # a free text comes first
    count = names.count(metric)
    told = re.search(rf"^(METRIC +{metric} *=|{metric}:)", log, re.MULTILINE)
    if count != 1 and (told or not optional):
        raise ValueError(f"{metric} was " + (f"printed {count} times" if count else "not printed"))
    values = {}
    for name, text in lines:
        with suppress(ValueError):
            values[name] = float(text)
    if count and not math.isfinite(values.get(metric, math.nan)):
        text = dict(lines).get(metric, "")
        raise ValueError(f"{metric} is not a finite number: {one_line(text, 40)}")
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return dict(list(finite.items())[-MAX_NUMBERS:])


@dataclass(frozen=True)
class Progress:
    """One line along the way: percent of the budget, loss, tokens per second if it has them."""

    percent: float
    loss: float
    speed: float | None


def read_line(line: str) -> Progress | None:
    """A line that tells percent of the budget and loss; None for any other."""
    found = PROGRESS.search(line) if "loss" in line and len(line) <= MAX_LINE else None
    with suppress(ValueError, OverflowError):
        if found:
            speed = found[3] and float(found[3].replace(",", ""))
            return Progress(float(found[1]), float(found[2]), speed or None)
    return None


def read_progress(log: str) -> Progress | None:
    """The last progress line of a log."""
    lines = re.split(r"[\r\n]+", log)
    whole = lines[1:] if len(log) > MAX_LINE else lines
    return next((p for p in map(read_line, reversed(whole)) if p and 0 <= p.percent <= 100), None)


def read_curve(log: str) -> str:
    """The loss and the tokens per second at each tenth of the budget.

    >>> read_curve("step 1   9.0%  loss 5.1\\nstep 2  11.0%  loss 4.2500  81,200 tok/s")
    '11% 4.250 81k/s'
    """
    points: dict[int, str] = {}
    for p in map(read_line, re.split(r"[\r\n]+", log)):
        if p and 10 <= p.percent <= 100:
            pace = f" {p.speed / 1000:.0f}k/s" if p.speed else ""
            points.setdefault(int(p.percent // 10), f"{p.percent:.0f}% {p.loss:.3f}{pace}")
    return ", ".join(points[tenth] for tenth in sorted(points))


def read_failure(code: int, log: str) -> str:
    """Why a run died, in a line: the signal, or the last line of its log."""
    signum = -code if code < 0 else code - 128  # by itself, or as a shell has it
    if signum > 0:
        return f"killed by signal {signum}" + (" (out of memory?)" if signum == 9 else "")
    lines = [line for line in log.splitlines() if line.strip()]
    if lines and lines[-1].startswith("Node.js v"):  # its error stands above
        lines = [line for line in lines if re.match(r"\w*Error\b", line)] or lines
    return one_line(lines[-1].removeprefix("error: ")) if lines else f"exit code {code}, no output"
