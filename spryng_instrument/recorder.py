"""The recorder: gives every message its number, writes it to the journal, and keeps count of what happened.

One recorder is active in a process between instrument() and uninstrument(). It knows nothing of the SDK: calls come
from `observe`, and from track_usage() for providers that the SDK does not speak to.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from spryng_instrument.checks import clean_name, clean_properties, clean_query, clean_tags
from spryng_instrument.context import Scope, current_scope
from spryng_instrument.deferred import WAITING, Deferred
from spryng_instrument.endpoints import operation_of
from spryng_instrument.errors import MissingKeyError, NotInstrumentedError, UsageError
from spryng_instrument.journal import Journal
from spryng_instrument.message import Message, encode, new_id
from spryng_instrument.pump import Pump
from spryng_instrument.settings import Settings
from spryng_instrument.store import open_destination
from spryng_instrument.usage import Reading, checked_usage, read_reply

if TYPE_CHECKING:
    from spryng_instrument.checks import Scalar
    from spryng_instrument.spending import Spending, Tally

log = logging.getLogger("spryng_instrument")

strict = False
"""Whether our own bugs are raised, as this package's tests want. Otherwise they are logged and counted."""

_OURS = ("spryng_instrument.", "openai.", "wrapt.", "asyncio.", "concurrent.", "threading", "contextlib", "functools")


@dataclass(frozen=True, slots=True)
class Stats:
    """What this process has recorded since instrument() (or since it was forked)."""

    recorded: int = 0
    """Messages kept: in the journal, or already at the destination."""
    delivered: int = 0
    """Of these, at the destination."""
    waiting: int = 0
    """Of these, on disk (or, while the disk takes none, in memory) and not delivered yet."""
    dropped: int = 0
    """Messages lost, because neither disk nor memory took them. Their numbers are missing in the ledger."""
    set_aside: int = 0
    """Of the recorded, lines that could not be delivered and were kept apart."""
    unattributed: int = 0
    """Messages without a key."""
    refused: int = 0
    """Calls that a budget refused: they were not sent, and are no messages."""
    errors: int = 0
    """Bugs of ours that were kept from the caller; the log has them."""
    failure: str | None = None
    """Why messages wait: the last error of the journal's disk or of the destination. None: nothing is wrong."""


class OpenCall(Protocol):
    """A call whose stream is not at its end."""

    def abandon(self) -> None:
        """Record it as it stands."""


