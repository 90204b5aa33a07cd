"""The messages behind the lines of a bill: those that it counted, as they were then.

Invariant: a period's messages add up to what the bill counted, whatever came, was voided or priced anew since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from itertools import takewhile

import msgspec

from spryng_instrument.billing.bills import Bill, Counted, counted_by, invoices, last_with
from spryng_instrument.errors import BillError
from spryng_instrument.message import BILLABLE
from spryng_instrument.store.base import COPIED, COUNTED, Filter, Record, Store, StoredMessage, pages_of

_PAGE = 1_000


class Carried(Counted, frozen=True, kw_only=True):
    """What a bill counted that was closed in another ledger, in terms of this one: its mark and time are the copy's."""

    late: tuple[str, ...]
    """Ids of messages that were here by then, and are none that it counted."""
    costs: dict[str, Decimal | None]
    """What messages cost when it counted them, of those that had another cost by then."""


@dataclass(frozen=True, slots=True)
class Behind:
    """A message behind the lines of a bill."""

    month: str
    """The period whose lines it is behind."""
    count: int
    """1: it is counted. -1: it was on an earlier bill, and is taken off. 0: it costs something else than before."""
    row: StoredMessage
    """With what it cost when the bill was drawn up."""
    cost_usd: Decimal | None
    """What it adds to the bill's cost, in US dollars."""


def behind(store: Store, bill: Bill) -> Iterator[Behind]:
    """Every message behind every line, of this period first, the newest first.

    A period's messages add up to its quantities and its cost: they are found by the mark that they were counted with. A
    cost that was unknown then is unknown here, though it is known by now.

    Raises:
        BillError: that mark is another ledger's, which this one is a copy of, and the copy did not carry it over.
    """
    closed = list(takewhile(lambda other: other.number != bill.number, invoices(store, bill.key)))
    before = [last_with(closed, counted.month) for counted in bill.counted[1:]]
    return _behind(store, *map(_terms(store, bill.key), (bill, *before)))


def _terms(store: Store, key: str | None = None) -> Callable[[Bill], Bill]:
    """Says in terms of a ledger what a bill counted that may have been closed in another one."""
    copied = {record.subject for record in store.records(COPIED, key=key)}
    carried = {record.subject: record for record in store.records(COUNTED, key=key)} if copied else {}

    def in_terms_of_here(bill: Bill) -> Bill:
        if bill.number in carried:
            counted = msgspec.convert(carried[bill.number].body["counted"], tuple[Carried, ...])
            return msgspec.structs.replace(bill, counted=counted)
        if bill.number in copied:
            raise BillError(
                f"bill {bill.number} was closed in another ledger, which this one is a copy of: ask that one which "
                "messages it counted. What it bills, and what later bills differ by, is the same here"
            )
        return bill

    return in_terms_of_here


def _behind(store: Store, bill: Bill, *before: Bill) -> Iterator[Behind]:
    own, *earlier = bill.counted
    for row in _counted(store, bill.key, own):
        yield Behind(own.month, 1, row, row.cost_usd)
    for counted, last in zip(earlier, before, strict=True):
        billed = {row.message.id: row for row in _counted(store, bill.key, counted_by(last, counted.month))}
        for row in _counted(store, bill.key, counted):
            known = billed.pop(row.message.id, None)
            if known is None:
                yield Behind(counted.month, 1, row, row.cost_usd)
            elif known.cost_usd != row.cost_usd:
                yield Behind(counted.month, 0, row, (row.cost_usd or Decimal(0)) - (known.cost_usd or Decimal(0)))
        for row in billed.values():
            yield Behind(counted.month, -1, row, None if row.cost_usd is None else -row.cost_usd)


def _counted(store: Store, key: str, counted: Counted) -> Iterator[StoredMessage]:
    left_out = {*counted.void, *(counted.late if isinstance(counted, Carried) else ())}
    known = counted.costs if isinstance(counted, Carried) else {}
    where = Filter(key, since=counted.start, until=counted.stop, mark=counted.mark)
    for rows in pages(store, where):
        costs = store.costs_before([row.message.id for row in rows], counted.read) | known
        for row in rows:
            if row.message.id not in left_out and row.message.status in BILLABLE:
                yield StoredMessage(row.message, costs[row.message.id]) if row.message.id in costs else row


def pages(store: Store, where: Filter) -> Iterator[Sequence[StoredMessage]]:
    """Messages, newest first, so many at a time."""
    return pages_of(lambda after: store.messages(where, after=after, limit=_PAGE))


def carry_over(source: Store, target: Store) -> list[str]:
    """Have a copy know which messages the bills count that came with it, as far as its *source* knows.

    Each bill once, however often this is done. An engine without marks cannot know; it closes no bills either.

    Returns:
        Which bills count messages that the copy does not have, a line each. It is done again for these the next time.
    """
    new = {record.subject for record in target.records(COPIED)} - {record.subject for record in target.records(COUNTED)}
    mark = target.mark()
    if mark is None or not new:
        return []
    in_terms_of_source = _terms(source)
    differences = []
    for bill in invoices(source):
        if bill.number not in new:
            continue
        try:
            counted = in_terms_of_source(bill).counted
        except BillError:
            continue
        found = [_carried(source, target, bill.key, each, mark) for each in counted]
        missing = [id for _, ids in found for id in ids]
        if missing:
            differences.append(f"bill {bill.number} counts {len(missing)} messages that are missing: {missing[0]}, ...")
            continue
        body = {"counted": [msgspec.to_builtins(each) for each, _ in found]}
        now = datetime.now(timezone.utc)
        target.append([Record(f"{COUNTED}:{bill.number}", COUNTED, now, body, bill.key, bill.number)])
    return differences


def _carried(source: Store, target: Store, key: str, counted: Counted, mark: str) -> tuple[Carried, list[str]]:
    """What was counted, in terms of the target; and the ids of those messages that it does not have."""
    then = {row.message.id: row.cost_usd for row in _counted(source, key, counted)}
    late: list[str] = []
    costs: dict[str, Decimal | None] = {}
    fields = {name: getattr(counted, name) for name in Counted.__struct_fields__}
    here = Carried(**{**fields, "mark": mark, "read": datetime.now(timezone.utc)}, late=(), costs={})
    for row in _counted(target, key, here):
        if row.message.id not in then:
            late.append(row.message.id)
        elif (cost := then.pop(row.message.id)) != row.cost_usd:
            costs[row.message.id] = cost
    return msgspec.structs.replace(here, late=tuple(late), costs=costs), list(then)
