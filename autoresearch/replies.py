"""What an agent's output says: the answer, its cost, and what went wrong, each CLI in the format it has."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial, reduce
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from autoresearch.files import tail
from autoresearch.pace import PACE
from autoresearch.records import Busy, Failed, Hopeless, Trouble, one_line, plus

SILENT = "no reason given"
# what a reader may run into where a CLI of another version put something else
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
Json = Any


@dataclass(frozen=True)
class Answer:
    """What an output says of a call; None is unknown. `error` comes from error fields alone, never from the model's
    prose, and `status` is the HTTP status that it names. Tokens in include those from a cache."""

    text: str = ""
    error: str = ""
    status: int | None = None
    cost_usd: float | None = None
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    turns: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class Output:
    """The files that a call left, all with one prefix: standard output, standard error, and what a CLI was told to
    write beside them."""

    prefix: Path

    def path(self, kind: str) -> Path:
        return Path(f"{self.prefix}.{kind}")

    def text(self, kind: str = "out", size: int = PACE.max_output) -> str:
        return tail(self.path(kind), size)

    def objects(self, kind: str = "out") -> list[dict[str, Json]]:
        """The JSON objects of a file: one on each line, or a list of them, or one; ValueError when there is none."""
        text = self.text(kind)
        try:
            whole = json.loads(text)
            found = whole if isinstance(whole, list) else [whole]
        except ValueError:
            found = [parse(line) for line in text.splitlines() if line.startswith("{")]
        found = [value for value in found if isinstance(value, dict)]
        if not found:
            raise ValueError(f"no JSON, but {one_line(text, 200) or 'nothing'}")
        return found

    def last_error(self) -> dict[str, Json]:
        """The object with an `error` that some CLIs end standard error with, after whatever else is there."""
        text = self.text("err", 100_000)
        for start in reversed([found.start(1) for found in re.finditer(r"^(?:\[ERROR\] )?(\{)", text, re.MULTILINE)]):
            with suppress(ValueError):
                value, _ = json.JSONDecoder().raw_decode(text, start)
                if "error" in value:
                    return dict(value["error"])
        raise ValueError(f"no JSON, but {one_line(text[-200:]) or 'nothing'}")


def parse(line: str) -> Json:
    try:
        return json.loads(line)
    except ValueError:
        return None


def dig(value: Json, *path: str) -> Json:
    """A value deep in objects, or None where one of the steps is not there."""
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def number(value: Json, *path: str) -> int | None:
    found = dollars(value, *path)
    return None if found is None else int(found)


def total(values: list[Json], *path: str) -> int | None:
    """The sum of a number over several objects; None where none has it."""
    return reduce(plus, (number(value, *path) for value in values), None)


def count_dollars(values: list[Json], *path: str) -> float | None:
    return reduce(plus, (dollars(value, *path) for value in values), None)


def string(value: Json, *path: str) -> str:
    found = dig(value, *path)
    return found if isinstance(found, str) else ""


def dollars(value: Json, *path: str) -> float | None:
    found = dig(value, *path)
    known = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < math.inf
    return float(found) if known else None


# -----------------------------------------------------------------------------
# One reader for each format; ValueError for output that is not what the CLI promises


def read_free(output: Output) -> Answer:
    """The built-in agent: as any command, but it is known to cost nothing."""
    return replace(read_text(output), cost_usd=0.0)


def read_text(output: Output) -> Answer:
    """Any command: the answer is its output, and what it cost it does not say."""
    return Answer(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.text(size=20_000)))


def read_claude(output: Output) -> Answer:
    """One object at the end. `subtype` says success on API errors too, so `is_error` counts."""
    last = next((o for o in reversed(output.objects()) if o.get("type") == "result"), None)
    if last is None:
        raise ValueError("no result")
    text, usage = string(last, "result"), last.get("usage")
    cached = number(usage, "cache_read_input_tokens")
    fresh = plus(number(usage, "input_tokens"), number(usage, "cache_creation_input_tokens"))
    complaint = text or "; ".join(map(str, last.get("errors") or [])) or string(last, "subtype")
    failed = last.get("is_error") is True
    return Answer(
        text="" if failed else text, error=complaint if failed else "", status=number(last, "api_error_status"),
        cost_usd=dollars(last, "total_cost_usd"), tokens_in=plus(fresh, cached), tokens_cached=cached,
        tokens_out=number(usage, "output_tokens"), turns=number(last, "num_turns"),
        model=", ".join(last.get("modelUsage") or {}) or None,
    )  # fmt: skip


def read_codex(output: Output) -> Answer:
    """Events, a line each; the answer is its last message. Retries are reported as errors that were none."""
    usage, error, text, failed = None, "", "", False
    for event in output.objects():
        match event:
            case {"type": "turn.completed"}:
                usage, failed = event.get("usage"), False
            case {"type": "turn.failed"}:
                error, failed = string(event, "error", "message"), True
            case {"type": "error"}:
                error = string(event, "message")
            case {"type": "item.completed", "item": {"type": "agent_message", "text": str(said)}}:
                text = said
    return Answer(
        text=text, error=(error or SILENT) if failed or usage is None else "",
        tokens_in=number(usage, "input_tokens"), tokens_cached=number(usage, "cached_input_tokens"),
        tokens_out=number(usage, "output_tokens"),
    )  # fmt: skip


def read_gemini(output: Output) -> Answer:
    """One object; where it failed, standard output is empty and standard error ends with another."""
    if not output.text().strip():
        error = output.last_error()
        status = number(error, "code")
        return Answer(error=string(error, "message") or SILENT, status=status if (status or 0) > 99 else None)
    (whole,) = output.objects()[-1:]
    models = dig(whole, "stats", "models") or {}
    count = partial(total, list(models.values()))
    return Answer(
        text=string(whole, "response"), tokens_in=count("tokens", "prompt"), tokens_cached=count("tokens", "cached"),
        tokens_out=plus(count("tokens", "candidates"), count("tokens", "thoughts")),
        turns=count("api", "totalRequests"), model=", ".join(models) or None,
    )  # fmt: skip


def read_opencode(output: Output) -> Answer:
    """Events, a line each. Tokens in leave out what came from a cache."""
    events = output.objects()
    steps = [event.get("part") for event in events if event.get("type") == "step_finish"]
    texts = [string(event, "part", "text") for event in events if event.get("type") == "text"]
    errors = [event.get("error") for event in events if event.get("type") == "error"]
    error = errors[-1] if errors else None
    count = partial(total, steps)
    cached = count("tokens", "cache", "read")
    return Answer(
        text=texts[-1] if texts else "", error=(string(error, "data", "message") or SILENT) if error else "",
        status=number(error, "data", "statusCode"), cost_usd=count_dollars(steps, "cost"), tokens_cached=cached,
        tokens_in=plus(plus(count("tokens", "input"), count("tokens", "cache", "write")), cached),
        tokens_out=plus(count("tokens", "output"), count("tokens", "reasoning")), turns=len(steps) or None,
    )  # fmt: skip


def read_qwen(output: Output) -> Answer:
    """Claude Code's format with another place for the error; at a limit, an object on standard error alone."""
    if not output.text().strip():
        return Answer(error=string(output.last_error(), "message") or SILENT)
    answer, last = read_claude(output), output.objects()[-1]
    # tokens in include those from a cache
    return replace(answer, tokens_in=number(last, "usage", "input_tokens"), error=string(last, "error", "message"))


