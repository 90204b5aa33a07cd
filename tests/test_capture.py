"""Every way to call the SDK gives one message that says what the server did, and the caller notices nothing."""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import json
import operator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import openai
import openai._base_client as base
import pytest

from spryng_instrument import errors, stats, testing, uninstrument, usage_context
from tests import shapes
from tests.shapes import (
    CHAT,
    MODES,
    SHAPES,
    SNAPSHOTS,
    TIERS,
    about,
    client_of,
    running,
    seen,
    serving,
    settle,
    sse,
    truth,
)

both = pytest.mark.parametrize("mode", MODES)
CONTEXT = {"key": "acme", "conversation_id": "c-42", "tags": ("support",), "properties": {"seat": 7}}


@pytest.fixture
def steady(practice, monkeypatch):
    """Begin a run of the practice server that gives the same ids and times as every other such run."""
    clock = SimpleNamespace(time=lambda: 1_700_000_000, perf_counter=lambda: 0.0)
    monkeypatch.setattr(testing, "time", clock)
    monkeypatch.setattr(testing.answers, "time", clock)
    monkeypatch.setattr(practice, "_identities", practice._identities)

    def begin() -> None:
        practice._identities = (f"steady/{number}" for number in itertools.count())
        practice._exchanges.clear()

    return begin


def expected(shape: shapes.Shape, exchange: testing.Exchange, **fields: Any) -> dict[str, Any]:
    """What the one message of a successful call says, by the server's account."""
    model = exchange.request["model"]
    answered = not shape.opaque
    return {
        "operation": shape.operation,
        "status": "ok",
        "key": "acme",
        "conversation_id": "c-42",
        "tags": ("support",),
        "query": None,
        "properties": {"seat": 7},
        "request_model": model,
        "response_model": SNAPSHOTS[model] if answered else None,
        "response_id": exchange.response_id if answered else None,
        "request_id": exchange.request_id if shape.request_id else None,
        "service_tier": TIERS.get(shape.operation) if answered else None,
        "streamed": shape.streamed,
        "error": None,
        "http_status": None,
        "usage": truth(exchange.usage) if exchange.usage_sent else None,
        "call_site": None,
        "tool_usage": None,
        **fields,
    }


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted_once_and_unnoticed(shape, mode, practice, steady, instrument):
    """However the SDK is called: the same reply, the same request, and one message that the server would sign."""

    async def call() -> Any:
        async with client_of(mode, base_url=practice.base_url) as client:
            with usage_context(**CONTEXT):
                return await shape.call(client)

    steady()
    bare = running(mode)(call())
    [asked] = practice.exchanges
    steady()
    ledger = instrument()
    before = datetime.now(timezone.utc)
    assert running(mode)(call()) == bare
    [exchange] = practice.exchanges
    added = {"stream_options": {"include_usage": True}} if shape.asks else {}
    assert exchange.request == {**asked.request, **added}
    message = ledger.message()
    fields = about(message)
    told = shape.streamed and "x-stainless-retry-count" in exchange.headers  # older SDKs do not count
    assert fields.pop("retries") in ((0,) if told else (0, None))
    assert fields == expected(shape, exchange, host=f"127.0.0.1:{practice.port}")
    assert not exchange.usage_sent or message.usage.total_tokens > 0
    assert before - timedelta(milliseconds=1) <= message.timestamp <= datetime.now(timezone.utc)
    assert message.latency_ms > 0
    if shape.streamed and not shape.at_once:
        assert 0 < message.time_to_first_token_ms <= message.latency_ms
    else:
        assert message.time_to_first_token_ms is None


# --- clients --------------------------------------------------------------------------------------------------------


class OwnClient(openai.OpenAI):
    """A caller's subclass."""


class OwnAsyncClient(openai.AsyncOpenAI):
    """A caller's subclass."""


