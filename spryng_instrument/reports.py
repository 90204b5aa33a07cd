"""Usage by key, tag, conversation, model, day or month: what a command line, a page, a notebook or an invoice shows.

    from spryng_instrument import reports

    reports.usage(by="key", month="2026-11", zone="Europe/Berlin")     # a table, in a terminal and in a notebook

`usage`, `messages` and `conversations` ask the ledger of the settings, as the command line does; the rest are pure
functions over a store. Rows and total are of one moment; a total counts each message once, however often its rows
do. What has no price is never counted as free: the total then says "at least". Dates are days of one IANA zone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import date, timedelta, timezone, tzinfo
from decimal import Decimal
from itertools import chain
from typing import Any

from spryng_instrument.errors import QueryError
from spryng_instrument.ledger import deliver_waiting, open_ledger, settings_of
from spryng_instrument.periods import period, period_of, zone_of
from spryng_instrument.prices import Rated, rate
from spryng_instrument.store.base import Conversation, Filter, Store, StoredMessage, UsageRow, most_first, pages_of
from spryng_instrument.store.sql import within
from spryng_instrument.tables import Column, Table, decimals_for, many, money, void_text

NONE_LABELS = {"key": "(no key)", "conversation": "(no conversation)", "tag": "(no tag)", "model": "(unknown)"}
"""How a group is called whose messages have none."""
COUNTS = tuple(field.name for field in fields(UsageRow) if field.name not in ("group", "key", "cost_usd"))
"""The whole numbers of a row, in the order of every table."""
WINDOWS = ("day", "month")
"""What a report can be cut into."""
PAGE = 1_000
"""Messages or conversations that are read at a time."""
CONVERSATIONS = 1_000
"""Conversations that are shown where nobody said how many: a ledger may have millions."""
AT_A_TIME = 100_000
"""Conversations of many customers that are read at once; where there are more, one customer's at a time."""
SHOWN = 200
"""Rows of a report that a notebook or a Python prompt shows; `rows` has them all."""


