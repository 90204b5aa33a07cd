"""What bills stand on, on every engine: documents that are appended once, and a meter of what there is to bill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument.errors import QueryError, StoreError
from spryng_instrument.message import BILLABLE, Message, Usage
from spryng_instrument.store.base import COST_UNIT, Cost, Filter, Record, Store, UsageRow, pages_of
from spryng_instrument.store.clickhouse import ClickHouseStore

from .messages import NOON, message
from .test_conformance import ENGINES, Fresh
from .test_processes import FULL

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module", params=ENGINES)
def fresh(request: pytest.FixtureRequest) -> Iterator[Fresh]:
    with ENGINES[request.param]() as fresh:
        yield fresh


@pytest.fixture
def store(fresh: Fresh) -> Iterator[Store]:
    with fresh() as store:
        yield store


def record(id: str, kind: str = "note", **fields: Any) -> Record:
    return Record(id, kind, fields.pop("created", NOON), fields.pop("body", {}), **fields)


def void(message: Message) -> Record:
    return record(f"void:{message.id}", "void", key=message.key, subject=message.id, body={"reason": "a test"})


def test_documents(store: Store) -> None:
    """A document comes back as it was appended, in that order, by its kind, customer, subject and id, which is there
    once."""
    first = record("n:1", key="acme", subject="s", body={"text": "ü\u2028", "list": [1, None, {"a": "0.10"}]})
    others = [record("n:2", created=NOON + MINUTE), record("o:1", "other", created=NOON + 2 * MINUTE)]
    for each in (first, *others):
        assert store.append([each])
    assert not store.append([record("n:1", body={"text": "another"})])
    assert store.records("note") == [first, others[0]]
    assert store.records("note", key="acme") == store.records("note", subject="s") == [first]
    assert store.records(id="n:1") == store.records("note", id="n:1") == [first]
    assert store.records("other", key="acme") == store.records("nothing") == store.records("other", id="n:1") == []


@settings(max_examples=30 if FULL else 8, deadline=None)
@given(keys=st.lists(st.sampled_from(["acme", "bluepeak"]), max_size=9), limit=st.integers(1, 4))
def test_pages_of_documents(fresh: Fresh, keys: list[str], limit: int) -> None:
    """Paging visits each document of a kind once, the last one first, though others are appended meanwhile."""
    with fresh() as store:
        every = [record(f"n:{n}", key=key, created=NOON + n // 2 * MINUTE) for n, key in enumerate(keys)]
        for each in every:
            store.append([each])
            store.append([record(f"o:{each.id}", "other", key=each.key, created=each.created)])
        for key in ("acme", None):
            found: list[Record] = []
            for rows in pages_of(lambda after, key=key: store.last_records("note", key=key, after=after, limit=limit)):
                assert len(rows) <= limit
                found += rows
                store.append([record(f"n:{key}:{len(found)}", key="bluepeak", created=NOON + 99 * MINUTE)])
            assert [each for each in found if each in every] == [
                each for each in reversed(every) if key in (None, each.key)
            ]
            assert len({each.id for each in found}) == len(found)


def test_a_mark_of_no_page(store: Store) -> None:
    """Is refused, whatever it looks like."""
    for after in ("", "x", "1_", "_1", "9" * 19, "1_2_3" if not isinstance(store, ClickHouseStore) else "1"):
        with pytest.raises(QueryError, match="is no mark of a page"):
            store.last_records("note", after=after)


def test_documents_are_appended_together_or_not_at_all(store: Store) -> None:
    """If the id of one is there, none is appended. An engine without transactions says that it has none."""
    assert store.append([record("n:1")])
    if isinstance(store, ClickHouseStore):
        with pytest.raises(StoreError, match="no transactions"):
            store.append([record("n:2"), record("n:1")])
    else:
        assert not store.append([record("n:2"), record("n:1")])
        assert store.append([record("n:2"), record("n:3")])
    assert store.append([record("n:4")])


def test_one_of_many_appends_a_document(store: Store) -> None:
    """Of those who append the same id at the same moment, one has done it; in ClickHouse, one document is kept."""
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda who: store.append([record("n:1", body={"who": who})]), range(8)))
    [kept] = store.records("note")
    if not isinstance(store, ClickHouseStore):
        assert sum(done) == 1
        assert kept.body == {"who": done.index(True)}


moments = st.integers(-40, 40).map(lambda minutes: NOON + minutes * MINUTE + timedelta(seconds=minutes % 7))
names = st.sampled_from([None, "", "acme", "bluepeak"])
counts = st.none() | st.integers(0, 1_000)
messages = st.builds(
    message,
    timestamp=moments,
    status=st.sampled_from(["ok", "ok", "incomplete", "error", "cancelled"]),
    key=names,
    conversation_id=st.sampled_from([None, "c-1", "c-2"]),
    response_model=st.sampled_from([None, "m-1", "m-2"]),
    tags=st.sampled_from([(), ("a",), ("a", "b")]),
    usage=st.none() | st.builds(Usage, input_tokens=counts, output_tokens=counts, cached_tokens=counts),
)


def expected(messages: list[Message], costs: dict[str, Decimal], since: datetime | None) -> Any:
    """What the meter must say, by Python's own sums."""
    rows: dict[Any, Counter[str]] = {}
    costed: dict[Any, Decimal] = {}
    began: dict[Any, datetime] = {}
    for each in messages:
        if each.status in BILLABLE and each.conversation_id is not None:
            name = (each.key, each.conversation_id)
            began[name] = min(each.timestamp, began.get(name, each.timestamp))
        if each.status not in BILLABLE or (since is not None and each.timestamp < since):
            continue
        group = (each.key, each.model)
        row = rows.setdefault(group, Counter())
        reported = each.usage is not None and each.usage != Usage()
        row["messages"] += 1
        row["unreported"] += not reported
        row["unpriced"] += reported and each.id not in costs
        for name in ("input_tokens", "cached_tokens", "output_tokens"):
            row[name] += (each.usage and getattr(each.usage, name)) or 0
        if each.id in costs:
            costed[group] = costed.get(group, Decimal(0)) + costs[each.id]
    conversations = Counter(key for (key, _), first in began.items() if since is None or first >= since)
    table = {group: (dict(+row), costed.get(group, 0)) for group, row in rows.items() if +row}
    return table, dict(conversations)


