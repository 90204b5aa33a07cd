"""How the OpenAI SDK can be called: one table for sync and async, and what a caller can tell of each call.

A shape is written once, as a coroutine: with a sync client it never waits, so run() needs no event loop for it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, Dict  # noqa: UP035 - the SDK on Python 3.10 takes no dict[...]

import openai
import openai._base_client as base
import pydantic
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from spryng_instrument.message import Message, Usage

http: Any = vars(base).get("httpx") or vars(base)["httpx2"]
"""The httpx family of the installed SDK."""


def _works(call: Callable[[openai.OpenAI], object], answer: bytes = b"{}") -> bool:
    headers = {"content-type": "application/json"}
    transport = http.MockTransport(lambda request: http.Response(200, headers=headers, content=answer))
    with openai.OpenAI(api_key="practice", http_client=http.Client(transport=transport, trust_env=False)) as client:
        try:
            call(client)
        except (TypeError, RuntimeError, StopIteration):
            return False
        return True


_Chat, _Embeddings, _raw = openai.resources.chat.Completions, openai.resources.Embeddings, openai._response
_PARSED = "parse() and stream() of chat completions"
SDK = {
    "responses API": find_spec("openai.resources.responses") is not None,
    "with_streaming_response": hasattr(_Chat, "with_streaming_response"),
    "stream_options argument": "stream_options" in inspect.signature(_Chat.create).parameters,
    "dimensions argument": "dimensions" in inspect.signature(_Embeddings.create).parameters,
    _PARSED: hasattr(_Chat, "parse") or hasattr(openai.resources.beta.Beta, "chat"),
    "retries_taken": "retries_taken" in getattr(_raw, "BaseAPIResponse", _raw.APIResponse).__annotations__,
    "cast_to=object": _works(lambda client: client.post("/any", cast_to=object)),
    "events with a name": _works(
        lambda client: next(client.completions.create(model="m", prompt="p", stream=True)), b"event: x\ndata: {}\n\n"
    ),
    "messages by generator": _works(lambda client: client.chat.completions.create(model="m", messages=(m for m in ()))),
}
"""What only some of the supported SDKs have, and whether the installed one does."""


def need(feature: str) -> None:
    """Skip a test of what the installed SDK does not have."""
    if not SDK[feature]:
        pytest.skip(f"openai {openai.__version__} has no {feature}")


def argument(name: str, value: Any) -> dict[str, Any]:
    """An argument of a call, in the way that the installed SDK takes it."""
    return {name: value} if SDK[f"{name} argument"] else {"extra_body": {name: value}}


ANY: Any = object if SDK["cast_to=object"] else Dict[str, Any]  # noqa: UP006
"""The cast_to for an answer as the JSON it is."""
MODES = ("sync", "async")
HELLO = [{"role": "user", "content": "Say hello to the invoice."}]
CHAT = {"model": "gpt-4o-mini", "messages": HELLO}
CALLS: dict[str, dict[str, Any]] = {
    "chat.completions": CHAT,
    "completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "Say hello to the invoice."},
    "embeddings": {
        "model": "text-embedding-3-small",
        "input": ["one text", "and another"],
        **argument("dimensions", 4),
    },
    "responses": {"model": "gpt-4o-mini", "input": "Say hello to the invoice."},
}
SNAPSHOTS = {
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-3.5-turbo-instruct": "gpt-3.5-turbo-instruct:20230824-v2",
    "text-embedding-3-small": "text-embedding-3-small",
}
TIERS = {"chat.completions": "default", "responses": "default"}


class Invoice(pydantic.BaseModel):
    number: int
    paid: bool


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that works on sync clients only."""
    try:
        main.send(None)
    except StopIteration as stop:
        return stop.value
    main.close()
    raise AssertionError("a sync call waited for something")


def running(mode: str) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """What runs a coroutine in a mode."""
    return run if mode == "sync" else asyncio.run


async def settle(value: Any) -> Any:
    """The value, or what it is awaited to."""
    return await value if inspect.isawaitable(value) else value


async def each(items: Any) -> AsyncIterator[Any]:
    """The items of a sync or async iterable."""
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def following(stream: Any) -> Any:
    """The next chunk of a sync or async stream; StopAsyncIteration at its end."""
    if hasattr(stream, "__anext__"):
        return await stream.__anext__()
    for chunk in stream:
        return chunk
    raise StopAsyncIteration


