"""However the reading of a stream ends: one message with the right status, and the caller sees the SDK's own stream."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import openai
import pytest

from spryng_instrument import stats, uninstrument, usage_context
from spryng_instrument.message import Usage
from tests.shapes import (
    CALLS,
    CHAT,
    MODES,
    Parts,
    argument,
    client_of,
    close,
    close_response,
    each,
    following,
    http,
    need,
    parsing,
    running,
    seen,
    seen_stream,
    serving,
    settle,
    sse,
    truth,
    within,
)

both = pytest.mark.parametrize("mode", MODES)
OPENAI = "https://api.openai.com/v1"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
COUNTED = Usage(input_tokens=9, output_tokens=3, total_tokens=12)
HEAD = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1"}


def chunk(content: str | None = None, *, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more}


TEXT = [chunk("a"), chunk("b"), chunk("c")]
FINISH = chunk(finish="stop")
ALL = [*TEXT, FINISH]
LAST = {**HEAD, "choices": [], "usage": USAGE}
ASKED = [{**event, "usage": None} for event in (*TEXT, FINISH)]


class Server:
    """Answers like OpenAI, with these events: the usage only where it is asked for. Remembers its responses."""

    def __init__(self, *events: Any, failure: Exception | None = None, usage: bool = True, done: bool = True) -> None:
        self.events, self.failure, self.usage, self.done = events, failure, usage, done
        self.responses: list[Any] = []
        self.transport = http.MockTransport(self.answer)

    def answer(self, request: Any) -> Any:
        asked = self.usage and b"include_usage" in request.content
        events = [{**event, "usage": None} if asked else event for event in self.events]
        if asked and self.failure is None:
            events.append(LAST)
        parts = [sse(event) for event in events] + [sse("[DONE]")] * (self.failure is None and self.done)
        headers = {"content-type": "text/event-stream", "x-request-id": "req_1"}
        self.responses.append(http.Response(200, headers=headers, stream=Parts(parts, self.failure)))
        return self.responses[-1]


async def opened(client: Any, **more: Any) -> Any:
    return await settle(client.chat.completions.create(**CHAT, stream=True, **more))


def outcome(mode: str, server: Server, act: Callable[[Any], Any]) -> Any:
    """What *act* gives with a client, and whether the responses are closed then."""

    async def call() -> Any:
        async with client_of(mode, transport=server.transport, base_url=OPENAI) as client:
            with usage_context("acme"):
                value = await act(client)
            gc.collect()
            if mode == "async":
                await asyncio.sleep(0)  # where dropped async generators are closed
                await asyncio.sleep(0)
            return value, [response.is_closed for response in server.responses]

    server.responses.clear()
    return running(mode)(call())


def compared(mode: str, server: Server, act: Callable[[Any], Any], instrument: Any) -> Any:
    """The one message of *act*, after it did the same as without us."""
    bare = outcome(mode, server, act)
    ledger = instrument()
    assert outcome(mode, server, act) == bare
    assert stats().errors == 0
    message = ledger.message()
    assert (message.key, message.streamed, message.host) == ("acme", True, "api.openai.com")
    return message


# --- exits ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("exit", ["drop", "close", "with", "raise", "response"])
def test_left_at_every_chunk(exit, position, mode, instrument):
    """A stream left after any number of chunks is one message: whole from its finish chunk on, with its usage."""

    async def act(client: Any) -> Any:
        stream = await opened(client)
        got = []

        async def read() -> None:
            for _ in range(min(position, 4)):
                got.append(seen(await following(stream)))
            if position == 5:
                with pytest.raises(StopAsyncIteration):
                    await following(stream)

        if exit in ("with", "raise"):
            try:
                async with within(stream):
                    await read()
                    if exit == "raise":
                        raise LookupError
            except LookupError:
                got.append("raised")
        else:
            await read()
        if exit == "close":
            await close(stream)
            await close(stream)
        elif exit == "response":
            await close_response(stream)
        return type(stream), got

    message = compared(mode, Server(*ALL), act, instrument)
    whole = position >= 4
    assert message.status == ("ok" if whole else "incomplete")
    assert message.usage == (COUNTED if whole else None)
    assert message.response_id == ("c-1" if position else None)
    assert message.error is None
    assert (message.time_to_first_token_ms is None) is (position == 0)
    assert message.request_id == "req_1"


@both
def test_written_before_the_usage_is_handed_out(mode, instrument):
    """Who stops at finish_reason has the message recorded by then, its usage included: no collector is needed."""
    ledger = instrument()
    recorded: list[int] = []

    async def act(client: Any) -> None:
        async for piece in each(await opened(client)):
            recorded.append(stats().recorded)
            if piece.choices[0].finish_reason:
                break

    gc.disable()
    try:
        outcome(mode, Server(*ALL), act)
    finally:
        gc.enable()
    assert recorded == [0, 0, 0, 1]
    assert ledger.message().usage == COUNTED


@both
def test_resumed(mode, instrument):
    """A loop that is broken off and taken up again reads one stream: one message, whole."""

    async def act(client: Any) -> Any:
        stream = await opened(client)
        first = await following(stream)
        return [seen(first), *[seen(piece) async for piece in each(stream)]]

    message = compared(mode, Server(*ALL), act, instrument)
    assert (message.status, message.usage) == ("ok", COUNTED)


@both
@pytest.mark.parametrize("after", [0, 2])
def test_disconnect(after, mode, instrument):
    """A connection that breaks raises what it would have raised; one failed message, with what was told before."""
    server = Server(*TEXT[:after], failure=http.ReadError("gone"))

    async def act(client: Any) -> Any:
        got: list[Any] = []
        try:
            async for piece in each(await opened(client)):
                got.append(seen(piece))
        except Exception as exc:
            got.append(seen(exc))
        return got

    message = compared(mode, server, act, instrument)
    assert message.status == "error"
    assert message.error in ("APIConnectionError", "ReadError")  # older SDKs let httpx's own pass
    assert (message.usage, message.http_status) == (None, None)
    assert message.response_id == ("c-1" if after else None)


@both
@pytest.mark.parametrize("operation", ["chat.completions", "completions", "responses"])
@pytest.mark.parametrize("fault", ["stream-error", "stream-disconnect"])
def test_faults_of_a_real_server(fault, operation, mode, practice, instrument):
    """Over a socket too, an error event or a cut in mid-stream is one failed message, not to be billed."""
    if operation == "responses":
        need("responses API")

    async def act() -> Any:
        options = {"base_url": practice.base_url, "default_headers": {"x-practice-error": fault}}
        async with client_of(mode, **options) as client:
            resource = client.chat.completions if operation.startswith("chat") else getattr(client, operation)
            stream = await settle(resource.create(**CALLS[operation], stream=True))
            kinds = []
            try:
                async for piece in each(stream):
                    kinds.append(type(piece))
            except Exception as exc:  # which one is the SDK's affair; an error event of responses raises none
                return kinds, type(exc), str(exc)
            return kinds, None, None

    bare = running(mode)(act())
    ledger = instrument()
    assert running(mode)(act()) == bare
    message = ledger.message()
    assert (message.status, message.usage) == ("error", None)
    assert message.error == (bare[1].__name__ if bare[1] else "failed")
    total = ledger.store.total()
    assert (total.messages, total.errors) == (0, 1)


async def _stalling(started: asyncio.Event) -> Any:
    class Stalling(http.AsyncByteStream):
        async def __aiter__(self) -> Any:
            yield sse(*ASKED[:2])
            started.set()
            await asyncio.sleep(60)

    headers = {"content-type": "text/event-stream"}
    return http.MockTransport(lambda request: http.Response(200, headers=headers, stream=Stalling()))


@pytest.mark.parametrize("way", ["create", "with_streaming_response", "look-ahead"])
async def test_cancelled_task(way, instrument):
    """A task that is cancelled while it reads leaves one message, "cancelled", and is cancelled.

    Unless it has been answered: from the finish chunk on, what is left is whole.
    """
    if way == "with_streaming_response":
        need(way)
    started, ledger = asyncio.Event(), instrument()
    transport = await _stalling(started)
    if way == "look-ahead":

        class Finished(http.AsyncByteStream):
            async def __aiter__(self) -> Any:
                yield sse(ASKED[-1])
                started.set()
                await asyncio.sleep(60)

        headers = {"content-type": "text/event-stream"}
        transport = http.MockTransport(lambda request: http.Response(200, headers=headers, stream=Finished()))

    async with client_of("async", transport=transport, base_url=OPENAI) as client:

        async def read() -> None:
            if way == "with_streaming_response":
                async with client.chat.completions.with_streaming_response.create(**CHAT, stream=True) as raw:
                    await raw.read()
            else:
                async for _ in await opened(client):
                    pass

        task = asyncio.ensure_future(read())
        await started.wait()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    message = ledger.message()
    answered = way == "look-ahead"
    assert (message.status, message.error, message.usage) == ("ok" if answered else "cancelled", None, None)
    assert ledger.store.total().messages == answered


async def test_looking_ahead_loses_nothing(instrument):
    """A chunk that was not handed out in time is there for who asks again."""

    class Slow(http.AsyncByteStream):
        async def __aiter__(self) -> Any:
            yield sse(ASKED[-1])
            await asyncio.sleep(60)

    headers = {"content-type": "text/event-stream"}
    transport = http.MockTransport(lambda request: http.Response(200, headers=headers, stream=Slow()))
    ledger = instrument()
    async with client_of("async", transport=transport, base_url=OPENAI) as client:
        stream = await opened(client)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.__anext__(), 0.05)
        assert (await stream.__anext__()).choices[0].finish_reason == "stop"
        await close(stream)
    assert ledger.message().status == "ok"


@both
def test_each_choice_finishes_by_itself(mode, instrument):
    """With n=2, no chunk is held back before both have finished; who leaves between the two has left early."""
    passed = []

    class Body(http.SyncByteStream, http.AsyncByteStream):
        events = (chunk("a"), FINISH, chunk("b", index=1), chunk(finish="stop", index=1), LAST)

        def __iter__(self) -> Any:
            for number, event in enumerate(self.events):
                passed.append(number)
                yield sse(event)

        async def __aiter__(self) -> Any:
            for part in self:
                yield part

    headers = {"content-type": "text/event-stream"}
    transport = http.MockTransport(lambda request: http.Response(200, headers=headers, stream=Body()))
    ledger = instrument()

    async def call(count: int) -> Any:
        passed.clear()
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            stream = await opened(client, n=2)
            read = [await following(stream) for _ in range(count)]
            last = passed[-1]
            await close(stream)
            return last, read[-1].choices[0].finish_reason

    assert running(mode)(call(2)) == (1, "stop")
    assert running(mode)(call(4)) == (4, "stop")
    assert [(message.status, message.usage) for message in ledger.messages()] == [("incomplete", None), ("ok", COUNTED)]


@pytest.mark.parametrize("raw", [False, True])
def test_closed_from_another_thread(raw, practice, instrument):
    """Who presses Stop has left early: the reader's failure is of their own making, and no error of the API."""
    reading, ledger = threading.Event(), instrument()

    class Stalled(http.SyncByteStream):
        def __init__(self) -> None:
            self.closed = threading.Event()

        def __iter__(self) -> Any:
            yield sse(*TEXT[:2])
            reading.set()
            assert self.closed.wait(30)
            raise http.ReadError("closed")

        def close(self) -> None:
            self.closed.set()

    headers = {"content-type": "text/event-stream"}
    transport = http.MockTransport(lambda request: http.Response(200, headers=headers, stream=Stalled()))

    def read(parts: Any) -> None:
        with suppress(openai.APIConnectionError, http.ReadError):
            for _ in parts:
                pass

    with openai.OpenAI(api_key="k", base_url=OPENAI, http_client=http.Client(transport=transport)) as client:
        if raw:
            response = client.chat.completions.with_raw_response.create(**CHAT, stream=True).http_response
            parts = response.iter_bytes()
        else:
            parts = client.chat.completions.create(**CHAT, stream=True)
            response = parts.response
        reader = threading.Thread(target=read, args=(parts,))
        reader.start()
        assert reading.wait(30)
        response.close()
        reader.join(30)
    message = ledger.message()
    assert (message.status, message.error, message.response_id) == ("incomplete", None, "c-1")