def read_pi(output: Output) -> Answer:
    """Events, a line each; what counts are the messages that ended. Exit code 0 says nothing."""
    ended = [event.get("message") for event in output.objects() if event.get("type") == "message_end"]
    answers = [message for message in ended if dig(message, "role") == "assistant"]
    if not answers:
        raise ValueError("no answer")
    last = answers[-1]
    error = string(last, "errorMessage") if string(last, "stopReason") == "error" else ""
    status = re.match(r"(\d{3}):", error)
    texts = [string(part, "text") for part in dig(last, "content") or [] if dig(part, "type") == "text"]
    count = partial(total, answers)
    cached = count("usage", "cacheRead")
    return Answer(
        text="\n\n".join(texts), error=error, status=int(status[1]) if status else None, turns=len(answers),
        cost_usd=count_dollars(answers, "usage", "cost", "total"), tokens_out=count("usage", "output"),
        tokens_cached=cached,
        tokens_in=plus(plus(count("usage", "input"), count("usage", "cacheWrite")), cached),
    )  # fmt: skip


def read_aider(output: Output) -> Answer:
    """The log of its requests has the cost, the history of the model the words. A cost of 0 is one it does not know."""
    sent = [e.get("properties") for e in output.objects("analytics.jsonl") if e.get("event") == "message_send"]
    said = output.text("llm.txt").rpartition("LLM RESPONSE")[2]
    answer = "\n".join(line.removeprefix("ASSISTANT ") for line in said.splitlines() if line.startswith("ASSISTANT"))
    errors = re.findall(r"^(?:litellm\.\w+: )+.*$", output.text(size=20_000), re.MULTILINE)
    return Answer(
        text=answer, error="" if sent else (errors[-1] if errors else "it sent nothing"), turns=len(sent) or None,
        cost_usd=count_dollars(sent, "cost") or None, tokens_in=total(sent, "prompt_tokens"),
        tokens_out=total(sent, "completion_tokens"),
    )  # fmt: skip


