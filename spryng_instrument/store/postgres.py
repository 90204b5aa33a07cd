"""The ledger of many machines: tables in a PostgreSQL database, version 13 or newer, or in one that speaks like it.

Exactly once: a message's id is the primary key, and the row and its deduplication are one transaction, which the server
has on its disk before it is acknowledged. Rows are only ever added; later facts are the cost and its price version.

Rollups are of the messages, at every moment: who adds messages to a quarter of an hour also says in `dirty` that its
rollup is of the past. The next question makes it anew; until then that quarter is summed from its messages.

How the server is reached, and what it means if it is not, is the matter of `postgres_connections`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from typing import Any

from psycopg import errors

from spryng_instrument.errors import QueryError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.store.base import ApiKey, Cost, Filter, Outcome, Page, Receipt, Record
from spryng_instrument.store.books import OLD_COST, RECORD, SqlBooks, record_row
from spryng_instrument.store.postgres_connections import Connection, Connections, ReadOnlyError, TryAgain
from spryng_instrument.store.rows import (
    ADDED,
    COLUMNS,
    FIRST_USAGE,
    INTEGERS,
    JSON,
    REALS,
    SELECT,
    TEXTS,
    USAGE,
    first_known,
    is_same,
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
    UNBILLED,
    Ask,
    SqlParts,
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
            {", ".join(f"{name} {_TYPES[name]}" for name in COLUMNS if name not in ADDED)}, PRIMARY KEY (id),
            cost_pusd bigint, price_version text,
            model {_TEXT} GENERATED ALWAYS AS (coalesce(response_model, request_model)) STORED,
            reported boolean GENERATED ALWAYS AS (coalesce({", ".join(FIRST_USAGE)}) IS NOT NULL) STORED
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
    (
        f"""CREATE TABLE records (
            position bigserial PRIMARY KEY,
            id {_TEXT} NOT NULL UNIQUE, kind text NOT NULL, created_us bigint NOT NULL,
            key {_TEXT}, subject {_TEXT}, body json NOT NULL
        )""",
        "CREATE INDEX records_by_kind ON records (kind, subject)",
        f"""CREATE TABLE old_costs (
            message_id {_TEXT} NOT NULL, replaced_us bigint NOT NULL, cost_pusd bigint, price_version text
        )""",
        "CREATE INDEX old_costs_by_message ON old_costs (message_id)",
        f"CREATE INDEX messages_unbilled ON messages (timestamp_us) WHERE {UNBILLED}",
    ),
    (
        "ALTER TABLE messages ADD COLUMN costed_us bigint",
        *(f"ALTER TABLE messages ADD COLUMN {name} bigint" for name in ADDED),
        "CREATE INDEX records_in_order ON records (kind, position)",
    ),
    (
        # While an index is made, rollups are read and not written: who records has nothing to do with them.
        "CREATE INDEX rollups_by_time_and_key ON rollups (bucket_us, key)",
        "DROP INDEX rollups_by_time",
    ),
)
"""What brings a ledger from each version to the next. A migration that was released is never edited."""
_ROLLING_UP = 0x5350525902  # an advisory lock: one process at a time makes rollups; ...01 is for making the tables

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
        UPDATE messages m SET cost_pusd = f.cost_pusd, price_version = f.price_version,
        costed_us = CASE WHEN f.cost_pusd IS NOT NULL THEN ?::bigint END
        FROM found f WHERE m.id = f.id AND m.cost_pusd IS NULL RETURNING m.timestamp_us, f.cost_pusd
    ) INSERT INTO dirty SELECT DISTINCT {_BUCKET.format("timestamp_us")} FROM changed WHERE cost_pusd IS NOT NULL"""
_REPRICE = f"""WITH found AS (
        SELECT m.id, m.timestamp_us, m.cost_pusd AS old_pusd, m.price_version AS old_version,
        c.cost_pusd, c.price_version
        FROM unnest(?::text[], ?::bigint[], ?::text[]) AS c (id, cost_pusd, price_version)
        JOIN messages m ON m.id = c.id COLLATE "C" ORDER BY m.id FOR UPDATE OF m
    ), kept AS (
        INSERT INTO old_costs ({", ".join(OLD_COST)}) SELECT id, ?, old_pusd, old_version FROM found
    ), changed AS (
        UPDATE messages m SET cost_pusd = f.cost_pusd, price_version = f.price_version FROM found f WHERE m.id = f.id
    ) INSERT INTO dirty SELECT DISTINCT {_BUCKET.format("timestamp_us")} FROM found"""
_APPEND = f"INSERT INTO records ({', '.join(RECORD)}) VALUES ({', '.join('?' * len(RECORD))})"
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
_REFRESH_S, _STEP, _STEP_S = 1.0, 20, 10.0
"""How long a question makes rollups anew before it is answered; how many buckets at a time, and how long these may
take."""
_COPY_FROM = 16
"""Messages from which on a COPY is faster than a statement for each."""
_REFUSED_S = 60.0
"""For how long rollups are left as they are, once the server has said that this user may only read."""
_QUESTION_S = 600.0
_WRITE_S = 5.0


