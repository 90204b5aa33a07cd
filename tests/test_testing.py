"""The practice server answers the real SDK, sync and async, as OpenAI would, and its record of usage is true."""

import asyncio
import base64
import http.client
import json
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Literal, Optional  # noqa: UP035

import openai
import pytest
from pydantic import BaseModel

from spryng_instrument.testing import PracticeServer
from tests.shapes import SDK, argument, close, parsing, run, to_dict

HELLO = [{"role": "user", "content": "Say hello to the invoice."}]
WEATHER = [{"role": "user", "content": "What is the weather in Lisbon?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}},
    "required": ["city", "days", "metric"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "forecast", "strict": True, "parameters": PARAMETERS}}
RESPONSES_TOOL = {"type": "function", "name": "forecast", "strict": True, "parameters": PARAMETERS}
CALLS = {
    "chat.completions": {"model": "gpt-4o-mini", "messages": HELLO},
    "completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "Say hello to the invoice."},
    "embeddings": {"model": "text-embedding-3-small", "input": ["one text", "and another"]},
    "responses": {"model": "gpt-4o-mini", "input": "Say hello to the invoice."},
}
needs_responses = pytest.mark.skipif(
    not SDK["responses API"], reason=f"openai {openai.__version__} has no responses API"
)
ENDPOINTS = [pytest.param(name, marks=needs_responses if name == "responses" else ()) for name in CALLS]
STREAMED = [endpoint for endpoint in ENDPOINTS if endpoint.values != ("embeddings",)]
RECORDED = Path(__file__).parents[2] / "shared" / "recorded"


class Line(BaseModel):
    item: str
    price: float
    unit: Literal["token", "call"]


class Invoice(BaseModel):
    number: int
    paid: bool
    lines: list[Line]
    note: Optional[str]  # noqa: UP045 - the anyOf that pydantic makes of it is the case


@pytest.fixture
def server():
    with PracticeServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared_client():
    """One client's connection pool for all tests: making a pool takes longer than most of them."""
    with openai.OpenAI(base_url="http://127.0.0.1:9", api_key="practice", max_retries=0) as client:
        yield client


@pytest.fixture
def client(shared_client, server):
    return shared_client.with_options(base_url=server.base_url)


@pytest.fixture
async def aclient(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="practice", max_retries=0) as client:
        yield client


def resource(client, endpoint):
    for name in endpoint.split("."):
        client = getattr(client, name)
    return client


def streaming(endpoint):
    options = {} if endpoint == "responses" else argument("stream_options", {"include_usage": True})
    return {"stream": True, **options}


def usage_of(events):
    """The usage that a stream reported with its last event."""
    last = getattr(events[-1], "response", events[-1])
    return to_dict(last.usage)


def post(server, body, path="/v1/chat/completions", **headers):
    """POST without an SDK, for what the SDK would never send."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, body, {"Authorization": "Bearer practice", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def with_error(fault):
    return {"extra_headers": {"x-practice-error": fault}}


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_plain_answer_is_recorded_as_sent(server, client, endpoint):
    """What the SDK reads and what the server remembers are the same usage, ids and request."""
    raw = resource(client, endpoint).with_raw_response.create(**CALLS[endpoint])
    reply = raw.parse()

    [exchange] = server.exchanges
    assert exchange.usage == to_dict(reply.usage)
    assert exchange.usage["total_tokens"] > 0
    assert exchange.usage_sent
    assert exchange.response_id == getattr(reply, "id", None)
    assert exchange.request_id == raw.headers["x-request-id"]
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["openai-processing-ms"].isdecimal()
    assert (exchange.method, exchange.endpoint, exchange.status, exchange.stream) == ("POST", endpoint, 200, False)
    assert exchange.request["model"] == CALLS[endpoint]["model"]
    assert exchange.headers["authorization"] == "Bearer practice"


@pytest.mark.parametrize("endpoint", STREAMED)
def test_stream_reports_the_usage_of_the_plain_answer(server, client, endpoint):
    """The same request costs the same, plain or streamed."""
    plain = resource(client, endpoint).create(**CALLS[endpoint])
    events = list(resource(client, endpoint).create(**CALLS[endpoint], **streaming(endpoint)))

    assert usage_of(events) == to_dict(plain.usage)
    first, second = server.exchanges
    assert first.usage == second.usage
    assert second.stream
    assert second.usage_sent


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_async_sdk_gets_the_same_answers(server, client, aclient, endpoint):
    """An async client is answered like a sync one, plain and streamed."""
    expected = resource(client, endpoint).create(**CALLS[endpoint]).usage
    reply = await resource(aclient, endpoint).create(**CALLS[endpoint])
    assert reply.usage == expected

    if endpoint != "embeddings":
        stream = await resource(aclient, endpoint).create(**CALLS[endpoint], **streaming(endpoint))
        assert usage_of([event async for event in stream]) == to_dict(expected)


def test_models_are_listed(server, client):
    """GET /models names the models, and has no usage."""
    assert "gpt-4o-mini" in {model.id for model in client.models.list()}
    assert (server.exchanges[0].endpoint, server.exchanges[0].usage) == ("models", None)


@pytest.mark.parametrize("endpoint", ["chat.completions", "completions"])
def test_usage_comes_only_when_asked_for(server, client, endpoint):
    """Without include_usage no chunk has a usage; the record still says what it would have been."""
    chunks = list(resource(client, endpoint).create(**CALLS[endpoint], stream=True))

    assert all(chunk.choices for chunk in chunks)
    assert not any("usage" in to_dict(chunk) for chunk in chunks)
    [exchange] = server.exchanges
    assert exchange.usage == to_dict(resource(client, endpoint).create(**CALLS[endpoint]).usage)
    assert not exchange.usage_sent


def test_usage_chunk_is_last_and_alone(client):
    """With include_usage, the last chunk has the usage and no choice; the others have "usage": null."""
    *others, last = client.chat.completions.create(**CALLS["chat.completions"], **streaming("chat.completions"))

    assert last.choices == []
    assert all(chunk.choices and to_dict(chunk)["usage"] is None for chunk in others)


def test_stream_says_what_the_plain_answer_says(client):
    """Chunks joined are the plain texts, for every one of n choices, and finish once each."""
    request = {**CALLS["chat.completions"], "n": 3}
    plain = client.chat.completions.create(**request)
    texts, finishes = ["", "", ""], []
    for chunk in client.chat.completions.create(**request, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes += [choice.finish_reason] if choice.finish_reason else []

    assert texts == [choice.message.content for choice in plain.choices]
    assert len(set(texts)) == 3
    assert finishes == ["stop"] * 3


def test_completions_answers_every_prompt(client):
    """Each prompt, also one of token numbers, gets n choices."""
    for prompt, prompts in (("one", 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2, 3], [4]], 2)):
        reply = client.completions.create(model="gpt-3.5-turbo-instruct", prompt=prompt, n=2)
        assert [choice.index for choice in reply.choices] == list(range(prompts * 2))
    assert reply.usage.prompt_tokens == 4


@needs_responses
def test_responses_events_come_in_order(client):
    """The events are numbered, say the text once in parts and once whole, and end with the full response."""
    events = list(client.responses.create(**CALLS["responses"], stream=True))
    text = client.responses.create(**CALLS["responses"]).output_text

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event.type for event in events)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].response.output_text == text
    assert events[0].response.usage is None


# -- tools and formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "called"),
    [
        ({"messages": WEATHER}, True),
        ({"messages": HELLO}, False),
        ({"messages": HELLO, "tool_choice": "required"}, True),
        ({"messages": HELLO, "tool_choice": {"type": "function", "function": {"name": "forecast"}}}, True),
        ({"messages": WEATHER, "tool_choice": "none"}, False),
        ({"messages": [*WEATHER, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]}, False),
    ],
)
def test_tool_is_called(client, request_, called):
    """A tool is called when demanded or when the user speaks of the weather, and streamed as the same call."""
    request = {"model": "gpt-4o-mini", "tools": [CHAT_TOOL], **request_}
    [choice] = client.chat.completions.create(**request).choices
    chunks = list(client.chat.completions.create(**request, **streaming("chat.completions")))

    assert choice.finish_reason == ("tool_calls" if called else "stop")
    assert (choice.message.content is None) == called
    deltas = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    if called:
        [call] = choice.message.tool_calls
        assert list(json.loads(call.function.arguments)) == ["city", "days", "metric"]
        assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
        assert (deltas[0].function.name, deltas[0].id[:5]) == ("forecast", "call_")
    else:
        assert deltas == []


@needs_responses
def test_responses_calls_tools(client):
    """A function call streams its arguments, and its result ends the calling."""
    request = {"model": "gpt-4o-mini", "input": WEATHER, "tools": [RESPONSES_TOOL]}
    [call] = client.responses.create(**request).output
    events = list(client.responses.create(**request, stream=True))

    assert (call.type, call.name) == ("function_call", "forecast")
    parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(parts) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = client.responses.create(**{**request, "input": [*WEATHER, to_dict(call), result]})
    assert again.output_text


def test_parse_fits_the_schema(client):
    """chat parse() gets JSON that fits a pydantic model, with nested, optional and literal fields."""
    reply = parsing(client).parse(**CALLS["chat.completions"], response_format=Invoice)

    assert isinstance(reply.choices[0].message.parsed, Invoice)
    assert reply.choices[0].message.parsed.lines


def test_chat_stream_helper(server, client):
    """chat stream() ends with the completion that parse() gives, usage included."""
    request = {**CALLS["chat.completions"], "response_format": Invoice}
    parsed = parsing(client).parse(**request)
    with parsing(client).stream(**request, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
    assert final.usage == parsed.usage
    assert server.exchanges[1].usage_sent


async def test_async_chat_parsing(aclient):
    """Async parse() and stream() agree too, here on a tool call."""
    request = {"model": "gpt-4o-mini", "messages": WEATHER, "tools": [CHAT_TOOL]}
    parsed = await parsing(aclient).parse(**request)
    async with parsing(aclient).stream(**request) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()

    [mine], [theirs] = (reply.choices[0].message.tool_calls for reply in (parsed, final))
    assert mine.function.parsed_arguments == theirs.function.parsed_arguments


@needs_responses
def test_responses_parsing(client):
    """responses parse() and stream() give the same parsed output and usage."""
    parsed = client.responses.parse(**CALLS["responses"], text_format=Invoice)
    with client.responses.stream(**CALLS["responses"], text_format=Invoice) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()

    assert isinstance(parsed.output_parsed, Invoice)
    assert final.output_parsed == parsed.output_parsed
    assert final.usage == parsed.usage


def test_json_object(client):
    """response_format json_object answers with a JSON object."""
    reply = client.chat.completions.create(**CALLS["chat.completions"], response_format={"type": "json_object"})

    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_recursive_schema_ends(client):
    """A schema that refers to itself, by name or by "#", is answered with a finite value."""
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    for schema in ({"$ref": "#/$defs/node", "$defs": {"node": node}}, tree):
        form = {"type": "json_schema", "json_schema": {"name": "recursive", "schema": schema}}
        reply = client.chat.completions.create(**CALLS["chat.completions"], response_format=form)
        assert isinstance(json.loads(reply.choices[0].message.content), dict)


# -- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_chat_limit(client, limit):
    """A limit cuts the answer there and says so."""
    reply = client.chat.completions.create(**CALLS["chat.completions"], extra_body={limit: 5})

    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5


@needs_responses
def test_responses_limit(client):
    """A limit makes a response incomplete, plain and streamed."""
    plain = client.responses.create(**CALLS["responses"], max_output_tokens=5)
    *_, last = client.responses.create(**CALLS["responses"], max_output_tokens=5, stream=True)

    assert (plain.status, plain.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert last.type == "response.incomplete"
    assert last.response.usage == plain.usage
    assert plain.usage.output_tokens == 5


@pytest.mark.parametrize("model", ["gpt-5-mini", "o3"])
def test_reasoning_is_part_of_the_output(server, client, model):
    """Reasoning models report reasoning tokens, included in the output; they may use up the whole limit."""
    client.chat.completions.create(model=model, messages=HELLO)
    cut = client.chat.completions.create(model=model, messages=HELLO, extra_body={"max_completion_tokens": 20})

    usage = server.exchanges[0].usage
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("", "length")
    assert server.exchanges[1].usage["completion_tokens_details"]["reasoning_tokens"] == 20


@needs_responses
def test_responses_reasoning(client):
    """A reasoning model's response has a reasoning item and counts its tokens."""
    reply = client.responses.create(model="gpt-5", input="Think.")

    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens


def test_details_are_zero_not_missing(server, client):
    """A plain model reports every detail, as 0."""
    client.chat.completions.create(**CALLS["chat.completions"])

    usage = server.exchanges[0].usage
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "audio_tokens": 0}
    assert set(usage["completion_tokens_details"].values()) == {0}
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_long_prompts_are_cached(server, client):
    """A prompt of more than 1,024 tokens reports cached tokens in multiples of 128."""
    for words in (500, 1100, 9000):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "count " * words}])

    short, long, longest = (exchange.usage for exchange in server.exchanges)
    assert short["prompt_tokens_details"]["cached_tokens"] == 0
    for usage in (long, longest):
        assert 1024 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] % 128 == 0