async def test_closed_from_another_task(instrument):
    """So it is between the tasks of a loop."""
    started, ledger = asyncio.Event(), instrument()
    async with client_of("async", transport=await _stalling(started), base_url=OPENAI) as client:
        stream = await opened(client)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.ensure_future(read())
        await started.wait()
        await asyncio.sleep(0)
        with suppress(RuntimeError):  # a transport of this kind is a generator, and at work
            await stream.response.aclose()
        task.cancel()
        await asyncio.wait([task])
    assert ledger.message().status == "incomplete"


@both
@pytest.mark.parametrize("way", ["whole", "closed", "raw"])
def test_the_response_is_left_as_it_was(way, mode, instrument):
    """Once it is closed, nothing of ours is on the response: it may be pickled."""

    async def act(client: Any) -> Any:
        stream = await opened(client) if way != "raw" else None
        if stream is None:
            raw = await settle(client.chat.completions.with_raw_response.create(**CHAT, stream=True))
            stream = raw.parse()
        await following(stream)
        if way == "closed":
            await close(stream)
        else:
            async for _ in each(stream):
                pass
        assert not {"close", "aclose", "iter_bytes", "iter_raw", "aiter_bytes", "aiter_raw"} & set(
            vars(stream.response)
        )
        return stream.response.__getstate__().keys()

    compared(mode, Server(*ALL), act, instrument)


