"""What went wrong with a call: its error in words and HTTP status, as Trouble."""

import re
from datetime import datetime, timedelta

from autoresearch.files import one_line
from autoresearch.ideas import Busy, Fruitless, NeedsPerson, Trouble

RETRY_IN = re.compile(r"(?:retry|try again) in (\d{1,6}(?:\.\d+)?) ?s", re.I)
LIMIT = re.compile(r"hit your .{0,20}limit|usage limit|limit reached|limits? will reset", re.I)
EXHAUSTED = re.compile(r"credit balance|insufficient.{0,3}(quota|credit|balance)", re.I)
HOPELESS = re.compile(
    r"not logged in|log ?in again|/login|authenticat|unauthorized|forbidden"
    r"|invalid.{0,12}api.?key|incorrect api key|no api key"
    r"|api.?key.{0,20}(not valid|not found|missing|required)|billing details"
    r"|model.{0,80}(not exist|not found|not supported)|(unknown|invalid|no such) model"
    r"|issue with the selected model|unknown (option|argument)|un(expected|recognized) argument",
    re.I,
)
BUSY = re.compile(
    r"overloaded|rate.?limit|too many requests|timed? ?out|temporar|unavailable"
    r"|internal server error|api error|connection|disconnected|network|econn|socket"
    r"|malformed response|quota",
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
        return Busy(why)
    if EXHAUSTED.search(error) or status in (401, 402, 403, 404):
        return NeedsPerson(why)
    if status in (408, 409, 425, 429) or (status or 0) >= 500:
        return Busy(why)
    if HOPELESS.search(error):
        return NeedsPerson(why)
    if BUSY.search(error):
        return Busy(why)
    return Fruitless(why)