@dataclass(frozen=True, slots=True, repr=False)
class UsageReport:
    """The usage of one period. In a notebook or at a prompt it shows itself as a table."""

    by: str
    zone: str
    where: Filter
    rows: list[UsageRow]
    total: UsageRow
    """All messages, each counted once: by tag, the rows may add up to more."""
    unpriced_models: tuple[str, ...]
    """Models of the messages that have usage and no cost."""
    rated: Rated
    """What became of the messages that had no cost yet."""
    window: str | None = None
    """"day" or "month": rows are of one of these each, and the same group has many."""
    windows: tuple[str, ...] = ()
    """Of each row."""
    voided: UsageRow = field(default_factory=lambda: UsageRow(None))
    """The part of the total that is void: it was used, and is not billed."""
    more: bool = False
    """Whether there are more groups than rows, which then are those that cost the most. The total is of all."""

    @property
    def cost_is_at_least(self) -> bool:
        """Whether there are messages with usage whose price is unknown."""
        return self.total.unpriced > 0

    @property
    def columns(self) -> list[str]:
        """Names of the columns: the group, its key where that does not follow from it, the counts and the cost."""
        window = [self.window] if self.window else []
        return [*window, *(["key"] if self.by == "conversation" else []), self.by, *COUNTS, "cost_usd"]

    @property
    def caption(self) -> str:
        """What the report is about, in a line."""
        since, until = self.where.since, self.where.until
        tz = zone_of(self.zone)
        when = "".join(
            f" {word} {moment.astimezone(tz):%Y-%m-%d %H:%M}"
            for word, moment in (("from", since), ("until", until))
            if moment is not None
        )
        cost = money(self.total.cost_usd, self.total.unpriced, decimals_for(self.total.cost_usd))
        by = self.by if self.window is None else f"{self.by} and {self.window}"
        return f"Usage by {by}{when} ({self.zone}): {many(self.total.messages, 'message')}, {cost} USD"

    @property
    def notes(self) -> list[str]:
        """What the figures leave out, a sentence each."""
        notes, total = [], self.total
        if self.by == "tag" and sum(row.messages for row in self.rows) > total.messages:
            notes.append("A message with several tags is in several rows; the total counts it once.")
        if self.more:
            notes.append(
                f"There are more than these {many(len(self.rows), 'row')}, which cost the most; the total is of all. "
                "A larger limit shows more, CSV without a limit has all."
            )
        if total.unpriced:
            because = f" ({self.rated.reason})" if self.rated.reason else ""
            models = ", ".join(self.unpriced_models)
            notes.append(f"The cost of {many(total.unpriced, 'message')} is unknown{because}: no price for {models}.")
        if total.unreported:
            came = many(total.unreported, "message")
            notes.append(f"{came} came without usage: counted, but with no tokens and no cost.")
        if self.voided.messages:
            notes.append(void_text(self.voided.messages))
        if self.by == "key" and any(row.group is None for row in self.rows):
            notes.append("Calls outside any usage_context have no key; `spryng doctor` names their lines of code.")
        return notes

    def table(self, most: int | None = None) -> Table:
        """The report for people: the columns that matter, numbers with separators, and a total.

        Args:
            most: rows to show. None: all.
        """
        period_zone = f" ({self.zone})" if self.by in WINDOWS else ""
        names = ("messages", "conversations", "errors", "input_tokens", "cached_tokens", "output_tokens")
        columns = [
            *([Column(f"{self.window} ({self.zone})")] if self.window else []),
            *([Column("key", fold=True)] if self.by == "conversation" else []),
            Column(f"{self.by}{period_zone}", fold=True),
            Column("messages", True, 1),
            Column("conversations", True, 6),
            Column("errors", True, 5),
            Column("input", True, 3),
            Column("cached", True, 4),
            Column("output", True, 2),
            Column("cost USD", True),
        ]
        decimals = decimals_for(self.total.cost_usd)
        lines = [
            [
                *self.windows[index : index + 1],
                *([label("key", row.key)] if self.by == "conversation" else []),
                label(self.by, row.group),
                *(f"{getattr(row, name):,}" for name in names),
                money(row.cost_usd, row.unpriced, decimals),
            ]
            for index, row in enumerate(self.rows[:most])
        ]
        labels = len(columns) - len(names) - 1
        figures = [f"{getattr(self.total, name):,}" for name in names]
        cost = money(self.total.cost_usd, self.total.unpriced, decimals)
        return Table(columns, lines, ["total", *[""] * (labels - 1), *figures, cost])

    def records(self) -> list[dict[str, Any]]:
        """A dictionary a row, with costs as Decimal: pandas.DataFrame(report.records())."""
        return [{**self._record(index, row), "cost_usd": row.cost_usd} for index, row in enumerate(self.rows)]

    def __str__(self) -> str:
        """The whole table."""
        return "\n".join([self.caption, self.table().text(), *self.notes])

    def __repr__(self) -> str:
        """The table, as long as a screen or some can be."""
        return "\n".join([self.caption, self.table(SHOWN).text(), *self._more(), *self.notes])

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return self.table(SHOWN).html(self.caption, [*self._more(), *self.notes])

    def _more(self) -> list[str]:
        hidden = len(self.rows) - SHOWN
        return [f"{many(hidden, 'row')} more: print the report, or take its rows."] if hidden > 0 else []

    def as_json(self) -> dict[str, Any]:
        """The report as JSON has it: costs as decimal strings, None for groups that have no name."""
        return {
            "by": self.by,
            "zone": self.zone,
            "since": None if self.where.since is None else self.where.since.isoformat(),
            "until": None if self.where.until is None else self.where.until.isoformat(),
            **({"window": self.window} if self.window else {}),
            "rows": [self._record(index, row) for index, row in enumerate(self.rows)],
            "more": self.more,
            "total": _counts(self.total),
            "voided": _counts(self.voided),
            "cost_is_at_least": self.cost_is_at_least,
            "unpriced_models": list(self.unpriced_models),
        }

    def _record(self, index: int, row: UsageRow) -> dict[str, Any]:
        window = {self.window: self.windows[index]} if self.window else {}
        owner = {"key": row.key} if self.by == "conversation" else {}
        return {**window, **owner, self.by: row.group, **_counts(row)}

    def as_table(self) -> list[list[Any]]:
        """A list of values a row, in the order of `columns`, with labels for groups that have no name."""
        return [
            [
                *self.windows[index : index + 1],
                *([label("key", row.key)] if self.by == "conversation" else []),
                label(self.by, row.group),
                *(getattr(row, name) for name in COUNTS),
                row.cost_usd,
            ]
            for index, row in enumerate(self.rows)
        ]


