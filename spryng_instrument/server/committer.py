"""Many requests, few transactions: one thread records whatever is waiting, all of it together.

Invariant: who waits for an outcome gets it after the commit, and an error if there was none. Requests that share a
transaction never share their luck: one message that the store cannot take is refused alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from spryng_instrument.errors import StoreBusyError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.store.base import Destination, Outcome, Receipt

log = logging.getLogger("spryng_instrument")

TOGETHER = 2_000
"""Messages a transaction, at most; unless one request has more."""
WAITING = 20_000
"""Messages that may wait for a transaction; more are answered with "later"."""
TIMEOUT_S = 10.0


@dataclass(slots=True)
class _Entry:
    messages: Sequence[Message]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Receipt]


class Committer:
    """Records for one store, in a thread of its own."""

    def __init__(self, store: Destination) -> None:
        self._store = store
        self._entries: deque[_Entry] = deque()
        self.waiting = 0
        """Messages that wait."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="spryng-committer", daemon=True)
        self._thread.start()

    async def record(self, messages: Sequence[Message]) -> Receipt:
        """Record *messages* durably; each has an outcome.

        Raises:
            StoreError: not now; nothing or all of it was recorded, and sending it again is safe.
        """
        if not messages:
            return Receipt()
        loop = asyncio.get_running_loop()
        entry = _Entry(messages, loop, loop.create_future())
        with self._changed:
            if self._closed:
                raise StoreError("the server is shutting down; send it again")
            if self.waiting + len(messages) > WAITING:
                raise StoreBusyError(f"{self.waiting} messages wait to be recorded; send it again later")
            self._entries.append(entry)
            self.waiting += len(messages)
            self._changed.notify()
        return await entry.future

    def close(self) -> None:
        """Record what was accepted, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries or self._closed)
                if not self._entries:
                    return
                taken = [self._entries.popleft()]
                count = len(taken[0].messages)
                while self._entries and count + len(self._entries[0].messages) <= TOGETHER:
                    taken.append(self._entries.popleft())
                    count += len(taken[-1].messages)
                self.waiting -= count
            self._record(taken)

    def _record(self, entries: list[_Entry]) -> None:
        try:
            receipt = self._store.record([each for entry in entries for each in entry.messages], timeout_s=TIMEOUT_S)
            start = 0
            for entry in entries:
                stop = start + len(entry.messages)
                _answer(entry, Receipt(receipt.outcomes[start:stop], receipt.reasons))
                start = stop
        except StoreError as exc:
            for entry in entries:
                _answer(entry, exc)
        except Exception as exc:
            if len(entries) > 1:
                for entry in entries:
                    self._record([entry])
            else:
                self._one_by_one(entries[0], exc)

    def _one_by_one(self, entry: _Entry, exc: Exception) -> None:
        if len(entry.messages) == 1:
            [message] = entry.messages
            log.error("message %s cannot be recorded: %r", message.id, exc)
            _answer(entry, Receipt(("refused",), {message.id: "the ledger cannot keep it; the server's log says why"}))
            return
        outcomes: list[Outcome] = []
        reasons: dict[str, str] = {}
        for message in entry.messages:
            try:
                outcomes += self._store.record([message], timeout_s=TIMEOUT_S).outcomes
            except StoreError as later:
                _answer(entry, later)
                return
            except Exception as exc:
                log.error("message %s cannot be recorded: %r", message.id, exc)
                outcomes.append("refused")
                reasons[message.id] = "the ledger cannot keep it; the server's log says why"
        _answer(entry, Receipt(tuple(outcomes), reasons))


def _answer(entry: _Entry, answer: Receipt | StoreError) -> None:
    def settle() -> None:
        if entry.future.done():  # its client went away
            return
        if isinstance(answer, Receipt):
            entry.future.set_result(answer)
        else:
            entry.future.set_exception(answer)

    try:
        entry.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop has ended: nobody waits
        log.warning("recorded, but nobody waits for the answer any more")
