"""What a store is: it takes messages exactly once, and answers questions about them.

The pump needs a Destination; reports need a Store. Both speak of Message and nothing of the SDK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone, tzinfo
from decimal import Decimal
from typing import Literal, Protocol
from zoneinfo import ZoneInfo

from spryng_instrument.errors import QueryError
from spryng_instrument.message import Message

GROUPS = ("key", "tag", "conversation", "model", "day", "month")
"""What usage can be grouped by."""
BATCH = 500
"""Messages a transaction, where nothing speaks against it."""
COST_UNIT = Decimal("1e-12")
"""Costs are kept as whole trillionths of a US dollar, in which the price of a token is a whole number."""


Outcome = Literal["recorded", "duplicate", "conflict", "refused"]
"""recorded: new there. duplicate: there already, the same: delivered before by a try that was cut off. conflict: the
destination has another message with this id, and keeps that one. refused: it can never be taken as it is."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a batch."""

    outcomes: tuple[Outcome, ...] = ()
    """Of each message, in their order."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """By message id, why it was refused, where the destination said so."""

    def count(self, outcome: Outcome) -> int:
        """How many messages it became of."""
        return self.outcomes.count(outcome)


class Destination(Protocol):
    """Where the pump delivers to."""

    @property
    def batch_size(self) -> int:
        """Messages to hand over at once, so that every call gets something done."""
        ...

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Keep *messages* durably, each id once.

        Delivered again after an error, whatever was kept before is a duplicate.

        Raises:
            StoreError: not now; deliver them again later.
        """
        ...

    def close(self) -> None:
        """Let go of connections. Used again, it makes new ones."""
        ...


@dataclass(frozen=True, slots=True)
class Filter:
    """Which messages a question is about. Empty: all."""

    key: str | None = None
    no_key: bool = False
    """Only the messages without a key."""
    tags: tuple[str, ...] = ()
    """Messages that have every one of these."""
    model: str | None = None
    """The answered model, or the one asked for where none answered."""
    conversation_id: str | None = None
    since: datetime | None = None
    """Aware; inclusive."""
    until: datetime | None = None
    """Aware; exclusive."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The usage of one group. Tokens are sums over the messages that reported them."""

    group: str | None
    """The key, tag, conversation, model, "2026-11-22" or "2026-11". None: has none."""
    key: str | None = None
    """For groups by conversation: whose it is."""
    messages: int = 0
    """To bill: answered, or streams that were begun."""
    conversations: int = 0
    """Distinct (key, conversation id)s among the messages to bill."""
    errors: int = 0
    cancelled: int = 0
    unreported: int = 0
    """Messages to bill whose usage was not reported."""
    unpriced: int = 0
    """Messages with usage that have no cost, because their model has no known price."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: Decimal | None = None
    """Sum over the messages that have a cost; None if none has."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message with what was found out about it since."""

    message: Message
    cost_usd: Decimal | None = None
    """None: not priced, or no price known."""
    price_version: str | None = None
    """What set the cost, "genai-prices 0.2.3"; frozen with it."""


@dataclass(frozen=True, slots=True)
class Health:
    """What doctor wants to know of a ledger."""

    messages: int = 0
    writers: int = 0
    gaps: tuple[tuple[str, int, int], ...] = ()
    """(writer, numbers given, messages here) of each process whose numbers are not all here."""
    unattributed: tuple[tuple[str, int], ...] = ()
    """(call site, messages) without a key, the most first."""
    unpriced: tuple[tuple[str, int], ...] = ()
    """(model, messages with usage but no cost), the most first."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A price found for a message. cost_usd None: none is known to this version of the prices."""

    message_id: str
    cost_usd: Decimal | None
    price_version: str


@dataclass(frozen=True, slots=True)
class Page:
    """Messages, newest first, and where the next page starts."""

    rows: list[StoredMessage] = field(default_factory=list)
    next: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A customer's conversation, as far as a question's filter lets it be seen."""

    usage: UsageRow
    """Its group is the conversation id, its key the customer."""
    first: datetime
    """Time of its first message, UTC."""
    last: datetime
    """Time of its last message, UTC."""


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """Conversations, the one that began last first, and where the next page starts."""

    rows: list[Conversation] = field(default_factory=list)
    next: str | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may use the server; the key itself is nowhere."""

    id: str
    """Public: it names the key in lists and logs."""
    name: str
    """Whose it is, or what for."""
    digest: str
    """SHA-256 of the key, in hex."""
    scopes: tuple[str, ...]
    """"ingest", "read", or both."""
    created: datetime
    revoked: datetime | None = None
    """Since when it is refused. None: it is not."""


START = "0"
"""As `after` of `arrivals`: from the first message on."""


class Store(Destination, Protocol):
    """A ledger that can be asked. In a store, `record` keeps all messages of a batch or none."""

    def usage(self, by: str, where: Filter = ..., *, zone: str = "UTC") -> list[UsageRow]:
        """Usage by one of GROUPS, in the order of the group's name. Days and months are those of the IANA *zone*."""
        ...

    def total(self, where: Filter = ...) -> UsageRow:
        """The same over all messages; conversations and messages counted once, whatever they are grouped by."""
        ...

    def usage_and_total(self, by: str, where: Filter = ..., *, zone: str = "UTC") -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment, whatever is recorded meanwhile."""
        ...

    def messages(self, where: Filter = ..., *, after: str | None = None, limit: int = 50) -> Page:
        """Messages, newest first. *after* is a page's `next`."""
        ...

    def conversations(self, where: Filter = ..., *, after: str | None = None, limit: int = 50) -> ConversationPage:
        """Conversations, the one that began last first. *after* is a page's `next`."""
        ...

    def found(self, ids: Sequence[str]) -> dict[str, Message]:
        """Those of the messages with these ids that are in the ledger, by id."""
        ...

    def arrivals(self, after: str | None = None, where: Filter = ..., *, limit: int = 1_000) -> Page:
        """Messages in the order in which they were recorded: each exactly once, however late it came.

        Args:
            after: a page's `next`, which here is never None; or START. None: the last *limit* messages.
        """
        ...

    def unpriced(self, price_version: str, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at."""
        ...

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        ...

    def health(self) -> Health:
        """Gaps, messages without a key, models without a price."""
        ...

    def missing(self, writer: str, last_sequence: int) -> list[int]:
        """The numbers up to *last_sequence* of a writer that are not in the ledger."""
        ...

    def roll_up(self, limit: int = 100) -> int:
        """Sum up as many stretches of time as *limit* that questions would sum from messages. Returns how many.

        Raises:
            StoreError: not now, or never by this user. Questions are answered all the same.
        """
        ...

    def keep_api_key(self, key: ApiKey) -> None:
        """Keep a key of the server, in place of one with the same id."""
        ...

    def api_keys(self) -> list[ApiKey]:
        """Every key of the server, revoked ones too, the oldest first."""
        ...


def zone_of(name: str) -> tzinfo:
    """The IANA zone of that name. UTC is there on machines without a zone database, too.

    Raises:
        QueryError: there is none.
    """
    if name.upper() == "UTC":
        return timezone.utc
    try:
        return ZoneInfo(name)
    except Exception:
        raise QueryError(f"zone {name!r} is unknown; give an IANA name, as in Europe/Berlin or UTC") from None
