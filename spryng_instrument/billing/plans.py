"""Rate plans: what a customer pays for what, and from when on. One TOML file, checked whole before any of it is used.

    plan = "pro"                              # of every customer that has none of its own
    zone = "Europe/Berlin"                    # whose days; default: UTC
    anchor_day = 1                            # of the month, on which a billing period begins

    [[plans.pro]]                             # a version; the next one is appended, never written over this
    effective = 2026-01-01                    # for billing periods that begin then or later
    currency = "USD"
    minimum = 20
    rates = [
      { meter = "conversations", price = 1 },
      { meter = "input", model = "gpt-4o*", price = 3.00, per = 1_000_000, included = 100_000 },
    ]

    [keys.acme]                               # what is different for one customer
    plan = "enterprise"
    anchor_day = 15

Invariant: money is Decimal from the file to the bill; a number is what its digits say.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import msgspec

from spryng_instrument import toml
from spryng_instrument.billing.currencies import EXPONENT
from spryng_instrument.errors import PlanError, QueryError
from spryng_instrument.periods import day_of, midnight, month_from, zone_of

METERS = ("messages", "conversations", "input", "cached", "output", "reasoning", "tokens", "cost")
"""What can be billed. cached is a part of input, and reasoning of output: where one has no rate of its own, it is
billed as what it is part of; where it has one, the other rate is for the rest. tokens are input and output together.
cost is the list price in US dollars."""
Meter = Literal["messages", "conversations", "input", "cached", "output", "reasoning", "tokens", "cost"]
Scheme = Literal["flat", "graduated", "volume", "package"]
LARGEST, PLACES = 10**12, 15
"""Numbers are not larger, and have no more decimal places: so no product of two is rounded but where a bill rounds."""
DEFAULT_FILE = ".spryng/plans.toml"
EXAMPLE = """\
plan = "standard"

[[plans.standard]]
effective = 2026-01-01
currency = "USD"
rates = [{ meter = "conversations", price = 1.00 }]
"""


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of a quantity, and its price."""

    price: Decimal
    """For `per` units of the rate."""
    up_to: Decimal | None = None
    """The last unit of it, counted after what is included. None: the last tier has no end."""


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The price of one meter."""

    meter: Meter
    model: str = "*"
    """Of which models, as a pattern: "gpt-4o*". The first rate of a meter that fits a model is the one for it."""
    price: Decimal | None = None
    """For `per` units."""
    per: int = 1
    """Units that a price is for: 1_000_000 for prices per million tokens."""
    included: Decimal = Decimal(0)
    """Units of a period that are free."""
    scheme: Scheme | None = None
    """flat: each unit at one price. graduated: each unit at the price of the tier that it lies in. volume: all units at
    the price of the tier that their number lies in. package: each begun package of `per` units. Default: flat, or
    graduated where there are tiers."""
    tiers: tuple[Tier, ...] = ()
    markup: Decimal | None = None
    """For the meter cost: what is added to it, 0.2 for 20%."""
    name: str | None = None
    """What the line on the bill says instead of the meter and the model."""

    @property
    def text(self) -> str:
        """What the line on the bill says."""
        what = {
            "input": "input tokens",
            "cached": "cached input tokens",
            "output": "output tokens",
            "reasoning": "reasoning tokens",
            "cost": "cost of the models, USD",
        }.get(self.meter, str(self.meter))
        return self.name or (what if self.model == "*" else f"{what}, {self.model}")

    def fits(self, model: str | None) -> bool:
        """Whether it is for that model."""
        return fnmatchcase(model if model is not None else "(unknown)", self.model)


class Version(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plan as it is from a day on."""

    effective: date
    """For billing periods that begin on this day, or later and before the next version's."""
    rates: tuple[Rate, ...]
    currency: str = "USD"
    minimum: Decimal = Decimal(0)
    """What a period costs at least: a line of its own makes up the difference. It is by days where another anchor day
    makes a period longer or shorter."""
    usd_rate: Decimal | None = None
    """Units of the currency for one US dollar: needed where a rate for cost is in another currency."""

    def rate_of(self, meter: str, model: str | None) -> int | None:
        """The number of the rate of that meter for that model."""
        for number, rate in enumerate(self.rates):
            if rate.meter == meter and rate.fits(model):
                return number
        return None

    def bills(self, meter: str) -> bool:
        """Whether any rate is of that meter."""
        return any(rate.meter == meter for rate in self.rates)


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is different for one customer."""

    plan: str | None = None
    zone: str = ""
    anchor_day: int = 0
    name: str = ""
    """As it stands on the bill. Default: the key."""
    stripe: str | None = None
    """Stripe's id of the customer, "cus_..."."""
    lago: str | None = None
    """Lago's external id of the subscription."""