def test_tokens_are_about_four_characters(server, client):
    """Tokens follow from the text: about four characters each."""
    text = Path(__file__).parent.parent.joinpath("LICENSE").read_text()
    client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": text}])

    assert 3 < len(text) / server.exchanges[0].usage["prompt_tokens"] < 5


@pytest.mark.parametrize(("asked", "used"), [(None, "default"), ("auto", "default"), ("flex", "flex")])
def test_service_tier(client, asked, used):
    """The tier that was used is reported, on every chunk too."""
    request = {**CALLS["chat.completions"], "extra_body": {"service_tier": asked} if asked else {}}
    reply = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))

    assert {to_dict(answer)["service_tier"] for answer in (reply, *chunks)} == {used}


def test_embeddings_forms(server, client):
    """Floats and base64 are the same unit vectors, of the dimensions asked for, for texts and token lists."""
    request = {"model": "text-embedding-3-small", "input": ["one", "two"], **argument("dimensions", 8)}
    floats = client.embeddings.create(**request, encoding_format="float").data
    packed = client.embeddings.create(**request, encoding_format="base64").data
    decoded = [struct.unpack("<8f", base64.b64decode(item.embedding)) for item in packed]

    for item, vector in zip(floats, decoded, strict=True):
        assert item.embedding == pytest.approx(vector, abs=1e-6)
        assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    tokens = client.embeddings.create(model="text-embedding-3-large", input=[[1, 2, 3], [4, 5]])
    assert to_dict(tokens.usage) == {"prompt_tokens": 5, "total_tokens": 5}
    assert [len(item.embedding) for item in tokens.data] == [3072, 3072]


