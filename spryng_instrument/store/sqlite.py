"""The embedded ledger: one SQLite file that any number of processes share.

Exactly once: a message's id is the primary key, and the row and its deduplication are one transaction, synced to disk
before it is acknowledged. A connection lives for one piece of work: none is ever carried over a fork, and a ledger that
was deleted or replaced meanwhile is noticed. Rows are only ever added; later facts are the cost and its price version.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from spryng_instrument.errors import (
    QueryError,
    SchemaTooNewError,
    StoreBusyError,
    StoreError,
    StoreNotOursError,
)
from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import (
    COST_UNIT,
    GROUPS,
    Cost,
    Filter,
    Health,
    Page,
    Receipt,
    StoredMessage,
    UsageRow,
    zone_of,
)
from spryng_instrument.store.forks import unforked

APPLICATION_ID = 0x53505259  # "SPRY", at offset 68 of the file
_USAGE = Usage.__struct_fields__
_PLAIN = (
    "key", "conversation_id", "query", "operation", "status", "request_model", "response_model", "response_id",
    "request_id", "retries", "service_tier", "host", "error", "http_status", "latency_ms", "time_to_first_token_ms",
    "call_site", "writer", "sequence",
)  # fmt: skip
_COLUMNS = ("id", "timestamp_us", "streamed", "tags", "properties", "tool_usage", *_PLAIN, *_USAGE)

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
            {", ".join(f"{name} {'REAL' if name == 'seconds' else 'INTEGER'}" for name in _USAGE)},
            cost_pusd INTEGER, price_version TEXT,
            model TEXT GENERATED ALWAYS AS (coalesce(response_model, request_model)) VIRTUAL,
            reported INTEGER GENERATED ALWAYS AS (coalesce({", ".join(_USAGE)}) IS NOT NULL) VIRTUAL
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
    ),
)
"""What brings a ledger from each version to the next. A migration that was released is never edited."""

_INSERT = f"INSERT INTO messages ({', '.join(_COLUMNS)}) VALUES "
_MARKS = f"({', '.join('?' * len(_COLUMNS))})"
_ROWS = 250
"""Rows a statement: SQLite binds at most 32,766 values."""
_WRITER = """INSERT INTO writers VALUES (?, ?, ?) ON CONFLICT (writer) DO UPDATE SET
    last_sequence = max(last_sequence, excluded.last_sequence), messages = messages + excluded.messages"""
_BILLABLE = "m.status IN ('ok', 'incomplete')"
_CONVERSATION = "json_array(m.key, m.conversation_id)"
_SUMS = f"""count(*) FILTER (WHERE {_BILLABLE}),
    count(DISTINCT CASE WHEN {_BILLABLE} AND m.conversation_id IS NOT NULL THEN {_CONVERSATION} END),
    count(*) FILTER (WHERE m.status = 'error'),
    count(*) FILTER (WHERE m.status = 'cancelled'),
    count(*) FILTER (WHERE {_BILLABLE} AND NOT m.reported),
    count(*) FILTER (WHERE m.reported AND m.cost_pusd IS NULL),
    coalesce(sum(m.input_tokens), 0), coalesce(sum(m.cached_tokens), 0),
    coalesce(sum(m.output_tokens), 0), coalesce(sum(m.reasoning_tokens), 0),
    sum(m.cost_pusd / 1000000), sum(m.cost_pusd % 1000000)"""
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
_BUSY_S = 0.2
"""How long one connection waits for a locked ledger: a fork must wait for it."""


class SqliteStore:
    """A ledger in one file.

    Args:
        path: the file; made, with its folder, by the first write.
        create: whether a ledger that is not there is made (the pump) or is an error (reports).
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True) -> None:
        self.path = Path(path)
        self._create = create

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages*, each id once, in one transaction that is on the disk when this returns."""
        started = time.monotonic()
        while True:
            left = started + timeout_s - time.monotonic()
            try:
                return self._record(messages, min(max(left, 0.01), _BUSY_S), started)
            except StoreBusyError:
                if left <= _BUSY_S:
                    raise
                time.sleep(0.005)

    def _record(self, messages: Sequence[Message], timeout_s: float, started: float) -> Receipt:
        new: dict[str, Message] = {}
        conflicts: list[Message] = []
        with self._connect(timeout_s, started) as db, _transaction(db):
            there = self._stored(db, [message.id for message in messages])
            for message in messages:
                known = there.get(message.id) or new.setdefault(message.id, message)
                if known != message and _row(known) != _row(message):  # a usage that says nothing is stored as none
                    conflicts.append(message)
            rows = [_row(message) for message in new.values()]
            # Many rows a statement: each statement gives up the interpreter's lock, and may wait 5 ms to have it back.
            for start in range(0, len(rows), _ROWS):
                some = rows[start : start + _ROWS]
                db.execute(_INSERT + ", ".join([_MARKS] * len(some)), [value for row in some for value in row])
            numbers: dict[str, list[int]] = {}
            for message in new.values():
                if message.writer is not None:
                    numbers.setdefault(message.writer, []).append(message.sequence or 0)
            for writer, given in numbers.items():
                db.execute(_WRITER, (writer, max(given), len(given)))
        return Receipt(len(new), len(messages) - len(new) - len(conflicts), tuple(conflicts))

    def usage(self, by: str, where: Filter = Filter(), *, zone: str = "UTC") -> list[UsageRow]:  # noqa: B008
        """Usage by one of GROUPS, in the order of the group's name, "none" first."""
        with self._connect() as db:
            return _usage(db, by, where, zone)

    def total(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        """The same over all messages, each counted once."""
        with self._connect() as db:
            return _total(db, where)

    def usage_and_total(
        self,
        by: str,
        where: Filter = Filter(),  # noqa: B008
        *,
        zone: str = "UTC",
    ) -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment, whatever is recorded meanwhile."""
        with self._connect() as db, _transaction(db, "DEFERRED"):
            return _usage(db, by, where, zone), _total(db, where)

    def messages(self, where: Filter = Filter(), *, after: str | None = None, limit: int = 50) -> Page:  # noqa: B008
        """Messages, newest first."""
        conditions, values = _conditions(where)
        if after is not None:
            mark = re.fullmatch(r"(-?\d{1,18})_(\S+)", after)
            if mark is None:
                raise QueryError(f"after={after!r} is no mark of a page; take it from the page before")
            values += [int(mark[1]), mark[2]]
            conditions += " AND (m.timestamp_us, m.id) < (?, ?)"
        with self._connect() as db:
            found = db.execute(
                f"SELECT {_SELECT}, cost_pusd, price_version FROM messages m {conditions} "
                "ORDER BY m.timestamp_us DESC, m.id DESC LIMIT ?",
                [*values, limit + 1],
            ).fetchall()
        rows = [StoredMessage(_message(row[:-2]), _cost(row[-2]), row[-1]) for row in found[:limit]]
        more = len(found) > limit and limit > 0
        return Page(rows, f"{found[limit - 1][1]}_{found[limit - 1][0]}" if more else None)

    def arrivals(self, after: str | None = None, where: Filter = Filter(), *, limit: int = 1_000) -> Page:  # noqa: B008
        """Messages in the order in which they were recorded."""
        conditions, values = _conditions(where)
        with self._connect() as db, _transaction(db, "DEFERRED"):
            newest = db.execute("SELECT coalesce(max(arrival), 0) FROM messages").fetchone()[0]
            start = 0 if after is None else int(after)
            if start > newest:  # the ledger was made anew
                start = 0
            order = "DESC" if after is None else "ASC"
            found = db.execute(
                f"SELECT {_SELECT}, cost_pusd, price_version, arrival FROM messages m {conditions} AND m.arrival > ? "
                f"ORDER BY m.arrival {order} LIMIT ?",
                [*values, start, limit],
            ).fetchall()
        rows = [StoredMessage(_message(row[:-3]), _cost(row[-3]), row[-2]) for row in found]
        if after is None:
            rows.reverse()
        return Page(rows, str(found[-1][-1] if after is not None and len(found) == limit else newest))

    def unpriced(self, price_version: str, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at."""
        with self._connect() as db:
            rows = db.execute(
                f"SELECT {_SELECT} FROM messages m WHERE m.cost_pusd IS NULL AND m.reported "
                "AND m.price_version IS NOT ? LIMIT ?",
                (price_version, limit),
            )
            return [_message(row) for row in rows]

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        with self._connect() as db, _transaction(db):
            db.executemany(
                "UPDATE messages SET cost_pusd = ?, price_version = ? WHERE id = ? AND cost_pusd IS NULL",
                [
                    (None if cost.cost_usd is None else int(cost.cost_usd / COST_UNIT), cost.price_version,
                     cost.message_id)
                    for cost in costs
                ],
            )  # fmt: skip

    def health(self) -> Health:
        """Gaps, messages without a key, models without a price."""
        with self._connect() as db:
            messages, writers = db.execute("SELECT (SELECT count(*) FROM messages), count(*) FROM writers").fetchone()
            gaps = db.execute("SELECT * FROM writers WHERE last_sequence <> messages ORDER BY writer").fetchall()
            unattributed = db.execute(
                "SELECT coalesce(call_site, '(unknown)'), count(*) FROM messages WHERE key IS NULL "
                "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100"
            ).fetchall()
            unpriced = db.execute(
                "SELECT coalesce(model, '(unknown)'), count(*) FROM messages WHERE cost_pusd IS NULL AND reported "
                "GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100"
            ).fetchall()
        return Health(messages, writers, tuple(gaps), tuple(unattributed), tuple(unpriced))

    def missing(self, writer: str, last_sequence: int) -> list[int]:
        """The numbers up to *last_sequence* of a writer that are not in the ledger."""
        with self._connect() as db:
            rows = db.execute("SELECT sequence FROM messages WHERE writer = ?", (writer,))
            return sorted(set(range(1, last_sequence + 1)) - {sequence for (sequence,) in rows})

    def _stored(self, db: sqlite3.Connection, ids: Sequence[str]) -> dict[str, Message]:
        found = db.execute(
            f"SELECT {_SELECT} FROM messages m WHERE m.id IN (SELECT value FROM json_each(?))",
            (msgspec.json.encode(ids).decode(),),
        )
        return {row[0]: _message(row) for row in found}

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
                    self._prepare(db)
                    opened = os.stat(self.path)
                    yield db
            if self._create and not _is_same(self.path, opened):
                raise StoreError(f"{self.path} was deleted or replaced while it was written; it is made again")
        except sqlite3.OperationalError as exc:
            if "locked" in str(exc) or "busy" in str(exc):
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

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = self._version(db)
        if version < len(_MIGRATIONS):
            if version == 0 and not self._create:
                raise StoreError(f"{self.path} is an empty file, no ledger yet")
            db.execute("PRAGMA journal_mode = WAL")
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


_SELECT = ", ".join(f"m.{name}" for name in _COLUMNS)


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


def _row(message: Message) -> tuple[Any, ...]:
    usage = message.usage
    return (
        message.id,
        (message.timestamp - _EPOCH) // _MICROSECOND,
        message.streamed,
        msgspec.json.encode(message.tags).decode(),
        None if message.properties is None else msgspec.json.encode(message.properties).decode(),
        None if message.tool_usage is None else msgspec.json.encode(message.tool_usage).decode(),
        *[getattr(message, name) for name in _PLAIN],
        *([None] * len(_USAGE) if usage is None else [getattr(usage, name) for name in _USAGE]),
    )


def _message(row: Sequence[Any]) -> Message:
    values = dict(zip(_COLUMNS, row, strict=True))
    counts = {name: values.pop(name) for name in _USAGE}
    properties, tool_usage = values.pop("properties"), values.pop("tool_usage")
    return Message(
        timestamp=_EPOCH + timedelta(microseconds=values.pop("timestamp_us")),
        streamed=bool(values.pop("streamed")),
        tags=msgspec.json.decode(values.pop("tags"), type=tuple[str, ...]),
        properties=None if properties is None else msgspec.json.decode(properties),
        tool_usage=None if tool_usage is None else msgspec.json.decode(tool_usage),
        usage=Usage(**counts) if any(count is not None for count in counts.values()) else None,
        **values,
    )


def _cost(pusd: int | None) -> Decimal | None:
    return None if pusd is None else pusd * COST_UNIT


def _usage_row(row: Sequence[Any]) -> UsageRow:
    *counts, dollars_e6, dollars_e12 = row
    # Summed in two parts, so that no sum of costs overflows 64 bits.
    cost = None if dollars_e6 is None else (dollars_e6 * 1_000_000 + dollars_e12) * COST_UNIT
    return UsageRow(*(*counts, cost))


def _usage(db: sqlite3.Connection, by: str, where: Filter, zone: str) -> list[UsageRow]:
    if by not in GROUPS:
        raise QueryError(f"usage cannot be grouped by {by!r}; choose one of: {', '.join(GROUPS)}")
    conditions, values = _conditions(where)
    if by in ("day", "month"):
        periods = _periods(db, conditions, values, by, zone)
        if not periods:
            return []
        source = (
            "WITH p AS (SELECT json_extract(value, '$[0]') AS label, json_extract(value, '$[1]') AS start, "
            f"json_extract(value, '$[2]') AS stop FROM json_each(?)) SELECT p.label, NULL, {_SUMS} FROM p "
            f"CROSS JOIN messages m ON m.timestamp_us >= p.start AND m.timestamp_us < p.stop {conditions} "
            "GROUP BY p.label ORDER BY p.label"
        )
        values = [msgspec.json.encode(periods).decode(), *values]
    elif by == "tag":
        source = (
            f"SELECT t.value, NULL, {_SUMS} FROM messages m LEFT JOIN json_each(m.tags) t ON 1 {conditions} "
            "GROUP BY t.value ORDER BY t.value"
        )
    else:
        column = {"key": "m.key", "model": "m.model", "conversation": "m.conversation_id"}[by]
        owner = "m.key" if by == "conversation" else "NULL"
        source = (
            f"SELECT {column}, {owner}, {_SUMS} FROM messages m {conditions} "
            f"GROUP BY {column}, {owner} ORDER BY {owner}, {column}"
        )
    return [_usage_row(row) for row in db.execute(source, values)]


def _total(db: sqlite3.Connection, where: Filter) -> UsageRow:
    conditions, values = _conditions(where)
    return _usage_row(db.execute(f"SELECT NULL, NULL, {_SUMS} FROM messages m {conditions}", values).fetchone())


def _conditions(where: Filter) -> tuple[str, list[Any]]:
    parts: list[str] = ["1"]
    values: list[Any] = []
    for column, value in (("key", where.key), ("model", where.model), ("conversation_id", where.conversation_id)):
        if value is not None:
            parts.append(f"m.{column} = ?")
            values.append(value)
    if where.no_key:
        parts.append("m.key IS NULL")
    for tag in where.tags:
        parts.append("EXISTS (SELECT 1 FROM json_each(m.tags) WHERE value = ?)")
        values.append(tag)
    for comparison, moment in ((">=", where.since), ("<", where.until)):
        if moment is not None:
            parts.append(f"m.timestamp_us {comparison} ?")
            values.append((moment - _EPOCH) // _MICROSECOND)
    return "WHERE " + " AND ".join(parts), values


def _periods(
    db: sqlite3.Connection, conditions: str, values: list[Any], by: str, zone: str
) -> list[tuple[str, int, int]]:
    """(label, start, stop) in microseconds of every day or month, in the zone, that may hold one of the messages."""
    tz = zone_of(zone)
    first, last = db.execute(
        f"SELECT min(m.timestamp_us), max(m.timestamp_us) FROM messages m {conditions}", values
    ).fetchone()
    if first is None:
        return []
    local = (_EPOCH + timedelta(microseconds=first)).astimezone(tz)
    day = local.date() if by == "day" else local.date().replace(day=1)
    periods = []
    start = None
    while True:
        following = day + timedelta(days=1) if by == "day" else (day + timedelta(days=32)).replace(day=1)
        begin = _midnight_us(day, tz) if start is None else start
        start = _midnight_us(following, tz)
        periods.append((day.isoformat() if by == "day" else f"{day:%Y-%m}", begin, start))
        if start > last:
            return periods
        day = following


def _midnight_us(day: Any, tz: tzinfo) -> int:
    return (datetime(day.year, day.month, day.day, tzinfo=tz).astimezone(timezone.utc) - _EPOCH) // _MICROSECOND
