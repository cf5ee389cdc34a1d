"""What errors call for, and when a limit is over: the words are those that the CLIs really print."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from autoresearch.records import Busy, Failed, Hopeless
from autoresearch.replies import classify, read_reset

NOW = datetime(2026, 11, 25, 7, 48, tzinfo=UTC)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        ("Invalid API key · Fix external API key", 401, Hopeless),
        ("Not logged in · Please run /login", None, Hopeless),
        ("Failed to authenticate. API Error: 403 no permission", 403, Hopeless),
        ("There's an issue with the selected model (nope). It may not exist or you may not have it.", 404, Hopeless),
        ("Credit balance is too low", 400, Hopeless),
        ("Quota exceeded. Check your plan and billing details.", None, Hopeless),
        ("unexpected status 401 Unauthorized: Incorrect API key provided, url: http://x/v1/responses", None, Hopeless),
        ("unexpected status 404 Not Found: The model `nope` does not exist, url: http://x/v1", None, Hopeless),
        ("error: unknown option '--safe-mode'", None, Hopeless),
        ("API Error: Request rejected (429) · slow down", 429, Busy),
        ("You've hit your 5-hour limit · resets 8:47am (UTC)", 429, Busy),
        ("You\u2019ve hit your usage limit. Upgrade, purchase more credits or try again at 8:47 AM.", None, Busy),
        ("exceeded retry limit, last status: 429 Too Many Requests", None, Busy),
        ("You exceeded your quota, please check your plan and billing details. Please retry in 17.3s.", 429, Busy),
        ("API Error: 529 Overloaded. This is a server-side issue, usually temporary", 529, Busy),
        ("API Error: 500 Internal server error. This is a server-side issue", 500, Busy),
        ("unexpected status 503 Service Unavailable: Overloaded, url: http://127.0.0.1:44187/v1/responses", None, Busy),
        ("stream disconnected before completion: stream closed before response.completed", None, Busy),
        ("API Error: API returned an empty or malformed response (HTTP 200)", None, Busy),
        ("Connection error.", None, Busy),
        ("Reached maximum number of turns (30)", None, Failed),
        ("Prompt is too long", 400, Failed),
        ("", None, Failed),
    ],
)  # fmt: skip
def test_what_an_error_calls_for(error: str, status: int | None, kind: type) -> None:
    assert isinstance(classify(error, status, NOW), kind)


@pytest.mark.parametrize(
    ("error", "until"),
    [
        ("You've hit your 5-hour limit · resets 3:18am (America/New_York)", "2026-11-25 08:19"),
        ("You've hit your 5-hour limit · resets 2am (America/New_York)", None),  # an hour ago, or less
        ("You've hit your session limit · resets 1am (America/New_York)", "2026-11-26 06:01"),
        ("You've hit your weekly limit · resets Nov 28, 2:48am (America/New_York)", "2026-11-28 07:49"),
        ("You've hit your weekly limit · resets Jan 4, 2027, 2:48am (America/New_York)", "2027-01-04 07:49"),
        ("You've hit your weekly limit · resets Jan 2, 11am (Europe/Berlin)", "2027-01-02 10:01"),
        ("usage limit. Try again at 8:48 AM.", "2026-11-25 08:49"),
        ("usage limit. or try again at Nov 28th, 2026 2:48 PM.", "2026-11-28 14:49"),
        ("Claude AI usage limit reached|1795600000", "2026-11-25 09:46"),
        ("Claude AI usage limit reached|1700000000", None),
        ("You've hit your limit · resets 3pm (Mars/Olympus)", None),
        ("You've hit your limit · resets Feb 31, 3pm (UTC)", None),
        ("You've hit your limit", None),
    ],
)
def test_when_a_limit_is_over(error: str, until: str | None) -> None:
    trouble = classify(error, 429, NOW)
    assert isinstance(trouble, Busy)
    assert (f"{trouble.until.astimezone(UTC):%Y-%m-%d %H:%M}" if trouble.until else None) == until


def test_a_limit_is_told_in_the_time_of_the_place() -> None:
    here = NOW.astimezone(ZoneInfo("Asia/Tokyo"))
    assert read_reset("try again at 5:10 PM", here) == datetime(2026, 11, 25, 8, 11, tzinfo=UTC)