def test_seed_decides(shared_client):
    """Servers of one seed say the same, also as the tenth call; another seed says something else; no id repeats."""
    texts, ids = [], []
    for seed, calls in ((0, 1), (7, 1), (7, 10), (8, 1)):
        with PracticeServer(seed=seed) as server:
            client = shared_client.with_options(base_url=server.base_url)
            replies = [client.chat.completions.create(**CALLS["chat.completions"]) for _ in range(calls)]
        texts.append(replies[-1].choices[0].message.content)
        ids += [reply.id for reply in replies]

    assert texts[1] == texts[2]
    assert len(set(texts)) == 3
    assert len(set(ids)) == len(ids)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_status_on_demand(server, client, status, error):
    """x-practice-error answers that status in OpenAI's error shape, plain and streamed."""
    for stream in (False, True):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**CALLS["chat.completions"], stream=stream, **with_error(str(status)))
        body = raised.value.body if hasattr(raised.value, "body") else raised.value.response.json()["error"]
        assert set(body) == {"message", "type", "param", "code"}
        assert raised.value.status_code == status

    assert [(exchange.status, exchange.usage, exchange.usage_sent) for exchange in server.exchanges] == [
        (status, None, False)
    ] * 2


@pytest.mark.parametrize("fault", ["429-once", "500-once", "disconnect-once"])
def test_once_fails_the_first_attempt_of_every_call(server, client, fault):
    """The SDK's own retry succeeds, and the next call, with the same body, fails once again."""
    retrying = client.with_options(max_retries=1)
    for _ in range(1 if fault == "disconnect-once" else 2):
        reply = retrying.chat.completions.create(**CALLS["chat.completions"], **with_error(fault))
        failed, answered = server.exchanges[-2:]
        assert (failed.status, failed.usage) == (0 if "disconnect" in fault else int(fault[:3]), None)
        assert (answered.status, answered.response_id) == (200, reply.id)


