"""Bills: from what a customer used and what its plan says, to an invoice that never changes.

A bill is drawn up from the ledger as it is at one moment. Closed, it is a document of the ledger, with its number, its
lines, the plan as it was and the moment up to which messages were counted. What becomes known of a closed period later
(a message that came late, one that is void, a new price) goes onto the customer's next bill: each closed period is
drawn up again by the plan that it was closed with, and what that differs by from all that was billed for it is a line.

Invariant: whatever comes when, all that was billed for a period is what a bill of it would say now, once the next bill
is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal, localcontext

import msgspec

from spryng_instrument.billing.plans import Plans, Version, billing_period, next_month
from spryng_instrument.billing.rating import Line, Rated, difference, of_length, rated
from spryng_instrument.errors import BillError, StoreBusyError
from spryng_instrument.periods import zone_of
from spryng_instrument.pricelist import DEFAULT_FILE
from spryng_instrument.store.base import EXACT, Filter, Meter, Record, Store, UsageRow
from spryng_instrument.store.rows import EPOCH

TRIES = 20
"""How often a bill is drawn up anew because somebody else closed one meanwhile."""


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """The messages that lines of a period count."""

    month: str
    start: datetime
    stop: datetime
    mark: str | None
    """Up to when they were recorded: see Filter.mark."""
    read: datetime
    """When they were counted, by what they cost then."""
    void: tuple[str, ...]
    """Ids of those that were void."""
    messages: int
    """How many they are."""
    cost_usd: Decimal

    def differs(self, other: Counted) -> bool:
        """Whether these are other messages, or cost something else."""
        return (self.messages, self.void, self.cost_usd) != (other.messages, other.void, other.cost_usd)


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """What a customer pays for a period."""

    key: str
    name: str
    issuer: str | None
    month: str
    """In which the period begins."""
    start: datetime
    stop: datetime
    """The first moment after it."""
    zone: str
    plan: str
    version: Version
    """The plan as it was, with the minimum of a period of this length."""
    currency: str
    lines: tuple[Line, ...]
    total: Decimal
    gaps: tuple[str, ...] = ()
    """What is unknown and not in the total, which is then "at least" that."""
    notes: tuple[str, ...] = ()
    counted: tuple[Counted, ...] = ()
    """Of this period, and of each earlier one that lines are of."""
    drawn: datetime
    """When."""
    number: str | None = None
    """None: a draft, which the next message may change."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """The bills of a month."""

    bills: list[Bill]
    unplanned: tuple[tuple[str | None, int], ...] = ()
    """(customer, messages to bill) of those whom no plan is for; None: messages without a key."""
    left_over: tuple[tuple[str, str, Decimal], ...] = ()
    """(customer, currency, amount) of those whose closed bills would be others by now, and who have no plan any more:
    it is on no bill until they have one."""


@dataclass(frozen=True, slots=True)
class BillPage:
    """Closed bills, the last closed first, and where the next page starts."""

    rows: list[Bill]
    next: str | None = None


def invoices(store: Store, key: str | None = None) -> list[Bill]:
    """The closed bills, in the order of their numbers."""
    return [_bill_of(record) for record in store.records("invoice", key=key)]


def last_invoices(store: Store, key: str | None = None, *, after: str | None = None, limit: int = 50) -> BillPage:
    """The closed bills, the last closed first. *after* is a page's `next`."""
    page = store.last_records("invoice", key=key, after=after, limit=limit)
    return BillPage([_bill_of(record) for record in page.rows], page.next)


def invoice(store: Store, number: str) -> Bill:
    """The closed bill of that number.

    Raises:
        BillError: there is none.
    """
    found = store.records("invoice", id=_invoice_id(number)) if number.isdigit() else []  # no engine takes every text
    if found:
        return _bill_of(found[0])
    raise BillError(f"there is no closed bill {number!r}; see them with: spryng bills")


def _invoice_id(number: str) -> str:
    return f"invoice:{number}"


def _bill_of(record: Record) -> Bill:
    return msgspec.convert(record.body, Bill)


