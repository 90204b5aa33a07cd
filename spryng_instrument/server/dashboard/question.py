"""What a page is about, as its address says it; and the addresses of the pages that lie behind its figures.

Invariant: the address says all of it, by the names that the API has. A link to a part of a figure asks for exactly that
part: the messages behind a bar are those that it adds up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone, tzinfo
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from spryng_instrument.billing.plans import DEFAULT_FILE, billing_period, load, month_of
from spryng_instrument.errors import QueryError
from spryng_instrument.periods import period_of, zone_of
from spryng_instrument.server.dashboard.session import Link
from spryng_instrument.server.reading import WHEN, WHO, check_names, one, where_and_zone
from spryng_instrument.store.base import Filter

ROOT = "/dashboard"
SHARED = f"{ROOT}/shared"
PRESETS = {
    "month": "This month",
    "last-month": "Last month",
    "7d": "7 days",
    "30d": "30 days",
    "90d": "90 days",
    "billing": "Billing period",
    "all": "All time",
}
"""Periods that move with the calendar, as `preset`. The billing period is the customer's, by the plans."""
DEFAULT = "30d"
_FILTERS = (*WHO, *WHEN, "preset")
_PERIOD = ("since", "until", "month", "preset")

Params = Mapping[str, str | Sequence[str] | None]
"""Parameters of an address, by name."""

ALL_TIME: Params = dict.fromkeys(_PERIOD)
"""The changes that ask for no period."""
WHOLE: Params = {**ALL_TIME, "tag": None, "model": None}
"""The changes that ask for the whole of a conversation."""


@dataclass(frozen=True, slots=True)
class Question:
    """A page's filters, zone and viewer."""

    where: Filter
    zone: str
    params: tuple[tuple[str, str], ...]
    """The filters as the address has them."""
    preset: str | None
    link: Link | None = None
    """The signed link by which it is asked: then all is of its customer only."""
    token: str | None = None
    """That link as the address has it."""

    @property
    def tz(self) -> tzinfo:
        """The zone of every time and day on the page."""
        return zone_of(self.zone)

    @property
    def root(self) -> str:
        """Where its pages are."""
        return ROOT if self.link is None else SHARED

    @property
    def costs(self) -> bool:
        """Whether the viewer may see what OpenAI charged."""
        return self.link is None or self.link.costs

    @property
    def period(self) -> str:
        """What it is about, in words."""
        first = None if self.where.since is None else self.where.since.astimezone(self.tz)
        last = None if self.where.until is None else (self.where.until - timedelta(microseconds=1)).astimezone(self.tz)
        if first is None and last is None:
            return "All time"
        shown = [f"{each:%-d %b %Y}" for each in (first, last) if each is not None]
        if first is None or last is None:
            return f"{'until' if first is None else 'since'} {shown[0]}"
        return shown[0] if shown[0] == shown[1] else " – ".join(shown)

    def filters(self, page: str) -> list[tuple[str, str, str]]:
        """What a page is filtered by, but for time: what, its value, and the page without it."""
        return [
            (
                name.replace("_", " "),
                value,
                self._address(page, [each for each in self.params if each != (name, value)]),
            )
            for name, value in self.params
            if name in WHO and not (name in ("key", "no_key") and (self.link or page == "key"))
        ]

    def address(self, page: str, /, *more: Params, **changes: str | Sequence[str] | None) -> str:
        """The address of another page with the same filters, but for *changes*. None: without that."""
        changed = {name: value for each in (*more, changes) for name, value in each.items()}
        kept = [(name, value) for name, value in self.params if name not in changed]
        for name, value in changed.items():
            if value is not None and not (self.link and name in ("key", "no_key")):
                kept += [(name, each) for each in ([value] if isinstance(value, str) else value)]
        return self._address(page, kept)

    def _address(self, page: str, params: list[tuple[str, str]]) -> str:
        path = self.root + (f"/{page}" if page else "")
        given = [*params, ("token", self.token)] if self.token else params
        return f"{path}?{urlencode(given)}" if given else path

    def within(self, start: datetime, stop: datetime) -> dict[str, str | None]:
        """The changes that ask for the part of the page's time from *start* to *stop*."""
        starts = max(filter(None, (start, self.where.since)))
        stops = min(filter(None, (stop, self.where.until)))
        return {**dict.fromkeys(_PERIOD), "since": self._text(starts), "until": self._text(stops, ends=True)}

    def of_key(self, key: str | None) -> dict[str, str | None]:
        """The changes that ask for one customer's part."""
        return {"key": key, "no_key": "true" if key is None else None}

    def _text(self, moment: datetime, *, ends: bool = False) -> str:
        """A moment as since or, if it *ends* a period, as until: the name of a day, where that is the same."""
        day, start, _ = period_of("day", moment - timedelta(microseconds=1) if ends else moment, self.tz)
        _, _, stop = period_of("day", start, self.tz)
        if moment == (stop if ends else start):
            return day
        return moment.astimezone(timezone.utc).isoformat()