class Recorder:
    """Takes messages; never raises into a call.

    Args:
        settings: checked.

    Raises:
        SettingsError: the journal's folder cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._destination = open_destination(settings.destination, settings.api_key)
        self.journal = Journal(Path(settings.journal), memory_limit=settings.memory_limit, wake=self._wake)
        self.deferred = Deferred(Path(settings.journal))
        self.budgets: Spending | None = None
        if settings.budgets is not None:
            from spryng_instrument.spending import open_spending

            self.budgets = open_spending(settings, nothing_waits=self._nothing_waits, bug=self.bug)
        self._begin()

    def _begin(self) -> None:
        self.pump = Pump(
            self.journal, self._destination, beat_s=self.settings.beat_s, hourly=self._record_what_is_overdue
        )
        self.generation = object()
        """Another one in a forked child: calls that were open at the fork are the parent's."""
        self.open_calls: dict[int, weakref.ref[OpenCall]] = {}
        self.unattributed = 0
        self.errors = 0
        self.number = count(1).__next__
        """Gives the next message's number."""
        self._lock = threading.Lock()
        self._sites: set[str] = set()
        self._turns: dict[str, None] = {}
        """Turns of agents' sessions that were recorded, the last ones: a stream of events may be read many times."""
        self._said_failing = False
        self._said_lost = False

    def _wake(self) -> None:
        self.pump.wake()

    def _nothing_waits(self) -> bool:
        return not self.journal.waiting

    def start(self) -> None:
        """Start delivering."""
        self.pump.start()
        self._record_what_is_overdue()
        self.pump.wake()  # what an earlier process left

    def _record_what_is_overdue(self) -> None:
        """What nobody has read in time goes without its usage, in a process that lives for months, too."""
        try:
            for path, message in self.deferred.overdue():
                if message is None or self.record(message):
                    self.deferred.drop(path)
        except OSError:
            log.exception("what waits for its usage in %s cannot be looked at", self.deferred.folder)

    def stop(self) -> None:
        """Deliver what can be within exit_timeout_s, and end the threads."""
        if self.budgets is not None:
            self.budgets.stop(self.settings.exit_timeout_s)
        self.pump.stop(self.settings.exit_timeout_s)
        self.journal.close()
        self._destination.close()

    def at_exit(self) -> None:
        """The interpreter ends: record the streams that are still open, and deliver."""
        if self.budgets is not None:
            self.budgets.stop(0)
        for open_call in list(self.open_calls.values()):
            call = open_call()
            if call is not None:
                call.abandon()
        self.pump.flush(self.settings.exit_timeout_s, last=True, orphans=True)
        self.journal.close()

    def after_fork(self) -> None:
        """In the child."""
        self.journal.after_fork()
        if self.budgets is not None:
            self.budgets.after_fork()
        self._begin()

    def record(self, message: Message, *, finaliser: bool = False, held: tuple[Tally, ...] = ()) -> bool:
        """Write a message to the journal. Returns whether it is kept.

        Args:
            finaliser: called by the garbage collector, which may run inside anything and must wait for nothing.
            held: what its call took room in.
        """
        line = encode(message) + b"\n"
        if finaliser:
            self.journal.append_unlocked(line)
            if self.budgets is not None:
                self.budgets.ended(message, held)
            return True
        kept = self.journal.append(line)
        if self.budgets is not None:
            self.budgets.ended(message, held)
            self.budgets.keep_up()
        if not kept or self.journal.failure is not None:
            self._say_failing()
        if not self.pump.started:
            self.pump.start()
        return kept

    def defer(self, message: Message) -> None:
        """Keep a message whose usage comes with a later read of its response_id."""
        answer_id = str(message.response_id)
        older = self.deferred.waiting(answer_id)
        if older is not None:
            self.record(older)  # a server that repeats its ids: two calls are two messages
        try:
            self.deferred.keep(answer_id, message)
        except OSError:
            log.exception("%s cannot be kept until its usage is known; recorded without", message.response_id)
            self.record(replace(message, writer=self.journal.writer, sequence=self.number()))

    def settle(self, reading: Reading) -> None:
        """An answer was read again: if it is done, and a message waits for it, record that."""
        if reading.response_id is None or reading.status in WAITING:
            return
        if reading.usage is None and reading.status is None:
            return
        message = self.deferred.completed(reading.response_id, reading)
        # If only memory has it, the file stays: who reads the answer again makes a duplicate, which is dropped.
        if message is not None and self.record(message) and self.journal.failure is None:
            with suppress(OSError):
                self.deferred.forget(reading.response_id)

    def settle_turn(self, turn: Mapping[str, Any]) -> None:
        """A turn of an agent's session was read: if it is at its end, and the session is one of ours, record it."""
        turn_id, session_id, status = str(turn.get("id")), turn.get("session_id"), turn.get("status")
        if status not in ("completed", "failed", "cancelled") or turn_id in self._turns:
            return
        if status == "completed" and turn.get("usage") is None:
            return  # it is told as well as it is known: perhaps later
        message = self.deferred.turn(str(session_id), turn)
        if message is not None and self.record(message):
            self.deferred.turned(str(session_id))
            self._turns[turn_id] = None
            if len(self._turns) > 10_000:
                del self._turns[next(iter(self._turns))]

    def key_outside(self) -> str | None:
        """The key of a call whose scope has none.

        Raises:
            MissingKeyError: there is none and on_missing_key="raise".
        """
        key = self.settings.default_key
        if key is None and self.settings.on_missing_key == "raise":
            raise MissingKeyError(
                "this call has no customer's key and on_missing_key is 'raise'; "
                "put `with usage_context(key=...)` around it"
            )
        return key

    def unkeyed(self) -> str | None:
        """Count a call without a key, and say so once per line of code. Returns that line."""
        site = call_site()
        with self._lock:
            self.unattributed += 1
            new = site not in self._sites
            if new and len(self._sites) < 1_000:
                self._sites.add(site)
        if new and self.settings.on_missing_key == "warn":
            log.warning(
                "%s calls OpenAI without a customer's key; recorded as (no key). Put `with usage_context(key=...)` "
                "around it, or set default_key.",
                site,
            )
        return site

    def bug(self, doing: str) -> None:
        """Count and log a bug of ours that was just caught, so that the caller never meets it."""
        with self._lock:
            self.errors += 1
        if strict:
            raise
        log.exception("metering failed while %s; your call is unaffected", doing)

    def stats(self) -> Stats:
        """What happened so far."""
        journal, pump = self.journal, self.pump
        failure = journal.failure or pump.failure
        waiting = journal.waiting
        return Stats(
            recorded=pump.delivered + pump.set_aside + waiting,
            delivered=pump.delivered,
            waiting=waiting,
            dropped=journal.dropped,
            set_aside=pump.set_aside,
            unattributed=self.unattributed,
            refused=0 if self.budgets is None else self.budgets.refused,
            errors=self.errors,
            failure=None if failure is None else str(failure),
        )

    def _say_failing(self) -> None:
        if not self._said_failing:
            self._said_failing = True
            log.error(
                "the journal at %s cannot be written: %s. Up to %d messages are held in memory; your calls go on.",
                self.journal.folder,
                self.journal.failure,
                self.settings.memory_limit,
            )
        if self.journal.dropped and not self._said_lost:
            self._said_lost = True
            log.error("memory is full too: messages are being lost, and counted. Free the disk of the journal.")


