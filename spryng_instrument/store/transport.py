"""What the destinations that speak HTTP share: how a batch is sent, and what an answer means.

Invariant: messages are acknowledged only by an answer that says so in full. What the other end calls wrong is final for
that message, which is found by halving its batch, in as many tries as that takes; everything else (no network, a
timeout, a login page, 401, 429, 500 ...) holds all of them back, to be sent again. The API key is in one header, and in
no error. A call lasts no longer than its timeout, however slowly the other end reads or answers. Connections belong to
the process that made them.
"""

from __future__ import annotations

import gzip
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import msgspec

from spryng_instrument.api import MAX_BYTES, MAX_MESSAGES
from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.store.base import BATCH, Outcome, Receipt

FINAL = (400, 409, 413, 422)
"""Statuses that sending the same again will not change."""
GZIP_OVER = 1_000
"""Bytes of a body, above which it is compressed."""
LOOK_AGAIN_S = 3600.0
"""How long something learned about the other end is believed."""
LONGEST_RETRY_AFTER_S = 3600.0
_PIECE = 16_384
"""Bytes that are written at once: how much time is left is looked at between them."""


class Answer(NamedTuple):
    """What came back, whole."""

    status: int
    headers: Any
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def kind(self) -> str:
        """Its content type: "application/json"."""
        return str(self.headers.get("content-type", "")).partition(";")[0].strip().lower()


class Fate(NamedTuple):
    """What became of one message."""

    outcome: Outcome
    reason: str | None = None


class HttpEnd:
    """The other end of HTTP: what is sent to it, and its whole answer, within a time. Redirects are not followed.

    Args:
        api_key: sent as a Bearer token. None: none is needed.
    """

    most_answered: ClassVar[int] = 20_000_000
    """Bytes of an answer: more is none."""

    def __init__(self, api_key: str | None = None) -> None:
        self._api_key = api_key
        self._client: Any = None
        self._pid = 0
        self._time = threading.local()

    def close(self) -> None:
        """Close the connections of this process. Used again, it makes new ones."""
        client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    def _begin(self, timeout_s: float) -> None:
        """From now on, what this thread sends and hears must be done within that time."""
        self._time.ends = time.monotonic() + timeout_s

    def _send(self, method: str, url: str, headers: dict[str, str], content: bytes | None = None) -> Answer:
        """What the other end answers, whatever it is.

        Raises:
            StoreError: nothing, or not in time.
        """
        headers = {"accept-encoding": "identity", **headers}
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        try:
            with self._connected().stream(
                method, url, content=content, headers=headers, timeout=self._left_s(),
                extensions={"trace": self._bound_in_time},
            ) as response:  # fmt: skip
                received = bytearray()
                for chunk in response.iter_bytes():
                    received += chunk
                    if len(received) > self.most_answered:
                        raise OSError(f"an answer of more than {self.most_answered} bytes")
                return Answer(response.status_code, response.headers, bytes(received))
        except Exception as exc:  # a proxy's setting or a certificate, too: none of them is a message's fault
            why = self._without_key(f"{type(exc).__name__}: {exc}")
            raise StoreError(f"{url} gave no answer: {why}") from exc

    def _connected(self) -> Any:
        if self._client is None or self._pid != os.getpid():  # the parent's connections stay the parent's
            self._client, self._pid = _http().Client(), os.getpid()
        return self._client

    def _bound_in_time(self, event: str, info: dict[str, Any]) -> None:
        """Told by httpcore what it does: each new connection's reads and writes end when our time does.

        Its own timeouts are for one read, and begin again with each byte.
        """
        stream: Any = info.get("return_value")
        if not hasattr(stream, "start_tls"):
            return
        read, write = stream.read, stream.write

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            return read(max_bytes, self._left_s())  # type: ignore[no-any-return]

        def write_in_time(buffer: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(buffer), _PIECE):
                write(buffer[start : start + _PIECE], self._left_s())

        stream.read, stream.write = read_in_time, write_in_time

    def _left_s(self) -> float:
        left: float = self._time.ends - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for it is over")
        return left

    def _said(self, answer: Answer) -> str:
        """An answer's own words, shortened."""
        text = answer.body[:2000].decode("utf-8", "replace")
        try:
            found = msgspec.json.decode(answer.body)
            error = found.get("error") or found.get("detail") or found.get("message") or found
            if isinstance(error, dict) and "message" in error:
                error = error["message"]  # of ours: it names the field, too
            text = str(error)
        except (msgspec.MsgspecError, UnicodeError, AttributeError, RecursionError):
            pass
        if answer.kind not in ("", "application/json", "application/problem+json", "text/plain", "text/html"):
            text = ""
        return self._without_key(" ".join(text.split()))[:300]

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "(the API key)") if self._api_key else text