def usage(
    by: str = "key",
    *,
    key: str | None = None,
    no_key: bool = False,
    tags: Sequence[str] = (),
    model: str | None = None,
    conversation: str | None = None,
    since: str | date | None = None,
    until: str | date | None = None,
    month: str | None = None,
    zone: str = "UTC",
    window: str | None = None,
    limit: int | None = None,
    destination: str | None = None,
) -> UsageReport:
    """What `spryng usage` shows, of the same ledger and with the same words.

    What dead processes left in the journal is delivered first. What this process has recorded is in the ledger after
    spryng_instrument.flush().

    Args:
        by: "key", "tag", "conversation", "model", "day" or "month": what a row is.
        key: only this customer.
        no_key: only messages without a key.
        tags: only messages with all of these.
        model: only this model, as it answered.
        conversation: only this conversation.
        since: from then: a date, a time, or text as of the command line's --since.
        until: until then. A date includes that whole day, a time is exclusive.
        month: one month, "2026-11", instead of both.
        zone: the IANA zone of days, and of times without an offset.
        window: "day" or "month": the groups of each.
        limit: so many rows at most, those that cost the most; `more` says whether there are others. None: all.
        destination: URL of the ledger. Default: SPRYNG_DESTINATION, or sqlite:///.spryng/usage.db.

    Raises:
        QueryError: one of them cannot be; the message has the value and what is allowed.
        SettingsError: the ledger cannot be read from here.
        StoreError: it is not there, or does not answer.
    """
    where = _filter(key, no_key, tags, model, conversation, since, until, month, zone)
    return usage_report(_ledger(destination), by, where, zone, window, limit=limit)


def messages(
    *,
    key: str | None = None,
    no_key: bool = False,
    tags: Sequence[str] = (),
    model: str | None = None,
    conversation: str | None = None,
    since: str | date | None = None,
    until: str | date | None = None,
    month: str | None = None,
    zone: str = "UTC",
    destination: str | None = None,
) -> Iterator[StoredMessage]:
    """Every message of the ledger, newest first, with its cost. Arguments and errors are those of `usage`.

    They are read as they are asked for, however many there are. `message_record` makes a dictionary of one.
    """
    where = _filter(key, no_key, tags, model, conversation, since, until, month, zone)
    store = _ledger(destination)
    rate(store)
    return chain.from_iterable(pages_of(lambda after: store.messages(where, after=after, limit=PAGE)))


def conversations(
    *,
    key: str | None = None,
    no_key: bool = False,
    tags: Sequence[str] = (),
    model: str | None = None,
    since: str | date | None = None,
    until: str | date | None = None,
    month: str | None = None,
    zone: str = "UTC",
    destination: str | None = None,
) -> Iterator[Conversation]:
    """Every conversation, the one that began last first, with what was used in it. The rest is as for `messages`.

    `conversation_record` makes a dictionary of one.
    """
    where = _filter(key, no_key, tags, model, None, since, until, month, zone)
    store = _ledger(destination)
    rate(store)
    return chain.from_iterable(pages_of(lambda after: store.conversations(where, after=after, limit=PAGE)))


def _filter(
    key: str | None,
    no_key: bool,
    tags: Sequence[str],
    model: str | None,
    conversation: str | None,
    since: str | date | None,
    until: str | date | None,
    month: str | None,
    zone: str,
) -> Filter:
    if no_key and key is not None:
        raise QueryError(f"key={key!r} and no_key=True exclude each other")
    start, stop = period(_text(since), _text(until), month, zone)
    return Filter(key, no_key, (tags,) if isinstance(tags, str) else tuple(tags), model, conversation, start, stop)


def _text(moment: str | date | None) -> str | None:
    return moment.isoformat() if isinstance(moment, date) else moment


def _ledger(destination: str | None) -> Store:
    settings = settings_of(destination, None)
    store = open_ledger(settings)
    left = deliver_waiting(settings)
    if left is not None:
        text = f"Messages that wait in {settings.journal} are not in these figures: {left}"
        warnings.warn(text, stacklevel=3)
    return store