async def close(stream: Any) -> None:
    """Close a sync or async stream, by its response where the SDK gives it no close()."""
    if hasattr(stream, "close"):
        await settle(stream.close())
    else:
        await close_response(stream)


async def close_response(stream: Any) -> None:
    """Close the response of a sync or async stream."""
    await settle(stream.response.aclose() if hasattr(stream, "__anext__") else stream.response.close())


@asynccontextmanager
async def within(manager: Any) -> AsyncIterator[Any]:
    """A sync or async context manager; or a stream that is to be closed, where the SDK makes none of it."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    elif hasattr(manager, "__enter__"):
        with manager as value:
            yield value
    else:
        try:
            yield manager
        finally:
            await close(manager)


@asynccontextmanager
async def client_of(mode: str, *, kind: Any = None, transport: Any = None, **options: Any) -> AsyncIterator[Any]:
    """A client of its own for one test: openai.OpenAI or AsyncOpenAI, or the *kind* of that pair."""
    pair, family = kind or (openai.OpenAI, openai.AsyncOpenAI), (http.Client, http.AsyncClient)
    own = {"transport": transport} if transport is not None else {"verify": False}
    http_client = family[mode == "async"](**own)  # verify=False: loading the certificates takes longer than a test
    client = pair[mode == "async"](**{"api_key": "practice", "max_retries": 0, "http_client": http_client, **options})
    try:
        yield client
    finally:
        await settle(client.close())


class Parts(http.SyncByteStream, http.AsyncByteStream):  # type: ignore[misc]
    """A body that is sent part by part, and perhaps breaks off."""

    def __init__(self, parts: Iterable[bytes], failure: Exception | None = None) -> None:
        self.parts, self.failure = list(parts), failure

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        if self.failure is not None:
            raise self.failure

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


def elsewhere(mode: str, port: int) -> Any:
    """A transport that takes the requests for any host to the practice server."""
    kind = http.HTTPTransport if mode == "sync" else http.AsyncHTTPTransport

    class Elsewhere(kind):  # type: ignore[misc, valid-type]
        def handle_request(self, request: Any) -> Any:
            request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=port)
            return super().handle_request(request)

        async def handle_async_request(self, request: Any) -> Any:
            request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=port)
            return await super().handle_async_request(request)

    return Elsewhere(verify=False)


def to_dict(value: Any) -> Any:
    """An object of the SDK as a dict, without what was not sent; a dict as it is."""
    if isinstance(value, dict):
        return value
    return value.to_dict() if hasattr(value, "to_dict") else value.model_dump(exclude_unset=True)


def to_json(value: Any) -> str:
    """An object of the SDK as JSON, without what was not sent."""
    show = getattr(value, "to_json", None) or partial(value.model_dump_json, indent=2, exclude_unset=True)
    return str(show(warnings=False))


def seen(value: Any) -> Any:
    """What a caller can tell of a reply, chunk or exception, so that two runs can be compared."""
    if isinstance(value, BaseException):
        about = ("status_code", "code", "param", "type", "body", "request_id", "message")
        cause = type(value.__cause__)
        return type(value), str(value), cause, {name: getattr(value, name, None) for name in about}
    if isinstance(value, pydantic.BaseModel):
        try:
            as_json = to_json(value)
        except Exception as exc:  # odd replies: what cannot be shown must fail in the same way
            as_json = repr(exc)
        return (
            type(value),
            repr(value),
            as_json,
            sorted(value.model_fields_set),
            getattr(value, "_request_id", None),
        )
    if isinstance(value, (list, tuple)):
        return [seen(item) for item in value]
    if isinstance(value, dict):
        return {name: seen(item) for name, item in value.items()}
    return type(value), repr(value)


async def seen_stream(stream: Any) -> Any:
    """What a caller can tell of a stream that is read to its end."""
    return [type(stream), stream.response.status_code, [seen(chunk) async for chunk in each(stream)]]


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A way to call the SDK."""

    name: str
    operation: str
    call: Callable[[Any], Coroutine[Any, Any, Any]] = field(repr=False)
    """Makes the call with a client; returns what the caller sees."""
    streamed: bool = False
    asks: bool = False
    """Whether usage is asked for by us, where that is allowed."""
    request_id: bool = True
    """Whether the SDK lets the x-request-id be seen."""
    opaque: bool = False
    """Whether the SDK gives the answer as bare text."""
    at_once: bool = False
    """Whether a stream's body is read whole before the call returns."""

    def __str__(self) -> str:
        return self.name