class BatchPoster(HttpEnd, ABC):
    """A destination to which batches are posted.

    Args:
        url: http:// or https://, without a query.
        api_key: sent as a Bearer token. None: none is needed.

    Raises:
        SettingsError: one of them cannot be used.
    """

    content_type = "application/json"
    gzips = True

    @property
    def batch_size(self) -> int:
        """Messages to hand over at once."""
        return BATCH

    def __init__(self, url: str, api_key: str | None) -> None:
        if urlsplit(url).query:
            raise SettingsError(
                f"{url.partition('?')[0]}?...: remove the part from the question mark on; a key belongs into api_key "
                "or SPRYNG_API_KEY"
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise SettingsError("api_key has characters that no HTTP header can carry, a line feed at its end perhaps")
        super().__init__(api_key)
        self.url = url.rstrip("/")
        self._most_bytes, self._most_until = MAX_BYTES, 0.0
        self._settled: dict[str, tuple[Message, Fate]] = {}
        """Of a batch that is taken apart: what became of some, until all of it is known."""
        self._apart: set[tuple[str, str]] = set()
        """Parts of it, by their first and last id, that are not to be sent as a whole again."""

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        """Deliver *messages*; those that the other end can never take are refused, with its reason.

        Raises:
            StoreError: not now; deliver them again later.
        """
        self._begin(timeout_s)
        fates = self._deliver(messages)
        self._settled.clear()  # but not where that failed: the next try goes on from there
        self._apart.clear()
        reasons = {message.id: fate.reason for message, fate in zip(messages, fates, strict=True) if fate.reason}
        return Receipt(tuple(fate.outcome for fate in fates), reasons)

    def check(self, *, timeout_s: float = 5.0) -> None:
        """Send an empty batch.

        Raises:
            StoreError: it cannot be reached, or takes nothing from us.
        """
        self._begin(timeout_s)
        answer = self._post(self.url, self._body([]))
        if not answer.ok and answer.status not in FINAL:
            raise self._held(self.url, answer)

    @abstractmethod
    def _body(self, messages: Sequence[Message]) -> bytes:
        """The body of a batch."""

    @abstractmethod
    def _read(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        """What a 2xx answer says of each message of the batch."""

    def _deliver(self, messages: Sequence[Message]) -> list[Fate]:
        if not messages:
            return []
        settled = self._settled_of(messages)
        if settled is not None:
            return settled
        if len(messages) > 1 and (messages[0].id, messages[-1].id) in self._apart:
            return self._halves(messages)
        body = self._body(messages)
        most = self._most_bytes if time.monotonic() < self._most_until else MAX_BYTES
        if len(messages) > 1 and (len(messages) > MAX_MESSAGES or len(body) > most):
            return self._halves(messages)
        if len(body) > MAX_BYTES:
            return [Fate("refused", f"it has {len(body)} bytes; {MAX_BYTES} are allowed")]
        answer = self._post(self.url, body)
        if answer.status == 413 and len(messages) > 1:
            self._most_bytes, self._most_until = len(body) - 1, time.monotonic() + LOOK_AGAIN_S
        return self._judge(answer, messages)

    def _judge(self, answer: Answer, messages: Sequence[Message]) -> list[Fate]:
        if answer.ok:
            return self._read(answer, messages)
        if len(messages) > 1 and answer.status in FINAL:
            return self._halves(messages)
        return [self._final(self.url, answer)]

    def _halves(self, messages: Sequence[Message]) -> list[Fate]:
        self._apart.add((messages[0].id, messages[-1].id))
        middle = len(messages) // 2
        fates: list[Fate] = []
        for half in (messages[:middle], messages[middle:]):
            found = self._deliver(half)
            self._settled.update((message.id, (message, fate)) for message, fate in zip(half, found, strict=True))
            fates += found
        return fates

    def _settled_of(self, messages: Sequence[Message]) -> list[Fate] | None:
        """What an earlier try found out of all of these. None: not of each."""
        found = [self._settled.get(message.id) for message in messages] if self._settled else [None]
        fates = [known[1] for known, message in zip(found, messages, strict=False) if known and known[0] == message]
        return fates if len(fates) == len(messages) else None

    def _final(self, url: str, answer: Answer) -> Fate:
        if answer.status not in FINAL:
            raise self._held(url, answer)
        return Fate("conflict" if answer.status == 409 else "refused", f"{answer.status} {self._said(answer)}".strip())

    def _post(self, url: str, body: bytes, *, gzips: bool = True) -> Answer:
        """Post one body. Returns an answer that is an acknowledgement, or final, or 404 or 405."""
        zipped = gzips and self.gzips and len(body) > GZIP_OVER
        headers = {"content-type": self.content_type, **({"content-encoding": "gzip"} if zipped else {})}
        answer = self._send("POST", url, headers, gzip.compress(body, 6) if zipped else body)
        if zipped and answer.status == 415:
            self.gzips = False
            return self._post(url, body)
        if answer.ok and answer.kind == "text/html":
            raise self._not_understood(url, answer, "a web page")
        if answer.ok or answer.status in (404, 405, *FINAL):
            return answer
        raise self._held(url, answer)

    def _not_understood(self, url: str, answer: Answer, what: str) -> StoreError:
        return StoreError(
            f"{url} answered {answer.status} with {what}, which acknowledges nothing. Is something else there, or a "
            f"proxy before it? It begins: {self._said(answer)!r}"
        )

    def _held(self, url: str, answer: Answer) -> StoreError:
        """Why messages are held back, and what to do."""
        do = {
            401: "it does not accept the API key. Set api_key or SPRYNG_API_KEY to one that it does"
            if self._api_key
            else "it wants an API key. Set api_key or SPRYNG_API_KEY",
            403: "the API key may not send messages. Allow it that there, or set api_key or SPRYNG_API_KEY to another",
            404: "nothing takes messages there. Correct the destination's URL",
            405: "nothing takes messages there. Correct the destination's URL",
            412: "it is older than this process, and would lose a part of these messages. Update it",
            429: "it is asked too often",
        }.get(answer.status, "")
        if 300 <= answer.status < 400:
            place = self._without_key(str(answer.headers.get("location", "elsewhere")).partition("?")[0])
            do = f"it has moved to {place}. Make that the destination's URL, if it is right"
        said = self._said(answer)
        text = f"{url} answered {answer.status}" + (f": {do}" if do else "") + (f" ({said})" if said else "")
        return StoreError(text, retry_after_s=_retry_after_s(answer))


def _retry_after_s(answer: Answer) -> float | None:
    """Seconds, of a Retry-After header of either kind. None: there is none that can be read."""
    value = str(answer.headers.get("retry-after", "")).strip()
    try:
        if value.isascii() and value.isdigit():
            seconds = float(value)
        else:
            at = parsedate_to_datetime(value)
            seconds = (at.astimezone(timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def _http() -> Any:
    """The httpx that the installed openai brings."""
    try:
        import httpx2 as http
    except ModuleNotFoundError as exc:
        if exc.name != "httpx2":
            raise
        import httpx as http  # type: ignore[no-redef, unused-ignore]
    return http
