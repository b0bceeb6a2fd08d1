"""The date of a call: in every form that logs use, and none where it cannot be one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from moelocal.cost.shapes import parse

WHEN = datetime(2024, 8, 28, 15, 14, 49, tzinfo=UTC)
CREATED = 1724858089
CALL = {"object": "chat.completion", "model": "m", "choices": [], "usage": {"prompt_tokens": 1}}


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (CREATED, WHEN),
        (CREATED * 1000, WHEN),
        ("2024-08-28T17:14:49+02:00", WHEN),
        ("2024-08-28 15:14:49", WHEN),
        (str(CREATED), WHEN),
        (f"{CREATED}.0", WHEN),
        (str(CREATED * 1000), WHEN),
        ("20240828", datetime(2024, 8, 28, tzinfo=UTC)),
        ("9" * 5000, None),
        (True, None),
        (0, None),
        ("2019-12-31T23:59:59Z", None),
        ("2020-01-01T00:00:00Z", datetime(2020, 1, 1, tzinfo=UTC)),
        (9_999_999_999_999, None),
        ("yesterday", None),
        (-5, None),
        (10**400, None),
        (float("nan"), None),
    ],
)
def test_dates_in_the_forms_that_logs_use(stamp, expected):
    entry = parse({"timestamp": stamp, "response": CALL})
    assert entry.when == expected


def test_a_date_may_be_tomorrow_as_in_another_zone_and_no_later():
    now = datetime.now(UTC)
    for hours, plausible in ((23, True), (25, False)):
        when = now + timedelta(hours=hours)
        entry = parse({"timestamp": when.isoformat(), "response": CALL})
        assert entry.when == (when if plausible else None)
    # another field may hold one
    assert parse(CALL | {"created": 9_999_999_999_999, "timestamp": CREATED}).when == WHEN
