"""How long the server takes for the dashboard's pages on a large ledger, beside a bare indexed query.

    python -m tests.benchmarks.dashboard sqlite:////tmp/large.db 1000000
    python -m tests.benchmarks.dashboard postgresql 1000000  # started for it

Each page is asked for 50 times, by one visitor: the median and the 99th percentile. "new": with every answer found
anew, as the first visitor waits for it; "held": with those held that took long, as a server holds them. The bare query
counts one customer's messages of one day by index.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from statistics import median, quantiles
from typing import Any

from spryng_instrument.store import open_store
from spryng_instrument.store.base import Filter
from spryng_instrument.store.sql import SqlStore
from tests.benchmarks.queries import DAYS, FILL, START, opened, timed
from tests.serving import Serving, serving

TIMES = 50
PERIOD = f"since={START:%Y-%m-%d}&until={START + timedelta(days=DAYS - 1):%Y-%m-%d}"
PAGES = {
    "overview": f"/dashboard?{PERIOD}",
    "keys": f"/dashboard/keys?{PERIOD}",
    "one key": f"/dashboard/key?key=customer-7&{PERIOD}",
    "conversations": f"/dashboard/conversations?{PERIOD}",
    "messages": f"/dashboard/messages?{PERIOD}",
    "health": "/dashboard/health",
}


def bare(store: SqlStore) -> list[float]:
    """Seconds of the bare query, each time."""
    day = Filter(key="customer-7", since=START + timedelta(days=14), until=START + timedelta(days=15))

    def ask() -> Any:
        with store._reading() as ask:
            conditions, given = store._conditions(day)
            return ask(f"SELECT count(*) FROM {store.source} WHERE {conditions}", given)

    return [timed(ask)[0] for _ in range(TIMES)]


def asked(server: Serving, path: str) -> list[float]:
    """Seconds of a page, each time."""
    seconds = []
    for _ in range(TIMES):
        took, answer = timed(lambda: server.get(path))
        assert answer.status == 200, answer.body
        seconds.append(took)
    return seconds


def told(name: str, seconds: list[float], base: float) -> None:
    middle, high = median(seconds), quantiles(seconds, n=100)[98]
    print(f"{name:<22} {middle * 1e3:8.1f} ms  {high * 1e3:8.1f} ms  {middle / base:7.0f} x", flush=True)


def main(url: str, count: int) -> None:
    store = open_store(url)
    assert isinstance(store, SqlStore)
    if not store.messages(limit=1).rows:
        FILL[type(store).__name__](store, count, DAYS * 86_400_000_000 // count)
    print(f"{type(store).__name__}, {count:,} messages      median       99%   of the bare query")
    base = bare(store)
    told("bare query", base, median(base))
    for name, limits in (("new", "answers.MOST_S=0.0"), ("held", "")):
        with serving(url, LIMITS=limits) as server:
            for page, path in PAGES.items():
                told(f"{page}, {name}", asked(server, path), median(base))


if __name__ == "__main__":
    with opened(sys.argv[1]) as url:
        main(url, int(sys.argv[2]))