PLAIN = next(shape for shape in SHAPES if shape.name == "chat-create")
STREAM = next(shape for shape in SHAPES if shape.name == "chat-stream")
plain_and_stream = pytest.mark.parametrize("shape", [PLAIN, STREAM], ids=str)
AZURE = {"api_version": "2024-10-21", "azure_endpoint": "https://acme.openai.azure.com"}
CLIENTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "openai": ({}, "api.openai.com", "/v1/chat/completions"),
    "subclass": ({"kind": (OwnClient, OwnAsyncClient)}, "api.openai.com", "/v1/chat/completions"),
    "azure": (
        {"kind": (openai.AzureOpenAI, openai.AsyncAzureOpenAI), **AZURE},
        "acme.openai.azure.com",
        "/openai/deployments/gpt-4o-mini/chat/completions?api-version=2024-10-21",
    ),
    "azure-deployment": (
        {"kind": (openai.AzureOpenAI, openai.AsyncAzureOpenAI), "azure_deployment": "mine", **AZURE},
        "acme.openai.azure.com",
        "/openai/deployments/mine/chat/completions?api-version=2024-10-21",
    ),
    "other-host": (
        {"base_url": "https://me:secret@LLM.example.com:8443/v1/"},
        "llm.example.com:8443",
        "/v1/chat/completions",
    ),
}


@both
@plain_and_stream
@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("made", ["before", "after"])
def test_every_client(name, made, shape, mode, practice, steady, instrument):
    """Whatever the client, and whenever it was made: one message with its host; only OpenAI is asked for usage."""
    options, host, path = CLIENTS[name]

    async def call() -> Any:
        async with client_of(mode, transport=shapes.elsewhere(mode, practice.port), **options) as client:
            bound = client.chat.completions.create
            if made == "before":
                instrument()
            with usage_context(**CONTEXT):
                reply = await settle(bound(**CHAT, stream=shape.streamed))
                return await shapes.seen_stream(reply) if shape.streamed else seen(reply)

    steady()
    ledger = instrument()
    if made == "before":
        uninstrument()
    running(mode)(call())
    [exchange] = practice.exchanges
    assert exchange.path == path
    assert ("stream_options" in exchange.request) is (shape.streamed and host == "api.openai.com")
    fields = about(ledger.message())
    fields.pop("retries")
    assert fields == expected(shape, exchange, host=host)


@plain_and_stream
def test_module_level_client(shape, practice, steady, instrument, monkeypatch):
    """openai.chat.completions.create(), without a client of one's own, is counted too."""
    http_client = shapes.http.Client(verify=False)
    for name, value in (("api_key", "practice"), ("base_url", f"{practice.base_url}/"), ("http_client", http_client)):
        monkeypatch.setattr(openai, name, value)
    openai._reset_client()
    steady()
    ledger = instrument()
    with usage_context(**CONTEXT), http_client:
        running("sync")(shape.call(openai))
    openai._reset_client()
    fields = about(ledger.message())
    fields.pop("retries")
    assert fields == expected(shape, *practice.exchanges, host=f"127.0.0.1:{practice.port}")


def test_module_level_client_that_is_sent_elsewhere(instrument, monkeypatch):
    """openai.base_url counts when a call is made: the host is the one that was called, and is not asked unnamed."""
    transport, asked = serving((200, "text/event-stream", [STREAMED]))
    http_client = shapes.http.Client(transport=transport)
    for name, value in (("api_key", "k"), ("base_url", f"{OPENAI}/"), ("http_client", http_client)):
        monkeypatch.setattr(openai, name, value)
    openai._reset_client()
    ledger = instrument()
    list(openai.chat.completions.create(**CHAT, stream=True))
    monkeypatch.setattr(openai, "base_url", "https://gateway.example.com/v1/")
    list(openai.chat.completions.create(**CHAT, stream=True))
    openai._reset_client()
    assert [request.get("stream_options") for request in asked] == [US, None]
    assert [message.host for message in ledger.messages()] == ["api.openai.com", "gateway.example.com"]


# --- the caller's arguments -----------------------------------------------------------------------------------------


OWN_OPTIONS: dict[str, Any] = {}
if shapes.SDK["stream_options argument"]:  # in extra_body, they are left as they are
    OWN_OPTIONS["stream_options"] = {"include_obfuscation": False}


