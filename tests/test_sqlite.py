"""The embedded ledger: what goes in comes out, each id once, and every sum is the sum."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument.errors import QueryError, SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.message import BILLABLE, Message, Usage, decode, encode, new_id
from spryng_instrument.store.base import COST_UNIT, GROUPS, Cost, Filter, UsageRow
from spryng_instrument.store.sqlite import APPLICATION_ID, SqliteStore

from .test_processes import ledger, run

ZONES = ("UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin")
NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)

text = st.text(st.characters(codec=None), max_size=12)  # lone surrogates and NUL, too
counts = st.one_of(st.none(), st.just(0), st.integers(0, 10**12))
usages = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, counts))
scalars = st.one_of(text, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
moments = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(timezone.utc))  # noqa: DTZ001
numbers = st.one_of(st.none(), st.floats(0, 1e12))
anything = st.builds(
    Message,
    id=st.uuids().map(str),
    timestamp=moments,
    operation=text,
    status=st.sampled_from(["ok", "error", "incomplete", "cancelled"]),
    tags=st.lists(text, max_size=4).map(tuple),
    properties=st.one_of(st.none(), st.dictionaries(text, scalars, max_size=3)),
    streamed=st.booleans(),
    retries=counts,
    http_status=counts,
    latency_ms=numbers,
    time_to_first_token_ms=numbers,
    usage=st.one_of(st.none(), usages),
    sequence=counts,
    **dict.fromkeys(
        [
            "key",
            "conversation_id",
            "query",
            "request_model",
            "response_model",
            "response_id",
            "request_id",
            "service_tier",
            "host",
            "error",
            "call_site",
            "writer",
        ],
        st.one_of(st.none(), text),
    ),
)


def message(**fields: Any) -> Message:
    return Message(**{"id": new_id(), "timestamp": NOON, "operation": "custom", **fields})


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "usage.db")


def fresh() -> tuple[tempfile.TemporaryDirectory[str], SqliteStore]:
    folder = tempfile.TemporaryDirectory()
    return folder, SqliteStore(Path(folder.name) / "usage.db")


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(anything, max_size=6, unique_by=lambda each: each.id))
def test_what_goes_in_comes_out(messages: list[Message]) -> None:
    """Every message comes back as it was written to the journal; None stays None and 0 stays 0."""
    folder, store = fresh()
    with folder:
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


@settings(max_examples=100, deadline=None)
@given(anything)
def test_any_text_can_be_encoded(message: Message) -> None:
    """Text that is no valid Unicode, and NUL, is escaped, and the line is read again; other text is unchanged."""
    line = encode(message)
    assert b"\n" not in line
    again = decode(line)
    for name in ("key", "query", "tags"):
        value = getattr(message, name)
        assert "\0" not in "".join(getattr(again, name) or ())
        if not any("\ud800" <= char <= "\udfff" or char == "\0" for char in "".join(value or ())):
            assert getattr(again, name) == value


def test_duplicates_and_conflicts_within_a_batch(store: SqliteStore) -> None:
    """In one batch, too, the first message of an id is kept; the same again is a duplicate, another a conflict."""
    first, other = message(key="a"), message(key="b")
    conflicting = message(id=first.id, key="c")
    receipt = store.record([first, first, conflicting, other])
    assert receipt.outcomes == ("recorded", "duplicate", "conflict", "recorded")
    receipt = store.record([conflicting, other])
    assert receipt.outcomes == ("conflict", "duplicate")
    assert {row.message for row in store.messages().rows} == {first, other}


def test_all_or_none(store: SqliteStore) -> None:
    """A batch with a message that cannot be stored leaves nothing behind."""
    with pytest.raises(OverflowError):
        store.record([message(writer="w", sequence=1), message(usage=Usage(input_tokens=2**63))])
    assert store.messages().rows == []
    assert store.health().writers == 0


def test_many_in_one_batch(store: SqliteStore) -> None:
    """A batch of any size is recorded, though a statement takes so many values only."""
    messages = [message(writer="w", sequence=number) for number in range(1, 1202)]
    assert store.record(messages).count("recorded") == 1201
    assert store.health().gaps == ()


@settings(max_examples=30, deadline=None)
@given(seconds=st.lists(st.integers(0, 3), max_size=25), limit=st.integers(1, 7))
def test_pages(seconds: list[int], limit: int) -> None:
    """Paging visits each message once, newest first, though many share their time and others are recorded meanwhile."""
    folder, store = fresh()
    with folder:
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


def test_arrivals_miss_nothing(store: SqliteStore) -> None:
    """Messages in the order of their arrival: one that comes late, with an old time, is seen, too."""
    store.record([message() for _ in range(3)])
    page = store.arrivals()
    assert len(page.rows) == 3
    late = [message(timestamp=NOON - timedelta(days=number)) for number in range(5)]
    store.record(late)
    seen: list[str] = []
    for _ in range(4):
        page = store.arrivals(page.next, limit=2)
        seen += [row.message.id for row in page.rows]
    assert seen == [each.id for each in late]


@pytest.mark.parametrize("after", ["", "x", "1", "1_", "_x", "1_a b", "9" * 30 + "_x"])
def test_mark_that_is_none(store: SqliteStore, after: str) -> None:
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


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(counted, max_size=15, unique_by=lambda each: each.id),
    prices=st.lists(priced, min_size=15, max_size=15),
    where=st.one_of(st.just(Filter()), filters),
    zone=st.sampled_from(ZONES),
)
def test_sums(messages: list[Message], prices: list[int | None], where: Filter, zone: str) -> None:
    """By every group, with every filter and in every zone, the sums are those that Python makes of the messages."""
    folder, store = fresh()
    with folder:
        store.record(messages)
        costs = {each.id: price for each, price in zip(messages, prices, strict=False) if price is not None}
        store.set_costs([Cost(id, price * COST_UNIT, "test 1") for id, price in costs.items()])
        wanted = [each for each in messages if passes(each, where)]
        assert store.total(where) == summed(wanted, costs)
        for by in GROUPS:
            parts: dict[tuple[str | None, str | None], list[Message]] = defaultdict(list)
            for each in wanted:
                for group in groups(each, by, zone):
                    parts[group].append(each)
            rows = store.usage(by, where, zone=zone)
            assert len({(row.group, row.key) for row in rows}) == len(rows)
            assert {(row.group, row.key): row for row in rows} == {
                group: summed(part, costs, *group) for group, part in parts.items()
            }, by
            assert store.usage_and_total(by, where, zone=zone) == (rows, store.total(where))


def test_big_sums_of_costs(store: SqliteStore) -> None:
    """Costs whose sum is beyond 64 bits are added up exactly."""
    messages = [message(usage=Usage(input_tokens=1)) for _ in range(4)]
    store.record(messages)
    cost = Decimal("9000000.000000000001")
    store.set_costs([Cost(each.id, cost, "test 1") for each in messages])
    assert store.total().cost_usd == 4 * cost


def test_costs_are_frozen(store: SqliteStore) -> None:
    """A cost that is there is never changed; one that was not known may be found later."""
    known, unknown, silent = message(usage=Usage(input_tokens=1)), message(usage=Usage(input_tokens=0)), message()
    store.record([known, unknown, silent])
    assert {each.id for each in store.unpriced("v1")} == {known.id, unknown.id}
    store.set_costs([Cost(known.id, Decimal("0.5"), "v1"), Cost(unknown.id, None, "v1")])
    assert store.unpriced("v1") == []
    assert [each.id for each in store.unpriced("v2")] == [unknown.id]

    store.set_costs([Cost(known.id, Decimal("0.7"), "v2"), Cost(unknown.id, Decimal(0), "v2")])
    store.set_costs([Cost(known.id, None, "v3")])
    stored = {row.message.id: (row.cost_usd, row.price_version) for row in store.messages().rows}
    assert stored == {known.id: (Decimal("0.5"), "v1"), unknown.id: (Decimal(0), "v2"), silent.id: (None, None)}
    assert store.record([known]).count("duplicate") == 1
    assert store.total().cost_usd == Decimal("0.5")


# --- health, files, other processes


def test_health(store: SqliteStore) -> None:
    """Missing numbers, messages without a key and models without a price are named, in whatever order they came."""
    usage = Usage(input_tokens=1)
    store.record([message(writer="a", sequence=number, key="k", usage=usage, request_model="m") for number in (3, 1)])
    store.record([message(writer="b", sequence=number, call_site="app.py:7", usage=usage) for number in (2, 1)])
    health = store.health()
    assert (health.messages, health.writers) == (4, 2)
    assert health.gaps == (("a", 3, 2),)
    assert store.missing("a", 3) == [2]
    assert health.unattributed == (("app.py:7", 2),)
    assert set(health.unpriced) == {("m", 2), ("(unknown)", 2)}

    store.record([message(writer="a", sequence=2)])
    assert store.health().gaps == ()


@pytest.mark.parametrize("create", [True, False])
def test_newer_schema(store: SqliteStore, create: bool) -> None:
    """A ledger of a newer version is refused, for writing and for reading, with what to do; it is left as it is."""
    store.record([message()])
    db = sqlite3.connect(store.path, isolation_level=None)
    [version] = db.execute("PRAGMA user_version").fetchone()
    db.execute(f"PRAGMA user_version = {version + 1}")
    db.close()
    before = store.path.read_bytes()
    other = SqliteStore(store.path, create=create)
    with pytest.raises(
        SchemaTooNewError, match=rf"has schema {version + 1}, .* knows {version}\. Upgrade it: pip inst"
    ):
        other.record([message()]) if create else other.total()
    assert store.path.read_bytes() == before


def test_ledger_is_marked(store: SqliteStore) -> None:
    """The file says whose it is, in its header; another application's mark is respected."""
    store.record([])
    assert store.path.read_bytes()[68:72] == APPLICATION_ID.to_bytes(4, "big")
    store.path.unlink()
    db = sqlite3.connect(store.path)
    db.execute("PRAGMA application_id = 7")
    db.execute("VACUUM")
    db.close()
    before = store.path.read_bytes()
    with pytest.raises(StoreNotOursError, match="something else"):
        store.record([message()])
    assert store.path.read_bytes() == before
    assert [path.name for path in store.path.parent.iterdir()] == ["usage.db"]


