"""The ledger in PostgreSQL: what is its own. What it shares with other engines is in test_conformance.py.

The server is a real one. It is killed with all its processes, stopped and started again, and so are those who write.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest

import spryng_instrument
from spryng_instrument.errors import (
    QueryError,
    SchemaTooNewError,
    StoreBusyError,
    StoreError,
    StoreNotOursError,
)
from spryng_instrument.message import Message, Usage
from spryng_instrument.store import open_destination, open_store, postgres
from spryng_instrument.store.base import GROUPS, START, Cost, Filter
from spryng_instrument.store.postgres import PostgresStore
from spryng_instrument.store.postgres_connections import _CONNECTIONS, _KEPT, Connection
from spryng_instrument.store.rows import ADDED, COLUMNS, micros, row_of
from spryng_instrument.store.sql import BUCKET_US

from .messages import NOON, message
from .proxy import free_port
from .servers import Postgres

ROOT = Path(spryng_instrument.__file__).parent.parent
PASSWORD = "s3cret-pa55"


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture
def url(server: Postgres) -> Iterator[str]:
    with server.ledger() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with closing(PostgresStore(url)) as store:
        yield store


@pytest.fixture(params=["copy", "executemany"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to insert, whatever the size of a batch."""
    monkeypatch.setattr(postgres, "_COPY_FROM", 1 if request.param == "copy" else 10**9)
    return str(request.param)


def rows_of(url: str, question: str) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as db:
        cursor = db.execute(question.encode())
        return cursor.fetchall() if cursor.description else []


