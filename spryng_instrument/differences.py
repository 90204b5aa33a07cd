"""Why figures of the same calls differ: a pure function for each cause, in the order in which they are looked for.

Invariant: a difference is the sum of what its causes explain and of what is left unexplained. A cause explains no more
than the ledger, or OpenAI's own answer, shows to be possible, and nothing that another has explained before.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timezone
from decimal import Decimal
from functools import cache
from typing import Any

from spryng_instrument.message import Message, Usage
from spryng_instrument.organization import Charge, Counts
from spryng_instrument.prices import price_of
from spryng_instrument.reports import decimal_text

MEASURES = Counts._fields
"""What is compared of a model. Costs are compared for whole days: OpenAI names models in them only as a text."""
TOKENS = MEASURES[1:]
COST = "cost_usd"
ROUNDED_USD = Decimal("0.000001")
"""What is less is how OpenAI rounds."""

MEANINGS = {
    "day boundary": "began before midnight UTC and ended after it, where OpenAI counts it",
    "open day": "OpenAI has not closed the day: compare again tomorrow",
    "batch": "a batch or a run is one message here, and as many requests there as it made of the model",
    "recorded by hand": "by track_usage() or the Track Usage API, without the host that it went to",
    "cancelled": "by the caller: no message to bill, but OpenAI may have answered it",
    "failed": "without an answer, as by a timeout: no message to bill, but OpenAI may have answered it",
    "retried": "the SDK sent it again after it had no answer in time: one message, but OpenAI may have answered each",
    "background": "begun in the background, and not read since: recorded when it is",
    "not recorded here": "other applications, projects or machines, processes without instrument(), or calls that the "
    "SDK sent again without saying so",
    "not in OpenAI's usage": "of another organization or project than the key's, or OpenAI's usage lags behind",
    "no usage reported": "streams that were left early or read raw: messages here, with unknown tokens",
    "rounding": "less than a millionth of a dollar",
    "currency": "OpenAI charges in another currency than US dollars",
    "other services": "what OpenAI charges beside models: web searches, storage, sessions, videos",
    "no price": "models without a known price: their messages have no cost here",
    "price": "tokens agree, and the price does not: a discount, a tier, or a newer price than the installed one",
}
"""Every cause, in words."""


@dataclass(slots=True)
class Line:
    """One number beside the same one of OpenAI."""

    measure: str
    """One of MEASURES, or COST."""
    ours: Decimal
    theirs: Decimal
    day: date | None = None
    """None: all days of the period."""
    model: str | None = None
    """None: all models."""
    causes: dict[str, Decimal] = field(default_factory=dict)
    """What of the difference is put to which cause."""

    @property
    def difference(self) -> Decimal:
        """What OpenAI has more."""
        return self.theirs - self.ours

    @property
    def unexplained(self) -> Decimal:
        """What is left of the difference."""
        return self.difference - sum(self.causes.values())

    def explain(self, cause: str, amount: Decimal | int) -> None:
        """Put as much as *amount* of what is left to a cause; nothing, if it would go the other way."""
        left = self.unexplained
        taken = min(left, Decimal(amount)) if left > 0 else max(left, Decimal(amount))
        if left * taken > 0:
            self.causes[cause] = self.causes.get(cause, Decimal(0)) + taken

    def add(self, other: Line) -> None:
        """Make it the sum of both."""
        self.ours += other.ours
        self.theirs += other.theirs
        for cause, amount in other.causes.items():
            self.causes[cause] = self.causes.get(cause, Decimal(0)) + amount

    def as_json(self) -> dict[str, Any]:
        """The line as JSON has it: counts as numbers, amounts of money as decimal strings."""
        written: Callable[[Decimal], Any] = decimal_text if self.measure == COST else int
        return {
            "day": None if self.day is None else self.day.isoformat(),
            "model": self.model,
            "measure": self.measure,
            "ours": written(self.ours),
            "openai": written(self.theirs),
            "difference": written(self.difference),
            "causes": {cause: written(amount) for cause, amount in self.causes.items()},
            "unexplained": written(self.unexplained),
        }


@dataclass(slots=True)
class Recorded:
    """What the ledger has of one model on one day."""

    counts: Counter[str] = field(default_factory=Counter)
    """MEASURES of the messages to bill."""
    cost_usd: Decimal = Decimal(0)
    unreported: int = 0
    """Of these messages, those whose tokens are unknown."""
    uncosted: int = 0
    """Of these messages, those without a cost."""
    batches: int = 0
    runs: int = 0
    crossing: Counter[str] = field(default_factory=Counter)
    """MEASURES of those that may have ended on the next day."""
    beside: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """MEASURES of what is no message to bill, and that OpenAI may have counted, by cause."""
    untold: set[str] = field(default_factory=set)
    """Of these causes, those with unknown tokens."""


@dataclass(slots=True, eq=False)
class Cell:
    """One model on one day, here and at OpenAI."""

    recorded: Recorded
    batch_requests: int
    """Of OpenAI's requests, those in batches."""
    open: bool
    """Whether OpenAI may still count."""
    lines: dict[str, Line]
    before: Cell | None = None
    """The same model on the day before."""
    after: Cell | None = None

    def left(self, measure: str) -> int:
        """What no cause has explained yet. 0 where OpenAI does not tell."""
        return int(self.lines[measure].unexplained) if measure in self.lines else 0


