"""Days, months and billing periods: where each begins, in a zone of its own; and which of them a text means.

Invariant: a text that cannot be one is an error that says what to write, never a guess. Of messages, and of where they
are kept, nothing is known here: capture and reports go by the same days.
"""

from __future__ import annotations

import calendar
import re
from datetime import date, datetime, timedelta, timezone, tzinfo
from zoneinfo import ZoneInfo

from spryng_instrument.errors import QueryError

MOMENTS = "a date (2026-11-30), a time (2026-11-30T14:00), today, yesterday, or an age (90min, 24h, 7d, 2w)"
"""What --since and --until take."""
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIME = re.compile(r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}(?::\d{2}(?:\.\d{3}(?:\d{3})?)?)?)(Z|[+-]\d{2}:\d{2})?", re.I)
_AGE = re.compile(r"(\d{1,6})(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def zone_of(name: str) -> tzinfo:
    """The IANA zone of that name. UTC is there on machines without a zone database, too.

    Raises:
        QueryError: there is none.
    """
    if name.upper() == "UTC":
        return timezone.utc
    try:
        return ZoneInfo(name)
    except Exception:
        raise QueryError(f"zone {name!r} is unknown; give an IANA name, as in Europe/Berlin or UTC") from None


def midnight(day: date, tz: tzinfo) -> datetime:
    """The first moment of a day, in UTC. Where clocks skip midnight, that is the moment they do."""
    return datetime(day.year, day.month, day.day, tzinfo=tz).astimezone(timezone.utc)


def day_of(year: int, month: int, day: int) -> date:
    """That day of a month, or the last one of a shorter month. Months go on beyond 1 and 12.

    Raises:
        ValueError: before the year 1, or after 9999.
    """
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    return date(year, month, min(day, calendar.monthrange(year, month)[1]))


def period_of(by: str, time: datetime, tz: tzinfo) -> tuple[str, datetime, datetime]:
    """(label, start, stop) of the day or month, in the zone, that *time* is in."""
    day = time.astimezone(tz).date()
    if by == "day":
        return day.isoformat(), midnight(day, tz), midnight(day + timedelta(days=1), tz)
    return f"{day:%Y-%m}", midnight(day.replace(day=1), tz), midnight(day_of(day.year, day.month + 1, 1), tz)


def month_from(day: date, anchor_day: int) -> date:
    """The day on which the month began that *day* is in, for months that begin on *anchor_day*."""
    start = day_of(day.year, day.month, anchor_day)
    return start if start <= day else day_of(day.year, day.month - 1, anchor_day)


def period(
    since: str | None, until: str | None, month: str | None, zone: str, *, now: datetime | None = None
) -> tuple[datetime | None, datetime | None]:
    """The moments that a period begins (inclusive) and ends (exclusive) at, as since, until and month say it.

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
        return midnight(first, tz), midnight(day_of(first.year, first.month + 1, 1), tz)
    except (ValueError, OverflowError) as exc:
        raise QueryError(f"month={text!r} is no month: {exc}; write it as 2026-11") from None


def _moment(name: str, text: str, tz: tzinfo, now: datetime) -> tuple[datetime, datetime]:
    """What *text* says: the first moment of it, and the first one after it."""
    try:
        if text in ("today", "yesterday") or _DATE.fullmatch(text):
            today = now.astimezone(tz).date()
            day = {"today": today, "yesterday": today - timedelta(days=1)}.get(text) or date.fromisoformat(text)
            return midnight(day, tz), midnight(day + timedelta(days=1), tz)
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
