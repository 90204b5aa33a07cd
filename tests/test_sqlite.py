"""The embedded ledger: what goes in comes out, once, and what is not its own is left alone."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spryng_instrument.errors import QueryError, SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.message import Message, Usage, decode, encode, new_id
from spryng_instrument.store.base import Cost
from spryng_instrument.store.sqlite import APPLICATION_ID, SqliteStore

NOW = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)
ROOT = Path(__file__).parent.parent


def message(number: int = 1, **fields: Any) -> Message:
    values: dict[str, Any] = {
        "id": new_id(), "timestamp": NOW, "operation": "embeddings", "key": "acme", "writer": "w", "sequence": number,
        "usage": Usage(input_tokens=number),
    }  # fmt: skip
    return Message(**{**values, **fields})


text = st.text(max_size=20)
maybe_text = st.none() | text
count = st.none() | st.integers(0, 2**63 - 1)
usages = st.builds(Usage, **dict.fromkeys(Usage.__struct_fields__, count)).map(
    lambda usage: None if usage == Usage() else usage
)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | text
milliseconds = st.none() | st.floats(0, 1e9, allow_nan=False).map(lambda value: round(value, 3))
NAMES = (
    "key", "conversation_id", "query", "request_model", "response_model", "response_id", "request_id",
    "service_tier", "host", "error", "call_site", "writer",
)  # fmt: skip
anything = st.builds(
    Message,
    id=st.uuids().map(str),
    timestamp=st.datetimes(datetime(1990, 1, 1), datetime(2090, 1, 1), timezones=st.just(timezone.utc)),  # noqa: DTZ001
    operation=text,
    status=st.sampled_from(["ok", "error", "incomplete", "cancelled"]),
    tags=st.lists(text, max_size=3).map(tuple),
    properties=st.none() | st.dictionaries(text, st.none() | st.booleans() | st.integers() | text, max_size=3),
    streamed=st.booleans(),
    usage=usages,
    latency_ms=milliseconds,
    time_to_first_token_ms=milliseconds,
    retries=count,
    http_status=count,
    sequence=count,
    **dict.fromkeys(NAMES, maybe_text),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(anything, max_size=5, unique_by=lambda message: message.id))
def test_what_goes_in_comes_out(tmp_path: Path, messages: list[Message]) -> None:
    """Any message, through the journal's JSON and the ledger, is the same message: text, None and 0 apart."""
    store = SqliteStore(tmp_path / f"{new_id()}.db")
    through = [decode(encode(one)) for one in messages]
    assert through == messages
    assert store.record(through).recorded == len(messages)
    assert store.record(messages).duplicates == len(messages)
    kept = {row.message.id: row.message for row in store.messages(limit=10).rows}
    assert kept == {one.id: one for one in messages}


def test_text_that_is_no_unicode_is_kept() -> None:
    """A lone surrogate in any text is escaped; the message is never lost for it."""
    odd = message(key="a\ud800b", tags=("\udfff",), properties={"\ud800": "\ud800"})
    assert decode(encode(odd)).key == "a\\ud800b"
    assert decode(encode(odd)).tags == ("\\udfff",)


def test_each_id_once(tmp_path: Path) -> None:
    """An id is kept once, within a batch and over batches; with another body it is a conflict, and the first stays."""
    store = SqliteStore(tmp_path / "u.db")
    first, second = message(1), message(2)
    other = msgspec.structs.replace(first, key="globex")
    receipt = store.record([first, first, second, other])
    assert (receipt.recorded, receipt.duplicates, receipt.conflicts) == (2, 1, (other,))
    receipt = store.record([other, second])
    assert (receipt.recorded, receipt.duplicates, receipt.conflicts) == (0, 1, (other,))
    assert {row.message.key for row in store.messages().rows} == {"acme"}
    assert store.total().messages == 2


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_pages_show_each_message_once(tmp_path: Path, seconds: list[int], limit: int) -> None:
    """Page by page, newest first, each message comes once, however many share one moment."""
    store = SqliteStore(tmp_path / f"{new_id()}.db")
    messages = [message(timestamp=NOW + timedelta(seconds=second)) for second in seconds]
    store.record(messages)
    seen: list[Message] = []
    after = None
    while True:
        page = store.messages(after=after, limit=limit)
        seen += [row.message for row in page.rows]
        after = page.next
        if after is None:
            break
        store.record(
            [message(timestamp=NOW + timedelta(days=1))]
        )  # what comes meanwhile is newer, and not in these pages
    assert seen == sorted(messages, key=lambda one: (one.timestamp, one.id), reverse=True)


def test_a_mark_of_no_page(tmp_path: Path) -> None:
    """A mark that is none is an error with its value."""
    store = SqliteStore(tmp_path / "u.db")
    store.record([message()])
    with pytest.raises(QueryError, match="'nonsense'"):
        store.messages(after="nonsense")