class PostgresStore(SqlBooks):
    """A ledger in the tables of a database.

    Args:
        url: as libpq takes it, with its parameters: postgresql://user@host/database?sslmode=verify-full
        create: whether tables that are not there are made (the pump) or are an error (reports).
    """

    among = "{} = ANY (?)"
    has_tag = "? = ANY (m.tags)"
    each_tag = ("LEFT JOIN LATERAL unnest(m.tags) AS t (tag) ON true", "t.tag")
    # Text, which sorts in half the time of a ROW; with the key's length, it is of one customer and conversation only.
    conversation = "coalesce(length(m.key), -1) || ':' || coalesce(m.key, '') || m.conversation_id"

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._connections = Connections(url, _MIGRATIONS, create=create)
        self._copies = True
        """False: the server has shown that it cannot COPY into a temporary table."""
        self._rolls_up_at = 0.0

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages*, each id once, in one transaction that is on the server's disk when this returns."""
        first: dict[str, Message] = {}
        for message in messages:
            first.setdefault(message.id, message)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._connections.transaction(deadline, urgent=True) as db:
                    inserted = self._insert(db, sorted(first.values(), key=lambda message: message.id))
                    _count(db, [first[id] for id in inserted])
                    # Another transaction's, which has just been waited for, or those of long ago.
                    there = self._stored(db.ask, [id for id in first if id not in inserted])
                    if len(inserted) + len(there) < len(first):
                        raise TryAgain(
                            f"messages were deleted from {self._connections.place} while they were recorded again"
                        )
                break
            except TryAgain:
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
        given = first_known(costs)
        amounts = [pusd(cost.cost_usd) for cost in given.values()]
        versions = [cost.price_version for cost in given.values()]
        self._write((_SET_COSTS, [list(given), amounts, versions, micros(datetime.now(timezone.utc))]))

    def reprice(self, costs: Sequence[Cost], document: Record | None = None) -> None:
        """Put these costs in place of those that are there, which are kept; and append what says so."""
        given = {cost.message_id: cost for cost in costs if cost.cost_usd is not None}
        versions = [cost.price_version for cost in given.values()]
        amounts = [pusd(cost.cost_usd) for cost in given.values()]
        repriced = (_REPRICE, [list(given), amounts, versions, micros(datetime.now(timezone.utc))])
        self._write(repriced, *([] if document is None else [(_APPEND, record_row(document))]))

    def append(self, records: Sequence[Record]) -> bool:
        """Append all of these, or none if the id of one is there already."""
        try:
            with self._connections.transaction(time.monotonic() + _WRITE_S) as db:
                for record in records:
                    db.ask(_APPEND, record_row(record))
        except errors.UniqueViolation:
            return False
        return True

    def keep_api_key(self, key: ApiKey) -> None:
        """Keep a key of the server, in place of one with the same id."""
        self._write((_KEEP_API_KEY, api_key_row(key)))

    def roll_up(self, limit: int = 100) -> int:
        """Make the rollups of so many dirty buckets anew, the oldest first. Returns of how many; 0 if another does."""
        return self._roll_up(limit, _QUESTION_S)

    def _roll_up(self, limit: int, timeout_s: float) -> int:
        now = micros(datetime.now(timezone.utc))
        with self._connections.transaction(time.monotonic() + timeout_s, "REPEATABLE READ") as db:
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
        self._connections.close()

    def _insert(self, db: Connection, messages: list[Message]) -> set[str]:
        """Add those that are not there. Returns their ids."""
        rows = [_array_row(message) for message in messages]
        if not self._copies or len(rows) < _COPY_FROM:
            return {id for (id,) in db.ask_each(_INSERT_ONE, rows)}
        try:
            db.ask(_BATCH, [])
            db.copy_in(f"COPY spryng_batch ({_NAMES}) FROM STDIN", rows)
        except (errors.FeatureNotSupported, errors.SyntaxError, errors.InsufficientPrivilege) as exc:
            self._copies = False
            raise TryAgain(f"{self._connections.place} takes no COPY into a temporary table") from exc
        return {id for (id,) in db.ask(_INSERT, [])}

    def _write(self, *work: tuple[str, Sequence[Any]]) -> None:
        """Run statements with their values, all or none."""
        deadline = time.monotonic() + _WRITE_S
        while True:
            try:
                with self._connections.transaction(deadline) as db:
                    for statement, values in work:
                        db.ask(statement, values)
                return
            except TryAgain:
                if time.monotonic() >= deadline:
                    raise

    def _summing(self) -> AbstractContextManager[Ask]:
        until = time.monotonic() + _REFRESH_S
        try:
            while self._rolls_up_at <= time.monotonic() < until and self._roll_up(_STEP, _STEP_S):
                pass
        except ReadOnlyError:
            self._rolls_up_at = until + _REFUSED_S
        except (StoreError, errors.Error):  # the question says what is wrong, if it is asked in vain, too
            pass
        return self._reading()

    @contextmanager
    def _reading(self, timeout_s: float | None = None) -> Iterator[Ask]:
        deadline = time.monotonic() + (_QUESTION_S if timeout_s is None else timeout_s)
        urgent = timeout_s is not None
        with self._connections.transaction(deadline, "REPEATABLE READ, READ ONLY", urgent=urgent) as db:
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
        return self._rolled_up(ask, where, dirty)

    def _place(self, key: str | None, buckets: Sequence[int]) -> SqlParts:
        return self.among.format("m.bucket_us"), [self._listed(buckets)]

    def _conditions(self, where: Filter, time: str = "m.timestamp_us") -> SqlParts:
        conditions, values = super()._conditions(where, time)
        if where.mark is not None:
            conditions += " AND pg_visible_in_snapshot(m.xact, ?::pg_snapshot)"
            values = [*values, where.mark]
        return conditions, values

    def _mark(self, ask: Ask) -> str:
        [[snapshot]] = ask("SELECT pg_current_snapshot()::text", [])
        return str(snapshot)


def _array_row(message: Message) -> tuple[Any, ...]:
    """The values of COLUMNS, with an array of tags."""
    row = row_of(message)
    return (*row[:_TAGS], list(message.tags), *row[_TAGS + 1 :])


_TAGS = COLUMNS.index("tags")


def _count(db: Connection, new: list[Message]) -> None:
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