SHAPES: list[Shape] = []
PARSED_IDS = hasattr(openai._models, "add_request_id")


def shape(name: str, operation: str = "chat.completions", **about: Any) -> Callable[[Any], Any]:
    def add(call: Any) -> Any:
        SHAPES.append(Shape(name, operation, call, **about))
        return call

    return add


def _resource(client: Any, operation: str) -> Any:
    return attrgetter(operation)(client)


def _endpoint_shapes(operation: str) -> None:
    kwargs, short = CALLS[operation], operation.removesuffix(".completions")

    @shape(f"{short}-create", operation, request_id=PARSED_IDS)
    async def create(client: Any) -> Any:
        return seen(await settle(_resource(client, operation).create(**kwargs)))

    @shape(f"{short}-raw", operation)
    async def raw(client: Any) -> Any:
        reply = await settle(_resource(client, operation).with_raw_response.create(**kwargs))
        parsed = seen(await settle(reply.parse()))
        return (
            type(reply),
            reply.status_code,
            reply.headers["x-request-id"],
            reply.text,
            parsed,
            reply.parse() is not None,
        )

    async def reading(client: Any, read: Callable[[Any], Any], **more: Any) -> Any:
        need("with_streaming_response")
        async with within(_resource(client, operation).with_streaming_response.create(**kwargs, **more)) as reply:
            return type(reply), reply.status_code, reply.headers["x-request-id"], await read(reply)

    async def read(reply: Any) -> Any:
        return await settle(reply.read())

    async def read_and_parse(reply: Any) -> Any:
        return await settle(reply.read()), seen(await settle(reply.parse()))

    async def parse(reply: Any) -> Any:
        return seen(await settle(reply.parse()))

    async def lines(reply: Any) -> Any:
        return [line async for line in each(reply.iter_lines())]

    async def body(reply: Any) -> Any:
        return b"".join([part async for part in each(reply.iter_bytes(7))])

    async def text(reply: Any) -> Any:
        return "".join([part async for part in each(reply.iter_text())])

    async def chunks(reply: Any) -> Any:
        return await seen_stream(await settle(reply.parse()))

    ways = (read, read_and_parse, parse, lines, body, text)
    for way in ways:
        shape(f"{short}-streaming_response-{way.__name__}", operation)(lambda client, way=way: reading(client, way))
    if operation == "embeddings":
        return

    asks = operation != "responses"

    @shape(f"{short}-stream", operation, streamed=True, asks=asks)
    async def stream(client: Any) -> Any:
        return await seen_stream(await settle(_resource(client, operation).create(**kwargs, stream=True)))

    @shape(f"{short}-stream-with", operation, streamed=True, asks=asks)
    async def stream_with(client: Any) -> Any:
        async with within(await settle(_resource(client, operation).create(**kwargs, stream=True))) as stream:
            return await seen_stream(stream), stream.response.is_closed

    if asks:

        @shape(f"{short}-stream-include_usage", operation, streamed=True)
        async def stream_asked(client: Any) -> Any:
            options = argument("stream_options", {"include_usage": True})
            chunks = _resource(client, operation).create(**kwargs, stream=True, **options)
            return await seen_stream(await settle(chunks))

    @shape(f"{short}-raw-stream", operation, streamed=True)
    async def raw_stream(client: Any) -> Any:
        reply = await settle(_resource(client, operation).with_raw_response.create(**kwargs, stream=True))
        return type(reply), reply.headers["x-request-id"], await seen_stream(await settle(reply.parse()))

    for way in (read, chunks, lines, body, text):
        shape(f"{short}-streaming_response-stream-{way.__name__}", operation, streamed=True)(
            lambda client, way=way: reading(client, way, stream=True)
        )


for _operation in CALLS:
    if _operation != "responses" or SDK["responses API"]:
        _endpoint_shapes(_operation)


