"""What every engine promises alike: what goes in comes out, each id once, and every sum is the sum."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument.alerts import Alerts
from spryng_instrument.budgets import Budget, Budgets, budget_states
from spryng_instrument.errors import QueryError, StoreError
from spryng_instrument.message import BILLABLE, Message, Usage, decode, encode
from spryng_instrument.store import sql
from spryng_instrument.store.base import (
    COST_UNIT,
    GROUPS,
    START,
    ApiKey,
    Conversation,
    Cost,
    Filter,
    Store,
    UsageRow,
    most_first,
)
from spryng_instrument.store.clickhouse import ClickHouseStore
from spryng_instrument.store.postgres import PostgresStore
from spryng_instrument.store.sqlite import SqliteStore

from . import clickhouse_server
from .messages import NOON, anything, message
from .servers import Postgres
from .test_processes import FULL

ZONES = ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin")
Fresh = Callable[[], AbstractContextManager[Store]]
"""Makes an empty ledger, which is gone afterwards."""


@contextmanager
def sqlite() -> Iterator[Fresh]:
    @contextmanager
    def fresh() -> Iterator[Store]:
        with tempfile.TemporaryDirectory() as folder:
            yield SqliteStore(Path(folder) / "usage.db")

    yield fresh


@contextmanager
def postgresql() -> Iterator[Fresh]:
    with Postgres() as server:

        @contextmanager
        def fresh() -> Iterator[Store]:
            with server.ledger() as url, closing(PostgresStore(url)) as store:
                yield store

        yield fresh


@contextmanager
def clickhouse() -> Iterator[Fresh]:
    @contextmanager
    def fresh() -> Iterator[Store]:
        with clickhouse_server.clickhouse().database() as url, closing(ClickHouseStore(url)) as store:
            store.record([], timeout_s=60)  # makes the tables
            yield store

    yield fresh


ENGINES: dict[str, Callable[[], AbstractContextManager[Fresh]]] = {
    "sqlite": sqlite,
    "postgresql": postgresql,
    "clickhouse": clickhouse,
}
"""What starts each engine, for as long as its tests take."""


@pytest.fixture(scope="module", params=ENGINES)
def fresh(request: pytest.FixtureRequest) -> Iterator[Fresh]:
    with ENGINES[request.param]() as fresh:
        yield fresh


@pytest.fixture
def store(fresh: Fresh) -> Iterator[Store]:
    with fresh() as store:
        yield store


@settings(max_examples=60 if FULL else 20, deadline=None)
@given(messages=st.lists(anything, max_size=6, unique_by=lambda each: each.id))
def test_what_goes_in_comes_out(fresh: Fresh, messages: list[Message]) -> None:
    """Every message comes back as it was written to the journal; None stays None and 0 stays 0."""
    with fresh() as store:
        written = [decode(encode(each)) for each in messages]
        assert store.record(written).count("recorded") == len(messages)
        stored = {row.message.id: row.message for row in store.messages(limit=100).rows}
        expected = {each.id: each for each in written}
        for each in expected.values():  # a usage without a single count says as much as none
            if each.usage == Usage():
                fields = {name: getattr(each, name) for name in each.__struct_fields__}
                expected[each.id] = Message(**{**fields, "usage": None})
        assert stored == expected
        receipt = store.record(written)
        assert receipt.outcomes == ("duplicate",) * len(messages)


def test_duplicates_and_conflicts_within_a_batch(store: Store) -> None:
    """In one batch, too, the first message of an id is kept; the same again is a duplicate, another a conflict."""
    first, other = message(key="a"), message(key="b")
    conflicting = message(id=first.id, key="c")
    receipt = store.record([first, first, conflicting, other])
    assert receipt.outcomes == ("recorded", "duplicate", "conflict", "recorded")
    receipt = store.record([conflicting, other])
    assert receipt.outcomes == ("conflict", "duplicate")
    assert {row.message for row in store.messages().rows} == {first, other}


def test_all_or_none(store: Store) -> None:
    """A batch with a message that cannot be stored leaves nothing behind."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each engine has its own
        store.record([message(writer="w", sequence=1), message(usage=Usage(input_tokens=2**63))])
    assert not isinstance(caught.value, StoreError), "the pump would try it again for ever"
    assert store.messages().rows == []
    assert store.health().writers == 0


def test_many_in_one_batch(store: Store) -> None:
    """A batch of any size is recorded, though a statement takes so many values only."""
    messages = [message(writer="w", sequence=number) for number in range(1, 1202)]
    assert store.record(messages).count("recorded") == 1201
    assert store.health().gaps == ()


