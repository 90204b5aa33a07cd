"""Real traffic, replayed through the real SDK: the usage that OpenAI reported is recorded, and nobody notices.

The exchanges are not part of this project. Where ../shared/recorded is absent, only those of our own making are run.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from spryng_instrument import usage_context
from tests import shapes
from tests.shapes import MODES, client_of, running, seen, seen_stream, settle, sse, truth

RECORDED = Path(__file__).parents[2] / "shared" / "recorded"
OPERATIONS = {
    "chat": "chat.completions",
    "completions": "completions",
    "embeddings": "embeddings",
    "responses": "responses",
}
COUNTS = {"chat": 95, "completions": 7, "embeddings": 17, "responses": 62}
ARGUMENTS = ["model", "messages", "prompt", "input", "stream", "encoding_format"]
if shapes.SDK["stream_options argument"]:  # otherwise it goes by extra_body
    ARGUMENTS.append("stream_options")


def _own(endpoint: str, status: int, request: dict[str, Any], *answer: Any) -> dict[str, Any]:
    stream = request.get("stream", False)
    kind, body = "application/json", json.dumps(answer[0])
    if stream:
        kind, body = "text/event-stream", sse(*answer).decode()
    path = OPERATIONS[endpoint].replace(".", "/")
    return {
        "id": f"own-{endpoint}-{status}-{'stream' if stream else 'plain'}",
        "endpoint": endpoint,
        "stream": stream,
        "request": {"method": "POST", "url": f"https://api.openai.com/v1/{path}", "body": json.dumps(request)},
        "response": {"status": status, "headers": {"content-type": kind}, "body": body},
    }


_USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 4}}
_CHAT = {"model": "gpt-4o", "messages": []}
_DELTA = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}
_CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024-08-06"}
_MESSAGE = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
OWN = [
    _own("chat", 200, _CHAT, {**_CHUNK, "object": "chat.completion", "choices": [_MESSAGE], "usage": _USAGE}),
    _own("chat", 404, _CHAT, {"error": {"message": "no such model", "type": "invalid_request_error"}}),
    _own(
        "chat",
        200,
        {**_CHAT, "stream": True, "stream_options": {"include_usage": True}},
        {**_CHUNK, "choices": [_DELTA], "usage": None},
        {**_CHUNK, "choices": [], "usage": _USAGE},
        "[DONE]",
    ),
]


def _load() -> list[dict[str, Any]]:
    lines = [line for file in sorted(RECORDED.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [exchange for exchange in map(json.loads, lines) if exchange["endpoint"] in OPERATIONS]


EXCHANGES = _load()


def _body(part: dict[str, Any]) -> bytes:
    text = part.get("body")
    return base64.b64decode(part["body_base64"]) if text is None else text.encode()


def _transport(exchange: dict[str, Any]) -> Any:
    """What serves the recorded answer, in parts of an odd size."""
    response = exchange["response"]
    body = _body(response)
    parts = [body[start : start + 997] for start in range(0, len(body), 997)]
    dropped = ("content-length", "content-encoding", "transfer-encoding")
    headers = [(name, value) for name, value in response["headers"].items() if name.lower() not in dropped]

    def answer(request: Any) -> Any:
        assert str(request.url).partition("?")[0] == exchange["request"]["url"].partition("?")[0]
        assert json.loads(request.content)["model"] == json.loads(_body(exchange["request"]))["model"]
        return shapes.http.Response(response["status"], headers=headers, stream=shapes.Parts(parts))

    return shapes.http.MockTransport(answer)


def _make(client: Any, exchange: dict[str, Any], way: str) -> Any:
    """The recorded call."""
    endpoint, request = exchange["endpoint"], json.loads(_body(exchange["request"]))
    path = "/" + OPERATIONS[endpoint].replace(".", "/")
    if endpoint == "responses" and not hasattr(client, "responses"):  # the SDK is older than that API
        if way != "create":
            shapes.need("responses API")
        if exchange["stream"]:
            shapes.need("events with a name")
        kind = openai.AsyncStream if type(client) is openai.AsyncOpenAI else openai.Stream
        stream = {"stream": True, "stream_cls": kind[shapes.ANY]} if exchange["stream"] else {}
        return client.post(path, body=request, cast_to=shapes.ANY, **stream)
    given = {name: request.pop(name) for name in ARGUMENTS if name in request}
    resource = attrgetter(OPERATIONS[endpoint])(client)
    create = resource.create if way == "create" else getattr(resource, way).create
    return create(**given, extra_body=request)


async def _seen(client: Any, exchange: dict[str, Any], way: str) -> Any:
    """What the caller sees of a call, its stream read to the end."""
    try:
        if way == "with_streaming_response":
            async with shapes.within(_make(client, exchange, way)) as raw:
                return raw.status_code, [line async for line in shapes.each(raw.iter_lines())]
        reply = await settle(_make(client, exchange, way))
        if way == "with_raw_response":
            reply = await settle(reply.parse())
        return await seen_stream(reply) if exchange["stream"] else seen(reply)
    except openai.OpenAIError as exc:
        return seen(exc)


def _told(exchange: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(usage, id, model) that the recorded JSON reports, read without the SDK or this package."""
    body = _body(exchange["response"])
    if not exchange["stream"]:
        whole = json.loads(body)
        return whole.get("usage"), whole.get("id"), whole.get("model")
    events = shapes.events_of(body)
    if exchange["endpoint"] == "responses":
        events = [event["response"] for event in events if "response" in event]
    usage = [event["usage"] for event in events if event.get("usage")]
    return usage[-1] if usage else None, events[0]["id"], events[0]["model"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["create", "raw"])
