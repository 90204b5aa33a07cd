"""What Prometheus may know of a server: counts and times, of all its workers; nothing of any customer."""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from spryng_instrument.store.base import Receipt

CONTENT_TYPE = CONTENT_TYPE_LATEST
_registry = CollectorRegistry()
_messages = Counter("spryng_messages", "Messages taken, by what became of them.", ["outcome"], registry=_registry)
_requests = Histogram(
    "spryng_request_seconds", "Requests, by path and status.", ["path", "status"], registry=_registry,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)  # fmt: skip
_waiting = Gauge(
    "spryng_waiting_messages", "Messages that wait for a transaction.", registry=_registry, multiprocess_mode="livesum"
)


def count(receipt: Receipt, waiting: int) -> None:
    """Count what became of messages, and how many wait now."""
    _waiting.set(waiting)
    for outcome in set(receipt.outcomes):
        _messages.labels(outcome).inc(receipt.count(outcome))


def answered(path: str, status: int, seconds: float) -> None:
    """Count an answer."""
    _requests.labels(path, str(status)).observe(seconds)


def text() -> bytes:
    """The exposition, of all workers where there are several."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(_registry)
    registry = CollectorRegistry()
    for pid in _workers():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid)  # type: ignore[no-untyped-call,unused-ignore]
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call,unused-ignore]
    return generate_latest(registry)


def _workers() -> set[int]:
    """Every worker that there was: what waits in a dead one waits no more."""
    return {int(path.stem.rpartition("_")[2]) for path in Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).glob("gauge_*")}
