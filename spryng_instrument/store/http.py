"""The destination https://: a server of the Track Usage API, or any that speaks the seed's.

Exactly once: each message goes with its id, by which the server deduplicates; it is sent until the server has answered
for it. A server without the batch endpoint gets one message a request, in the seed's own words.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from spryng_instrument.api import Result, Results, body_of, seed_of, wire_of
from spryng_instrument.message import Message
from spryng_instrument.store.base import BATCH, Outcome
from spryng_instrument.store.transport import LOOK_AGAIN_S, Answer, BatchPoster, Fate

REMEMBERED = 100_000
"""Ids of acknowledged messages that are kept, to be sent no second time where each is a request."""
_OUTCOMES: dict[str, Outcome] = {
    "recorded": "recorded", "duplicate": "duplicate", "conflict": "conflict", "refused": "refused",
}  # fmt: skip


class HttpDestination(BatchPoster):
    """A Track Usage API.

    Args:
        url: its base, "https://usage.example.com".
        api_key: one that may ingest.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        base = url.rstrip("/").removesuffix("/trackUsage")
        super().__init__(f"{base}/trackUsage/batch", api_key)
        self._one_url = f"{base}/trackUsage"
        self._no_batch_until = 0.0
        self._acknowledged: dict[str, None] = {}

    @property
    def batch_size(self) -> int:
        """Messages to hand over at once: few, where each is a request."""
        return 20 if self._one_by_one else BATCH

    @property
    def _one_by_one(self) -> bool:
        return time.monotonic() < self._no_batch_until

    def check(self, *, timeout_s: float = 5.0) -> None:
        """Send what no server takes.

        Raises:
            StoreError: it cannot be reached, or takes nothing from us.
        """
        self._begin(timeout_s)
        answer = self._post(self.url, self._body([]))
        if answer.status in (404, 405):
            answer = self._post(self._one_url, b"{}")
        if not answer.ok:
            self._final(self._one_url, answer)

    def _body(self, messages: Sequence[Message]) -> bytes:
        return body_of([wire_of(message) for message in messages])

    def _deliver(self, messages: Sequence[Message]) -> list[Fate]:
        if self._one_by_one:
            return [self._deliver_one(message) for message in messages]
        return super()._deliver(messages)

    def _judge(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        if answer.status not in (404, 405):
            return super()._judge(answer, messages)
        self._no_batch_until = time.monotonic() + LOOK_AGAIN_S
        return self._deliver(messages)

    def _read(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        try:
            results = msgspec.json.decode(answer.body, type=Results).results
        except (msgspec.MsgspecError, UnicodeError) as exc:
            raise self._not_understood(self.url, answer, f"no results ({exc})") from None
        if len(results) != len(messages):
            raise self._not_understood(self.url, answer, f"{len(results)} results for {len(messages)} messages")
        return [self._fate(answer, result, message) for result, message in zip(results, messages, strict=True)]

    def _fate(self, answer: Answer, result: Result, message: Message) -> Fate:
        unread = result.id is None and result.status == "refused"
        if result.status not in _OUTCOMES or (result.id != message.id and not unread):
            raise self._not_understood(self.url, answer, f"{result} for message {message.id}")
        reason = None if result.error is None else self._without_key(result.error)
        return Fate(_OUTCOMES[result.status], reason)

    def _deliver_one(self, message: Message) -> Fate:
        """Send one message as the seed has it: any answer of 2xx that is no web page says that it is there."""
        if message.id in self._acknowledged:
            return Fate("duplicate")
        answer = self._post(self._one_url, msgspec.json.encode(seed_of(message)), gzips=False)
        if not answer.ok:
            return self._final(self._one_url, answer)
        self._acknowledged[message.id] = None
        if len(self._acknowledged) > REMEMBERED:
            del self._acknowledged[next(iter(self._acknowledged))]
        return Fate("recorded")