def test_a_response_that_others_watch(instrument):
    """What somebody else has set on a response stays on it, and is called as often as without us."""
    server, closes = Server(*ALL), []

    def call() -> Any:
        closes.clear()
        http_client = http.Client(event_hooks={"response": [watch]}, transport=server.transport)
        with openai.OpenAI(api_key="k", base_url=OPENAI, http_client=http_client) as client:
            stream = client.chat.completions.create(**CHAT, stream=True)
            chunks = len(list(stream))
            stream.response.close()
            return chunks, len(closes), "close" in vars(stream.response)

    def watch(response: Any) -> None:
        close = response.close
        response.close = lambda: (closes.append(1), close())[1]

    bare = call()
    instrument()
    assert call() == bare
    assert bare[2]


def test_interrupted_read(instrument):
    """Ctrl-C while a chunk is awaited goes through, and leaves one cancelled message."""

    async def act(client: Any) -> Any:
        with pytest.raises(KeyboardInterrupt):
            for _ in await opened(client):
                pass

    message = compared("sync", Server(*TEXT, failure=KeyboardInterrupt()), act, instrument)
    assert (message.status, message.response_id) == ("cancelled", "c-1")


@both
@pytest.mark.parametrize("way", ["read", "parse", "iter_bytes", "nothing"])
def test_raw_bodies_left_early(way, mode, instrument):
    """A raw stream that is left before its end is one incomplete message; one that is read whole is ok."""

    async def act(client: Any) -> Any:
        async with within(client.chat.completions.with_streaming_response.create(**CHAT, stream=True)) as raw:
            if way == "read":
                return await settle(raw.read())
            if way == "parse":
                return seen(await following(await settle(raw.parse())))
            if way == "iter_bytes":
                async for part in each(raw.iter_bytes()):
                    return part
        return None

    need("with_streaming_response")
    message = compared(mode, Server(*ALL), act, instrument)
    assert message.status == ("ok" if way == "read" else "incomplete")
    assert message.response_id == (None if way == "nothing" else "c-1")


