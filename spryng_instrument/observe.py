"""Watches one call to its end, and reports it once.

A plain reply is read where it stands. A stream is handed back as the very object the SDK made, with its inner iterator
replaced by one that looks at each chunk as it passes (streams); a raw body that was not read yet is looked at as it is
read (bodies).
Whatever happens in here, the caller sees what it would have seen: a bug of ours is logged, counted and kept from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from time import perf_counter, time_ns
from typing import Any
from weakref import ref

from spryng_instrument.bodies import watch_body
from spryng_instrument.checks import exact_text
from spryng_instrument.context import Scope
from spryng_instrument.deferred import WAITING
from spryng_instrument.endpoints import Endpoint
from spryng_instrument.message import BILLABLE, Message, Status, new_id
from spryng_instrument.recorder import Recorder
from spryng_instrument.streams import watch_async_stream, watch_stream
from spryng_instrument.tallies import SseLines, Tally, finishes
from spryng_instrument.usage import NOTHING, Reading, fields_of, lenient, read_body, read_reply

_time_of = datetime.fromtimestamp
_utc = timezone.utc


class Call:
    """One call from its start to its one message."""

    # Most calls are plain: what only others set has its default here, and costs them nothing.
    asked = False
    """Whether the stream was asked to report its usage, by the caller or by us."""
    hides = False
    """Whether it was by us: then the chunk that this adds is ours, and the caller never sees it."""
    unasked: tuple[tuple[Any, ...], dict[str, Any]]
    """The caller's own arguments, where ours ask for usage: to fall back on."""
    choices = 1
    """How many a stream has."""
    resent = False
    """Whether it was sent again without that: the server had refused it."""
    held: tuple[Any, ...] = ()
    """What it takes room in, of budgets, until it is at its end."""
    closing = False
    """Whether another thread or task closes the stream in the middle of reading it."""
    _streamed = False
    _open = False
    _done = False
    _kept = False
    _at_once = False
    _first_token: float | None = None
    _request_id: str | None = None
    _retries: int | None = None
    _call_site: str | None = None
    _answer: object = None
    _tally: Tally

    def __init__(
        self, recorder: Recorder, endpoint: Endpoint, scope: Scope, key: str | None, host: str | None, model: object
    ) -> None:
        self.endpoint = endpoint
        self.host = host
        self._recorder = recorder
        self._generation = recorder.generation
        self._scope = scope
        self._key = key
        if key is None:
            self._call_site = recorder.unkeyed()
        self._request_model = exact_text(model) if isinstance(model, str) else None
        self.query = scope.query
        self._time_ns = time_ns()
        self._started = perf_counter()

    def replied(self, reply: Any) -> None:
        """The SDK is about to return *reply* to the caller."""
        try:
            (_kinds.get(type(reply)) or _kind_of(reply))(self, reply)
        except Exception:
            self._recorder.bug("reading a reply")

    def parsing(self, parser: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """*parser*, which makes the caller's own type of an answer, with a look at that answer before it."""

        def parse(answer: Any) -> Any:
            self._answer = answer
            return parser(answer)

        return parse

    def failed(self, exc: BaseException) -> None:
        """The call, or the reading of its stream, raised *exc*."""
        try:
            if self._answer is not None:
                return _plain(self, self._answer)  # cut off, or of another type than wanted: answered and paid for
            if self._open and (self.closing or (self._tally.complete and not isinstance(exc, Exception))):
                return self.left()
            status: Status = "error" if isinstance(exc, Exception) else "cancelled"
            http_status = getattr(exc, "status_code", None)
            response = exc.__dict__.get("response")
            headers = getattr(response, "headers", None)
            if isinstance(headers, Mapping):  # older SDKs have no exc.request_id
                self._request_id = headers.get("x-request-id") or self._request_id
            request = exc.__dict__.get("request")  # httpx's own property of that name raises where there is none
            if request is not None:
                self._retries = _retries_of(request)
            if type(http_status) is int and http_status < 300:  # answered and paid for; but of another form than wanted
                answer = read_body(_content_of(response))
                if answer.usage is not None:
                    return self._finish("ok", answer)
            self._finish(
                status,
                self._tally.reading() if self._open else NOTHING,
                error=type(exc).__name__ if status == "error" else None,
                http_status=http_status if type(http_status) is int else None,
            )
        except Exception:
            self._recorder.bug("recording a failed call")

    def see(self, chunk: object) -> bool:
        """A chunk passes that is not quite plain. Tells whether it carries a generated token."""
        try:
            token = self._tally.see(chunk)
            if token and self._first_token is None and not self._at_once:
                self._first_token = perf_counter()
            if self.endpoint.defers and not self._kept:
                self._keep()
            if self._tally.told_all:
                self._finish("ok", self._tally.reading())
        except Exception:
            self._recorder.bug("reading a chunk")
            return False
        return token

    def looks_ahead(self, chunk: object) -> bool:
        """Whether its usage may follow this chunk, with which the answer ends: many callers stop here."""
        return self.asked and self._tally.complete and finishes(chunk)

    def whole(self) -> None:
        """The stream has said that nothing follows, though its body may not be read to its end."""
        self._tally.complete = self._tally.may_end

    def ended(self) -> None:
        """The stream was read to its end."""
        try:
            self._finish("ok" if self._tally.may_end else "incomplete", self._tally.reading())
        except Exception:
            self._recorder.bug("recording a stream")

    def left(self, *, finaliser: bool = False) -> None:
        """The stream was closed, or dropped and collected: perhaps before its end."""
        try:
            if self._generation is not self._recorder.generation:
                return  # begun before a fork, dropped in the child: the parent's to record
            self._finish("ok" if self._tally.complete else "incomplete", self._tally.reading(), finaliser=finaliser)
        except Exception:
            self._recorder.bug("recording a stream")

    def abandon(self) -> None:
        """The interpreter ends before the stream did."""
        self.left()

    def __del__(self) -> None:
        if self._open and not self._done:
            self.left(finaliser=True)
        if self.held:
            self._release()

    def open(self, response: Any, *, streamed: bool = True) -> None:
        """From here on the call lasts until the stream, or the body that is not read yet, is at its end."""
        self.opened(streamed=streamed)
        self.take_headers(response)

    def opened(self, *, streamed: bool = True) -> None:
        """From here on the call lasts until its stream is at its end."""
        self.__dict__.pop("unasked", None)  # not to be kept as long as the stream is
        self._streamed = streamed
        self._tally = self.endpoint.tally()
        self._tally.choices = self.choices
        self._open = True
        self._recorder.open_calls[id(self)] = ref(self)

    def take_headers(self, response: Any, retries: object = None) -> None:
        """Keep what the HTTP response says of the call."""
        self._request_id = response.headers.get("x-request-id")
        self._retries = retries if type(retries) is int else _retries_of(response.request)

    def plain(self, content: bytes) -> None:
        """The whole body of a reply is there."""
        self._finish("ok", read_body(content))

    def answered(self, reading: Reading) -> None:
        """The whole answer is there, and read."""
        self._finish("ok", reading)

    def whole_stream(self, content: bytes) -> None:
        """The whole body of a stream is there."""
        self.opened()
        self._at_once = True
        for event in SseLines().feed(content):
            self.see(event)
        self.ended()

    def _finish(
        self,
        status: Status,
        reading: Reading,
        *,
        error: str | None = None,
        http_status: int | None = None,
        finaliser: bool = False,
    ) -> None:
        if self._done:
            return None
        self._done = True
        if self._open and self._recorder.open_calls.pop(id(self), None) is None:
            return None  # another thread was faster
        if reading.failure is not None and status in BILLABLE:
            status, error = "error", reading.failure
        recorder = self._recorder
        waits = self.endpoint.defers and self._waits(status, reading)
        if self._kept:
            if not waits:
                recorder.settle(reading)
            return self._release()
        message = self._message(status, reading, error, http_status, numbered=not waits)
        if waits:
            recorder.defer(message)
            return self._release()
        try:
            recorder.record(message, finaliser=finaliser, held=self.held)
        except Exception:
            self._release()
            raise
        self.held = ()
        return None

    def _release(self) -> None:
        """It takes no room any more: its message, if it is to have one, comes later."""
        held, self.held = self.held, ()
        if held and self._recorder.budgets is not None:
            self._recorder.budgets.ended(None, held)

    def _keep(self) -> None:
        """Once a stream says that its work goes on without it: another reader may be at its end before this one."""
        reading = self._tally.reading()
        if self._waits("ok", reading):
            self._kept = True
            self._recorder.defer(self._message("ok", reading, None, None, numbered=False))

    def _message(
        self, status: Status, reading: Reading, error: str | None, http_status: int | None, *, numbered: bool
    ) -> Message:
        started = self._started
        latency_ms = round((perf_counter() - started) * 1e3, 3)
        first_token_ms = None if self._first_token is None else round((self._first_token - started) * 1e3, 3)
        scope = self._scope
        recorder = self._recorder
        # By position, in the order of Message: by name costs twice as much, and this is on the way of every call.
        return Message(
            new_id(self._time_ns),
            _time_of(self._time_ns / 1e9, _utc),
            self.endpoint.operation,
            status,
            self._key,
            scope.conversation_id,
            scope.tags,
            self.query,
            scope.properties,
            self._request_model,
            reading.model,
            reading.response_id,
            self._request_id,
            self._retries,
            reading.service_tier,
            self.host,
            self._streamed,
            error,
            http_status,
            latency_ms,
            first_token_ms,
            reading.usage if numbered else None,
            self._call_site,
            recorder.journal.writer if numbered else None,
            recorder.number() if numbered else None,
            reading.tool_usage,
        )

    def _waits(self, status: Status, reading: Reading) -> bool:
        """Whether the usage of this call comes with a later read."""
        # Whatever usage it tells so far: a batch begins with counts of zero.
        return reading.status in WAITING and status in BILLABLE and reading.response_id is not None


class Read(Call):
    """A later look at what a call began: no message of its own. Its answer may complete the one of that call."""

    def __init__(self, recorder: Recorder, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._recorder = recorder
        self._generation = recorder.generation

    def take(self, item: object) -> None:
        """An answer that was read, alone or in a page."""
        self._recorder.settle(read_reply(item))

    def replied(self, reply: Any) -> None:
        if any(hasattr(reply, name) for name in ("http_response", "_iterator", "iter_bytes")):
            return super().replied(reply)
        try:
            self._take_all(reply)
        except Exception:
            self._recorder.bug("reading an answer")

    def plain(self, content: bytes) -> None:
        self._take_all(lenient(content))

    def _take_all(self, reply: object) -> None:
        items = fields_of(reply).get("data")
        for item in items if type(items) is list else [reply]:
            try:
                self.take(item)
            except Exception:
                self._recorder.bug("reading an answer")

    def _finish(self, status: Status, reading: Reading, **_: Any) -> None:
        if not self._done:
            self._done = True
            self._recorder.open_calls.pop(id(self), None)
            self._recorder.settle(reading)


def _retries_of(request: Any) -> int | None:
    count = request.headers.get("x-stainless-retry-count", "")
    return int(count) if count.isdigit() else None


def _content_of(response: Any) -> bytes:
    """The whole body, if it was read."""
    try:
        content: bytes = response.content
    except Exception:
        return b""
    return content


_kinds: dict[type, Callable[[Call, Any], None]] = {}


def _kind_of(reply: Any) -> Callable[[Call, Any], None]:
    # By what a reply has, not by its class: classes move between SDK versions, and callers bring their own.
    if hasattr(reply, "_iterator") and hasattr(reply, "response"):
        kind: Callable[[Call, Any], None] = watch_async_stream if hasattr(reply, "__anext__") else watch_stream
    elif hasattr(reply, "http_response"):
        kind = _raw
    elif hasattr(reply, "iter_bytes"):
        kind = _http if hasattr(reply, "headers") else _binary
    else:
        kind = _plain
    if len(_kinds) < 256:  # parsed replies bring new types with every call
        _kinds[type(reply)] = kind
    return kind


def _plain(call: Call, reply: Any) -> None:
    if hasattr(reply, "__dict__"):  # no dict, text, or whatever the caller has replies made into
        call._request_id = reply.__dict__.get("_request_id")
    call._finish("ok", read_reply(reply))


def _raw(call: Call, reply: Any) -> None:
    _http(call, reply.http_response, getattr(reply, "retries_taken", None))


def _binary(call: Call, reply: Any) -> None:
    _http(call, reply.response)


def _http(call: Call, response: Any, retries: object = None) -> None:
    try:
        content = response.content
    except Exception:  # not read yet
        call.open(response, streamed="event-stream" in response.headers.get("content-type", ""))
        call.take_headers(response, retries)
        watch_body(call, response)
        return
    call.take_headers(response, retries)
    if "event-stream" in response.headers.get("content-type", "") and read_body(content) == NOTHING:
        call.whole_stream(content)
    else:
        call.plain(content)
