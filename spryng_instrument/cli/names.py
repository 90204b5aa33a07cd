"""What the shell completes: names that are in the ledger, zones, and times.

A key press is waited for: an answer that takes too long, and any error, is no answer.
"""

from __future__ import annotations

import re
import signal
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import click

from spryng_instrument.ledger import open_ledger, settings_of
from spryng_instrument.store.base import Filter, Store

MOST = 50
"""Names that are offered."""
PATIENCE_S = 1.0
_DAYS = (1, 7, 30, 366)
"""Names are looked for in so many days before the newest message, until some are found."""
_PLAIN = re.compile(r"[^\s,*?\[\](){}<>|&;$`\"'\\!#~^]+")
"""What every shell takes for one word as it stands. Other names are not offered."""

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def in_ledger(by: str) -> Complete:
    """Completes what the ledger has: by "key", "tag", "model" or "conversation"."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        with suppress(Exception), _patience():
            store = open_ledger(settings_of(ctx.params.get("destination"), None))
            return _names(store, by, ctx.params, incomplete)
        return []

    return complete


def zones(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes IANA zones, however their letters are cased."""
    return sorted(name for name in zoneinfo.available_timezones() if name.lower().startswith(incomplete.lower()))


def moments(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Completes what --since takes besides dates."""
    return [text for text in ("today", "yesterday", "24h", "7d", "30d") if text.startswith(incomplete)]


def _names(store: Store, by: str, given: dict[str, Any], incomplete: str) -> list[str]:
    where = Filter(key=given.get("key") if by == "conversation" else None)
    found: set[str] = set()
    newest = store.messages(where, limit=1).rows
    for days in _DAYS if newest else ():
        since = newest[0].message.timestamp - timedelta(days=days)
        rows = store.usage(by, Filter(key=where.key, since=since))
        found = set(_offered((row.group for row in rows), incomplete))
        if found:
            break
    return sorted(found)[:MOST]


def _offered(names: Iterable[str | None], incomplete: str) -> Iterator[str]:
    for name in names:
        if name is not None and name.startswith(incomplete) and name.isprintable() and _PLAIN.fullmatch(name):
            yield name


@contextmanager
def _patience() -> Iterator[None]:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
