"""What only ClickHouse has to promise: an id that was written twice is one message, whatever was broken meanwhile.

Every test runs the store against the real engine, over HTTP, in a process of its own. What all engines promise is in
the conformance suite.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument.billing.behind import behind
from spryng_instrument.billing.bills import Desk, invoices
from spryng_instrument.billing.plans import parse
from spryng_instrument.copying import copy
from spryng_instrument.errors import BillError, SchemaTooNewError, SettingsError, StoreError, StoreNotOursError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store import open_store
from spryng_instrument.store.base import START, ApiKey, Cost, Filter
from spryng_instrument.store.clickhouse import _SETTINGS, ClickHouseStore, ddl
from spryng_instrument.store.rows import ADDED, COLUMNS
from spryng_instrument.store.sqlite import SqliteStore

from .clickhouse_server import ClickHouse, clickhouse
from .messages import NOON, message

MANY = ", ".join(COLUMNS)


@pytest.fixture
def url() -> Iterator[str]:
    with clickhouse().database() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[ClickHouseStore]:
    store = ClickHouseStore(url)
    store.record([], timeout_s=60)  # makes the tables
    yield store
    store.close()


def ask(url: str, query: str) -> str:
    return clickhouse().ask(query, url.rpartition("/")[2])


def write_again(url: str, **changed: str) -> None:
    """Every row once more, with other values: what a second writer of the same moment does."""
    selected = ", ".join(f"{changed.get(name, name)} AS {name}" for name in COLUMNS)
    ask(
        url,
        f"INSERT INTO messages ({MANY}) SELECT {selected} FROM messages FINAL SETTINGS prefer_column_name_to_alias=1",
    )


# --- one id, many rows


@pytest.mark.parametrize("id", [new_id(), "my own id", "0199"], ids=["ours", "theirs", "short"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_id_counts_once(store: ClickHouseStore, url: str, id: str, merged: bool) -> None:
    """Rows with one id are one message, the first, in every question; even if key, tags and month differ."""
    first = message(
        id=id, key="a", conversation_id="c", tags=("x",), usage=Usage(input_tokens=5), writer="w", sequence=1
    )
    store.record([first])
    month = 31 * 86_400_000_000
    write_again(url, key="'b'", timestamp_us=f"timestamp_us + {month}", tags="['y']", input_tokens="7", sequence="9")
    write_again(url)
    if merged:
        ask(url, "OPTIMIZE TABLE messages FINAL")
    assert int(ask(url, "SELECT count() FROM messages")) == (1 if merged else 3)

    assert [row.message for row in store.messages().rows] == [first]
    assert store.total().input_tokens == 5
    for by, group in (("key", "a"), ("tag", "x"), ("month", "2026-03"), ("conversation", "c")):
        rows, total = store.usage_and_total(by)
        assert [(row.group, row.messages, row.input_tokens) for row in rows] == [(group, 1, 5)]
        assert total == store.total()
    assert store.total(Filter(since=NOON + timedelta(days=1))).messages == 0  # the other row's time
    assert store.total(Filter(key="b")).messages == store.total(Filter(tags=("y",))).messages == 0
    assert store.health().messages == 1
    assert store.health().gaps == ()
    assert store.record([first]).outcomes == ("duplicate",)


def test_written_again_after_its_cost(store: ClickHouseStore, url: str) -> None:
    """A row that comes late, from a delivery that was thought lost, takes no cost away; nor does a later price."""
    known, unknown = message(usage=Usage(input_tokens=1)), message(usage=Usage(input_tokens=2))
    store.record([known, unknown])
    store.set_costs([Cost(known.id, Decimal("0.5"), "v1"), Cost(unknown.id, None, "v1")])
    for _ in range(2):
        write_again(url)
        store.set_costs([Cost(known.id, Decimal("0.7"), "v2"), Cost(known.id, None, "v3")])
        assert store.total().cost_usd == Decimal("0.5")
        assert store.unpriced("v1") == []
        assert [each.id for each in store.unpriced("v2")] == [unknown.id]
        ask(url, "OPTIMIZE TABLE messages FINAL")
    assert {row.message.id for row in store.arrivals(START).rows} == {known.id, unknown.id}


def test_what_is_priced_is_not_read_again(store: ClickHouseStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all is priced, looking for what has no cost yet reads what was recorded since, not the whole ledger."""
    ask(
        url,
        "INSERT INTO messages (id, timestamp_us, operation, status, input_tokens, cost_pusd, price_version, "
        "recorded_us) SELECT generateUUIDv7(), number, 'chat.completions', 'ok', 1, 1, 'v1', number FROM "
        "numbers(100000)",
    )
    assert store.unpriced(None) == []
    new = message(usage=Usage(input_tokens=1))
    store.record([new])
    store.close()
    monkeypatch.setitem(_SETTINGS, "max_rows_to_read", 50_000)
    assert store.unpriced(None) == [new]
    with closing(ClickHouseStore(url)) as other, pytest.raises(StoreError, match="TOO_MANY_ROWS"):
        other.unpriced(None)