async def test_once_with_async(server, aclient):
    """An async client's retry succeeds, and need not be waited for."""
    retrying = aclient.with_options(max_retries=1)
    await retrying.chat.completions.create(**CALLS["chat.completions"], **with_error("503-once"))

    assert [exchange.status for exchange in server.exchanges] == [503, 200]
    with pytest.raises(openai.APIStatusError) as caught:
        await aclient.chat.completions.create(**CALLS["chat.completions"], **with_error("503"))
    assert caught.value.response.headers["retry-after-ms"] == "1"


def test_disconnect(server, client):
    """A connection closed without an answer is a connection error, kept with status 0."""
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(**CALLS["chat.completions"], **with_error("disconnect"))

    [exchange] = server.exchanges
    assert (exchange.status, exchange.usage, exchange.response_id) == (0, None, None)


@pytest.mark.parametrize("endpoint", STREAMED)
def test_stream_disconnect(server, client, endpoint):
    """The connection breaks after three chunks, before any usage."""
    seen = []
    request = {**CALLS[endpoint], **streaming(endpoint), **with_error("stream-disconnect")}
    with pytest.raises(Exception, match=r"(?i)incomplete chunked read|connection"):  # SDKs before 3 let httpx's out
        seen.extend(resource(client, endpoint).create(**request))

    assert len(seen) == 3 or (endpoint == "completions" and 1 <= len(seen) <= 3)
    [exchange] = server.exchanges
    assert exchange.usage["total_tokens"] > 0
    assert not exchange.usage_sent


