"""Periods: what a text of a date, a time, an age or a month means in a zone, and what it cannot mean."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from spryng_instrument.errors import QueryError
from spryng_instrument.periods import period

NOW = datetime(2026, 11, 22, 20, 30, tzinfo=timezone.utc)
PERIODS = [
    ("days are whole", {"since": "2026-11-01", "until": "2026-11-30"}, "2026-11-01T00:00", "2026-12-01T00:00"),
    ("one day", {"since": "2026-11-05", "until": "2026-11-05"}, "2026-11-05T00:00", "2026-11-06T00:00"),
    ("times", {"since": "2026-11-01T10:00", "until": "2026-11-01 12:30:15"}, "2026-11-01T10:00", "2026-11-01T12:30:15"),
    ("an offset wins", {"since": "2026-11-01T10:00+05:00"}, "2026-11-01T05:00", None),
    ("Z is an offset", {"until": "2026-11-01T06:00Z"}, None, "2026-11-01T06:00"),
    ("parts of a second", {"since": "2026-11-01T10:00:00.250"}, "2026-11-01T10:00:00.250", None),
    ("today", {"since": "today"}, "2026-11-22T00:00", None),
    ("until yesterday has it", {"since": "yesterday", "until": "yesterday"}, "2026-11-21T00:00", "2026-11-22T00:00"),
    ("hours ago", {"since": "24h"}, "2026-11-21T20:30", None),
    ("days ago", {"since": "7d", "until": "90min"}, "2026-11-15T20:30", "2026-11-22T19:00"),
    ("weeks ago", {"since": "2w"}, "2026-11-08T20:30", None),
    ("a month", {"month": "2026-11"}, "2026-11-01T00:00", "2026-12-01T00:00"),
    ("the last month of a year", {"month": "2026-12"}, "2026-12-01T00:00", "2027-01-01T00:00"),
    ("february", {"month": "2028-02"}, "2028-02-01T00:00", "2028-03-01T00:00"),
    ("no period", {}, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "since", "until"), [case[1:] for case in PERIODS], ids=[case[0] for case in PERIODS])
def test_period(given: dict[str, str], since: str | None, until: str | None) -> None:
    """A period is what a person means by it."""

    def utc(text: str | None) -> datetime | None:
        return text and datetime.fromisoformat(text).replace(tzinfo=timezone.utc)

    options = {"since": None, "until": None, "month": None, **given}
    assert period(**options, zone="UTC", now=NOW) == (utc(since), utc(until))


def test_period_of_a_zone() -> None:
    """Days, months and times without an offset are those of the zone, also where clocks change."""
    kolkata = period("2026-11-01", "2026-11-01T06:00", None, "Asia/Kolkata", now=NOW)
    sao_paulo = period("2018-11-04", "2018-11-04", None, "America/Sao_Paulo", now=NOW)
    today = period("today", None, None, "Pacific/Auckland", now=NOW)

    assert [moment and moment.isoformat() for moment in kolkata] == [
        "2026-10-31T18:30:00+00:00",
        "2026-11-01T00:30:00+00:00",
    ]
    assert sao_paulo[1] is not None
    assert sao_paulo[0] is not None
    assert sao_paulo[1] - sao_paulo[0] == timedelta(hours=23)
    assert today[0] == datetime(2026, 11, 22, 11, tzinfo=timezone.utc)


IMPOSSIBLE = [
    {"since": "2026-02-30"}, {"until": "2026-13-01"}, {"since": "tomorrow"}, {"since": ""}, {"since": "7 days"},
    {"since": "2026-11-01T25:00"}, {"since": "0000-01-01"}, {"until": "9999-12-31"}, {"since": "999999w"},
    {"since": "2026-11-01T10:00+99:00"}, {"month": "2026-13"}, {"month": "november"}, {"month": "2026-1"},
    {"month": "9999-12"}, {"since": "2026-11-02", "until": "2026-11-01"}, {"since": "1h", "until": "2h"},
    {"month": "2026-11", "since": "today"}, {"since": "20261101"}, {"since": "２０２６-11-01"},
]  # fmt: skip


@pytest.mark.parametrize("given", IMPOSSIBLE, ids=str)
def test_impossible_period(given: dict[str, str]) -> None:
    """A period that cannot be is an error with the value, and never a guess."""
    options = {"since": None, "until": None, "month": None, **given}

    with pytest.raises(QueryError) as caught:
        period(**options, zone="Europe/Berlin", now=NOW)

    assert "month" in given or any(repr(value) in str(caught.value) for value in given.values())