def _post_shapes() -> None:
    for operation, cast_to in (("chat.completions", ChatCompletion), ("completions", Completion)):
        path = "/" + operation.replace(".", "/")
        ways = {
            "model": (path, cast_to, PARSED_IDS),
            "dict": (path, Dict[str, Any], False),  # noqa: UP006
            "object": (path, object, False),
            "response": (path, http.Response, True),
            "absolute": ("{base_url}" + path[1:], cast_to, PARSED_IDS),
            "relative-slash": (path[1:], cast_to, PARSED_IDS),
            "query": (path + "?timeout=9", cast_to, PARSED_IDS),
        }
        for name, (url, kind, request_id) in ways.items():

            @shape(f"post-{operation}-{name}", operation, request_id=request_id)
            async def post(client: Any, url: str = url, kind: Any = kind, operation: str = operation) -> Any:
                if kind is object:
                    need("cast_to=object")
                url = url.replace("{base_url}", str(client.base_url))
                reply = await settle(client.post(url, body=dict(CALLS[operation]), cast_to=kind))
                if kind is http.Response:
                    return type(reply), reply.status_code, reply.content
                return seen(reply)


_post_shapes()


async def _post_stream(client: Any, cast_to: Any) -> Any:
    kind = openai.AsyncStream if hasattr(client, "_client") and "Async" in type(client).__name__ else openai.Stream
    body = {**CHAT, "stream": True}
    stream = client.post("/chat/completions", body=body, cast_to=cast_to, stream=True, stream_cls=kind[cast_to])
    return await seen_stream(await settle(stream))


@shape("post-stream", streamed=True, asks=True)
async def post_stream(client: Any) -> Any:
    return await _post_stream(client, ChatCompletionChunk)


@shape("post-stream-of-dicts", streamed=True, asks=True)
async def post_stream_dicts(client: Any) -> Any:
    return await _post_stream(client, ANY)


@shape("post-stream-as-object", request_id=False, opaque=True)
async def post_stream_object(client: Any) -> Any:
    """A body that asks for a stream in a call that does not: the SDK gives its text."""
    return seen(await settle(client.post("/chat/completions", body={**CHAT, "stream": True}, cast_to=ChatCompletion)))


@shape("post-stream-as-response", streamed=True, at_once=True)
async def post_stream_response(client: Any) -> Any:
    reply = await settle(client.post("/chat/completions", body={**CHAT, "stream": True}, cast_to=http.Response))
    return type(reply), reply.content


@shape("chat-n2-stream", streamed=True, asks=True)
async def chat_n2(client: Any) -> Any:
    return await seen_stream(await settle(client.chat.completions.create(**CHAT, n=2, stream=True)))


@shape("chat-with_options", request_id=PARSED_IDS)
async def chat_with_options(client: Any) -> Any:
    return seen(await settle(client.with_options(timeout=30).chat.completions.create(**CHAT)))


@shape("chat-tools-stream", streamed=True, asks=True)
async def chat_tools(client: Any) -> Any:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools = [{"type": "function", "function": function}]
    stream = client.chat.completions.create(**CHAT, tools=tools, tool_choice="required", stream=True)
    return await seen_stream(await settle(stream))


def parsing(client: Any) -> Any:
    """The chat completions that have parse() and stream()."""
    need(_PARSED)
    return client.chat.completions if hasattr(client.chat.completions, "parse") else client.beta.chat.completions


@shape("chat-parse", request_id=PARSED_IDS)
async def chat_parse(client: Any) -> Any:
    return seen(await settle(parsing(client).parse(**CHAT, response_format=Invoice)))


@shape("chat-helper", streamed=True, asks=True)
async def chat_helper(client: Any) -> Any:
    async with within(parsing(client).stream(**CHAT, response_format=Invoice)) as stream:
        events = [seen(event) async for event in each(stream)]
        return type(stream), events, seen(await settle(stream.get_final_completion()))


@shape("chat-helper-until_done", streamed=True, asks=True)
async def chat_helper_until_done(client: Any) -> Any:
    async with within(parsing(client).stream(**CHAT)) as stream:
        await settle(stream.until_done())
        return seen(await settle(stream.get_final_completion()))