def test_stream_disconnect_of_a_plain_answer(server, client):
    """A plain answer breaks off half-way."""
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(**CALLS["chat.completions"], **with_error("stream-disconnect"))

    assert not server.exchanges[0].usage_sent


def test_stream_error_in_chat(server, client):
    """An error event after three chunks raises the SDK's APIError."""
    request = {**CALLS["chat.completions"], **streaming("chat.completions"), **with_error("stream-error")}
    seen = []
    with pytest.raises(openai.APIError, match=r"The server had an error|error ocurred during streaming"):
        seen.extend(client.chat.completions.create(**request))

    assert len(seen) == 3
    assert not server.exchanges[0].usage_sent
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(**CALLS["chat.completions"], **with_error("stream-error"))


@needs_responses
def test_stream_error_in_responses(server, client):
    """Responses report a failure in mid-stream as an error event, and then end."""
    *before, last = client.responses.create(**CALLS["responses"], stream=True, **with_error("stream-error"))

    event = to_dict(last)
    event = event.get("data", event)  # some SDKs give an error as the event's name and its data
    assert (len(before), event["type"], event["sequence_number"]) == (3, "error", 3)
    assert not server.exchanges[0].usage_sent


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO}, "model"),
        ({"model": "no-such-model", "messages": HELLO}, "model"),
        ({"model": "gpt-4o"}, "messages"),
        ({"model": "gpt-4o", "messages": []}, "messages"),
        ({"model": "gpt-4o", "messages": HELLO, "n": 0}, "n"),
        ({"model": "gpt-4o", "messages": HELLO, "max_tokens": "many"}, "max_tokens"),
        ({"model": "gpt-4o", "messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": "gpt-4o", "messages": [1], "tools": [CHAT_TOOL]}, None),
        ([], None),
    ],
)
def test_bad_requests_name_the_parameter(server, body, param):
    """What cannot be answered is a 400 that names the parameter."""
    status, answer = post(server, json.dumps(body))

    assert status == 400
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"
    assert server.exchanges[0].request == body


