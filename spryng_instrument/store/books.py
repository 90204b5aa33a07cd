"""What bills are made of, in the SQL that every engine speaks: documents, messages that are void, and what is to bill.

Invariant: nothing is edited. A message that is void stays, and a document says that it is; what it counted is taken off
by facts that are negative. A cost that was replaced is kept beside the new one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, ClassVar

import msgspec

from spryng_instrument.errors import QueryError
from spryng_instrument.store.base import Filter, Meter, Record, RecordPage, UsageRow
from spryng_instrument.store.rows import micros, moment, usd
from spryng_instrument.store.sql import FACTS, IS_BILLABLE, SUMS, UNBILLED, Ask, SqlParts, SqlStore, usage_row

RECORD = ("id", "kind", "created_us", "key", "subject", "body")
OLD_COST = ("message_id", "replaced_us", "cost_pusd", "price_version")
_IDS = 500
"""Ids in one question."""


class SqlBooks(SqlStore):
    """The part of a ledger that bills stand on. A subclass says how its engine appends."""

    records_source: ClassVar[str] = "records r"
    records_place: ClassVar[tuple[str, ...]] = ("r.position",)
    """What documents are ordered by: a whole number and, if several may have the same, a text."""
    costed_us: ClassVar[str] = "m.costed_us"
    """When the first cost of m was set. NULL: it has none, or nobody knows."""

    def records(
        self, kind: str | None = None, *, key: str | None = None, subject: str | None = None, id: str | None = None
    ) -> list[Record]:
        """The documents of a kind, or all, in the order in which they were appended; by its id, the one that has it."""
        with self._reading() as ask:
            return self._records(ask, kind=kind, key=key, subject=subject, id=id)

    def last_records(
        self, kind: str, *, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> RecordPage:
        """Documents of a kind, the last appended first."""
        conditions, values = "r.kind = ?", [kind, *([] if key is None else [key]), *self._place_of(after)]
        if key is not None:
            conditions += " AND r.key = ?"
        if after is not None:
            marks = ", ".join("?" * len(self.records_place))
            conditions += f" AND ({', '.join(self.records_place)}) < ({marks})"
        with self._reading() as ask:
            found = ask(
                f"SELECT {', '.join(self.records_place)}, {', '.join(f'r.{name}' for name in RECORD)} "
                f"FROM {self.records_source} WHERE {conditions} "
                f"ORDER BY {', '.join(f'{name} DESC' for name in self.records_place)} LIMIT ?",
                [*values, limit + 1],
            )
        size = len(self.records_place)
        more = len(found) > limit and limit > 0
        return RecordPage(
            [record_of(row[size:]) for row in found[:limit]],
            "_".join(map(str, found[limit - 1][:size])) if more else None,
        )

    def _place_of(self, after: str | None) -> list[Any]:
        if after is None:
            return []
        mark = re.fullmatch(r"(\d{1,18})(?:_(.+))?", after, re.ASCII | re.DOTALL)
        place = [] if mark is None else [int(mark[1]), *([mark[2]] if mark[2] else [])]
        if len(place) != len(self.records_place):
            raise QueryError(f"after={after!r} is no mark of a page; take it from the page before")
        return place

    def voided(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        """The usage of the messages that are void."""
        facts, values = self._message_facts(where)
        with self._reading() as ask:
            [row] = ask(f"SELECT NULL, NULL, {self._sums} FROM ({facts} AND {self._is_void}) m", values)
        return usage_row(row)

    def meter(self, where: Filter = Filter()) -> Meter:  # noqa: B008
        """What there is to bill."""
        with self._summing() as ask:
            read = datetime.now(timezone.utc)
            facts, values = self._net_facts(ask, where)
            sums = [f"coalesce({self.summed.format(f'm.{name}')}, 0)" for name in SUMS[:-2]]
            sums = [sums[0], "0", "0", "0", *sums[3:], *(self.summed.format(f"m.{name}") for name in SUMS[-2:])]
            rows = ask(
                f"SELECT m.model, m.key, {', '.join(sums)} FROM ({facts}) m GROUP BY m.model, m.key ORDER BY 2, 1",
                values,
            )
            begun, values = self._conversations(facts), list(values)
            if where.since is not None:
                begun, more = self._not_before(begun, where.since)
                values += more
            counted = ask(f"SELECT c.key, count(*) FROM ({begun}) c GROUP BY c.key", values)
            void = tuple(
                record
                for record in self._records(ask, kind="void", key=where.key)
                if record.key is None or not where.no_key
            )
            return Meter([usage_row(row) for row in rows], dict(counted), void, self._mark(ask), read)

    def costs_before(self, ids: Sequence[str], time: datetime) -> dict[str, Decimal | None]:
        """What the messages cost at that time, of those that have another cost since."""
        found: dict[str, Decimal | None] = {}
        with self._reading() as ask:
            for start in range(0, len(ids), _IDS):
                some = ids[start : start + _IDS]
                listed = ", ".join("?" * len(some))
                rows = ask(
                    "SELECT o.message_id, o.cost_pusd FROM old_costs o WHERE o.replaced_us > ? "
                    f"AND o.message_id IN ({listed}) ORDER BY o.replaced_us DESC",
                    [micros(time), *some],
                )
                found |= {id: usd(cost) for id, cost in rows}  # the one that was replaced first is kept
                rows = ask(
                    f"SELECT m.id FROM {self.source} WHERE {self.costed_us} > ? AND m.id IN ({listed})",
                    [micros(time), *some],
                )
                found |= {id: None for (id,) in rows}
        return found

    def mark(self) -> str | None:
        """This moment, for Filter.mark. None: this engine knows none."""
        with self._reading() as ask:
            return self._mark(ask)

    def _mark(self, ask: Ask) -> str | None:
        return None

    def _records(self, ask: Ask, **wanted: str | None) -> list[Record]:
        conditions, values = "1 = 1", []
        for column, value in wanted.items():
            if value is not None:
                conditions += f" AND r.{column} = ?"
                values.append(value)
        rows = ask(
            f"SELECT {', '.join(f'r.{name}' for name in RECORD)} FROM {self.records_source} WHERE {conditions} "
            f"ORDER BY {', '.join(self.records_place)}",
            values,
        )
        return [record_of(row) for row in rows]

    def _conversations(self, facts: str) -> str:
        messages = self.summed.format("m.messages")
        return (
            f"SELECT m.key, m.conversation_id FROM ({facts}) m WHERE m.conversation_id IS NOT NULL "
            f"GROUP BY m.key, m.conversation_id HAVING {messages} > 0"
        )

    def _not_before(self, conversations: str, time: datetime) -> SqlParts:
        """Of *conversations*, those that had nothing to bill before that time.

        Each is looked for by its index, up to the first message that is found: what was before does not matter, however
        much it is.
        """
        before = (
            f"SELECT 1 FROM {self.source} WHERE m.conversation_id = b.conversation_id AND m.timestamp_us < ? "
            "AND (m.key IS NULL) = (b.key IS NULL) AND coalesce(m.key, '') = coalesce(b.key, '') "
            f"AND {IS_BILLABLE} AND NOT {self._is_void}"
        )
        return f"SELECT b.key FROM ({conversations}) b WHERE NOT EXISTS ({before} LIMIT 1 OFFSET 0)", [micros(time)]

    @property
    def _is_void(self) -> str:
        return f"m.id IN (SELECT r.subject FROM {self.records_source} WHERE r.kind = 'void')"

    def _net_facts(self, ask: Ask, where: Filter) -> SqlParts:
        """FACTS, and negative ones of what is void or failed."""
        facts, values = self._facts(ask, where)
        messages, more = self._message_facts(where)
        taken_off = ", ".join(f"-v.{name} AS {name}" if name in SUMS else f"v.{name}" for name in FACTS)
        for condition in (self._is_void, f"m.{UNBILLED} AND NOT {self._is_void}"):
            facts += f" UNION ALL SELECT {taken_off} FROM ({messages} AND {condition}) v"
            values = [*values, *more]
        return facts, values


def record_row(record: Record) -> tuple[Any, ...]:
    """The values of RECORD."""
    body = msgspec.json.encode(record.body).decode()
    return record.id, record.kind, micros(record.created), record.key, record.subject, body


def record_of(row: Sequence[Any]) -> Record:
    """The document of a row of RECORD."""
    id, kind, created_us, key, subject, body = row
    return Record(id, kind, moment(created_us), msgspec.json.decode(body), key, subject)
