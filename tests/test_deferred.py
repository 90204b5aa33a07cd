"""Work that is answered before it is done: one message, with the usage that a later read tells, for who began it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import openai
import pytest

import spryng_instrument
from spryng_instrument import deferred, pump, usage_context
from spryng_instrument import recorder as recording
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.usage import Reading
from tests import shapes
from tests.shapes import MODES, client_of, running, settle, sse

# Assistants are on their way out, and the SDK says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

BASE_URL = "https://api.openai.com/v1"
USAGE = {"input_tokens": 30, "output_tokens": 12, "total_tokens": 42, "output_tokens_details": {"reasoning_tokens": 5}}
READ = Usage(input_tokens=30, output_tokens=12, total_tokens=42, reasoning_tokens=5)
ZERO = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}  # what a batch tells of itself when it begins
RUN_USAGE = {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}
RUN_READ = Usage(input_tokens=30, output_tokens=12, total_tokens=42)

needs_responses = pytest.mark.skipif(
    not shapes.SDK["responses API"], reason=f"openai {openai.__version__} has no responses API"
)


def response(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "status": status, "model": "gpt-5-2025-08-07", "background": True,
            "output": [], "usage": USAGE if status in ("completed", "incomplete") else None, **more}  # fmt: skip


def run(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "run_1", "object": "thread.run", "status": status, "model": "gpt-4o", "thread_id": "t_1",
            "usage": RUN_USAGE if status == "completed" else None, **more}  # fmt: skip


def batch(status: str, **more: Any) -> dict[str, Any]:
    return {"id": "batch_1", "object": "batch", "status": status, "endpoint": "/v1/responses", "model": "gpt-5",
            "usage": USAGE if status == "completed" else ZERO, **more}  # fmt: skip


def replies(*bodies: Any) -> Any:
    """A transport that gives these answers in turn: a JSON body, or a list of events."""
    answers = []
    for body in bodies:
        kind = "text/event-stream" if isinstance(body, list) else "application/json"
        answers.append((200, kind, [sse(*body) if isinstance(body, list) else json.dumps(body).encode()]))
    return shapes.serving(*answers)[0]


async def drained(stream: Any, stop_after: int | None = None) -> None:
    read = 0
    async for _ in shapes.each(stream):
        read += 1
        if read == stop_after:
            break
    await settle(stream.close())


BACKGROUND = {"background": True}  # no argument of the first SDKs that have responses


async def begin_response(client: Any) -> None:
    await settle(client.responses.create(model="gpt-5", input="hi", extra_body=BACKGROUND))


async def begin_streamed_response(client: Any) -> None:
    await drained(
        await settle(client.responses.create(model="gpt-5", input="hi", extra_body=BACKGROUND, stream=True)), 1
    )


async def read_response(client: Any) -> None:
    await settle(client.responses.retrieve("resp_1"))


async def read_raw_response(client: Any) -> None:
    await settle(client.responses.with_raw_response.retrieve("resp_1"))


async def begin_run(client: Any) -> None:
    await settle(client.beta.threads.runs.create(thread_id="t_1", assistant_id="a_1"))


async def begin_thread_and_run(client: Any) -> None:
    await settle(client.beta.threads.create_and_run(assistant_id="a_1"))


async def read_run(client: Any) -> None:
    await settle(client.beta.threads.runs.retrieve("run_1", thread_id="t_1"))


async def list_runs(client: Any) -> None:
    await settle(client.beta.threads.runs.list("t_1"))


async def hand_in(client: Any) -> None:
    await settle(client.beta.threads.runs.submit_tool_outputs("run_1", thread_id="t_1", tool_outputs=[]))


async def begin_batch(client: Any) -> None:
    await settle(client.batches.create(input_file_id="f", endpoint="/v1/responses", completion_window="24h"))


async def read_batch(client: Any) -> None:
    await settle(client.batches.retrieve("batch_1"))


async def list_batches(client: Any) -> None:
    await settle(client.batches.list())


STARTED = [{"type": "response.created", "sequence_number": 0, "response": response("queued")},
           {"type": "response.in_progress", "sequence_number": 1, "response": response("in_progress")}]  # fmt: skip
PAGE = {"object": "list", "has_more": False}
# name, begin, its answer, read, what the reads answer in turn, operation, status, usage
CASES = [
    ("response", begin_response, response("queued"), read_response,
     [response("in_progress"), response("completed"), response("completed")], "responses", "ok", READ),
    ("raw", begin_response, response("queued"), read_raw_response,
     [response("in_progress"), response("completed"), response("completed")], "responses", "ok", READ),
    ("streamed", begin_streamed_response, STARTED, read_response,
     [response("in_progress"), response("completed"), response("completed")], "responses", "ok", READ),
    ("failed", begin_response, response("queued"), read_response,
     [response("failed", error={"code": "server_error", "message": "no"}), response("failed")], "responses", "error",
     None),
    ("cancelled", begin_response, response("queued"), read_response, [response("cancelled")], "responses", "cancelled",
     None),
    ("run", begin_run, run("queued"), read_run, [run("in_progress"), run("completed"), run("completed")],
     "threads.runs", "ok", RUN_READ),
    ("thread and run", begin_thread_and_run, run("queued"), list_runs,
     [{**PAGE, "data": [run("in_progress")]}, {**PAGE, "data": [run("completed")]}], "threads.runs", "ok", RUN_READ),
    ("tool outputs", begin_run, run("requires_action"), hand_in, [run("queued"), run("completed")], "threads.runs",
     "ok", RUN_READ),
    ("expired", begin_run, run("queued"), read_run, [run("expired")], "threads.runs", "error", None),
    ("batch", begin_batch, batch("validating"), read_batch,
     [batch("in_progress"), batch("finalizing"), batch("completed"), batch("completed")], "batches", "ok", READ),
    ("partial", begin_response, response("queued"), read_response,
     [response("in_progress", usage={**ZERO, "input_tokens": 5}), response("completed")], "responses", "ok", READ),
    ("expired batch", begin_batch, batch("validating"), read_batch, [batch("expired", usage=USAGE)], "batches",
     "incomplete", READ),
    ("empty batch", begin_batch, batch("validating"), read_batch, [batch("cancelled")], "batches", "cancelled",
     Usage(input_tokens=0, output_tokens=0, total_tokens=0)),
    ("batches", begin_batch, batch("validating"), list_batches,
     [{**PAGE, "data": [batch("completed", id="batch_other"), batch("completed")]}], "batches", "ok", READ),
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("begin", "first", "read", "later", "operation", "status", "usage"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_counted_once_for_who_began_it(begin, first, read, later, operation, status, usage, mode, instrument):
    """However often an answer is read, and by whom: one message, with its usage, for the customer who began it."""
    resource = {"responses": "responses", "batches": "batches"}.get(operation, "beta")
    if not hasattr(openai.OpenAI(api_key="x"), resource):
        pytest.skip(f"openai {openai.__version__} has no {resource}")
    ledger = instrument()

    async def act() -> None:
        async with client_of(mode, base_url=BASE_URL, transport=replies(first, *later)) as client:
            with usage_context("acme", conversation_id="c-1"):
                await begin(client)
            assert ledger.messages() == []
            for _ in later:
                with usage_context("the poller"):
                    await read(client)

    running(mode)(act())
    message = ledger.message()
    assert (message.operation, message.status, message.usage) == (operation, status, usage)
    assert (message.key, message.conversation_id) == ("acme", "c-1")
    assert message.response_id == first["id"] if isinstance(first, dict) else "resp_1"
    assert not list((ledger.journal / deferred.FOLDER).iterdir())


@needs_responses
@pytest.mark.parametrize("mode", MODES)
def test_resumed_stream(mode, instrument):
    """A background response whose stream broke off is counted when a second stream reads it to its end."""
    ledger = instrument()
    rest = [{"type": "response.completed", "sequence_number": 2, "response": response("completed")}]

    async def act() -> None:
        async with client_of(mode, base_url=BASE_URL, transport=replies(STARTED, rest)) as client:
            with usage_context("acme"):
                await begin_streamed_response(client)
            await drained(await settle(client.get("/responses/resp_1?stream=true&starting_after=1", cast_to=object,
                                                  stream=True, stream_cls=stream_class(client))))  # fmt: skip

    def stream_class(client: Any) -> Any:
        return (openai.AsyncStream if isinstance(client, openai.AsyncOpenAI) else openai.Stream)[object]

    running(mode)(act())
    message = ledger.message()
    assert (message.key, message.status, message.usage) == ("acme", "ok", READ)


@needs_responses
def test_a_stream_that_is_left_is_not_background(instrument):
    """A response that is not made in the background ends with its stream: incomplete, and at once."""
    ledger = instrument()
    started = [{**event, "response": {**event["response"], "background": False}} for event in STARTED]

    async def act() -> None:
        async with client_of("sync", base_url=BASE_URL, transport=replies(started)) as client:
            await drained(client.responses.create(model="gpt-5", input="hi", stream=True), 1)

    shapes.run(act())
    assert ledger.message().status == "incomplete"


@needs_responses
def test_reads_of_what_we_did_not_see_begin(instrument):
    """A read alone is no message, whatever usage it shows."""
    ledger = instrument()

    async def act() -> None:
        async with client_of("sync", base_url=BASE_URL, transport=replies(response("completed"))) as client:
            for _ in range(3):
                await read_response(client)

    shapes.run(act())
    assert ledger.messages() == []


def begun_for_acme() -> None:
    """A background response is asked for."""

    async def act() -> None:
        async with client_of("sync", base_url=BASE_URL, transport=replies(response("queued"))) as client:
            with usage_context("acme"):
                await begin_response(client)

    shapes.run(act())


READER = """
import asyncio, json, sys
import spryng_instrument
from tests import shapes
from tests.test_deferred import BASE_URL, read_response, replies, response