@both
def test_raw_stream_dropped(mode, instrument):
    """with_raw_response of a stream that is parsed, begun and dropped is one incomplete message."""

    server = Server(*ALL)

    async def act(client: Any) -> Any:
        raw = await settle(client.chat.completions.with_raw_response.create(**CHAT, stream=True))
        stream = await settle(raw.parse())
        server.responses.clear()  # older SDKs close it with its last reference only
        return type(raw), type(stream), raw.headers["x-request-id"], seen(await following(stream))

    message = compared(mode, server, act, instrument)
    assert (message.status, message.response_id) == ("incomplete", "c-1")


@both
@pytest.mark.parametrize("read", [0, 2, None])
def test_helper_left(read, mode, instrument):
    """A .stream() helper whose block is left early is incomplete; read to the end, or until_done(), it is ok."""

    async def act(client: Any) -> Any:
        async with within(parsing(client).stream(**CHAT)) as stream:
            if read is None:
                await settle(stream.until_done())
                return seen(await settle(stream.get_final_completion()))
            return [seen(await following(stream)) for _ in range(read)]

    message = compared(mode, Server(*ALL), act, instrument)
    assert (message.status, message.usage) == (("ok", COUNTED) if read is None else ("incomplete", None))


# --- hiding and look-ahead ------------------------------------------------------------------------------------------

