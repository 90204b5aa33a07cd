"""The embedded ledger: one SQLite file that any number of processes share.

Exactly once: a message's id is the primary key, and the row and its deduplication are one transaction, synced to disk
before it is acknowledged. A connection lives for one piece of work: none is ever carried over a fork, and a ledger that
was deleted or replaced meanwhile is noticed. Rows are only ever added; later facts are the cost and its price version.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from spryng_instrument.errors import SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.message import Message
from spryng_instrument.store.base import ApiKey, Cost, Filter, Page, Receipt, Record
from spryng_instrument.store.books import OLD_COST, RECORD, SqlBooks, record_row
from spryng_instrument.store.forks import unforked
from spryng_instrument.store.rows import (
    ADDED,
    COLUMNS,
    FIRST_USAGE,
    SELECT,
    first_known,
    micros,
    numbers_of,
    pusd,
    row_of,
    sort_out,
    stored_of,
)
from spryng_instrument.store.sql import (
    API_KEY,
    BUCKET_US,
    DIMENSIONS,
    SUMS,
    UNBILLED,
    Ask,
    SqlParts,
    api_key_row,
)

APPLICATION_ID = 0x53505259  # "SPRY", at offset 68 of the file
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        f"""CREATE TABLE messages (
            arrival INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            timestamp_us INTEGER NOT NULL,
            streamed INTEGER NOT NULL,
            tags TEXT NOT NULL,
            properties TEXT, tool_usage TEXT,
            key TEXT, conversation_id TEXT, query TEXT,
            operation TEXT NOT NULL, status TEXT NOT NULL,
            request_model TEXT, response_model TEXT, response_id TEXT, request_id TEXT,
            retries INTEGER, service_tier TEXT, host TEXT, error TEXT, http_status INTEGER,
            latency_ms REAL, time_to_first_token_ms REAL, call_site TEXT, writer TEXT, sequence INTEGER,
            {", ".join(f"{name} {'REAL' if name == 'seconds' else 'INTEGER'}" for name in FIRST_USAGE)},
            cost_pusd INTEGER, price_version TEXT,
            model TEXT GENERATED ALWAYS AS (coalesce(response_model, request_model)) VIRTUAL,
            reported INTEGER GENERATED ALWAYS AS (coalesce({", ".join(FIRST_USAGE)}) IS NOT NULL) VIRTUAL
        )""",
        "CREATE INDEX messages_by_time ON messages (timestamp_us, id)",
        "CREATE INDEX messages_by_key ON messages (key, timestamp_us, id)",
        "CREATE INDEX messages_by_conversation ON messages (conversation_id, timestamp_us)"
        " WHERE conversation_id IS NOT NULL",
        "CREATE INDEX messages_unattributed ON messages (call_site) WHERE key IS NULL",
        "CREATE INDEX messages_uncosted ON messages (price_version) WHERE cost_pusd IS NULL AND reported",
        """CREATE TABLE writers (
            writer TEXT PRIMARY KEY,
            last_sequence INTEGER NOT NULL,
            messages INTEGER NOT NULL
        ) WITHOUT ROWID""",
        f"""CREATE TABLE rollups (
            bucket_us INTEGER NOT NULL, first_us INTEGER NOT NULL, last_us INTEGER NOT NULL,
            {", ".join(f"{name} TEXT NOT NULL" for name in DIMENSIONS)},
            {", ".join(f"{name} INTEGER{'' if name.startswith('cost') else ' NOT NULL'}" for name in SUMS)},
            PRIMARY KEY (bucket_us, {", ".join(DIMENSIONS)})
        ) WITHOUT ROWID""",
        f"""CREATE VIEW rolled_up AS SELECT bucket_us, first_us, last_us,
            {", ".join(f"nullif({name}, char(0)) AS {name}" for name in DIMENSIONS)}, {", ".join(SUMS)} FROM rollups""",
        """CREATE TABLE api_keys (
            id TEXT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, scopes TEXT NOT NULL,
            created_us INTEGER NOT NULL, revoked_us INTEGER
        ) WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE records (
            position INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, created_us INTEGER NOT NULL,
            key TEXT, subject TEXT, body TEXT NOT NULL
        )""",
        "CREATE INDEX records_by_kind ON records (kind, subject)",
        """CREATE TABLE old_costs (
            message_id TEXT NOT NULL, replaced_us INTEGER NOT NULL, cost_pusd INTEGER, price_version TEXT
        )""",
        "CREATE INDEX old_costs_by_message ON old_costs (message_id)",
        f"CREATE INDEX messages_unbilled ON messages (timestamp_us) WHERE {UNBILLED}",
    ),
    (
        "ALTER TABLE messages ADD COLUMN costed_us INTEGER",
        *(f"ALTER TABLE messages ADD COLUMN {name} INTEGER" for name in ADDED),
        "CREATE INDEX records_in_order ON records (kind, position)",
    ),
)
"""What brings a ledger from each version to the next. A migration that was released is never edited."""

_INSERT = f"INSERT INTO messages ({', '.join(COLUMNS)}) VALUES "
_MARKS = f"({', '.join('?' * len(COLUMNS))})"
_ROWS = 250
"""Rows a statement: SQLite binds at most 32,766 values."""
_WRITER = """INSERT INTO writers VALUES (?, ?, ?) ON CONFLICT (writer) DO UPDATE SET
    last_sequence = max(last_sequence, excluded.last_sequence), messages = messages + excluded.messages"""
_ROLL_UP = f"""INSERT INTO rollups SELECT
    m.first_us - (m.first_us % {BUCKET_US} + {BUCKET_US}) % {BUCKET_US} AS bucket_us, min(m.first_us), max(m.last_us),
    {", ".join(f"coalesce(m.{name}, char(0)) AS {name}" for name in DIMENSIONS)},
    {", ".join(f"sum(m.{name})" if name.startswith("cost") else f"coalesce(sum(m.{name}), 0)" for name in SUMS)}
    FROM ({{}}) m WHERE 1 GROUP BY bucket_us, {", ".join(f"coalesce(m.{name}, char(0))" for name in DIMENSIONS)}
    ON CONFLICT DO UPDATE SET first_us = min(first_us, excluded.first_us), last_us = max(last_us, excluded.last_us),
    {", ".join(f"{name} = coalesce({name} + excluded.{name}, {name}, excluded.{name})" for name in SUMS)}"""
"""Adds facts to the rollups. char(0), which is in no text of ours, stands for none: NULLs are never alike."""
_NEW_COSTS = f"""SELECT m.timestamp_us AS first_us, m.timestamp_us AS last_us,
    {", ".join(f"m.{name}" for name in DIMENSIONS)},
    {", ".join(f"0 AS {name}" for name in SUMS if not name.startswith("cost") and name != "unpriced")},
    -(m.reported AND m.cost_pusd IS NULL) AS unpriced,
    (c.value ->> 1) / 1000000 - coalesce(m.cost_pusd / 1000000, 0) AS cost_e6,
    (c.value ->> 1) % 1000000 - coalesce(m.cost_pusd % 1000000, 0) AS cost_e12
    FROM json_each(?) c JOIN messages m ON m.id = c.value ->> 0 WHERE {{}}"""
"""What costs add to the rollups of messages that have had others, or none."""
_APPEND = f"INSERT INTO records ({', '.join(RECORD)}) VALUES ({', '.join('?' * len(RECORD))})"
T = TypeVar("T")
_BUSY_S = 0.2
"""How long one connection waits for a locked ledger: a fork must wait for it."""


class SqliteStore(SqlBooks):
    """A ledger in one file.

    Args:
        path: the file; made, with its folder, by the first write.
        create: whether a ledger that is not there is made (the pump) or is an error (reports).
    """

    among = "{} IN (SELECT value FROM json_each(?))"
    has_tag = "EXISTS (SELECT 1 FROM json_each(m.tags) WHERE value = ?)"
    each_tag = ("LEFT JOIN json_each(m.tags) t ON 1", "t.value")
    conversation = "json_array(m.key, m.conversation_id)"
    # As the view of this name has them; and the key as it stands, which the primary key finds in a bucket.
    rolled_up = f"""(SELECT bucket_us, first_us, last_us, key AS owner,
        {", ".join(f"nullif({name}, char(0)) AS {name}" for name in DIMENSIONS)}, {", ".join(SUMS)} FROM rollups)"""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self._create = create

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages*, each id once, in one transaction that is on the disk when this returns."""
        return self._write(partial(self._record, messages), timeout_s)

    def _record(self, messages: Sequence[Message], db: sqlite3.Connection) -> Receipt:
        new, outcomes = sort_out(messages, self._stored(_asking(db), [message.id for message in messages]))
        [[newest]] = db.execute("SELECT coalesce(max(arrival), 0) FROM messages").fetchall()
        rows = [row_of(message) for message in new.values()]
        # Many rows a statement: each statement gives up the interpreter's lock, and may wait 5 ms to have it back.
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            db.execute(_INSERT + ", ".join([_MARKS] * len(some)), [value for row in some for value in row])
        for writer, given in numbers_of(new.values()).items():
            db.execute(_WRITER, (writer, max(given), len(given)))
        facts, values = self._message_facts(Filter())
        db.execute(_ROLL_UP.format(f"{facts} AND m.arrival > ?"), [*values, newest])
        return Receipt(tuple(outcomes))

    def arrivals(self, after: str | None = None, where: Filter = Filter(), *, limit: int = 1_000) -> Page:  # noqa: B008
        """Messages in the order in which they were recorded."""
        conditions, values = self._conditions(where)
        with self._connect() as db, _transaction(db, "DEFERRED"):
            newest = db.execute("SELECT coalesce(max(arrival), 0) FROM messages").fetchone()[0]
            start = 0 if after is None else int(after)
            if start > newest:  # the ledger was made anew
                start = 0
            order = "DESC" if after is None else "ASC"
            found = db.execute(
                f"SELECT {SELECT}, m.arrival FROM messages m WHERE {conditions} AND m.arrival > ? "
                f"ORDER BY m.arrival {order} LIMIT ?",
                [*values, start, limit],
            ).fetchall()
        rows = [stored_of(row[:-1]) for row in found]
        if after is None:
            rows.reverse()
        return Page(rows, str(found[-1][-1] if after is not None and len(found) == limit else newest))

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        known = first_known(costs)

        def set_first(db: sqlite3.Connection) -> None:  # when they were set is when the ledger is ours
            self._set_costs(db, known, "cost_pusd IS NULL", micros(datetime.now(timezone.utc)))

        self._write(set_first)

    def reprice(self, costs: Sequence[Cost], document: Record | None = None) -> None:
        """Put these costs in place of those that are there, which are kept; and append what says so."""
        known = {cost.message_id: cost for cost in costs if cost.cost_usd is not None}
        ids = msgspec.json.encode(list(known)).decode()

        def reprice(db: sqlite3.Connection) -> None:
            db.execute(
                f"INSERT INTO old_costs ({', '.join(OLD_COST)}) SELECT m.id, ?, m.cost_pusd, m.price_version "
                "FROM json_each(?) c JOIN messages m ON m.id = c.value",
                (micros(datetime.now(timezone.utc)), ids),
            )
            self._set_costs(db, known, "1")
            if document is not None:
                db.execute(_APPEND, record_row(document))

        self._write(reprice)

    def _set_costs(
        self, db: sqlite3.Connection, costs: dict[str, Cost], condition: str, first_us: int | None = None
    ) -> None:
        """Set costs where *condition* holds; *first_us* is when, if these are the first ones."""
        found = [(pusd(cost.cost_usd), cost.price_version, id) for id, cost in costs.items()]
        known = {id: amount for amount, _, id in found if amount is not None}
        added = _NEW_COSTS.format(condition)
        db.execute(_ROLL_UP.format(added), [msgspec.json.encode(list(known.items())).decode()])
        db.executemany(
            "UPDATE messages SET costed_us = coalesce(?, costed_us), cost_pusd = ?, price_version = ? "
            f"WHERE id = ? AND {condition}",
            [(None if each[0] is None else first_us, *each) for each in found],
        )

    def append(self, records: Sequence[Record]) -> bool:
        """Append all of these, or none if the id of one is there already."""
        rows = [record_row(record) for record in records]
        try:
            self._write(lambda db: db.executemany(_APPEND, rows))
        except sqlite3.IntegrityError:
            return False
        return True

    def keep_api_key(self, key: ApiKey) -> None:
        """Keep a key of the server, in place of one with the same id."""
        statement = f"REPLACE INTO api_keys ({', '.join(API_KEY)}) VALUES (?, ?, ?, ?, ?, ?)"
        self._write(lambda db: db.execute(statement, api_key_row(key)))

    def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _reading(self, timeout_s: float | None = None) -> Iterator[Ask]:
        with self._connect(5.0 if timeout_s is None else timeout_s) as db, _transaction(db, "DEFERRED"):
            yield _asking(db)

    def _facts(self, ask: Ask, where: Filter) -> SqlParts:
        return self._rolled_up(ask, where)

    def _place(self, key: str | None, buckets: Sequence[int]) -> SqlParts:
        place = f"{self.among.format('m.bucket_us')} AND m.owner = coalesce(?, char(0))"
        return place, [self._listed(buckets), key]

    def _conditions(self, where: Filter, time: str = "m.timestamp_us") -> SqlParts:
        conditions, values = super()._conditions(where, time)
        if where.mark is not None:
            conditions, values = f"{conditions} AND m.arrival <= ?", [*values, int(where.mark)]
        return conditions, values

    def _mark(self, ask: Ask) -> str:
        [[newest]] = ask("SELECT coalesce(max(arrival), 0) FROM messages", [])
        return str(newest)

    def _listed(self, values: Sequence[Any]) -> str:
        return msgspec.json.encode(values).decode()

    def _write(self, change: Callable[[sqlite3.Connection], T], timeout_s: float = 5.0) -> T:
        """Make a change in one transaction. It waits that long for a locked ledger, with a new connection each time."""
        started = time.monotonic()
        while True:
            left = started + timeout_s - time.monotonic()
            try:
                with self._connect(min(max(left, 0.01), _BUSY_S), started) as db, _transaction(db):
                    return change(db)
            except StoreBusyError:
                if left <= _BUSY_S:
                    raise
                time.sleep(0.005)

    @contextmanager
    def _connect(self, timeout_s: float = 5.0, started: float | None = None) -> Iterator[sqlite3.Connection]:
        """A connection to this ledger, made and migrated as needed; what goes wrong is said as a StoreError."""
        started = time.monotonic() if started is None else started
        try:
            if not self._create and not self.path.exists():
                raise StoreError(f"there is no ledger at {self.path}. Did anything record there yet? Try: spryng demo")
            # A log that a deleted ledger left beside it is removed by SQLite itself, when it finds the new file empty.
            mode = "rwc" if self._create else "rw" if os.access(self.path, os.W_OK) else "ro"
            with unforked():
                if self._create:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                url = f"{self.path.resolve().as_uri()}?mode={mode}"
                with closing(sqlite3.connect(url, uri=True, timeout=timeout_s, isolation_level=None)) as db:
                    self._prepare(db, time.monotonic() + timeout_s)
                    opened = os.stat(self.path)
                    yield db
            if self._create and not _is_same(self.path, opened):
                raise StoreError(f"{self.path} was deleted or replaced while it was written; it is made again")
        except sqlite3.OperationalError as exc:
            if _is_busy(exc):
                raise StoreBusyError(
                    f"{self.path} stayed locked for {time.monotonic() - started:.1f} s by another process. Messages "
                    "wait in the journal; close what holds the ledger open in a transaction."
                ) from exc
            raise StoreError(
                f"{self.path}: {exc}. Messages wait in the journal; check the disk and its rights."
            ) from exc
        except (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError):
            raise  # a message that cannot be stored, not a ledger that cannot be written
        except sqlite3.DatabaseError as exc:
            raise StoreNotOursError(
                f"{self.path} is no ledger of spryng_instrument, or is corrupt: {exc}. Messages wait in the journal; "
                "move that file away or choose another destination, and a new ledger is made."
            ) from exc
        except OSError as exc:
            raise StoreError(f"{self.path}: {exc.strerror or exc}. Messages wait in the journal.") from exc

    def _prepare(self, db: sqlite3.Connection, until: float) -> None:
        version = self._version(db)
        if version < len(_MIGRATIONS):
            if version == 0 and not self._create:
                raise StoreError(f"{self.path} is an empty file, no ledger yet")
            _keep_log(db, until)
            with _transaction(db):
                for step in _MIGRATIONS[self._version(db) :]:  # asked again: another process may have just done it
                    for statement in step:
                        db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
        db.execute("PRAGMA synchronous = FULL")

    def _version(self, db: sqlite3.Connection) -> int:
        """The schema's version, 0 for an empty file; raises for what this version must not touch."""
        # In one transaction: another process may be making the ledger.
        with nullcontext() if db.in_transaction else _transaction(db, "DEFERRED"):
            application, version, tables = (
                db.execute(question).fetchone()[0]
                for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
        if application != APPLICATION_ID and (application or version or tables):
            raise StoreNotOursError(
                f"{self.path} is a SQLite file of something else. Choose another destination. "
                "Messages wait in the journal."
            )
        if version > len(_MIGRATIONS):
            raise SchemaTooNewError(
                f"{self.path} has schema {version}, written by a newer spryng_instrument; this one knows "
                f"{len(_MIGRATIONS)}. Upgrade it: pip install -U spryng-instrument. Messages wait in the journal."
            )
        return int(version)


def _asking(db: sqlite3.Connection) -> Ask:
    return lambda question, values: db.execute(question, values).fetchall()


def _keep_log(db: sqlite3.Connection, until: float) -> None:
    """Have the ledger keep a write-ahead log. For others who do the same at the moment, SQLite itself does not wait."""
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if not _is_busy(exc) or time.monotonic() >= until:
                raise
            time.sleep(0.005)


def _is_busy(exc: sqlite3.OperationalError) -> bool:
    """Whether another process has the ledger, and nothing is wrong with it."""
    return "locked" in str(exc) or "busy" in str(exc)


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _is_same(path: Path, opened: os.stat_result) -> bool:
    try:
        now = os.stat(path)
    except OSError:
        return False
    return (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