def test_nothing_without_a_cost_is_passed_over(
    store: ClickHouseStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found and not priced, or more than one look finds: it is found again, also after a later one was priced."""
    monkeypatch.setattr(ClickHouseStore, "settle_s", 0.0)
    messages = [message(usage=Usage(input_tokens=number)) for number in range(5)]
    for each in messages:
        store.record([each])

    def found(limit: int = 1_000) -> set[str]:
        return {each.id for each in store.unpriced(None, limit)}

    assert len(found(3)) == 3
    assert found() == {each.id for each in messages}
    store.set_costs([Cost(each.id, Decimal(1), "v1") for each in messages[1:4]])
    store.set_costs([Cost(messages[4].id, None, "v1")])
    write_again(url)
    assert found() == {messages[0].id}
    assert {each.id for each in store.unpriced("v2")} == {messages[0].id, messages[4].id}
    late = message(usage=Usage(input_tokens=9), timestamp=NOON - timedelta(days=900))
    store.record([late])
    assert found() == {messages[0].id, late.id}
    store.set_costs([Cost(messages[0].id, Decimal(1), "v1"), Cost(late.id, Decimal(1), "v1")])
    assert found() == set()


def test_many_costs(store: ClickHouseStore) -> None:
    """As many costs as one look finds are frozen at once, each its message's own."""
    messages = [message(usage=Usage(input_tokens=number)) for number in range(1500)]
    store.record(messages)
    costs = {each.id: Decimal(number) / 1000 for number, each in enumerate(messages)}
    store.set_costs([Cost(id, cost, "v1") for id, cost in costs.items()])
    assert {row.message.id: row.cost_usd for row in store.messages(limit=2000).rows} == costs


def test_writers_of_the_same_moment(url: str) -> None:
    """Threads with stores of their own that record the same messages at once: each message is there once."""
    messages = [message(writer="w", sequence=number) for number in range(1, 51)]
    barrier, failed = threading.Barrier(4), []

    def records() -> None:
        store = ClickHouseStore(url)
        barrier.wait()
        try:
            for start in range(0, 50, 10):
                store.record(messages[start : start + 10], timeout_s=30)
        except BaseException as exc:
            failed.append(exc)
        store.close()

    threads = [threading.Thread(target=records) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    store = ClickHouseStore(url)
    assert store.total().messages == len(store.messages(limit=1000).rows) == store.health().messages == 50
    store.close()


@pytest.mark.parametrize("lost", [1, 2])
def test_answers_that_are_lost(store: ClickHouseStore, url: str, lost: int) -> None:
    """The server wrote, and the connection broke before it said so: delivered again, each message is there once."""
    messages = [message() for _ in range(5)]
    store.record([])
    clickhouse().lose(lost)
    if lost == 1:  # the client itself tries twice
        assert store.record(messages).count("recorded") == 5
        assert int(ask(url, "SELECT count() FROM messages")) in (5, 10)
    else:
        with pytest.raises(StoreError):
            store.record(messages)
        assert store.record(messages).count("duplicate") == 5
    assert store.total().messages == 5


def test_killed_after_it_answered() -> None:
    """What was acknowledged is there after kill -9 and a restart; the store finds the server again by itself."""
    server = ClickHouse()
    store = ClickHouseStore(f"clickhouse://127.0.0.1:{server.port}/default")
    messages = [message() for _ in range(3)]
    for number in range(3):
        store.record(messages[number : number + 1], timeout_s=100)
        server.kill()
        with pytest.raises(StoreError, match="Messages wait in the journal"):
            store.total()
        server.start()
        assert store.total().messages == number + 1
    assert store.record(messages).count("duplicate") == 3
    store.close()
    server.stop()


def test_acknowledged_is_on_the_disk(store: ClickHouseStore, url: str) -> None:
    """An insert is synced before it is answered."""
    store.record([message()])
    made = ask(url, "SHOW CREATE TABLE messages")
    assert "fsync_after_insert = 1" in made
    assert "fsync_part_directory = 1" in made


# --- one moment


def test_usage_and_total_are_of_one_moment(store: ClickHouseStore, url: str) -> None:
    """While messages of ever new days and keys are recorded, every total is the sum of the rows beside it."""
    done = threading.Event()

    def records() -> None:
        other = ClickHouseStore(url)
        number = 0
        while not done.is_set():
            number += 1
            other.record(
                [message(key=f"k{number}", timestamp=NOON + timedelta(days=number % 700), tags=("a", "b"))],
                timeout_s=60,
            )
        other.close()

    store.record([])
    thread = threading.Thread(target=records)
    thread.start()
    try:
        for _ in range(15):
            for by in ("key", "day", "tag"):
                rows, total = store.usage_and_total(by)
                assert sum(row.messages for row in rows) == total.messages * (2 if by == "tag" else 1)
    finally:
        done.set()
        thread.join()


def test_arrivals_while_others_record(store: ClickHouseStore, url: str) -> None:
    """A reader that follows two writers sees each message exactly once."""
    batches = [[message() for _ in range(3)] for _ in range(20)]
    store.record([])

    def records(mine: list[list[Message]]) -> None:
        other = ClickHouseStore(url)
        for batch in mine:
            other.record(batch, timeout_s=30)
        other.close()

    threads = [threading.Thread(target=records, args=(batches[number::2],)) for number in range(2)]
    for thread in threads:
        thread.start()
    seen: list[str] = []
    after: str | None = START
    while any(thread.is_alive() for thread in threads):
        page = store.arrivals(after, limit=7)
        seen += [row.message.id for row in page.rows]
        after = page.next
    while (page := store.arrivals(after, limit=7)).rows:
        seen += [row.message.id for row in page.rows]
        after = page.next
    assert sorted(seen) == sorted(each.id for batch in batches for each in batch)


# --- values

odd = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@pytest.fixture(scope="module")
def shared() -> Iterator[ClickHouseStore]:
    with clickhouse().database() as url:
        store = ClickHouseStore(url)
        yield store
        store.close()


@settings(max_examples=40, deadline=None)
@given(text=odd, id=odd)
@example(text="' OR 1=1 --", id="{p0:String}")
@example(text="\t\n\r\b\f\\ \\N \\t '\"`?", id="\\'")
@example(text="\r\n--boundary", id="?")
@example(text="\\N", id="NULL")
@example(text="", id="")
def test_any_text_is_found_again(shared: ClickHouseStore, text: str, id: str) -> None:
    """A text that is asked for is sent beside the statement, and means itself, whatever is in it."""
    each = message(id=f"{new_id()}{id}", key=text, conversation_id=text, tags=(text,), request_model=text, writer=text)
    each = Message(**{**{name: getattr(each, name) for name in each.__struct_fields__}, "usage": Usage(input_tokens=1)})
    assert shared.record([each]).outcomes == ("recorded",)
    assert shared.found([each.id]) == {each.id: each}
    for where in (Filter(key=text), Filter(tags=(text,)), Filter(model=text), Filter(conversation_id=text)):
        assert each in [row.message for row in shared.messages(where, limit=1000).rows]
        assert {row.group for row in shared.usage("key", where)} == {text}
    shared.set_costs([Cost(each.id, Decimal(1), text)])
    [stored] = [row for row in shared.messages(Filter(key=text), limit=1000).rows if row.message == each]
    assert (stored.cost_usd, stored.price_version) == (1, text)


def test_sums_do_not_wrap(store: ClickHouseStore) -> None:
    """Tokens whose sum is beyond 64 bits are added up exactly, alone and by group."""
    store.record([message(key="k", usage=Usage(input_tokens=2**63 - 1)) for _ in range(5)])
    rows, total = store.usage_and_total("key")
    assert rows[0].input_tokens == total.input_tokens == store.total().input_tokens == 5 * (2**63 - 1)


def test_days_long_ago_and_far_ahead(store: ClickHouseStore) -> None:
    """Times before 1970 and after 2106 are kept, found, and fall into their days, to the microsecond."""
    days = ["1901-01-01", "1969-12-31", "1970-01-01", "2199-12-31"]
    times = [f"{day}T{time}+00:00" for day in days for time in ("00:00:00", "23:59:59.999999")]
    store.record([message(timestamp=datetime.fromisoformat(time)) for time in times])
    assert [(row.group, row.messages) for row in store.usage("day")] == [(day, 2) for day in days]
    assert [row.group for row in store.usage("day", zone="Asia/Kolkata")][-2:] == ["2199-12-31", "2200-01-01"]
    assert store.total(Filter(until=datetime(1970, 1, 1, tzinfo=timezone.utc))).messages == 4


def test_conversations(store: ClickHouseStore) -> None:
    """Paging visits each customer's conversation once, the one that began last first; also those without a key."""
    keys, ids = [None, "", "a", "b'"], ["c", "", "1-"]
    made = [
        message(key=key, conversation_id=id, timestamp=NOON + timedelta(seconds=second))
        for number, (key, id) in enumerate((key, id) for key in keys for id in ids)
        for second in (number // 5, number // 5 + 60)
    ]
    store.record(made)
    seen = []
    after = None
    while True:
        page = store.conversations(after=after, limit=5)
        seen += page.rows
        after = page.next
        if after is None:
            break
    assert len(seen) == len({(each.usage.key, each.usage.group) for each in seen}) == store.total().conversations == 12
    assert all(each.usage.messages == 2 and each.last - each.first == timedelta(minutes=1) for each in seen)
    assert [each.first for each in seen] == sorted((each.first for each in seen), reverse=True)


def test_api_keys(store: ClickHouseStore) -> None:
    """Keys are listed, the oldest first; one that is kept again takes the place of the one before."""
    keys = [ApiKey(f"id{n}", "it's", "d" * 64, ("ingest", "read"), NOON + timedelta(days=n)) for n in (2, 1)]
    for key in keys:
        store.keep_api_key(key)
    assert store.api_keys() == keys[::-1]
    revoked = ApiKey("id1", "it's", "d" * 64, ("read",), NOON + timedelta(days=1), NOON + timedelta(days=9))
    store.keep_api_key(revoked)
    assert store.api_keys() == [revoked, keys[0]]


@pytest.mark.parametrize("bad", [{"retries": 2**63}, {"key": "\ud800"}, {"tags": ("\udfff",)}])
def test_what_cannot_be_kept(store: ClickHouseStore, bad: dict[str, Any]) -> None:
    """A message that the engine cannot keep is refused before anything of its batch is sent."""
    with pytest.raises((OverflowError, UnicodeEncodeError)):
        store.record([message(), message(**bad)])
    assert store.total().messages == 0


# --- the server


def test_errors_name_no_password() -> None:
    """A server that is not there, or does not answer, is a StoreError in time, without the password."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = ClickHouseStore(f"clickhouse://me:secret@127.0.0.1:{silent.getsockname()[1]}/db?secure=false")
        with pytest.raises(StoreError, match=r"^clickhouse://me@127.0.0.1:\d+/db: ") as raised:
            store.record([message()], timeout_s=0.3)
    with pytest.raises(StoreError) as refused:
        store.total()
    assert "secret" not in f"{raised.value}{raised.value.__cause__}{refused.value}{refused.value.__cause__}"


def test_silent_after_it_was_known(store: ClickHouseStore) -> None:
    """A server that answered before and falls silent is given up when the time is over, and found again."""
    each = message()
    store.record([])
    with clickhouse().silent(), pytest.raises(StoreError, match="timed out"):
        store.record([each], timeout_s=0.3)
    store.record([each])
    assert store.total().messages == 1


def test_reading_makes_nothing(url: str) -> None:
    """A report on a database without a ledger says so, and makes no table."""
    store = open_store(url, create=False)
    with pytest.raises(StoreError, match=r"there is no ledger at clickhouse://tester@.*spryng demo"):
        store.total()
    assert ask(url, "SHOW TABLES") == ""
    store.close()


def test_tables_that_went_away(store: ClickHouseStore, url: str) -> None:
    """A ledger that was dropped is noticed, and made anew."""
    store.record([message()])
    for table in ("messages", "api_keys", "spryng_schema"):
        ask(url, f"DROP TABLE {table}")
    with pytest.raises(StoreError):
        store.record([message()])
    assert store.record([message()]).outcomes == ("recorded",)


@pytest.mark.parametrize("create", [True, False])
def test_newer_schema(store: ClickHouseStore, url: str, create: bool) -> None:
    """A ledger of a newer version is refused, for writing and for reading, with what to do."""
    store.record([message()])
    ask(url, "INSERT INTO spryng_schema VALUES (9)")
    other = ClickHouseStore(url, create=create)
    with pytest.raises(SchemaTooNewError, match=r"has schema 9, .* knows 3\. Upgrade it: pip inst"):
        other.record([message()]) if create else other.total()
    other.close()


def test_a_ledger_of_before(store: ClickHouseStore, url: str) -> None:
    """One of the first version gets what later ones brought when it is opened, and keeps what it has."""
    old, new = message(usage=Usage(9, cached_tokens=3)), message(usage=Usage(9, cached_tokens=3, cached_audio_tokens=2))
    store.record([old])
    ask(url, "ALTER TABLE messages MODIFY COLUMN reported Bool ALIAS input_tokens IS NOT NULL")
    ask(url, f"ALTER TABLE messages {', '.join(f'DROP COLUMN {name}' for name in ADDED)}")
    for statement in ("DROP TABLE records", "DROP TABLE old_costs", "TRUNCATE TABLE spryng_schema"):
        ask(url, statement)
    ask(url, "INSERT INTO spryng_schema VALUES (1)")
    other = ClickHouseStore(url)
    assert other.record([old, new]).outcomes == ("duplicate", "recorded")
    assert {row.message for row in other.messages().rows} == {old, new}
    assert other.records() == []
    other.close()


def test_table_of_something_else(url: str) -> None:
    """A database that has another application's table of messages is left alone."""
    ask(url, "CREATE TABLE messages (a Int64) ENGINE = MergeTree ORDER BY a")
    store = ClickHouseStore(url)
    with pytest.raises(StoreNotOursError, match="something else"):
        store.record([message()])
    assert ask(url, "SHOW TABLES") == "messages\n"
    store.close()


def test_made_by_many_at_once(url: str) -> None:
    """Threads that make one new ledger at the same moment lose nothing, and none fails."""
    stores = [ClickHouseStore(url) for _ in range(4)]
    barrier, failed = threading.Barrier(4), []

    def records(store: ClickHouseStore) -> None:
        barrier.wait()
        try:
            store.record([message()], timeout_s=30)
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=records, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert stores[0].total().messages == 4
    for store in stores:
        store.close()


FORKS = """
import os, sys
from datetime import datetime, timezone
from spryng_instrument.message import Message, new_id
from spryng_instrument.store.clickhouse import ClickHouseStore
store = ClickHouseStore(sys.argv[1])
def record():
    one = Message(id=new_id(), timestamp=datetime.now(timezone.utc), operation="custom")
    store.record([one], timeout_s=30)  # the first makes the tables
record()
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        for _ in range(5): record()
        os._exit(0)
    children.append(child)
for _ in range(5): record()
for child in children: assert os.waitpid(child, 0)[1] == 0
store.close()
"""


def test_forked(url: str) -> None:
    """Children that are forked from a process with an open store record beside it, each on its own connection."""
    subprocess.run([sys.executable, "-W", "error", "-c", FORKS, url], check=True, timeout=150)
    store = ClickHouseStore(url)
    assert store.total().messages == 21
    store.close()


def test_instrumented(url: str, tmp_path: Any) -> None:
    """As destination of instrument(): what track_usage() said is in ClickHouse when flush() returns."""
    spryng_instrument.instrument(destination=url, journal=str(tmp_path / "journal"))
    for _ in range(3):
        spryng_instrument.track_usage(key="k", usage={"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12})
    assert spryng_instrument.flush(), spryng_instrument.stats()
    spryng_instrument.uninstrument()
    store = open_store(url, create=False)
    assert store.total(Filter(key="k")).input_tokens == 27
    store.close()


# --- where it runs


@pytest.mark.parametrize("statement", [*ddl(), *ddl("my-cluster")])
def test_statements_are_understood(statement: str) -> None:
    """Every statement that makes a ledger, on a node and on a cluster, is SQL to the engine's own parser."""
    assert clickhouse().ask(f"EXPLAIN AST {statement}").startswith(("CreateQuery", "AlterQuery"))


@pytest.mark.parametrize("cluster", ["a'b", "a b", "", "a`"])
def test_no_name_of_a_cluster(cluster: str) -> None:
    """What is no name is put into no statement."""
    with pytest.raises(SettingsError, match="no name of a cluster"):
        ddl(cluster)


def test_unknown_option() -> None:
    """A parameter of the URL that is not understood is named."""
    with pytest.raises(SettingsError, match="not 'verify'"):
        ClickHouseStore("clickhouse://host/db?verify=0")


def test_a_copy_has_bills_and_does_not_guess_what_they_counted(store: ClickHouseStore, tmp_path: Path) -> None:
    """The engine knows no marks: what was closed elsewhere is there, and asked for its messages it says where they are
    known; so does what is copied from it."""
    plans = parse("plan = 'p'\n[[plans.p]]\neffective = 2020-01-01\nrates = [{ meter = 'messages', price = 1 }]")
    source, last = SqliteStore(tmp_path / "source.db"), SqliteStore(tmp_path / "last.db")
    source.record([message(key="acme", timestamp=NOON)])
    closed = Desk(source, plans).close(f"{NOON:%Y-%m}", "acme")
    assert copy(source, store).differences == copy(store, last).differences == []
    for ledger in (store, last):
        assert invoices(ledger) == [closed]
        with pytest.raises(BillError, match="bill 000001 was closed in another ledger"):
            behind(ledger, closed)
    assert copy(source, last).differences == []
    assert len(list(behind(last, closed))) == 1