FILTERS = {**HEAD, "choices": [], "prompt_filter_results": []}
HIDING: dict[str, tuple[Server, Usage | None]] = {
    "OpenAI": (Server(*ALL), COUNTED),
    "no [DONE]": (Server(*ALL, done=False), COUNTED),
    "no usage though asked": (Server(*ALL, usage=False), None),
    "empty choices without usage": (Server(FILTERS, *TEXT, FINISH), COUNTED),
    "text after the finish": (Server(*TEXT, FINISH, chunk("!")), COUNTED),
    "two finishes": (Server(*TEXT, FINISH, FINISH), COUNTED),
    "finish only": (Server(FINISH), COUNTED),
    "two choices": (
        Server(chunk("a"), chunk("b", index=1), FINISH, chunk("c", index=1), chunk(finish="length", index=1)),
        COUNTED,
    ),
    "both finishes at once": (
        Server({**HEAD, "choices": [FINISH["choices"][0], {**FINISH["choices"][0], "index": 1}]}),
        COUNTED,
    ),
    "finish, then nothing": (Server(FINISH, usage=False, done=False), None),
}


@both
@pytest.mark.parametrize("name", HIDING)
def test_hides_what_it_caused_and_nothing_else(name, mode, instrument):
    """Every chunk passes, in order and as it was, but for the one of usage that only we asked for."""
    server, usage = HIDING[name]

    async def act(client: Any) -> Any:
        return await seen_stream(await opened(client))

    message = compared(mode, server, act, instrument)
    assert (message.status, message.usage) == ("ok", usage)


@both
def test_error_behind_the_finish(mode, instrument):
    """Looking ahead does not bring an error forward: the finish chunk comes first, then what follows it."""
    server = Server(*TEXT, FINISH, failure=http.ReadError("gone"))

    async def act(client: Any) -> Any:
        stream, got = await opened(client), []
        for _ in range(5):
            try:
                got.append(seen(await following(stream)))
            except Exception as exc:
                got.append(seen(exc))
        return got

    message = compared(mode, server, act, instrument)
    assert (message.status, message.usage) == ("error", None)


@both
def test_cumulative_usage_is_not_summed(mode, instrument):
    """Where usage is on every chunk the last one counts, and all of them pass."""
    events = [chunk("a"), chunk("b"), chunk(finish="stop")]
    transport, asked = serving(
        (
            200,
            "text/event-stream",
            [
                sse(
                    *({**event, "usage": {**USAGE, "completion_tokens": n}} for n, event in enumerate(events, 1)),
                    "[DONE]",
                )
            ],
        )
    )
    ledger = instrument()

    async def call() -> Any:
        async with client_of(mode, transport=transport, base_url="https://vllm.example.com/v1") as client:
            return [getattr(piece, "usage", None) is not None async for piece in each(await opened(client))]

    assert running(mode)(call()) == [True] * 3
    assert ledger.message().usage == COUNTED
    assert "stream_options" not in asked[0]


@both
@pytest.mark.parametrize("declined", [True, False])
def test_usage_on_a_chunk_without_choices_before_the_end(declined, mode, instrument):
    """A cumulative usage on an early chunk without choices ends nothing: what follows is counted and seen."""
    early = {**HEAD, "choices": [], "usage": {**USAGE, "completion_tokens": 1, "total_tokens": 10}}
    server = Server(*ALL, usage=False)
    body = sse(early, *TEXT, FINISH, LAST, "[DONE]")
    transport, _ = serving((200, "text/event-stream", [body]))
    server.transport = transport
    ledger = instrument()

    async def call() -> Any:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            options = argument("stream_options", {"include_usage": False}) if declined else {}
            stream = await opened(client, **options)
            return [len(piece.choices) async for piece in each(stream)]

    assert running(mode)(call()) == ([0, 1, 1, 1, 1, 0] if declined else [1, 1, 1, 1])
    assert ledger.message().usage == COUNTED


# --- the stream object ----------------------------------------------------------------------------------------------


@both
def test_same_stream_object(mode, practice, instrument):
    """The caller gets the SDK's own class, usable as iterator, iterable and context manager, with its response."""
    instrument()

    async def call() -> None:
        async with client_of(mode, base_url=practice.base_url) as client:
            stream = await opened(client)
            assert type(stream) is (openai.Stream if mode == "sync" else openai.AsyncStream)
            assert stream.response.headers["x-request-id"]
            assert type(stream.response) is http.Response
            assert not stream.response.is_closed
            async with within(stream) as same:
                assert same is stream
                assert (await following(stream)).id
            assert stream.response.is_closed

    running(mode)(call())


