"""Raw bodies, however a caller reads them: the same bytes at the same time, and the tokens all the same."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from tests.shapes import CHAT, MODES, client_of, each, following, http, running, settle, sse, truth, within

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
HEAD = {"id": "chatcmpl-1", "model": "gpt-4o-mini-2024-07-18", "created": 1}
PLAIN = json.dumps({**HEAD, "object": "chat.completion", "choices": [], "usage": USAGE}).encode()
EVENTS = sse(
    {**HEAD, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}], "usage": None},
    {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None},
    {**HEAD, "choices": [], "usage": USAGE},
    "[DONE]",
)
needs_streaming = pytest.mark.skipif(
    not hasattr(openai.OpenAI(api_key="x").chat.completions, "with_streaming_response"),
    reason=f"openai {openai.__version__} has no with_streaming_response",
)
pytestmark = needs_streaming


class Slowly(http.SyncByteStream, http.AsyncByteStream):  # type: ignore[misc]
    """A body that counts how many of its parts have been asked for."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts, self.sent = parts, 0

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            self.sent += 1
            yield part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


def transport(body: Slowly, headers: dict[str, str]) -> Any:
    return http.MockTransport(lambda request: http.Response(200, headers=headers, stream=body))


async def read(client: Any, way: str, stream: bool, body: Slowly) -> Any:
    """The parts that a caller reads, with how many had been asked for by then."""
    options = {"extra_body": {"stream_options": {"include_usage": True}}, "stream": True} if stream else {}
    async with within(client.chat.completions.with_streaming_response.create(**CHAT, **options)) as raw:
        if way == "read":
            return await settle(raw.read())
        if way == "text":
            return [part async for part in each(raw.iter_text())]
        if way == "lines":
            return [part async for part in each(raw.iter_lines())]
        response = raw.http_response
        source = {"bytes": raw, "raw": response, "small": raw}[way]
        if way == "raw":
            parts = source.iter_raw() if hasattr(client, "_client") and not is_async(client) else source.aiter_raw()
        else:
            parts = source.iter_bytes(7) if way == "small" else source.iter_bytes()
        return [(part, body.sent) async for part in each(parts)]


def is_async(client: Any) -> bool:
    return isinstance(client, openai.AsyncOpenAI)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("way", ["read", "text", "lines", "bytes", "small", "raw"])
def test_the_same_bytes_at_the_same_time(way, stream, encoding, mode, instrument):
    """Nothing is read ahead or held back, and every way to read a body to its end gives its tokens."""
    content = EVENTS if stream else PLAIN
    sent = gzip.compress(content) if encoding == "gzip" else content
    parts = [sent[start : start + 11] for start in range(0, len(sent), 11)]
    headers = {"content-type": "text/event-stream" if stream else "application/json"}
    if encoding == "gzip":
        headers["content-encoding"] = "gzip"

    async def call() -> Any:
        body = Slowly(parts)
        async with client_of(mode, transport=transport(body, headers)) as client:
            return await read(client, way, stream, body)

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare
    message = ledger.message()
    assert (message.status, message.response_id, message.streamed) == ("ok", "chatcmpl-1", stream)
    assert (message.usage.input_tokens, message.usage.output_tokens, message.usage.total_tokens) == (9, 3, 12)


def test_sound_is_not_kept_in_memory(instrument):
    """A long answer without usage passes through: what is held of it is a part, not the whole."""
    ledger = instrument()
    body = Slowly([b"\xff" * 1_000_000] * 30)

    async def call() -> None:
        headers = {"content-type": "audio/mpeg"}
        async with client_of("sync", transport=transport(body, headers)) as client:
            speech = client.audio.speech.with_streaming_response
            async with within(speech.create(input="hi", model="tts-1", voice="alloy")) as raw:
                tracemalloc.start()
                assert sum(len(part) for part in raw.iter_bytes()) == 30_000_000
                assert tracemalloc.get_traced_memory()[1] < 5_000_000
                tracemalloc.stop()

    running("sync")(call())
    assert (ledger.message().operation, ledger.message().status) == ("audio.speech", "ok")


@pytest.mark.parametrize("mode", MODES)
def test_read_by_two(mode, instrument):
    """Who reads a body goes on to its end where another, which came later, was refused: it is read whole."""

    async def call() -> Any:
        headers = {"content-type": "application/json"}
        async with client_of(mode, transport=transport(Slowly([PLAIN[:10], PLAIN[10:]]), headers)) as client:
            manager = client.chat.completions.with_streaming_response.create(**CHAT)
            async with within(manager) as raw:
                body, prefix = raw.http_response, "a" if mode == "async" else ""
                parts = getattr(body, f"{prefix}iter_raw")()
                read = [await following(parts)]
                with pytest.raises(Exception, match="already been streamed"):
                    await following(getattr(body, f"{prefix}iter_bytes")())
                async for part in each(parts):
                    read.append(part)
                return b"".join(read)

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare == PLAIN
    assert (ledger.message().status, ledger.message().usage) == ("ok", truth(USAGE))


@pytest.mark.parametrize("mode", MODES)
def test_read_twice(mode, instrument):
    """A body that is read in part and then asked for whole is the caller's mistake, not the answer's."""

    async def call() -> Any:
        body = Slowly([PLAIN[:10], PLAIN[10:]])
        headers = {"content-type": "application/json"}
        async with client_of(mode, transport=transport(body, headers)) as client:
            manager = client.chat.completions.with_streaming_response.create(**CHAT)
            async with within(manager) as raw:
                async for _ in each(raw.iter_bytes()):
                    break
                with pytest.raises(Exception, match="already been streamed") as raised:
                    await settle(raw.read())
                return raised.type

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) is bare
    assert ledger.message().status == "incomplete"
