"""Reports: every way to ask for the same messages gives the same sums, and time means what it says."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spryng_instrument import prices, reports
from spryng_instrument.cli.commands import commands
from spryng_instrument.errors import QueryError
from spryng_instrument.message import BILLABLE, Message, Usage, new_id
from spryng_instrument.prices import Source
from spryng_instrument.reports import decimal_text, message_record, period, usage_report
from spryng_instrument.store.base import GROUPS, Filter, StoredMessage
from spryng_instrument.store.sqlite import SqliteStore

from .messages import NOON, message

ZONES = ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin", "America/New_York")
# Clocks change: Sao Paulo skips midnight (2018-11-04) and repeats 23:00 (2018-02-17); Chatham, New York and Berlin.
CHANGES = [
    datetime(2018, 11, 4, 3, tzinfo=timezone.utc),
    datetime(2018, 2, 18, 2, tzinfo=timezone.utc),
    datetime(2026, 4, 4, 14, tzinfo=timezone.utc),
    datetime(2026, 9, 26, 14, tzinfo=timezone.utc),
    datetime(2026, 3, 8, 7, tzinfo=timezone.utc),
    datetime(2026, 11, 1, 6, tzinfo=timezone.utc),
    datetime(2026, 10, 25, 1, tzinfo=timezone.utc),
    datetime(2026, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc),
]
COUNTS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


def price(message: Message) -> Decimal | None:
    """A price that the tests know: a trillionth and a third of a cent matter, and one model has none."""
    if message.usage is None or message.model in (None, "unpriced"):
        return None
    return Decimal(message.usage.input_tokens or 0) * Decimal("0.000000075001") + Decimal("0.003333333333")


@pytest.fixture(autouse=True)
def known_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "price_source", lambda: Source("test 1"))
    monkeypatch.setattr(prices, "price_of", price)


maybe = lambda *values: st.sampled_from([None, *values])  # noqa: E731
usages = st.one_of(
    st.none(),
    st.builds(Usage, **{name: st.none() | st.integers(0, 10**9) for name in COUNTS}).filter(
        lambda usage: usage != Usage()
    ),
)
messages = st.lists(
    st.builds(
        Message,
        id=st.builds(new_id),
        timestamp=st.builds(
            lambda change, minutes, us: change + timedelta(minutes=minutes, microseconds=us),
            st.sampled_from(CHANGES),
            st.sampled_from([-1500, -61, -1, 0, 1, 59, 61, 1441]),
            st.sampled_from([0, 1, -1]),
        ),
        operation=st.just("chat.completions"),
        status=st.sampled_from(["ok", "ok", "ok", "incomplete", "error", "cancelled"]),
        key=maybe("acme", "Zoë & Söhne", 'quo"te, comma', "total"),
        conversation_id=maybe("c-1", "c-2"),
        tags=st.lists(st.sampled_from(["support", "search", "a;b"]), unique=True, max_size=3).map(tuple),
        request_model=maybe("asked"),
        response_model=maybe("gpt", "unpriced"),
        usage=usages,
    ),
    max_size=25,
)
filters = st.builds(
    Filter,
    key=maybe("acme", "nobody"),
    tags=st.sampled_from([(), (), ("support",), ("support", "search")]),
    model=maybe("gpt", "asked"),
    conversation_id=maybe("c-1"),
    since=st.sampled_from([None, None, CHANGES[1], CHANGES[2]]),
    until=st.sampled_from([None, None, CHANGES[6]]),
)


def matches(message: Message, where: Filter) -> bool:
    return (
        (where.key is None or message.key == where.key)
        and set(where.tags) <= set(message.tags)
        and (where.model is None or message.model == where.model)
        and (where.conversation_id is None or message.conversation_id == where.conversation_id)
        and (where.since is None or message.timestamp >= where.since)
        and (where.until is None or message.timestamp < where.until)
    )


def groups_of(message: Message, by: str, zone: ZoneInfo) -> list[Any]:
    local = message.timestamp.astimezone(zone)
    return {
        "key": [message.key],
        "tag": [*message.tags] or [None],
        "conversation": [(message.key, message.conversation_id)],
        "model": [message.model],
        "day": [f"{local:%Y-%m-%d}"],
        "month": [f"{local:%Y-%m}"],
    }[by]


def summed(found: list[Message]) -> dict[str, Any]:
    bill = [message for message in found if message.status in BILLABLE]
    costs = [cost for cost in map(price, found) if cost is not None]
    sums = {name: sum(getattr(message.usage, name) or 0 for message in found if message.usage) for name in COUNTS}
    return {
        "messages": len(bill),
        "conversations": len({(message.key, message.conversation_id) for message in bill if message.conversation_id}),
        "errors": sum(message.status == "error" for message in found),
        "cancelled": sum(message.status == "cancelled" for message in found),
        "unreported": sum(message.usage is None for message in bill),
        "unpriced": sum(message.usage is not None and price(message) is None for message in found),
        **sums,
        "cost_usd": sum(costs, Decimal(0)) if costs else None,
    }


def read_row(row: dict[str, str]) -> dict[str, Any]:
    cost = row.pop("cost_usd")
    return {**{name: int(value) for name, value in row.items()}, "cost_usd": Decimal(cost) if cost else None}


def flags(where: Filter) -> list[str]:
    options = {
        "--key": where.key, "--model": where.model, "--conversation": where.conversation_id,
        "--since": where.since and where.since.isoformat(), "--until": where.until and where.until.isoformat(),
    }  # fmt: skip
    given = [word for name, value in options.items() if value for word in (name, value)]
    return given + [word for tag in where.tags for word in ("--tag", tag)]


fresh = count()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages, filters, st.sampled_from(ZONES))
def test_every_report_adds_up(tmp_path: Path, recorded: list[Message], where: Filter, zone: str) -> None:
    """For each --by, rows and totals in CSV and JSON are what the messages add up to, to the last trillionth."""
    path = tmp_path / f"{next(fresh)}.db"
    SqliteStore(path).record(recorded)
    expected = [message for message in recorded if matches(message, where)]
    for by in GROUPS:
        wanted = defaultdict(list)
        for each in expected:
            for group in groups_of(each, by, ZoneInfo(zone)):
                wanted[group].append(each)
        command = ["usage", "--by", by, "--tz", zone, "--destination", f"sqlite:///{path}", *flags(where)]

        as_json = json.loads(run(*command, "--json"), parse_float=str)
        as_csv = list(csv.DictReader(io.StringIO(run(*command, "--format", "csv"))))

        total = {name: as_json["total"][name] for name in summed([])}
        total["cost_usd"] = None if total["cost_usd"] is None else Decimal(total["cost_usd"])
        assert total == summed(expected)
        assert as_json["cost_is_at_least"] is (total["unpriced"] > 0)
        assert set(as_json["unpriced_models"]) == {
            message.model or "(unknown)" for message in expected if message.usage and price(message) is None
        }
        rows = {}
        for row in as_json["rows"]:
            group = (row.pop("key"), row.pop(by)) if by == "conversation" else row.pop(by)
            rows[group] = {**row, "cost_usd": None if row["cost_usd"] is None else Decimal(row["cost_usd"])}
        assert rows == {group: summed(found) for group, found in wanted.items()}
        none = reports.NONE_LABELS.get(by, "")
        read = {}
        for row in as_csv:
            key = row.pop("key") if by == "conversation" else ""
            group = row.pop(by)
            read[(key, group) if by == "conversation" else group] = read_row(row)
        assert read == {
            ((group[0] or "(no key)", group[1] or none) if by == "conversation" else group or none): sums
            for group, sums in rows.items()
        }
        if by not in ("tag",):
            assert sum((row["cost_usd"] or 0 for row in read.values()), Decimal(0)) == (total["cost_usd"] or 0)
            assert sum(row["messages"] for row in read.values()) == total["messages"]


def run(*args: str) -> str:
    result = CliRunner().invoke(commands, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_total_counts_once(tmp_path: Path) -> None:
    """By tag, a message is in each of its rows, and once in the total."""
    store = SqliteStore(tmp_path / "usage.db")
    store.record([an(tags=("a", "b"), usage=Usage(input_tokens=10), response_model="gpt")])

    report = usage_report(store, "tag")

    assert [(row.group, row.messages, row.input_tokens) for row in report.rows] == [("a", 1, 10), ("b", 1, 10)]
    assert (report.total.messages, report.total.input_tokens) == (1, 10)


def test_at_least(tmp_path: Path) -> None:
    """A report whose messages have no price says so, and of which models; only those of its filter."""
    store = SqliteStore(tmp_path / "usage.db")
    store.record(
        [
            an(key="a", response_model="unpriced", usage=Usage(input_tokens=1)),
            an(key="a", usage=Usage(input_tokens=1)),
            an(key="b", response_model="gpt", usage=Usage(input_tokens=1)),
        ]
    )

    assert usage_report(store, "day").unpriced_models == ("(unknown)", "unpriced")
    assert usage_report(store, "day").cost_is_at_least
    assert usage_report(store, "day", Filter(key="b")).unpriced_models == ()
    assert not usage_report(store, "day", Filter(key="b")).cost_is_at_least


@pytest.mark.parametrize(("by", "zone"), [("weather", "UTC"), ("key", "Mars/Olympus")])
def test_impossible_questions(tmp_path: Path, by: str, zone: str) -> None:
    """An unknown group or zone is an error that has the value and what is allowed."""
    store = SqliteStore(tmp_path / "usage.db")

    with pytest.raises(QueryError, match=r"'weather'.*key, tag, conversation|'Mars/Olympus'.*Europe/Berlin"):
        usage_report(store, by, zone=zone)


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


def test_decimal_text() -> None:
    """Amounts are plain digits for programs: no exponent, no zeros at the end."""
    amounts = [None, Decimal("0E-12"), Decimal("1E-12"), Decimal("100"), Decimal("1.500000000000"), Decimal("1E+3")]

    assert [*map(decimal_text, amounts)] == [None, "0", "0.000000000001", "100", "1.5", "1000"]


def test_message_record() -> None:
    """A message's JSON has every field, its time in the zone, and its cost as it was frozen."""
    message = an(usage=Usage(input_tokens=3), tags=("a",))

    record = message_record(StoredMessage(message, Decimal("0.5"), "p 1"), ZoneInfo("Asia/Kolkata"))

    assert set(record) == {*Message.__struct_fields__, "cost_usd", "price_version"}
    assert record["timestamp"] == "2026-11-23T02:00:00+05:30"
    assert record["usage"]["input_tokens"] == 3
    assert record["usage"]["output_tokens"] is None
    assert (record["tags"], record["cost_usd"], record["price_version"]) == (["a"], "0.5", "p 1")