@both
def test_uninstrumented_while_open(mode, instrument):
    """A stream that was opened before uninstrument() is read to its end as if nothing had happened."""

    async def act(client: Any) -> Any:
        stream = await opened(client)
        first = seen(await following(stream))
        uninstrument()
        return first, [seen(piece) async for piece in each(stream)]

    bare = outcome(mode, server := Server(*ALL), act)
    instrument()
    assert outcome(mode, server, act) == bare


# --- whose it is ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("read", ["all", "one"])
def test_belongs_to_the_context_it_was_made_in(read, mode, instrument):
    """A stream read after its `with`, or within another one, is the customer's in whose context the call was made."""
    ledger = instrument()

    async def act(client: Any) -> None:
        with usage_context("maker", conversation_id="c-1", tags=["made"]):
            stream = await opened(client)
        with usage_context("reader", conversation_id="c-2", tags=["read"]):
            first = await following(stream)
            if read == "all":
                assert len([piece async for piece in each(stream)]) == 3
            del first
            await close(stream)

    outcome(mode, Server(*ALL), act)
    message = ledger.message()
    assert (message.key, message.conversation_id) == ("maker", "c-1")
    assert message.tags == ("made",)
    assert message.status == ("ok" if read == "all" else "incomplete")


def test_read_in_another_thread(instrument):
    """A stream opened here and read in another thread is one message of the context here."""
    ledger, chunks = instrument(), []

    async def act(client: Any) -> None:
        stream = await opened(client)
        thread = threading.Thread(target=lambda: chunks.extend(stream))
        thread.start()
        thread.join()

    outcome("sync", Server(*ALL), act)
    assert len(chunks) == 4
    message = ledger.message()
    assert (message.key, message.status, message.usage) == ("acme", "ok", COUNTED)


@both
def test_many_open_at_once(mode, instrument):
    """Streams that are read in turns keep their own counts and customers."""
    ledger, server = instrument(), Server(*ALL)

    async def act(client: Any) -> None:
        streams = []
        for key in "abc":
            with usage_context(key):
                streams.append(await opened(client))
        for _ in range(4):
            for stream in streams:
                await following(stream)
        for stream in streams:
            await close(stream)

    outcome(mode, server, act)
    assert [(m.key, m.status, m.usage) for m in ledger.messages()] == [(key, "ok", COUNTED) for key in "abc"]


@pytest.mark.parametrize("operation", ["completions", "responses"])
@both
def test_other_endpoints_left_early(operation, mode, practice, instrument):
    """Completions and responses left after two chunks are incomplete, read to the end ok."""
    if operation == "responses":
        need("responses API")
    ledger = instrument()

    async def call() -> None:
        async with client_of(mode, base_url=practice.base_url) as client:
            for whole in (False, True):
                stream = await settle(getattr(client, operation).create(**CALLS[operation], stream=True))
                for _ in range(2):
                    await following(stream)
                if whole:
                    assert [piece async for piece in each(stream)]
                await close(stream)

    practice._exchanges.clear()
    running(mode)(call())
    left, whole = ledger.messages()
    assert (left.status, left.usage) == ("incomplete", None)
    assert (whole.status, whole.usage) == ("ok", truth(practice.exchanges[1].usage))
    assert {left.response_id, whole.response_id} == {exchange.response_id for exchange in practice.exchanges}


@both
def test_error_event_after_the_text_began(mode, instrument):
    """An error event in the midst of a response's text is a failed message with the event's code."""
    need("responses API")
    text = {"type": "response.output_text.delta", "delta": "x", "item_id": "i", "output_index": 0, "content_index": 0}
    error = {"type": "error", "code": "server_error", "message": "it broke", "param": None}
    transport, _ = serving((200, "text/event-stream", [sse(text, text, error)]))
    ledger = instrument()

    async def call() -> list[str]:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            stream = await settle(client.responses.create(**CALLS["responses"], stream=True))
            return [event.type async for event in each(stream)]

    assert running(mode)(call()) == [text["type"], text["type"], "error"]
    message = ledger.message()
    assert (message.status, message.error, message.usage) == ("error", "server_error", None)
