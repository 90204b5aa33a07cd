"""Reports: every way to ask for the same messages gives the same sums, and time means what it says."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from html import escape
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
from spryng_instrument.errors import QueryError, SettingsError, StoreError
from spryng_instrument.journal import Journal
from spryng_instrument.message import BILLABLE, Message, Usage, encode, new_id
from spryng_instrument.periods import period
from spryng_instrument.prices import Source
from spryng_instrument.reports import decimal_text, message_record, usage_report
from spryng_instrument.store.base import GROUPS, Filter, StoredMessage
from spryng_instrument.store.sqlite import SqliteStore

from .messages import CHANGES, NOON, ZONES, message

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
    with pytest.raises(QueryError, match=r"limit=0 must be a whole number of rows"):
        usage_report(store, "key", limit=0)


NOW = datetime(2026, 11, 22, 20, 30, tzinfo=timezone.utc)


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


# --- as a Python user asks --------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, without settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("SPRYNG_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ledger(*recorded: Message, path: str = ".spryng/usage.db") -> None:
    SqliteStore(path).record(recorded)


QUESTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"by": "tag", "tags": "support"}, ["--by", "tag", "--tag", "support"]),
    ({"by": "tag", "tags": ["support", "x"]}, ["--by", "tag", "--tag", "support", "--tag", "x"]),
    ({"by": "day", "zone": "Asia/Kolkata"}, ["--by", "day", "--tz", "Asia/Kolkata"]),
    ({"month": "2026-03", "zone": "Pacific/Chatham"}, ["--month", "2026-03", "--tz", "Pacific/Chatham"]),
    ({"no_key": True}, ["--no-key"]),
    ({"by": "conversation", "window": "month"}, ["--by", "conversation", "--window", "month"]),
    ({"since": date(2026, 3, 1), "until": date(2026, 3, 1)}, ["--since", "2026-03-01", "--until", "2026-03-01"]),
    ({"since": NOON, "until": "2026-03-01T18:00"}, ["--since", "2026-03-01T12:00Z", "--until", "2026-03-01T18:00"]),
    ({"by": "model", "model": "gpt", "conversation": "c"}, ["--by", "model", "--model", "gpt", "--conversation", "c"]),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "options"), QUESTIONS, ids=[" ".join(case[1]) or "all" for case in QUESTIONS])
def test_python_and_command_line_agree(here: Path, asked: dict[str, Any], options: list[str]) -> None:
    """reports.usage() answers what `spryng usage` does, by the same words, of the same ledger."""
    ledger(*(
        message(timestamp=NOON + timedelta(hours=hours), key=key, conversation_id="c", tags=tags, response_model="gpt",
                usage=Usage(input_tokens=hours + 1))
        for hours in (-20, 0, 5, 30) for key in ("a", None) for tags in (("support", "x"), ("support",), ())
    ))  # fmt: skip

    assert reports.usage(**asked).as_json() == json.loads(run("usage", "--json", *options))


def test_messages_and_conversations(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one, newest first, over pages of any length; costs are there."""
    monkeypatch.setattr(reports, "PAGE", 2)
    sent = [
        message(timestamp=NOON + timedelta(minutes=number), key="a", conversation_id=f"c-{number % 3}",
                usage=Usage(input_tokens=1), response_model="gpt")
        for number in range(5)
    ]  # fmt: skip
    ledger(*sent, message(key="b"))

    found = list(reports.messages(key="a"))

    assert [row.message for row in found] == sent[::-1]
    assert all(row.cost_usd == price(row.message) for row in found)
    assert [row.usage.group for row in reports.conversations(key="a")] == ["c-2", "c-1", "c-0"]
    assert sum(row.usage.messages for row in reports.conversations()) == 5
    assert list(reports.messages(key="nobody")) == list(reports.conversations(key="nobody")) == []


