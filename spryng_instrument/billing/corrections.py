"""Corrections: a message that is void, an amount that a person adds or takes off, a period that is priced anew.

Invariant: nothing is edited. A correction is a document with its reason, appended; a cost that is replaced is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal

from spryng_instrument.billing.behind import pages
from spryng_instrument.billing.bills import invoices
from spryng_instrument.billing.currencies import EXPONENT
from spryng_instrument.billing.plans import LARGEST, Plans, billing_period, month_of
from spryng_instrument.errors import BillError
from spryng_instrument.message import new_id
from spryng_instrument.periods import zone_of
from spryng_instrument.prices import price_of, price_source
from spryng_instrument.store.base import Cost, Filter, Record, Store

REASON = 500
"""Characters of a reason, at most."""


def void(store: Store, message_id: str, reason: str) -> Record:
    """Declare that a message is not to be billed. It stays in the ledger, and in what was used.

    Raises:
        BillError: there is no such message, it is void already, or there is no reason.
    """
    message = store.found([message_id]).get(message_id)
    if message is None:
        raise BillError(f"there is no message {message_id!r} in this ledger; `spryng messages --json` shows their ids")
    body = {"reason": _reason(reason), "timestamp": message.timestamp.isoformat()}
    record = Record(f"void:{message_id}", "void", datetime.now(timezone.utc), body, message.key, message_id)
    if not store.append([record]):
        [there] = store.records("void", subject=message_id)
        raise BillError(
            f"message {message_id} is void since {there.created:%Y-%m-%d %H:%M} UTC: {there.body['reason']}"
        )
    return record


def adjust(store: Store, plans: Plans, key: str, amount: Decimal, reason: str, month: str | None = None) -> Record:
    """Add an amount to a customer's bill, or take it off.

    Args:
        amount: in the currency of the customer's plan; negative: a credit.
        month: in which the billing period begins that it is of; default: the present one. Where that bill is closed, it
            goes onto the next.

    Raises:
        BillError: nobody has such a key, the customer has no plan, the amount is none, or there is no reason.
        QueryError: no such month.
    """
    if not key:
        raise BillError("key='' is nobody; name the customer")
    account = plans.account(key)
    now = datetime.now(timezone.utc)
    if month is None:
        month = month_of(now, account.anchor_day, account.zone)
    start, _ = billing_period(month, account.anchor_day, account.zone)
    begins = start.astimezone(zone_of(account.zone)).date()
    version = None if account.plan is None else plans.version(account.plan, begins)
    if version is None:
        raise BillError(f"{key!r} has no plan for {month}; give it one in the file of plans")
    places = EXPONENT[version.currency]
    if not amount.is_finite() or not 0 < abs(amount) <= LARGEST or amount != round(amount, places):
        raise BillError(
            f"amount={amount} must be an amount of {version.currency}, other than 0 and at most {LARGEST:,}, with at "
            f"most {places} decimal places"
        )
    if key not in plans.keys and not store.messages(Filter(key=key), limit=1).rows and not invoices(store, key):
        raise BillError(
            f"key={key!r} is nobody: it has no message and no bill. If it is to be billed all the same, name it in the "
            f"file of plans: [keys.{json.dumps(key)}]"
        )
    body = {"amount": f"{amount:f}", "currency": version.currency, "reason": _reason(reason)}
    record = Record(f"adjustment:{new_id()}", "adjustment", now, body, key, month)
    store.append([record])
    return record


def _reason(text: str) -> str:
    text = text.strip()
    if not text or len(text) > REASON:
        raise BillError(f"reason={text[:40]!r} must be a text of 1 to {REASON} characters: it is what an auditor reads")
    return text


@dataclass(frozen=True, slots=True)
class Repriced:
    """What a model's messages cost, and what they would cost by the prices of now."""

    model: str | None
    messages: int
    """Whose cost is another one now."""
    before_usd: Decimal
    after_usd: Decimal


def reprice(store: Store, where: Filter, *, apply: bool = False) -> list[Repriced]:
    """What changes if messages are priced anew; and, if it is to be applied, the change.

    Only costs that are there are compared: what has none gets one by `prices.rate`. A message whose price is not known
    any more keeps its cost.

    The new costs of some messages come with a document that says what changed of these: cut off in the middle, what was
    changed has its documents, and done again, it changes the rest. (ClickHouse has no transactions: the costs that it
    was cut off at may be in two documents then.)

    Raises:
        BillError: there are no prices.
        StoreError: the ledger cannot be read or written. What was changed before stays so; do it again.
    """
    source = price_source()
    if source.version is None:
        raise BillError(f"nothing can be priced: {source.reason}")
    run = new_id()
    rows: list[Repriced] = []
    for number, changes in enumerate(_changes(store, where, source.version)):
        some = _summed([Repriced(model, 1, before, after.cost_usd or Decimal(0)) for model, before, after in changes])
        if apply and changes:
            body = {
                "key": where.key,
                "since": where.since and where.since.isoformat(),
                "until": where.until and where.until.isoformat(),
                "price_version": source.version,
                "models": [
                    {"model": row.model, "messages": row.messages, "before_usd": f"{row.before_usd:f}",
                     "after_usd": f"{row.after_usd:f}"}
                    for row in some
                ],
            }  # fmt: skip
            now = datetime.now(timezone.utc)
            document = Record(f"repricing:{run}:{number}", "repricing", now, body, where.key, run)
            store.reprice([after for _, _, after in changes], document)
        rows = _summed([*rows, *some])
    return rows


def _summed(rows: Iterable[Repriced]) -> list[Repriced]:
    """One row for each model."""
    found: dict[str | None, Repriced] = {}
    for row in rows:
        known = found.get(row.model, Repriced(row.model, 0, Decimal(0), Decimal(0)))
        found[row.model] = Repriced(
            row.model,
            known.messages + row.messages,
            known.before_usd + row.before_usd,
            known.after_usd + row.after_usd,
        )
    return sorted(found.values(), key=lambda row: row.model or "")


def _changes(store: Store, where: Filter, price_version: str) -> Iterator[list[tuple[str | None, Decimal, Cost]]]:
    for rows in pages(store, where):
        changes = []
        for row in rows:
            if row.cost_usd is None or row.price_version == price_version:
                continue
            cost = price_of(row.message)
            if cost is not None and cost != row.cost_usd:
                changes.append((row.message.model, row.cost_usd, Cost(row.message.id, cost, price_version)))
        yield changes