@both
@pytest.mark.parametrize("streamed", [False, True])
def test_arguments_are_read_only(streamed, mode, practice, instrument):
    """What the caller passes is the same after the call, object by object; usage is asked for in a copy."""
    arguments: dict[str, Any] = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "logit_bias": {"1": 1},
        "extra_headers": {"x-mine": "1"},
        "extra_query": {"q": "1"},
        "extra_body": {"mine": [1, {"deep": 2}]},
    }
    if streamed:
        arguments |= {"stream": True, **OWN_OPTIONS}
    before, kept = copy.deepcopy(arguments), dict(arguments)
    ledger = instrument(capture_query=True)

    async def call() -> None:
        async with client_of(mode, base_url=practice.base_url) as client:
            reply = await settle(client.chat.completions.create(model="gpt-4o-mini", **arguments))
            if streamed:
                await shapes.seen_stream(reply)

    practice._exchanges.clear()
    running(mode)(call())
    assert arguments == before
    assert all(arguments[name] is kept[name] for name in kept)
    [exchange] = practice.exchanges
    assert exchange.request["mine"] == [1, {"deep": 2}]
    if streamed:
        assert exchange.request["stream_options"] == {**OWN_OPTIONS.get("stream_options", {}), "include_usage": True}
    message = ledger.message()
    assert message.usage == truth(exchange.usage)
    assert message.query == "Hello"


@both
def test_one_shot_messages_survive(mode, practice, instrument):
    """A generator passed as messages reaches the API whole, even where its last message is to be recorded."""
    shapes.need("messages by generator")
    ledger = instrument(capture_query=True)

    async def call() -> None:
        async with client_of(mode, base_url=practice.base_url) as client:
            await settle(client.chat.completions.create(model="gpt-4o-mini", messages=(m for m in shapes.HELLO)))
            body = {"model": "gpt-4o-mini", "messages": list(shapes.HELLO), "stop": ["a", "b"]}
            await settle(client.post("/chat/completions", body=body, cast_to=shapes.ANY))

    practice._exchanges.clear()
    running(mode)(call())
    assert [exchange.request["messages"] for exchange in practice.exchanges] == [shapes.HELLO] * 2
    assert [message.status for message in ledger.messages()] == ["ok"] * 2


# --- asking for usage -----------------------------------------------------------------------------------------------

OPENAI, OTHER = "https://api.openai.com/v1", "https://llm.example.com/v1"
US = {"include_usage": True}
ASKING: dict[str, tuple[str, dict[str, Any], Any]] = {
    "openai": (OPENAI, {}, US),
    "none given": (OPENAI, {"stream_options": None}, US),
    "other options kept": (
        OPENAI,
        {"stream_options": {"include_obfuscation": False}},
        {"include_obfuscation": False, **US},
    ),
    "n=2": (OPENAI, {"n": 2}, US),
    "chosen": (OPENAI, {"stream_options": {"include_usage": True}}, US),
    "declined": (OPENAI, {"stream_options": {"include_usage": False}}, {"include_usage": False}),
    "chosen in extra_body": (
        OPENAI,
        {"extra_body": {"stream_options": {"include_usage": False}}},
        {"include_usage": False},
    ),
    "options in extra_body": (OPENAI, {"extra_body": {"stream_options": {"mine": 1}}}, {"mine": 1}),
    "null in extra_body": (OPENAI, {"extra_body": {"stream_options": None}}, None),
    "own data": (OPENAI, {"extra_body": {"data_sources": []}}, None),
    "other host": (OTHER, {}, None),
    "host opted in": ("https://mine.example.com/v1", {}, US),
    "host and port opted in": ("https://mine.example.com:8443/v1", {}, US),
    "only that port opted in": ("https://port.example.com:8443/v1", {}, US),
    "other port": ("https://port.example.com:8444/v1", {}, None),
    "part of a name": ("https://api.openai.com.example.com/v1", {}, None),
}


@both
@pytest.mark.parametrize("name", ASKING)
def test_asks_for_usage_where_it_is_safe(name, mode, practice, instrument):
    """A stream is asked for its usage on OpenAI and hosts that were named, and only if the caller has not chosen."""
    base_url, given, wanted = ASKING[name]
    if "stream_options" in given:
        if name in ("none given", "other options kept"):
            shapes.need("stream_options argument")  # in extra_body, they are left as they are
        given = shapes.argument("stream_options", given["stream_options"])
    ledger = instrument(include_usage_hosts=["mine.example.com", "port.example.com:8443"])

    async def call() -> Any:
        async with client_of(mode, base_url=base_url, transport=shapes.elsewhere(mode, practice.port)) as client:
            stream = await settle(client.chat.completions.create(**CHAT, **given, stream=True))
            return [chunk async for chunk in shapes.each(stream)]

    practice._exchanges.clear()
    chunks = running(mode)(call())
    [exchange] = practice.exchanges
    assert exchange.request.get("stream_options") == wanted
    reported = [chunk for chunk in chunks if getattr(chunk, "usage", None) is not None]
    assert len(reported) == (name == "chosen")
    assert ("usage" in json.loads(shapes.to_json(chunks[0]))) is (name == "chosen")
    message = ledger.message()
    assert message.usage == (truth(exchange.usage) if wanted and wanted.get("include_usage") else None)
    assert message.status == "ok"