def test_reading_makes_nothing(tmp_path: Path) -> None:
    """A report on a ledger that is not there says so and what to try, and makes no file."""
    with pytest.raises(StoreError, match=r"there is no ledger at .*spryng demo"):
        SqliteStore(tmp_path / "folder" / "usage.db", create=False).total()
    assert list(tmp_path.iterdir()) == []


def test_locked_is_waited_for(store: SqliteStore) -> None:
    """A ledger that is free again within the time takes the batch; one that is not is busy, after that time."""
    store.record([])
    db = sqlite3.connect(store.path, isolation_level=None, check_same_thread=False)
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError, match=r"stayed locked for 0\.[3-9] s"):
        store.record([message()], timeout_s=0.3)
    timer = threading.Timer(0.5, db.close)
    timer.start()
    assert store.record([message()], timeout_s=10).count("recorded") == 1
    timer.join()


@pytest.fixture
def durable(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The settings of every connection that a transaction ran on."""
    seen: list[str] = []
    stored = SqliteStore._stored

    def looks(self: SqliteStore, ask: Any, ids: Any) -> Any:
        seen.extend(str(ask(f"PRAGMA {name}", [])[0][0]) for name in ("journal_mode", "synchronous"))
        return stored(self, ask, ids)

    monkeypatch.setattr(SqliteStore, "_stored", looks)
    return seen


def test_acknowledged_is_on_the_disk(store: SqliteStore, durable: list[str]) -> None:
    """Each transaction runs with synchronous=FULL on a write-ahead log."""
    store.record([message()])
    store.record([message()])
    assert durable == ["wal", "2", "wal", "2"]


def test_made_by_many_threads_at_once(tmp_path: Path) -> None:
    """Threads that make one new ledger at the same moment lose nothing, and none fails."""
    for number in range(10):
        store = SqliteStore(tmp_path / str(number) / "usage.db")
        barrier, failed = threading.Barrier(4), []

        def records(store: SqliteStore = store, barrier: Any = barrier, failed: list[Any] = failed) -> None:
            barrier.wait()
            try:
                store.record([message()], timeout_s=20)
            except BaseException as exc:
                failed.append(exc)

        threads = [threading.Thread(target=records) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert len(store.messages().rows) == 4


def test_made_by_many_processes_at_once(tmp_path: Path) -> None:
    """Processes that make one new ledger at the same moment lose nothing, and none fails."""
    told = run("create_many", tmp_path, processes=4, rounds=15)
    assert told["ended"] == [True] * 60
    assert [len(ledger(tmp_path / str(number))) for number in range(15)] == [4] * 15


def test_concurrent_writers(tmp_path: Path) -> None:
    """Four processes record 500 messages each into one ledger: all are there, once, and no number is missing."""
    told = run("record_many", tmp_path, processes=4, messages=500)
    assert told["ended"] == [True] * 4
    assert len({each.id for each in ledger(tmp_path)}) == 2000
    health = SqliteStore(tmp_path / "usage.db").health()
    assert (health.messages, health.writers, health.gaps) == (2000, 4, ())