@dataclass(slots=True, eq=False)
class Day:
    """The cost of a day, with what was found out about its models."""

    line: Line
    cells: Mapping[str, Cell]
    """By model."""
    charges: Sequence[Charge]
    open: bool


Explanations = Iterator[tuple[str, str, Decimal | int]]
"""(cause, measure, amount that may be due to it, with its sign)."""


def day_boundary(cell: Cell) -> Explanations:
    """What is too much on one day and too little on the next, up to the calls that went on over midnight."""

    def crossed(first: Cell | None, second: Cell | None, measure: str) -> int:
        if first is None or second is None:
            return 0
        return max(0, min(first.recorded.crossing[measure], -first.left(measure), second.left(measure)))

    for measure in MEASURES:
        yield "day boundary", measure, crossed(cell.before, cell, measure) - crossed(cell, cell.after, measure)


def open_day(cell: Cell) -> Explanations:
    """What OpenAI has not counted yet."""
    for measure in MEASURES if cell.open else ():
        yield "open day", measure, min(0, cell.left(measure))


def batch(cell: Cell) -> Explanations:
    """Requests of one message. A batch may run on the day after it was made."""
    if cell.recorded.batches or (cell.before is not None and cell.before.recorded.batches):
        yield "batch", "requests", cell.batch_requests
    if cell.recorded.runs:
        yield "batch", "requests", max(0, cell.left("requests"))


def beside(cell: Cell) -> Explanations:
    """Calls that the ledger knows of, and that are no messages to bill."""
    for cause in MEANINGS:
        for measure, amount in cell.recorded.beside.get(cause, {}).items():
            yield cause, measure, amount


def not_recorded(cell: Cell) -> Explanations:
    """Requests that the ledger knows nothing of."""
    yield "not recorded here", "requests", max(0, cell.left("requests"))


def not_in_usage(cell: Cell) -> Explanations:
    """Messages that OpenAI knows nothing of, and their tokens."""
    for measure in MEASURES if cell.left("requests") < 0 else ():
        yield "not in OpenAI's usage", measure, min(0, cell.left(measure))


def unknown_tokens(cell: Cell) -> Explanations:
    """Tokens of calls whose tokens the ledger does not know. Of which ones cannot be told where there are several."""
    has = ["no usage reported"] if _unreported(cell) else []
    explained = cell.lines["requests"].causes
    has += [cause for cause in explained if cause == "not recorded here" or cause in cell.recorded.untold]
    for measure in TOKENS if has else ():
        yield " or ".join(has), measure, max(0, cell.left(measure))


def _unreported(cell: Cell) -> bool:
    """Whether there are messages with unknown tokens that OpenAI may have counted on this day."""
    over_midnight = cell.before is not None and cell.before.recorded.crossing["requests"] > 0
    return any(each.recorded.unreported for each in (cell, cell.before if over_midnight else None) if each is not None)