def metered(store: Store, where: Filter) -> Any:
    meter = store.meter(where)
    rows = {}
    for row in meter.rows:
        found = {name: getattr(row, name) for name in UsageRow.__dataclass_fields__ if name not in NAMES}
        if any(found.values()):
            rows[row.key, row.group] = ({name: count for name, count in found.items() if count}, row.cost_usd or 0)
    return rows, meter.conversations


NAMES = ("group", "key", "cost_usd", "conversations")


@settings(max_examples=80 if FULL else 15, deadline=None)
@given(st.lists(messages, max_size=12), st.data())
def test_the_meter_counts_what_there_is_to_bill(fresh: Fresh, sent: list[Message], data: st.DataObject) -> None:
    """Its sums are those of the messages that did not fail and are not void, from any moment on and up to any other; a
    conversation counts where its first message is. So the parts of any split add up to the whole."""
    voided = data.draw(st.lists(st.sampled_from(sent), unique_by=lambda each: each.id)) if sent else []
    priced = data.draw(st.lists(st.sampled_from(sent), unique_by=lambda each: each.id)) if sent else []
    split = data.draw(moments)
    costs = {each.id: Decimal(number + 1) * COST_UNIT * 12_345_678 for number, each in enumerate(priced)}
    with fresh() as store:
        store.record(sent)
        store.set_costs([Cost(id, cost, "v1") for id, cost in costs.items()])
        for each in voided:
            assert store.append([void(each)])
        left = [each for each in sent if each not in voided]
        before = [each for each in left if each.timestamp < split]
        assert metered(store, Filter()) == expected(left, costs, None)
        assert metered(store, Filter(until=split)) == expected(before, costs, None)
        assert metered(store, Filter(since=split)) == expected(left, costs, split)
        mine = [each for each in left if each.key == "acme"]
        assert metered(store, Filter(key="acme", since=split)) == expected(mine, costs, split)
        void_row = store.voided()
        assert void_row.messages == sum(each.status in BILLABLE for each in voided)
        assert store.total().messages == sum(each.status in BILLABLE for each in sent)