if SDK["responses API"]:

    @shape("responses-parse", "responses", request_id=PARSED_IDS)
    async def responses_parse(client: Any) -> Any:
        return seen(await settle(client.responses.parse(**CALLS["responses"], text_format=Invoice)))

    @shape("responses-helper", "responses", streamed=True)
    async def responses_helper(client: Any) -> Any:
        async with within(client.responses.stream(**CALLS["responses"], text_format=Invoice)) as stream:
            events = [seen(event) async for event in each(stream)]
            return type(stream), events, seen(await settle(stream.get_final_response()))


# --- the truth ------------------------------------------------------------------------------------------------------


def truth(reported: Any) -> Usage | None:
    """The usage that a JSON reply reports, read a second time and in another way than the package does."""
    if not isinstance(reported, dict):
        return None

    def valid(value: Any) -> int | None:
        text = json.dumps(value)
        if re.fullmatch(r'\d{1,13}\.0|"\d{1,19}"', text):  # the SDK reads these as counts, too
            value = int(text.strip('"').removesuffix(".0"))
        return value if type(value) is int and 0 <= value <= 10**12 else None

    def either(first: str, second: str) -> int | None:
        one, other = reported.get(first), reported.get(second)
        return valid(other if not one and other is not None else one)

    def count(*paths: str) -> int | None:
        for path in paths:
            value: Any = reported
            for name in path.split("/"):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                return valid(value)
        return None

    details = "prompt_tokens_details", "input_tokens_details", "input_token_details"
    made = "completion_tokens_details", "output_tokens_details", "output_token_details"
    seconds = reported.get("seconds")
    if type(seconds) not in (int, float) or not 0 <= seconds <= 10**12:
        seconds = None
    # An empty details object of one name does not hide a full one of another: no server sends both.
    usage = Usage(
        input_tokens=either("prompt_tokens", "input_tokens"),
        output_tokens=either("completion_tokens", "output_tokens"),
        total_tokens=count("total_tokens"),
        cached_tokens=count(*(f"{name}/cached_tokens" for name in details)),
        cache_write_tokens=count(*(f"{name}/cache_write_tokens" for name in details)),
        reasoning_tokens=count(*(f"{name}/reasoning_tokens" for name in made)),
        input_audio_tokens=count(*(f"{name}/audio_tokens" for name in details)),
        output_audio_tokens=count(*(f"{name}/audio_tokens" for name in made)),
        input_image_tokens=count(*(f"{name}/image_tokens" for name in details)),
        output_image_tokens=count(*(f"{name}/image_tokens" for name in made)),
        cached_audio_tokens=count(*(f"{name}/cached_tokens_details/audio_tokens" for name in details)),
        cached_image_tokens=count(*(f"{name}/cached_tokens_details/image_tokens" for name in details)),
        seconds=seconds,
    )
    return None if usage == Usage() else usage


def events_of(body: bytes) -> list[Any]:
    """The JSON data of a recorded stream of server-sent events, by the standard's rules."""
    found = []
    for block in body.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n").split("\n\n"):
        data = "\n".join(line[5:].removeprefix(" ") for line in block.split("\n") if line.startswith("data:"))
        if data and not data.startswith("[DONE]"):
            found.append(json.loads(data))
    return found


def about(message: Message) -> dict[str, Any]:
    """The fields of a message that a test can know beforehand."""
    unknown = ("id", "timestamp", "latency_ms", "time_to_first_token_ms", "writer", "sequence")
    return {name: getattr(message, name) for name in Message.__struct_fields__ if name not in unknown}


def sse(*events: Any) -> bytes:
    """A body of server-sent events."""
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def serving(*answers: Any) -> tuple[Any, list[Any]]:
    """A transport that gives these answers in turn, the last one for ever, and the JSON (or bytes) it was asked.

    An answer is an exception to raise, or (status, content type, parts of the body[, exception to end it]).
    """
    asked: list[Any] = []

    def answer(request: Any) -> Any:
        is_json = "json" in request.headers.get("content-type", "")
        asked.append(json.loads(request.content) if is_json and request.content else request.read())
        given = answers[min(len(asked), len(answers)) - 1]
        if isinstance(given, BaseException):
            raise given
        status, content_type, parts, *failure = given
        headers = {"content-type": content_type, "x-request-id": "req_served"}
        return http.Response(status, headers=headers, stream=Parts(parts, *failure))

    return http.MockTransport(answer), asked