def usage_report(
    store: Store,
    by: str,
    where: Filter = Filter(),  # noqa: B008
    zone: str = "UTC",
    window: str | None = None,
    rated: Rated | None = None,
    *,
    limit: int | None = None,
) -> UsageReport:
    """Usage of the messages of *where*, grouped by one of GROUPS, with the costs that can be known now.

    Args:
        window: "day" or "month": the groups of each. A conversation then counts in each that it has a message in.
        rated: what rate() said, where it was called just before.
        limit: so many rows at most, but for days and months: those that cost the most. None: all.

    Raises:
        QueryError: an unknown *by*, *zone* or *window*, or a *limit* below 1.
        StoreError: the ledger cannot be read.
    """
    zone_of(zone)
    if window not in (None, *WINDOWS) or (window and by in WINDOWS):
        raise QueryError(f"window={window!r} must be one of: {', '.join(WINDOWS)}; and by={by!r} none of them")
    if limit is not None and limit < 1:
        raise QueryError(f"limit={limit!r} must be a whole number of rows, 1 or more")
    rated = rated or rate(store)
    windows: list[str] = []
    asked = None if limit is None or by in WINDOWS else limit + 1
    if window:
        found, total = store.usage_by_window(by, window, where, zone=zone, limit=asked)
        windows, rows = [name for name, _ in found], [row for _, row in found]
    else:
        rows, total = store.usage_and_total(by, where, zone=zone, limit=asked)
    more = len(rows) == asked
    if more:
        last = max(range(len(rows)), key=lambda number: most_first(rows[number]))
        del rows[last], windows[last : last + 1]
    models = tuple(
        label("model", row.group) for row in (store.usage("model", where) if total.unpriced else ()) if row.unpriced
    )
    voided = store.voided(where)
    return UsageReport(by, zone, where, rows, total, models, rated, window, tuple(windows), voided, more)


def whole_report(report: UsageReport, store: Store) -> Iterator[UsageReport]:
    """A report that has more than its rows, in parts that have all: of so many conversations, one customer a part."""
    if not report.more:
        yield report
    elif report.total.conversations <= AT_A_TIME or report.by != "conversation" or report.where.key is not None:
        yield usage_report(store, report.by, report.where, report.zone, report.window, report.rated)
    else:
        for customer in store.usage("key", report.where):
            where = replace(report.where, key=customer.group, no_key=customer.group is None)
            yield usage_report(store, report.by, where, report.zone, report.window, report.rated)


@dataclass(frozen=True, slots=True)
class Trend:
    """Messages of each day, for the rows of a report."""

    days: tuple[str, ...]
    """Without a gap, up to that of the newest message."""
    counts: dict[tuple[str | None, str | None], list[int]]
    """By a row's (key, group), a count for each of the days."""
    total: list[int]
    """Each message once."""


def trend(store: Store, by: str, where: Filter, zone: str, most: int) -> Trend:
    """Messages by day of the last days of *where*, *most* at most, a question each."""
    tz = zone_of(zone)
    newest = store.messages(where, limit=1).rows
    days: list[str] = []
    found: list[tuple[list[UsageRow], UsageRow]] = []
    moment = newest[0].message.timestamp if newest else None
    while moment is not None and len(days) < most and (where.since is None or moment >= where.since):
        day, start, stop = period_of("day", moment, tz)
        days.append(day)
        found.append(store.usage_and_total(by, within(where, start, stop)))
        moment = start - timedelta(microseconds=1)
    while found and not found[-1][0]:  # before the first message there is nothing to show
        del days[-1], found[-1]
    counts: dict[tuple[str | None, str | None], list[int]] = {}
    for number, (rows, _) in enumerate(reversed(found)):
        for row in rows:
            counts.setdefault((row.key, row.group), [0] * len(found))[number] = row.messages
    return Trend(tuple(reversed(days)), counts, [total.messages for _, total in reversed(found)])


def label(by: str, group: str | None) -> str:
    """The name of a group."""
    return group if group is not None else NONE_LABELS.get(by, "(unknown)")


def decimal_text(amount: Decimal | None) -> str | None:
    """An amount in plain digits, without an exponent and without zeros at its end."""
    if amount is None:
        return None
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def message_record(row: StoredMessage, zone: tzinfo = timezone.utc) -> dict[str, Any]:
    """A message as JSON has it: every field, None where there is nothing, its time in *zone*."""
    message = row.message
    record: dict[str, Any] = {name: getattr(message, name) for name in message.__struct_fields__}
    usage = message.usage
    record["timestamp"] = message.timestamp.astimezone(zone).isoformat()
    record["tags"] = list(message.tags)
    record["usage"] = None if usage is None else {name: getattr(usage, name) for name in usage.__struct_fields__}
    return {**record, "cost_usd": decimal_text(row.cost_usd), "price_version": row.price_version}


def conversation_record(row: Conversation, zone: tzinfo = timezone.utc) -> dict[str, Any]:
    """A conversation as JSON has it: whose it is, when it was, and what was used in it."""
    return {
        "key": row.usage.key,
        "conversation": row.usage.group,
        "first": row.first.astimezone(zone).isoformat(),
        "last": row.last.astimezone(zone).isoformat(),
        **_counts(row.usage),
    }


def _counts(row: UsageRow) -> dict[str, Any]:
    return {**{name: getattr(row, name) for name in COUNTS}, "cost_usd": decimal_text(row.cost_usd)}
