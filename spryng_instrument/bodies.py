"""Watches the body of a raw response as the caller reads it: nothing is read ahead, held back or read twice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from spryng_instrument.streams import hook_close
from spryng_instrument.tallies import SseLines

if TYPE_CHECKING:
    from spryng_instrument.observe import Call


def watch_body(call: Call, response: Any) -> None:
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
            call.plain(b"".join(body))
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
    hook_close(call, response, "aclose" if is_async else "close", lambda: reading)
