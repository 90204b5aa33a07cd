"""Ledgers for the tests of what people look at: some customers, or a hundred with names that nobody expects."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store.base import Cost, Store

MODELS = ("gpt-4o-mini-2024-07-18", "gpt-4o-2024-08-06", "text-embedding-3-small", "o3-mini", "house-model")
PRICES = (Decimal("0.0000004"), Decimal("0.000006"), Decimal("0.00000002"), Decimal("0.000003"), None)
NAMES = ("acme", "bluepeak-logistics", "cedar-bank", "delta-foods", "evergreen-energy", "fjord-shipping")
ODD = (
    "<script>alert(1)</script>",
    '"/../etc/passwd?x=1&y=2#z',
    "Ünïcödé Straßenbahn GmbH & Co. KG",
    "a-key-without-any-place-to-break-it-" * 6,
    "=HYPERLINK(1)",
)

PLANS = """
plan = "standard"

[[plans.standard]]
effective = 2026-01-01
minimum = 20

[[plans.standard.rates]]
meter = "messages"
price = 0.01

[keys.acme]
name = "Acme <Inc.>"
anchor_day = 15
zone = "Europe/Berlin"
"""
BUDGETS = """
[[budget]]
name = "each"
key = "*"
period = "month"
messages = 20

[[budget]]
name = "all"
period = "day"
cost_usd = 5
hard = true
"""


def fill(store: Store, keys: int = 6, days: int = 40, until: datetime | None = None) -> list[Message]:
    """Record the messages of so many customers, each on each of the last days, with costs; and some without a key."""
    until = until or datetime.now(timezone.utc)
    names = [*NAMES, *ODD, *(f"customer-{number:03}" for number in range(keys))][:keys]
    messages = list(_messages([*names, None], days, until))
    for start in range(0, len(messages), 500):
        store.record(messages[start : start + 500])
    store.set_costs(
        [
            Cost(each.id, price * ((each.usage.input_tokens or 0) + 3 * (each.usage.output_tokens or 0)), "test 1")
            for number, each in enumerate(messages)
            if each.usage and (price := PRICES[MODELS.index(str(each.model))]) is not None
        ]
    )
    return messages


def _messages(names: list[str | None], days: int, until: datetime) -> Iterator[Message]:
    for day in range(days):
        for number, key in enumerate(names):
            for turn in range(1 + (day * 7 + number * 3) % 5):
                model = (number + turn * turn + day // 9) % len(MODELS)
                size = 40 + (number * 131 + day * 37 + turn * 59) % 900
                failed = (day + number + turn) % 23 == 0
                time = until - timedelta(days=day, minutes=7 * turn + number + 1)
                yield Message(
                    id=new_id(int(time.timestamp() * 1e9)),
                    timestamp=time,
                    operation="embeddings" if "embedding" in MODELS[model] else "chat.completions",
                    status="error" if failed else "ok",
                    error="RateLimitError" if failed else None,
                    http_status=429 if failed else None,
                    key=key,
                    conversation_id=f"c-{day}-{number}" if number % 3 else None,
                    tags=(("support",), ("search", "batch"), (), ("support", "urgent"))[(number + day) % 4],
                    request_model=MODELS[model],
                    response_model=MODELS[model],
                    host="api.openai.com",
                    latency_ms=300.5 + size,
                    usage=None
                    if failed
                    else Usage(input_tokens=size * 3, output_tokens=size, cached_tokens=size % 500),
                    call_site=None if key else f"/srv/app/views.py:{40 + turn}",
                )
