"""What a quantity costs under a plan: the lines of a bill. Pure functions.

Invariant: an amount is exact until it is rounded, once a line, half away from zero, to the currency's minor unit. What
is unknown is a gap that is named, never zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Literal

import msgspec

from spryng_instrument.billing.currencies import EXPONENT
from spryng_instrument.billing.plans import Rate, Version, scheme_of
from spryng_instrument.store.base import UsageRow

_WHOLE = {"input": "cached", "output": "reasoning"}
"""What may be billed apart from each."""


class Part(msgspec.Struct, frozen=True):
    """Units at one price."""

    units: Decimal
    price: Decimal
    """For `per` units of its line."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a bill."""

    id: str
    """The same for the same rate of a period whenever it is drawn up: a later bill says the difference."""
    kind: Literal["usage", "minimum", "adjustment"]
    """adjustment: one that a person made, with a reason."""
    text: str
    month: str
    """The billing period that it is of: on a later bill, what became known of it since."""
    quantity: Decimal | None = None
    included: Decimal = Decimal(0)
    """Of the quantity, units that are free."""
    per: int = 1
    parts: tuple[Part, ...] = ()
    amount: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class Rated:
    """The lines of a period, and what they leave open."""

    lines: tuple[Line, ...]
    gaps: tuple[str, ...]
    """What is not in the amounts because it is unknown: each a sentence with the model that it is about."""
    notes: tuple[str, ...]


def rated(version: Version, rows: Iterable[UsageRow], conversations: int, month: str) -> Rated:
    """The lines of one customer's period.

    Args:
        rows: the customer's of a Meter, one a model.
        conversations: begun within the period.
    """
    quantities: dict[int, Decimal] = {}
    gaps: list[str] = []
    unreported = 0
    for row in rows:
        unreported += row.unreported
        for meter, quantity in _quantities(version, row).items():
            number = version.rate_of(meter, row.group)
            if number is not None:
                quantities[number] = quantities.get(number, Decimal(0)) + quantity
            elif quantity and version.bills(meter):
                gaps.append(f"No rate for {quantity:,} {meter} of {row.group or '(unknown)'}.")
        if row.unpriced and version.rate_of("cost", row.group) is not None:
            gaps.append(f"The cost of {row.unpriced:,} messages of {row.group or '(unknown)'} is unknown.")
    number = version.rate_of("conversations", None)
    if number is not None:
        quantities[number] = Decimal(conversations)
    lines = [_line(version, number, quantities.get(number, Decimal(0)), month) for number in range(len(version.rates))]
    used = sum((line.amount for line in lines), Decimal(0))
    if version.minimum:
        nothing = round_money(Fraction(0), version.currency)
        lacking = max(round_money(Fraction(version.minimum), version.currency) - used, nothing)
        lines.append(
            Line(id="minimum", kind="minimum", text=f"up to the minimum of {version.minimum:,}", month=month,
                 amount=lacking)
        )  # fmt: skip
    notes = []
    if unreported and any(rate.meter not in ("messages", "conversations") for rate in version.rates):
        notes.append(f"{unreported:,} messages came without usage: nothing is billed for their tokens.")
    return Rated(tuple(lines), tuple(gaps), tuple(notes))


def of_length(version: Version, days: int, usual: int) -> Version:
    """The plan for a period of so many days that another anchor day has made longer or shorter than is usual.

    What it costs at least is by its days. What is included and where tiers end holds once, as for any period.
    """
    if days == usual or not version.minimum:
        return version
    minimum = round_money(Fraction(version.minimum) * days / usual, version.currency)
    return msgspec.structs.replace(version, minimum=minimum)


def _quantities(version: Version, row: UsageRow) -> Counter[str] | dict[str, Decimal]:
    """What a model's messages add to each meter that is billed, but for conversations."""
    counts = {
        "messages": Decimal(row.messages),
        "input": Decimal(row.input_tokens),
        "cached": Decimal(row.cached_tokens),
        "output": Decimal(row.output_tokens),
        "reasoning": Decimal(row.reasoning_tokens),
        "tokens": Decimal(row.input_tokens + row.output_tokens),
        "cost": row.cost_usd or Decimal(0),
    }
    for whole, part in _WHOLE.items():
        if version.rate_of(part, row.group) is None:
            del counts[part]  # it is billed as what it is part of
        else:
            counts[whole] -= counts[part]
    return counts


def _line(version: Version, number: int, quantity: Decimal, month: str) -> Line:
    rate = version.rates[number]
    included = min(rate.included, max(quantity, Decimal(0)))
    parts = tuple(_parts(rate, quantity - included))
    if rate.meter == "cost":
        assert rate.markup is not None
        parts = (Part(quantity - included, (1 + rate.markup) * (version.usd_rate or 1)),) if quantity else ()
    exact = sum((Fraction(part.units) * Fraction(part.price) / rate.per for part in parts), Fraction(0))
    return Line(
        id=f"{number + 1}:{rate.meter}:{rate.model}",
        kind="usage",
        text=rate.text,
        month=month,
        quantity=quantity,
        included=included,
        per=rate.per,
        parts=parts,
        amount=round_money(exact, version.currency),
    )


def _parts(rate: Rate, units: Decimal) -> Iterable[Part]:
    if units <= 0 or rate.meter == "cost":
        return
    scheme = scheme_of(rate)
    if scheme == "flat":
        assert rate.price is not None
        yield Part(units, rate.price)
    elif scheme == "package":
        assert rate.price is not None
        yield Part(Decimal(ceil(Fraction(units) / rate.per) * rate.per), rate.price)
    elif scheme == "volume":
        yield Part(units, next(tier.price for tier in rate.tiers if tier.up_to is None or units <= tier.up_to))
    else:
        below = Decimal(0)
        for tier in rate.tiers:
            end = units if tier.up_to is None else min(units, tier.up_to)
            if end > below:
                yield Part(end - below, tier.price)
                below = end


def difference(now: Sequence[Line], billed: Sequence[Line]) -> tuple[Line, ...]:
    """What is to be billed beside what was *billed*, so that all of it together is *now*."""
    amounts: dict[str, Decimal] = {}
    quantities: dict[str, Decimal] = {}
    included: dict[str, Decimal] = {}
    named: dict[str, Line] = {}
    for sign, lines in ((1, now), (-1, billed)):
        for line in lines:
            named.setdefault(line.id, line)
            amounts[line.id] = amounts.get(line.id, Decimal(0)) + sign * line.amount
            quantities[line.id] = quantities.get(line.id, Decimal(0)) + sign * (line.quantity or 0)
            included[line.id] = included.get(line.id, Decimal(0)) + sign * line.included
    return tuple(
        msgspec.structs.replace(
            line,
            parts=(),
            quantity=None if line.quantity is None else quantities[id],
            included=included[id],
            amount=amounts[id],
        )
        for id, line in named.items()
        if amounts[id] or quantities[id]
    )


def round_money(exact: Fraction, currency: str) -> Decimal:
    """An amount in whole minor units of its currency, halves away from zero."""
    digits = EXPONENT[currency]
    scaled = abs(exact) * 10**digits
    units = (2 * scaled.numerator + scaled.denominator) // (2 * scaled.denominator)
    return Decimal(units if exact >= 0 else -units).scaleb(-digits)
