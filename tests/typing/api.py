"""The public API as a type checker sees it: this file is checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import date, datetime, timezone
from decimal import Decimal

from typing_extensions import assert_type

import spryng_instrument
from spryng_instrument import (
    BudgetReached,
    Stats,
    flush,
    instrument,
    reports,
    stats,
    track_usage,
    tracked,
    uninstrument,
    usage_context,
)
from spryng_instrument.errors import SpryngError, UsageError

instrument()
instrument(
    destination="sqlite:///usage.db",
    journal="journal",
    default_key="acme",
    on_missing_key="raise",
    capture_query=True,
    include_usage_hosts=["gateway.example.com"],
    budgets="budgets.toml",
    on_budget="warn",
)
instrument(on_missing_key="explode")  # type: ignore[arg-type]
instrument(on_budget="explode")  # type: ignore[arg-type]


def on_budget(reached: BudgetReached) -> None:
    assert_type(reached.key, str | None)


instrument(on_budget=on_budget)
uninstrument()

with usage_context("acme") as scope:
    assert_type(scope, usage_context)
with usage_context(key="acme", conversation_id="c", tags=("a",), query="q", properties={"plan": "pro", "seats": 3}):
    pass
usage_context(7)  # type: ignore[arg-type]


async def request() -> None:
    async with usage_context("acme"):
        pass


@tracked("acme", tags=["a"])
def plain(ticket: int) -> str:
    return str(ticket)


@tracked(key=lambda ticket: f"customer-{ticket}")
async def coroutine(ticket: int) -> str:
    return str(ticket)


@tracked("acme")
def generator() -> Iterator[int]:
    yield 1


@tracked("acme")
async def async_generator() -> AsyncIterator[int]:
    yield 1


assert_type(plain(1), str)
assert_type(generator(), Iterator[int])
assert_type(async_generator(), AsyncIterator[int])
plain("x")  # type: ignore[arg-type]

assert_type(track_usage(key="acme", usage={"prompt_tokens": 1}), str)
assert_type(flush(timeout_s=1.0), bool)
assert_type(stats(), Stats)
assert_type(stats().waiting, int)
error: type[SpryngError] = UsageError
version: str = spryng_instrument.__version__

report = reports.usage(by="key", month="2026-11", zone="Europe/Berlin")
assert_type(report, reports.UsageReport)
assert_type(report.total.cost_usd, Decimal | None)
for row in reports.messages(key="acme", tags=["a"], since=date(2026, 11, 1), destination="sqlite:///usage.db"):
    assert_type(row.message.key, str | None)
for conversation in reports.conversations(until=datetime(2026, 11, 1, 12, tzinfo=timezone.utc)):
    assert_type(conversation.usage.messages, int)
reports.usage(bye="key")  # type: ignore[call-arg]
