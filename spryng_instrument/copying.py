"""Moves a ledger from one engine to another: every message with its id and its cost, every document, the server's keys.

Which messages a bill counted is a mark of the ledger that it was closed in: the copy is told in terms of its own.

Invariant: a message is in the target once, however often a copy is begun again; and a copy that says it is complete has
compared both ledgers, not counted what it sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from spryng_instrument.billing.behind import carry_over
from spryng_instrument.store.base import COPIED, COUNTED, START, Cost, Page, Record, Store
from spryng_instrument.store.rows import is_same

BATCH = 1_000
"""Messages a transaction."""
_OWN = (COPIED, COUNTED)
"""Documents that each ledger has of its own."""
TRIES = 3
"""How often what arrived in the source meanwhile is fetched before both are compared."""


@dataclass(slots=True)
class Copied:
    """What a copy did, and whether both ledgers agree."""

    new: int = 0
    """Messages that the target did not have."""
    there: int = 0
    """Messages that it had already, from a copy that was cut off."""
    conflicts: list[str] = field(default_factory=list)
    """Ids under which the target has another message. It keeps that one."""
    differences: list[str] = field(default_factory=list)
    """How the ledgers differ now, a line each; none: the target has all that the source has."""


def copy(source: Store, target: Store, progress: Callable[[int], None] = lambda count: None) -> Copied:
    """Copy every message of *source* that *target* does not have, then compare them.

    Args:
        progress: told how many more messages were looked at.

    Raises:
        StoreError: one of them does not answer. Copy again: what is there is skipped.
    """
    copied = Copied()
    known = {key.id for key in target.api_keys()}
    for key in source.api_keys():
        if key.id not in known:
            target.keep_api_key(key)
    after = START
    for _ in range(TRIES):
        _copy_records(source, target)
        for page in _pages(source, after):
            after = str(page.next)
            _copy_page(page, target, copied)
            progress(len(page.rows))
        differences = [*_differences(source, target), *_other_records(source, target)]
        copied.differences = [*differences, *carry_over(source, target)]
        if not copied.differences or copied.conflicts:
            break
    return copied


def _copy_records(source: Store, target: Store) -> None:
    """Voids, closed bills and the like. Of a bill is kept that it was closed elsewhere: its marks mean nothing here."""
    there = {record.id for record in target.records()}
    for record in source.records():
        if record.id in there or record.kind in _OWN:
            continue
        if record.kind == "invoice":
            number = str(record.body["number"])
            target.append([Record(f"{COPIED}:{number}", COPIED, datetime.now(timezone.utc), {}, record.key, number)])
        target.append([record])


def _other_records(source: Store, target: Store) -> list[str]:
    there = {record.id: record for record in target.records()}
    return [
        f"document {record.id} is {'another one' if record.id in there else 'missing'}"
        for record in source.records()
        if record.kind not in _OWN and record != there.get(record.id)
    ]


def _pages(source: Store, after: str) -> Iterator[Page]:
    while (page := source.arrivals(after, limit=BATCH)).rows:
        yield page
        after = str(page.next)
        if len(page.rows) < BATCH:  # or it ran after those that come meanwhile
            return


def _copy_page(page: Page, target: Store, copied: Copied) -> None:
    messages = [row.message for row in page.rows]
    receipt = target.record(messages, timeout_s=60.0)
    copied.new += receipt.count("recorded")
    copied.there += receipt.count("duplicate")
    kept = {message.id for message, outcome in zip(messages, receipt.outcomes, strict=True) if outcome != "conflict"}
    copied.conflicts += [message.id for message in messages if message.id not in kept]
    target.set_costs(
        [
            Cost(row.message.id, row.cost_usd, row.price_version)
            for row in page.rows
            if row.price_version is not None and row.message.id in kept
        ]
    )


def _differences(source: Store, target: Store) -> list[str]:
    """By counts and sums of every month, where both have as many messages; else message by message."""
    wanted, found = source.health().messages, target.health().messages
    if wanted != found:
        return _missing(source, target, wanted, found)
    differences = []
    rows, total = source.usage_and_total("month")
    others, other_total = target.usage_and_total("month")
    theirs = {row.group: row for row in others}
    for row in [*rows, total]:
        other = other_total if row is total else theirs.get(row.group)
        if row != other:
            differences.append(f"{row.group or 'in all'}: the source has {row}, the target {other}")
    return differences


def _missing(source: Store, target: Store, wanted: int, found: int) -> list[str]:
    """The target has others, too, or less: whether it has each message of the source."""
    differences = []
    for page in _pages(source, START):
        there = target.found([row.message.id for row in page.rows])
        for row in page.rows:
            known = there.get(row.message.id)
            if known is None or not is_same(known, row.message):
                differences.append(f"message {row.message.id} {'is missing' if known is None else 'is another one'}")
                if len(differences) == 100:
                    return [*differences, "..."]
    if not differences and found < wanted:
        differences.append(f"the source has {wanted} messages, the target {found}")
    return differences