def call_site() -> str:
    """ "file.py:12": the line of the application that made the call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


active: Recorder | None = None


def activate(recorder: Recorder | None) -> None:
    """Make *recorder* the one of this process."""
    global active
    active = recorder


def _after_fork() -> None:
    if active is not None:
        active.after_fork()


def _at_exit() -> None:
    if active is not None:
        active.at_exit()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)


def track_usage(
    *,
    key: str | None = None,
    query: str | None = None,
    tags: Iterable[str] = (),
    conversation_id: str | None = None,
    open_ai_response: object = None,
    usage: object = None,
    model: str | None = None,
    operation: str | None = None,
    properties: Mapping[str, Scalar] | None = None,
    timestamp: datetime | None = None,
    latency_ms: float | None = None,
) -> str:
    """Record one message by hand: for other providers, or replies that did not come through the OpenAI SDK.

    Args:
        key: the customer; default: the one of the usage_context around it, or default_key.
        query: what the customer asked.
        tags: labels; those of the context are added.
        conversation_id: default: the context's.
        open_ai_response: a chat completion, completion, embedding or response: the SDK's object or its dict.
        usage: counts by the chat names (prompt_tokens, completion_tokens, total_tokens) or the responses names
            (input_tokens, output_tokens); wins over the response's own.
        model: the model that answered; default: the response's.
        operation: what was done; default: by the response, else "custom".
        properties: further facts.
        timestamp: when it happened, aware; default: now.
        latency_ms: how long it took.

    Returns:
        The message's id. It is in the journal when this returns.

    Raises:
        NotInstrumentedError: instrument() was not called.
        MissingKeyError: no key here, in the context or as default_key.
        UsageError: a count or a time that cannot be, or an open_ai_response that is none.
    """
    recorder = _require("track_usage()")
    scope = current_scope()
    key = clean_name("key", key) or (scope.key if scope is not None else None) or recorder.settings.default_key
    if key is None:
        raise MissingKeyError(
            "track_usage() needs the customer: give key=..., or call it within usage_context(key=...)"
        )
    if open_ai_response is not None and operation_of(open_ai_response) is None:
        raise UsageError(
            f"open_ai_response={open_ai_response!r:.200}: must be a chat completion, completion, embedding or response "
            "of the OpenAI SDK, or its dict; give other counts as usage={...}"
        )
    if latency_ms is not None and not (isinstance(latency_ms, (int, float)) and 0 <= latency_ms < float("inf")):
        raise UsageError(f"latency_ms={latency_ms!r} must be a number of milliseconds, at least 0")
    if timestamp is not None and (not isinstance(timestamp, datetime) or timestamp.tzinfo is None):
        raise UsageError(f"timestamp={timestamp!r} must be a datetime with its zone, as in datetime.now(timezone.utc)")
    reading = read_reply(open_ai_response)
    counts = checked_usage(usage) if usage is not None else reading.usage
    outer = scope if scope is not None else Scope()
    own_properties = clean_properties(properties)
    message = Message(
        id=new_id(),
        timestamp=timestamp.astimezone(timezone.utc) if timestamp is not None else datetime.now(timezone.utc),
        operation=clean_name("operation", operation) or operation_of(open_ai_response) or "custom",
        key=key,
        conversation_id=clean_name("conversation_id", conversation_id) or outer.conversation_id,
        tags=clean_tags((*outer.tags, *clean_tags(tags))),
        query=clean_query(query) if query is not None else outer.query,
        properties={**(outer.properties or {}), **(own_properties or {})} or None,
        response_model=clean_name("model", model) or reading.model,
        response_id=reading.response_id,
        service_tier=reading.service_tier,
        latency_ms=latency_ms,
        usage=counts,
        writer=recorder.journal.writer,
        sequence=recorder.number(),
    )
    recorder.record(message)
    return message.id


def flush(timeout_s: float = 5.0) -> bool:
    """Deliver now. Returns whether all that this process recorded before is at the destination.

    It blocks, for up to *timeout_s* seconds; in async code, call it with asyncio.to_thread.
    """
    return True if active is None else active.pump.flush(timeout_s)


def stats() -> Stats:
    """What this process has recorded, delivered, has waiting, and lost."""
    return Stats() if active is None else active.stats()


def _require(what: str) -> Recorder:
    if active is None:
        raise NotInstrumentedError(
            f"{what} was called before instrument(); call spryng_instrument.instrument() at start-up"
        )
    return active
