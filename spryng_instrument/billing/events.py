"""What other billing systems are fed with: meter events of Stripe, batches of events of Lago. One event is one message.

Invariant: an event's id is the message's. What is sent twice is counted once: by Stripe within 24 hours, by Lago for
good. A message whose quantity is zero or unknown makes no event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from spryng_instrument.billing.behind import pages
from spryng_instrument.billing.plans import Plans
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.store.base import Filter, Store

METERS = ("messages", "input", "cached", "uncached", "output", "reasoning", "tokens")
"""What a message can be worth: 1, or a count of its usage. uncached is input that was not read from a cache."""
BATCH = 100
"""Events that Lago takes at a time. Source: its POST /api/v1/events/batch."""
STRIPE_PAST, STRIPE_AHEAD = timedelta(days=35), timedelta(minutes=5)
"""How old, and how far ahead, Stripe lets an event be. Source: its POST /v1/billing/meter_events."""


@dataclass(slots=True)
class Skipped:
    """What no event was made of."""

    unmapped: dict[str | None, int] = field(default_factory=dict)
    """Messages by customers that the file of plans gives no id for."""
    too_old: int = 0
    """Messages that Stripe would refuse."""


def stripe(
    store: Store, plans: Plans, where: Filter, meter: str, name: str, skipped: Skipped, now: datetime | None = None
) -> Iterator[dict[str, Any]]:
    """A meter event of Stripe for each message, the newest first.

    Args:
        meter: one of METERS.
        name: the meter's event_name.
        skipped: is told what no event is made of.
    """
    now = now or datetime.now(timezone.utc)
    for message, value, customer in _billed(store, plans, where, meter, "stripe", skipped):
        if not now - STRIPE_PAST <= message.timestamp <= now + STRIPE_AHEAD:
            skipped.too_old += 1
            continue
        yield {
            "event_name": name,
            "identifier": message.id,
            "timestamp": int(message.timestamp.timestamp()),
            "payload": {"stripe_customer_id": customer, "value": str(value)},
        }


def lago(
    store: Store, plans: Plans, where: Filter, meter: str, name: str, skipped: Skipped
) -> Iterator[dict[str, Sequence[dict[str, Any]]]]:
    """Bodies for Lago's batch of events, up to BATCH each.

    Args:
        meter: one of METERS; the event's property `value`.
        name: the billable metric's code.
        skipped: is told what no event is made of.
    """
    events: list[dict[str, Any]] = []
    for message, value, subscription in _billed(store, plans, where, meter, "lago", skipped):
        properties = {"value": str(value), "model": message.model, "conversation_id": message.conversation_id}
        events.append(
            {
                "transaction_id": message.id,
                "external_subscription_id": subscription,
                "code": name,
                "timestamp": f"{message.timestamp.timestamp():.3f}",
                "properties": {name: text for name, text in properties.items() if text is not None},
            }
        )
        if len(events) == BATCH:
            yield {"events": events}
            events = []
    if events:
        yield {"events": events}


def quantity(message: Message, meter: str) -> int:
    """What a message is worth to a meter, a whole number. 0 where its usage says nothing."""
    usage = message.usage
    if meter == "messages":
        return 1
    if usage is None:
        return 0
    if meter == "uncached":
        return (usage.input_tokens or 0) - (usage.cached_tokens or 0)
    if meter == "tokens":
        return (usage.input_tokens or 0) + (usage.output_tokens or 0)
    return getattr(usage, f"{meter}_tokens") or 0


def _billed(
    store: Store, plans: Plans, where: Filter, meter: str, system: str, skipped: Skipped
) -> Iterator[tuple[Message, int, str]]:
    """Each message to bill that is worth something, what it is worth, and its customer's id in that system."""
    void = {record.subject for record in store.records("void", key=where.key)}
    for rows in pages(store, where):
        for row in rows:
            message = row.message
            if message.status not in BILLABLE or message.id in void or not (value := quantity(message, meter)):
                continue
            customer: str | None = getattr(plans.account(message.key), system)
            if customer is None:
                skipped.unmapped[message.key] = skipped.unmapped.get(message.key, 0) + 1
            else:
                yield message, value, customer
