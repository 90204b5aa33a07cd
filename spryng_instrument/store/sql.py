"""The questions that reports ask, in the SQL that every engine speaks; each engine fills in what differs.

Invariant: an answer is one moment's, and the same on every engine. What is ordered or broken into days is ordered and
broken here, in Python: an engine's collation or zone database would have its own idea of it.

A question is put to facts: rows that carry counts of one or many messages that are alike in all that can be asked for
(customer, conversation, model, tags, time). They come from the messages themselves, or from rollups of them.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any, ClassVar

import msgspec

from spryng_instrument.errors import QueryError
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.store.base import (
    BATCH,
    GROUPS,
    ApiKey,
    Conversation,
    ConversationPage,
    Filter,
    Health,
    Page,
    UsageRow,
    zone_of,
)
from spryng_instrument.store.rows import COLUMNS, SELECT, message_of, micros, moment, stored_of, usd

Ask = Callable[[str, Sequence[Any]], list[Any]]
"""Runs a statement with ? for its values, and returns its rows."""
SqlParts = tuple[str, list[Any]]
"""A piece of SQL, and the values of its ?s."""

BUCKET_US = 15 * 60 * 1_000_000
"""What a rollup sums up. Days begin on a quarter of an hour in every zone of today."""
_IS_BILLABLE = "m.status IN ({})".format(", ".join(f"'{status}'" for status in BILLABLE))
DIMENSIONS = ("key", "conversation_id", "model", "tags")
SUMS = (
    "messages", "errors", "cancelled", "unreported", "unpriced", "input_tokens", "cached_tokens", "output_tokens",
    "reasoning_tokens", "cost_e6", "cost_e12",
)  # fmt: skip
"""The counts of a fact. A cost is in two parts, millionths of a dollar and the rest, so that no sum overflows 64 bits;
None where no message has one."""
FACTS = ("first_us", "last_us", *DIMENSIONS, *SUMS)


class SqlStore:
    """The reading half of a ledger that speaks SQL. A subclass says how it connects and what its dialect is."""

    batch_size = BATCH
    source: ClassVar[str] = "messages m"
    """The messages, each once."""
    has_tag: ClassVar[str]
    """Whether m.tags has the one ?."""
    each_tag: ClassVar[tuple[str, str]]
    """How m is joined with its tags, and what a tag is called then: NULL for a message that has none."""
    conversation: ClassVar[str]
    """One value that is another one for each customer's conversation."""
    cost_parts: ClassVar[tuple[str, str]] = ("m.cost_pusd / 1000000", "m.cost_pusd % 1000000")
    summed: ClassVar[str] = "sum({})"
    """Adds up counts of 64 bits; the sum may have more."""
    flag: ClassVar[str] = "CASE WHEN {} THEN 1 ELSE 0 END"
    """A condition as a number."""

    def _reading(self) -> AbstractContextManager[Ask]:
        """Asks questions of one moment; what goes wrong is raised as a StoreError."""
        raise NotImplementedError

    def _summing(self) -> AbstractContextManager[Ask]:
        """The same, for sums: an engine may first bring its rollups up to date."""
        return self._reading()

    def _facts(self, ask: Ask, where: Filter) -> SqlParts:
        """SELECTs of FACTS."""
        return self._message_facts(where)

    def _rolled_up(self, where: Filter, rollups: str, stale: Sequence[tuple[int, int]] = ()) -> SqlParts:
        """FACTS from *rollups*, but for what is less than a bucket at both ends: that comes from the messages.

        So do the *stale* buckets, which are not in *rollups*: from one time up to another, each.
        """
        if where.conversation_id is not None:  # few messages, and found by their index
            return self._message_facts(where)
        since = None if where.since is None else -(-micros(where.since) // BUCKET_US) * BUCKET_US
        until = None if where.until is None else micros(where.until) // BUCKET_US * BUCKET_US
        if since is not None and until is not None and since >= until:
            return self._message_facts(where)
        whole = replace(
            where,
            since=None if since is None else moment(since),
            until=None if until is None else moment(until),
        )
        conditions, values = self._conditions(whole, "m.bucket_us")
        parts = [f"SELECT {', '.join(f'm.{name}' for name in FACTS)} FROM {rollups} m WHERE {conditions}"]
        if stale:
            parts, values = self._with_messages(parts, values, whole, stale)
        if whole.since != where.since:
            parts, values = self._with_messages(parts, values, within(where, None, whole.since))
        if whole.until != where.until:
            parts, values = self._with_messages(parts, values, within(where, whole.until, None))
        return " UNION ALL ".join(parts), values

    def _with_messages(
        self,
        parts: list[str],
        values: list[Any],
        where: Filter,
        times: Sequence[tuple[int, int]] = (),
    ) -> tuple[list[str], list[Any]]:
        facts, more = self._message_facts(where, times)
        return [*parts, facts], [*values, *more]

    def usage(self, by: str, where: Filter = Filter(), *, zone: str = "UTC") -> list[UsageRow]:  # noqa: B008
        """Usage by one of GROUPS, in the order of the group's name, "none" first."""
        with self._summing() as ask:
            return self._usage(ask, by, where, zone)

    def total(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        """The same over all messages, each counted once."""
        with self._summing() as ask:
            return self._total(ask, where)

    def usage_and_total(
        self,
        by: str,
        where: Filter = Filter(),  # noqa: B008
        *,
        zone: str = "UTC",
    ) -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment, whatever is recorded meanwhile."""
        with self._summing() as ask:
            return self._usage(ask, by, where, zone), self._total(ask, where)

    def messages(self, where: Filter = Filter(), *, after: str | None = None, limit: int = 50) -> Page:  # noqa: B008
        """Messages, newest first."""
        conditions, values = self._conditions(where)
        if after is not None:
            mark = re.fullmatch(r"(-?\d{1,18})_(\S+)", after)
            if mark is None:
                raise QueryError(f"after={after!r} is no mark of a page; take it from the page before")
            values += [int(mark[1]), mark[2]]
            conditions += " AND (m.timestamp_us, m.id) < (?, ?)"
        with self._reading() as ask:
            found = ask(
                f"SELECT {SELECT} FROM {self.source} WHERE {conditions} ORDER BY m.timestamp_us DESC, m.id DESC "
                "LIMIT ?",
                [*values, limit + 1],
            )
        more = len(found) > limit and limit > 0
        return Page(
            [stored_of(row) for row in found[:limit]], f"{found[limit - 1][1]}_{found[limit - 1][0]}" if more else None
        )

    def conversations(
        self,
        where: Filter = Filter(),  # noqa: B008
        *,
        after: str | None = None,
        limit: int = 50,
    ) -> ConversationPage:
        """Conversations, the one that began last first."""
        order = ["min(m.first_us)", self.flag.format("m.key IS NULL"), "coalesce(m.key, '')", "m.conversation_id"]
        having, mark = ("", []) if after is None else (f"HAVING ({', '.join(order)}) < (?, ?, ?, ?)", _unmark(after))
        with self._summing() as ask:
            facts, values = self._facts(ask, where)
            found = ask(
                f"SELECT min(m.first_us), max(m.last_us), m.conversation_id, m.key, {self._sums} FROM ({facts}) m "
                f"WHERE m.conversation_id IS NOT NULL GROUP BY m.key, m.conversation_id {having} "
                f"ORDER BY {', '.join(f'{part} DESC' for part in order)} LIMIT ?",
                [*values, *mark, limit + 1],
            )
        rows = [Conversation(_usage_row(row[2:]), moment(row[0]), moment(row[1])) for row in found[:limit]]
        more = len(found) > limit and limit > 0
        return ConversationPage(rows, _mark(found[limit - 1]) if more else None)

    def found(self, ids: Sequence[str]) -> dict[str, Message]:
        """Those of the messages with these ids that are in the ledger."""
        with self._reading() as ask:
            return self._stored(ask, ids)

    def unpriced(self, price_version: str, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at."""
        with self._reading() as ask:
            rows = ask(
                f"SELECT {', '.join(f'm.{name}' for name in COLUMNS)} FROM {self.source} WHERE m.cost_pusd IS NULL "
                "AND m.reported AND coalesce(m.price_version, '') <> ? LIMIT ?",
                [price_version, limit],
            )
        return [message_of(row) for row in rows]

    def health(self) -> Health:
        """Gaps, messages without a key, models without a price."""
        with self._reading() as ask:
            [[messages]] = ask(f"SELECT count(*) FROM {self.source}", [])
            writers = self._writers(ask)
            unattributed = ask(
                f"SELECT coalesce(m.call_site, '(unknown)') AS site, count(*) AS n FROM {self.source} "
                "WHERE m.key IS NULL GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100",
                [],
            )
            unpriced = ask(
                f"SELECT coalesce(m.model, '(unknown)') AS name, count(*) AS n FROM {self.source} "
                "WHERE m.cost_pusd IS NULL AND m.reported GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100",
                [],
            )
        return Health(
            messages,
            len(writers),
            tuple(sorted((writer, last, here) for writer, last, here in writers if last != here)),
            tuple((site, count) for site, count in unattributed),
            tuple((model, count) for model, count in unpriced),
        )

    def missing(self, writer: str, last_sequence: int) -> list[int]:
        """The numbers up to *last_sequence* of a writer that are not in the ledger."""
        with self._reading() as ask:
            rows = ask(f"SELECT m.sequence FROM {self.source} WHERE m.writer = ?", [writer])
        return sorted(set(range(1, last_sequence + 1)) - {sequence for (sequence,) in rows})

    def roll_up(self, limit: int = 100) -> int:
        """Nothing is left to sum up."""
        return 0

    def api_keys(self) -> list[ApiKey]:
        """Every key of the server, the oldest first."""
        with self._reading() as ask:
            rows = ask(f"SELECT {', '.join(API_KEY)} FROM {self._api_keys}", [])
        return sorted((api_key_of(row) for row in rows), key=lambda key: (key.created, key.id))

    _api_keys: ClassVar[str] = "api_keys"

    def _writers(self, ask: Ask) -> list[Any]:
        """(writer, its last number, its messages here) of each process."""
        return ask("SELECT writer, last_sequence, messages FROM writers", [])

    def _stored(self, ask: Ask, ids: Sequence[str]) -> dict[str, Message]:
        raise NotImplementedError

    @property
    def _sums(self) -> str:
        """The columns of a UsageRow from messages on, but for its cost, which is in two parts."""
        named = {name: f"coalesce({self.summed.format(f'm.{name}')}, 0)" for name in SUMS[:-2]}
        conversations = (
            f"count(DISTINCT CASE WHEN m.messages > 0 AND m.conversation_id IS NOT NULL THEN {self.conversation} END)"
        )
        first, *others = named.values()
        costs = [self.summed.format(f"m.{name}") for name in SUMS[-2:]]
        return ", ".join([first, conversations, *others, *costs])

    def _message_facts(self, where: Filter, times: Sequence[tuple[int, int]] = ()) -> SqlParts:
        """FACTS of the messages; if *times* are given, of those that are from one of them up to its other."""
        conditions, values = self._conditions(where)
        if times:
            conditions += f" AND ({' OR '.join(['m.timestamp_us >= ? AND m.timestamp_us < ?'] * len(times))})"
            values += [bound for each in times for bound in each]
        flags = (
            _IS_BILLABLE, "m.status = 'error'", "m.status = 'cancelled'", f"{_IS_BILLABLE} AND NOT m.reported",
            "m.reported AND m.cost_pusd IS NULL",
        )  # fmt: skip
        expressions = ["m.timestamp_us", "m.timestamp_us", *(f"m.{name}" for name in DIMENSIONS)]
        expressions += [self.flag.format(flag) for flag in flags]
        expressions += [f"m.{name}" for name in SUMS if name.endswith("_tokens")]
        expressions += self.cost_parts
        selected = ", ".join(f"{what} AS {name}" for what, name in zip(expressions, FACTS, strict=True))
        return f"SELECT {selected} FROM {self.source} WHERE {conditions}", values

    def _conditions(self, where: Filter, time: str = "m.timestamp_us") -> SqlParts:
        parts: list[str] = ["1 = 1"]
        values: list[Any] = []
        for column, value in (("key", where.key), ("model", where.model), ("conversation_id", where.conversation_id)):
            if value is not None:
                parts.append(f"m.{column} = ?")
                values.append(value)
        if where.no_key:
            parts.append("m.key IS NULL")
        for tag in where.tags:
            parts.append(self.has_tag)
            values.append(tag)
        for comparison, bound in ((">=", where.since), ("<", where.until)):
            if bound is not None:
                parts.append(f"{time} {comparison} ?")
                values.append(micros(bound))
        return " AND ".join(parts), values

    def _usage(self, ask: Ask, by: str, where: Filter, zone: str) -> list[UsageRow]:
        if by not in GROUPS:
            raise QueryError(f"usage cannot be grouped by {by!r}; choose one of: {', '.join(GROUPS)}")
        if by in ("day", "month"):
            return self._by_period(ask, by, where, zone)
        joined, column = {
            "key": ("", "m.key"),
            "model": ("", "m.model"),
            "conversation": ("", "m.conversation_id"),
            "tag": self.each_tag,
        }[by]
        facts, values = self._facts(ask, where)
        owner = "m.key" if by == "conversation" else "NULL"
        grouped = column if owner == "NULL" else f"{column}, {owner}"
        rows = ask(f"SELECT {column}, {owner}, {self._sums} FROM ({facts}) m {joined} GROUP BY {grouped}", values)
        return sorted(map(_usage_row, rows), key=lambda row: (_order(row.key), _order(row.group)))

    def _by_period(self, ask: Ask, by: str, where: Filter, zone: str) -> list[UsageRow]:
        tz = zone_of(zone)
        rows: list[UsageRow] = []
        first = self._first(ask, where)
        while first is not None:
            label, start, stop = period_of(by, first, tz)
            row = self._total(ask, within(where, start, stop), label)
            if row != UsageRow(label):
                rows.append(row)
                first = stop
            else:  # an empty stretch is skipped in one step
                first = self._first(ask, within(where, stop, None))
        return rows

    def _first(self, ask: Ask, where: Filter) -> datetime | None:
        """Time of the first message."""
        facts, values = self._facts(ask, where)
        [[first]] = ask(f"SELECT min(m.first_us) FROM ({facts}) m", values)
        return None if first is None else moment(first)

    def _total(self, ask: Ask, where: Filter, label: str | None = None) -> UsageRow:
        facts, values = self._facts(ask, where)
        [row] = ask(f"SELECT NULL, NULL, {self._sums} FROM ({facts}) m", values)
        return _usage_row([label, *row[1:]])


def period_of(by: str, time: datetime, tz: tzinfo) -> tuple[str, datetime, datetime]:
    """(label, start, stop) of the day or month, in the zone, that *time* is in."""
    day = time.astimezone(tz).date()
    if by == "day":
        return day.isoformat(), _midnight(day, tz), _midnight(day + timedelta(days=1), tz)
    day = day.replace(day=1)
    return f"{day:%Y-%m}", _midnight(day, tz), _midnight((day + timedelta(days=32)).replace(day=1), tz)


def _midnight(day: date, tz: tzinfo) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=tz).astimezone(timezone.utc)


def within(where: Filter, start: datetime | None, stop: datetime | None) -> Filter:
    """The same question about the part of its time from *start* to *stop*."""
    starts = [each for each in (where.since, start) if each is not None]
    stops = [each for each in (where.until, stop) if each is not None]
    return replace(where, since=max(starts, default=None), until=min(stops, default=None))


def _usage_row(row: Sequence[Any]) -> UsageRow:
    *counts, dollars_e6, dollars_e12 = row
    cost = None if dollars_e6 is None else usd(int(dollars_e6) * 1_000_000 + int(dollars_e12))
    return UsageRow(*(*counts[:2], *map(int, counts[2:]), cost))


def _order(name: str | None) -> tuple[bool, str]:
    return name is not None, name or ""


API_KEY = ("id", "name", "digest", "scopes", "created_us", "revoked_us")


def api_key_row(key: ApiKey) -> tuple[Any, ...]:
    """The values of API_KEY."""
    revoked = None if key.revoked is None else micros(key.revoked)
    return key.id, key.name, key.digest, " ".join(key.scopes), micros(key.created), revoked


def api_key_of(row: Sequence[Any]) -> ApiKey:
    """The key of a row of API_KEY."""
    id, name, digest, scopes, created, revoked = row
    return ApiKey(
        id, name, digest, tuple(scopes.split()), moment(created), None if revoked is None else moment(revoked)
    )


def _mark(row: Sequence[Any]) -> str:
    """Where the page after this row of conversations starts."""
    first_us, _, conversation_id, key, *_ = row
    return base64.urlsafe_b64encode(
        msgspec.json.encode([first_us, int(key is None), key or "", conversation_id])
    ).decode()


def _unmark(after: str) -> list[Any]:
    try:
        mark = msgspec.json.decode(base64.urlsafe_b64decode(after), type=tuple[int, int, str, str])
    except (binascii.Error, msgspec.MsgspecError, ValueError):
        raise QueryError(f"after={after!r} is no mark of a page; take it from the page before") from None
    return list(mark)