spryng_instrument.instrument(destination=sys.argv[1], on_missing_key="ignore")

async def act():
    async with shapes.client_of("sync", base_url=BASE_URL, transport=replies(response("completed"))) as client:
        print("ready", flush=True)
        sys.stdin.readline()
        await read_response(client)

shapes.run(act())
"""


@needs_responses
def test_other_processes_complete_it(instrument):
    """Four processes read the finished answer of a fifth at once: one message."""
    ledger = instrument()
    begun_for_acme()
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, ledger.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         text=True)
        for _ in range(4)
    ]  # fmt: skip
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    for reader in readers:
        reader.communicate(timeout=150)
        assert reader.returncode == 0
    message = ledger.message()
    assert (message.key, message.usage) == ("acme", READ)
    assert not (ledger.journal / "set-aside").exists()


@needs_responses
def test_never_read(instrument):
    """An answer that nobody reads for a week is a message without usage: it was asked for, and is not forgotten."""
    ledger = instrument()
    begun_for_acme()
    spryng_instrument.uninstrument()
    [waiting] = (ledger.journal / deferred.FOLDER).iterdir()
    instrument()
    assert ledger.messages() == []
    spryng_instrument.uninstrument()
    long_ago = time.time() - deferred.KEPT_S - 1
    os.utime(waiting, (long_ago, long_ago))
    instrument()
    message = ledger.message()
    assert (message.key, message.status, message.usage) == ("acme", "ok", None)
    assert not waiting.exists()


@needs_responses
def test_never_read_and_never_restarted(instrument, monkeypatch):
    """So it is in a process that lives for months: it looks every hour."""
    ledger = instrument()
    begun_for_acme()
    [waiting] = (ledger.journal / deferred.FOLDER).iterdir()
    os.utime(waiting, (1, 1))
    monkeypatch.setattr(pump, "HOUR_S", 0.0)
    spryng_instrument.track_usage(key="globex", operation="custom")
    deadline = time.monotonic() + 20
    while waiting.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {message.key: message.usage for message in ledger.messages()} == {"acme": None, "globex": None}


@needs_responses
def test_a_disk_that_takes_nothing(instrument, monkeypatch):
    """Where the wait cannot be kept, the message is recorded without usage rather than not at all."""
    ledger = instrument()
    (ledger.journal / deferred.FOLDER).write_text("in the way")
    begun_for_acme()
    message = ledger.message()
    assert (message.key, message.usage, message.response_id) == ("acme", None, "resp_1")


def test_damaged_files_are_left_alone(tmp_path):
    """A file that is no message is not taken for one, nor removed."""
    store = deferred.Deferred(tmp_path)
    store.folder.mkdir()
    store._path("resp_1").write_bytes(b"{")
    assert store.completed("resp_1", Reading(response_id="resp_1", usage=READ)) is None
    assert list(store.overdue(-1)) == []
    assert store.count == 1


def turn(number: int, status: str = "completed", **more: Any) -> dict[str, Any]:
    return {"id": f"turn_{number}", "object": "agent.session.turn", "session_id": "sess_1", "status": status,
            "agent_id": "agent_1", "created_at": 1_800_000_000 + number, "usage": USAGE, **more}  # fmt: skip


def turn_event(number: int, kind: str = "completed") -> dict[str, Any]:
    ended = turn(number, kind, usage=None)
    return {"type": f"agent.session.turn.{kind}", "event_id": f"e{number}", "session_id": "sess_1",
            "turn_id": ended["id"], "turn": ended, "usage": USAGE}  # fmt: skip


SESSION = {
    "id": "sess_1",
    "object": "agent.session",
    "status": "in_progress",
    "usage": None,
    "agent": {"model": "gpt-5"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("status", ["idle", "in_progress"])
def test_each_turn_of_an_agent_is_a_message(status, mode, instrument):
    """Each turn is one message of whoever created the session, seen in a stream, a list or alone, and however often."""
    if not hasattr(openai.OpenAI(api_key="x").beta, "agents"):
        pytest.skip(f"openai {openai.__version__} has no agents")
    ledger = instrument()
    created = {"type": "agent.session.created", "event_id": "e0", "session": {**SESSION, "status": status}}
    answers = replies(
        [created, {"type": "agent.session.turn.created", "turn": turn(1, "queued")}, turn_event(1)],
        [turn_event(1), turn_event(2), turn_event(3, "failed")],
        {"object": "list", "data": [turn(1), turn(2), turn(4, "in_progress"), turn(5)]},
        turn(5),
        {**SESSION, "usage": {"input_tokens": 999, "output_tokens": 999, "total_tokens": 1998}},
    )

    async def act() -> None:
        async with client_of(mode, base_url=BASE_URL, transport=answers) as client:
            sessions = client.beta.agents.sessions
            with usage_context("acme"):
                stream = await settle(
                    sessions.create(agent_id="agent_1", environment={"type": "none"}, input="hi", stream=True)
                )
                await drained(stream)
            with usage_context("the reader"):
                await drained(await settle(sessions.events.stream("sess_1")))
                await settle(sessions.turns.list("sess_1"))
                await settle(sessions.turns.retrieve("turn_5", session_id="sess_1"))
                await settle(sessions.retrieve("sess_1"))

    running(mode)(act())
    turns = {message.response_id: message for message in ledger.messages()}
    assert sorted(turns) == ["turn_1", "turn_2", "turn_3", "turn_5"]
    assert len({message.id for message in turns.values()}) == 4
    for name, message in turns.items():
        assert (message.key, message.operation, message.usage) == ("acme", "agents.turns", READ)
        assert message.status == ("error" if name == "turn_3" else "ok")


def test_turns_read_by_another_process_are_the_same(instrument):
    """Two processes that see a turn end make the same message: a duplicate for the ledger, no conflict."""
    ledger = instrument()
    recorder = recording.active
    session = Message(new_id(), datetime.now(timezone.utc), "agents.sessions", key="acme", response_id="sess_1")
    recorder.defer(session)
    recorder.settle_turn(turn(1))
    recorder._turns.clear()  # as another process would begin
    recorder.settle_turn(turn(1))
    assert ledger.message().key == "acme"
    assert not (ledger.journal / "set-aside").exists()
    # A session of which a turn was recorded owes nothing when its time is over.
    assert [owed for _, owed in recorder.deferred.overdue(-1)] == [None]


@needs_responses
@pytest.mark.parametrize("way", ["poll", "resume", "close first"])
def test_a_stream_that_is_still_held(way, instrument):
    """A background response is counted when another read shows its end, though its own stream was never closed."""
    ledger = instrument()
    rest = [{"type": "response.completed", "sequence_number": 2, "response": response("completed")}]
    answers = replies(STARTED, rest if way == "resume" else response("completed"), response("completed"))

    async def act() -> None:
        async with client_of("sync", base_url=BASE_URL, transport=answers) as client:
            with usage_context("acme"):
                stream = client.responses.create(model="gpt-5", input="hi", extra_body=BACKGROUND, stream=True)
            for _ in stream:
                break
            if way == "close first":
                stream.response.close()
            if way == "resume":
                await drained(client.get("/responses/resp_1?stream=true", cast_to=object, stream=True,
                                         stream_cls=openai.Stream[object]))  # fmt: skip
            else:
                await read_response(client)
            assert ledger.message().usage == READ
            stream.response.close()
            await read_response(client)

    shapes.run(act())
    message = ledger.message()
    assert (message.key, message.status, message.usage) == ("acme", "ok", READ)
    assert not list((ledger.journal / deferred.FOLDER).iterdir())


@needs_responses
def test_read_as_a_response_of_http(instrument):
    """A read that asks for the HTTP response itself completes the message too."""
    ledger = instrument()

    async def act() -> None:
        transport = replies(response("queued"), response("completed"))
        async with client_of("sync", base_url=BASE_URL, transport=transport) as client:
            with usage_context("acme"):
                await begin_response(client)
            client.get("/responses/resp_1", cast_to=shapes.http.Response)

    shapes.run(act())
    assert ledger.message().usage == READ


def test_a_turn_whose_usage_is_told_later(instrument):
    """A turn is recorded when its usage is known, not before."""
    ledger = instrument()
    recorder = recording.active
    recorder.defer(Message(new_id(), datetime.now(timezone.utc), "agents.sessions", key="acme", response_id="sess_1"))
    recorder.settle_turn(turn(1, usage=None, created_at=10**15))
    assert ledger.messages() == []
    recorder.settle_turn(turn(1, created_at=10**15))
    assert ledger.message().usage == READ


def test_what_cannot_be_removed_stops_nothing(instrument, monkeypatch):
    """A file that stays though its message is recorded makes duplicates, which the ledger drops; the others go on."""
    if not hasattr(openai.OpenAI(api_key="x"), "batches"):
        pytest.skip(f"openai {openai.__version__} has no batches")
    ledger = instrument()
    page = {**PAGE, "data": [batch("completed", id=f"batch_{number}") for number in range(3)]}
    begun = [batch("validating", id=f"batch_{number}") for number in range(3)]

    async def act() -> None:
        async with client_of("sync", base_url=BASE_URL, transport=replies(*begun, page, page)) as client:
            with usage_context("acme"):
                for _ in begun:
                    await begin_batch(client)
            with monkeypatch.context() as patched:
                patched.setattr(Path, "unlink", refuse)
                await list_batches(client)
            await list_batches(client)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    shapes.run(act())
    assert [message.usage for message in ledger.messages()] == [READ] * 3
    # At the next start too.
    recording.active.defer(Message(new_id(), datetime.now(timezone.utc), "batches", response_id="batch_9"))
    spryng_instrument.uninstrument()
    [waiting] = (ledger.journal / deferred.FOLDER).iterdir()
    os.utime(waiting, (1, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        instrument()
    assert [thread.name for thread in threading.enumerate()].count("spryng-pump") == 1
    assert len(ledger.messages()) == 4


@needs_responses
def test_a_server_that_repeats_its_ids(instrument):
    """Two calls that are answered with the same id are two messages."""
    ledger = instrument()

    async def act() -> None:
        transport = replies(response("queued"), response("queued"), response("completed"))
        async with client_of("sync", base_url=BASE_URL, transport=transport) as client:
            for customer in ("acme", "bluepeak"):
                with usage_context(customer):
                    await begin_response(client)
            await read_response(client)

    shapes.run(act())
    assert [(message.key, message.usage) for message in ledger.messages()] == [("acme", None), ("bluepeak", READ)]
