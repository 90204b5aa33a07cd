"""The ledger for many machines: ClickHouse, on one node or on a cluster.

Exactly once: ClickHouse knows no transactions and no unique keys, so an id may be written twice, by writers of the same
moment or by an insert whose answer was lost. Every question is therefore put to `messages FINAL`, which shows one row
of each id, and nothing is ever counted on the way in: no counters, no views that sum. All rows of an id lie in one
partition (it is made from the id) and on one shard, so FINAL needs to compare nothing beyond these.

Which row of an id is shown is its version: the first one written; one that a price was looked up for in vain instead of
that, the latest such; and the first one with a cost instead of all others, for ever.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, tzinfo
from functools import partial
from itertools import count
from math import ceil
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import clickhouse_connect
import msgspec
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httpclient import HttpClient
from clickhouse_connect.driver.httputil import get_pool_manager
from urllib3 import Timeout
from urllib3.exceptions import HTTPError

from spryng_instrument.errors import QueryError, SchemaTooNewError, SettingsError, StoreError, StoreNotOursError
from spryng_instrument.message import Message
from spryng_instrument.periods import period_of, zone_of
from spryng_instrument.settings import without_secrets
from spryng_instrument.store.base import GROUPS, ApiKey, Cost, Filter, Page, Receipt, Record, UsageRow
from spryng_instrument.store.books import RECORD, SqlBooks, record_row
from spryng_instrument.store.rows import (
    ADDED,
    COLUMNS,
    INTEGERS,
    JSON,
    SELECT,
    TEXTS,
    USAGE,
    first_known,
    message_of,
    micros,
    moment,
    pusd,
    row_of,
    sort_out,
    stored_of,
)
from spryng_instrument.store.sql import (
    API_KEY,
    IS_BILLABLE,
    Ask,
    SqlParts,
    api_key_row,
    order_of,
    usage_row,
    within,
)

SCHEMA = 3
_REQUIRED = ("operation", "status")
_FEW = ("operation", "status", "request_model", "response_model", "service_tier", "host", "error")
"""Texts with few values: kept as numbers of a dictionary."""
_NOW = "toUnixTimestamp64Micro(now64(6))"
_VERSION = {"new": f"{2**60} - {_NOW}", "looked at": f"{2**60} + {_NOW}", "priced": f"{2**62} - {_NOW}"}
_REPRICED = f"{2**62} + {_NOW}"
"""Of a row. Of equal ones, which would be written in the same microsecond, ClickHouse shows the one that came last."""
_EACH_TAG = "ARRAY JOIN arrayConcat({}, arrayMap(tag -> (false, tag), if(empty(m.tags), [NULL], m.tags))) AS tag"
_WHOLE = "[(true, CAST(NULL, 'Nullable(String)'))]"
_DAY_US = 86_400_000_000
_READ_S = 300.0
_SETTINGS: dict[str, Any] = {
    "do_not_merge_across_partitions_select_final": 1,
    "use_skip_indexes_if_final": 1,
    "use_skip_indexes_if_final_exact_mode": 1,
    "aggregate_functions_null_for_empty": 1,  # min() of nothing is NULL, not 0
    "prefer_column_name_to_alias": 1,
    "async_insert": 0,  # answered when it is written
    "insert_deduplicate": 0,  # it forgets: the id does not
    "max_partitions_per_insert_block": 0,
}
_CLUSTER_SETTINGS = {"distributed_foreground_insert": 1, "insert_quorum": "auto"}


def _type(name: str) -> str:
    kind = "Int64" if name in INTEGERS or (name in USAGE and name != "seconds") else "String" if name in TEXTS else ""
    kind = kind or ("String" if name in JSON else "Float64")
    kind = kind if name in _REQUIRED else f"Nullable({kind})"
    return f"LowCardinality({kind})" if name in _FEW else kind


_TYPES = ["String", "Int64", "Bool", "Array(String)", *map(_type, COLUMNS[4:])]
"""Of COLUMNS."""
_MESSAGES = f"""(
    {", ".join(f"{name} {kind}" for name, kind in zip(COLUMNS, _TYPES, strict=True))},
    cost_pusd Nullable(Int64),
    price_version LowCardinality(Nullable(String)),
    recorded_us Int64 DEFAULT {_NOW},
    version UInt64 DEFAULT {_VERSION["new"]},
    model LowCardinality(Nullable(String)) ALIAS coalesce(response_model, request_model),
    reported Bool ALIAS {" OR ".join(f"{name} IS NOT NULL" for name in USAGE)}"""
_INDEXES = """,
    INDEX by_time timestamp_us TYPE minmax GRANULARITY 1,
    INDEX by_arrival recorded_us TYPE minmax GRANULARITY 1,
    INDEX by_key key TYPE bloom_filter GRANULARITY 1,
    INDEX by_conversation conversation_id TYPE bloom_filter GRANULARITY 1"""
# The ids that are made here begin with their time: their first four digits change every 50 days. Others lie together.
_LAID_OUT = """
    PARTITION BY if(match(id, '^01[89a-f][0-9a-f]{5}-[0-9a-f]{4}-7'), substring(id, 1, 4), 'other')
    ORDER BY id SETTINGS fsync_after_insert = 1, fsync_part_directory = 1"""
_ADDED = ", ".join(f"ADD COLUMN IF NOT EXISTS {name} {_type(name)}" for name in ADDED)
_API_KEYS = """(id String, name String, digest String, scopes String, created_us Int64, revoked_us Nullable(Int64),
    version UInt64 DEFAULT toUnixTimestamp64Nano(now64(9)))"""
# Of two documents with one id, the first is shown.
_RECORDS = f"""(id String, kind LowCardinality(String), created_us Int64, key Nullable(String),
    subject Nullable(String), body String, version UInt64 DEFAULT {2**62} - toUnixTimestamp64Nano(now64(9)))"""
_OLD_COSTS = """(message_id String, replaced_us Int64, cost_pusd Nullable(Int64), price_version Nullable(String))
    ENGINE = {} ORDER BY (message_id, replaced_us)"""


def ddl(cluster: str | None = None) -> tuple[str, ...]:
    """What makes a ledger on one node, or on every node of a cluster, if it is not there.

    On a cluster, every node keeps every API key; messages are kept by shard, all rows of an id on one of them.
    """
    if cluster is None:
        return (
            "CREATE TABLE IF NOT EXISTS spryng_schema (version UInt32) ENGINE = ReplacingMergeTree ORDER BY version",
            f"CREATE TABLE IF NOT EXISTS messages {_MESSAGES}{_INDEXES})\n    ENGINE = ReplacingMergeTree(version)"
            f"{_LAID_OUT}",
            f"ALTER TABLE messages {_ADDED}",
            f"CREATE TABLE IF NOT EXISTS api_keys {_API_KEYS} ENGINE = ReplacingMergeTree(version) ORDER BY id",
            f"CREATE TABLE IF NOT EXISTS records {_RECORDS} ENGINE = ReplacingMergeTree(version) ORDER BY id",
            f"CREATE TABLE IF NOT EXISTS old_costs {_OLD_COSTS.format('MergeTree')}",
        )
    if not re.fullmatch(r"[\w.-]+", cluster):
        raise SettingsError(f"cluster={cluster!r} is no name of a cluster; see system.clusters")
    here = f"ON CLUSTER '{cluster}'"
    everywhere = "ReplicatedReplacingMergeTree('/clickhouse/tables/{database}/{table}', '{shard}-{replica}'"
    logged = everywhere.replace("Replacing", "")
    sharded = "ReplicatedReplacingMergeTree('/clickhouse/tables/{database}/{table}/{shard}', '{replica}'"
    return (
        f"CREATE TABLE IF NOT EXISTS spryng_schema {here} (version UInt32) ENGINE = {everywhere}) ORDER BY version",
        f"CREATE TABLE IF NOT EXISTS messages_local {here} {_MESSAGES}{_INDEXES})\n    ENGINE = {sharded}, version)"
        f"{_LAID_OUT}",
        f"CREATE TABLE IF NOT EXISTS messages {here} {_MESSAGES})\n"
        f"    ENGINE = Distributed('{cluster}', currentDatabase(), messages_local, cityHash64(id))",
        f"ALTER TABLE messages_local {here} {_ADDED}",
        f"ALTER TABLE messages {here} {_ADDED}",
        f"CREATE TABLE IF NOT EXISTS api_keys {here} {_API_KEYS} ENGINE = {everywhere}, version) ORDER BY id",
        f"CREATE TABLE IF NOT EXISTS records {here} {_RECORDS} ENGINE = {everywhere}, version) ORDER BY id",
        f"CREATE TABLE IF NOT EXISTS old_costs {here} {_OLD_COSTS.format(logged + ')')}",
    )


_deadline: ContextVar[float] = ContextVar("deadline")


class _Left(Timeout):
    """What is left of the time of the work at hand: one client serves threads with different deadlines."""

    def clone(self) -> Timeout:
        return Timeout(total=max(_deadline.get() - time.monotonic(), 0.001))


class ClickHouseStore(SqlBooks):
    """A ledger in a database of a ClickHouse server or cluster, version 25.8 or newer.

    Args:
        url: clickhouse://user:password@host:8123/database, with ?secure=true for TLS (port 8443) and ?cluster=NAME.
        create: whether tables that are not there are made. The database must be there.
    """

    source = "messages AS m FINAL"
    among = "{} IN ?"
    has_tag = "has(m.tags, ?)"
    conversation = (  # 128 bits: what count(DISTINCT) makes of a text anyway, in a third of the time
        "reinterpretAsUInt128(sipHash128(m.key IS NULL, coalesce(m.key, ''), assumeNotNull(m.conversation_id)))"
    )
    cost_parts = ("intDiv(m.cost_pusd, 1000000)", "m.cost_pusd % 1000000")
    summed = "sum(toInt128({}))"
    _api_keys = "api_keys FINAL"
    records_source = "records AS r FINAL"
    records_place = ("r.created_us", "r.id")
    costed_us = f"if(m.cost_pusd IS NULL OR m.version >= {2**62}, NULL, {2**62} - m.version)"

    settle_s: ClassVar[float] = 2.0
    """How long after its time of recording a message may come to be seen: inserts that take longer fail, and the clocks
    of a cluster's nodes differ by less."""

    def __init__(self, url: str, *, create: bool = True) -> None:
        parts = urlsplit(url)
        options = parse_qs(parts.query)
        if unknown := sorted(options.keys() - {"secure", "cluster"}):
            raise SettingsError(f"a ClickHouse URL takes secure=true and cluster=NAME, not {unknown[0]!r}")
        secure = options.get("secure", ["false"])[0] in ("1", "true")
        self._shown = without_secrets(url)
        self._cluster = options.get("cluster", [None])[0]
        self._ddl = ddl(self._cluster)
        self._create = create
        self._to: dict[str, Any] = {
            "interface": "https" if secure else "http",
            "host": parts.hostname,
            "port": parts.port or (8443 if secure else 8123),
            "username": unquote(parts.username or "default"),
            "password": unquote(parts.password or ""),
            "database": unquote(parts.path[1:]) or "default",
        }
        self._clients: dict[int, HttpClient] = {}
        """By process: a child of a fork makes its own."""
        self._priced_until_us = 0
        """Whatever was recorded before was looked at by some version of the prices, or has nothing to look at."""

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages*, each id once, in one insert that is on the disk when this returns.

        An insert that failed may have left a part of itself: the messages are delivered again, and what is there
        already is found, or else written twice and shown once. Two writers that bring different messages of one id at
        the same moment are both told "recorded"; the first one's is kept.
        """
        with self._asking(timeout_s) as (client, ask):
            new, outcomes = sort_out(messages, self._stored(ask, [message.id for message in messages]))
            if new:
                rows = [_row(message) for message in new.values()]
                client.insert(
                    "messages",
                    rows,
                    COLUMNS,
                    column_type_names=_TYPES,
                    settings={"max_execution_time": self.settle_s},
                )
        return Receipt(tuple(outcomes))

    def arrivals(self, after: str | None = None, where: Filter = Filter(), *, limit: int = 1_000) -> Page:  # noqa: B008
        """Messages in the order in which they were recorded. What was recorded just now is waited for until it settled.

        An insert is seen a moment after its time: another one with an earlier time might still come.
        """
        mark = re.fullmatch(r"(\d{1,18})(?:_(.*))?", after or "0", re.DOTALL)
        if mark is None:
            raise QueryError(f"after={after!r} is no mark of a page; take it from the page before")
        conditions, values = self._conditions(where)
        order = "ASC" if after else "DESC"
        question = (
            f"SELECT {SELECT}, m.recorded_us FROM {self.source} WHERE {conditions} AND m.recorded_us BETWEEN ? AND ? "
            f"AND (m.recorded_us, m.id) > (?, ?) ORDER BY m.recorded_us {order}, m.id {order} LIMIT ?"
        )
        start, start_id, settle_us = int(mark[1]), mark[2] or "", int(self.settle_s * 1_000_000)
        with self._reading() as ask:
            [[now, newest]] = ask(f"SELECT {_NOW}, coalesce(max(recorded_us), 0) FROM messages", [])
            until = min(newest, now - settle_us)
            found = ask(question, [*values, start, until, start, start_id, limit]) if after or until == newest else []
            if until < newest and (not after or len(found) < limit):
                time.sleep(min(newest - until, settle_us) / 1_000_000)
                until = newest
                found = ask(question, [*values, start, until, start, start_id, limit])
        if not after:
            found.reverse()
        rows = [stored_of(row[:-1]) for row in found]
        return Page(rows, f"{found[-1][-1]}_{found[-1][0]}" if len(found) == limit else f"{until + 1}")

    def usage_and_total(
        self,
        by: str,
        where: Filter = Filter(),  # noqa: B008
        *,
        zone: str = "UTC",
        limit: int | None = None,
    ) -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment: they are sums of one reading of the messages."""
        with self._reading() as ask:
            rows, [total] = self._grouped(ask, by, where, zone, limit, with_total=True)
        return rows, total

    def unpriced(self, price_version: str | None, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at; None: that none has.

        For None, which is asked every few seconds, only what was recorded since then is read once it is known that of
        all before none is left. Whoever names a version has all looked through, in one pass.
        """
        condition, values = "m.price_version IS NULL", []
        if price_version is not None:
            condition, values = f"({condition} OR m.price_version <> ?)", [price_version]
        with self._reading() as ask:
            [[now]] = ask(f"SELECT {_NOW}", [])
            rows = ask(
                f"SELECT {', '.join(f'm.{name}' for name in COLUMNS)}, m.recorded_us FROM {self.source} "
                f"WHERE m.cost_pusd IS NULL AND m.reported AND {condition} AND m.recorded_us >= ? LIMIT ?",
                [*values, 0 if price_version is not None else self._priced_until_us, limit],
            )
        if len(rows) < limit:  # these are all that there are; and with an earlier time, none comes any more
            self._priced_until_us = min([now - int(self.settle_s * 1_000_000), *(row[-1] for row in rows)])
        return [message_of(row[:-1]) for row in rows]

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        version = f"if(amount IS NULL, {_VERSION['looked at']}, {_VERSION['priced']})"
        self._set_costs(first_known(costs), version, "cost_pusd IS NULL")

    def reprice(self, costs: Sequence[Cost], document: Record | None = None) -> None:
        """Put these costs in place of those that are there, which are kept; first of all, append what says so."""
        if document is not None:
            self.append([document])
        found = {cost.message_id: cost for cost in costs if cost.cost_usd is not None}
        if found:
            with self._asking() as (client, _):
                client.raw_query(
                    f"INSERT INTO old_costs SELECT id, {_NOW}, cost_pusd, price_version FROM messages FINAL "
                    "WHERE id IN {ids:Array(String)}",
                    parameters={"ids": list(found)},
                )
        self._set_costs(found, _REPRICED, "1")

    def _set_costs(self, found: dict[str, Cost], version: str, condition: str) -> None:
        amounts = [pusd(cost.cost_usd) for cost in found.values()]
        _check(amounts)
        texts = ["" if amount is None else str(amount) for amount in amounts]
        kept = ", ".join(COLUMNS)
        ids = list(found)
        versions = [cost.price_version for cost in found.values()]
        with self._asking() as (client, _):
            if found:
                client.raw_query(  # unlike a command, it sends its values in the body: they would be a long URL
                    f"INSERT INTO messages ({kept}, recorded_us, cost_pusd, price_version, version) SELECT {kept}, "
                    "recorded_us, toInt64OrNull({amounts:Array(String)}[indexOf({ids:Array(String)}, id)]) AS amount, "
                    f"{{versions:Array(String)}}[indexOf({{ids:Array(String)}}, id)], {version} "
                    f"FROM messages FINAL WHERE id IN {{ids:Array(String)}} AND {condition}",
                    parameters={"ids": ids, "amounts": texts, "versions": versions},
                )

    def _not_before(self, conversations: str, time: datetime) -> SqlParts:
        """Of *conversations*, those that had nothing to bill before that time: no index is for them."""
        before = (
            f"SELECT m.key, m.conversation_id FROM {self.source} WHERE m.conversation_id IS NOT NULL "
            f"AND m.timestamp_us < ? AND {IS_BILLABLE} AND NOT {self._is_void}"
        )
        return f"{conversations} EXCEPT {before}", [micros(time)]

    def append(self, records: Sequence[Record]) -> bool:
        """Append one document, or none if its id is there already. Two at the same moment both succeed; one is kept."""
        if len(records) > 1:
            raise StoreError(
                f"{self._shown}: ClickHouse has no transactions, so that two could close the same bill. Keep what is "
                "billed in PostgreSQL or SQLite: spryng copy SOURCE TARGET"
            )
        with self._asking() as (client, ask):
            new = [r for r in records if not ask("SELECT id FROM records FINAL WHERE id = ?", [r.id])]
            if new:
                client.insert("records", [record_row(record) for record in new], RECORD)
        return len(new) == len(records)

    def keep_api_key(self, key: ApiKey) -> None:
        """Keep a key of the server, in place of one with the same id."""
        with self._asking() as (client, _):
            client.insert("api_keys", [api_key_row(key)], API_KEY)

    def close(self) -> None:
        """Let go of the connections."""
        if client := self._clients.pop(os.getpid(), None):
            client.close()
            client.http.clear()

    @contextmanager
    def _reading(self, timeout_s: float | None = None) -> Iterator[Ask]:
        with self._asking(_READ_S if timeout_s is None else timeout_s) as (_, ask):
            yield ask

    def _writers(self, ask: Ask) -> list[Any]:
        return ask(
            f"SELECT m.writer, coalesce(max(m.sequence), 0), count() FROM {self.source} WHERE m.writer IS NOT NULL "
            "GROUP BY m.writer",
            [],
        )

    def _usage(self, ask: Ask, by: str, where: Filter, zone: str, limit: int | None = None) -> list[UsageRow]:
        return self._grouped(ask, by, where, zone, limit)[0]

    def _grouped(
        self, ask: Ask, by: str, where: Filter, zone: str, limit: int | None = None, *, with_total: bool = False
    ) -> tuple[list[UsageRow], list[UsageRow]]:
        """The groups and, if asked for, the total, of one statement."""
        if by not in GROUPS:
            raise QueryError(f"usage cannot be grouped by {by!r}; choose one of: {', '.join(GROUPS)}")
        facts, values = self._facts(ask, where)
        total, columns, joined = {
            "key": ("grouping(m.key)", ["m.key"], ""),
            "model": ("grouping(m.model)", ["m.model"], ""),
            "conversation": ("grouping(m.conversation_id, m.key)", ["m.conversation_id", "m.key"], ""),
            "tag": ("tag.1", ["tag.2"], _EACH_TAG.format(_WHOLE if with_total else "[]")),
            "day": ("grouping(m.period)", ["m.period"], ""),
            "month": ("grouping(m.period)", ["m.period"], ""),
        }[by]
        if by == "tag":  # a message with two tags is in two groups, and once in the total
            grouped = f"{total}, {columns[0]}"
        elif with_total:
            grouped = f"ROLLUP ({', '.join(columns)})"
        else:
            total, grouped = "0", ", ".join(columns)
        selected = f"SELECT {total}, {columns[0]}, {columns[1] if columns[1:] else 'NULL'}, {self._sums}"
        whole = 2 ** len(columns) - 1  # all columns rolled up
        if by not in ("day", "month"):
            # The total comes first, then groups, then what ROLLUP adds beside them.
            first = f"{total} = {whole} DESC, {total}, " if with_total else ""
            most, more = self._most(None if limit is None else limit + with_total, first)
            found = ask(f"{selected} FROM ({facts}) m {joined} GROUP BY {grouped}{most}", [*values, *more])
        else:
            tz, starts = zone_of(zone), dict[int, str]()
            facts = f"SELECT *, roundDown(first_us, ?) AS period FROM ({facts})"
            found = [(0, None)]
            while any(not row[0] and row[1] not in starts for row in found):  # a message of another day came meanwhile
                starts, boundaries = _periods(by, tz, self._days(ask, where))
                found = ask(f"{selected} FROM ({facts}) m GROUP BY {grouped}", [boundaries, *values])
            found = [(row[0], starts.get(row[1]), *row[2:]) for row in found]
        rows = [usage_row(row[1:]) for row in found if row[0] == 0][:limit]
        totals = [usage_row(row[1:]) for row in found if row[0] == whole]
        return sorted(rows, key=lambda row: (order_of(row.key), order_of(row.group))), totals or [UsageRow(None)]

    def _usage_of(
        self,
        ask: Ask,
        by: str,
        where: Filter,
        windows: Sequence[tuple[str, datetime, datetime]],
        limit: int | None = None,
    ) -> list[tuple[str, UsageRow]]:
        """Usage of each of some windows, by a question each for those that may have messages."""
        days = set(self._days(ask, within(where, windows[0][1], windows[-1][2])))
        return [
            (label, row)
            for label, start, stop in windows
            if not days.isdisjoint(range(micros(start) // _DAY_US, micros(stop) // _DAY_US + 1))
            for row in self._usage(ask, by, within(where, start, stop), "UTC", limit)
        ]

    def _days(self, ask: Ask, where: Filter) -> list[int]:
        """The days of UTC that have messages, counted from 1970."""
        facts, values = self._facts(ask, where)
        day = f"intDiv(first_us - positiveModulo(first_us, {_DAY_US}), {_DAY_US})"  # rounds down before 1970, too
        return [number for (number,) in ask(f"SELECT DISTINCT {day} FROM ({facts})", values)]

    @contextmanager
    def _asking(self, timeout_s: float = _READ_S) -> Iterator[tuple[HttpClient, Ask]]:
        """A client of this process, and how it is asked; what goes wrong is raised as a StoreError."""
        token = _deadline.set(time.monotonic() + timeout_s)
        try:
            client = self._clients.get(os.getpid()) or self._connect(timeout_s)
            yield client, partial(_ask, client)
        except (ClickHouseError, HTTPError, OSError) as exc:
            self._clients.pop(os.getpid(), None)  # the server may come back as another one, without our tables
            raise StoreError(f"{self._shown}: {str(exc)[:500]}. Messages wait in the journal.") from exc
        finally:
            _deadline.reset(token)

    def _connect(self, timeout_s: float) -> HttpClient:
        client = clickhouse_connect.get_client(
            **self._to,
            settings=_SETTINGS if self._cluster is None else {**_SETTINGS, **_CLUSTER_SETTINGS},
            connect_timeout=ceil(timeout_s / 2),  # it tries twice
            send_receive_timeout=ceil(timeout_s),
            autogenerate_session_id=False,  # threads share the client
            form_encode_query_params=True,  # no customer's name in the URLs that a proxy logs
            pool_mgr=get_pool_manager(),
        )
        assert isinstance(client, HttpClient)
        client.timeout, client.http_retries = _Left(), 0
        self._prepare(client)
        return self._clients.setdefault(os.getpid(), client)

    def _prepare(self, client: HttpClient) -> None:
        """Make the tables if need be; raises for what this version must not touch."""
        ask = partial(_ask, client)
        tables = {name for (name,) in ask("SELECT name FROM system.tables WHERE database = currentDatabase()", [])}
        version = ask("SELECT max(version) FROM spryng_schema", [])[0][0] if "spryng_schema" in tables else None
        if version is not None and version > SCHEMA:
            raise SchemaTooNewError(
                f"{self._shown} has schema {version}, written by a newer spryng_instrument; this one knows {SCHEMA}. "
                "Upgrade it: pip install -U spryng-instrument. Messages wait in the journal."
            )
        if version == SCHEMA:
            return
        if version is None and not self._create:
            raise StoreError(f"there is no ledger at {self._shown}. Did anything record there yet? Try: spryng demo")
        if "messages" in tables and "spryng_schema" not in tables:
            raise StoreNotOursError(
                f"{self._shown} has a table `messages` of something else. Choose another database. "
                "Messages wait in the journal."
            )
        for statement in self._ddl:
            client.command(statement)
        client.command(f"INSERT INTO spryng_schema VALUES ({SCHEMA})")


def _ask(client: HttpClient, question: str, values: Sequence[Any]) -> list[Any]:
    """The rows of a statement with ? for its values, which are sent beside it, each with its type."""
    numbers = count()
    statement = re.sub(r"\?", lambda _: f"{{p{(n := next(numbers))}:{_type_of(values[n])}}}", question)
    return list(client.query(statement, parameters={f"p{n}": value for n, value in enumerate(values)}).result_rows)


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return f"Array({_type_of(value[0]) if value else 'String'})"
    return "Int64" if isinstance(value, int) else "String"


def _row(message: Message) -> list[Any]:
    """The values of a message's COLUMNS, if ClickHouse can keep them."""
    row = list(row_of(message))
    row[COLUMNS.index("tags")] = list(message.tags)
    msgspec.json.encode(message)  # text that is no valid Unicode is refused here
    _check(row)
    return row


def _check(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OverflowError(f"{value} does not fit into 64 bits")


def _periods(by: str, tz: tzinfo, days: Sequence[int]) -> tuple[dict[int, str], list[int]]:
    """The labels, by their start, of the periods that these days of UTC touch; and their starts and ends in order."""
    starts: dict[int, str] = {}
    stops = {-(2**62)}
    for day in days:
        time, end = moment(day * _DAY_US), moment((day + 1) * _DAY_US)
        while time < end:
            label, start, time = period_of(by, time, tz)
            starts[micros(start)] = label
            stops.add(micros(time))
    return starts, sorted(stops.union(starts))