CHUNK = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m-1"}
STREAMED = sse(
    {**CHUNK, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
    {**CHUNK, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    "[DONE]",
)
REFUSED = {"error": {"message": "Unrecognized request argument supplied: stream_options", "type": "invalid"}}


@both
@pytest.mark.parametrize("status", [400, 422])
def test_servers_that_refuse_stream_options(status, mode, instrument, caplog):
    """A server that rejects what we added gets the caller's own request, is not asked again; one message is left."""
    refusal = (status, "application/json", [json.dumps(REFUSED).encode()])
    stream = (200, "text/event-stream", [STREAMED])
    transport, asked = serving(refusal, stream)
    ledger = instrument()

    async def call() -> None:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            for _ in range(2):
                chunks = await settle(client.chat.completions.create(**CHAT, stream=True, **OWN_OPTIONS))
                assert [chunk.id async for chunk in shapes.each(chunks)] == ["c-1"] * 2

    running(mode)(call())
    bare = {**CHAT, "stream": True, **OWN_OPTIONS}
    assert asked == [{**bare, "stream_options": {**OWN_OPTIONS.get("stream_options", {}), **US}}, bare, bare]
    assert [(message.status, message.usage, message.error) for message in ledger.messages()] == [("ok", None, None)] * 2
    assert caplog.text.count("api.openai.com rejects stream_options") == 1


@both
def test_refused_twice(mode, instrument):
    """Where the caller's own request fails as well, that is the error they get, and one failed message."""
    other = {"error": {"message": "no such model"}}
    answers = [(400, "application/json", [json.dumps(body).encode()]) for body in (REFUSED, other)]
    transport, asked = serving(*answers)
    ledger = instrument()

    async def call() -> None:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            with pytest.raises(openai.BadRequestError, match="no such model") as caught:
                await settle(client.chat.completions.create(**CHAT, stream=True))
            assert caught.value.__context__ is None or "stream_options" not in str(caught.value.__context__)

    running(mode)(call())
    assert len(asked) == 2
    message = ledger.message()
    assert (message.status, message.error, message.http_status) == ("error", "BadRequestError", 400)


@both
def test_a_bad_request_is_no_refusal(mode, instrument):
    """Options that are the caller's own mistake fail as they would without us; later streams are asked for usage."""
    shapes.need("stream_options argument")
    wrong = {"error": {"message": "Invalid type for 'stream_options.include_obfuscation': expected a boolean"}}
    counted = {**CHUNK, "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
    refusal = (400, "application/json", [json.dumps(wrong).encode()])
    whole = STREAMED.replace(b"data: [DONE]", sse(counted) + b"data: [DONE]")
    transport, asked = serving(refusal, refusal, (200, "text/event-stream", [whole]))
    ledger = instrument()

    async def call() -> None:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            odd = {"include_obfuscation": "no"}
            with pytest.raises(openai.BadRequestError, match="expected a boolean"):
                await settle(client.chat.completions.create(**CHAT, stream=True, stream_options=odd))
            chunks = await settle(client.chat.completions.create(**CHAT, stream=True))
            assert [chunk.id async for chunk in shapes.each(chunks)] == ["c-1"] * 2

    running(mode)(call())
    assert asked[2]["stream_options"] == US
    assert [(message.status, message.usage) for message in ledger.messages()] == [
        ("error", None),
        ("ok", truth(counted["usage"])),
    ]


# --- errors ---------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, int | None]] = {
    "400": ("BadRequestError", 400),
    "401": ("AuthenticationError", 401),
    "403": ("PermissionDeniedError", 403),
    "404": ("NotFoundError", 404),
    "409": ("ConflictError", 409),
    "422": ("UnprocessableEntityError", 422),
    "429": ("RateLimitError", 429),
    "500": ("InternalServerError", 500),
    "503": ("InternalServerError", 503),
    "disconnect": ("APIConnectionError", None),
}


@both
@pytest.mark.parametrize("name", ["chat-create", "chat-stream", "chat-raw", "chat-streaming_response-read"])
@pytest.mark.parametrize("fault", FAULTS)
def test_failed_calls(fault, name, mode, practice, steady, instrument):
    """A failed call raises what it would have raised, and leaves one message that is not counted as one to bill."""
    [shape] = [shape for shape in SHAPES if shape.name == name]

    async def call() -> Any:
        options = {"base_url": practice.base_url, "default_headers": {"x-practice-error": fault}}
        async with client_of(mode, **options) as client:
            with usage_context("acme"), pytest.raises(openai.OpenAIError) as caught:
                await shape.call(client)
            return seen(caught.value)

    steady()
    bare = running(mode)(call())
    steady()
    ledger = instrument()
    assert running(mode)(call()) == bare
    [exchange] = practice.exchanges
    message = ledger.message()
    assert (message.error, message.http_status) == FAULTS[fault]
    assert (message.status, message.usage, message.key) == ("error", None, "acme")
    assert message.request_id == (None if fault == "disconnect" else exchange.request_id)
    assert message.latency_ms > 0
    total = ledger.store.total()
    assert (total.messages, total.errors, total.input_tokens) == (0, 1, 0)


@both
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("failure", "error"),
    [("ConnectTimeout", "APITimeoutError"), ("ReadTimeout", "APITimeoutError"), ("ConnectError", "APIConnectionError")],
)
def test_timeouts_and_connection_errors(failure, error, streamed, mode, instrument, monkeypatch):
    """A call that gets no answer in all its tries is one failed message, with the SDK's own exception."""
    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.001, raising=False)  # the oldest SDKs just take longer
    transport, asked = serving(getattr(shapes.http, failure)("no answer"))
    ledger = instrument()

    async def call() -> None:
        options = {"transport": transport, "base_url": OPENAI, "max_retries": 1}
        async with client_of(mode, **options) as client:
            with pytest.raises(getattr(openai, error)):
                await settle(client.chat.completions.create(**CHAT, stream=streamed))

    running(mode)(call())
    assert len(asked) == 2
    message = ledger.message()
    assert (message.status, message.error, message.http_status, message.usage) == ("error", error, None, None)