@settings(max_examples=30, deadline=None)
@given(seconds=st.lists(st.integers(0, 3), max_size=25), limit=st.integers(1, 7))
def test_pages(fresh: Fresh, seconds: list[int], limit: int) -> None:
    """Paging visits each message once, newest first, though many share their time and others are recorded meanwhile."""
    with fresh() as store:
        messages = [message(timestamp=NOON + timedelta(seconds=second)) for second in seconds]
        store.record(messages)
        seen: list[Message] = []
        after = None
        while True:
            page = store.messages(after=after, limit=limit)
            seen += [row.message for row in page.rows]
            assert len(page.rows) <= limit
            store.record([message(timestamp=NOON + timedelta(days=1))])  # newer: on no later page
            after = page.next
            if after is None:
                break
        known = {each.id for each in messages}
        seen = [each for each in seen if each.id in known]
        assert seen == sorted(messages, key=lambda each: (each.timestamp, each.id), reverse=True)


def test_arrivals_miss_nothing(store: Store) -> None:
    """Messages in the order of their arrival: one that comes late, with an old time, is seen, too."""
    store.record([message() for _ in range(3)])
    page = store.arrivals()
    assert len(page.rows) == 3
    assert store.arrivals(START).rows == page.rows
    late = [message(timestamp=NOON - timedelta(days=number)) for number in range(5)]
    store.record(late)
    seen: list[str] = []
    for _ in range(4):
        page = store.arrivals(page.next, limit=2)
        seen += [row.message.id for row in page.rows]
    assert seen == [each.id for each in late]


@settings(max_examples=20, deadline=None)
@given(
    days=st.lists(
        st.tuples(st.sampled_from([None, "a", "b"]), st.sampled_from(["c", "d", "ü"]), st.integers(0, 2)), max_size=15
    ),
    limit=st.integers(1, 5),
)
def test_pages_of_conversations(fresh: Fresh, days: list[tuple[str | None, str, int]], limit: int) -> None:
    """Paging visits each customer's conversation once, the one that began last first, with its first and last time."""
    with fresh() as store:
        times: dict[tuple[str | None, str], list[datetime]] = defaultdict(list)
        for key, conversation_id, day in days:
            times[key, conversation_id].append(NOON + timedelta(days=day))
            store.record([message(key=key, conversation_id=conversation_id, timestamp=NOON + timedelta(days=day))])
        store.record([message(key="a")])  # of no conversation
        seen: list[Conversation] = []
        after = None
        while True:
            page = store.conversations(after=after, limit=limit)
            assert len(page.rows) <= limit
            seen += page.rows
            after = page.next
            if after is None:
                break
        assert {(each.usage.key, each.usage.group): (each.first, each.last) for each in seen} == {
            owner: (min(moments), max(moments)) for owner, moments in times.items()
        }
        assert sum(each.usage.messages for each in seen) == len(days)
        order = [(each.first, each.usage.key is None, each.usage.key or "", each.usage.group or "") for each in seen]
        assert order == sorted(order, reverse=True)


def test_found(store: Store) -> None:
    """Of the ids asked for, those that are there, with their messages."""
    messages = [message(key="a"), message(tags=("x", "ü"), usage=Usage(input_tokens=0))]
    store.record(messages)
    assert store.found([]) == {}
    assert store.found([*(each.id for each in messages), "another"]) == {each.id: each for each in messages}


def test_api_keys(store: Store) -> None:
    """Keys of the server come back as they were kept, the oldest first; one that is kept again is replaced."""
    assert store.api_keys() == []
    second = ApiKey("k2", "billing", "d2", ("ingest", "read"), NOON + timedelta(microseconds=1))
    first = ApiKey("k1", "Größe", "d1", ("read",), NOON)
    store.keep_api_key(second)
    store.keep_api_key(first)
    assert store.api_keys() == [first, second]
    revoked = replace(second, revoked=NOON + timedelta(days=1))
    store.keep_api_key(revoked)
    assert store.api_keys(timeout_s=10.0) == [first, revoked]


def test_times_before_1970(store: Store) -> None:
    """A message of any time counts in the day that it is in."""
    when = [datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc), datetime(1901, 1, 1, tzinfo=timezone.utc)]
    store.record([message(timestamp=each) for each in when])
    assert [(row.group, row.messages) for row in store.usage("day")] == [("1901-01-01", 1), ("1969-12-31", 1)]
    where = Filter(since=when[0])
    assert store.total(where).messages == 1


