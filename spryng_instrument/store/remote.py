"""A ledger that is behind `spryng serve`, as far as budgets ask: what was used, and which messages are in it."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TypeVar
from urllib.parse import urlencode

import msgspec

from spryng_instrument.errors import StoreError
from spryng_instrument.store.base import Filter, UsageRow
from spryng_instrument.store.transport import Answer, HttpEnd

IDS = 200
"""Ids a question: they must fit the head of a request."""


class _Row(msgspec.Struct):
    messages: int
    unpriced: int
    input_tokens: int
    output_tokens: int
    cost_usd: Decimal | None
    key: str | None = None

    def as_usage(self) -> UsageRow:
        return UsageRow(
            self.key, messages=self.messages, unpriced=self.unpriced, input_tokens=self.input_tokens,
            output_tokens=self.output_tokens, cost_usd=self.cost_usd,
        )  # fmt: skip


class _Usage(msgspec.Struct):
    rows: list[_Row]
    total: _Row


class _Recorded(msgspec.Struct):
    ids: list[str]


T = TypeVar("T")


class RemoteLedger(HttpEnd):
    """The questions of budgets, put to a server.

    Args:
        url: its base, "https://usage.example.com".
        api_key: one that may read.
        timeout_s: seconds that a question may take.
    """

    most_answered = 200_000_000  # a row a customer, of 200 bytes or some more

    def __init__(self, url: str, api_key: str | None, *, timeout_s: float = 5.0) -> None:
        super().__init__(api_key)
        self._url = url.rstrip("/").removesuffix("/trackUsage")
        self._timeout_s = timeout_s

    def usage(self, by: str, where: Filter = Filter(), *, zone: str = "UTC") -> list[UsageRow]:  # noqa: B008
        """Usage by key."""
        assert by == "key"
        return [row.as_usage() for row in self._usage(by, where).rows]

    def total(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        """The same over all messages."""
        return self._usage("model", where).total.as_usage()  # of which there are few, however many the customers

    def found(self, ids: Sequence[str]) -> set[str]:
        """Those of the messages with these ids that are in the ledger."""
        found: set[str] = set()
        for start in range(0, len(ids), IDS):
            query = [("id", id) for id in ids[start : start + IDS]]
            found.update(self._get("/recorded", query, _Recorded).ids)
        return found

    def _usage(self, by: str, where: Filter) -> _Usage:
        query = [("by", by), *(("tag", tag) for tag in where.tags)]
        query += [("key", where.key)] if where.key is not None else []
        query += [(name, time.isoformat()) for name, time in (("since", where.since), ("until", where.until)) if time]
        return self._get("/usage", query, _Usage)

    def _get(self, path: str, query: Sequence[tuple[str, str]], kind: type[T]) -> T:
        self._begin(self._timeout_s)
        answer = self._send("GET", f"{self._url}{path}?{urlencode(query)}", {})
        try:
            if answer.status == 200:
                return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.MsgspecError, UnicodeError):
            pass
        raise StoreError(self._why(path, answer))

    def _why(self, path: str, answer: Answer) -> str:
        do = {
            200: "what it says cannot be read; is something else there, or an older version?",
            401: "it does not accept the API key",
            403: "the API key may not read. Make one that may: spryng keys create NAME --scope ingest --scope read",
            404: "it cannot be asked what was used, as `spryng serve` can",
        }.get(answer.status) or self._said(answer)
        return f"{self._url}{path} answered {answer.status}: {do}"
