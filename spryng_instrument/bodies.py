"""Watches the body of a raw response as the caller reads it: nothing is read ahead, held back or read twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

from spryng_instrument.streams import hook_close, running_frame
from spryng_instrument.tallies import SseLines

if TYPE_CHECKING:
    from spryng_instrument.observe import Call


def watch_body(call: Call, response: Any) -> None:
    """Look at a body as the caller reads it: as server-sent events, or whole at its end."""
    tap = _Tap(call, response)
    is_async = not hasattr(response.stream, "__iter__")
    prefix = "a" if is_async else ""
    hooks = {
        name: tap.tapped(getattr(response, name), is_async, decoded)
        for name, decoded in ((f"{prefix}iter_bytes", True), (f"{prefix}iter_raw", False))
    }
    hook_close(call, response, f"{prefix}close", tap.steps, hooks)


_BINARY = ("audio/", "image/", "video/", "application/octet-stream")
"""Bodies that tell no usage, and may be too large to keep."""
_CALLERS_OWN = ("StreamConsumed", "StreamClosed")
"""What the response raises if a caller reads it twice: the answer has not failed."""


class _Tap:
    """What was seen of one body."""

    def __init__(self, call: Call, response: Any) -> None:
        self._steps_begun: list[ref[Any]] = []
        self._call = call
        self._response = response
        self._events = SseLines() if "event-stream" in response.headers.get("content-type", "") else None
        self._body: list[bytes] = []
        self._is_read = not response.headers.get("content-type", "").startswith(_BINARY)

    def steps(self) -> Any:
        """The generator that reads the body now, if one does. There may be others, which it refused."""
        return next((steps for begun in self._steps_begun if running_frame(steps := begun()) is not None), None)

    def tapped(self, read: Callable[..., Any], is_async: bool, decoded: bool) -> Callable[..., Any]:
        """*read*, one of the response's own iterators, with a look at each part that it gives."""

        def reading(*args: Any, **kwargs: Any) -> Any:
            parts = read(*args, **kwargs)
            if self.steps() is not None:
                return parts  # the raw bytes that our other iterator reads
            decoder = None if decoded else self._decoder()
            steps = self._async_steps(parts, decoder) if is_async else self._steps(parts, decoder)
            self._steps_begun.append(ref(steps))
            return steps

        return reading

    def _decoder(self) -> Any:
        """What undoes the body's content-encoding. A new one: the response's own keeps what it has seen."""
        response = self._response
        kept = response.__dict__.pop("_decoder", None)
        try:
            return response._get_content_decoder()
        except Exception:
            self._call._recorder.bug("decoding a raw body")
            return None
        finally:
            response.__dict__.pop("_decoder", None)
            if kept is not None:
                response._decoder = kept

    def _steps(self, parts: Iterator[bytes], decoder: Any) -> Iterator[bytes]:
        while True:
            try:
                part = next(parts)
            except StopIteration:
                self._guarded(self._end, decoder)
                return
            except BaseException as exc:
                self._failed(exc)
                raise
            self._guarded(self._see, part, decoder)
            yield part

    async def _async_steps(self, parts: AsyncIterator[bytes], decoder: Any) -> AsyncIterator[bytes]:
        while True:
            try:
                part = await parts.__anext__()
            except StopAsyncIteration:
                self._guarded(self._end, decoder)
                return
            except BaseException as exc:
                self._failed(exc)
                raise
            self._guarded(self._see, part, decoder)
            yield part

    def _see(self, part: bytes, decoder: Any) -> None:
        if decoder is not None:
            part = _joined(decoder.decode(part))
        if self._events is None:
            if self._is_read:
                self._body.append(part)
            return
        for event in self._events.feed(part):
            self._call.see(event)
        if self._events.done:
            self._call.whole()

    def _end(self, decoder: Any) -> None:
        if decoder is not None:
            self._see(_joined(decoder.flush()), None)
        if self._events is None:
            self._call.plain(b"".join(self._body))
        else:
            self._call.ended()

    def _failed(self, exc: BaseException) -> None:
        if type(exc).__name__ not in _CALLERS_OWN:
            self._call.failed(exc)

    def _guarded(self, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception:
            self._call._recorder.bug("reading a body")


def _joined(decoded: Any) -> bytes:
    """What a decoder gives: bytes, or their parts in newer releases of httpx2."""
    return decoded if isinstance(decoded, bytes) else b"".join(decoded)
