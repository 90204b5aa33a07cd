"""Budgets: how much a customer may use in a day or a month. Read from a file; what was used of them, by a ledger.

Invariant: a period begins at midnight of the budget's own zone, and a message counts in the one that its call began in.
Messages are those to bill; tokens are input and output of every message that reported them; cost is what the ledger has
priced, and "at least" where it has usage without a price. This module knows nothing of the SDK, nor of who is asking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from spryng_instrument import toml
from spryng_instrument.errors import MissingExtraError, QueryError, SettingsError
from spryng_instrument.periods import day_of, midnight, month_from, zone_of
from spryng_instrument.store.base import Filter, UsageRow

UNITS = ("messages", "tokens", "cost_usd")
"""What a budget can limit."""
PERIODS = ("day", "month")
ON_UNKNOWN = ("open", "closed")
EVERY_KEY = "*"
"""As a budget's key: every customer has it for itself."""
NOTHING = UsageRow(None)


@dataclass(frozen=True, slots=True)
class Budget:
    """One `[[budget]]` of the file."""

    name: str
    period: str
    """One of PERIODS."""
    key: str | None = None
    """The customer; EVERY_KEY: each one has it for itself; None: all customers together, and calls without a key."""
    tag: str | None = None
    """Only messages with this tag. None: all."""
    messages: int | None = None
    tokens: int | None = None
    cost_usd: Decimal | None = None
    hard: bool = False
    """Whether a call is refused once a limit is reached. Otherwise there are alerts only."""
    on_unknown: str = "open"
    """What a call does that a hard budget cannot be looked up for: "open", it goes through; "closed", it is refused."""
    anchor_day: int = 1
    """Day of the month that a month begins with; in a shorter month, its last day."""
    zone: str = "UTC"
    """IANA zone, the file's, of its days and months."""

    @property
    def limits(self) -> list[tuple[str, int | Decimal]]:
        """(unit, limit) of each that it has."""
        return [(unit, getattr(self, unit)) for unit in UNITS if getattr(self, unit) is not None]

    def concerns(self, key: str | None, tags: Sequence[str]) -> bool:
        """Whether a call of that customer, with those tags, counts in it."""
        ours = self.key is None or self.key == key or (self.key == EVERY_KEY and key is not None)
        return ours and (self.tag is None or self.tag in tags)

    def period_of(self, time: datetime) -> tuple[datetime, datetime]:
        """(start, stop), in UTC, of the period that *time* is in."""
        tz = zone_of(self.zone)
        today = time.astimezone(tz).date()
        if self.period == "day":
            return midnight(today, tz), midnight(today + timedelta(days=1), tz)
        start = month_from(today, self.anchor_day)
        return midnight(start, tz), midnight(day_of(start.year, start.month + 1, self.anchor_day), tz)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a file of budgets says."""

    budgets: tuple[Budget, ...]
    webhook: str | None = None
    """URL that alerts are posted to. None: they are in the log only."""


class Question(NamedTuple):
    """What a ledger is asked for one period of a budget. Budgets that ask the same share the answer."""

    key: str | None
    tag: str | None
    since: datetime
    until: datetime

    @property
    def filter(self) -> Filter:
        """Which messages it is about."""
        key = None if self.key == EVERY_KEY else self.key
        return Filter(key, tags=() if self.tag is None else (self.tag,), since=self.since, until=self.until)


class Usages(Protocol):
    """What is asked: a Store, or a server that has one."""

    def usage(self, by: str, where: Filter = ..., *, zone: str = "UTC") -> list[UsageRow]: ...

    def total(self, where: Filter = ...) -> UsageRow: ...


Answer = Mapping[str | None, UsageRow]
"""Usage by customer; of all together as that of None."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """How much of one limit is used, in the period that is running."""

    name: str
    """The budget's."""
    key: str | None
    """The customer. None: all together."""
    tag: str | None
    unit: str
    """One of UNITS."""
    used: int | Decimal
    limit: int | Decimal
    percent: int
    """Rounded down: 100 says that it is reached."""
    hard: bool
    start: datetime
    """UTC, inclusive."""
    stop: datetime
    """UTC, exclusive: when it begins anew."""
    at_least: bool
    """Whether there is usage whose price is unknown, so that more is used than *used* says."""


def budget_states(store: Usages, budgets: Sequence[Budget], now: datetime) -> list[BudgetState]:
    """How much is used of each limit of *budgets*: a line each, and one a customer where each has its own.

    Raises:
        StoreError: the ledger cannot be read.
    """
    answers: dict[Question, Answer] = {}
    for budget in budgets:
        question = question_of(budget, now)
        if question not in answers:
            answers[question] = ask(store, question)
    return states_of(budgets, now, answers)


def question_of(budget: Budget, now: datetime) -> Question:
    """What to ask for the budget's period that *now* is in."""
    return Question(budget.key, budget.tag, *budget.period_of(now))


def ask(store: Usages, question: Question) -> Answer:
    """The answer of a ledger."""
    if question.key == EVERY_KEY:
        return {row.group: row for row in store.usage("key", question.filter) if row.group is not None}
    return {question.key: store.total(question.filter)}


