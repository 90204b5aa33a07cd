"""Connections by WebSocket: each response, transcription and live session is one message, of whoever asked for it.

A real server on loopback sends the events; the SDK's own connections receive them.
"""

from __future__ import annotations

import gc
import inspect
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

import spryng_instrument
from spryng_instrument import sockets, usage_context
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
    {"type": sockets.TRANSCRIBED, "event_id": "t", "item_id": "item_1", "content_index": 0, "transcript": "hi",
     "usage": {"type": "duration", "seconds": 1.5}},
]  # fmt: skip
RESPONSES = [
    {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "status": "in_progress"}},
    {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "i", "delta": "hi"},
    {"type": "response.completed", "sequence_number": 2,
     "response": {"id": "resp_1", "status": "completed", "model": "gpt-5-2025-08-07", "usage": RESPONSE_USAGE}},
]  # fmt: skip
LIVE = [
    {"type": "session.created", "event_id": "a", "session": {"id": "live_1", "model": "gpt-live"}},
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


@pytest.mark.parametrize("mode", MODES)
def test_a_connection_that_breaks_off(mode, instrument):
    """A response that was created and did not end is one incomplete message."""
    [message] = watched(mode, "realtime", REALTIME, instrument, model="gpt-realtime", stop_after=3)
    assert (message.operation, message.status, message.usage) == ("realtime", "incomplete", None)


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
