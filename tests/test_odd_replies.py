"""Odd replies of compatible servers never break a call, never change what it gives, and never invent a token."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument import recorder
from spryng_instrument.message import Message
from spryng_instrument.tallies import SseLines
from tests import shapes
from tests.shapes import CHAT, HELLO, client_of, seen, settle, truth

BASE_URL = "https://llm.example.com/v1"
EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

odd = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)
count = st.one_of(
    st.integers(0, 5_000),
    st.integers(0, 5_000),
    st.sampled_from([-1, 0, 1.0, 2.5, "7", "", True, None, 10**12, 10**12 + 1, 10**30, math.nan, math.inf, [], {}]),
)
details = st.one_of(
    st.none(),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("cached_tokens", "audio_tokens", "image_tokens", "odd"), count)),
    odd,
)
made = st.one_of(
    st.none(),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("reasoning_tokens", "audio_tokens"), count)),
)
chat_usage = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": count,
        "completion_tokens": count,
        "total_tokens": count,
        "prompt_tokens_details": details,
        "completion_tokens_details": made,
        "cost": st.floats(0, 1),
        "num_sources": odd,
    },
)
responses_usage = st.fixed_dictionaries(
    {},
    optional={
        "input_tokens": count,
        "output_tokens": count,
        "total_tokens": count,
        "input_tokens_details": details,
        "output_tokens_details": made,
    },
)
usage = st.one_of(st.none(), chat_usage, chat_usage, responses_usage, odd)
text = st.one_of(st.text(max_size=6), st.sampled_from(["\ud800", " ", "data: x", "[DONE]", "\r\n"]))
delta = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {}, optional={"content": st.none() | text, "role": text, "tool_calls": odd, "reasoning": text}
    ),
    odd,
)
choice = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "index": st.one_of(st.integers(-1, 9), st.none(), st.just("0")),
            "delta": delta,
            "message": delta,
            "text": st.none() | text,
            "finish_reason": st.sampled_from([None, "stop", "length", "", "eos", 0, 7]),
            "logprobs": odd,
        },
    ),
    odd,
)
choices = st.one_of(st.lists(choice, max_size=2), st.lists(choice, min_size=1, max_size=1), st.none(), odd)
name = st.one_of(text, odd)
reply = st.fixed_dictionaries(
    {},
    optional={
        "id": name,
        "object": name,
        "model": name,
        "created": odd,
        "choices": choices,
        "usage": usage,
        "service_tier": name,
        "extra": odd,
        "status": st.sampled_from([None, "completed", "failed", 3]),
        "_request_id": odd,
    },
)
# An error in a chunk is the SDK's to raise. One in a plain reply is just a field.
error = st.sampled_from([None, "", {}, {"code": "boom", "message": "it broke"}, "it broke", 5])


def instrumented(call: Any, folder: Any) -> tuple[Any, list[Message]]:
    """What *call* gives while it is recorded, and the messages."""
    kept: list[Message] = []
    spryng_instrument.instrument(destination=f"sqlite:///{folder}/usage.db", on_missing_key="ignore", beat_s=600)
    recorder.active.record = lambda message, **_: kept.append(message)  # the way to the ledger has its own tests
    try:
        value = call()
        if not kept:
            gc.collect()  # the SDK left a stream half read, in the frames of an exception
        return value, kept
    finally:
        spryng_instrument.uninstrument()


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def counts(reported: Any, way: str) -> list[Any]:
    """What may be recorded: the JSON's own counts or, where the SDK makes the object, those that it shows the caller.

    It reads 1.0, "1" and true as the number 1, if it knows the object that they are in and no other count there is odd.
    """

    def shown(value: Any) -> Any:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else value

    def ways_shown(value: Any) -> Iterator[Any]:
        if not isinstance(value, dict):
            yield value
            return
        inner = [name for name, item in value.items() if isinstance(item, dict)]
        for items in itertools.product(*(ways_shown(value[name]) for name in inner)):
            known = dict(zip(inner, items, strict=True))
            yield {**value, **known}
            yield {**{name: shown(item) for name, item in value.items()}, **known}

    if way in ("raw", "streaming", "object"):
        return [truth(reported)]
    return [truth(usage) for usage in ways_shown(reported)]


def string(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


async def _call(mode: str, transport: Any, act: Any) -> Any:
    async with client_of(mode, transport=transport, base_url=BASE_URL) as client:
        try:
            return await act(client)
        except Exception as exc:
            return "raised", seen(exc)


def both_ways(mode: str, parts: list[bytes], kind: str, act: Any, folder: Any) -> tuple[Any, Message]:
    """What the caller sees with us, after it was the same without us, and the one message."""

    def call() -> Any:
        transport, _ = shapes.serving((200, kind, parts))
        main = _call(mode, transport, act)
        return asyncio.run(main) if mode == "async" else shapes.run(main)

    bare = call()
    value, messages = instrumented(call, folder)
    assert value == bare
    [message] = messages
    return value, message


async def seen_whole(client: Any, way: str) -> Any:
    """What the caller sees of a plain chat completion."""
    create = client.chat.completions
    if way == "create":
        return seen(await settle(create.create(**CHAT)))
    if way == "raw":
        raw = await settle(create.with_raw_response.create(**CHAT))
        return raw.content, seen(await settle(raw.parse()))
    async with shapes.within(create.with_streaming_response.create(**CHAT)) as raw:
        return await settle(raw.read())


@pytest.mark.parametrize("way", ["create", "raw", "streaming", "object"])
@EXAMPLES
@given(body=reply, mode=st.sampled_from(shapes.MODES))
@example(body={"usage": {"prompt_tokens": 1.0, "completion_tokens": 2, "total_tokens": "3"}}, mode="sync")
@example(body={"choices": None, "usage": {"prompt_tokens": 3, "total_tokens": 10**30}}, mode="sync")
@example(body={"logprobs": math.nan, "id": "\ud800", "model": "m", "usage": {"prompt_tokens": 3}}, mode="sync")
def test_odd_plain_replies(way, body, mode, tmp_path_factory):
    """A whole reply of any make: the same object or exception as without us, and its counts or None."""
    if way == "streaming":
        shapes.need("with_streaming_response")

    async def act(client: Any) -> Any:
        if way == "object":
            return seen(await settle(client.post("/chat/completions", body=dict(CHAT), cast_to=shapes.ANY)))
        return await seen_whole(client, way)

    folder = tmp_path_factory.getbasetemp()
    _, message = both_ways(mode, [dumped(body)], "application/json", act, folder)
    assert message.usage in counts(body.get("usage"), way)
    assert message.response_id == string(body.get("id"))
    assert message.response_model == string(body.get("model"))
    assert message.status == ("error" if body.get("status") == "failed" else "ok")
    assert message.request_model == CHAT["model"]


framing = st.sampled_from(["\n", "\r\n", "\r"])
comments = st.sampled_from(["", ": ping", "retry: 5", "id: 1", *["event: message"] * shapes.SDK["events with a name"]])


@st.composite
def bodies(draw: Any, chunk: Any) -> tuple[list[Any], list[bytes], bool]:
    """The chunks of a stream, its bytes cut anywhere, and whether it says that it is done."""
    chunks = draw(st.lists(chunk, max_size=5))
    end, done, space = draw(framing), draw(st.booleans()), draw(st.sampled_from(["", " "]))
    lines = []
    for item in chunks:
        comment = draw(comments)
        lines += [comment, ""] if comment.startswith(":") else [comment] * bool(comment)
        lines += [f"data:{space}{json.dumps(item)}", ""]
    if done:
        lines += ["data: [DONE]", ""]
    body = "".join(line + end for line in lines).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=6)))
    parts = [body[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    return chunks, [part for part in parts if part], done


def told(chunks: list[Any]) -> Any:
    """The last usage that a stream of chunks reports."""
    reported = [item["usage"] for item in chunks if item.get("usage") is not None]
    return reported[-1] if reported else None


def named(chunks: list[Any], name: str) -> set[str | None]:
    """What a message may give as id or model: a name that a chunk gives, and one of them if the first chunk has one."""
    names = [string(item.get(name)) for item in chunks]
    return set(names) - {None} if names and names[0] else {*names, None}


@pytest.mark.parametrize("way", ["create", "asked", "raw", "streaming"])
@EXAMPLES
@given(body=bodies(reply), mode=st.sampled_from(shapes.MODES))
def test_odd_streams(way, body, mode, tmp_path_factory):
    """A stream of any make and framing, cut anywhere: the same chunks and exception, and the last usage it reports."""
    if way == "streaming":
        shapes.need("with_streaming_response")
    chunks, parts, _ = body

    async def act(client: Any) -> Any:
        kwargs: dict[str, Any] = {**CHAT, "stream": True}
        if way == "asked":
            kwargs |= shapes.argument("stream_options", {"include_usage": True})
        got: list[Any] = []
        try:
            if way == "streaming":
                async with shapes.within(client.chat.completions.with_streaming_response.create(**kwargs)) as raw:
                    return await settle(raw.read())
            if way == "raw":
                raw = await settle(client.chat.completions.with_raw_response.create(**kwargs))
                stream = await settle(raw.parse())
            else:
                stream = await settle(client.chat.completions.create(**kwargs))
            async for piece in shapes.each(stream):
                got.append(seen(piece))
        except Exception as exc:
            return got, seen(exc)
        return got

    folder = tmp_path_factory.getbasetemp()
    value, message = both_ways(mode, parts, "text/event-stream", act, folder)
    failed = isinstance(value, tuple)
    if not failed:
        # After a finish, the first usage without choices is the last word: nobody sends another.
        ends = [n for n, item in enumerate(chunks) if item.get("choices") == [] and item.get("usage") is not None]
        assert message.usage in [usage for n in (len(chunks), *ends) for usage in counts(told(chunks[: n + 1]), way)]
        assert message.status == "ok"
        assert message.response_id in named(chunks, "id")
        assert message.response_model in named(chunks, "model")
    else:
        # Unparsed, a body is only left early where the SDK's later parsing fails.
        assert message.status in ("error", "ok", *["incomplete"] * (way == "raw"))
    assert message.request_model == CHAT["model"]


@EXAMPLES
@given(
    before=st.lists(reply.filter(lambda item: item.get("choices") != []), max_size=2),
    cumulative=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=5),
    mode=st.sampled_from(shapes.MODES),
)
def test_cumulative_usage(before, cumulative, mode, tmp_path_factory):
    """Usage on every chunk is replaced, never summed, whatever odd chunks come before."""
    choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": None}
    head = {"id": "c-1", "model": "m-1", "choices": [choice]}
    chunks = [
        *before,
        *({**head, "usage": {"prompt_tokens": given, "completion_tokens": made}} for given, made in cumulative),
    ]
    body = [shapes.sse(*chunks, "[DONE]")]

    async def act(client: Any) -> Any:
        return await shapes.seen_stream(await settle(client.chat.completions.create(**CHAT, stream=True)))

    _, message = both_ways(mode, body, "text/event-stream", act, tmp_path_factory.getbasetemp())
    assert (message.usage.input_tokens, message.usage.output_tokens) == cumulative[-1]


event = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            [
                "response.created",
                "response.output_text.delta",
                "response.completed",
                "response.incomplete",
                "x",
                None,
                3,
            ]
        ),
        "response": st.one_of(reply, odd),
        "delta": text,
        "item_id": text,
        "sequence_number": odd,
        "usage": usage,
    },
)


@pytest.mark.skipif(not shapes.SDK["responses API"], reason=f"openai {openai.__version__} has no responses API")
@pytest.mark.parametrize("way", ["create", "raw"])
@EXAMPLES
@given(body=bodies(event), mode=st.sampled_from(shapes.MODES))
def test_odd_responses_streams(way, body, mode, tmp_path_factory):
    """Events of responses of any make: the same events and exception, and the usage of a response among them."""
    chunks, parts, _ = body

    async def act(client: Any) -> Any:
        got: list[Any] = []
        try:
            if way == "raw":
                reply = await settle(client.responses.with_raw_response.create(model="m", input=HELLO, stream=True))
                stream = await settle(reply.parse())
            else:
                stream = await settle(client.responses.create(model="m", input=HELLO, stream=True))
            async for piece in shapes.each(stream):
                got.append(seen(piece))
        except Exception as exc:
            return got, seen(exc)
        return got

    value, message = both_ways(mode, parts, "text/event-stream", act, tmp_path_factory.getbasetemp())
    responses = [item["response"] for item in chunks if isinstance(item.get("response"), dict)]
    assert message.usage in [None, *(usage for response in responses for usage in counts(response.get("usage"), way))]
    if not isinstance(value, tuple):
        terminal = [
            item["response"]
            for item in chunks
            if item.get("type") in ("response.completed", "response.incomplete") and item.get("response") is not None
        ]
        if terminal:
            last = terminal[0] if isinstance(terminal[0], dict) else {}
            assert message.usage in counts(last.get("usage"), way)
            assert message.status == ("error" if last.get("status") == "failed" else "ok")
        else:
            assert message.status in ("incomplete", "error")


@pytest.mark.parametrize(
    "content_type", ["text/html", "application/json", "text/event-stream", "application/octet-stream"]
)
@pytest.mark.parametrize(
    "body", [b"", b"<html>no</html>", b"\xff\xfe", b"null", b"[]", b'"text"', b"7", b"{", b'{"a": 1']
)
@pytest.mark.parametrize("way", ["create", "raw", "streaming", "stream"])
def test_no_json_at_all(way, body, content_type, tmp_path):
    """A body that is no reply gives what it gives without us, and one message without usage."""
    if way == "streaming":
        shapes.need("with_streaming_response")

    async def act(client: Any) -> Any:
        if way == "stream":
            return await shapes.seen_stream(await settle(client.chat.completions.create(**CHAT, stream=True)))
        return await seen_whole(client, way)

    _, message = both_ways("sync", [body] * bool(body), content_type, act, tmp_path)
    assert (message.usage, message.response_id, message.response_model) == (None, None, None)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_raw_events_cut_anywhere(end):
    """An event whose data spans several lines is read whole, wherever its bytes are cut; what follows [DONE] is not."""
    lines = [": hi", 'data: {"a":', "data:1}", "", "data: [DONE]", "", 'data: {"b": 2}', "", ""]
    body = end.join(lines).encode()
    for first in range(len(body)):
        for second in range(first, len(body)):
            events = SseLines()
            parts = (body[:first], body[first:second], body[second:])
            assert [event for part in parts for event in events.feed(part)] == [{"a": 1}]
            assert events.done