@pytest.mark.parametrize("after", ["", "x", "1", "1_", "_x", "1_a b", "9" * 30 + "_x"])
def test_mark_that_is_none(store: Store, after: str) -> None:
    """A mark that no page gave is refused with its text."""
    store.record([])
    with pytest.raises(QueryError, match="is no mark of a page"):
        store.messages(after=after)


# --- sums

few = st.sampled_from([None, "a", "b", "ü"])
priced = st.one_of(st.none(), st.integers(0, 10**15))
TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
# About a DST change of each zone, and about ends of months.
turns = st.sampled_from(
    [
        datetime(2018, 11, 4, 3, tzinfo=timezone.utc),
        datetime(2018, 2, 18, 2, tzinfo=timezone.utc),
        datetime(2026, 4, 4, 14, tzinfo=timezone.utc),
        datetime(2026, 10, 25, 1, tzinfo=timezone.utc),
        datetime(2026, 12, 31, 18, 30, tzinfo=timezone.utc),
    ]
)
times = st.builds(lambda turn, minutes: turn + timedelta(minutes=minutes), turns, st.integers(-1500, 1500))
counted = st.builds(
    message,
    id=st.uuids().map(str),
    timestamp=times,
    key=few,
    conversation_id=few,
    tags=st.lists(st.sampled_from("abc"), max_size=2, unique=True).map(tuple),
    request_model=few,
    response_model=few,
    status=st.sampled_from(["ok", "ok", "error", "incomplete", "cancelled"]),
    usage=st.one_of(st.none(), st.builds(Usage, **dict.fromkeys(TOKENS, st.one_of(st.none(), st.integers(0, 2**40))))),
)
filters = st.builds(
    Filter,
    key=few,
    no_key=st.booleans(),
    tags=st.lists(st.sampled_from("ab"), max_size=2, unique=True).map(tuple),
    model=few,
    conversation_id=few,
    since=st.one_of(st.none(), times),
    until=st.one_of(st.none(), times),
)


def passes(message: Message, where: Filter) -> bool:
    return (
        (where.key is None or message.key == where.key)
        and (not where.no_key or message.key is None)
        and set(where.tags) <= set(message.tags)
        and (where.model is None or message.model == where.model)
        and (where.conversation_id is None or message.conversation_id == where.conversation_id)
        and (where.since is None or message.timestamp >= where.since)
        and (where.until is None or message.timestamp < where.until)
    )


def groups(message: Message, by: str, zone: str) -> list[tuple[str | None, str | None]]:
    local = message.timestamp.astimezone(ZoneInfo(zone))
    if by == "tag":
        return [(tag, None) for tag in message.tags] or [(None, None)]
    return {
        "key": [(message.key, None)],
        "model": [(message.model, None)],
        "conversation": [(message.conversation_id, message.key)],
        "day": [(f"{local:%Y-%m-%d}", None)],
        "month": [(f"{local:%Y-%m}", None)],
    }[by]


def summed(
    messages: list[Message], costs: dict[str, int], group: str | None = None, key: str | None = None
) -> UsageRow:
    bill = [each for each in messages if each.status in BILLABLE]
    reported = {each.id for each in messages if each.usage not in (None, Usage())}
    found = [costs[each.id] for each in messages if each.id in costs]
    return UsageRow(
        group,
        key,
        messages=len(bill),
        conversations=len({(each.key, each.conversation_id) for each in bill if each.conversation_id is not None}),
        errors=sum(each.status == "error" for each in messages),
        cancelled=sum(each.status == "cancelled" for each in messages),
        unreported=sum(each.id not in reported for each in bill),
        unpriced=len(reported - costs.keys()),
        **{name: sum(getattr(each.usage or Usage(), name) or 0 for each in messages) for name in TOKENS},
        cost_usd=sum(found) * COST_UNIT if found else None,
    )