def read(
    page: str,
    query: QueryParams,
    *,
    names: Sequence[str] = (),
    preset: str = DEFAULT,
    link: Link | None = None,
    now: datetime | None = None,
) -> Question:
    """The question of an address.

    Args:
        names: parameters of this page, beside the filters.
        preset: what period is meant where none is given.
        link: by which it is asked, if by one.
        now: what the presets refer to.

    Raises:
        QueryError: it cannot be asked; the text names the parameter and its value.
    """
    check_names(page, query, [*_FILTERS, *names, *(["token"] if link else [])])
    given = [(name, value) for name, value in query.multi_items() if name in _FILTERS]
    if link is not None:
        given = [(name, value) for name, value in given if name not in ("key", "no_key")]
        if "zone" not in query:
            given.append(("zone", link.zone))
    plain = [(name, value) for name, value in given if name != "preset"]
    chosen: str | None = None
    if not {"since", "until", "month"} & {name for name, _ in plain}:
        chosen = query.get("preset", preset)
        if chosen not in PRESETS:
            raise QueryError(f"preset={chosen!r} must be one of: {', '.join(PRESETS)}")
        if "preset" not in query and preset != DEFAULT:
            given.append(("preset", preset))  # other pages would take it for theirs
    elif "preset" in query:
        raise QueryError(f"preset={query['preset']!r} is a period of its own; give either it, or since, until, month")
    _, zone = where_and_zone(QueryParams(plain))
    where, zone = where_and_zone(QueryParams([*plain, *_days_of(chosen, zone_of(zone), now)]))
    if chosen == "billing":
        since, until = _billing_period(link.key if link else where.key, now)
        where = replace(where, since=since, until=until)
    if link is not None:
        where = replace(where, key=link.key, no_key=False)
    return Question(where, zone, tuple(given), chosen, link, query.get("token") if link else None)


def page_number(query: QueryParams, pages: int) -> int:
    """The page that is asked for; the last one instead of one beyond it: there may have been more before.

    Raises:
        QueryError: it is no number of a page.
    """
    text = one(query, "page", "1")
    if not text.isascii() or not text.isdigit() or len(text) > 6 or int(text) < 1:
        raise QueryError(f"page={text!r} must be a whole number from 1")
    return min(int(text), max(pages, 1))


def plans_file() -> str:
    """Where the plans are, by which customers are billed."""
    return os.environ.get("SPRYNG_PLANS") or DEFAULT_FILE


def _billing_period(key: str | None, now: datetime | None) -> tuple[datetime, datetime]:
    account = load(plans_file()).account(key)
    month = month_of(now or datetime.now(timezone.utc), account.anchor_day, account.zone)
    return billing_period(month, account.anchor_day, account.zone)


def _days_of(preset: str | None, tz: tzinfo, now: datetime | None) -> list[tuple[str, str]]:
    """A preset as the filters that it stands for."""
    today = (now or datetime.now(timezone.utc)).astimezone(tz).date()
    if preset == "month":
        return [("month", f"{today:%Y-%m}")]
    if preset == "last-month":
        return [("month", f"{today.replace(day=1) - timedelta(days=1):%Y-%m}")]
    if preset in ("7d", "30d", "90d"):
        return [("since", (today - timedelta(days=int(preset[:-1]) - 1)).isoformat()), ("until", today.isoformat())]
    return []