def states_of(budgets: Sequence[Budget], now: datetime, answers: Mapping[Question, Answer]) -> list[BudgetState]:
    """What the answers say of *budgets*; nothing of those whose question is not answered."""
    return [
        BudgetState(
            budget.name, key, budget.tag, unit, used_of(row, unit), limit, int(used_of(row, unit) * 100 // limit),
            budget.hard, question.since, question.until, unit == "cost_usd" and row.unpriced > 0,
        )
        for budget in budgets
        for question in [question_of(budget, now)]
        for key, row in answers.get(question, {}).items()
        for unit, limit in budget.limits
    ]  # fmt: skip


def used_of(row: UsageRow, unit: str) -> int | Decimal:
    """What a row has used, in a unit."""
    if unit == "messages":
        return row.messages
    return row.input_tokens + row.output_tokens if unit == "tokens" else row.cost_usd or Decimal(0)


def amount_text(amount: int | Decimal, unit: str) -> str:
    """ "1,000 messages", "12.5 USD"."""
    return f"{_number_text(amount)} {'USD' if unit == 'cost_usd' else unit}"


def used_text(used: int | Decimal, limit: int | Decimal, unit: str) -> str:
    """ "1,000 of 2,000 messages"."""
    return f"{_number_text(used)} of {amount_text(limit, unit)}"


def _number_text(amount: int | Decimal) -> str:
    text = f"{amount:,f}" if isinstance(amount, Decimal) else f"{amount:,}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def read_budgets(path: str) -> Budgets:
    """The budgets of a TOML file.

    Raises:
        SettingsError: it cannot be read, or something in it cannot be; the message names budget, field and value.
        MissingExtraError: Python 3.10 needs a package for TOML.
    """
    try:
        found = toml.read(Path(path).read_text("utf-8"))
    except OSError as exc:
        raise SettingsError(f"budgets={path!r} cannot be read: {exc.strerror or exc}") from exc
    except MissingExtraError:
        raise
    except ValueError as exc:
        raise SettingsError(f"{path} is no TOML: {exc}") from exc
    _no_others(path, found, ("webhook", "zone", "budget"))
    zone = _checked(f"{path}: ", "zone", found.get("zone", "UTC"), _zone)
    tables = found.get("budget", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise SettingsError(f"{path}: budget must be tables, each beginning with a line [[budget]]")
    budgets = [_budget(path, number, table, zone) for number, table in enumerate(tables, 1)]
    for number, budget in enumerate(budgets):
        if budget.name in [other.name for other in budgets[:number]]:
            raise SettingsError(f"{path}: name={budget.name!r} is given to two budgets; each needs its own")
    webhook = found.get("webhook")
    if webhook is not None:
        _checked(f"{path}: ", "webhook", webhook, _url)
    return Budgets(tuple(budgets), webhook)


def _budget(path: str, number: int, table: Mapping[str, Any], zone: str) -> Budget:
    name = table.get("name")
    where = f"{path}: budget {name!r}: " if isinstance(name, str) else f"{path}: budget number {number}: "
    _no_others(where.removesuffix(": "), table, tuple(_FIELDS))
    for required in ("name", "period"):
        if required not in table:
            raise SettingsError(f"{where}{required} is missing: it must be {_FIELDS[required][1]}")
    if not any(unit in table for unit in UNITS):
        raise SettingsError(f"{where}it has no limit; give one or more of: {', '.join(UNITS)}")
    values = {field: _checked(where, field, value, _FIELDS[field]) for field, value in table.items()}
    if "anchor_day" in values and values["period"] != "month":
        raise SettingsError(f"{where}anchor_day={values['anchor_day']!r} is for period='month' only")
    return Budget(**values, zone=zone)


_Check = tuple[Callable[[Any], bool], str]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= 255


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63


def _is_amount(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return False
    return Decimal(value).is_finite() and 0 < value < 10**12


def _is_zone(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(zone_of(value))
    except QueryError:
        return False


def _is_url(value: Any) -> bool:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


_TEXT: _Check = (_is_text, "a text of 1 to 255 characters")
_COUNT: _Check = (_is_count, "a whole number, 1 or more")
_FLAG: _Check = (lambda value: isinstance(value, bool), "true or false")
_FIELDS: dict[str, _Check] = {
    "name": _TEXT,
    "period": (lambda value: value in PERIODS, " or ".join(map(repr, PERIODS))),
    "key": (_is_text, f"a customer's key, or {EVERY_KEY!r} for each customer by itself"),
    "tag": _TEXT,
    "messages": _COUNT,
    "tokens": _COUNT,
    "cost_usd": (_is_amount, "a number of US dollars, more than 0"),
    "hard": _FLAG,
    "on_unknown": (lambda value: value in ON_UNKNOWN, " or ".join(map(repr, ON_UNKNOWN))),
    "anchor_day": (lambda value: _is_count(value) and value <= 31, "a day of the month, 1 to 31"),
}
"""What a [[budget]] can have: how each is checked, and what is allowed."""
_zone: _Check = (_is_zone, "an IANA name, as in 'Europe/Berlin'")
_url: _Check = (_is_url, "a URL that begins with https:// (or http://, within a network that is trusted)")


def _checked(where: str, name: str, value: Any, check: _Check) -> Any:
    is_right, allowed = check
    if not is_right(value):
        shown = str(value) if isinstance(value, Decimal) else repr(value)
        raise SettingsError(f"{where}{name}={shown} must be {allowed}")
    return Decimal(value) if name == "cost_usd" else value


def _no_others(where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    if unknown := sorted(set(table) - set(names)):
        raise SettingsError(f"{where}: {unknown[0]!r} is unknown; there are: {', '.join(names)}")
