"""What the server says of the ledger: usage, messages and conversations, by parameters named as on the command line."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import msgspec
from starlette.datastructures import QueryParams
from starlette.responses import Response

from spryng_instrument.api import MAX_BYTES
from spryng_instrument.billing.bills import last_invoices
from spryng_instrument.errors import QueryError
from spryng_instrument.periods import period, zone_of
from spryng_instrument.prices import Rated, rate
from spryng_instrument.reports import (
    CONVERSATIONS,
    UsageReport,
    conversation_record,
    decimal_text,
    message_record,
    usage_report,
    whole_report,
)
from spryng_instrument.server.answers import Asking
from spryng_instrument.store.base import GROUPS, Filter, Store
from spryng_instrument.tables import write_csv

MAX_PAGE = 1_000
MAX_ROWS = 100_000
"""Rows that may be asked for at once, where rows are asked for by their number."""
MAX_FILTER_TAGS = 100
"""Tags to be filtered by; each is a condition of its own."""
MAX_IDS = 500
"""Ids to be looked for: more would not fit the head of a request."""
PRICING_S = 1.0
"""For how long a question sets costs before it is answered. Whatever is left waits for the next, or for `_tidy`."""
_STEP = 50
"""Messages that are read at a time: a page of long ones ends early."""
WHO = ("key", "no_key", "tag", "model", "conversation")
WHEN = ("since", "until", "month", "zone")
_PAGE = ("after", "limit")
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "/usage": ("by", "window", *WHO, *WHEN, "limit", "format"),
    "/messages": (*WHO, *WHEN, *_PAGE),
    "/conversations": (*WHO, *WHEN, *_PAGE),
    "/recorded": ("id",),
    "/bills": ("key", *_PAGE),
}
"""What each path takes."""


def priced(store: Store) -> Rated:
    """Set the costs that are not known yet, but let nobody wait for a ledger full of them."""
    return rate(store, within_s=PRICING_S, again=False)


def usage(store: Store, query: QueryParams, answers: Asking) -> Response | Iterator[str]:
    """Usage by one of GROUPS, as JSON, or as the parts of a CSV."""
    where, zone = _question("/usage", query)
    by, form = one(query, "by", "key"), one(query, "format", "json")
    if by not in GROUPS:
        raise QueryError(f"by={by!r} must be one of: {', '.join(GROUPS)}")
    if form not in ("json", "csv"):
        raise QueryError(f"format={form!r} must be json or csv")
    limit = _limit(query, MAX_ROWS) if "limit" in query else CONVERSATIONS if by == "conversation" else None
    window = one(query, "window")

    def find() -> UsageReport:
        return usage_report(store, by, where, zone, window, priced(store), limit=limit)

    if form == "json":
        asked = ("usage", by, where, zone, window, limit)
        body, _ = answers.get(asked, lambda: msgspec.json.encode(find().as_json()))
        return Response(body, media_type="application/json")
    report = find()
    return usage_csv([report] if "limit" in query else whole_report(report, store))


def usage_csv(reports: Iterable[UsageReport], hidden: Sequence[str] = ()) -> Iterator[str]:
    """A report as CSV, a part of it at a time, but for the columns that are *hidden*."""
    for number, report in enumerate(reports):
        shown = [number for number, name in enumerate(report.columns) if name not in hidden]
        rows = ([*row[:-1], decimal_text(row[-1])] for row in report.as_table())
        lines = chain([] if number else [report.columns], rows)
        text = io.StringIO()
        write_csv(text, ([row[number] for number in shown] for row in lines))
        yield text.getvalue()


def messages(store: Store, query: QueryParams) -> Response:
    """A page of messages, newest first."""
    where, zone = _question("/messages", query)
    priced(store)
    after, left = one(query, "after"), _limit(query)
    tz = zone_of(zone)
    records: list[msgspec.Raw] = []
    size = 0
    while left and size < MAX_BYTES:
        page = store.messages(where, after=after, limit=min(left, _STEP))
        more = [msgspec.Raw(msgspec.json.encode(message_record(row, tz))) for row in page.rows]
        records += more
        size += sum(map(len, map(bytes, more)))
        left, after = left - len(more), page.next
        if after is None:
            break
    return _json({"messages": records, "next": after})


def conversations(store: Store, query: QueryParams) -> Response:
    """A page of conversations, the one that began last first."""
    where, zone = _question("/conversations", query)
    priced(store)
    page = store.conversations(where, after=one(query, "after"), limit=_limit(query))
    tz = zone_of(zone)
    return _json({"conversations": [conversation_record(row, tz) for row in page.rows], "next": page.next})


def bills(store: Store, query: QueryParams) -> Response:
    """A page of the bills that were closed, the last one first."""
    check_names("/bills", query, PARAMETERS["/bills"])
    page = last_invoices(store, one(query, "key"), after=one(query, "after"), limit=_limit(query))
    return _json({"bills": page.rows, "next": page.next})


def recorded(store: Store, query: QueryParams) -> Response:
    """Which of some messages are in the ledger."""
    check_names("/recorded", query, PARAMETERS["/recorded"])
    ids = query.getlist("id")
    if len(ids) > MAX_IDS:
        raise QueryError(f"id={ids[0]!r} and others are {len(ids)}; {MAX_IDS} are allowed")
    found = store.found(ids)
    return _json({"ids": [id for id in ids if id in found]})


def _question(path: str, query: QueryParams) -> tuple[Filter, str]:
    check_names(path, query, PARAMETERS[path])
    return where_and_zone(query)


def check_names(path: str, query: QueryParams, names: Sequence[str]) -> None:
    """Let a misspelt filter be an error, not an answer about more than was asked for.

    Raises:
        QueryError: the question has another name than these, or a NUL, which no message has.
    """
    for name in query:
        if name not in names:
            raise QueryError(f"{name}={query[name]!r} is no parameter of {path}; there are: {', '.join(names)}")
    for name, text in query.multi_items():
        if "\0" in text:
            raise QueryError(f"{name}={text!r} has a NUL in it, which no message has")


def where_and_zone(query: QueryParams) -> tuple[Filter, str]:
    """What a question is about.

    Raises:
        QueryError: it cannot be; the text names the parameter and its value.
    """
    zone = one(query, "zone", "UTC")
    zone_of(zone)
    no_key = one(query, "no_key", "false")
    if no_key not in ("true", "false"):
        raise QueryError(f"no_key={no_key!r} must be true or false")
    key = one(query, "key")
    if key is not None and no_key == "true":
        raise QueryError(f"key={key!r} and no_key=true exclude each other")
    since, until = period(one(query, "since"), one(query, "until"), one(query, "month"), zone)
    tags = tuple(query.getlist("tag"))
    if len(tags) > MAX_FILTER_TAGS:
        raise QueryError(f"tag={tags[0]!r} and others are {len(tags)}; {MAX_FILTER_TAGS} are allowed")
    where = Filter(key, no_key == "true", tags, one(query, "model"), one(query, "conversation"), since, until)
    return where, zone


@overload
def one(query: QueryParams, name: str) -> str | None: ...
@overload
def one(query: QueryParams, name: str, default: str) -> str: ...
def one(query: QueryParams, name: str, default: str | None = None) -> str | None:
    """The only value of a parameter."""
    values = query.getlist(name)
    if len(values) > 1:
        raise QueryError(f"{name} is given {len(values)} times; give it once")
    return values[0] if values else default


def _limit(query: QueryParams, most: int = MAX_PAGE) -> int:
    text = one(query, "limit", "100")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise QueryError(f"limit={text!r} must be a whole number between 1 and {most}")
    return int(text)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
