"""How a message lies in a row: the same columns, names and units in every engine that speaks SQL.

Times are whole microseconds since 1970, costs whole trillionths of a US dollar: both are exact in 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from operator import itemgetter
from typing import Any

import msgspec

from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import COST_UNIT, Cost, Outcome, StoredMessage

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)

USAGE = Usage.__struct_fields__
ADDED = ("cached_audio_tokens", "cached_image_tokens")
"""Counts that ledgers got a column for by a later migration."""
FIRST_USAGE = tuple(name for name in USAGE if name not in ADDED)
TEXTS = (
    "key", "conversation_id", "query", "operation", "status", "request_model", "response_model", "response_id",
    "request_id", "service_tier", "host", "error", "call_site", "writer",
)  # fmt: skip
INTEGERS = ("retries", "http_status", "sequence")
REALS = ("latency_ms", "time_to_first_token_ms")
JSON = ("properties", "tool_usage")
PLAIN = (*TEXTS, *INTEGERS, *REALS)
COLUMNS = ("id", "timestamp_us", "streamed", "tags", *JSON, *PLAIN, *USAGE)
"""What `row_of` makes and `message_of` takes, in this order. `tags` is JSON in SQLite, and an array elsewhere."""
SELECT = ", ".join(f"m.{name}" for name in (*COLUMNS, "cost_pusd", "price_version"))
"""What `stored_of` takes."""

_FIELDS = Message.__struct_fields__
_COLUMN = {"timestamp": "timestamp_us", "usage": USAGE[0]}
_in_order = itemgetter(*(COLUMNS.index(_COLUMN.get(name, name)) for name in _FIELDS))
"""The columns of a row in the order of a message's fields."""
_TIMESTAMP, _STREAMED, _TAGS, _USAGE = map(_FIELDS.index, ("timestamp", "streamed", "tags", "usage"))
_JSONS = tuple(map(_FIELDS.index, JSON))
_NO_COUNTS = (None,) * len(USAGE)


def row_of(message: Message) -> tuple[Any, ...]:
    """The values of a message's COLUMNS."""
    usage = message.usage
    return (
        message.id,
        micros(message.timestamp),
        message.streamed,
        msgspec.json.encode(message.tags).decode(),
        *(None if value is None else msgspec.json.encode(value).decode() for value in
          (message.properties, message.tool_usage)),
        *[getattr(message, name) for name in PLAIN],
        *([None] * len(USAGE) if usage is None else [getattr(usage, name) for name in USAGE]),
    )  # fmt: skip


def message_of(row: Sequence[Any]) -> Message:
    """The message of a row of COLUMNS."""
    values = list(_in_order(row))
    values[_TIMESTAMP] = moment(values[_TIMESTAMP])
    values[_STREAMED] = bool(values[_STREAMED])
    tags = values[_TAGS]
    values[_TAGS] = msgspec.json.decode(tags, type=tuple[str, ...]) if isinstance(tags, str) else tuple(tags)
    for place in _JSONS:
        if values[place] is not None:
            values[place] = msgspec.json.decode(values[place])
    counts = tuple(row[-len(USAGE) :])
    values[_USAGE] = None if counts == _NO_COUNTS else Usage(*counts)
    return Message(*values)


def stored_of(row: Sequence[Any]) -> StoredMessage:
    """The message and its cost, of a row of SELECT."""
    *columns, cost, price_version = row
    return StoredMessage(message_of(columns), usd(cost), price_version)


def is_same(one: Message, other: Message) -> bool:
    """Whether two messages say the same. A usage without a single count says as much as none."""
    return one == other or row_of(one) == row_of(other)


def sort_out(messages: Sequence[Message], there: Mapping[str, Message]) -> tuple[dict[str, Message], list[Outcome]]:
    """Those that are new, by id, and what becomes of each; *there* are the ones that a ledger has already.

    Within a batch, too, the first message of an id is the one that is kept.
    """
    new: dict[str, Message] = {}
    outcomes: list[Outcome] = []
    for message in messages:
        known = there.get(message.id) or new.get(message.id)
        if known is None:
            new[message.id] = message
            outcomes.append("recorded")
        else:
            outcomes.append("duplicate" if is_same(known, message) else "conflict")
    return new, outcomes


def numbers_of(messages: Iterable[Message]) -> dict[str, list[int]]:
    """The numbers that each process gave to its messages."""
    numbers: dict[str, list[int]] = {}
    for message in messages:
        if message.writer is not None:
            numbers.setdefault(message.writer, []).append(message.sequence or 0)
    return numbers


def micros(time: datetime) -> int:
    """Microseconds since 1970."""
    return (time - EPOCH) // _MICROSECOND


def moment(us: int) -> datetime:
    """The time of so many microseconds since 1970, UTC."""
    return EPOCH + timedelta(microseconds=us)


def usd(pusd: int | None) -> Decimal | None:
    """US dollars of so many trillionths of one."""
    return None if pusd is None else pusd * COST_UNIT


def pusd(usd: Decimal | None) -> int | None:
    """Trillionths of so many US dollars."""
    return None if usd is None else int(usd / COST_UNIT)


def first_known(costs: Sequence[Cost]) -> dict[str, Cost]:
    """By message, the first of these costs that is known, or else the first."""
    found: dict[str, Cost] = {}
    for cost in costs:
        if cost.message_id not in found or found[cost.message_id].cost_usd is None:
            found[cost.message_id] = cost
    return found
