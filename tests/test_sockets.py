"""Connections by WebSocket: each response, transcription and live session is one message, of whoever asked for it.

A real server on loopback sends the events; the SDK's own connections receive them.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import openai
import pytest

import spryng_instrument
from spryng_instrument import connections, usage_context
from spryng_instrument.message import Usage
from tests import shapes
from tests.shapes import MODES, running, settle

pytest.importorskip("websockets.sync.server", reason="the SDK's connections need the package websockets")
# The SDK uses websockets in a way that its newest release calls old.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

REALTIME_USAGE = {
    "input_tokens": 100, "output_tokens": 50, "total_tokens": 150,
    "input_token_details": {"cached_tokens": 40, "audio_tokens": 60, "text_tokens": 40},
    "output_token_details": {"audio_tokens": 30, "text_tokens": 20},
}  # fmt: skip
REALTIME_READ = Usage(input_tokens=100, output_tokens=50, total_tokens=150, cached_tokens=40, input_audio_tokens=60,
                      output_audio_tokens=30)  # fmt: skip
RESPONSE_USAGE = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
RESPONSE_READ = Usage(input_tokens=7, output_tokens=3, total_tokens=10)


def realtime(kind: str, number: int, **more: Any) -> dict[str, Any]:
    return {"type": kind, "event_id": f"{kind}-{number}", "response": {"id": f"resp_{number}", **more}}


REALTIME = [
    {"type": "session.created", "event_id": "s", "session": {"type": "realtime", "model": "gpt-realtime"}},
    realtime("response.created", 1, status="in_progress"),
    {"type": "response.output_audio.delta", "event_id": "d", "response_id": "resp_1", "delta": "aGk="},
    realtime("response.done", 1, status="completed", usage=REALTIME_USAGE),
    realtime("response.created", 2, status="in_progress"),
    realtime("response.done", 2, status="failed", status_details={"error": {"code": "boom"}}),
    {"type": connections.TRANSCRIBED, "event_id": "t", "item_id": "item_1", "content_index": 0, "transcript": "hi",
     "usage": {"type": "duration", "seconds": 1.5}},
]  # fmt: skip
RESPONSES = [
    {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "status": "in_progress"}},
    {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "i", "delta": "hi"},
    {"type": "response.completed", "sequence_number": 2,
     "response": {"id": "resp_1", "status": "completed", "model": "gpt-5-2025-08-07", "usage": RESPONSE_USAGE}},
]  # fmt: skip
LIVE = [
    {"type": "session.started", "event_id": "a", "session": {"id": "live_1", "model": "gpt-live"}},
    {"type": "session.usage.updated", "event_id": "b", "usage": {"seconds": 3.0}},
    {"type": "session.usage.updated", "event_id": "c", "usage": {"seconds": 6.0}},
    {"type": "session.closed", "event_id": "d", "reason": "close_requested", "session": {"id": "live_1"},
     "usage": {"seconds": 7.5}},
]  # fmt: skip


@contextmanager
def serving(events: list[dict[str, Any]]) -> Iterator[str]:
    """A server that sends these events to each connection, and closes it. Gives its URL."""
    from websockets.sync.server import serve

    def handle(connection: Any) -> None:
        for event in events:
            connection.send(json.dumps(event))

    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def connect(client: Any, path: str, **options: Any) -> Any:
    resource = client
    for name in path.split("."):
        resource = getattr(resource, name, None)
    if resource is None or not hasattr(resource, "connect"):
        pytest.skip(f"openai {openai.__version__} has no {path}.connect")
    return resource.connect(**options)


def connectable(kind: Any) -> Any:
    """The client's class, if it knows connections."""
    if "websocket_base_url" not in inspect.signature(kind).parameters:
        pytest.skip(f"openai {openai.__version__} has no connections")
    return kind


async def received(mode: str, url: str, path: str, stop_after: int | None = None, **options: Any) -> list[Any]:
    """The events that a caller gets of a connection, as JSON."""
    client = connectable(openai.AsyncOpenAI if mode == "async" else openai.OpenAI)(
        api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1"
    )
    got = []
    try:
        async with shapes.within(connect(client, path, **options)) as connection:
            async for event in shapes.each(connection):
                got.append((type(event), event.to_json()))
                if len(got) == stop_after:
                    break
    finally:
        await settle(client.close())
    return got


