"""Watches a stream's chunks as they pass to the caller.

The stream is the very object the SDK made: only its inner iterator is replaced. A chunk reaches the caller as it came
and when it came, but for the one that only we asked for.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ref

from spryng_instrument.tallies import finishes, forget_usage, is_usage_chunk

if TYPE_CHECKING:
    from spryng_instrument.observe import Call


def watch_stream(call: Call, stream: Any) -> None:
    """Watch an open Stream of the SDK."""
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = watch = _watch(call, chunks)
    watching = ref(watch)
    hook_close(call, stream.response, "close", lambda: getattr(watching(), "gi_running", False))


def watch_async_stream(call: Call, stream: Any) -> None:
    """Watch an open AsyncStream of the SDK."""
    chunks = stream._iterator
    call.open(stream.response)
    stream._iterator = _AsyncWatch(call, chunks)
    reading = ref(chunks)
    hook_close(call, stream.response, "aclose", lambda: getattr(reading(), "ag_running", False))


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


def hook_close(call: Call, response: Any, name: str, is_reading: Callable[[], bool]) -> None:
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
