"""Watches one call to its end, and reports it once.

A plain reply is read where it stands. A stream is handed back as the very object the SDK made, with its inner iterator
replaced by one that looks at each chunk as it passes; a raw body that was not read yet is looked at as it is read.
Whatever happens in here, the caller sees what it would have seen: a bug of ours is logged, counted and kept from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any
from weakref import ref

from spryng_instrument.context import Scope
from spryng_instrument.endpoints import (
    NOTHING,
    Endpoint,
    Reading,
    SseLines,
    Tally,
    finishes,
    forget_usage,
    is_usage_chunk,
    read_body,
    read_reply,
)
from spryng_instrument.message import BILLABLE, Message, Status, new_id
from spryng_instrument.recorder import Recorder

_utc = timezone.utc
NO_FIELDS: dict[str, Any] = {}


class Call:
    """One call from its start to its one message."""

    # Most calls are plain: what only others set has its default here, and costs them nothing.
    asked = False
    """Whether the stream was asked to report its usage, by the caller or by us."""
    hides = False
    """Whether it was by us: then the chunk that this adds is ours, and the caller never sees it."""
    _streamed = False
    _open = False
    _done = False
    _first_token: float | None = None
    _request_id: str | None = None
    _retries: int | None = None
    _call_site: str | None = None
    _answer: object = None
    _tally: Tally

    def __init__(
        self, recorder: Recorder, endpoint: Endpoint, scope: Scope, key: str | None, host: str | None, model: object
    ) -> None:
        self.id = new_id()
        self.endpoint = endpoint
        self.host = host
        self._recorder = recorder
        self._generation = recorder.generation
        self._scope = scope
        self._key = key
        if key is None:
            self._call_site = recorder.unkeyed()
        self._request_model = model if type(model) is str else None
        self.query = scope.query
        self._timestamp = datetime.now(_utc)
        self._started = perf_counter()

    def replied(self, reply: Any) -> None:
        """The SDK is about to return *reply* to the caller."""
        try:
            kind = _kinds.get(type(reply)) or _kind_of(reply)
            kind(self, reply)
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
            status: Status = "error" if isinstance(exc, Exception) else "cancelled"
            http_status = getattr(exc, "status_code", None)
            self._request_id = getattr(exc, "request_id", None) or self._request_id
            request = exc.__dict__.get("request")  # httpx's own property of that name raises where there is none
            if request is not None:
                self._retries = _retries_of(request)
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
            if token and self._first_token is None:
                self._first_token = perf_counter()
            if self._tally.told_all:
                self._finish("ok", self._tally.reading())
        except Exception:
            self._recorder.bug("reading a chunk")
            return False
        return token

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

    def open(self, response: Any, *, streamed: bool = True) -> None:
        """From here on the call lasts until its stream, or the body that is not read yet, is at its end."""
        self._streamed = streamed
        self._tally = Tally(self.endpoint)
        self._open = True
        self._recorder.open_calls[self.id] = ref(self)
        self.take_headers(response)

    def take_headers(self, response: Any, retries: object = None) -> None:
        """Keep what the HTTP response says of the call."""
        self._request_id = response.headers.get("x-request-id")
        self._retries = retries if type(retries) is int else _retries_of(response.request)

    def plain(self, reading: Reading) -> None:
        """The whole reply is there."""
        if reading.failure is None:
            self._finish("ok", reading)
        else:
            self._finish("error", reading, error=reading.failure)

    def whole_stream(self, content: bytes) -> None:
        """The whole body of a stream is there."""
        self._streamed = True
        self._tally = Tally(self.endpoint)
        for event in SseLines().feed(content):
            self._tally.see(event)
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
            return
        self._done = True
        if self._open and self._recorder.open_calls.pop(self.id, None) is None:
            return  # another thread was faster
        if reading.failure is not None and status in BILLABLE:
            status, error = "error", reading.failure
        latency_ms = round((perf_counter() - self._started) * 1e3, 3)
        first_token_ms = None
        if self._first_token is not None:
            first_token_ms = round((self._first_token - self._started) * 1e3, 3)
        scope = self._scope
        recorder = self._recorder
        # By position, in the order of Message: by name costs twice as much, and this is on the way of every call.
        recorder.record(
            Message(
                self.id,
                self._timestamp,
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
                reading.usage,
                self._call_site,
                recorder.journal.writer,
                recorder.number(),
            ),
            finaliser=finaliser,
        )


def _retries_of(request: Any) -> int | None:
    count = request.headers.get("x-stainless-retry-count", "")
    return int(count) if count.isdigit() else None


_kinds: dict[type, Callable[[Call, Any], None]] = {}


def _kind_of(reply: Any) -> Callable[[Call, Any], None]:
    # By what a reply has, not by its class: classes move between SDK versions, and callers bring their own.
    if hasattr(reply, "_iterator") and hasattr(reply, "response"):
        kind: Callable[[Call, Any], None] = _async_stream if hasattr(reply, "__anext__") else _sync_stream
    elif hasattr(reply, "http_response"):
        kind = _raw
    elif hasattr(reply, "iter_bytes"):
        kind = _http
    else:
        kind = _plain
    if len(_kinds) < 256:  # parsed replies bring new types with every call
        _kinds[type(reply)] = kind
    return kind


def _plain(call: Call, reply: Any) -> None:
    request_id = getattr(reply, "__dict__", NO_FIELDS).get("_request_id")
    if request_id is not None:
        call._request_id = request_id
    call.plain(read_reply(reply))


def _raw(call: Call, reply: Any) -> None:
    _http(call, reply.http_response, getattr(reply, "retries_taken", None))


def _http(call: Call, response: Any, retries: object = None) -> None:
    try:
        content = response.content
    except Exception:  # not read yet
        call.open(response, streamed="event-stream" in response.headers.get("content-type", ""))
        call.take_headers(response, retries)
        _tap(call, response)
        return
    call.take_headers(response, retries)
    reading = read_body(content)
    if reading == NOTHING and "event-stream" in response.headers.get("content-type", ""):
        call.whole_stream(content)
    else:
        call.plain(reading)


def _sync_stream(call: Call, stream: Any) -> None:
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = watch = _watch(call, chunks)
    watching = ref(watch)
    _hook_close(call, stream.response, "close", lambda: getattr(watching(), "gi_running", False))


def _async_stream(call: Call, stream: Any) -> None:
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = _AsyncWatch(call, chunks)
    reading = ref(chunks)
    _hook_close(call, stream.response, "aclose", lambda: getattr(reading(), "ag_running", False))


def _watch(call: Call, chunks: Iterator[Any]) -> Any:
    """Pass the chunks of a stream on, all but the one that only we asked for.

    A generator, for its speed. If it is dropped before it is started it never runs: then Call.__del__ reports.
    """
    events = call.endpoint.stream_field == "response"
    hides = call.hides
    waiting = True
    try:
        while True:
            for chunk in chunks:
                # Most chunks carry text and nothing else. This runs on each of them: no calls, no second look.
                try:
                    fields = chunk.__dict__
                    if events:
                        plain = "item_id" in fields  # the deltas, of which most of these streams consist
                    elif fields["usage"] is None:
                        plain = fields["choices"][0].__dict__["finish_reason"] is None
                        if hides:  # asked by us, each chunk says `"usage": null`: the caller's to_json() must not
                            chunk.__pydantic_fields_set__.discard("usage")
                    else:
                        plain = False
                except Exception:
                    plain = False
                if plain and not waiting:
                    yield chunk
                    continue
                if call.see(chunk):
                    waiting = False
                if hides:
                    if is_usage_chunk(chunk):
                        continue
                    forget_usage(chunk)
                if not (call.asked and finishes(chunk)):
                    yield chunk
                    continue
                # Many callers stop here, just before the usage: look one chunk ahead.
                failure: Exception | None = None
                following: tuple[Any, ...] = ()
                try:
                    following = (next(chunks),)
                except StopIteration:
                    pass
                except Exception as exc:
                    failure = exc
                if following and is_usage_chunk(following[0]):
                    call.see(following[0])
                    if hides:
                        following = ()
                yield chunk
                if failure is not None:
                    raise failure
                if following:
                    chunks = chain(following, chunks)
                    break
            else:
                break
    except GeneratorExit:
        call.left(finaliser=True)
        raise
    except BaseException as exc:
        call.failed(exc)
        raise
    call.ended()


class _AsyncWatch:
    """The same for an async stream. No async generator: those meet the event loop's hooks, which the caller may see."""

    __slots__ = ("_call", "_chunks", "_events", "_hides", "_next", "_waiting")

    def __init__(self, call: Call, chunks: AsyncIterator[Any]) -> None:
        self._call = call
        self._chunks = chunks
        self._next = chunks.__anext__
        self._events = call.endpoint.stream_field == "response"
        self._hides = call.hides
        self._waiting = True

    def __aiter__(self) -> _AsyncWatch:
        return self

    async def __anext__(self) -> Any:
        try:
            chunk = await self._next()
        except StopAsyncIteration:
            self._call.ended()
            raise
        except BaseException as exc:
            self._call.failed(exc)
            raise
        try:
            fields = chunk.__dict__
            if self._events:
                plain = "item_id" in fields  # the deltas, of which most of these streams consist
            elif fields["usage"] is None:
                plain = fields["choices"][0].__dict__["finish_reason"] is None
                if self._hides:
                    chunk.__pydantic_fields_set__.discard("usage")
            else:
                plain = False
        except Exception:
            plain = False
        if plain and not self._waiting:
            return chunk
        return await self._slowly(chunk)

    async def _slowly(self, chunk: Any) -> Any:
        call = self._call
        if call.see(chunk):
            self._waiting = False
        if self._hides:
            if is_usage_chunk(chunk):
                return await self.__anext__()
            forget_usage(chunk)
        if call.asked and finishes(chunk):
            # Many callers stop here, just before the usage: look one chunk ahead.
            try:
                following = await self._chunks.__anext__()
            except StopAsyncIteration:
                pass
            except Exception as exc:
                self._next = partial(self._replay, failure=exc)
            except BaseException as exc:  # the task is being cancelled: that goes first
                call.failed(exc)
                raise
            else:
                usage = is_usage_chunk(following)
                if usage:
                    call.see(following)
                if not (usage and self._hides):
                    self._next = partial(self._replay, following)
        return chunk

    async def _replay(self, chunk: Any = None, failure: Exception | None = None) -> Any:
        self._next = self._chunks.__anext__
        if failure is not None:
            raise failure
        return chunk