def read_mini(output: Output) -> Answer:
    """A file with the whole course; a price that is not known counts as 0 there."""
    (course,) = output.objects("traj.json")[-1:]
    messages = course.get("messages") or []
    last = messages[-1] if messages else None
    asked = [message for message in messages if dig(message, "role") == "assistant"]
    status, count = string(course, "info", "exit_status"), partial(total, asked)
    why = string(last, "extra", "exception_str") or string(last, "content")
    return Answer(
        text=string(course, "info", "submission").strip() or (string(asked[-1], "content") if asked else ""),
        error="" if status == "Submitted" else f"{status}: {why}",
        turns=number(course, "info", "model_stats", "api_calls"),
        cost_usd=dollars(course, "info", "model_stats", "instance_cost") or None,
        tokens_in=count("extra", "response", "usage", "prompt_tokens"),
        tokens_cached=count("extra", "response", "usage", "prompt_tokens_details", "cached_tokens"),
        tokens_out=count("extra", "response", "usage", "completion_tokens"),
    )  # fmt: skip


# -----------------------------------------------------------------------------
# What went wrong

RETRY_IN = re.compile(r"(?:retry|try again) in (\d{1,6}(?:\.\d+)?) ?s", re.I)
LIMIT = re.compile(r"hit your .{0,20}limit|usage limit|limit reached|limits? will reset", re.I)
EXHAUSTED = re.compile(r"credit balance|insufficient.{0,3}(quota|credit|balance)", re.I)
HOPELESS = re.compile(
    r"not logged in|log ?in again|/login|authenticat|unauthorized|forbidden|invalid.{0,12}api.?key|incorrect api key"
    r"|api.?key.{0,20}(not valid|not found|missing|required)|no api key|billing details"
    r"|model.{0,80}(not exist|not found|not supported)|(unknown|invalid|no such) model|issue with the selected model"
    r"|unknown (option|argument)|unexpected argument|unrecognized argument",
    re.I,
)
BUSY = re.compile(
    r"overloaded|rate.?limit|too many requests|timed? ?out|temporar|unavailable|internal server error|api error"
    r"|connection|disconnected|network|econn|socket|malformed response|quota",
    re.I,
)
STATUS = re.compile(r"(?:status|error|code|http)\W{1,3}(?:code\W{1,3})?([45]\d\d)\b", re.I)


def classify(error: str, status: int | None, now: datetime) -> Trouble:
    """Say what an error calls for: a person, patience, or another try."""
    why = one_line(error, 300)
    found = STATUS.search(error)
    status = status or (int(found[1]) if found else None)
    if found := RETRY_IN.search(error):
        return Busy(why, now + timedelta(seconds=float(found[1]) + 1))
    if LIMIT.search(error):
        return Busy(why, read_reset(error, now))
    if EXHAUSTED.search(error) or status in (401, 402, 403, 404):
        return Hopeless(why)
    if status in (408, 409, 425, 429) or (status or 0) >= 500:
        return Busy(why)
    if HOPELESS.search(error):
        return Hopeless(why)
    if BUSY.search(error):
        return Busy(why)
    return Failed(why)


RESET = re.compile(
    r"(?:resets?|reset at|try again at)\s+(?:at\s+)?"
    r"(?:(?P<month>[A-Z][a-z]{2})[a-z]* (?P<day>\d{1,2})(?:st|nd|rd|th)?,?(?: (?P<year>\d{4}),?)? )?"
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?\s*(?P<half>[ap])m(?: \((?P<zone>[\w/+-]+)\))?",
    re.I,
)
MARGIN = timedelta(minutes=1)  # the time is told without its seconds
LONGEST = timedelta(days=45)  # that a limit may last; what says more is not believed


def read_reset(error: str, now: datetime) -> datetime | None:
    """When a usage limit ends: `resets 3pm (Europe/Rome)`, `resets Nov 28, 2:48am`, `try again at Nov 28th, 2026 2:48
    AM` or `...|<seconds since 1970>`. `now` carries a zone, which holds where the message names none. None: it is not
    said, or past.

    >>> from datetime import UTC
    >>> read_reset("resets 3:10pm (UTC)", datetime(2026, 11, 25, 14, tzinfo=UTC))
    datetime.datetime(2026, 11, 25, 15, 11, tzinfo=zoneinfo.ZoneInfo(key='UTC'))
    """
    if epoch := re.search(r"\|(\d{10})\b", error):
        until = datetime.fromtimestamp(int(epoch[1]), now.tzinfo)
        return until + timedelta(seconds=1) if now < until < now + LONGEST else None
    found = RESET.search(error)
    if found is None:
        return None
    try:
        here = now.astimezone(ZoneInfo(found["zone"])) if found["zone"] else now
        hour = int(found["hour"]) % 12 + (12 if found["half"].lower() == "p" else 0)
        until = here.replace(hour=hour, minute=int(found["minute"] or 0), second=0, microsecond=0)
        if found["month"]:
            month = datetime.strptime(found["month"].title(), "%b").month
            until = until.replace(year=int(found["year"] or here.year), month=month, day=int(found["day"]))
            if not found["year"] and until < here - timedelta(days=180):
                until = until.replace(year=here.year + 1)
        if not found["month"] and until < here - timedelta(hours=1):
            until += timedelta(days=1)  # the next time that a clock shows it
        return until + MARGIN if here < until + MARGIN < here + LONGEST else None
    except (ValueError, KeyError, OSError, OverflowError):  # no such time, or no such zone on this machine
        return None