def test_costs_are_frozen(tmp_path: Path) -> None:
    """A cost, once set, never changes; None may become one later. Sums are exact far beyond 64 bits of the unit."""
    store = SqliteStore(tmp_path / "u.db")
    known, unknown, free = message(1), message(2), message(3)
    store.record([known, unknown, free])
    huge = Decimal("9000000.000000000001")
    store.set_costs([Cost(known.id, huge, "p 1"), Cost(unknown.id, None, "p 1"), Cost(free.id, Decimal(0), "p 1")])
    store.set_costs([Cost(known.id, Decimal(1), "p 2")])
    assert store.unpriced("p 1") == []
    assert [one.id for one in store.unpriced("p 2")] == [unknown.id]
    store.set_costs([Cost(unknown.id, huge, "p 2")])
    total = store.total()
    assert (total.cost_usd, total.unpriced) == (2 * huge, 0)
    rows = {row.message.id: (row.cost_usd, row.price_version) for row in store.messages().rows}
    assert rows == {known.id: (huge, "p 1"), unknown.id: (huge, "p 2"), free.id: (Decimal(0), "p 1")}


def test_gaps_are_proven(tmp_path: Path) -> None:
    """A number that is not there is a loss, by name; what is all there is none."""
    store = SqliteStore(tmp_path / "u.db")
    store.record([message(1), message(2), message(5), message(1, writer="whole")])
    assert store.health().gaps == (("w", 5, 3),)
    assert store.missing("w", 5) == [3, 4]


def test_many_make_and_write_one_ledger(tmp_path: Path) -> None:
    """Processes that make the same ledger at once, and write to it, lose and double nothing."""
    code = (
        "import sys; from tests.test_sqlite import *\n"
        "store = SqliteStore(sys.argv[1])\n"
        "for _ in range(20): store.record([message(writer=sys.argv[2]) for _ in range(10)], timeout_s=60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "u.db")]
    workers = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    store = SqliteStore(tmp_path / "new" / "u.db")
    assert store.total().messages == 800
    assert store.health().writers == 4


def test_threads_share_a_store(tmp_path: Path) -> None:
    """One store object serves several threads."""
    store = SqliteStore(tmp_path / "u.db")
    threads = [threading.Thread(target=lambda: [store.record([message()]) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.total().messages == 80


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def newer(path: Path) -> None:
    SqliteStore(path).record([message()])
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def corrupt(path: Path) -> None:
    SqliteStore(path).record([message(number, query="x" * 500) for number in range(200)])
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(math.ceil(len(content) / 2)) + content[: len(content) // 4])


BAD_FILES = [
    (foreign, StoreNotOursError, "SQLite file of something else. Choose another destination"),
    (newer, SchemaTooNewError, "schema 99, written by a newer spryng_instrument; this one knows 1. Upgrade it: pip"),
    (corrupt, StoreNotOursError, "is corrupt"),
    (lambda path: path.write_text("theirs"), StoreNotOursError, "is no ledger of spryng_instrument, or is corrupt"),
    (lambda path: path.write_text("theirs " * 1000), StoreNotOursError, "is no ledger of spryng_instrument"),
    (lambda path: path.mkdir(), StoreError, "Messages wait in the journal"),
]


@pytest.mark.parametrize(("make", "error", "said"), BAD_FILES, ids=[entry[2][:20] for entry in BAD_FILES])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, make: Any, error: type[StoreError], said: str) -> None:
    """A file that is foreign, newer or corrupt is refused with what to do, and not a byte of it changes."""
    path = tmp_path / "u.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for create in (True, False):
        with pytest.raises(error) as caught:
            SqliteStore(path, create=create).record([message()])
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else None)


def test_no_ledger_there(tmp_path: Path) -> None:
    """Reading what is not there says so and names the next command; nothing is made."""
    with pytest.raises(StoreError, match=r"there is no ledger at .*u\.db.*spryng demo"):
        SqliteStore(tmp_path / "u.db", create=False).total()
    assert not (tmp_path / "u.db").exists()


def test_a_locked_ledger(tmp_path: Path) -> None:
    """A ledger that another holds locked says so, after the time that was given; then it goes on."""
    store = SqliteStore(tmp_path / "u.db")
    store.record([message()])
    db = sqlite3.connect(store.path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError, match=r"stayed locked for 0\.\d s by another process"):
        store.record([message()], timeout_s=0.1)
    assert store.total().messages == 1
    db.execute("ROLLBACK")
    db.close()
    store.record([message()])
    assert store.total().messages == 2


@pytest.mark.parametrize("leftovers", [False, True])
def test_a_deleted_ledger_is_made_again(tmp_path: Path, leftovers: bool) -> None:
    """After the file was deleted, also without the log beside it, a new one begins, with nothing of the old in it."""
    store = SqliteStore(tmp_path / "u.db")
    reader = sqlite3.connect(tmp_path / "other.db")  # something else stays open
    store.record([message(1)])
    held = sqlite3.connect(store.path)
    held.execute("SELECT count(*) FROM messages").fetchone()
    store.record([message(2)])  # stays in the log: the reader keeps it from being folded in
    store.path.unlink()
    if not leftovers:
        for suffix in ("-wal", "-shm"):
            Path(f"{store.path}{suffix}").unlink(missing_ok=True)
    store.record([message(3)])
    assert [row.message.sequence for row in store.messages().rows] == [3]
    held.close()
    reader.close()
    assert [row.message.sequence for row in store.messages().rows] == [3]


def test_the_file_is_marked(tmp_path: Path) -> None:
    """A ledger says in its header whose it is, and its version; it is synced at each commit."""
    store = SqliteStore(tmp_path / "u.db")
    store.record([message()])
    db = sqlite3.connect(store.path)
    marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version", "journal_mode")]
    db.close()
    assert marks == [APPLICATION_ID, 1, "wal"]
    with store._connect() as ours:
        assert ours.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