def watched(mode: str, path: str, events: list[dict[str, Any]], ledger: Any, **options: Any) -> list[Any]:
    """The messages of a connection, whose events are the same to the caller as without us."""
    with serving(events) as url:
        spryng_instrument.uninstrument()
        bare = running(mode)(received(mode, url, path, **options))
        ledger()
        with usage_context("acme", conversation_id="c-1"):
            assert running(mode)(received(mode, url, path, **options)) == bare
        assert len(bare) == options.get("stop_after", len(events))
    gc.collect()
    return ledger().messages()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["realtime", "beta.realtime"])
def test_realtime(path, mode, instrument):
    """Each response and each transcription is one message; the model is the session's."""
    done, failed, heard = watched(mode, path, REALTIME, instrument, model="gpt-realtime")
    assert (done.operation, done.status, done.usage, done.key) == ("realtime", "ok", REALTIME_READ, "acme")
    assert (done.request_model, done.response_id, done.conversation_id) == ("gpt-realtime", "resp_1", "c-1")
    assert done.time_to_first_token_ms is not None
    assert (failed.operation, failed.status, failed.usage) == ("realtime", "error", None)
    assert (heard.operation, heard.usage, heard.key) == ("realtime.transcription", Usage(seconds=1.5), "acme")


async def read_by_another(mode: str, url: str, path: str, **options: Any) -> None:
    """Connect as acme, read as bluepeak."""
    client = connectable(openai.AsyncOpenAI if mode == "async" else openai.OpenAI)(
        api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1"
    )
    try:
        with usage_context("acme", tags=["made"]):
            connection = await settle(connect(client, path, **options).enter())
        with usage_context("bluepeak", tags=["read"]):
            async for _ in shapes.each(connection):
                pass
        await settle(connection.close())
    finally:
        await settle(client.close())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["realtime", "beta.realtime", "responses", "live"])
def test_whose_it_is(path, mode, instrument):
    """Messages belong to the context that the connection was made in, like a stream's, not to that of its reader."""
    events = {"responses": RESPONSES, "live": LIVE}.get(path, REALTIME)
    options: dict[str, Any] = {"model": "gpt-realtime"} if "realtime" in path else {}
    ledger = instrument()
    with serving(events) as url:
        running(mode)(read_by_another(mode, url, path, **options))
    gc.collect()
    assert {(message.key, message.tags) for message in ledger.messages()} == {("acme", ("made",))}


def test_an_older_connection(instrument):
    """One that was made before instrument() is of whoever reads from it first."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    connection = module.RealtimeConnection(None)
    ledger = instrument()
    for key, events in (("acme", REALTIME[:1]), ("bluepeak", REALTIME[1:])):
        with usage_context(key):
            for event in events:
                connection.parse_event(json.dumps(event))
    assert [message.key for message in ledger.messages()] == ["acme"] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["realtime", "beta.realtime", "responses", "live"])
def test_the_host(path, mode, instrument):
    """Each message says which server it came from, as it would over HTTP; a Host header of one's own is not asked."""
    events = {"responses": RESPONSES, "live": LIVE}.get(path, REALTIME)
    options: dict[str, Any] = {"model": "gpt-realtime"} if "realtime" in path else {}
    ledger = instrument()
    with serving(events) as url:
        running(mode)(received(mode, url, path, extra_headers={"Host": "elsewhere"}, **options))
    gc.collect()
    assert {message.host for message in ledger.messages()} == {url.split("/")[2]}


@pytest.mark.parametrize("transport", [None, object(), mock.MagicMock()])
def test_a_transport_of_ones_own(transport, instrument):
    """A connection over something that made no handshake, of the user's tests say, is counted without a host."""
    ledger = instrument()
    module = pytest.importorskip("openai.resources.realtime.realtime")
    connection = module.RealtimeConnection(transport)
    for event in REALTIME:
        connection.parse_event(json.dumps(event))
    assert [message.host for message in ledger.messages()] == [None] * 3


HEARD = REALTIME[-1]
GA = {"audio": {"input": {"transcription": {"model": "gpt-4o-mini-transcribe"}}}}
BETA = {"input_audio_transcription": {"model": "gpt-4o-mini-transcribe"}}