@both
@pytest.mark.parametrize("name", ["chat-create", "chat-stream", "chat-raw", "chat-streaming_response-read"])
def test_retries_are_one_message(name, mode, practice, instrument):
    """What the SDK sends again after a 429 is one message, with the count of retries where the SDK tells it."""
    [shape] = [shape for shape in SHAPES if shape.name == name]
    ledger = instrument()

    async def call() -> None:
        options = {"base_url": practice.base_url, "default_headers": {"x-practice-error": "429-once"}}
        async with client_of(mode, max_retries=2, **options) as client:
            await shape.call(client)

    practice._exchanges.clear()
    running(mode)(call())
    first, second = practice.exchanges
    assert (first.status, second.status) == (429, 200)
    message = ledger.message()
    assert (message.status, message.error) == ("ok", None)
    assert message.usage == (truth(second.usage) if second.usage_sent else None)
    told = name != "chat-create" and (
        "x-stainless-retry-count" in second.headers or (name != "chat-stream" and shapes.SDK["retries_taken"])
    )
    assert message.retries == (1 if told else None)


ANSWER = {"index": 0, "message": {"role": "assistant", "content": "no JSON"}, "finish_reason": "stop"}
WRITTEN = {"type": "output_text", "text": "no JSON", "annotations": []}
UNPARSED: dict[str, tuple[str, dict[str, Any]]] = {
    "cut off": ("chat.completions", {"choices": [{**ANSWER, "finish_reason": "length"}]}),
    "filtered": ("chat.completions", {"choices": [{**ANSWER, "finish_reason": "content_filter"}]}),
    "no JSON": ("chat.completions", {"choices": [ANSWER]}),
    "responses": ("responses", {"output": [{"type": "message", "role": "assistant", "content": [WRITTEN]}]}),
}


@both
def test_answers_of_another_form(mode, instrument):
    """What a client that validates strictly does not take was answered and paid for, too."""
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    body = json.dumps({"id": "r-1", "model": "m-1", "usage": usage, "choices": "none"}).encode()
    transport, _ = serving((200, "application/json", [body]))
    ledger = instrument()

    async def call() -> None:
        async with client_of(mode, transport=transport, base_url=OPENAI, _strict_response_validation=True) as client:
            with pytest.raises(openai.APIResponseValidationError):
                await settle(client.chat.completions.create(**CHAT))

    running(mode)(call())
    message = ledger.message()
    assert (message.status, message.error, message.usage) == ("ok", None, truth(usage))
    assert (message.response_id, message.response_model) == ("r-1", "m-1")
    assert message.request_id == "req_served"