def an(**more: Any) -> Message:
    return Message(id=new_id(), timestamp=NOW, operation="chat.completions", **more)


def test_windows(tmp_path: Path) -> None:
    """Cut into days of a zone, each day has what a report of that day alone has; into months, too."""
    store = SqliteStore(tmp_path / "usage.db")
    store.record(
        [
            message(timestamp=NOON + timedelta(hours=7 * number), key="ab"[number % 2], conversation_id="c",
                    usage=Usage(input_tokens=2**number))
            for number in range(12)
        ]
    )  # fmt: skip
    for window in ("day", "month"):
        report = usage_report(store, "key", zone="Asia/Kolkata", window=window)
        assert report.columns[:2] == [window, "key"]
        assert sum(row.input_tokens for row in report.rows) == report.total.input_tokens == 2**12 - 1
        for label in dict.fromkeys(report.windows):
            day, month = (label, None) if window == "day" else (None, label)
            since, until = period(day, day, month, "Asia/Kolkata")
            alone = usage_report(store, "key", Filter(since=since, until=until), "Asia/Kolkata")
            assert alone.rows == [row for row, of in zip(report.rows, report.windows, strict=True) if of == label]
        assert [line[0] for line in report.as_table()] == list(report.windows)
        assert [row[window] for row in report.as_json()["rows"]] == list(report.windows)
    for by, wrong in (("day", "day"), ("key", "hour")):
        with pytest.raises(QueryError, match="window="):
            usage_report(store, by, window=wrong)
