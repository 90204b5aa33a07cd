"""What a store is: it takes messages exactly once, and answers questions about them.

The pump needs a Destination; reports need a Store. Both speak of Message and nothing of the SDK.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Context, Decimal
from typing import Any, Literal, Protocol, TypeVar

from spryng_instrument.message import Message

GROUPS = ("key", "tag", "conversation", "model", "day", "month")
"""What usage can be grouped by."""
BATCH = 500
"""Messages a transaction, where nothing speaks against it."""
COST_UNIT = Decimal("1e-12")
"""Costs are kept as whole trillionths of a US dollar, in which the price of a token is a whole number."""
EXACT = Context(prec=60)
"""For sums of costs: none has as many digits."""


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
    mark: str | None = None
    """A Meter's, or Store.mark(): only messages of before it, whatever was recorded after."""


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


def most_first(row: UsageRow) -> tuple[Decimal, int]:
    """Sorts rows: what costs the most comes first, and of the same cost what has the most messages."""
    return -(row.cost_usd or Decimal(0)), -row.messages


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message with what was found out about it since."""

    message: Message
    cost_usd: Decimal | None = None
    """None: not priced, or no price known."""
    price_version: str | None = None
    """What set the cost, "genai-prices 0.2.3 (rules 2)"; frozen with it."""


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


@dataclass(frozen=True, slots=True)
class Record:
    """A document of the ledger: what was decided about messages. Appended once, never changed."""

    id: str
    """Unique in the ledger, it says what must not be there twice: "void:MESSAGE_ID"."""
    kind: str
    """"void", "adjustment", "invoice", ..."""
    created: datetime
    """Aware; kept to the microsecond, in UTC."""
    body: dict[str, Any]
    """JSON."""
    key: str | None = None
    """The customer that it is about."""
    subject: str | None = None
    """What else it is about: the message that is void, for one."""


@dataclass(frozen=True, slots=True)
class RecordPage:
    """Documents, the last appended first, and where the next page starts."""

    rows: list[Record] = field(default_factory=list)
    next: str | None = None


COPIED = "copied"
"""The kind of documents that say which invoice, their subject, came with a copy of another ledger."""
COUNTED = "counted"
"""The kind of documents that say, in terms of this ledger, which messages such an invoice counted."""


@dataclass(frozen=True, slots=True)
class Meter:
    """What there is to bill, of one moment: nothing of messages that failed, were cancelled or are void."""

    rows: list[UsageRow]
    """By customer and model, which is their group. Conversations, errors and cancelled are not counted in these."""
    conversations: dict[str | None, int]
    """By customer: conversations whose first message to bill lies within the question's time."""
    void: tuple[Record, ...]
    """The documents of that moment that say which messages are void, of the question's customer and of any time."""
    mark: str | None
    """The moment: a Filter with it sees what was counted here. None: this engine cannot say."""
    read: datetime
    """When that was, in UTC: `costs_before` it are those that were counted."""


T_co = TypeVar("T_co", covariant=True)


class Paged(Protocol[T_co]):
    """A Page, a ConversationPage or a RecordPage."""

    @property
    def rows(self) -> Sequence[T_co]: ...

    @property
    def next(self) -> str | None: ...


def pages_of(ask: Callable[[str | None], Paged[T_co]]) -> Iterator[Sequence[T_co]]:
    """The rows of every page, from the first on, each read as it is asked for.

    Args:
        ask: the page that is *after* a page's `next`; None: the first.
    """
    after = None
    while True:
        page = ask(after)
        yield page.rows
        after = page.next
        if after is None:
            return


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

    def usage_and_total(
        self, by: str, where: Filter = ..., *, zone: str = "UTC", limit: int | None = None
    ) -> tuple[list[UsageRow], UsageRow]:
        """Both of one moment, whatever is recorded meanwhile.

        Args:
            limit: so many rows at most, but for days and months: those that are first by `most_first`. None: all.
        """
        ...

    def usage_by_window(
        self,
        by: str,
        window: str,
        where: Filter = ...,
        *,
        zone: str = "UTC",
        with_total: bool = True,
        limit: int | None = None,
    ) -> tuple[list[tuple[str, UsageRow]], UsageRow]:
        """Usage by key, tag, conversation or model of each "day" or "month" that has any, by its label; and the
        total, which is empty unless it is wanted: of one moment, where the engine has transactions.

        Args:
            limit: so many rows at most, as above.
        """
        ...

    def messages(self, where: Filter = ..., *, after: str | None = None, limit: int = 50) -> Page:
        """Messages, newest first. *after* is a page's `next`."""
        ...

    def conversations(self, where: Filter = ..., *, after: str | None = None, limit: int = 50) -> ConversationPage:
        """Conversations, the one that began last first. *after* is a page's `next`."""
        ...

    def found(self, ids: Sequence[str], *, timeout_s: float | None = None) -> dict[str, Message]:
        """Those of the messages with these ids that are in the ledger, by id.

        Args:
            timeout_s: how long the ledger may take, about. None: as long as for any question.
        """
        ...

    def arrivals(self, after: str | None = None, where: Filter = ..., *, limit: int = 1_000) -> Page:
        """Messages in the order in which they were recorded: each exactly once, however late it came.

        Args:
            after: a page's `next`, which here is never None; or START. None: the last *limit* messages.
        """
        ...

    def unpriced(self, price_version: str | None, limit: int = 1_000) -> list[Message]:
        """Messages with usage and no cost that *price_version* has not looked at; None: that none has."""
        ...

    def set_costs(self, costs: Sequence[Cost]) -> None:
        """Freeze costs. A cost that is there already is never changed."""
        ...

    def reprice(self, costs: Sequence[Cost], document: Record | None = None) -> None:
        """Put these costs in place of those that are there, which are kept for `costs_before`. None changes nothing.

        Args:
            document: what says so. It is there with the costs or, where the engine has no transactions, before them.
        """
        ...

    def costs_before(self, ids: Sequence[str], time: datetime) -> dict[str, Decimal | None]:
        """What the messages cost at that time, of those that have another cost since; None: it was not known then."""
        ...

    def mark(self) -> str | None:
        """This moment, for Filter.mark. None: the engine knows none."""
        ...

    def meter(self, where: Filter = ...) -> Meter:
        """What there is to bill."""
        ...

    def voided(self, where: Filter = ...) -> UsageRow:
        """The usage of the messages that are void. They are in `usage` and `total` as well: those say what was used."""
        ...

    def append(self, records: Sequence[Record]) -> bool:
        """Append all of these, or none if the id of one is there already. Returns whether they were.

        Raises:
            StoreError: the engine has no transactions, and these are several.
        """
        ...

    def records(
        self, kind: str | None = None, *, key: str | None = None, subject: str | None = None, id: str | None = None
    ) -> list[Record]:
        """The documents of a kind, or all, in the order in which they were appended; by its id, the one that has it."""
        ...

    def last_records(
        self, kind: str, *, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> RecordPage:
        """Documents of a kind, the last appended first. *after* is a page's `next`."""
        ...

    def health(self) -> Health:
        """Gaps, messages without a key, models without a price."""
        ...

    def missing(self, given: Mapping[str, int]) -> dict[str, list[range]]:
        """By writer, the numbers from 1 to the last one that it gave that are not in the ledger: where one follows the
        other, as one range, in order. A number is what a sender says, and may be any."""
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

    def api_keys(self, *, timeout_s: float | None = None) -> list[ApiKey]:
        """Every key of the server, revoked ones too, the oldest first.

        Args:
            timeout_s: how long the ledger may take, about. None: as long as for any question.
        """
        ...