@both
@pytest.mark.parametrize("name", UNPARSED)
def test_answers_that_cannot_be_parsed(name, mode, instrument):
    """An answer that parse() raises over was given and paid for: it is a message to bill, with its usage."""
    operation, answer = UNPARSED[name]
    if operation == "responses":
        shapes.need("responses API")
    [shape] = [shape for shape in SHAPES if shape.name == f"{operation.removesuffix('.completions')}-parse"]
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    body = json.dumps({"id": "r-1", "model": "m-1", "usage": usage, **answer}).encode()
    transport, asked = serving((200, "application/json", [body]))

    async def call() -> Any:
        async with client_of(mode, transport=transport, base_url=OPENAI) as client:
            with pytest.raises(Exception) as caught:  # noqa: PT011 - pydantic's, or the SDK's own
                await shape.call(client)
            return seen(caught.value)

    bare = running(mode)(call())
    ledger = instrument()
    assert running(mode)(call()) == bare
    assert asked[0] == asked[1]
    message = ledger.message()
    assert (message.status, message.error, message.usage) == ("ok", None, truth(usage))
    assert (message.response_id, message.response_model) == ("r-1", "m-1")


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelled_task(streamed, instrument):
    """A task that is cancelled while it waits for the answer leaves one message, "cancelled", not to be billed."""
    waiting = asyncio.Event()

    async def answer(request: Any) -> Any:
        waiting.set()
        await asyncio.sleep(60)

    ledger = instrument()
    async with client_of("async", transport=shapes.http.MockTransport(answer), base_url=OPENAI) as client:
        task = asyncio.ensure_future(client.chat.completions.create(**CHAT, stream=streamed))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    message = ledger.message()
    assert (message.status, message.error, message.usage) == ("cancelled", None, None)
    assert (ledger.store.total().messages, ledger.store.total().cancelled) == (0, 1)


def test_interrupted_call(instrument):
    """Ctrl-C during a call goes through, and leaves one cancelled message."""
    transport, _ = serving(KeyboardInterrupt())
    ledger = instrument()

    async def call() -> None:
        async with client_of("sync", transport=transport) as client:
            with pytest.raises(KeyboardInterrupt):
                client.chat.completions.create(**CHAT)

    running("sync")(call())
    assert ledger.message().status == "cancelled"


# --- whose it is ----------------------------------------------------------------------------------------------------


@both
def test_missing_key_warns_once_per_line(mode, practice, instrument, caplog):
    """A call without a key is recorded, and said once per line of code, with that line."""
    ledger = instrument(on_missing_key="warn")

    async def call() -> list[int]:
        async with client_of(mode, base_url=practice.base_url) as client:
            create, lines = client.chat.completions.create, []
            for _ in range(3):
                lines.append(inspect.currentframe().f_lineno + 1)
                _ = await create(**CHAT) if mode == "async" else create(**CHAT)
            for stream in (False, True):
                lines.append(inspect.currentframe().f_lineno + 1)
                reply = await create(**CHAT, stream=stream) if mode == "async" else create(**CHAT, stream=stream)
            await shapes.close(reply)
            with usage_context("acme"):
                await settle(create(**CHAT))
            return lines

    lines = [f"{__file__}:{line}" for line in running(mode)(call())]
    warnings = [record.getMessage() for record in caplog.records if "without a customer's key" in record.getMessage()]
    assert [warning.split(" ")[0] for warning in warnings] == list(dict.fromkeys(lines))
    assert [message.call_site for message in ledger.messages()] == [*lines, None]
    assert stats().unattributed == len(lines)


def test_missing_key_ignored(practice, client, instrument, caplog):
    """on_missing_key="ignore" records the line without a word."""
    ledger = instrument(on_missing_key="ignore")
    client.chat.completions.create(**CHAT)
    assert ledger.message().key is None
    assert __file__ in ledger.message().call_site
    assert not caplog.records