def eventually(holds: Callable[[], bool], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def in_program(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python program, in a process of its own."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out


# --- exactly once


def test_recorded_in_either_way(store: PostgresStore, url: str, way: str) -> None:
    """By COPY or a statement each: the same outcomes, rows and writers."""
    first, other = message(key="a", tags=("x", 'y"{,\\'), properties={"a": 1.5, "ü": None}), message(query="b\t\\N\n")
    conflicting = message(id=first.id, key="c")
    many = [message(writer="w", sequence=number) for number in range(1, 21)]
    assert store.record([first, first, conflicting, other]).outcomes == (
        "recorded", "duplicate", "conflict", "recorded",
    )  # fmt: skip
    assert store.record([conflicting, *many, other]).outcomes == ("conflict", *["recorded"] * 20, "duplicate")
    assert store.found([first.id, other.id]) == {first.id: first, other.id: other}
    assert store.health().messages == 22
    assert rows_of(url, "SELECT * FROM writers") == [("w", 20, 20)]
    assert store.record([]).outcomes == ()


def test_refused_in_either_way(store: PostgresStore, way: str) -> None:
    """A message that no row can hold is no reason to try again: nothing of its batch is kept, and the next one is."""
    for refused in (message(usage=Usage(input_tokens=2**63)), message(query="\0"), message(query="\ud800")):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the driver has several
            store.record([message(), refused])
        assert not isinstance(caught.value, StoreError)
    long = message(key=random.Random(1).randbytes(20_000).hex())  # more than an index can hold
    with pytest.raises(psycopg.Error):
        store.record([long])
    assert store.health().messages == 0
    assert store.record([message()]).outcomes == ("recorded",)


def test_without_temporary_tables(server: Postgres, url: str) -> None:
    """A user who may make no temporary table, like an engine that has none, records all the same."""
    with closing(PostgresStore(url)) as store:
        store.record([])
    schema = rows_of(url, "SELECT current_schema()::text")[0][0]
    server.run(
        "DROP ROLE IF EXISTS plain", "CREATE ROLE plain LOGIN", "REVOKE TEMPORARY ON DATABASE postgres FROM PUBLIC",
        f"GRANT USAGE ON SCHEMA {schema} TO plain", f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO plain",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO plain",
    )  # fmt: skip
    with closing(PostgresStore(url.replace("tester@", "plain@"))) as store:
        messages = [message() for _ in range(100)]
        assert store.record(messages).count("recorded") == 100
        assert not store._copies
        assert store.record(messages).count("duplicate") == 100
    server.run("DROP OWNED BY plain", "DROP ROLE plain", "GRANT TEMPORARY ON DATABASE postgres TO PUBLIC")


WRITES = """
import random, sys
from datetime import datetime, timezone
from spryng_instrument.message import Message
from spryng_instrument.store.postgres import PostgresStore
import threading
url, seed = sys.argv[1:]
store = PostgresStore(url)
counts, failed = [], []
def writes(number):
    chance = random.Random(f"{seed} {number}")
    try:
        for _ in range(15):
            ids = chance.sample(range(400), 40)
            batch = [Message(id=f"{id:05}", timestamp=datetime(2026, 1, 1, tzinfo=timezone.utc), operation="custom",
                             writer=f"w{id % 7}", sequence=id // 7 + 1) for id in ids]
            counts.append(store.record(batch, timeout_s=60).count("recorded"))
    except BaseException as exc:
        failed.append(exc)
threads = [threading.Thread(target=writes, args=(number,)) for number in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not failed, failed
store.close()
print(sum(counts))
"""


def test_many_write_the_same(server: Postgres, store: PostgresStore, url: str) -> None:
    """Processes and threads that record overlapping batches in any order: each id is recorded once, by one of them."""
    before = server.log().count("deadlock")
    processes = [in_program(WRITES, url, str(number)) for number in range(3)]
    recorded = sum(int(ended(process)) for process in processes)
    health = store.health()
    assert (health.messages, health.writers) == (recorded, 7)
    assert sum(here for _, here in rows_of(url, "SELECT writer, messages FROM writers")) == recorded
    assert server.log().count("deadlock") == before


def test_another_transaction_is_waited_for(store: PostgresStore, url: str) -> None:
    """A message that another one is recording is its duplicate once that has committed, and new if it gave up."""
    for ending, outcome in (("COMMIT", "duplicate"), ("ROLLBACK", "recorded")):
        mine = message(writer="w", sequence=1)
        with store._connections.transaction(time.monotonic() + 30) as db:
            store._insert(db, [mine])
            with ThreadPoolExecutor(1) as pool:
                told = pool.submit(store.record, [mine], timeout_s=30)
                assert eventually(
                    lambda: rows_of(url, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'") != []
                )
                assert not told.done()
                db.run(ending)
                assert told.result().outcomes == (outcome,)
            db.run("BEGIN")


def test_deleted_meanwhile(store: PostgresStore, url: str) -> None:
    """A message that is deleted at the moment it is delivered again is recorded, and never said to be there."""
    mine = message()
    store.record([mine])
    with psycopg.connect(url) as db, ThreadPoolExecutor(1) as pool:
        stored = store._stored

        def deletes(ask: Any, ids: Any) -> Any:
            store._stored = stored  # type: ignore[method-assign]
            db.execute("DELETE FROM messages")
            db.commit()
            return stored(ask, ids)

        store._stored = deletes  # type: ignore[method-assign]
        assert pool.submit(store.record, [mine], timeout_s=30).result().outcomes == ("recorded",)
    assert store.found([mine.id]) == {mine.id: mine}


def test_locked_for_too_long(store: PostgresStore) -> None:
    """A batch that waits for another one is busy after its time, and can be recorded later."""
    mine = message()
    with store._connections.transaction(time.monotonic() + 30) as db:
        store._insert(db, [mine])
        with pytest.raises(StoreBusyError, match="took too long"):
            store.record([mine], timeout_s=0.2)
    assert store.record([mine]).outcomes == ("duplicate",)


def test_acknowledged_is_on_the_disk(server: Postgres, url: str) -> None:
    """Though the user's connections would not wait for the disk, each transaction here does."""
    server.run(
        "DROP ROLE IF EXISTS hasty",
        "CREATE ROLE hasty LOGIN SUPERUSER",
        "ALTER ROLE hasty SET synchronous_commit = off",
    )
    with closing(PostgresStore(url.replace("tester@", "hasty@"))) as store:
        store.record([message()])
        with store._connections.transaction(time.monotonic() + 5) as db:
            assert db.ask("SHOW synchronous_commit", []) == [("on",)]
    server.run("REASSIGN OWNED BY hasty TO tester", "DROP ROLE hasty")


# --- a server that comes and goes

RECORDS = """
import os, sys
from spryng_instrument.errors import StoreError
from spryng_instrument.message import Message, new_id
from datetime import datetime, timezone
from spryng_instrument.store.postgres import PostgresStore
store = PostgresStore(sys.argv[1])
said = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
number = 0
while not os.path.exists(sys.argv[2]):
    batch = [Message(id=new_id(), timestamp=datetime(2026, 1, 1, tzinfo=timezone.utc), operation="custom",
                     writer=str(os.getpid()), sequence=number + place + 1) for place in range(20)]
    number += 20
    while True:
        try:
            assert store.record(batch, timeout_s=5).count("conflict") == 0
            break
        except StoreError:
            pass
    os.write(said, "".join(f"{message.id}\\n" for message in batch).encode())
store.close()
"""


def test_killed_and_started_again(server: Postgres, store: PostgresStore, url: str, tmp_path: Path) -> None:
    """SIGKILL of the server, again and again, while three processes record: what was acknowledged is there, once."""
    store.record([])
    end = tmp_path / "end"
    outs = [tmp_path / str(number) for number in range(3)]
    processes = [in_program(RECORDS, url, str(end), str(out)) for out in outs]
    try:
        for _ in range(4):
            sizes = [out.stat().st_size if out.exists() else 0 for out in outs]
            for out, size in zip(outs, sizes, strict=True):
                assert eventually(lambda out=out, size=size: out.exists() and out.stat().st_size > size)
            server.kill()
            server.start()
        end.touch()
        for process in processes:
            ended(process)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    acknowledged = [id for out in outs for id in out.read_text().split()]
    health = store.health()
    assert health.gaps == ()
    assert health.messages == len(set(acknowledged)) == len(acknowledged)
    assert store.found(acknowledged).keys() == set(acknowledged)
    assert store.total().messages == health.messages


def test_down_is_said(server: Postgres, store: PostgresStore) -> None:
    """While the server is down that is said, for writing and reading; once it is up again the same store works."""
    mine = message()
    store.record([mine])
    server.kill()
    with pytest.raises(StoreError, match=r"[.?] Messages wait in the journal"):
        store.record([mine])
    with pytest.raises(StoreError):
        store.total()
    server.start()
    assert store.record([mine]).outcomes == ("duplicate",)
    server.kill()
    server.start()
    assert store.total().messages == 1, "a connection that lay idle is replaced without a word"


def test_questions_leave_connections_to_those_who_record(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many questions as may be asked at a time keep none from recording or from the keys; one more has to wait."""
    mine = message()
    monkeypatch.setattr(postgres, "_QUESTION_S", 0.3)
    with ExitStack() as asked:
        for _ in range(_CONNECTIONS - _KEPT):
            asked.enter_context(store._reading())
        with pytest.raises(StoreBusyError, match="at work"):
            store.total()
        assert store.record([mine], timeout_s=5.0).outcomes == ("recorded",)
        assert store.found([mine.id], timeout_s=5.0) == {mine.id: mine}
        assert store.api_keys(timeout_s=5.0) == []
    monkeypatch.undo()
    assert store.total().messages == 1


def test_stopped_server_is_not_waited_for(server: Postgres, store: PostgresStore) -> None:
    """A server that takes a question and is silent is left after the time, and used again once it answers."""
    store.record([message()])
    server.send(signal.SIGSTOP)
    try:
        with pytest.raises(StoreBusyError):
            store.record([message()], timeout_s=0.2)
        with pytest.raises(StoreError):
            store.api_keys(timeout_s=0.2)
        with pytest.raises(StoreError):  # and a new connection
            store.record([message()], timeout_s=0.2)
    finally:
        server.send(signal.SIGCONT)
    assert store.record([message()]).outcomes == ("recorded",)


def test_answer_lost_after_commit(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that was committed, but whose answer was lost, is a duplicate when it is delivered again."""
    run = Connection.run

    def lost(self: Any, statements: str) -> None:
        run(self, statements)
        if statements == "COMMIT":
            self.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    mine = [message() for _ in range(3)]
    store.record([])
    with monkeypatch.context() as patched:
        patched.setattr(Connection, "run", lost)
        with pytest.raises(StoreError):
            store.record(mine)
    assert store.record(mine).count("duplicate") == 3


def test_password_is_not_said(server: Postgres) -> None:
    """Whatever is wrong with a server or its URL, its password is in no error."""
    for wrong in (
        f"postgresql://user:{PASSWORD}@127.0.0.1:{free_port()}/db",
        f"postgresql://user:{PASSWORD}@127.0.0.1:{server.port}/no-such-database",
        f"postgresql://user:{PASSWORD}%zz@127.0.0.1/db",
        f"postgresql://user@127.0.0.1:{server.port}/db?no_such_parameter={PASSWORD}",
    ):
        with pytest.raises(StoreError) as caught:
            PostgresStore(wrong).record([message()])
        error: BaseException | None = caught.value
        while error is not None:
            assert PASSWORD not in str(error)
            error = error.__cause__


# --- forks


def test_fork(store: PostgresStore) -> None:
    """A child makes connections of its own; what it does, and its end, leave those of the parent as they are."""
    store.record([message()])
    [held] = store._connections._idle
    backend = held.info.backend_pid

    def works() -> None:
        import gc

        assert not store._connections._idle
        gc.collect()
        assert store.record([message()]).outcomes == ("recorded",)
        assert store.record([message()]).outcomes == ("recorded",)
        store.close()

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=works) for _ in range(3)]
    for child in children:
        child.start()
    store.record([message()])
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert store.record([message()]).outcomes == ("recorded",)
    [held] = store._connections._idle
    assert held.info.backend_pid == backend
    assert store.health().messages == 9


FORKS = """
import os, sys, time
from datetime import datetime, timezone
from spryng_instrument.message import Message
from spryng_instrument.store.postgres import PostgresStore
store = PostgresStore(sys.argv[1])
with store._connections.transaction(time.monotonic() + 60) as db:
    store._insert(db, [Message(id="1", timestamp=datetime(2026, 1, 1, tzinfo=timezone.utc), operation="custom")])
    pid = os.fork()
    if not pid:
        time.sleep(100)
        os._exit(0)
    os.write(1, f"{pid}\\n".encode())
    time.sleep(100)
"""


def test_child_holds_nothing_of_a_killed_parent(store: PostgresStore, url: str) -> None:
    """A process that is killed within a transaction holds its rows no longer, though its child lives on."""
    store.record([])
    with in_program(FORKS, url) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            with pytest.raises(StoreBusyError):
                store.record([message(id="1")], timeout_s=0.2)
            parent.kill()
            assert store.record([message(id="1")], timeout_s=30).outcomes == ("recorded",)
        finally:
            os.kill(child, signal.SIGKILL)


# --- schema


@pytest.mark.parametrize("create", [True, False])
def test_newer_schema(store: PostgresStore, url: str, create: bool) -> None:
    """A ledger of a newer version is refused, for writing and for reading, with what to do."""
    store.record([message()])
    rows_of(url, "INSERT INTO spryng_schema VALUES (9, now()) ")
    with (
        closing(PostgresStore(url, create=create)) as other,
        pytest.raises(SchemaTooNewError, match=r"has schema 9, .* knows \d\. Upgrade it: pip inst"),
    ):
        other.record([message()]) if create else other.total()


def test_reading_makes_nothing(url: str) -> None:
    """A report on a ledger that is not there says so, and makes no table."""
    with closing(PostgresStore(url, create=False)) as store, pytest.raises(StoreError, match="there is no ledger at"):
        store.total()
    assert rows_of(url, "SELECT 1 FROM pg_tables WHERE schemaname = current_schema()") == []


def test_tables_of_something_else(url: str) -> None:
    """Another application's table of the same name is left as it is."""
    rows_of(url, "CREATE TABLE messages AS SELECT 1 AS one")
    with closing(PostgresStore(url)) as store, pytest.raises(StoreNotOursError, match='"messages" already exists'):
        store.record([message()])
    assert rows_of(url, "SELECT * FROM messages") == [(1,)]


def test_a_ledger_of_before(url: str) -> None:
    """One of the first version gets what later ones brought when it is opened, and keeps what it has."""
    old, new = message(usage=Usage(9, cached_tokens=3)), message(usage=Usage(9, cached_tokens=3, cached_audio_tokens=2))
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(postgres, "_MIGRATIONS", postgres._MIGRATIONS[:1])
        with closing(PostgresStore(url)) as store:
            store.record([])
    names = [name for name in COLUMNS if name not in ADDED]
    row = dict(zip(COLUMNS, row_of(old), strict=True)) | {"tags": list(old.tags)}
    with psycopg.connect(url) as db:
        marks = ", ".join("%s" for _ in names)
        db.execute(f"INSERT INTO messages ({', '.join(names)}) VALUES ({marks})", [row[name] for name in names])
    with closing(PostgresStore(url)) as store:
        assert store.record([old, new]).outcomes == ("duplicate", "recorded")
        assert [row.message for row in store.messages().rows] == [new, old]
        assert store.records() == []


def test_made_by_many_at_once(url: str) -> None:
    """Processes that make the same tables at the same moment: each migration is run once, and none of them fails."""
    processes = [in_program(WRITES, url, str(number)) for number in range(4)]
    recorded = sum(int(ended(process)) for process in processes)
    assert rows_of(url, "SELECT version FROM spryng_schema ORDER BY 1") == [(1,), (2,), (3,), (4,)]
    assert rows_of(url, "SELECT count(*) FROM messages") == [(recorded,)]


def test_recording_goes_on_while_a_ledger_is_upgraded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an index is made for a newer version, others go on recording as that of before; all is there in the end."""
    hours = [NOON + timedelta(hours=number) for number in range(3)]

    def as_before(db: psycopg.Connection[Any], number: int) -> None:
        db.execute(
            "INSERT INTO messages (id, timestamp_us, streamed, tags, operation, status, key) "
            "VALUES (%s, %s, false, '{}', 'custom', 'ok', 'a')",
            [str(number), micros(hours[number])],
        )
        db.execute("INSERT INTO dirty VALUES (%s)", [micros(hours[number])])

    monkeypatch.setattr(postgres, "_MIGRATIONS", postgres._MIGRATIONS[:2])
    with closing(PostgresStore(url)) as store:
        store.record([])
    monkeypatch.undo()
    with (
        psycopg.connect(url, autocommit=True) as older,
        psycopg.connect(url) as other,
        closing(PostgresStore(url)) as newer,
        ThreadPoolExecutor(1) as pool,
    ):
        as_before(older, 0)
        older.execute("SET lock_timeout = 5000")
        other.execute("LOCK TABLE rollups IN ROW EXCLUSIVE MODE")  # the index waits for it, as if it took long
        opened = pool.submit(newer.record, [message(key="a", timestamp=hours[2])], timeout_s=20.0)
        while other.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (1,):
            time.sleep(0.01)
        as_before(older, 1)
        other.rollback()
        assert opened.result().outcomes == ("recorded",)
        assert newer.total(Filter(key="a")).messages == newer.total().messages == 3
        assert rows_of(url, "SELECT count(*) FROM dirty") == [(0,)]


def test_made_anew(store: PostgresStore, url: str) -> None:
    """Tables that were dropped meanwhile are said to be missing, and made again."""
    store.record([message()])
    rows_of(
        url,
        "DROP TABLE messages, writers, dirty, rollups, api_keys, records, old_costs, spryng_schema CASCADE",
    )
    with pytest.raises(StoreError, match="does not exist"):
        store.record([message()])
    assert store.record([message()]).outcomes == ("recorded",)


# --- arrivals


def test_arrivals_in_any_order_of_commits(store: PostgresStore) -> None:
    """Transactions that begin in one order and commit in another: each message is shown once, none is passed over."""
    store.record([message()])
    seen: list[str] = []
    mark = START

    def look() -> None:
        nonlocal mark
        while rows := (page := store.arrivals(mark, limit=2)).rows:
            seen.extend(row.message.id for row in rows)
            assert page.next is not None
            mark = page.next
        assert page.next is not None
        mark = page.next

    look()
    early, late = message(), message()
    with store._connections.transaction(time.monotonic() + 30) as db:
        store._insert(db, [early])
        store.record([late])
        look()
        assert late.id not in seen, "something may still come before it"
    look()
    assert seen[-2:] == [early.id, late.id]
    chance = random.Random(1)
    messages = [message() for _ in range(60)]

    def records(part: list[Message]) -> None:
        for each in part:
            with store._connections.transaction(time.monotonic() + 30) as db:
                store._insert(db, [each])
                time.sleep(chance.random() / 100)

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(records, messages[start::4]) for start in range(4)]
        while not all(each.done() for each in writing):
            look()
        [each.result() for each in writing]
    look()
    assert len(seen) == len(set(seen)) == 63
    with pytest.raises(QueryError, match="is no mark of a page"):
        store.arrivals("1; DROP")


def test_arrivals_of_a_ledger_made_anew(store: PostgresStore) -> None:
    """A mark of a later time than the server has reached begins at the first message."""
    mine = message()
    store.record([mine])
    assert [row.message for row in store.arrivals(f"{2**62}_5").rows] == [mine]


# --- rollups


class Scan(PostgresStore):
    """Sums the messages themselves."""

    def _facts(self, ask: Any, where: Filter) -> Any:
        return self._message_facts(where)


def test_rollups_are_of_the_messages(store: PostgresStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While messages and costs come, and rollups are made, every sum of every moment is that of the messages."""
    scan = Scan(url)
    store.record([])
    chance = random.Random(7)
    done = threading.Event()
    recorded: list[Message] = []

    def some() -> Message:
        return message(
            timestamp=NOON + timedelta(minutes=chance.randint(-3000, 3000), microseconds=chance.randint(-1, 1)),
            key=chance.choice([None, "a", "b"]), conversation_id=chance.choice([None, "c", "d"]),
            tags=tuple(chance.sample("xyz", chance.randint(0, 2))), request_model=chance.choice([None, "m", "n"]),
            status=chance.choice(["ok", "ok", "error", "cancelled"]),
            usage=chance.choice([None, Usage(input_tokens=chance.randint(0, 9), output_tokens=1)]),
        )  # fmt: skip

    def records() -> None:
        for _ in range(60):
            batch = [some() for _ in range(chance.randint(1, 12))]
            store.record(batch, timeout_s=60)
            recorded.extend(batch)
            store.set_costs([Cost(each.id, 1, "v1") for each in chance.sample(recorded, 3)])  # type: ignore[arg-type]

    def refreshes() -> None:
        while not done.is_set():
            with suppress(StoreError):  # two of them may meet
                store.roll_up(chance.randint(1, 50))

    monkeypatch.setattr(store, "_summing", store._reading)
    with closing(scan), ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(records), pool.submit(records)]
        rolling = [pool.submit(refreshes), pool.submit(refreshes)]
        asked = 0
        while asked < 10 or not all(each.done() for each in writing):
            edges = sorted(NOON + timedelta(minutes=chance.randint(-3100, 3100)) for _ in range(2))
            where = Filter(since=chance.choice([None, edges[0]]), until=chance.choice([None, edges[1]]))
            by = chance.choice([each for each in GROUPS if each not in ("day", "month")])
            with store._reading() as ask:  # both of one moment
                assert store._usage(ask, by, where, "UTC") == scan._usage(ask, by, where, "UTC")
                assert store._total(ask, where) == scan._total(ask, where)
            asked += 1
        done.set()
        [each.result() for each in (*writing, *rolling)]
        while store.roll_up():
            pass
        assert rows_of(url, "SELECT count(*) FROM dirty") == [(0,)]
        assert rows_of(url, "SELECT count(*) > 0 FROM rollups") == [(True,)]
        for by in GROUPS:
            assert store.usage(by) == scan.usage(by)
        assert store.conversations(limit=100) == scan.conversations(limit=100)


def test_rollups_of_much_that_is_dirty(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little of it is rolled up yet, the sums are the same."""
    monkeypatch.setattr(store, "_summing", store._reading)
    store.record([message(timestamp=NOON + timedelta(hours=number), key="a") for number in range(300)])
    assert store.total().messages == 300
    assert store.roll_up(150) == 150
    assert store.total().messages == 300
    assert store.usage("key")[0].messages == 300


def test_sums_beyond_64_bits(store: PostgresStore, url: str) -> None:
    """Counts whose sum is beyond 64 bits are added up exactly, in a rollup, too."""
    store.record([message(usage=Usage(input_tokens=2**63 - 1)) for _ in range(3)])
    assert store.total().input_tokens == 3 * (2**63 - 1)
    assert rows_of(url, "SELECT input_tokens FROM rollups") == [(3 * (2**63 - 1),)]


def test_the_present_is_not_rolled_up(store: PostgresStore, url: str) -> None:
    """The quarter of an hour that is not over stays as it is: it would be dirty again at once."""
    store.record([message(timestamp=datetime.now(timezone.utc) + timedelta(minutes=1)), message()])
    assert store.total().messages == 2
    [[bucket]] = rows_of(url, "SELECT bucket_us FROM rollups")
    assert bucket % BUCKET_US == 0
    assert rows_of(url, "SELECT count(*) FROM dirty") == [(1,)]


def test_reader_who_may_not_write(server: Postgres, store: PostgresStore, url: str) -> None:
    """A user who may only read gets the sums all the same, from what is rolled up and the rest."""
    store.record([message(key="a")])
    schema = rows_of(url, "SELECT current_schema()::text")[0][0]
    server.run(
        "DROP ROLE IF EXISTS reader", "CREATE ROLE reader LOGIN", f"GRANT USAGE ON SCHEMA {schema} TO reader",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO reader",
    )  # fmt: skip
    with closing(PostgresStore(url.replace("tester@", "reader@"), create=False)) as reader:
        assert reader.total().messages == 1
        assert reader.usage("key")[0].messages == 1
        with pytest.raises(StoreError, match="permission denied"):
            reader.record([message()])
    server.run("DROP OWNED BY reader", "DROP ROLE reader")


# --- the whole way

METERS = """
import sys, spryng_instrument
spryng_instrument.instrument(destination=sys.argv[1], journal=sys.argv[2])
for number in range(30):
    spryng_instrument.track_usage(key="company123", usage={"prompt_tokens": 9, "total_tokens": 9})
assert spryng_instrument.flush(30), spryng_instrument.stats()
"""


def test_destination(url: str, tmp_path: Path) -> None:
    """A process that meters into PostgreSQL: what it recorded is there, and can be asked for."""
    ended(in_program(METERS, url.replace("postgresql:", "postgres:"), str(tmp_path / "journal")))
    with closing(open_store(url, create=False)) as store:
        [row] = store.usage("key")
        assert (row.group, row.messages, row.input_tokens) == ("company123", 30, 270)
        assert store.health().gaps == ()
    with closing(open_destination(url)) as destination:
        assert destination.record([message()]).outcomes == ("recorded",)