@settings(max_examples=60 if FULL else 20, deadline=None)
@given(
    messages=st.lists(counted, max_size=15, unique_by=lambda each: each.id),
    prices=st.lists(priced, min_size=15, max_size=15),
    where=st.one_of(st.just(Filter()), filters),
    zone=st.sampled_from(ZONES),
    some=st.sets(st.sampled_from(GROUPS), min_size=3, max_size=3),
)
def test_sums(
    fresh: Fresh, messages: list[Message], prices: list[int | None], where: Filter, zone: str, some: set[str]
) -> None:
    """By any group, with any filter and in any zone, the sums are those that Python makes of the messages."""
    with fresh() as store:
        store.record(messages)
        costs = {each.id: price for each, price in zip(messages, prices, strict=False) if price is not None}
        store.set_costs([Cost(id, price * COST_UNIT, "test 1") for id, price in costs.items()])
        wanted = [each for each in messages if passes(each, where)]
        whole = store.total(where)
        assert whole == summed(wanted, costs)
        for by in GROUPS if FULL else some:
            parts: dict[tuple[str | None, str | None], list[Message]] = defaultdict(list)
            for each in wanted:
                for group in groups(each, by, zone):
                    parts[group].append(each)
            rows = store.usage(by, where, zone=zone)
            assert len({(row.group, row.key) for row in rows}) == len(rows)
            assert {(row.group, row.key): row for row in rows} == {
                group: summed(part, costs, *group) for group, part in parts.items()
            }, by
            assert store.usage_and_total(by, where, zone=zone) == (rows, whole)
            if by not in ("day", "month"):
                most, total = store.usage_and_total(by, where, zone=zone, limit=2)
                assert total == whole
                assert most == [row for row in rows if row in most]
                assert sorted(map(most_first, most)) == sorted(map(most_first, rows))[:2]
            for window in ("day", "month") if by not in ("day", "month") else ():
                cut: dict[tuple[str | None, str | None, str | None], list[Message]] = defaultdict(list)
                for each in wanted:
                    [[label, _]] = groups(each, window, zone)
                    for group in groups(each, by, zone):
                        cut[(label, *group)].append(each)
                found, total = store.usage_by_window(by, window, where, zone=zone)
                assert total == whole
                assert [label for label, _ in found] == sorted(label for label, _ in found)
                assert {(label, row.group, row.key): row for label, row in found} == {
                    group: summed(part, costs, *group[1:]) for group, part in cut.items()
                }, (by, window)
                most_of, total = store.usage_by_window(by, window, where, zone=zone, limit=3)
                assert total == whole
                assert most_of == [each for each in found if each in most_of]
                assert sorted(most_first(row) for _, row in most_of) == sorted(most_first(row) for _, row in found)[:3]


@pytest.mark.parametrize("looked_up", [sql._QUARTERS, 4])
def test_sums_of_one_customer(store: Store, monkeypatch: pytest.MonkeyPatch, looked_up: int) -> None:
    """One customer's sums are exact, in however many quarters of an hour it has messages, and whenever."""
    monkeypatch.setattr(sql, "_QUARTERS", looked_up)
    quarter = timedelta(minutes=15)
    starts = [NOON + number * quarter for number in (0, 1, 2, 50, 51, 90)] + [
        datetime(1969, 12, 31, 23, 45, tzinfo=timezone.utc)
    ]
    messages = [
        message(timestamp=start + late, key=key, usage=Usage(input_tokens=number))
        for number, start in enumerate(starts)
        for key in ("a", "b", None)
        for late in (timedelta(), quarter - timedelta(microseconds=1))
    ]
    store.record(messages)
    for owner in (Filter(key="a"), Filter(no_key=True), Filter(key="nobody")):
        for since, until in (
            (None, None),
            (NOON + quarter, None),
            (None, NOON + 51 * quarter),
            (NOON, NOON + 60 * quarter),
        ):
            where = replace(owner, since=since, until=until)
            wanted = [each for each in messages if passes(each, where)]
            assert store.total(where) == summed(wanted, {})
            assert sum(row.messages for row in store.usage("day", where)) == len(wanted)


def test_big_sums_of_costs(store: Store) -> None:
    """Costs whose sum is beyond 64 bits are added up exactly."""
    messages = [message(usage=Usage(input_tokens=1)) for _ in range(4)]
    store.record(messages)
    cost = Decimal("9000000.000000000001")
    store.set_costs([Cost(each.id, cost, "test 1") for each in messages])
    assert store.total().cost_usd == 4 * cost


def test_a_mark_leaves_out_what_came_after(store: Store) -> None:
    """Where the engine can tell: of the ledger's past are its sums, its pages and its arrivals."""
    there, late = message(usage=Usage(input_tokens=1)), message(usage=Usage(input_tokens=2))
    store.record([there])
    mark = store.mark()
    store.record([late])
    if mark is None:
        assert type(store).__name__ == "ClickHouseStore"
        return
    then = Filter(mark=mark)
    assert (store.total(then).messages, store.total(then).input_tokens, store.total().messages) == (1, 1, 2)
    assert [row.message for row in store.arrivals(START, then).rows] == [there]
    assert [row.message for row in store.messages(then).rows] == [there]