@both
@plain_and_stream
def test_missing_key_raises_before_sending(shape, mode, practice, instrument):
    """on_missing_key="raise" stops a call before it is sent, and only calls that have no key."""
    ledger = instrument(on_missing_key="raise")

    async def call() -> None:
        async with client_of(mode, base_url=practice.base_url) as client:
            with pytest.raises(errors.MissingKeyError, match="usage_context"):
                await shape.call(client)
            with usage_context("acme"):
                await shape.call(client)

    practice._exchanges.clear()
    running(mode)(call())
    assert len(practice.exchanges) == 1
    assert ledger.message().key == "acme"


def test_default_key(client, instrument):
    """default_key is the customer of calls outside any context, and of contexts that name none."""
    ledger = instrument(default_key="house", on_missing_key="raise")
    client.chat.completions.create(**CHAT)
    with usage_context(tags=["t"]):
        client.chat.completions.create(**CHAT)
    with usage_context("acme"):
        client.chat.completions.create(**CHAT)
    messages = ledger.messages()
    assert [(m.key, m.tags, m.call_site) for m in messages] == [
        ("house", (), None),
        ("house", ("t",), None),
        ("acme", (), None),
    ]


TEXT = {"type": "text", "text": "two"}
QUERIES: list[tuple[str, dict[str, Any], str | None]] = [
    ("chat.completions", {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "b"),
    ("chat.completions", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a"),
    (
        "chat.completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, TEXT]}]},
        "one\ntwo",
    ),
    ("chat.completions", {"messages": [{"role": "system", "content": "a"}]}, None),
    ("completions", {"prompt": "once upon"}, "once upon"),
    ("completions", {"prompt": ["once", "upon"]}, "upon"),
    ("completions", {"prompt": [1, 2, 3]}, None),
    ("embeddings", {"input": "one text", **shapes.argument("dimensions", 4)}, "one text"),
]


class Text(str):
    """As templates, NumPy and enums have them."""

    __slots__ = ()


@pytest.mark.parametrize("streamed", [False, True])
def test_text_of_any_kind(streamed, client, instrument):
    """What is text, or a number, to the caller's program is recorded as that: no kind of it loses the message."""
    ledger = instrument(capture_query=True)
    asked = {"model": Text("gpt-4o-mini"), "messages": [{"role": "user", "content": Text("hello")}]}
    share = type("Share", (float,), {})(0.5)
    with usage_context(Text("acme"), conversation_id=Text("c-1"), tags=[Text("t")], properties={Text("share"): share}):
        reply = client.chat.completions.create(**asked, stream=streamed)
        if streamed:
            list(reply)
    message = ledger.message()
    assert (message.key, message.conversation_id, message.tags) == ("acme", "c-1", ("t",))
    assert (message.request_model, message.query, message.properties) == ("gpt-4o-mini", "hello", {"share": 0.5})


@pytest.mark.parametrize(("operation", "given", "query"), QUERIES)
def test_query_is_captured_when_asked_for(operation, given, query, client, instrument):
    """capture_query keeps what the user asked last, as text; a context's own query wins."""
    ledger = instrument(capture_query=True)
    create = operator.attrgetter(operation)(client).create
    model = shapes.CALLS[operation]["model"]
    create(model=model, **given)
    with usage_context("acme", query="mine"):
        create(model=model, **given)
    assert [message.query for message in ledger.messages()] == [query, "mine"]


def test_no_content_unless_asked_for(client, instrument):
    """Without capture_query nothing of prompt or answer is in the message; a context's own facts are."""
    ledger = instrument()
    reply = client.chat.completions.create(**CHAT)
    with usage_context("acme", query="mine", properties={"plan": "pro", "seats": 3}, tags=["a"]):
        client.chat.completions.create(**CHAT)
    first, second = ledger.messages()
    text = repr(first)
    assert shapes.HELLO[0]["content"] not in text
    assert reply.choices[0].message.content not in text
    assert (first.query, first.properties, first.tags) == (None, None, ())
    assert (second.query, second.properties, second.tags) == ("mine", {"plan": "pro", "seats": 3}, ("a",))


def test_other_requests_are_no_messages(client, practice, instrument):
    """What calls no model, or has no row of its own, is left alone and not recorded."""
    ledger = instrument(on_missing_key="raise")
    assert client.models.list().data
    with pytest.raises(openai.NotFoundError):
        client.get("/chat/completions", cast_to=shapes.ANY)
    with pytest.raises(openai.NotFoundError):
        client.post("/chat/completions/c-1", body={}, cast_to=shapes.ANY)
    assert ledger.messages() == []