@pytest.mark.parametrize(
    ("status", "body", "path", "headers"),
    [
        (400, "{not json", "/v1/chat/completions", {}),
        (400, "", "/v1/chat/completions", {}),
        pytest.param(400, "[" * 100_000, "/v1/chat/completions", {}, id="nested too deeply"),
        (400, "{}", "/v1/chat/completions", {"x-practice-error": "sometimes"}),
        (401, "{}", "/v1/chat/completions", {"Authorization": ""}),
        (401, "{}", "/v1/chat/completions", {"Authorization": "Bearer "}),
        (404, "{}", "/v1/chat/completion", {}),
        (404, "{}", "/v1/models", {}),
        (404, "{}", "/chat/completions", {}),
        (411, "{}", "/v1/chat/completions", {"Content-Length": "two"}),
        pytest.param(413, bytes(33 << 20), "/v1/chat/completions", {}, id="more than 32 MB"),
    ],
)
def test_refusals(server, status, body, path, headers):
    """Everything else that is refused is JSON in OpenAI's shape too, and is remembered."""
    answered, answer = post(server, body, path, **headers)

    assert answered == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.exchanges[0].status == status


@pytest.mark.parametrize(
    ("status", "key", "path"),
    [
        (403, "practice", "costs?start_time=1"),
        (404, "sk-admin-1", "invoices?start_time=1"),
        (404, "sk-admin-1", "usage/costs?start_time=1"),
        (404, "sk-admin-1", "completions?start_time=1"),
        (400, "sk-admin-1", "costs"),
        (400, "sk-admin-1", "costs?start_time=soon"),
        (400, "sk-admin-1", "costs?start_time=1&page=two"),
        (400, "sk-admin-1", "usage/completions?start_time=1&limit=32"),
    ],
)
def test_organization_refuses(server, status, key, path):
    """Usage and costs are told to administrators, who ask right."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    connection.request("GET", f"/v1/organization/{path}", headers={"Authorization": f"Bearer {key}"})
    response = connection.getresponse()

    assert response.status == status
    assert set(json.loads(response.read())["error"]) == {"message", "type", "param", "code"}
    connection.close()


def test_organization_tells_every_kind_of_usage(server):
    """Every endpoint is there, with a bucket for every day, whether it was used or not."""
    for kind in ("completions", "embeddings", "images", "audio_speeches", "audio_transcriptions", "moderations"):
        with openai.OpenAI(base_url=server.base_url, api_key="sk-admin-1") as admin:
            path = f"/organization/usage/{kind}?start_time=86401&end_time=345600"
            page = admin.get(path, cast_to=Dict[str, object])  # noqa: UP006 - the SDK on Python 3.10 takes no dict[...]
        assert [bucket["start_time"] for bucket in page["data"]] == [86_400, 172_800, 259_200]
        assert all(bucket["results"] == [] for bucket in page["data"])
        assert (page["has_more"], page["next_page"]) == (False, None)


# -- Azure ------------------------------------------------------------------------------------------------------------


def test_azure_client(server):
    """AzureOpenAI is answered under its deployment's path, whatever the deployment is called."""
    endpoint = f"http://127.0.0.1:{server.port}"
    with openai.AzureOpenAI(azure_endpoint=endpoint, api_key="practice", api_version="2024-06-01") as azure:
        reply = azure.chat.completions.create(model="our deployment", messages=HELLO)
        chunks = list(azure.chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True))
        assert azure.models.list().data

    first, second, third = server.exchanges
    assert first.path == "/openai/deployments/our%20deployment/chat/completions?api-version=2024-06-01"
    assert first.usage == to_dict(reply.usage)
    assert first.headers["api-key"] == "practice"
    assert chunks[0].model == "gpt-4o-mini-2024-07-18"
    assert [exchange.endpoint for exchange in (first, second, third)] == ["chat.completions"] * 2 + ["models"]


