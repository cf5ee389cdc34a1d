"""What errors call for, and when a limit is over: the words are those that the CLIs really print."""

from datetime import UTC, datetime, timedelta

import pytest

from autoresearch.agents.trouble import classify
from autoresearch.ideas import Busy, Fruitless, NeedsPerson

NOW = datetime(2026, 11, 25, 7, 48, tzinfo=UTC)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        ("Invalid API key · Fix external API key", 401, NeedsPerson),
        ("Not logged in · Please run /login", None, NeedsPerson),
        ("Failed to authenticate. API Error: 403 no permission", 403, NeedsPerson),
        ("There's an issue with the selected model (nope). It may not exist or you may not have it.", 404, NeedsPerson),
        ("Credit balance is too low", 400, NeedsPerson),
        ("Quota exceeded. Check your plan and billing details.", None, NeedsPerson),
        ("unexpected status 401 Unauthorized: Incorrect API key provided, url: http://x/v1/responses", None, NeedsPerson),
        ("unexpected status 404 Not Found: The model `nope` does not exist, url: http://x/v1", None, NeedsPerson),
        ("error: unknown option '--safe-mode'", None, NeedsPerson),
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
        ("Reached maximum number of turns (30)", None, Fruitless),
        ("Prompt is too long", 400, Fruitless),
        ("", None, Fruitless),
    ],
)  # fmt: skip
def test_what_an_error_calls_for(error: str, status: int | None, kind: type) -> None:
    assert isinstance(classify(error, status, NOW), kind)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (
            "Quota exceeded for quota metric. Please retry in 17.3s.",
            18.3,
        ),  # one more than asked for
        ("Rate limit reached for gpt-9. Please try again in 4 s.", 5.0),
        ("retry in 999999s", 1_000_000.0),
        ("retry in 99999999999999s", None),  # which no clock can say
        ("usage limit. Try again at 8:48 AM.", None),
        ("You've hit your limit", None),
    ],
)
def test_when_a_limit_is_over(error: str, seconds: float | None) -> None:
    trouble = classify(error, 429, NOW)
    assert isinstance(trouble, Busy)
    assert trouble.until == (None if seconds is None else NOW + timedelta(seconds=seconds))