class Plans(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    plans: dict[str, tuple[Version, ...]]
    plan: str | None = None
    """Of customers that have none of their own. None: they are not billed, and named."""
    zone: str = "UTC"
    anchor_day: int = 1
    issuer: str | None = None
    """Who sends the bill."""
    keys: dict[str, Account] = {}

    def account(self, key: str | None) -> Account:
        """What holds for a customer: its own, or else what holds for all."""
        own = self.keys.get(key or "", Account())
        return msgspec.structs.replace(
            own,
            plan=own.plan or self.plan,
            zone=own.zone or self.zone,
            anchor_day=own.anchor_day or self.anchor_day,
            name=own.name or key or "",
        )

    def version(self, plan: str, begins: date) -> Version | None:
        """The version of a plan for a period that begins on that day. None: the plan begins later."""
        known = [each for each in self.plans[plan] if each.effective <= begins]
        return max(known, key=lambda each: each.effective, default=None)


def load(path: str | Path) -> Plans:
    """The plans of a file.

    Raises:
        PlanError: it is not there, or something in it cannot be; the message has the file, the place and the value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanError(
            f"there are no plans at {path}. Write them there, or name their file with --plans or SPRYNG_PLANS. "
            f"To begin with:\n\n{EXAMPLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(f"{path} cannot be read: {exc}") from None
    return parse(text, str(path))


def parse(text: str, source: str = "plans") -> Plans:
    """The plans that a TOML text says.

    Raises:
        PlanError: something in it cannot be.
    """
    try:
        plans = msgspec.convert(toml.read(text), Plans)
    except (ValueError, msgspec.ValidationError) as exc:
        raise PlanError(f"{source}: {exc}") from None
    try:
        _check(plans)
    except ValueError as exc:
        raise PlanError(f"{source}: {exc}") from None
    return plans


def billing_period(month: str, anchor_day: int, zone: str) -> tuple[datetime, datetime]:
    """The first moment of the billing period that begins in *month*, and the first one after it; in UTC.

    An anchor day that a month does not have is its last day.

    Raises:
        QueryError: no such month or zone.
    """
    tz = zone_of(zone)
    match = re.fullmatch(r"([0-9]{4})-([0-9]{2})", month)
    try:
        if match is None:
            raise ValueError("it is not written like one")
        year, number = int(match[1]), int(match[2])
        if not 1 <= number <= 12:
            raise ValueError("there are twelve")
        start, stop = day_of(year, number, anchor_day), day_of(year, number + 1, anchor_day)
        return midnight(start, tz), midnight(stop, tz)
    except (ValueError, OverflowError) as exc:
        raise QueryError(f"month={month!r} is no month: {exc}; write it as 2026-11") from None


def month_of(moment: datetime, anchor_day: int, zone: str) -> str:
    """The month in which the billing period of a moment begins."""
    return f"{month_from(moment.astimezone(zone_of(zone)).date(), anchor_day):%Y-%m}"


def next_month(month: str, step: int = 1) -> str:
    """The month after "2026-11", or so many *step*s further on; -1: the one before it."""
    return f"{day_of(int(month[:4]), int(month[5:]) + step, 1):%Y-%m}"


def _check(plans: Plans) -> None:
    """What no type says."""
    if not plans.zone or not plans.anchor_day:
        raise ValueError(f"zone={plans.zone!r} and anchor_day={plans.anchor_day} must say when a day and a month begin")
    _check_account("", Account(plans.plan, plans.zone, plans.anchor_day), plans)
    if "" in plans.keys:
        raise ValueError('keys."" is nobody: messages without a key are on no bill')
    for key, account in plans.keys.items():
        _check_account(f"keys.{key}: ", account, plans)
    for name, versions in plans.plans.items():
        if not versions:
            raise ValueError(f"plans.{name} has no version; write [[plans.{name}]] with effective and rates")
        days = [each.effective for each in versions]
        if twice := sorted({str(day) for day in days if days.count(day) > 1}):
            raise ValueError(f"plans.{name} has two versions that are effective on {twice[0]}")
        currencies = sorted({each.currency for each in versions})
        if len(currencies) > 1:
            raise ValueError(f"plans.{name} has versions in {' and in '.join(currencies)}; make another plan of one")
        for version in versions:
            _check_version(f"plans.{name} of {version.effective}: ", version)


def _check_account(where: str, account: Account, plans: Plans) -> None:
    if account.plan is not None and account.plan not in plans.plans:
        raise ValueError(f"{where}plan={account.plan!r} is not there; there are: {', '.join(plans.plans) or 'none'}")
    if account.zone:
        try:
            zone_of(account.zone)
        except QueryError as exc:
            raise ValueError(f"{where}{exc}") from None
    if not 0 <= account.anchor_day <= 31:
        raise ValueError(f"{where}anchor_day={account.anchor_day} must be between 1 and 31")


def _check_version(where: str, version: Version) -> None:
    if version.currency not in EXPONENT:
        raise ValueError(f"{where}currency={version.currency!r} is no code of ISO 4217, as in USD or EUR")
    _not_negative(where, "minimum", version.minimum)
    _not_negative(where, "usd_rate", version.usd_rate)
    if version.currency == "USD" and version.usd_rate not in (None, 1):
        raise ValueError(f"{where}usd_rate={version.usd_rate}: one US dollar is 1 USD; leave it out")
    if not version.rates and not version.minimum:
        raise ValueError(f"{where}has no rates; give rates = [{{ meter = ..., price = ... }}]")
    if version.bills("cost") and version.currency != "USD" and not version.usd_rate:
        raise ValueError(
            f"{where}a rate for cost, which is in US dollars, needs usd_rate: {version.currency} for one US dollar"
        )
    if version.bills("tokens") and any(map(version.bills, ("input", "cached", "output", "reasoning"))):
        raise ValueError(f"{where}tokens are input and output together: bill these apart or together, not both")
    for part, whole in (("cached", "input"), ("reasoning", "output")):
        if version.bills(part) and not version.bills(whole):
            raise ValueError(f"{where}a rate for {part} is for a part of {whole}: give a rate for {whole}, too")
    seen: set[tuple[str, str]] = set()
    for number, rate in enumerate(version.rates, 1):
        if (rate.meter, rate.model) in seen:
            raise ValueError(f"{where}rates[{number}]: there is a rate for {rate.text} before it")
        seen.add((rate.meter, rate.model))
        try:
            _check_rate(rate)
        except ValueError as exc:
            raise ValueError(f"{where}rates[{number}], {rate.text}: {exc}") from None


def _check_rate(rate: Rate) -> None:
    for name in ("price", "included", "markup"):
        _not_negative("", name, getattr(rate, name))
    if not 1 <= rate.per <= LARGEST:
        raise ValueError(f"per={rate.per} must be 1 or more, and at most {LARGEST:,}")
    if rate.meter == "conversations" and rate.model != "*":
        raise ValueError(f"model={rate.model!r}: a conversation may be with many models; leave it out")
    if rate.meter == "cost":
        if rate.markup is None or rate.price is not None or rate.tiers or rate.per != 1 or rate.scheme is not None:
            raise ValueError("takes markup, as in markup = 0.2 for 20%, and neither price, per, scheme nor tiers")
        return
    if rate.markup is not None:
        raise ValueError(f"markup={rate.markup} is for the meter cost")
    scheme = scheme_of(rate)
    if scheme in ("flat", "package"):
        if rate.price is None or rate.tiers:
            raise ValueError(f"scheme {scheme} takes a price and no tiers")
        return
    if rate.price is not None or not rate.tiers:
        raise ValueError(
            f"scheme {scheme} takes no price but tiers = [{{ up_to = ..., price = ... }}, {{ price = ... }}]"
        )
    for tier in rate.tiers:
        _not_negative("", "price", tier.price)
        _not_negative("", "up_to", tier.up_to)
    ends = [tier.up_to for tier in rate.tiers]
    if ends[-1] is not None or None in ends[:-1]:
        raise ValueError("every tier but the last has up_to, and the last has none")
    for before, end in zip([Decimal(0), *ends], ends[:-1], strict=False):
        if end <= before:  # type: ignore[operator]
            raise ValueError(f"up_to={end} must be more than {before}")


def scheme_of(rate: Rate) -> Scheme:
    """The scheme of a rate, given or not."""
    return rate.scheme or ("graduated" if rate.tiers else "flat")


def _not_negative(where: str, name: str, value: Decimal | None) -> None:
    if value is None:
        return
    if not (value.is_finite() and value >= 0):
        raise ValueError(f"{where}{name}={value} must be a number that is not negative")
    if value > LARGEST or value.as_tuple().exponent < -PLACES:  # type: ignore[operator]
        raise ValueError(f"{where}{name}={value} must be at most {LARGEST:,}, with at most {PLACES} decimal places")