def session_event(kind: str, **session: Any) -> dict[str, Any]:
    return {"type": kind, "event_id": kind, "session": session}


def answer(number: int, kind: str = "completed", **more: Any) -> list[dict[str, Any]]:
    """The events of one response."""
    response = {"id": f"resp_{number}", "model": "gpt-5-2025-08-07"}
    return [
        {"type": "response.created", "response": {**response, "status": "in_progress"}, **more},
        {"type": f"response.{kind}", "response": {**response, "status": kind, "usage": RESPONSE_USAGE}, **more},
    ]


REFUSAL = {"type": "error", "status": 400, "error": {"code": "previous_response_not_found"}}
ERROR = {"type": "error", "sequence_number": 1, "code": "server_error"}
LANES = {
    "one after the other": (
        ["acme", *answer(1), "bluepeak", *answer(2), "acme", *answer(3)],
        ["acme", "bluepeak", "acme"],
    ),
    "asked for at once": (["acme", "bluepeak", *answer(1), *answer(2)], ["acme", "bluepeak"]),
    "one is refused": (["acme", "bluepeak", REFUSAL, *answer(1)], ["bluepeak"]),
    "one is refused meanwhile": (["acme", answer(1)[0], "bluepeak", "carol", REFUSAL, answer(1)[1], *answer(2)],
                                 ["acme", "carol"]),
    "an error within one": (["acme", "bluepeak", answer(1)[0], ERROR, answer(1)[1], *answer(2)], ["acme", "bluepeak"]),
    "one follows unasked": (["acme", *answer(1, "incomplete"), *answer(2), "bluepeak", *answer(3)],
                            ["acme", "acme", "bluepeak"]),
    "lanes": (["acme/a", "bluepeak/b", *answer(1, stream_id="b"), *answer(2, stream_id="a")], ["bluepeak", "acme"]),
    "none has asked": (answer(1), ["shared"]),
    "in no context": ([None, *answer(1)], ["shared"]),
    "parsed twice": (["acme", "bluepeak", *answer(1), *answer(1), *answer(2)], ["acme", "bluepeak"]),
    "not to be sent": (["acme!", "bluepeak", *answer(1)], ["bluepeak"]),
}  # fmt: skip
"""What happens on a connection: who asks for a response, in which lane, and what comes; and whose each response is."""