@pytest.mark.parametrize("exchange", OWN + EXCHANGES, ids=lambda exchange: f"{exchange['endpoint']}-{exchange['id']}")
def test_replay(exchange, way, mode, instrument):
    """A recorded exchange gives the caller what it would have given, and one message with exactly its usage."""
    if way == "raw":  # either way for each exchange, one of them sync and the other async
        ways = ("with_raw_response", "with_streaming_response")
        if not shapes.SDK[ways[1]]:
            ways = ways[:1] * 2
        way = ways[((OWN + EXCHANGES).index(exchange) + MODES.index(mode)) % 2]
    url = urlsplit(exchange["request"]["url"])
    base_url = f"{url.scheme}://{url.netloc}" + url.path.removesuffix(
        OPERATIONS[exchange["endpoint"]].replace(".", "/")
    )

    async def call() -> Any:
        async with client_of(mode, transport=_transport(exchange), base_url=base_url) as client:
            with usage_context("acme"):
                return await _seen(client, exchange, way)

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare
    message = ledger.message()
    status = exchange["response"]["status"]
    reported, response_id, model = _told(exchange)
    request = json.loads(_body(exchange["request"]))
    assert message.operation == OPERATIONS[exchange["endpoint"]]
    assert (message.host, message.request_model) == (url.netloc, request["model"])
    if status != 200:
        assert (message.status, message.http_status, message.usage) == ("error", status, None)
        return
    assert message.status == "ok"
    assert message.usage == truth(reported)
    assert message.streamed is exchange["stream"]
    assert (message.response_id, message.response_model) == (response_id, model)
    if reported:
        names = (
            ("prompt_tokens", "completion_tokens") if "prompt_tokens" in reported else ("input_tokens", "output_tokens")
        )
        assert message.usage.input_tokens == reported[names[0]]
        assert message.usage.output_tokens == reported.get(names[1])
        assert message.usage.total_tokens == reported["total_tokens"]


@pytest.mark.skipif(not EXCHANGES, reason=f"{RECORDED} is absent: only exchanges of our own making were replayed")
def test_all_are_replayed(capsys):
    """Every recorded exchange of the four operations is among those that test_replay takes."""
    counts = Counter(exchange["endpoint"] for exchange in EXCHANGES)
    usage = sum(exchange["response"]["status"] == 200 and bool(_told(exchange)[0]) for exchange in EXCHANGES)
    with capsys.disabled():
        print(f"\nreplayed {counts.total()} recorded exchanges, {usage} of them with usage: {dict(counts)}")
    assert counts == COUNTS
    assert usage == 156
