"""The embedded ledger: what is SQLite's own. What it shares with other engines is in test_conformance.py."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from spryng_instrument.errors import SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.message import Message, Usage, decode, encode
from spryng_instrument.store import sqlite
from spryng_instrument.store.base import Filter
from spryng_instrument.store.rows import ADDED, COLUMNS, row_of
from spryng_instrument.store.sqlite import APPLICATION_ID, SqliteStore

from .messages import NOON, anything, message
from .test_processes import ledger, run


@pytest.fixture
def store(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "usage.db")


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


def test_a_ledger_of_before(tmp_path: Path) -> None:
    """One of the first version gets what later ones brought when it is opened, and keeps what it has."""
    old, new = message(usage=Usage(9, cached_tokens=3)), message(usage=Usage(9, cached_tokens=3, cached_audio_tokens=2))
    names = [name for name in COLUMNS if name not in ADDED]
    values = [value for name, value in zip(COLUMNS, row_of(old), strict=True) if name in names]
    with closing(sqlite3.connect(tmp_path / "usage.db")) as db, db:
        for statement in sqlite._MIGRATIONS[0]:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.execute(f"INSERT INTO messages ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", values)
    store = SqliteStore(tmp_path / "usage.db")
    assert store.record([old, new]).outcomes == ("duplicate", "recorded")
    assert [row.message for row in store.messages().rows] == [new, old]
    assert store.records() == []


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
    started = time.monotonic()
    with pytest.raises(StoreBusyError, match=r"stayed locked for \d+\.\d s"):
        store.record([message()], timeout_s=0.3)
    assert time.monotonic() - started >= 0.3
    timer = threading.Timer(0.5, db.close)
    timer.start()
    assert store.record([message()], timeout_s=60).count("recorded") == 1
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


class Counting(SqliteStore):
    """Counts what questions have the engine do, in hundreds of its steps."""

    steps = 0

    @contextmanager
    def _connect(self, *given: Any) -> Iterator[sqlite3.Connection]:
        with super()._connect(*given) as db:
            db.set_progress_handler(self._step, 100)
            yield db

    def _step(self) -> int:
        self.steps += 1
        return 0


def test_what_is_missing_of_many_takes_one_pass(tmp_path: Path) -> None:
    """What is missing of the messages of a hundred processes is found about as soon as of as many of one."""

    def steps(writers: int) -> int:
        store = Counting(tmp_path / f"{writers}.db")
        store.record([message(writer=f"w{n % writers}", sequence=n // writers + 2) for n in range(1000)])
        before = store.steps
        given = {f"w{number}": 1000 // writers + 1 for number in range(writers)}
        assert store.missing(given) == {writer: [range(1, 2)] for writer in given}
        return store.steps - before

    assert steps(100) < 2 * steps(1)


@pytest.mark.parametrize("where", [Filter(key="acme"), Filter(no_key=True)], ids=["key", "no key"])
def test_a_customer_costs_no_more_for_the_others(tmp_path: Path, where: Filter) -> None:
    """What one customer used is found without reading what a hundred others did in the same hours."""
    store = Counting(tmp_path / "usage.db")

    def steps() -> int:
        before = store.steps
        [row] = store.usage("key", where)
        assert row.messages == 10
        return store.steps - before

    hours = [NOON + timedelta(hours=number) for number in range(10)]
    store.record([message(timestamp=hour, key=where.key) for hour in hours])
    alone = steps()
    store.record([message(timestamp=hour, key=f"key{number}") for hour in hours for number in range(100)])
    assert steps() <= alone + 1