def responses_connection(mode: str) -> Any:
    """The class of connections for responses, which came to the SDK later than the module it is in."""
    module = pytest.importorskip("openai.resources.responses.responses")
    name = "AsyncResponsesConnection" if mode == "async" else "ResponsesConnection"
    if not hasattr(module, name):
        pytest.skip(f"openai {openai.__version__} has no connections for responses")
    return getattr(module, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", LANES)
def test_who_asked_for_a_response(case, mode, instrument):
    """A response of the Responses API belongs to the context in which it was asked for, whatever else is asked for."""
    kind = responses_connection(mode)
    happens, owners = LANES[case]
    ledger = instrument()

    async def act() -> None:
        transport = handshake("api.openai.com")
        transport.send = mock.AsyncMock() if mode == "async" else mock.Mock()
        with usage_context("shared"):
            connection = kind(transport)
        for event in happens:
            if isinstance(event, dict):
                connection.parse_event(json.dumps(event))
                continue
            key, _, lane = (event or "").partition("/")
            transport.send.side_effect = OSError if key.endswith("!") else None
            create = {"model": "gpt-5", "input": "hi", **({"stream_id": lane} if lane else {})}
            with usage_context(key.strip("!")) if key else nullcontext(), suppress(OSError):
                await settle(connection.send({"type": "response.create", **create}))

    running(mode)(act())
    messages = ledger.messages()
    assert [message.key for message in messages] == owners
    assert {message.request_model for message in messages} == {None if case == "none has asked" else "gpt-5"}


@pytest.mark.parametrize("mode", MODES)
def test_lanes_of_the_sdk(mode, instrument):
    """The SDK's own lanes share one connection: each response is of whoever has sent for it."""
    module = pytest.importorskip("openai.lib.responses_websocket")
    from websockets.sync.server import serve

    def answered(socket: Any) -> None:
        for number, asked in enumerate(socket):
            for event in answer(number, stream_id=json.loads(asked)["stream_id"], sequence_number=0):
                socket.send(json.dumps(event))

    limits = module.ResponsesWebSocketLimits(
        max_lanes=8, max_events_per_lane=64, max_events=64, max_bytes_per_lane=1 << 24, max_bytes=1 << 24,
        max_response_bytes=None,
    )  # fmt: skip
    session = module.AsyncResponsesWebSocketSession if mode == "async" else module.ResponsesWebSocketSession
    ledger = instrument()

    async def call(url: str) -> None:
        kind = openai.AsyncOpenAI if mode == "async" else openai.OpenAI
        client = kind(api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1")
        with usage_context("shared"):
            connection = await settle(client.responses.connect().enter())
            async with shapes.within(session(connection, limits=limits)) as shared:
                for key in ("acme", "bluepeak"):
                    with usage_context(key):
                        lane = shared.lane(key)
                        await settle(lane.send({"type": "response.create", "model": "gpt-5", "input": "hi"}))
                        await settle(lane.get_final_response())
        await settle(client.close())

    with serve(answered, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running(mode)(call(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/v1"))
        server.shutdown()
    messages = ledger.messages()
    assert [(message.key, message.request_model) for message in messages] == [("acme", "gpt-5"), ("bluepeak", "gpt-5")]


@pytest.mark.parametrize("mode", MODES)
def test_asked_for_while_the_sdk_connects_again(mode, instrument):
    """The SDK keeps it, and sends it over the next connection: it is answered there, what was asked before is not."""
    kind = responses_connection(mode)
    if "on_reconnecting" not in inspect.signature(kind).parameters:
        pytest.skip(f"openai {openai.__version__} connects no connection again")
    from websockets.sync.server import serve

    received: list[str] = []

    def lost_once(socket: Any) -> None:
        for asked in socket:
            received.append(json.loads(asked)["input"])
            if len(received) == 1:
                socket.close(1012)
                return
            for event in answer(len(received), sequence_number=0):
                socket.send(json.dumps(event))

    def ask(connection: Any, key: str) -> Any:
        with usage_context(key):
            sent = connection.send({"type": "response.create", "model": "gpt-5", "input": key})
            return asyncio.ensure_future(sent) if mode == "async" else sent

    async def call(url: str) -> None:
        client = (openai.AsyncOpenAI if mode == "async" else openai.OpenAI)(
            api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1"
        )
        sent: list[Any] = []
        manager = client.responses.connect(
            on_reconnecting=lambda _: sent.append(ask(connection, "bluepeak")), initial_delay=0.05
        )
        with usage_context("shared"):
            connection = await settle(manager.enter())
        await settle(ask(connection, "acme"))
        async for event in shapes.each(connection):
            if event.type == "response.completed" and len(sent) == 1:
                await settle(sent[0])
                sent.append(ask(connection, "carol"))
                await settle(sent[1])
            elif event.type == "response.completed":
                break
        await settle(connection.close())
        await settle(client.close())

    ledger = instrument()
    with serve(lost_once, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running(mode)(call(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/v1"))
        server.shutdown()
    assert received == ["acme", "bluepeak", "carol"]
    assert [message.key for message in ledger.messages()] == ["bluepeak", "carol"]


def test_what_was_asked_for_over_a_connection_that_was_lost(instrument):
    """What the SDK has connected again never answers what was asked for before."""
    ledger = instrument()
    connection = responses_connection("sync")(handshake("api.openai.com"))
    for key in ("acme", "bluepeak"):
        connection._connection = handshake("api.openai.com")
        with usage_context(key):
            connection.send({"type": "response.create", "model": "gpt-5"})
    for event in answer(1):
        connection.parse_event(json.dumps(event))
    assert ledger.message().key == "bluepeak"


@pytest.mark.parametrize(
    ("path", "sessions", "model"),
    [
        ("realtime", [session_event("session.created", model="gpt-realtime", **GA)], "gpt-4o-mini-transcribe"),
        (
            "realtime",
            [session_event("session.created", model="gpt-realtime"), session_event("session.updated", **GA)],
            "gpt-4o-mini-transcribe",
        ),
        (
            "beta.realtime",
            [session_event("session.created", model="gpt-4o-realtime", **BETA)],
            "gpt-4o-mini-transcribe",
        ),
        ("beta.realtime", [session_event("transcription_session.updated", **BETA)], "gpt-4o-mini-transcribe"),
        ("realtime", [session_event("session.created", model="gpt-realtime", audio={"input": None})], None),
    ],
)
def test_the_model_that_transcribes(path, sessions, model, instrument):
    """A transcription is of the model that the session names for it; where it names none, of none that is known."""
    [heard] = watched("sync", path, [*sessions, HEARD], instrument, model="gpt-realtime")
    assert (heard.operation, heard.model, heard.usage) == ("realtime.transcription", model, Usage(seconds=1.5))


@pytest.mark.parametrize("mode", MODES)
def test_responses(mode, instrument):
    """A response over a connection is the message that it would be over HTTP."""
    [message] = watched(mode, "responses", RESPONSES, instrument)
    assert (message.operation, message.status, message.usage) == ("responses", "ok", RESPONSE_READ)
    assert (message.response_model, message.key, message.streamed) == ("gpt-5-2025-08-07", "acme", True)


@pytest.mark.parametrize("mode", MODES)
def test_live(mode, instrument):
    """A live session is one message with its last usage: what it tells before is cumulative, and never summed."""
    options = {"extra_query": {"model": "gpt-live"}}
    [message] = watched(mode, "live", LIVE, instrument, **options)
    assert (message.operation, message.usage, message.response_id) == ("live", Usage(seconds=7.5), "live_1")
    assert (message.status, message.model, message.streamed) == ("ok", "gpt-live", True)


@contextmanager
def live(mode: str, events: list[dict[str, Any]], path: str = "live", **options: Any) -> Iterator[Any]:
    """A connection that these events come over, in acme's context."""
    with serving(events) as url:
        client = connectable(openai.AsyncOpenAI if mode == "async" else openai.OpenAI)(
            api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1"
        )
        with usage_context("acme"):
            yield client, connect(client, path, **options)


async def read(manager: Any, ending: str) -> None:
    """Read three events of a connection, and leave it in that way."""
    if ending == "exception":
        with suppress(KeyError):
            async with shapes.within(manager) as connection:
                await three(connection)
                raise KeyError
        return
    connection = await settle(manager.enter())
    await three(connection)
    if ending == "closed by the server":
        async for _ in shapes.each(connection):
            raise AssertionError("that was all")
    # The transport is closed in any case: a socket that is dropped warns.
    await settle((connection._connection if ending == "dropped" else connection).close())


async def three(connection: Any) -> None:
    for _ in range(3):
        await settle(connection.recv())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ending", ["closed", "closed by the server", "exception", "dropped"])
def test_a_live_session_that_breaks_off(ending, mode, instrument):
    """A live session that was not seen to end is one incomplete message, with the last usage that it has told."""
    ledger = instrument()
    with live(mode, LIVE[:3]) as (client, manager):

        async def act() -> None:
            await read(manager, ending)
            await settle(client.close())

        running(mode)(act())
    if ending == "dropped":
        assert ledger.messages() == []
        del manager, client
        gc.collect()
    message = ledger.message()
    assert (message.operation, message.status, message.key) == ("live", "incomplete", "acme")
    assert (message.usage, message.response_id, message.model) == (Usage(seconds=6.0), "live_1", "gpt-live")


@pytest.mark.parametrize("mode", MODES)
def test_a_connection_that_breaks_off(mode, instrument):
    """A response that was created and did not end is one incomplete message."""
    [message] = watched(mode, "realtime", REALTIME, instrument, model="gpt-realtime", stop_after=3)
    assert (message.operation, message.status, message.usage) == ("realtime", "incomplete", None)


def delegated(event: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.event", "event_id": f"r{event['sequence_number']}", "delegation_id": "d1", "event": event}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_live_session_delegates(mode, instrument):
    """A response that a live session has another model make is a message of its own, with that model's tokens."""
    spoken = {"type": "session.output_audio.delta", "event_id": "o", "delta": "aGk="}
    created, *rest = map(delegated, RESPONSES)
    events = [LIVE[0], created, spoken, *rest, *rest, *LIVE[1:]]
    session, response = watched(mode, "live", events, instrument)
    assert (session.operation, session.usage, session.model) == ("live", Usage(seconds=7.5), "gpt-live")
    assert (response.operation, response.status, response.usage) == ("responses", "ok", RESPONSE_READ)
    assert (response.request_model, response.response_model) == (None, "gpt-5-2025-08-07")
    assert (response.response_id, response.key, response.streamed) == ("resp_1", "acme", True)
    assert response.time_to_first_token_ms is not None


def test_a_delegated_response_that_breaks_off(instrument):
    """A delegated response that did not end is one incomplete message, beside that of its session."""
    session, response = watched("sync", "live", [LIVE[0], delegated(RESPONSES[0])], instrument)
    assert (session.operation, session.status) == ("live", "incomplete")
    assert (response.operation, response.status, response.usage) == ("responses", "incomplete", None)


def test_a_session_goes_on_without_its_sideband(instrument, monkeypatch):
    """A sideband may leave a session and come back: its end counts, or what was told last if nobody sees the end."""
    module = pytest.importorskip("openai.resources.live.sideband")
    monkeypatch.setattr(connections, "_HELD", 2)
    ledger = instrument()

    def attach(session_id: str, events: list[dict[str, Any]]) -> None:
        transport = handshake("api.openai.com", f"/v1/live/sessions/{session_id}/attach?graceful_close=true")
        connection = module.SidebandConnection(transport)
        for event in events:
            connection.parse_event(json.dumps(event))
        connection.close()

    attach("live_1", LIVE[1:2])
    attach("live_1", LIVE[2:3])
    gc.collect()
    assert ledger.messages() == []
    attach("live_1", LIVE[3:])
    assert (ledger.message().status, ledger.message().usage) == ("ok", Usage(seconds=7.5))

    for number in (2, 3, 4):
        attach(f"live_{number}", LIVE[1:3])
    gc.collect()
    assert [message.response_id for message in ledger.messages()] == ["live_1", "live_2"]
    spryng_instrument.uninstrument()
    instrument()
    rest = ledger.messages()[1:]
    assert [message.response_id for message in rest] == ["live_2", "live_3", "live_4"]
    assert {(message.status, message.usage) for message in rest} == {("incomplete", Usage(seconds=6.0))}


def test_what_is_read_after_the_end(instrument):
    """A connection that is closed has come to its end: what was received and is read later makes no second message."""
    module = pytest.importorskip("openai.resources.live.live")
    ledger = instrument()
    connection = module.LiveConnection(handshake("api.openai.com"))
    for event in LIVE[:3]:
        connection.parse_event(json.dumps(event))
    connection.close()
    connection.close()
    connection.parse_event(json.dumps(LIVE[3]))
    assert ledger.message().status == "incomplete"


def test_a_connection_that_is_made_again(instrument):
    """Two sessions over one connection, which the SDK has made again meanwhile, are two messages."""
    module = pytest.importorskip("openai.resources.live.live")
    ledger = instrument()
    connection = module.LiveConnection(handshake("api.openai.com"))
    again = [{**event, "session": {"id": "live_2"}} if "session" in event else event for event in LIVE]
    for event in (*LIVE[:3], *again):
        connection.parse_event(json.dumps(event))
    cut, whole = ledger.messages()
    assert (cut.response_id, cut.status, cut.usage) == ("live_1", "incomplete", Usage(seconds=6.0))
    assert (whole.response_id, whole.status, whole.usage) == ("live_2", "ok", Usage(seconds=7.5))


def test_a_live_session_at_the_interpreters_end(ledger):
    """A live session whose connection is open when the interpreter ends is one incomplete message."""
    code = """
import sys, openai, spryng_instrument
spryng_instrument.instrument(destination=sys.argv[1])
with spryng_instrument.usage_context("acme"):
    connection = openai.OpenAI(api_key="practice", websocket_base_url=sys.argv[2]).live.connect().enter()
for _ in range(3):
    connection.recv()
"""
    if not hasattr(openai.OpenAI, "live"):
        pytest.skip(f"openai {openai.__version__} has no live")
    with serving(LIVE[:3]) as url:
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, ledger.url, url], check=True, timeout=60)
    message = ledger.message()
    assert (message.operation, message.status, message.usage) == ("live", "incomplete", Usage(seconds=6.0))


def test_an_event_parsed_twice_counts_once(instrument):
    """Who receives bytes and parses them by hand, perhaps twice, is counted like everybody else."""
    ledger = instrument()
    with serving(REALTIME) as url, usage_context("acme"):
        client = connectable(openai.OpenAI)(api_key="practice", websocket_base_url=url)
        with client, connect(client, "realtime", model="gpt-realtime") as connection:
            for _ in REALTIME:
                content = connection.recv_bytes()
                connection.parse_event(content)
                connection.parse_event(content.decode())
    gc.collect()
    assert len(ledger.messages()) == 3


CALL = {"model": "gpt-realtime", "extra_query": {"call_id": "rtc_1"}}
SHARED = {
    "realtime": (REALTIME, "realtime", CALL, "realtime", CALL),
    "live": (LIVE, "live", {}, "live.sideband", {"session_id": "live_1"}),
}
"""What two connections see: the events, and what each connects to."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "at once"])
def test_seen_by_two_connections_counts_once(at_once, shared, mode, instrument):
    """A session that two connections see, of which one is a sideband, is counted once: for whoever saw it first."""
    events, path, options, other_path, other_options = SHARED[shared]
    ledger = instrument()

    async def both(url: str) -> None:
        client = connectable(openai.AsyncOpenAI if mode == "async" else openai.OpenAI)(
            api_key="practice", websocket_base_url=url, base_url="http://127.0.0.1:9/v1"
        )
        try:
            with usage_context("acme"):
                first = await settle(connect(client, path, **options).enter())
                if not at_once:
                    async for _ in shapes.each(first):
                        pass
            with usage_context("bluepeak"):
                second = await settle(connect(client, other_path, **other_options).enter())
            for _ in events if at_once else ():
                await settle(first.recv())
                await settle(second.recv())
            async for _ in shapes.each(second):
                pass
            await settle(first.close())
            await settle(second.close())
        finally:
            await settle(client.close())

    with serving(events) as url:
        running(mode)(both(url))
    gc.collect()
    messages = ledger.messages()
    assert len(messages) == (3 if shared == "realtime" else 1)
    assert {message.key for message in messages} == {"acme"}


def test_seen_by_two_threads_counts_once(instrument):
    """Threads that see the same end at the same moment make one message of it."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    ledger = instrument()
    one, other = (module.RealtimeConnection(handshake("api.openai.com")) for _ in range(2))
    ready = threading.Barrier(2)

    def read(connection: Any) -> None:
        connection.parse_event(json.dumps({"type": "session.created", "session": {"id": "sess_1"}}))
        for number in range(300):
            ready.wait()
            connection.parse_event(json.dumps(realtime("response.created", number)))
            connection.parse_event(json.dumps(realtime("response.done", number, usage=REALTIME_USAGE)))
            connection.parse_event(json.dumps({**HEARD, "item_id": f"item_{number}"}))

    threads = [threading.Thread(target=read, args=(connection,)) for connection in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.messages()) == 600


def test_the_same_ids_at_two_servers(instrument):
    """An id says what is the same at one server only."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    ledger = instrument()
    for host in ("one.example", "other.example", None, None):
        connection = module.RealtimeConnection(handshake(host))
        for event in REALTIME[:4]:
            connection.parse_event(json.dumps(event))
    assert [message.host for message in ledger.messages()] == ["one.example", "other.example", None, None]


def test_what_a_client_has_named_is_its_own(instrument):
    """Sessions whose clients gave their items the same names are not taken for one; nor are those of a small server,
    which numbers its responses anew on each connection."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    ledger = instrument()
    for host, session in (("api.openai.com", "sess_1"), ("api.openai.com", "sess_2"), ("localhost:8000", None)) * 2:
        connection = module.RealtimeConnection(handshake(host))
        if session:
            connection.parse_event(json.dumps({"type": "session.created", "session": {"id": session}}))
        else:
            connection.parse_event(json.dumps(realtime("response.done", 1, usage=REALTIME_USAGE)))
        connection.parse_event(json.dumps(HEARD))
    hosts = Counter((message.operation, message.host) for message in ledger.messages())
    assert hosts == {
        ("realtime.transcription", "api.openai.com"): 2,
        ("realtime.transcription", "localhost:8000"): 2,
        ("realtime", "localhost:8000"): 2,
    }


@pytest.mark.parametrize("again", [False, True])
def test_an_end_that_is_read_after_the_close(again, instrument):
    """What was received before a connection was closed, and is read after it, counts; instrument() again or not."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    ledger = instrument()
    transport = handshake("api.openai.com")
    connection = module.RealtimeConnection(transport)
    connection.parse_event(json.dumps(realtime("response.created", 1)))
    connection.close()
    if again:
        spryng_instrument.uninstrument()
        instrument()
    connection.parse_event(json.dumps(realtime("response.done", 1, usage=REALTIME_USAGE)))
    assert [message.usage for message in ledger.messages() if message.status == "ok"] == [REALTIME_READ]


def test_a_connection_that_comes_back(instrument):
    """One that left in the middle of a response, and sees its end on another connection, has its tokens."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    ledger = instrument()
    connection = module.RealtimeConnection(handshake("api.openai.com"))
    connection.parse_event(json.dumps(realtime("response.created", 1)))
    del connection
    gc.collect()
    connection = module.RealtimeConnection(handshake("api.openai.com"))
    connection.parse_event(json.dumps(realtime("response.done", 1, usage=REALTIME_USAGE)))
    assert [message.usage for message in ledger.messages() if message.status == "ok"] == [REALTIME_READ]


def test_ends_are_not_remembered_for_ever(instrument, monkeypatch):
    """A process that lives for months remembers the last ends only."""
    module = pytest.importorskip("openai.resources.realtime.realtime")
    monkeypatch.setattr(connections, "_REMEMBERED", 10)
    ledger = instrument()
    connection = module.RealtimeConnection(handshake("api.openai.com"))
    for number in range(100):
        for _ in range(2):
            connection.parse_event(json.dumps(realtime("response.done", number, usage=REALTIME_USAGE)))
    assert len(ledger.messages()) == 100
    assert len(connections._seen._ended) + len(connections._seen._ended_before) <= 20
    assert len(connections._seen._open) <= 1


def handshake(host: str | None, path: str = "/v1/realtime") -> Any:
    """A transport that was connected to that host."""
    from websockets.datastructures import Headers
    from websockets.http11 import Request

    return mock.Mock(request=host and Request(path, Headers(Host=host)))


@pytest.mark.parametrize("ids", [True, False], ids=["event ids", "no ids"])
def test_responses_without_an_id(ids, instrument):
    """Each end of a response counts, also where a server gives no ids; what the user says is no answer's token."""
    done = [
        {
            "type": "response.done",
            "response": {"status": "completed", "usage": REALTIME_USAGE},
            "event_id": f"e{number}",
        }
        for number in range(2)
    ]
    heard = {"type": "conversation.item.input_audio_transcription.delta", "item_id": "i", "delta": "hello"}
    events = [realtime("response.created", 1), heard, realtime("response.done", 1, usage=REALTIME_USAGE), *done]
    if not ids:
        for event in done:
            del event["event_id"]
    messages = watched("sync", "realtime", events, instrument, model="gpt-realtime")
    assert [message.usage for message in messages] == [REALTIME_READ] * 3
    assert [message.time_to_first_token_ms for message in messages] == [None] * 3


def test_no_module_is_loaded_for_it():
    """instrument() loads none of the modules that it would watch, and watches them when they are loaded."""
    code = """
import sys, spryng_instrument, openai, tempfile
before = set(sys.modules)
spryng_instrument.instrument(destination=f"sqlite:///{tempfile.mkdtemp()}/usage.db")
from spryng_instrument import sockets
loaded = [name for name in sockets.CONNECTIONS if name in set(sys.modules) - before]
assert not loaded, loaded
import openai.resources.realtime.realtime as module
assert hasattr(module.RealtimeConnection.parse_event, "__wrapped__")
spryng_instrument.uninstrument()
assert not hasattr(module.RealtimeConnection.parse_event, "__wrapped__")
"""
    if not hasattr(openai.OpenAI, "realtime"):
        pytest.skip(f"openai {openai.__version__} has no realtime")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