def test_costs_are_frozen(store: Store) -> None:
    """A cost that is there is never changed; one that was not known may be found later."""
    known, unknown, silent = message(usage=Usage(input_tokens=1)), message(usage=Usage(input_tokens=0)), message()
    store.record([known, unknown, silent])
    assert {each.id for each in store.unpriced("v1")} == {known.id, unknown.id}
    store.set_costs([Cost(known.id, Decimal("0.5"), "v1"), Cost(unknown.id, None, "v1")])
    assert store.unpriced("v1") == []
    for other in ("v0", "v2"):  # older and newer
        assert [each.id for each in store.unpriced(other)] == [unknown.id]
    new = message(usage=Usage(input_tokens=0))
    store.record([new])
    assert [each.id for each in store.unpriced("v1")] == [each.id for each in store.unpriced(None)] == [new.id]
    assert {each.id for each in store.unpriced("v2")} == {new.id, unknown.id}
    assert len(store.unpriced("v2", 1)) == 1
    store.set_costs([Cost(new.id, None, "v1")])

    store.set_costs([Cost(known.id, Decimal("0.7"), "v2"), Cost(unknown.id, Decimal(0), "v2")])
    store.set_costs([Cost(known.id, None, "v3")])
    stored = {row.message.id: (row.cost_usd, row.price_version) for row in store.messages().rows}
    assert stored.pop(new.id) == (None, "v1")
    assert stored == {known.id: (Decimal("0.5"), "v1"), unknown.id: (Decimal(0), "v2"), silent.id: (None, None)}
    assert store.record([known]).count("duplicate") == 1
    assert store.total().cost_usd == Decimal("0.5")


def test_health(store: Store) -> None:
    """Missing numbers, messages without a key and models without a price are named, in whatever order they came."""
    usage = Usage(input_tokens=1)
    store.record([message(writer="a", sequence=number, key="k", usage=usage, request_model="m") for number in (3, 1)])
    store.record([message(writer="b", sequence=number, call_site="app.py:7", usage=usage) for number in (2, 1)])
    health = store.health()
    assert (health.messages, health.writers) == (4, 2)
    assert health.gaps == (("a", 3, 2),)
    assert store.missing({"a": 3}) == {"a": [range(2, 3)]}
    assert health.unattributed == (("app.py:7", 2),)
    assert set(health.unpriced) == {("m", 2), ("(unknown)", 2)}

    store.record([message(writer="a", sequence=2)])
    assert store.health().gaps == ()
    assert store.missing({"a": 3}) == store.missing({"a": 0}) == {"a": []}
    assert store.missing({}) == {}


def test_numbers_as_large_as_they_come(store: Store) -> None:
    """What is missing is said of a sender that begins with any number, leaves many out, or repeats one."""
    store.record([message(writer="a", sequence=number) for number in (10**12, 5, 5, 7, 3, None)])
    assert store.health().gaps == (("a", 10**12, 6),)
    expected = [range(1, 3), range(4, 5), range(6, 7), range(8, 10**12)]
    assert store.missing({"a": 10**12}) == {"a": expected}
    assert store.missing({"a": 10**12 + 1}) == {"a": [*expected, range(10**12 + 1, 10**12 + 2)]}
    assert store.missing({"a": 6, "nobody": 2}) == {
        "a": [range(1, 3), range(4, 5), range(6, 7)],
        "nobody": [range(1, 3)],
    }


def test_budgets(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """What is used of a budget is the same on every engine, and of those who look each alert is told by one."""
    store.record(
        [
            message(key=key, tags=tags, usage=Usage(input_tokens=30, output_tokens=5))
            for key, tags in [("acme", ("a",)), ("acme", ()), ("bluepeak", ("a", "b")), (None, ())]
        ]
    )
    store.record([message(key="acme", status="error"), message(key="acme", timestamp=NOON - timedelta(days=2))])
    budgets = Budgets((
        Budget("each", "day", "*", messages=4), Budget("acme", "month", "acme", tokens=70),
        Budget("tag", "day", None, "a", messages=4), Budget("all", "day", messages=8),
    ))  # fmt: skip
    states = budget_states(store, budgets.budgets, NOON)
    assert [(state.name, state.key, state.used, state.percent) for state in states] == [
        ("each", "acme", 2, 50), ("each", "bluepeak", 1, 25), ("acme", "acme", 70, 100), ("tag", None, 2, 50),
        ("all", None, 4, 50),
    ]  # fmt: skip
    for _ in range(3):
        Alerts(store, budgets).look(states, NOON)
    assert len([each for each in caplog.records if "has reached" in each.message]) == 6
    assert len(store.records("alert")) == 6