def _hook_close(call: Call, response: Any, name: str, is_reading: Callable[[], bool]) -> None:
    """Report *call* when its response is closed, unless by its own end. The response keeps neither call nor stream."""
    close = getattr(response, name)
    watched = ref(call)

    def leave() -> None:
        if not is_reading():
            response.__dict__.pop(name, None)
            open_call = watched()
            if open_call is not None:
                open_call.left()

    def closed() -> None:
        try:
            close()
        finally:
            leave()

    async def aclosed() -> None:
        try:
            await close()
        finally:
            leave()

    setattr(response, name, closed if name == "close" else aclosed)


def _tap(call: Call, response: Any) -> None:
    """Look at a body as the caller reads it: as server-sent events, or whole at its end."""
    is_async = not hasattr(response.stream, "__iter__")
    events = SseLines() if "event-stream" in response.headers.get("content-type", "") else None
    body: list[bytes] = []
    reading = False

    def see(content: bytes) -> None:
        if events is None:
            body.append(content)
            return
        for event in events.feed(content):
            call.see(event)
        if events.done:
            call.whole()

    def end() -> None:
        if events is None:
            call.plain(read_body(b"".join(body)))
        else:
            call.ended()

    def guarded(act: Callable[..., None], *args: bytes) -> None:
        try:
            act(*args)
        except Exception:
            call._recorder.bug("reading a body")

    def iter_bytes(chunk_size: int | None = None) -> Iterator[bytes]:
        nonlocal reading
        parts = original(chunk_size)
        while True:
            reading = True
            try:
                part = next(parts)
            except StopIteration:
                guarded(end)
                return
            except BaseException as exc:
                call.failed(exc)
                raise
            finally:
                reading = False
            guarded(see, part)
            yield part

    async def aiter_bytes(chunk_size: int | None = None) -> AsyncIterator[bytes]:
        nonlocal reading
        parts = original(chunk_size)
        while True:
            reading = True
            try:
                part = await parts.__anext__()
            except StopAsyncIteration:
                guarded(end)
                return
            except BaseException as exc:
                call.failed(exc)
                raise
            finally:
                reading = False
            guarded(see, part)
            yield part

    name = "aiter_bytes" if is_async else "iter_bytes"
    original = getattr(response, name)
    setattr(response, name, aiter_bytes if is_async else iter_bytes)
    _hook_close(call, response, "aclose" if is_async else "close", lambda: reading)