def test_costs_are_replaced(store: Store) -> None:
    """A new price changes sums and pages, and is the one that stays; what it was before can be asked for."""
    one, other, unknown = (message(key="acme", usage=Usage(input_tokens=1)) for _ in range(3))
    store.record([one, other, unknown])
    store.set_costs([Cost(one.id, Decimal("0.25"), "v1"), Cost(other.id, Decimal(2), "v1")])
    before = datetime.now(timezone.utc)
    store.reprice(
        [Cost(one.id, Decimal("0.125"), "v2"), Cost(unknown.id, Decimal(3), "v2"), Cost(other.id, None, "v2")]
    )
    store.set_costs([Cost(one.id, Decimal(9), "v3")])
    assert store.total().cost_usd == Decimal("5.125")
    assert store.total().unpriced == 0
    rows = {row.message.id: (row.cost_usd, row.price_version) for row in store.messages().rows}
    assert rows == {
        one.id: (Decimal("0.125"), "v2"),
        other.id: (Decimal(2), "v1"),
        unknown.id: (Decimal(3), "v2"),
    }
    ids = [one.id, other.id, unknown.id]
    assert store.costs_before(ids, before) == {one.id: Decimal("0.25"), unknown.id: None}
    store.reprice([Cost(one.id, Decimal(7), "v4")])
    assert store.costs_before(ids, before)[one.id] == Decimal("0.25")
    assert store.costs_before(ids, datetime.now(timezone.utc)) == {}
    assert store.total().cost_usd == 12


def test_a_cost_that_was_not_known_then(store: Store) -> None:
    """What a message cost before its first cost was found is unknown, not that cost."""
    known, found, looked_at, none = (message(key="acme", usage=Usage(input_tokens=1)) for _ in range(4))
    store.record([known, found, looked_at, none])
    store.set_costs([Cost(known.id, Decimal(1), "v1"), Cost(looked_at.id, None, "v1")])
    before = datetime.now(timezone.utc)
    store.set_costs([Cost(each.id, Decimal(2), "v2") for each in (known, found, looked_at)])
    store.set_costs([Cost(none.id, None, "v2")])
    ids = [known.id, found.id, looked_at.id, none.id]
    assert store.costs_before(ids, before) == {found.id: None, looked_at.id: None}
    assert store.costs_before(ids, datetime.now(timezone.utc)) == {}
    if not isinstance(store, ClickHouseStore):  # which closes no bills
        store.reprice([Cost(found.id, Decimal(3), "v3")])
        assert store.costs_before(ids, before) == {found.id: None, looked_at.id: None}


def test_new_costs_come_with_what_says_so(store: Store) -> None:
    """Where the engine has transactions, both are there or neither is."""
    one = message(key="acme", usage=Usage(input_tokens=1))
    store.record([one])
    store.set_costs([Cost(one.id, Decimal(1), "v1")])
    before = datetime.now(timezone.utc)
    store.reprice([Cost(one.id, Decimal(2), "v2")], record("r:1", "repricing"))
    assert (store.total().cost_usd, store.records("repricing")) == (2, [record("r:1", "repricing")])
    if not isinstance(store, ClickHouseStore):
        with pytest.raises(Exception, match=r"(?i)unique"):
            store.reprice([Cost(one.id, Decimal(3), "v3")], record("r:1", "repricing"))
        assert store.total().cost_usd == 2
        assert store.costs_before([one.id], before) == {one.id: 1}


def test_costs_of_one_message_given_together(store: Store) -> None:
    """The first that is known is frozen; of new prices the last one holds; and sums are those of the messages."""
    one, other = (message(key="acme", usage=Usage(input_tokens=1)) for _ in range(2))
    store.record([one, other])
    store.set_costs([Cost(one.id, Decimal(1), "a"), Cost(one.id, Decimal(2), "b")])
    store.set_costs([Cost(other.id, None, "a"), Cost(other.id, Decimal(3), "b"), Cost(other.id, Decimal(4), "c")])
    before = datetime.now(timezone.utc)
    assert {row.message.id: row.cost_usd for row in store.messages().rows} == {one.id: 1, other.id: 3}
    assert store.total().cost_usd == 4
    store.reprice([Cost(one.id, Decimal(5), "d"), Cost(one.id, Decimal(6), "e")])
    assert {row.message.id: row.cost_usd for row in store.messages().rows} == {one.id: 6, other.id: 3}
    assert store.total().cost_usd == 9
    assert store.costs_before([one.id], before) == {one.id: 1}


def test_a_mark_is_a_moment(store: Store) -> None:
    """What is recorded after a meter was read is not among the messages of its mark, however early its time."""
    early = [message(key="acme") for _ in range(3)]
    store.record(early)
    meter = store.meter()
    late = message(key="acme", timestamp=NOON - MINUTE)
    store.record([late])
    if isinstance(store, ClickHouseStore):
        assert meter.mark is None
        return
    assert {row.message for row in store.messages(Filter(mark=meter.mark)).rows} == set(early)
    assert store.total(Filter(mark=meter.mark)).messages == 3
    assert store.usage("key", Filter(mark=meter.mark))[0].messages == 3
    assert store.total(replace(Filter(), mark=store.meter().mark)).messages == 4
