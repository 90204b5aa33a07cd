"""Watches a stream's chunks as they pass to the caller.

The stream is the very object the SDK made: only its inner iterator is replaced. A chunk reaches the caller as it came
and when it came, but for the one that only we asked for.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ref

from spryng_instrument.tallies import forget_usage, is_usage_chunk

if TYPE_CHECKING:
    from spryng_instrument.observe import Call


def watch_stream(call: Call, stream: Any) -> None:
    """Watch an open Stream of the SDK."""
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = watch = _watch(call, chunks)
    hook_close(call, stream.response, "close", ref(watch))


def watch_async_stream(call: Call, stream: Any) -> None:
    """Watch an open AsyncStream of the SDK."""
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = _AsyncWatch(call, chunks)
    hook_close(call, stream.response, "aclose", ref(chunks))


def _watch(call: Call, chunks: Iterator[Any]) -> Any:
    """Pass the chunks of a stream on, all but the one that only we asked for.

    A generator, for its speed. If it is dropped before it is started it never runs: then Call.__del__ reports.
    """
    plain_field = call.endpoint.tally.plain_field
    hides = call.hides
    waiting = True
    try:
        while True:
            for chunk in chunks:
                # Most chunks carry text and nothing else. This runs on each of them: no calls, no second look.
                try:
                    fields = chunk.__dict__
                    if plain_field is not None:
                        plain = plain_field in fields
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
                if not call.looks_ahead(chunk):
                    yield chunk
                    continue
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

    __slots__ = ("_call", "_chunks", "_hides", "_next", "_plain_field", "_waiting")

    def __init__(self, call: Call, chunks: AsyncIterator[Any]) -> None:
        self._call = call
        self._chunks = chunks
        self._next = chunks.__anext__
        self._plain_field = call.endpoint.tally.plain_field
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
            if self._plain_field is not None:
                plain = self._plain_field in fields
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
        if call.looks_ahead(chunk):
            try:
                following = await self._chunks.__anext__()
            except StopAsyncIteration:
                pass
            except Exception as exc:
                self._next = partial(self._replay, failure=exc)
            except BaseException as exc:  # the task is being cancelled: that goes first, and the chunk is not lost
                self._next = partial(self._replay, chunk)
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


def hook_close(
    call: Call, response: Any, name: str, reading: Callable[[], Any], others: Mapping[str, Any] | None = None
) -> None:
    """Report *call* when its response is closed, unless by its own end. The response keeps neither call nor stream.

    Args:
        reading: gives the generator that reads the response, or None where it is gone.
        others: further methods of the response that are watched until then.
    """
    close = getattr(response, name)
    watched = ref(call)

    def leaving() -> Call | None:
        """The call, if the caller leaves it. It does not where the response is closed because it is read to its end."""
        for hook, ours in hooks.items():  # closed once, the response is as it would be without us
            if response.__dict__.get(hook) is ours:
                del response.__dict__[hook]
                response.__dict__.update(before[hook])
        open_call = watched()
        frame = running_frame(reading())
        if open_call is None or frame is None:
            return open_call
        # Where an exception is thrown into a reader, its frames are not linked: what it closes then is its own, too.
        if sys.exc_info()[1] is None and not _is_within(frame):
            open_call.closing = True  # the reader is another thread or task, and about to fail
        return None

    def closed() -> None:
        left = leaving()
        try:
            close()
        finally:
            if left is not None:
                left.left()

    async def aclosed() -> None:
        left = leaving()
        try:
            await close()
        finally:
            if left is not None:
                left.left()

    hooks = {name: closed if name == "close" else aclosed, **(others or {})}
    before = {hook: {hook: response.__dict__[hook]} if hook in response.__dict__ else {} for hook in hooks}
    response.__dict__.update(hooks)


def running_frame(generator: Any) -> Any:
    """The frame of a generator, of either kind, that is at work or waits for something; else None."""
    if getattr(generator, "gi_running", False):
        return generator.gi_frame
    return generator.ag_frame if getattr(generator, "ag_running", False) else None


def _is_within(frame: Any) -> bool:
    """Whether what calls this was called out of that frame."""
    caller: Any = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is frame
