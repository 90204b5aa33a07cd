"""Usage by key, tag, conversation, model, day or month: what a command line, a page or an invoice prints.

Pure functions over a store. Rows and total are of one moment; a total counts each message once, however often its rows
do. What has no price is never counted as free: the total then says "at least". Dates are days of one IANA zone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any

from spryng_instrument.errors import QueryError
from spryng_instrument.prices import Rated, rate
from spryng_instrument.store.base import Conversation, Filter, Store, StoredMessage, UsageRow, zone_of
from spryng_instrument.store.sql import period_of, within

NONE_LABELS = {"key": "(no key)", "conversation": "(no conversation)", "tag": "(no tag)", "model": "(unknown)"}
"""How a group is called whose messages have none."""
COUNTS = tuple(field.name for field in fields(UsageRow) if field.name not in ("group", "key", "cost_usd"))
"""The whole numbers of a row, in the order of every table."""
WINDOWS = ("day", "month")
"""What a report can be cut into."""
MOMENTS = "a date (2026-11-30), a time (2026-11-30T14:00), today, yesterday, or an age (90min, 24h, 7d, 2w)"
"""What --since and --until take."""

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}(?::\d{2}(?:\.\d{3}(?:\d{3})?)?)?)(Z|[+-]\d{2}:\d{2})?", re.I)
_AGE = re.compile(r"(\d{1,6})(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The usage of one period."""

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

    @property
    def cost_is_at_least(self) -> bool:
        """Whether there are messages with usage whose price is unknown."""
        return self.total.unpriced > 0

    @property
    def columns(self) -> list[str]:
        """Names of the columns: the group, its key where that does not follow from it, the counts and the cost."""
        window = [self.window] if self.window else []
        return [*window, *(["key"] if self.by == "conversation" else []), self.by, *COUNTS, "cost_usd"]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON has it: costs as decimal strings, None for groups that have no name."""
        return {
            "by": self.by,
            "zone": self.zone,
            "since": None if self.where.since is None else self.where.since.isoformat(),
            "until": None if self.where.until is None else self.where.until.isoformat(),
            **({"window": self.window} if self.window else {}),
            "rows": [self._record(index, row) for index, row in enumerate(self.rows)],
            "total": _counts(self.total),
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


def usage_report(
    store: Store,
    by: str,
    where: Filter = Filter(),  # noqa: B008
    zone: str = "UTC",
    window: str | None = None,
) -> UsageReport:
    """Usage of the messages of *where*, grouped by one of GROUPS, with the costs that can be known now.

    Args:
        window: "day" or "month": the groups of each. A conversation then counts in each that it has a message in.

    Raises:
        QueryError: an unknown *by*, *zone* or *window*.
        StoreError: the ledger cannot be read.
    """
    tz = zone_of(zone)
    if window not in (None, *WINDOWS) or (window and by in WINDOWS):
        raise QueryError(f"window={window!r} must be one of: {', '.join(WINDOWS)}; and by={by!r} none of them")
    rated = rate(store)
    windows: list[str] = []
    rows, total = store.usage_and_total(window or by, where, zone=zone)
    if window:
        found, rows = rows, []
        for each in found:
            _, start, stop = period_of(window, _start_of(str(each.group), tz), tz)
            of_it = store.usage(by, within(where, start, stop))
            rows += of_it
            windows += [str(each.group)] * len(of_it)
    models = tuple(
        label("model", row.group) for row in (store.usage("model", where) if total.unpriced else ()) if row.unpriced
    )
    return UsageReport(by, zone, where, rows, total, models, rated, window, tuple(windows))


def _start_of(label: str, tz: tzinfo) -> datetime:
    return _midnight(date.fromisoformat(label if len(label) > len("2026-11") else f"{label}-01"), tz)


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


def period(
    since: str | None, until: str | None, month: str | None, zone: str, *, now: datetime | None = None
) -> tuple[datetime | None, datetime | None]:
    """The moments that a report begins (inclusive) and ends (exclusive) at.

    Args:
        since: one of MOMENTS. A date begins with its first moment.
        until: one of MOMENTS. A date ends with its last moment: 2026-11-30 includes all of that day.
        month: "2026-11", instead of both.
        zone: the IANA zone of dates and of times without an offset.
        now: what ages and today refer to; default: now.

    Raises:
        QueryError: one of them cannot be; the message has the value and what is allowed.
    """
    tz = zone_of(zone)
    now = now or datetime.now(timezone.utc)
    if month is not None:
        if since is not None or until is not None:
            raise QueryError("month is a period of its own; give either --month, or --since and --until")
        return _month(month, tz)
    start = None if since is None else _moment("since", since, tz, now)[0]
    stop = None if until is None else _moment("until", until, tz, now)[1]
    if start is not None and stop is not None and start >= stop:
        raise QueryError(f"since={since!r} is not before until={until!r}; swap them")
    return start, stop


def _month(text: str, tz: tzinfo) -> tuple[datetime, datetime]:
    match = re.fullmatch(r"(\d{4})-(\d{2})", text)
    try:
        if match is None:
            raise ValueError("it is not written like one")
        first = date(int(match[1]), int(match[2]), 1)
        return _midnight(first, tz), _midnight((first + timedelta(days=31)).replace(day=1), tz)
    except (ValueError, OverflowError) as exc:
        raise QueryError(f"month={text!r} is no month: {exc}; write it as 2026-11") from None


def _moment(name: str, text: str, tz: tzinfo, now: datetime) -> tuple[datetime, datetime]:
    """What *text* says: the first moment of it, and the first one after it."""
    try:
        if text in ("today", "yesterday") or _DATE.fullmatch(text):
            today = now.astimezone(tz).date()
            day = {"today": today, "yesterday": today - timedelta(days=1)}.get(text) or date.fromisoformat(text)
            return _midnight(day, tz), _midnight(day + timedelta(days=1), tz)
        if match := _AGE.fullmatch(text):
            moment = now - timedelta(**{_UNITS[match[2]]: int(match[1])})
            return moment, moment
        if match := _TIME.fullmatch(text):
            offset = (match[3] or "").upper().replace("Z", "+00:00")
            moment = datetime.fromisoformat(f"{match[1]}T{match[2]}{offset}")
            moment = (moment if offset else moment.replace(tzinfo=tz)).astimezone(timezone.utc)
            return moment, moment
    except (ValueError, OverflowError) as exc:
        raise QueryError(f"{name}={text!r} cannot be: {exc}; give {MOMENTS}") from None
    raise QueryError(f"{name}={text!r} is no time; give {MOMENTS}")


def _midnight(day: date, tz: tzinfo) -> datetime:
    """The first moment of a day. Where clocks skip midnight, that is the moment they do."""
    return datetime(day.year, day.month, day.day, tzinfo=tz).astimezone(timezone.utc)