@dataclass(frozen=True, slots=True)
class _Metered:
    """What there is to bill in a period, by customer."""

    meter: Meter
    rows: dict[str | None, list[UsageRow]]
    void: dict[str | None, list[str]]
    """Ids of the messages that are void."""


class Desk:
    """Draws up and closes the bills of one ledger, by one set of plans.

    Costs are those that the ledger has: set what can be known by `prices.rate` before.

    Args:
        key: only this customer's. What is metered then is metered for it alone.
        now: the time that it is; default: now. A period that is not over by then cannot be closed.
    """

    def __init__(self, store: Store, plans: Plans, key: str | None = None, *, now: datetime | None = None) -> None:
        self._store = store
        self._plans = plans
        self._key = key
        self._now = now
        self._look_again()

    def _look_again(self) -> None:
        self._closed: dict[str | None, list[Bill]] = {}
        """By customer."""
        last = last_invoices(self._store, limit=1).rows
        self._count = int(last[0].number or 0) if last else 0
        for bill in invoices(self._store, self._key):
            self._closed.setdefault(bill.key, []).append(bill)
        self._adjustments = self._store.records("adjustment", key=self._key)
        self._meters: dict[tuple[datetime, datetime], _Metered] = {}

    def drafts(self, month: str) -> Drafts:
        """The bills of the periods that begin in *month*: closed ones as they were closed, drafts of all others.

        Raises:
            QueryError: no such month.
            StoreError: the ledger cannot be read.
        """
        bills: list[Bill] = []
        unplanned: dict[str | None, int] = {}
        left_over: list[tuple[str, str, Decimal]] = []
        with localcontext(EXACT):
            for key in self._customers(month):
                bill = None if key is None else self._bill(month, key)
                if bill is None:
                    unplanned[key] = self._used(*self._period(month, key)).get(key, 0)
                    left_over += self._left_over(month, key)
                else:
                    bills.append(bill)
        return Drafts(bills, tuple((key, count) for key, count in unplanned.items() if count), tuple(left_over))

    def close(self, month: str, key: str, *, without_gaps: bool = False) -> Bill:
        """Freeze a bill, and give it its number. One that is closed already is returned as it was closed.

        Args:
            without_gaps: whether one with gaps is closed without what is unknown, which goes onto a later bill.

        Raises:
            BillError: the period is not over, the customer has no plan, or something is unknown.
        """
        with localcontext(EXACT):
            for _ in range(TRIES):
                bill = self._bill(month, key)
                if bill is None:
                    raise BillError(f"there is nothing to bill {key!r} for {month}: it has no message, or no plan")
                if bill.number is not None:
                    return bill
                self._check(bill, without_gaps)
                number = f"{self._count + 1:06d}"
                closed = msgspec.structs.replace(bill, number=number)
                nth = len(self._closed.get(key, ())) + 1
                # Both names are new, or nothing is appended: numbers have no gaps, and no two bills of a customer are
                # drawn up from the same bills before them.
                documents = [
                    Record(_invoice_id(number), "invoice", bill.drawn, msgspec.to_builtins(closed), key, month),
                    Record(f"invoice {nth} of {key}", "sequence", bill.drawn, {"number": number}, key, number),
                ]
                if self._store.append(documents):
                    self._closed.setdefault(key, []).append(closed)
                    self._count += 1
                    return closed
                self._look_again()
        raise StoreBusyError(f"others closed bills {TRIES} times while this one was drawn up; try again")

    def never_billed(self, bills: Sequence[Bill]) -> dict[str, int]:
        """By customer, messages before the period of *bills* that are on no bill: of months not closed.

        It asks for all that was before.
        """
        found: dict[str, int] = {}
        for bill in bills:
            before = self._used(EPOCH, bill.start).get(bill.key, 0)
            for closed in self._closed.get(bill.key, ()):
                if closed.start < bill.start:
                    before -= self._used(closed.start, closed.stop).get(bill.key, 0)
            if before:
                found[bill.key] = before
        return found

    def _check(self, bill: Bill, without_gaps: bool) -> None:
        if bill.stop > (self._now or datetime.now(timezone.utc)):
            stop = bill.stop.astimezone(zone_of(bill.zone))
            raise BillError(
                f"the period {bill.month} of {bill.key!r} is not over: it ends {stop:%Y-%m-%d %H:%M} ({bill.zone}). "
                "Close it then; until then it is a draft"
            )
        if bill.gaps and not without_gaps:
            raise BillError(
                f"the bill of {bill.key!r} for {bill.month} is not complete. {' '.join(bill.gaps)} Upgrade the prices "
                f"(pip install -U genai-prices), write them in {DEFAULT_FILE}, or add the rate; or close it without "
                "that, with --without-gaps: it then goes onto a later bill, once it is known"
            )
        if bill.counted[0].mark is None:
            raise BillError("this ledger's engine has no transactions; close bills in PostgreSQL or SQLite")

    def _customers(self, month: str) -> list[str | None]:
        """Whoever may have a bill: named in the plans, billed before, adjusted, or with messages in the month."""
        if self._key is not None:
            return [self._key]
        found: set[str | None] = {*self._plans.keys, *self._closed}
        found.update(record.key for record in self._adjustments if record.subject == month)
        accounts = [self._plans.account(key) for key in (None, *self._plans.keys)]
        for zone, anchor_day in {(account.zone, account.anchor_day) for account in accounts}:
            found.update(self._used(*billing_period(month, anchor_day, zone)))
        return sorted(found, key=lambda key: (key is None, key or ""))

    def _period(self, month: str, key: str | None) -> tuple[datetime, datetime]:
        """A customer's period; where its anchor day or zone is another one now, it joins the closed ones beside it."""
        account = self._plans.account(key)
        start, stop = billing_period(month, account.anchor_day, account.zone)
        for bill in self._closed.get(key, ()):
            if next_month(bill.month) == month:
                start, stop = bill.stop, max(bill.stop, stop)
            elif bill.month == next_month(month):
                start, stop = min(start, bill.start), bill.start
        return start, stop

    def _used(self, start: datetime, stop: datetime) -> dict[str | None, int]:
        """Messages to bill, by customer."""
        return {key: sum(row.messages for row in rows) for key, rows in self._metered(start, stop).rows.items()}

    def _metered(self, start: datetime, stop: datetime) -> _Metered:
        name = (start, stop)
        if name not in self._meters:
            meter = self._store.meter(Filter(self._key, since=start, until=stop))
            found = _Metered(meter, {}, {})
            for row in meter.rows:
                found.rows.setdefault(row.key, []).append(row)
            for record in meter.void:
                if start <= datetime.fromisoformat(record.body["timestamp"]) < stop:
                    found.void.setdefault(record.key, []).append(str(record.subject))
            self._meters[name] = found
        return self._meters[name]

    def _bill(self, month: str, key: str) -> Bill | None:
        """The bill of a customer's period. None: it has no plan, or nobody knows that customer."""
        closed = self._closed.get(key, [])
        for bill in closed:
            if bill.month == month:
                return bill
        account = self._plans.account(key)
        start, stop = self._period(month, key)
        begins = start.astimezone(zone_of(account.zone)).date()
        version = None if account.plan is None else self._plans.version(account.plan, begins)
        if account.plan is None or version is None:
            return None
        days, usual = _days(start, stop), _days(*billing_period(month, account.anchor_day, account.zone))
        full, version = version, of_length(version, days, usual)
        lines, counted, found = self._drawn_up(key, month, start, stop, version)
        adjusted = self._adjusted(key, month)
        if not (counted.messages or counted.void or adjusted or closed or key in self._plans.keys):
            return None  # a name that nobody has: the plan of everybody else is not for it
        gaps, notes = found.gaps, found.notes
        if counted.void:
            notes = (*notes, f"Of its messages, {len(counted.void):,} are void and not billed.")
        if version.minimum != full.minimum:
            notes = (
                *notes,
                f"The period has {days} days instead of {usual}, as another anchor day made it: its minimum is "
                f"{version.minimum:,} instead of {full.minimum:,}.",
            )
        all_counted = [counted]
        for earlier in closed:
            if earlier.start >= start:
                continue
            late, counted, still = self._late(key, earlier)
            if late and earlier.currency != version.currency:
                total = sum(line.amount for line in late)
                gaps = (
                    *gaps,
                    f"{earlier.currency} {total} of {earlier.month} cannot be on a bill in {version.currency}.",
                )
                continue
            lines = (*lines, *late)
            if counted.differs(counted_by(last_with(closed, earlier.month), earlier.month)):
                all_counted.append(counted)
            notes = (*notes, *(f"{earlier.month}: {gap}" for gap in still.gaps))
        return Bill(
            key=key,
            name=account.name,
            issuer=self._plans.issuer,
            month=month,
            start=start,
            stop=stop,
            zone=account.zone,
            plan=account.plan,
            version=version,
            currency=version.currency,
            lines=lines,
            total=sum((line.amount for line in lines), Decimal(0)),
            gaps=gaps,
            notes=notes,
            counted=tuple(all_counted),
            drawn=datetime.now(timezone.utc),
        )

    def _late(self, key: str, earlier: Bill) -> tuple[tuple[Line, ...], Counted, Rated]:
        """What a closed bill's period is by now, beyond all that was billed for it."""
        now, counted, found = self._drawn_up(key, earlier.month, earlier.start, earlier.stop, earlier.version)
        billed = [line for bill in self._closed[key] for line in bill.lines if line.month == earlier.month]
        return difference(now, billed), counted, found

    def _left_over(self, month: str, key: str | None) -> Iterator[tuple[str, str, Decimal]]:
        """What a customer without a plan has beyond its closed bills of earlier months, by currency."""
        amounts: dict[str, Decimal] = {}
        for earlier in self._closed.get(key, ()):
            if key is not None and earlier.month < month:
                late = sum((line.amount for line in self._late(key, earlier)[0]), Decimal(0))
                amounts[earlier.currency] = amounts.get(earlier.currency, Decimal(0)) + late
        return ((str(key), currency, amount) for currency, amount in amounts.items() if amount)

    def _drawn_up(
        self, key: str, month: str, start: datetime, stop: datetime, version: Version
    ) -> tuple[tuple[Line, ...], Counted, Rated]:
        """The lines of one period, and nothing of others."""
        metered = self._metered(start, stop)
        meter, rows = metered.meter, metered.rows.get(key, [])
        found = rated(version, rows, meter.conversations.get(key, 0), month)
        counted = Counted(
            month=month,
            start=start,
            stop=stop,
            mark=meter.mark,
            read=meter.read,
            void=tuple(metered.void.get(key, ())),
            messages=sum(row.messages for row in rows),
            cost_usd=sum((row.cost_usd or Decimal(0) for row in rows), Decimal(0)),
        )
        adjusted = self._adjusted(key, month)
        gaps = [
            f"An adjustment of {record.body['currency']} {record.body['amount']} is not in {version.currency}: "
            f"{record.body['reason']}."
            for record in adjusted
            if record.body["currency"] != version.currency
        ]
        adjustments = (
            Line(
                id=record.id,
                kind="adjustment",
                text=record.body["reason"],
                month=month,
                amount=Decimal(record.body["amount"]),
            )
            for record in adjusted
            if record.body["currency"] == version.currency
        )
        return (*found.lines, *adjustments), counted, replace(found, gaps=(*found.gaps, *gaps))

    def _adjusted(self, key: str, month: str) -> list[Record]:
        return [record for record in self._adjustments if record.key == key and record.subject == month]


def _days(start: datetime, stop: datetime) -> int:
    """How many there are, whatever a clock that is put forward or another zone makes of the hours."""
    return round((stop - start) / timedelta(days=1))


def last_with(bills: Sequence[Bill], month: str) -> Bill:
    """The last of these bills that counted messages of a period."""
    return next(bill for bill in reversed(bills) if any(counted.month == month for counted in bill.counted))


def counted_by(bill: Bill, month: str) -> Counted:
    """What a bill counted of a period."""
    return next(counted for counted in bill.counted if counted.month == month)


def sums(bills: Iterable[Bill]) -> dict[str, Decimal]:
    """The total of each currency."""
    found: dict[str, Decimal] = {}
    for bill in bills:
        found[bill.currency] = found.get(bill.currency, Decimal(0)) + bill.total
    return found
