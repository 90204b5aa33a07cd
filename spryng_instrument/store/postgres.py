"""The ledger of many machines: tables in a PostgreSQL database, version 13 or newer, or in one that speaks like it.

Exactly once: a message's id is the primary key, and the row and its deduplication are one transaction, which the server
has on its disk before it is acknowledged. Rows are only ever added; later facts are the cost and its price version.

Rollups are of the messages, at every moment: who adds messages to a quarter of an hour also says in `dirty` that its
rollup is of the past. The next question makes it anew; until then that quarter is summed from its messages.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from typing import Any

import psycopg
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.types.string import TextLoader

from spryng_instrument.errors import QueryError, SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.message import Message
from spryng_instrument.settings import without_secrets
from spryng_instrument.store.base import ApiKey, Cost, Filter, Outcome, Page, Receipt
from spryng_instrument.store.rows import (
    COLUMNS,
    INTEGERS,
    JSON,
    REALS,
    SELECT,
    TEXTS,
    USAGE,
    is_same,
    message_of,
    micros,
    numbers_of,
    pusd,
    row_of,
    stored_of,
)
from spryng_instrument.store.sql import (
    API_KEY,
    BUCKET_US,
    DIMENSIONS,
    FACTS,
    SUMS,
    Ask,
    SqlParts,
    SqlStore,
    api_key_row,
)

_TEXT = 'text COLLATE "C"'  # in the order of Python's own strings
_TYPES = {
    "id": f"{_TEXT} NOT NULL", "timestamp_us": "bigint NOT NULL", "streamed": "boolean NOT NULL",
    "tags": "text[] COLLATE \"C\" NOT NULL", **dict.fromkeys(JSON, "json"), **dict.fromkeys(TEXTS, _TEXT),
    **dict.fromkeys(INTEGERS, "bigint"), **dict.fromkeys(REALS, "double precision"),
    **dict.fromkeys(USAGE, "bigint"), "seconds": "double precision",
    "operation": f"{_TEXT} NOT NULL", "status": f"{_TEXT} NOT NULL",
}  # fmt: skip
_TYPED = ", ".join(f"{name} {_TYPES[name]}" for name in COLUMNS)
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # xact is the transaction that a message came with: see `arrivals`.
        f"""CREATE TABLE messages (
            serial bigserial, xact xid8 NOT NULL DEFAULT pg_current_xact_id(),
            {_TYPED}, PRIMARY KEY (id),
            cost_pusd bigint, price_version text,
            model {_TEXT} GENERATED ALWAYS AS (coalesce(response_model, request_model)) STORED,
            reported boolean GENERATED ALWAYS AS (coalesce({", ".join(USAGE)}) IS NOT NULL) STORED
        )""",
        "CREATE INDEX messages_by_time ON messages (timestamp_us, id)",
        "CREATE INDEX messages_by_key ON messages (key, timestamp_us, id)",
        "CREATE INDEX messages_by_conversation ON messages (conversation_id, timestamp_us)"
        " WHERE conversation_id IS NOT NULL",
        "CREATE INDEX messages_by_arrival ON messages (xact, serial)",
        "CREATE INDEX messages_unattributed ON messages (call_site) WHERE key IS NULL",
        "CREATE INDEX messages_uncosted ON messages (price_version) WHERE cost_pusd IS NULL AND reported",
        f"CREATE TABLE writers (writer {_TEXT} PRIMARY KEY, last_sequence bigint NOT NULL, messages bigint NOT NULL)",
        f"""CREATE TABLE rollups (
            bucket_us bigint NOT NULL, first_us bigint NOT NULL, last_us bigint NOT NULL,
            {", ".join(f"{name} {_TYPES.get(name, _TEXT)}" for name in DIMENSIONS)},
            {", ".join(f"{name} numeric" for name in SUMS)}
        )""",
        "CREATE INDEX rollups_by_time ON rollups (bucket_us)",
        "CREATE TABLE dirty (bucket_us bigint NOT NULL)",
        "CREATE INDEX dirty_by_time ON dirty (bucket_us)",
        """CREATE VIEW rolled_up AS SELECT * FROM rollups r
            WHERE NOT EXISTS (SELECT FROM dirty d WHERE d.bucket_us = r.bucket_us)""",
        """CREATE TABLE api_keys (
            id text PRIMARY KEY, name text NOT NULL, digest text NOT NULL, scopes text NOT NULL,
            created_us bigint NOT NULL, revoked_us bigint
        )""",
    ),
)
"""What brings a ledger from each version to the next. A migration that was released is never edited."""
_MIGRATING = 0x5350525901  # an advisory lock: one process at a time makes the tables
_ROLLING_UP = 0x5350525902  # an advisory lock: one process at a time makes rollups

_BATCH = f"CREATE TEMPORARY TABLE IF NOT EXISTS spryng_batch ({_TYPED}) ON COMMIT DELETE ROWS"
_NAMES = ", ".join(COLUMNS)
# Every writer adds ids in their order: none ever waits for another one that waits for it.
_INSERT = f"""INSERT INTO messages ({_NAMES}) SELECT {_NAMES} FROM spryng_batch ORDER BY id
    ON CONFLICT (id) DO NOTHING RETURNING id"""
_INSERT_ONE = f"""INSERT INTO messages ({_NAMES}) VALUES ({", ".join("?" * len(COLUMNS))})
    ON CONFLICT (id) DO NOTHING RETURNING id"""
_INSERTED = """WITH counted AS (
        INSERT INTO writers AS w
        SELECT * FROM unnest(?::text[], ?::bigint[], ?::bigint[]) AS given (writer, last_sequence, messages) ORDER BY 1
        ON CONFLICT (writer) DO UPDATE SET last_sequence = greatest(w.last_sequence, excluded.last_sequence),
        messages = w.messages + excluded.messages
    ) INSERT INTO dirty SELECT unnest(?::bigint[])"""
_BUCKET = f"{{0}} - ({{0}} % {BUCKET_US} + {BUCKET_US}) % {BUCKET_US}"
_SET_COSTS = f"""WITH found AS (
        SELECT m.id, c.cost_pusd, c.price_version
        FROM unnest(?::text[], ?::bigint[], ?::text[]) AS c (id, cost_pusd, price_version)
        JOIN messages m ON m.id = c.id COLLATE "C" WHERE m.cost_pusd IS NULL ORDER BY m.id FOR UPDATE OF m
    ), changed AS (
        UPDATE messages m SET cost_pusd = f.cost_pusd, price_version = f.price_version
        FROM found f WHERE m.id = f.id AND m.cost_pusd IS NULL RETURNING m.timestamp_us, f.cost_pusd
    ) INSERT INTO dirty SELECT DISTINCT {_BUCKET.format("timestamp_us")} FROM changed WHERE cost_pusd IS NOT NULL"""
_KEEP_API_KEY = f"""INSERT INTO api_keys ({", ".join(API_KEY)}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
    SET {", ".join(f"{name} = excluded.{name}" for name in API_KEY)}"""
# Steps from bucket to bucket, however many rows say that one is dirty.
_DIRTY = """WITH RECURSIVE step AS (
        SELECT min(bucket_us) AS bucket_us FROM dirty WHERE bucket_us >= ?
        UNION ALL
        SELECT (SELECT min(d.bucket_us) FROM dirty d WHERE d.bucket_us > step.bucket_us)
        FROM step WHERE step.bucket_us < ?
    ) SELECT bucket_us FROM step WHERE bucket_us <= ? LIMIT ?"""
_ROLL_UP = f"""INSERT INTO rollups (bucket_us, {", ".join(FACTS)})
    SELECT {_BUCKET.format("m.first_us")}, min(m.first_us), max(m.last_us), {", ".join(f"m.{n}" for n in DIMENSIONS)},
    {", ".join(f"sum(m.{name})" for name in SUMS)}
    FROM ({{}}) m GROUP BY 1, {", ".join(f"m.{name}" for name in DIMENSIONS)}"""

_BUCKETS, _RANGES = 20_000, 200
"""Dirty buckets, and stretches of them, in one question; beyond that, all its messages are summed."""
_REFRESH_S = 1.0
"""How long a question makes rollups anew before it is answered."""
_COPY_FROM = 16
"""Messages from which on a COPY is faster than a statement for each."""
_CONNECTIONS = 10
"""Of a process to one ledger, at most."""
_REFUSED_S = 60.0
"""For how long rollups are left as they are, once the server has said that this user may only read."""
_QUESTION_S = 600.0
_CONNECT_S = 5.0
_GRACE_S = 1.0
"""How long the server may take to say that the time is over, before it is not waited for any more."""


_HARMLESS = (psycopg.DataError, psycopg.IntegrityError, errors.TransactionRollback)


class PostgresStore(SqlStore):
    """A ledger in the tables of a database.

    Args:
        url: as libpq takes it, with its parameters: postgresql://user@host/database?sslmode=verify-full
        create: whether tables that are not there are made (the pump) or are an error (reports).
    """

    has_tag = "? = ANY (m.tags)"
    each_tag = ("LEFT JOIN LATERAL unnest(m.tags) AS t (tag) ON true", "t.tag")
    # Text, which sorts in half the time of a ROW; with the key's length, it is of one customer and conversation only.
    conversation = "coalesce(length(m.key), -1) || ':' || coalesce(m.key, '') || m.conversation_id"

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._url = url
        self._place = without_secrets(url)
        self._create = create
        self._copies = True
        """False: the server has shown that it cannot COPY into a temporary table."""
        self._rolls_up_at = 0.0
        self._unshare()
        _stores.add(self)

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages*, each id once, in one transaction that is on the server's disk when this returns."""
        first: dict[str, Message] = {}
        for message in messages:
            first.setdefault(message.id, message)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._transaction(deadline) as db:
                    inserted = self._insert(db, sorted(first.values(), key=lambda message: message.id))
                    _count(db, [first[id] for id in inserted])
                    # Another transaction's, which has just been waited for, or those of long ago.
                    there = self._stored(db.ask, [id for id in first if id not in inserted])
                    if len(inserted) + len(there) < len(first):
                        raise _TryAgain(f"messages were deleted from {self._place} while they were recorded again")
                break
            except _TryAgain:
                if time.monotonic() >= deadline:
                    raise
        outcomes: list[Outcome] = []
        for message in messages:
            if message.id in inserted and message is first[message.id]:
                inserted.discard(message.id)
                outcomes.append("recorded")
            else:
                known = there.get(message.id) or first[message.id]
                outcomes.append("duplicate" if is_same(known, message) else "conflict")
        return Receipt(tuple(outcomes))

    def arrivals(self, after: str | None = None, where: Filter = Filter(), *, limit: int = 1_000) -> Page:  # noqa: B008
        """Messages in the order in which they were recorded, but for those that a transaction under way may precede.

        Transactions are numbered when they begin to write, and end in another order: a message is shown when none with
        a lower number can come any more. The numbers are those of one server: where a dump is restored on another,
        they are to be given anew, by UPDATE messages SET xact = DEFAULT.
        """
        mark = re.fullmatch(r"(\d{1,19})(?:_(\d{1,18}))?", after or "0")
        if mark is None:
            raise QueryError(f"after={after!r} is no mark of a page; take it from the page before")
        conditions, values = self._conditions(where)
        with self._reading() as ask:
            [[settled, newest]] = ask(
                "SELECT pg_snapshot_xmin(now)::text, pg_snapshot_xmax(now)::text FROM pg_current_snapshot() now", []
            )
            xact, serial = mark[1], int(mark[2] or 0)
            if int(xact) > int(newest):  # the ledger was made anew
                xact, serial = "0", 0
            order = "DESC" if after is None else "ASC"
            found = ask(
                f"SELECT {SELECT}, m.xact::text, m.serial FROM messages m WHERE {conditions} AND m.xact < ?::xid8 "
                f"AND (m.xact, m.serial) > (?::xid8, ?) ORDER BY m.xact {order}, m.serial {order} LIMIT ?",
                [*values, settled, xact, serial, limit],
            )
        rows = [stored_of(row[:-2]) for row in found]
        if after is None:
            rows.reverse()
        full = after is not None and len(found) == limit
        return Page(rows, f"{found[-1][-2]}_{found[-1][-1]}" if full else f"{settled}_0")

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        given: dict[str, Cost] = {}
        for cost in costs:
            if (known := given.get(cost.message_id)) is None or known.cost_usd is None:
                given[cost.message_id] = cost
        amounts = [pusd(cost.cost_usd) for cost in given.values()]
        self._write(_SET_COSTS, [list(given), amounts, [cost.price_version for cost in given.values()]])

    def keep_api_key(self, key: ApiKey) -> None:
        """Keep a key of the server, in place of one with the same id."""
        self._write(_KEEP_API_KEY, api_key_row(key))

    def roll_up(self, limit: int = 100) -> int:
        """Make the rollups of so many dirty buckets anew, the oldest first. Returns of how many; 0 if another does."""
        now = micros(datetime.now(timezone.utc))
        with self._transaction(time.monotonic() + _QUESTION_S, "REPEATABLE READ") as db:
            ended = now - BUCKET_US
            buckets = [bucket for (bucket,) in db.ask(_DIRTY, [-(2**63), ended, ended, limit])]
            # A rival that had the lock between our first look and now has deleted what we would: that is found out.
            if not buckets or not db.ask("SELECT pg_try_advisory_xact_lock(?)", [_ROLLING_UP])[0][0]:
                return 0
            db.ask("DELETE FROM dirty WHERE bucket_us = ANY (?)", [buckets])
            db.ask("DELETE FROM rollups WHERE bucket_us = ANY (?)", [buckets])
            facts, values = self._message_facts(Filter(), _merged(buckets))
            db.ask(_ROLL_UP.format(facts), values)
        return len(buckets)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be about to end
            self.close()

    def _insert(self, db: _Connection, messages: list[Message]) -> set[str]:
        """Add those that are not there. Returns their ids."""
        rows = [_array_row(message) for message in messages]
        if self._copies and len(rows) >= _COPY_FROM:
            try:
                db.ask(_BATCH, [])
                with db.cursor() as cursor, cursor.copy(f"COPY spryng_batch ({_NAMES}) FROM STDIN") as copy:
                    for row in rows:
                        copy.write_row(row)
            except (errors.FeatureNotSupported, errors.SyntaxError, errors.InsufficientPrivilege) as exc:
                self._copies = False
                raise _TryAgain(f"{self._place} takes no COPY into a temporary table") from exc
            return {id for (id,) in db.ask(_INSERT, [])}
        inserted: set[str] = set()
        if rows:
            with db.cursor() as cursor:
                cursor.executemany(_placeholders(_INSERT_ONE), rows, returning=True)
                more: bool | None = True
                while more:
                    inserted.update(id for (id,) in cursor.fetchall())
                    more = cursor.nextset()
        return inserted

    def _write(self, statement: str, values: Sequence[Any]) -> None:
        deadline = time.monotonic() + _CONNECT_S
        while True:
            try:
                with self._transaction(deadline) as db:
                    db.ask(statement, values)
                return
            except _TryAgain:
                if time.monotonic() >= deadline:
                    raise

    def _summing(self) -> AbstractContextManager[Ask]:
        until = time.monotonic() + _REFRESH_S
        try:
            while self._rolls_up_at <= time.monotonic() < until and self.roll_up():
                pass
        except _ReadOnlyError:
            self._rolls_up_at = until + _REFUSED_S
        except (StoreError, psycopg.Error):  # the question says what is wrong, if it is asked in vain, too
            pass
        return self._reading()

    @contextmanager
    def _reading(self) -> Iterator[Ask]:
        with self._transaction(time.monotonic() + _QUESTION_S, "REPEATABLE READ, READ ONLY") as db:
            # Distinct conversations are found by sorting them; compiling a question takes longer than it saves.
            db.run("SET LOCAL work_mem = '64MB'; SET LOCAL jit = off")
            yield db.ask

    def _facts(self, ask: Ask, where: Filter) -> SqlParts:
        """From rollups, but for what is dirty."""
        first = -(2**63) if where.since is None else micros(where.since)
        last = 2**63 - 1 if where.until is None else micros(where.until) - BUCKET_US
        # Only those that are in the question as a whole: what else it asks for comes from the messages anyhow.
        buckets = [bucket for (bucket,) in ask(_DIRTY, [first, last, last, _BUCKETS])]
        dirty = _merged(buckets)
        if len(buckets) == _BUCKETS or len(dirty) > _RANGES:
            return self._message_facts(where)
        return self._rolled_up(where, "rolled_up", dirty)

    def _stored(self, ask: Ask, ids: Sequence[str]) -> dict[str, Message]:
        if not ids:
            return {}
        columns = ", ".join(f"m.{name}" for name in COLUMNS)
        found = ask(f"SELECT {columns} FROM messages m WHERE m.id = ANY (?)", [list(ids)])
        return {row[0]: message_of(row) for row in found}

    # --- connections

    def _unshare(self) -> None:
        """Begin without connections; a forked child, too, whose locks may be held by threads that it does not have."""
        self._idle: deque[_Connection] = deque()
        self._free = threading.BoundedSemaphore(_CONNECTIONS)

    @contextmanager
    def _transaction(self, deadline: float, kind: str = "READ COMMITTED, READ WRITE") -> Iterator[_Connection]:
        """A transaction of its own, committed at the end; what goes wrong with the server is said as a StoreError."""
        free = self._free
        if not free.acquire(timeout=max(deadline - time.monotonic(), 0.01)):
            raise StoreBusyError(f"all {_CONNECTIONS} connections to {self._place} are at work. Try again.")
        try:
            with self._said():
                db = self._begun(deadline, kind)
                try:
                    yield db
                    db.run("COMMIT")
                except BaseException as exc:
                    self._back_out(db, exc)
                    raise
                self._idle.append(db)
        finally:
            free.release()

    def _begun(self, deadline: float, kind: str) -> _Connection:
        while True:
            try:
                db, used = self._idle.pop(), True
            except IndexError:
                db, used = self._connected(deadline), False
            left_ms = max(math.ceil((deadline - time.monotonic()) * 1000), 10)
            db.deadline = deadline + _GRACE_S
            try:
                # Settings are of this transaction only, for the sake of such poolers, too.
                db.run(
                    f"BEGIN ISOLATION LEVEL {kind}; SET LOCAL synchronous_commit = on; "
                    f"SET LOCAL statement_timeout = {left_ms}; SET LOCAL lock_timeout = {left_ms}; "
                    "SET LOCAL idle_in_transaction_session_timeout = 60000; SET LOCAL client_min_messages = warning"
                )
                return db
            except BaseException as exc:
                self._back_out(db, exc)
                if not used or not isinstance(exc, psycopg.OperationalError):
                    raise  # but one that lay idle while the server was started again is only replaced

    def _back_out(self, db: _Connection, exc: BaseException) -> None:
        """Undo a transaction. What it met may be so for every connection: a server that is another one by now."""
        with suppress(psycopg.Error, TimeoutError):
            if not isinstance(exc, psycopg.Error) or isinstance(exc, _HARMLESS):
                db.deadline = time.monotonic() + _GRACE_S
                if db.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    db.run("ROLLBACK")
                if db.info.transaction_status == TransactionStatus.IDLE:
                    self._idle.append(db)
                    return
        db.close()
        self.close()

    def _connected(self, deadline: float) -> _Connection:
        try:
            conninfo = make_conninfo(
                self._url,
                client_encoding="utf8",
                connect_timeout=min(max(2, math.ceil(deadline - time.monotonic())), 10),  # libpq waits for 2 s at least
            )
        except psycopg.Error:  # its text may have the password
            raise StoreError(f"{self._place} is no URL that PostgreSQL takes; check its parameters") from None
        # Nothing is prepared: a pooler in between may give each transaction another connection.
        db = _Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
        db.deadline = deadline + _GRACE_S
        _open.add(db)
        try:
            db.adapters.register_loader("json", TextLoader)
            self._prepare(db, deadline)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: _Connection, deadline: float) -> None:
        """See to it that the tables are there, and are such as this version knows."""
        version = self._version(db)
        if version == len(_MIGRATIONS):
            return
        if version == 0 and not self._create:
            raise StoreError(
                f"there is no ledger at {self._place} yet. Did anything record there? Is the database the right one?"
            )
        [[encoding]] = db.ask("SHOW server_encoding", [])
        if encoding != "UTF8":
            raise StoreError(
                f"{self._place} is a database in {encoding}, which cannot keep every text. Messages wait in the "
                "journal; make one with ENCODING 'UTF8'."
            )
        left_ms = max(math.ceil((deadline - time.monotonic()) * 1000), 10)
        db.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; SET LOCAL client_min_messages = warning; "
            f"SET LOCAL lock_timeout = {left_ms}; SET LOCAL statement_timeout = 0"
        )
        db.ask("SELECT pg_advisory_xact_lock(?)", [_MIGRATING])
        db.deadline = None  # it takes as long as it takes
        try:
            db.run("CREATE TABLE IF NOT EXISTS spryng_schema (version int PRIMARY KEY, since timestamptz NOT NULL)")
            for number in range(self._version(db), len(_MIGRATIONS)):  # asked again: another may have just done it
                for statement in _MIGRATIONS[number]:
                    db.run(statement)
                db.ask("INSERT INTO spryng_schema VALUES (?, now())", [number + 1])
        except (errors.DuplicateTable, errors.DuplicateObject) as exc:
            raise StoreNotOursError(
                f"{self._place} has tables of something else: {exc.diag.message_primary}. Messages wait in the "
                "journal; give the ledger a database of its own, or a schema: ?options=-csearch_path%3Dspryng"
            ) from exc
        db.run("COMMIT")
        db.deadline = deadline + _GRACE_S

    def _version(self, db: _Connection) -> int:
        """The schema's version, 0 where there is none; raises for one that this version must not touch."""
        if db.ask("SELECT to_regclass('spryng_schema')", []) == [(None,)]:
            return 0
        [[version]] = db.ask("SELECT coalesce(max(version), 0) FROM spryng_schema", [])
        if version > len(_MIGRATIONS):
            raise SchemaTooNewError(
                f"{self._place} has schema {version}, written by a newer spryng_instrument; this one knows "
                f"{len(_MIGRATIONS)}. Upgrade it: pip install -U spryng-instrument. Messages wait in the journal."
            )
        return int(version)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What goes wrong in here is said as a StoreError; but not what is wrong with a message."""
        try:
            yield
        except (psycopg.DataError, psycopg.IntegrityError, errors.ProgramLimitExceeded):
            raise  # a message that cannot be stored, not a server that takes none
        except (errors.DeadlockDetected, errors.SerializationFailure) as exc:
            raise _TryAgain(f"{self._place}: {_line(exc)} Try again.") from exc
        except (errors.QueryCanceled, errors.LockNotAvailable, errors.ConnectionTimeout, TimeoutError) as exc:
            raise StoreBusyError(f"{self._place} took too long: {_line(exc)} Messages wait in the journal.") from exc
        except (errors.ReadOnlySqlTransaction, errors.InsufficientPrivilege) as exc:
            raise _ReadOnlyError(
                f"{self._place}: {_line(exc)} Messages wait in the journal; give the URL's user the right to write."
            ) from exc
        except psycopg.Error as exc:
            raise StoreError(f"{self._place}: {_line(exc)} Messages wait in the journal.") from exc


def _line(exc: Exception) -> str:
    """What the server said, as one sentence."""
    said = " ".join(str(exc).split())
    return said if said.endswith((".", "?", "!")) else f"{said}."


class _TryAgain(StoreBusyError):
    """Nothing was done, and the same may work at once."""


class _ReadOnlyError(StoreError):
    """This user, or this server, may only be read."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for nothing beyond its deadline, though the server may be stopped or the network cut."""

    deadline: float | None = None

    def ask(self, question: str, values: Sequence[Any]) -> list[Any]:
        """Run a statement with ? for its values, and return its rows."""
        with self.cursor() as cursor:
            cursor.execute(_placeholders(question), list(values))
            return cursor.fetchall() if cursor.description else []

    def run(self, statements: str) -> None:
        """Run statements without values, in one message to the server."""
        self.execute(statements.encode())

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """As psycopg does, which resumes the generator every 0.1 s when nothing comes."""
        return super().wait(self._within(gen), *args, **kwargs)

    def _within(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and self.deadline is not None and time.monotonic() > self.deadline:
                    raise TimeoutError("no answer from the server")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


def _placeholders(question: str) -> bytes:
    return question.replace("%", "%%").replace("?", "%s").encode()


def _array_row(message: Message) -> tuple[Any, ...]:
    """The values of COLUMNS, with an array of tags."""
    row = row_of(message)
    return (*row[:_TAGS], list(message.tags), *row[_TAGS + 1 :])


_TAGS = COLUMNS.index("tags")


def _count(db: _Connection, new: list[Message]) -> None:
    """Say what was added: to whose numbers, and to which buckets."""
    numbers = numbers_of(new)
    buckets = {micros(message.timestamp) // BUCKET_US * BUCKET_US for message in new}
    if new:
        given = numbers.values()
        db.ask(_INSERTED, [list(numbers), [max(each) for each in given], [len(each) for each in given], list(buckets)])


def _merged(buckets: list[int]) -> list[tuple[int, int]]:
    """Stretches of time, from one moment up to another, of buckets in their order."""
    ranges: list[tuple[int, int]] = []
    for bucket in buckets:
        start = ranges.pop()[0] if ranges and ranges[-1][1] == bucket else bucket
        ranges.append((start, bucket + BUCKET_US))
    return ranges


# --- forks

_stores: weakref.WeakSet[PostgresStore] = weakref.WeakSet()
_open: weakref.WeakSet[_Connection] = weakref.WeakSet()
_leaked: list[_Connection] = []
"""Connections of the parent. They are neither used nor closed here, not even by the garbage collector."""


def _after_fork_in_child() -> None:
    """Let go of the parent's sockets without a word on them: or what the parent left open would last as long as we."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for db in list(_open):
        _leaked.append(db)
        with suppress(psycopg.Error, OSError):
            os.dup2(nothing, db.pgconn.socket, inheritable=False)
    os.close(nothing)
    _open.clear()
    for store in list(_stores):
        store._unshare()


os.register_at_fork(after_in_child=_after_fork_in_child)
