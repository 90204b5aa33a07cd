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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from datetime import datetime, timedelta, tzinfo
from decimal import Decimal, localcontext
from typing import Any, ClassVar

import msgspec

from spryng_instrument.errors import QueryError
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.periods import period_of, zone_of
from spryng_instrument.store.base import (
    BATCH,
    EXACT,
    GROUPS,
    ApiKey,
    Conversation,
    ConversationPage,
    Filter,
    Health,
    Page,
    UsageRow,
    most_first,
)
from spryng_instrument.store.rows import COLUMNS, SELECT, message_of, micros, moment, stored_of, usd

Ask = Callable[[str, Sequence[Any]], list[Any]]
"""Runs a statement with ? for its values, and returns its rows."""
SqlParts = tuple[str, list[Any]]
"""A piece of SQL, and the values of its ?s."""

BUCKET_US = 15 * 60 * 1_000_000
"""What a rollup sums up. Days begin on a quarter of an hour in every zone of today."""
_QUARTERS = 3_000
"""In so many buckets, those of a month, a customer's rollups are looked up one by one; beyond that, all are read."""
_WINDOWS = 500
"""Days or months of one question."""
_KNOWN = timedelta(days=100)
"""Up to this, it is not worth asking which days have messages at all."""
IS_BILLABLE = "m.status IN ({})".format(", ".join(f"'{status}'" for status in BILLABLE))
UNBILLED = "status NOT IN ({})".format(", ".join(f"'{status}'" for status in BILLABLE))
"""Messages that are not billed: few, and found by an index of their own."""
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
    rolled_up: ClassVar[str] = "rolled_up"
    """The rollups, as facts."""
    among: ClassVar[str]
    """Whether a value is in the list ?."""
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

    def _reading(self, timeout_s: float | None = None) -> AbstractContextManager[Ask]:
        """Asks questions of one moment; what goes wrong is raised as a StoreError.

        Args:
            timeout_s: how long they may take; who gives it must not wait for those who do not.
        """
        raise NotImplementedError

    def _summing(self) -> AbstractContextManager[Ask]:
        """The same, for sums: an engine may first bring its rollups up to date."""
        return self._reading()

    def _facts(self, ask: Ask, where: Filter) -> SqlParts:
        """SELECTs of FACTS."""
        return self._message_facts(where)

    def _rolled_up(self, ask: Ask, where: Filter, stale: Sequence[tuple[int, int]] = ()) -> SqlParts:
        """FACTS from rollups, but for what is less than a bucket at both ends: that comes from the messages.

        So do the *stale* buckets, which are not in `rolled_up`: from one time up to another, each.
        """
        if where.conversation_id is not None or where.mark is not None:  # few, and found by their index; or of the past
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
        buckets = self._buckets(ask, whole) if where.key is not None or where.no_key else None
        if buckets is None:
            conditions, values = self._conditions(whole, "m.bucket_us")
        else:
            conditions, values = self._conditions(replace(whole, since=None, until=None))
            place, more = self._place(where.key, buckets)
            conditions, values = f"{conditions} AND {place}", [*values, *more]
        parts = [f"SELECT {', '.join(f'm.{name}' for name in FACTS)} FROM {self.rolled_up} m WHERE {conditions}"]
        if stale:
            parts, values = self._with_messages(parts, values, whole, stale)
        if whole.since != where.since:
            parts, values = self._with_messages(parts, values, within(where, None, whole.since))
        if whole.until != where.until:
            parts, values = self._with_messages(parts, values, within(where, whole.until, None))
        return " UNION ALL ".join(parts), values

    def _buckets(self, ask: Ask, where: Filter) -> list[int] | None:
        """The buckets in which a customer has messages, by steps from one to the next. None: they are too many."""
        owner = Filter(where.key, where.no_key, until=where.until)
        (begun, first), (conditions, values) = map(self._conditions, (replace(owner, since=where.since), owner))
        ends = f"step.us - (step.us % {BUCKET_US} + {BUCKET_US}) % {BUCKET_US} + {BUCKET_US}"
        found = ask(
            f"WITH RECURSIVE step (us) AS (SELECT min(m.timestamp_us) FROM {self.source} WHERE {begun} "
            f"UNION ALL SELECT (SELECT min(m.timestamp_us) FROM {self.source} WHERE {conditions} "
            f"AND m.timestamp_us >= {ends}) FROM step WHERE step.us IS NOT NULL) "
            "SELECT step.us FROM step WHERE step.us IS NOT NULL LIMIT ?",
            [*first, *values, _QUARTERS + 1],
        )
        return None if len(found) > _QUARTERS else [us // BUCKET_US * BUCKET_US for (us,) in found]

    def _place(self, key: str | None, buckets: Sequence[int]) -> SqlParts:
        """The condition that a rollup is a customer's, and of one of these buckets, as an index finds it."""
        raise NotImplementedError

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
        limit: int | None = None,
    ) -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment, whatever is recorded meanwhile."""
        with self._summing() as ask:
            rows = self._usage(ask, by, where, zone, limit)
            # A message has one key, and so has a conversation: their sum is the total.
            return rows, _summed(rows) if by == "key" and limit is None else self._total(ask, where)

    def usage_by_window(
        self,
        by: str,
        window: str,
        where: Filter = Filter(),  # noqa: B008
        *,
        zone: str = "UTC",
        with_total: bool = True,
        limit: int | None = None,
    ) -> tuple[list[tuple[str, UsageRow]], UsageRow]:
        """Usage by one of GROUPS of each day or month, and the total if it is wanted: of one moment."""
        tz = zone_of(zone)
        with self._summing() as ask:
            rows: list[tuple[str, UsageRow]] = []
            windows = self._windows(ask, window, where, tz)
            for start in range(0, len(windows), _WINDOWS):
                rows += self._usage_of(ask, by, where, windows[start : start + _WINDOWS], limit)
            if limit is not None and len(rows) > limit:
                chosen = sorted(range(len(rows)), key=lambda number: most_first(rows[number][1]))[:limit]
                rows = [rows[number] for number in sorted(chosen)]
            return rows, self._total(ask, where) if with_total else UsageRow(None)

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
        rows = [Conversation(usage_row(row[2:]), moment(row[0]), moment(row[1])) for row in found[:limit]]
        more = len(found) > limit and limit > 0
        return ConversationPage(rows, _mark(found[limit - 1]) if more else None)

    def found(self, ids: Sequence[str], *, timeout_s: float | None = None) -> dict[str, Message]:
        """Those of the messages with these ids that are in the ledger."""
        with self._reading(timeout_s) as ask:
            return self._stored(ask, ids)

    def unpriced(self, price_version: str | None, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at; None: that none has."""
        rows: list[Any] = []
        # An index answers what others looked at, though this version looked at millions.
        others = ("m.price_version < ?", "m.price_version > ?") if price_version else ()
        with self._reading() as ask:
            for condition in ("m.price_version IS NULL", *others):
                values = [price_version] if "?" in condition else []
                rows += ask(
                    f"SELECT {', '.join(f'm.{name}' for name in COLUMNS)} FROM {self.source} "
                    f"WHERE m.cost_pusd IS NULL AND m.reported AND {condition} LIMIT ?",
                    [*values, limit - len(rows)],
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

    def missing(self, given: Mapping[str, int]) -> dict[str, list[range]]:
        """By writer, the numbers from 1 to the last one that it gave that are not in the ledger, in order."""
        beside = "max(m.sequence) OVER (PARTITION BY m.writer ORDER BY m.sequence ROWS BETWEEN 1 {0} AND 1 {0})"
        with self._reading() as ask:  # of each, the numbers after a gap, and the last one
            rows = ask(
                "SELECT n.writer, n.before, n.sequence FROM (SELECT m.writer, m.sequence, "
                f"coalesce({beside.format('PRECEDING')}, 0) AS before, {beside.format('FOLLOWING')} AS after "
                f"FROM {self.source} WHERE {self.among.format('m.writer')} AND m.sequence > 0) n "
                "WHERE n.sequence > n.before + 1 OR n.after IS NULL ORDER BY n.writer, n.sequence",
                [self._listed(list(given))],
            )
        missing: dict[str, list[range]] = {writer: [] for writer in given}
        highest = dict.fromkeys(given, 0)
        for writer, before, sequence in rows:
            missing[writer].append(range(before + 1, min(sequence, given[writer] + 1)))
            highest[writer] = sequence
        for writer, last in given.items():
            missing[writer].append(range(highest[writer] + 1, last + 1))
        return {writer: [numbers for numbers in ranges if numbers] for writer, ranges in missing.items()}

    def roll_up(self, limit: int = 100) -> int:
        """Nothing is left to sum up."""
        return 0

    def api_keys(self, *, timeout_s: float | None = None) -> list[ApiKey]:
        """Every key of the server, the oldest first."""
        with self._reading(timeout_s) as ask:
            rows = ask(f"SELECT {', '.join(API_KEY)} FROM {self._api_keys}", [])
        return sorted((api_key_of(row) for row in rows), key=lambda key: (key.created, key.id))

    _api_keys: ClassVar[str] = "api_keys"

    def _writers(self, ask: Ask) -> list[Any]:
        """(writer, its last number, its messages here) of each process."""
        return ask("SELECT writer, last_sequence, messages FROM writers", [])

    def _stored(self, ask: Ask, ids: Sequence[str]) -> dict[str, Message]:
        """Those of the messages with these ids that are there, by id."""
        columns = ", ".join(f"m.{name}" for name in COLUMNS)
        question = f"SELECT {columns} FROM {self.source} WHERE {self.among.format('m.id')}"
        return {row[0]: message_of(row) for row in (ask(question, [self._listed(ids)]) if ids else [])}

    def _listed(self, values: Sequence[Any]) -> Any:
        """A list, as `among` takes it."""
        return list(values)

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
            IS_BILLABLE, "m.status = 'error'", "m.status = 'cancelled'", f"{IS_BILLABLE} AND NOT m.reported",
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

    def _usage(self, ask: Ask, by: str, where: Filter, zone: str, limit: int | None = None) -> list[UsageRow]:
        if by not in GROUPS:
            raise QueryError(f"usage cannot be grouped by {by!r}; choose one of: {', '.join(GROUPS)}")
        if by in ("day", "month"):
            return self._by_period(ask, by, where, zone)
        joined, column, owner, grouped = self._grouping(by)
        facts, values = self._facts(ask, where)
        most, more = self._most(limit)
        rows = ask(
            f"SELECT {column}, {owner}, {self._sums} FROM ({facts}) m {joined} GROUP BY {grouped}{most}",
            [*values, *more],
        )
        return sorted(map(usage_row, rows), key=lambda row: (order_of(row.key), order_of(row.group)))

    def _grouping(self, by: str) -> tuple[str, str, str, str]:
        """What is joined, the column of the group and of its owner, and what is grouped by."""
        joined, column = {
            "key": ("", "m.key"),
            "model": ("", "m.model"),
            "conversation": ("", "m.conversation_id"),
            "tag": self.each_tag,
        }[by]
        return (
            (joined, column, "m.key", f"{column}, m.key") if by == "conversation" else (joined, column, "NULL", column)
        )

    def _most(self, limit: int | None, first: str = "") -> SqlParts:
        """How groups are ordered and cut off, as `most_first` says."""
        if limit is None:
            return "", []
        messages, e6, e12 = (f"coalesce({self.summed.format(f'm.{name}')}, 0)" for name in (SUMS[0], *SUMS[-2:]))
        return f" ORDER BY {first}{e6} * 1000000 + {e12} DESC, {messages} DESC LIMIT ?", [limit]

    def _windows(self, ask: Ask, by: str, where: Filter, tz: tzinfo) -> list[tuple[str, datetime, datetime]]:
        """The days or months that there may be messages in."""
        if where.since is not None and where.until is not None and where.until - where.since < _KNOWN:
            first, last = micros(where.since), micros(where.until) - 1
        else:
            facts, values = self._facts(ask, where)
            [[first, last]] = ask(f"SELECT min(m.first_us), max(m.last_us) FROM ({facts}) m", values)
        windows: list[tuple[str, datetime, datetime]] = []
        while first is not None and first <= last:
            windows.append(period_of(by, moment(first), tz))
            first = micros(windows[-1][2])
        return windows

    def _usage_of(
        self,
        ask: Ask,
        by: str,
        where: Filter,
        windows: Sequence[tuple[str, datetime, datetime]],
        limit: int | None = None,
    ) -> list[tuple[str, UsageRow]]:
        """Usage of each of some windows, which follow one another, by one question."""
        joined, column, owner, grouped = self._grouping(by)
        where = within(where, windows[0][1], windows[-1][2])
        starts = [micros(start) for _, start, _ in windows]
        if any(start % BUCKET_US for start in starts):  # a zone of long ago: a rollup may be of two days
            facts, values = self._message_facts(where)
        else:
            facts, values = self._facts(ask, where)
        most, more = self._most(limit)
        found = ask(
            f"SELECT {_number_of(starts)} AS number, {column}, {owner}, {self._sums} FROM ({facts}) m {joined} "
            f"GROUP BY 1, {grouped}{most}",
            [*values, *more],
        )
        rows = [(int(row[0]), usage_row(row[1:])) for row in found]
        rows.sort(key=lambda each: (each[0], order_of(each[1].key), order_of(each[1].group)))
        return [(windows[number][0], row) for number, row in rows]

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
        return usage_row([label, *row[1:]])


def _number_of(starts: Sequence[int], first: int = 0) -> str:
    """SQL for the number of the window that a fact is in, by halves: some hundred comparisons would be slow."""
    if len(starts) == 1:
        return str(first)
    half = len(starts) // 2
    return (
        f"CASE WHEN m.first_us < {starts[half]} THEN {_number_of(starts[:half], first)} "
        f"ELSE {_number_of(starts[half:], first + half)} END"
    )


def within(where: Filter, start: datetime | None, stop: datetime | None) -> Filter:
    """The same question about the part of its time from *start* to *stop*."""
    starts = [each for each in (where.since, start) if each is not None]
    stops = [each for each in (where.until, stop) if each is not None]
    return replace(where, since=max(starts, default=None), until=min(stops, default=None))


def usage_row(row: Sequence[Any]) -> UsageRow:
    """A row of sums as SELECTed."""
    *counts, dollars_e6, dollars_e12 = row
    cost = None if dollars_e6 is None else usd(int(dollars_e6) * 1_000_000 + int(dollars_e12))
    return UsageRow(*(*counts[:2], *map(int, counts[2:]), cost))


def _summed(rows: Sequence[UsageRow]) -> UsageRow:
    """The total of rows that have nothing in common."""
    names = [each.name for each in fields(UsageRow) if each.name not in ("group", "key", "cost_usd")]
    costs = [row.cost_usd for row in rows if row.cost_usd is not None]
    counts = {name: sum(getattr(row, name) for row in rows) for name in names}
    with localcontext(EXACT):
        return UsageRow(None, **counts, cost_usd=sum(costs, Decimal(0)) if costs else None)


def order_of(name: str | None) -> tuple[bool, str]:
    """Rows are in the order of their names; those without one come first."""
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