def test_azure_v1_path(server):
    """Azure's newer /openai/v1/ path is answered."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/openai/v1/", api_key="practice") as client:
        assert client.embeddings.create(model="our-embeddings", input="text").usage.total_tokens > 0


def test_deployment_in_the_path_is_the_model(server):
    """A body without model is answered as the deployment's name."""
    path = "/openai/deployments/gpt-4o/chat/completions?api-version=2024-06-01"

    assert post(server, json.dumps({"messages": HELLO}), path)[1]["model"] == "gpt-4o-2024-08-06"


# -- connections ------------------------------------------------------------------------------------------------------


def test_many_threads(server, client):
    """Calls from many threads each get their own answer, and every one is recorded once."""

    def call(number):
        message = {"role": "user", "content": f"Say {number % 5} " * (number % 5)}
        return number % 5, client.chat.completions.create(model="gpt-4o-mini", messages=[message])

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(call, range(1, 41)))

    recorded = {exchange.response_id: exchange.usage for exchange in server.exchanges}
    assert len(recorded) == len(server.exchanges) == 40
    usages = {}
    for number, reply in replies:
        assert recorded[reply.id] == to_dict(reply.usage)
        assert usages.setdefault(number, recorded[reply.id]) == recorded[reply.id]


async def test_many_tasks(server, aclient):
    """Concurrent async streams do not mix."""

    async def call(number):
        message = {"role": "user", "content": f"Say {number}"}
        stream = await aclient.chat.completions.create(model="gpt-4o-mini", messages=[message], stream=True)
        return {chunk.id async for chunk in stream}

    ids = await asyncio.gather(*map(call, range(20)))
    assert all(len(each) == 1 for each in ids)
    assert set.union(*ids) == {exchange.response_id for exchange in server.exchanges}


