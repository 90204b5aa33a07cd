"""How a bill reads: its lines as texts, a table of values, a page to print. Command line and server share it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from importlib.resources import files
from typing import Any

from spryng_instrument.billing.behind import Behind
from spryng_instrument.billing.bills import Bill
from spryng_instrument.billing.currencies import EXPONENT
from spryng_instrument.billing.rating import Line
from spryng_instrument.exporting import COLUMNS as MESSAGE_COLUMNS
from spryng_instrument.exporting import cells_of
from spryng_instrument.periods import zone_of
from spryng_instrument.reports import decimal_text

COLUMNS = (
    "number", "key", "name", "month", "first_day", "last_day", "zone", "plan", "line_of", "line", "kind", "quantity",
    "included", "rate", "amount", "currency",
)  # fmt: skip
"""Of the table."""
BEHIND = ("bill", "line_of", "count", "billed_cost_usd", *MESSAGE_COLUMNS)
"""Of the messages behind a bill."""


def plain(number: Decimal) -> str:
    """A number in plain digits, with thousands separators, without zeros at its end."""
    text = f"{number:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def amount_text(amount: Decimal, currency: str) -> str:
    """An amount with all places of its currency: "1,204.50"."""
    return f"{amount:,.{EXPONENT[currency]}f}"


def rate_text(line: Line) -> str:
    """What a line's units cost: "0.01", "2.50 per 1,000,000", "100 at 0.02, 150 at 0.01"."""
    per = f" per {line.per:,}" if line.per > 1 else ""
    if len(line.parts) == 1:
        return f"{_price(line.parts[0].price)}{per}"
    return ", ".join(f"{plain(part.units)} at {_price(part.price)}" for part in line.parts) + per * bool(line.parts)


def _price(price: Decimal) -> str:
    places = len(plain(price).partition(".")[2])
    return f"{price:,.{max(places, 2)}f}"


def total_text(bill: Bill) -> str:
    """The total with its currency: "at least USD 20.00" where something is unknown."""
    return f"{'at least ' if bill.gaps else ''}{bill.currency} {amount_text(bill.total, bill.currency)}"


def shown(bill: Bill) -> list[Line]:
    """The lines that a reader wants to see: those with something in them, and those of the period itself."""
    return [line for line in bill.lines if line.amount or line.quantity or line.kind == "usage"]


def period_text(bill: Bill) -> str:
    """ "2026-11-01 to 2026-11-30 (UTC)"."""
    first, last = days(bill)
    return f"{first} to {last} ({bill.zone})"


def days(bill: Bill) -> tuple[str, str]:
    """The first and the last day of a bill's period, in its zone."""
    tz = zone_of(bill.zone)
    last = bill.stop - timedelta(microseconds=1)
    return bill.start.astimezone(tz).date().isoformat(), last.astimezone(tz).date().isoformat()


def rows(bill: Bill) -> Iterator[list[Any]]:
    """A list of values a line, in the order of COLUMNS."""
    for line in bill.lines:
        yield [
            bill.number,
            bill.key,
            bill.name,
            bill.month,
            *days(bill),
            bill.zone,
            bill.plan,
            line.month,
            line.text,
            line.kind,
            None if line.quantity is None else f"{line.quantity:f}",
            f"{line.included:f}",
            rate_text(line),
            f"{line.amount:f}",
            bill.currency,
        ]


def behind_cells(bill: Bill, one: Behind) -> list[Any]:
    """The values of a message behind a bill, in the order of BEHIND."""
    return [bill.number, one.month, one.count, decimal_text(one.cost_usd), *cells_of(one.row, zone_of(bill.zone))]


def page(bills: list[Bill]) -> str:
    """An HTML page that prints each bill onto sheets of its own. It needs nothing else: no style, script or font.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain}
    source = files("spryng_instrument.billing").joinpath("bills.html").read_text("utf-8")
    texts = {"rate": rate_text, "amount": amount_text, "total": total_text, "shown": shown, "period": period_text}
    return environment.from_string(source).render(bills=bills, **texts)