CAUSES: tuple[Callable[[Cell], Explanations], ...] = (
    day_boundary,
    open_day,
    batch,
    beside,
    not_recorded,
    not_in_usage,
    unknown_tokens,
)
"""In the order in which they are looked for."""


def open_cost(day: Day) -> Explanations:
    """What OpenAI has not charged yet."""
    yield "open day", COST, min(Decimal(0), day.line.unexplained) if day.open else 0


def currency(day: Day) -> Explanations:
    """What OpenAI charges in other money: no rate is made up here."""
    foreign = any(charge.currency != "usd" for charge in day.charges)
    yield "currency", COST, min(Decimal(0), day.line.unexplained) if foreign else 0


def other_services(day: Day) -> Explanations:
    """What is charged for, and is no model that was called that day."""
    named = (charge for charge in _dollars(day) if charge.line_item is not None)
    yield "other services", COST, total_of(charge.amount for charge in named if _model_of(charge) not in day.cells)


def cost_of_tokens(day: Day) -> Explanations:
    """What the tokens cost that were explained before, at their list price."""
    for model, cell in day.cells.items():
        for cause in dict.fromkeys(cause for line in cell.lines.values() for cause in line.causes):
            counts = {name: int(line.causes.get(cause, 0)) for name, line in cell.lines.items()}
            yield cause, COST, _worth(model, cell, counts)


def no_price(day: Day) -> Explanations:
    """What is charged for models whose messages have no cost."""
    uncosted = {model for model, cell in day.cells.items() if cell.recorded.uncosted}
    yield "no price", COST, total_of(charge.amount for charge in _dollars(day) if _model_of(charge) in uncosted)


def rounding(day: Day) -> Explanations:
    """What is too little to be anything else."""
    left = day.line.unexplained
    yield "rounding", COST, left if abs(left) < ROUNDED_USD else 0


def price(day: Day) -> Explanations:
    """All the rest, if every token has been accounted for."""
    accounted = not any(line.unexplained for cell in day.cells.values() for line in cell.lines.values())
    yield "price", COST, day.line.unexplained if accounted else 0


COST_CAUSES: tuple[Callable[[Day], Explanations], ...] = (
    open_cost,
    currency,
    other_services,
    cost_of_tokens,
    no_price,
    rounding,
    price,
)
"""The same for costs; these come after."""


@cache
def name_of(model: str | None) -> str:
    """The name of a model without the date of its snapshot: what was asked for, where nothing has answered."""
    return re.sub(r"[-:](\d{4}-\d{2}-\d{2}|\d{4}|\d{8}-v\d+)$", "", model or "(unknown)")


def total_of(amounts: Iterable[Decimal]) -> Decimal:
    """Their sum, 0 of none."""
    return sum(amounts, Decimal(0))


def _model_of(charge: Charge) -> str:
    """ "gpt-4o-mini" of "gpt-4o-mini-2024-07-18, cached input"."""
    return name_of((charge.line_item or "").partition(",")[0].strip())


def _dollars(day: Day) -> Iterator[Charge]:
    return (charge for charge in day.charges if charge.currency == "usd")


def _worth(model: str, cell: Cell, counts: Mapping[str, int]) -> Decimal:
    """The list price of tokens, with the sign that all of them have. 0: none is known."""
    sign = -1 if any(amount < 0 for amount in counts.values()) else 1
    tokens = [sign * counts.get(name, 0) for name in TOKENS]
    if min(tokens) < 0 or tokens[1] > tokens[0]:
        return Decimal(0)
    [day] = {line.day for line in cell.lines.values()}
    assert day is not None
    noon = datetime.combine(day, time(12), timezone.utc)
    usage = Usage(input_tokens=tokens[0], cached_tokens=tokens[1], output_tokens=tokens[2])
    cost = price_of(Message("", noon, "", response_model=model, usage=usage, host="api.openai.com"))
    return sign * (cost or Decimal(0))
