"""What the server says of the ledger: usage, messages and conversations, by parameters named as on the command line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import msgspec
from starlette.datastructures import QueryParams
from starlette.responses import Response

from spryng_instrument.api import MAX_BYTES
from spryng_instrument.errors import QueryError
from spryng_instrument.prices import rate
from spryng_instrument.reports import conversation_record, decimal_text, message_record, period, usage_report
from spryng_instrument.store.base import GROUPS, Filter, Store, zone_of

MAX_PAGE = 1_000
MAX_FILTER_TAGS = 100
"""Tags to be filtered by; each is a condition of its own."""
_STEP = 50
"""Messages that are read at a time: a page of long ones ends early."""
_WHO = ("key", "no_key", "tag", "model", "conversation")
_WHEN = ("since", "until", "month", "zone")
_PAGE = ("after", "limit")
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "/usage": ("by", "window", *_WHO, *_WHEN, "format"),
    "/messages": (*_WHO, *_WHEN, *_PAGE),
    "/conversations": (*_WHO, *_WHEN, *_PAGE),
}
"""What each path takes."""


def usage(store: Store, query: QueryParams) -> Response:
    """Usage by one of GROUPS, as JSON or CSV."""
    where, zone = _question("/usage", query)
    by, form = _one(query, "by", "key"), _one(query, "format", "json")
    if by not in GROUPS:
        raise QueryError(f"by={by!r} must be one of: {', '.join(GROUPS)}")
    if form not in ("json", "csv"):
        raise QueryError(f"format={form!r} must be json or csv")
    report = usage_report(store, by, where, zone, _one(query, "window"))
    if form == "json":
        return _json(report.as_json())
    return _csv(report.columns, ([*row[:-1], decimal_text(row[-1])] for row in report.as_table()))


def messages(store: Store, query: QueryParams) -> Response:
    """A page of messages, newest first."""
    where, zone = _question("/messages", query)
    rate(store)
    after, left = _one(query, "after"), _limit(query)
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
    rate(store)
    page = store.conversations(where, after=_one(query, "after"), limit=_limit(query))
    tz = zone_of(zone)
    return _json({"conversations": [conversation_record(row, tz) for row in page.rows], "next": page.next})


def _question(path: str, query: QueryParams) -> tuple[Filter, str]:
    for name in query:
        if name not in PARAMETERS[path]:
            raise QueryError(
                f"{name}={query[name]!r} is no parameter of {path}; there are: {', '.join(PARAMETERS[path])}"
            )
    zone = _one(query, "zone", "UTC")
    zone_of(zone)
    no_key = _one(query, "no_key", "false")
    if no_key not in ("true", "false"):
        raise QueryError(f"no_key={no_key!r} must be true or false")
    key = _one(query, "key")
    if key is not None and no_key == "true":
        raise QueryError(f"key={key!r} and no_key=true exclude each other")
    since, until = period(_one(query, "since"), _one(query, "until"), _one(query, "month"), zone)
    tags = tuple(query.getlist("tag"))
    if len(tags) > MAX_FILTER_TAGS:
        raise QueryError(f"tag={tags[0]!r} and others are {len(tags)}; {MAX_FILTER_TAGS} are allowed")
    for name, text in query.multi_items():
        if "\0" in text:
            raise QueryError(f"{name}={text!r} has a NUL in it, which no message has")
    where = Filter(key, no_key == "true", tags, _one(query, "model"), _one(query, "conversation"), since, until)
    return where, zone


@overload
def _one(query: QueryParams, name: str) -> str | None: ...
@overload
def _one(query: QueryParams, name: str, default: str) -> str: ...
def _one(query: QueryParams, name: str, default: str | None = None) -> str | None:
    values = query.getlist(name)
    if len(values) > 1:
        raise QueryError(f"{name} is given {len(values)} times; give it once")
    return values[0] if values else default


def _limit(query: QueryParams) -> int:
    text = _one(query, "limit", "100")
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= MAX_PAGE:
        raise QueryError(f"limit={text!r} must be a whole number between 1 and {MAX_PAGE}")
    return int(text)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Response:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return Response(text.getvalue(), media_type="text/csv; charset=utf-8")