def test_another_ledger(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPRYNG_DESTINATION names the ledger, an argument wins over it; one that is not there is said at once."""
    ledger(message(key="env"), path="env.db")
    ledger(message(key="argument"), path="argument.db")
    monkeypatch.setenv("SPRYNG_DESTINATION", "sqlite:///env.db")

    assert [row.group for row in reports.usage().rows] == ["env"]
    assert [row.group for row in reports.usage(destination="sqlite:///argument.db").rows] == ["argument"]
    with pytest.raises(StoreError, match=r"there is no ledger at .*none\.db"):
        reports.messages(destination="sqlite:///none.db")
    with pytest.raises(SettingsError, match="takes messages, but cannot be read from here"):
        reports.usage(destination="https://usage.example.com")
    with pytest.raises(QueryError, match="key='a' and no_key=True exclude each other"):
        reports.usage(key="a", no_key=True)


def test_what_waits_is_in_the_figures(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dead process left in the journal is delivered first; where that fails, a warning says so."""
    for number in range(2):
        journal = Journal(here / ".spryng" / "usage.db.journal", memory_limit=0, wake=lambda: None)
        journal.append(encode(message(key="late")) + b"\n")
        journal.seal()
        journal.close()
        if number:
            monkeypatch.setattr("spryng_instrument.ledger.deliver_orphans", failing)
            with pytest.warns(UserWarning, match=r"are not in these figures: it is locked") as seen:
                assert reports.usage().total.messages == 1
            assert seen[0].filename == __file__
        else:
            assert reports.usage().total.messages == 1


def failing(*args: object, **more: object) -> None:
    raise StoreError("it is locked")


def test_a_report_shows_itself(here: Path) -> None:
    """At a prompt as a table, in a notebook as HTML: what, when and whose days, "at least", and what is missing."""
    ledger(
        message(key="<b>acme</b>", response_model="gpt", usage=Usage(input_tokens=1000)),
        message(response_model="unpriced", usage=Usage(input_tokens=5)),
    )
    report = reports.usage(since="2026-03-01", zone="Asia/Kolkata")

    first, *lines = str(report).splitlines()
    html = report._repr_html_()

    assert first.startswith("Usage by key from 2026-03-01 00:00 (Asia/Kolkata): 2 messages, at least 0.00340")
    assert [line.split()[:2] for line in lines[1:4]] == [["(no", "key)"], ["<b>acme</b>", "1"], ["total", "2"]]
    assert repr(report) == str(report)
    assert "&lt;b&gt;acme&lt;/b&gt;" in html
    assert "<b>acme" not in html
    assert f'<caption style="text-align:left">{escape(first)}</caption>' in html
    assert all("no price for unpriced." in shown for shown in (html, lines[-2]))


def test_a_long_report_is_shown_in_part(here: Path) -> None:
    """A notebook shows the first rows, the total of all, and how many more there are; printing shows all."""
    ledger(*(message(key=f"customer-{number:04}") for number in range(reports.SHOWN + 3)))
    report = reports.usage()

    for shown in (repr(report), report._repr_html_()):
        assert f"customer-{reports.SHOWN - 1:04}" in shown
        assert f"customer-{reports.SHOWN:04}" not in shown
        assert "3 rows more: print the report, or take its rows." in shown
        assert f"{reports.SHOWN + 3} messages" in shown
    assert f"customer-{reports.SHOWN + 2:04}" in str(report)


def test_records_are_for_dataframes(here: Path) -> None:
    """A dictionary a row: numbers are numbers, costs Decimal, None where there is nothing."""
    ledger(message(response_model="gpt", usage=Usage(input_tokens=1000)), message(key="acme"))

    free, none = reports.usage().records()

    assert (free["key"], free["input_tokens"], free["cost_usd"]) == (None, 1000, Decimal("0.003408334333"))
    assert (none["key"], none["messages"], none["cost_usd"]) == ("acme", 1, None)
    assert list(free) == reports.usage().columns


def test_a_trend_has_every_day(here: Path) -> None:
    """A count for each day of the zone, up to the newest message's, none for a day without; the total counts once."""
    ledger(
        message(timestamp=NOON - timedelta(days=3), key="a", tags=("x", "y")),
        message(timestamp=NOON, key="a", tags=("x",)),
        message(timestamp=NOON + timedelta(hours=9), key="b"),
    )
    store = SqliteStore(".spryng/usage.db")

    utc = reports.trend(store, "tag", Filter(), "UTC", 30)
    kolkata = reports.trend(store, "key", Filter(), "Asia/Kolkata", 2)

    assert utc.days == ("2026-02-26", "2026-02-27", "2026-02-28", "2026-03-01")
    assert utc.counts == {(None, "x"): [1, 0, 0, 1], (None, "y"): [1, 0, 0, 0], (None, None): [0, 0, 0, 1]}
    assert utc.total == [1, 0, 0, 2]
    assert (kolkata.days, kolkata.counts) == (("2026-03-01", "2026-03-02"), {(None, "a"): [1, 0], (None, "b"): [0, 1]})
    assert reports.trend(store, "key", Filter(since=NOON), "UTC", 30).days == ("2026-03-01",)
    assert reports.trend(store, "key", Filter(key="nobody"), "UTC", 30).days == ()