def test_connection_is_kept_alive(server):
    """One connection carries many requests, errors and streams included."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.connect()
    connected = connection.sock
    for body, fault in (({}, ""), ({"stream": True}, ""), ({}, "429"), ({"stream": True}, "stream-error"), ({}, "")):
        headers = {"Authorization": "Bearer practice", "x-practice-error": fault}
        connection.request("POST", "/v1/chat/completions", json.dumps({**CALLS["chat.completions"], **body}), headers)
        connection.getresponse().read()
        assert connection.sock is connected
    connection.close()

    assert [exchange.status for exchange in server.exchanges] == [200, 200, 429, 200, 200]


@pytest.mark.parametrize("sent", [b"POST /v1/", b"POST /v1/responses HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}", None])
def test_client_that_goes_away_is_silent(capfd, sent):
    """A client that resets the connection, at any time, prints nothing on stderr."""
    body = json.dumps({**CALLS["chat.completions"], "stream": True, "n": 9})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer p\r\nContent-Length: {len(body)}\r\n\r\n"
    with PracticeServer(chunk_delay_s=0.001) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(sent or (head + body).encode())
            if sent is None:
                connection.recv(1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        deadline = time.monotonic() + 5
        while any(thread.name == "practice-call" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    assert capfd.readouterr() == ("", "")


def test_abandoned_stream(client, server):
    """A stream left early keeps its record, and the client goes on."""
    stream = client.chat.completions.create(**CALLS["chat.completions"], stream=True)
    next(iter(stream))
    run(close(stream))
    client.chat.completions.create(**CALLS["chat.completions"])

    assert [exchange.stream for exchange in server.exchanges] == [True, False]


@pytest.mark.parametrize("slow", [{"latency_s": 60.0}, {"chunk_delay_s": 60.0}])
def test_stop_is_prompt(shared_client, slow):
    """stop() cuts answers under way, ends every thread, and the client learns of it."""
    failures = []
    others = set(threading.enumerate())

    def call():
        try:
            for _ in client.chat.completions.create(**CALLS["chat.completions"], stream=True):
                begun.set()
        except Exception as exc:
            failures.append(exc)

    server, begun = PracticeServer(**slow).start(), threading.Event()
    client = shared_client.with_options(base_url=server.base_url)
    thread = threading.Thread(target=call)
    thread.start()
    begun.wait(0.2)
    started = time.monotonic()
    server.stop()
    thread.join(30)
    assert time.monotonic() - started < 30  # and the answer would take 60

    assert len(failures) == 1
    assert set(threading.enumerate()) <= others
    server.stop()  # once more does nothing


def test_stop_and_start_again(server, client):
    """A stopped server refuses connections; started again, it is found where it was and remembers."""
    client.chat.completions.create(**CALLS["chat.completions"])
    before = server.base_url
    server.stop()
    with pytest.raises(openai.APIConnectionError):
        client.chat.completions.create(**CALLS["chat.completions"])

    assert server.start() is server
    assert server.start().base_url == before
    client.chat.completions.create(**CALLS["chat.completions"])
    assert len(server.exchanges) == 2


def test_port_must_be_known_and_free(server):
    """base_url before start() says what to do; a taken port is an OSError."""
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        _ = PracticeServer().base_url
    with pytest.raises(OSError, match="in use"):
        PracticeServer(port=server.port).start()


def test_latency(shared_client):
    """latency_s and chunk_delay_s hold answers back."""
    with PracticeServer(latency_s=0.05, chunk_delay_s=0.01) as server:
        client = shared_client.with_options(base_url=server.base_url)
        started = time.monotonic()
        chunks = list(client.chat.completions.create(**CALLS["chat.completions"], max_tokens=5, stream=True))
        assert time.monotonic() - started > 0.05 + 0.01 * len(chunks)


# -- the real thing ---------------------------------------------------------------------------------------------------


def shape(value):
    """The names and nesting of a JSON value, without its values."""
    return {name: shape(part) for name, part in value.items()} if isinstance(value, dict) else type(value).__name__


def recorded(endpoint):
    """OpenAI's own plain answers, with the requests."""
    for path in RECORDED.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            exchange = json.loads(line)
            request, response = exchange["request"], exchange["response"]
            if (exchange["endpoint"], exchange["stream"], response["status"]) == (endpoint, False, 200):
                asked, answered = json.loads(request["body"]), json.loads(response["body"])
                # a real answer has a dated model, one that a project made up has not; audio has details of its own
                dated = re.match(asked["model"] + r"[-:]\d", answered["model"]) and "audio" not in asked["model"]
                if dated and "//api.openai.com" in request["url"]:
                    yield asked, answered


@pytest.mark.skipif(not RECORDED.exists(), reason="no recorded traffic here")
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_like_recorded_traffic(server, endpoint):
    """The same models answer under the same dated names and report usage of the same shape as OpenAI did."""
    checked = 0
    for request, real in recorded(endpoint):
        body = {"model": request["model"], "messages": HELLO, "input": "Hello", "prompt": "Hello"}
        ours = post(server, json.dumps(body), "/v1/chat/completions" if endpoint == "chat" else f"/v1/{endpoint}")[1]
        assert (ours["model"], ours["object"]) == (real["model"], real["object"])
        assert shape(ours["usage"]) == shape(real["usage"])
        assert set(real["choices"][0] if "choices" in real else ()) <= set(ours.get("choices", [{}])[0])
        checked += 1
    assert checked
