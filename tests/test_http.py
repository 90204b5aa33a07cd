"""The destination https://: however requests and answers fail, each message is at the server once, or set aside.

The server is a real one on loopback that is told what to do wrong; the pump, the journal and the processes are ours.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument import pump as pumps
from spryng_instrument.api import MAX_BYTES, MAX_MESSAGES, NO_KEY, message_of
from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.journal import Journal, aside_lines, count_lines
from spryng_instrument.message import Message, Usage, decode, encode, new_id
from spryng_instrument.pump import Pump
from spryng_instrument.store import http as http_store
from spryng_instrument.store import open_destination, open_store, transport
from spryng_instrument.store.http import HttpDestination
from spryng_instrument.store.sqlite import SqliteStore

from .scripted import Reply, Request, ScriptedServer, TrackUsageServer

NOW = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)
KEY = "sk-very-secret"
FULL = os.environ.get("SPRYNG_TEST_FULL") == "1"


class End:
    """A Track Usage API, and the way to it."""

    def __init__(self, *, batches: bool = True) -> None:
        self.api = TrackUsageServer(batches=batches)
        self.server = ScriptedServer(self.api)
        self.destination = HttpDestination(self.server.url, KEY)

    def outcomes(self, messages: list[Message], **more: Any) -> list[str]:
        return list(self.destination.record(messages, **more).outcomes)

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.server.requests]

    def close(self) -> None:
        self.destination.close()
        self.server.close()


@pytest.fixture
def end() -> Iterator[End]:
    end = End()
    yield end
    end.close()


@pytest.fixture
def seed() -> Iterator[End]:
    """A server that has no batch endpoint."""
    end = End(batches=False)
    yield end
    end.close()


def message(**fields: Any) -> Message:
    fields = {"id": new_id(), "key": "acme", "operation": "custom", "usage": Usage(input_tokens=7), **fields}
    return Message(timestamp=NOW, **fields)


# --- what is sent, and what an answer means


def test_a_message_arrives_unchanged(end: End) -> None:
    """What a server reads of a request is the message that was recorded, to the last field."""
    sent = message(tags=("a",), conversation_id="c", properties={"plan": "pro"}, writer="w", sequence=3, key=None)

    assert end.outcomes([sent]) == ["recorded"]
    [request] = end.server.requests
    [item] = json.loads(request.body)["messages"]
    assert message_of(json.dumps(item).encode(), NOW)[0] == sent
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert end.outcomes([sent]) == ["duplicate"]


def test_outcomes_are_per_message(end: End) -> None:
    """Recorded, duplicate, conflict and refused stand in the order of the messages, with their reasons."""
    there, other, odd, new = (message() for _ in range(4))
    end.outcomes([there, other])
    end.api.refuses = {odd.id}

    receipt = end.destination.record([new, there, message(id=other.id, key="else"), odd])

    assert receipt.outcomes == ("recorded", "duplicate", "conflict", "refused")
    assert receipt.reasons == {odd.id: "key='x' is odd"}


def test_connections_are_reused_and_bodies_compressed(end: End) -> None:
    """Batches of one process go through one connection; those over 1 kB are compressed."""
    for count in (1, 50, 2, 80):
        end.outcomes([message() for _ in range(count)])

    assert end.server.connections == 1
    assert [request.headers.get("content-encoding") for request in end.server.requests] == [None, "gzip"] * 2
    assert int(end.server.requests[-1].headers["content-length"]) < len(end.server.requests[-1].body) / 4


def test_a_server_that_cannot_unpack_is_sent_plain(end: End) -> None:
    """415 for a compressed body: the same is sent without, then and from then on."""
    end.api.script = ["415"]
    assert end.outcomes([message() for _ in range(50)]) == ["recorded"] * 50
    assert end.outcomes([message() for _ in range(50)]) == ["recorded"] * 50

    assert [request.headers.get("content-encoding") for request in end.server.requests] == ["gzip", None, None]


def test_batches_stay_within_the_limits(end: End) -> None:
    """No request has more messages or bytes than the API allows; a message that is too large alone is refused."""
    many = [message() for _ in range(MAX_MESSAGES + 1)]
    large = [message(query="x" * (MAX_BYTES // 3)) for _ in range(4)]
    huge = message(query="x" * MAX_BYTES)

    assert end.outcomes(many, timeout_s=30) == ["recorded"] * len(many)
    receipt = end.destination.record([*large, huge], timeout_s=30)

    assert receipt.outcomes == ("recorded",) * 4 + ("refused",)
    assert "5000000 are allowed" in receipt.reasons[huge.id]
    assert max(len(request.body) for request in end.server.requests) <= MAX_BYTES
    assert set(end.api.times.values()) == {1}


def test_413_halves_and_is_remembered(end: End) -> None:
    """What is too large for this server goes in halves; the next batch is not tried whole again."""
    end.api.takes = 10
    assert end.outcomes([message() for _ in range(40)]) == ["recorded"] * 40
    before = len(end.server.requests)
    assert end.outcomes([message() for _ in range(20)]) == ["recorded"] * 20

    assert len(end.server.requests) - before == 2
    end.api.takes = 0
    receipt = end.destination.record([too_large := message()])
    assert receipt.outcomes == ("refused",)
    assert receipt.reasons[too_large.id] == "413 too many"


@pytest.mark.parametrize(("status", "outcome"), [("400", "refused"), ("422", "refused"), ("409", "conflict")])
def test_the_bad_one_of_a_batch_is_found(end: End, status: str, outcome: str) -> None:
    """A batch refused as a whole is halved until the message that is wrong stands alone: only that one is refused."""
    batch = [message(query=f"{number}") for number in range(9)]
    usual = end.api

    def answer(request: Request) -> Reply:
        if batch[5].id.encode() in request.body:
            return Reply(int(status), b'{"error": {"field": "query", "message": "is odd"}}')
        return usual(request)

    end.server.answer = answer
    receipt = end.destination.record(batch)

    assert receipt.outcomes == ("recorded",) * 5 + (outcome,) + ("recorded",) * 3
    assert receipt.reasons == {batch[5].id: f"{status} is odd"}


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("401", "does not accept the API key. Set api_key or SPRYNG_API_KEY"),
        ("403", "may not send messages"),
        ("404", "Correct the destination's URL"),
        ("412", "it is older than this process, and would lose a part of these messages. Update it"),
        ("429", "asked too often"),
        ("500", "answered 500"),
        ("402", "answered 402"),
        ("moved", "it has moved to http://127.0.0.1:9/login."),
        ("page", "web page"),
        ("few", "0 results for 1 messages"),
        ("others", "another"),
        ("unknown", "queued"),
        ("nothing", "gave no answer"),
        ("half", "gave no answer"),
        ("lost", "gave no answer"),
    ],
)
def test_anything_else_holds_messages(end: End, status: str, says: str) -> None:
    """Whatever is not the contract's word for it acknowledges nothing: a StoreError that says what to do."""
    end.api.script = [status]
    if status == "404":
        end.api.script, end.server.answer = [], lambda request: Reply(404)

    with pytest.raises(StoreError) as failed:
        end.destination.record([message()])

    assert says in str(failed.value)
    assert "127.0.0.1" in str(failed.value)
    assert KEY not in str(failed.value)
    assert "secret" not in str(failed.value)


def test_the_key_is_in_no_error(end: End, caplog: pytest.LogCaptureFixture) -> None:
    """A server that repeats the key, a key that is no header, a closed port: no error and no log shows it."""
    caplog.set_level(logging.DEBUG)
    end.server.answer = lambda request: Reply(401, request.headers["authorization"].encode())
    with pytest.raises(StoreError) as failed:
        end.destination.record([message()])
    assert "(the API key)" in str(failed.value)

    with pytest.raises(SettingsError) as odd:
        HttpDestination(end.server.url, f"{KEY}\n")
    end.server.close()
    with pytest.raises(StoreError) as refused:
        end.destination.record([message()])

    assert all(KEY not in str(each.value) for each in (failed, odd, refused))
    assert KEY not in caplog.text


def test_no_key_in_the_url() -> None:
    """A query, which would be logged, is refused without being shown."""
    with pytest.raises(SettingsError, match="api_key") as failed:
        HttpDestination("https://usage.example.com/?key=secret", None)
    assert "secret" not in str(failed.value)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("in half an hour", 1000, 1800),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 0),
        ("99999999999999999999", 3600, 3600),
    ],
    ids=["seconds", "date", "past", "long"],
)
def test_retry_after(end: End, header: str, low: float, high: float) -> None:
    """Retry-After is read as seconds and as a date, and is believed for an hour at most."""
    if header == "in half an hour":
        header = format_datetime(datetime.now(timezone.utc) + timedelta(hours=0.5), usegmt=True)
    end.server.answer = lambda request: Reply(503, b"", {"retry-after": header})
    with pytest.raises(StoreError) as failed:
        end.destination.record([message()])
    assert failed.value.retry_after_s is not None
    assert low <= failed.value.retry_after_s <= high


@pytest.mark.parametrize("header", ["soon", "-1", "", "१"])
def test_a_retry_after_that_says_nothing(end: End, header: str) -> None:
    """One that cannot be read is as none."""
    end.server.answer = lambda request: Reply(429, b"", {"retry-after": header.encode().decode("latin-1")})
    with pytest.raises(StoreError) as failed:
        end.destination.record([message()])
    assert failed.value.retry_after_s is None


@pytest.mark.timeout(30)
def test_dripping_and_silent_servers_do_not_hang(end: End) -> None:
    """The timeout is for the whole call, also where each byte of the answer comes in time, or none ever."""
    end.outcomes([message()])  # on a connection that is there already, and on a new one
    for _ in range(2):
        end.api.script = ["drip"]
        with pytest.raises(StoreError, match="gave no answer"):
            end.destination.record([message()], timeout_s=0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        destination = HttpDestination(f"http://127.0.0.1:{silent.getsockname()[1]}", None)
        with pytest.raises(StoreError, match="Timeout"):
            destination.record([message()], timeout_s=0.2)
        destination.close()


def test_closed_and_used_again(end: End) -> None:
    """close() lets go of connections; the next call makes new ones."""
    end.outcomes([message()])
    end.destination.close()
    end.destination.close()
    assert end.outcomes([message()]) == ["recorded"]
    assert end.server.connections == 2


def test_a_forked_child_has_its_own_connection(end: End) -> None:
    """A child delivers through a connection that it made, and leaves the parent's as it is."""
    end.outcomes([message()])
    pid = os.fork()
    if not pid:
        try:
            fine = end.outcomes([message()]) == ["recorded"]
            end.destination.close()
            os._exit(0 if fine else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert end.outcomes([message()]) == ["recorded"]
    assert end.server.connections == 2


# --- servers of the seed's API


def test_without_a_batch_endpoint(seed: End) -> None:
    """It is found out once; then each message is a request in the seed's own words."""
    first, second = message(key=None, writer="w"), message(usage=Usage(input_tokens=3, output_tokens=4))

    assert seed.outcomes([first]) == ["recorded"]
    assert seed.outcomes([second]) == ["recorded"]

    assert seed.paths == ["/trackUsage/batch", "/trackUsage", "/trackUsage"]
    one, two = (json.loads(request.body) for request in seed.server.requests[1:])
    assert one["key"] == NO_KEY
    assert "writer" not in one
    assert two["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert (two["key"], two["messageId"]) == ("acme", second.id)


def test_the_batch_endpoint_is_looked_for_again(seed: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an hour the server may have learned batches."""
    seed.outcomes([message()])
    seed.api.batches = True
    later = time.monotonic() + transport.LOOK_AGAIN_S + 1
    monkeypatch.setattr(http_store.time, "monotonic", lambda: later)
    assert seed.outcomes([message(), message()]) == ["recorded"] * 2
    assert seed.paths[2:] == ["/trackUsage/batch"]


@pytest.mark.parametrize("body", [b"", b"OK", b'{"anything": 1}', b'"yes"'])
def test_any_answer_of_a_seed_server_counts(seed: End, body: bytes) -> None:
    """The seed promises nothing of the body of a 200."""
    seed.server.answer = lambda request: Reply(404 if "batch" in request.path else 200, body)
    assert seed.outcomes([message()]) == ["recorded"]


def test_what_was_acknowledged_is_not_sent_again(seed: End) -> None:
    """Where a call fails halfway, the next one goes on there; what the server refused or has otherwise is final."""
    batch = [message() for _ in range(6)]
    seed.outcomes([message()])
    seed.api.refuses = {batch[1].id}
    seed.api.kept[batch[2].id] = "another"
    seed.api.script = ["ok", "ok", "ok", "ok", "500"]
    with pytest.raises(StoreError):
        seed.destination.record(batch)

    assert seed.outcomes(batch) == ["duplicate", "refused", "conflict", "duplicate", "recorded", "recorded"]
    assert set(seed.api.times.values()) == {1}


def test_acknowledgements_do_not_grow_for_ever(seed: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more ids are remembered than the limit."""
    monkeypatch.setattr(http_store, "REMEMBERED", 3)
    seed.outcomes([message() for _ in range(8)])
    assert len(seed.destination._acknowledged) == 3


# --- with the pump: exactly once

TROUBLE = [
    "ok",
    "lost",
    "half",
    "nothing",
    "500",
    "429",
    "503",
    "401",
    "403",
    "page",
    "moved",
    "few",
    "others",
    "unknown",
]


@settings(max_examples=60 if FULL else 25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.sampled_from(TROUBLE), max_size=12), batches=st.booleans(), takes=st.sampled_from([1, 3, 10**9]),
    bad=st.sets(st.integers(0, 11)), restart=st.booleans(),
)  # fmt: skip
def test_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, script: list[str], batches: bool, takes: int, bad: set[int], restart: bool
) -> None:
    """Whatever answers come in whatever order, each message ends once at the server, or set aside with its reason."""
    folder = tmp_path_factory.mktemp("journal")
    end = End(batches=batches)
    end.api.script, end.api.takes = list(script), takes
    messages = [message() for _ in range(12)]
    end.api.refuses = {messages[number].id for number in bad}
    journal = Journal(folder, memory_limit=0, wake=lambda: None)
    try:
        pump = Pump(journal, end.destination, beat_s=0)
        for number, each in enumerate(messages):
            journal.append(encode(each) + b"\n")
            if number % 4 == 3:
                pump.flush(0)
            if number == 7 and restart:
                end.destination.close()
                pump.destination = end.destination = HttpDestination(end.server.url, KEY)
        assert any(pump.flush(0.1) for _ in range(200)), pump.failure
    finally:
        journal.close()
        end.close()

    aside = {decode(line).id for path in aside_lines(folder) for line in Path(path).read_bytes().splitlines()}
    assert aside == end.api.refuses
    assert set(end.api.kept) == {each.id for each in messages} - aside
    assert count_lines(folder) == 0
    assert (pump.delivered, pump.set_aside) == (12 - len(aside), len(aside))


def test_the_endpoint_goes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While nobody listens messages wait, which is said once; when the server is back they are delivered."""
    api = TrackUsageServer()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spryng_instrument.instrument(
        destination=f"http://127.0.0.1:{port}", api_key=KEY, journal=str(tmp_path / "journal"), beat_s=0.01,
        exit_timeout_s=0.3,
    )  # fmt: skip
    ids = {spryng_instrument.track_usage(key="k", usage={"prompt_tokens": 1, "completion_tokens": 1}) for _ in range(9)}
    assert not spryng_instrument.flush(0.3)
    assert spryng_instrument.stats().waiting == 9

    server = ScriptedServer(api, port)
    try:
        deadline = time.monotonic() + 30
        while spryng_instrument.stats().waiting and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        spryng_instrument.uninstrument()
        server.close()
    assert set(api.kept) == ids
    assert caplog.text.count("messages wait in the journal") == 1
    assert KEY not in caplog.text


def test_retry_after_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pump waits for at least as long as it is asked to, and with jitter otherwise."""
    journal = Journal(tmp_path, memory_limit=0, wake=lambda: None)
    pump = Pump(journal, HttpDestination("http://127.0.0.1:9", None), beat_s=1)
    journal.close()
    pump.failure = StoreError("busy", retry_after_s=70)
    assert 70 <= pump._wait_s(0.0, 1, 30)[0] <= 77

    pump.failure = StoreError("down")
    grown, waits = 0.0, []
    for _ in range(8):
        wait, grown = pump._wait_s(grown, 1, pumps.LONGEST_WAIT_S)
        assert grown / 2 <= wait <= grown
        waits.append(grown)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_flush_does_not_hammer(end: End, tmp_path: Path) -> None:
    """A flush that a server asks to wait tries again when its own time is over, and not before."""
    end.server.answer = lambda request: Reply(429, b"", {"retry-after": "60"})
    journal = Journal(tmp_path, memory_limit=0, wake=lambda: None)
    journal.append(encode(message()) + b"\n")
    assert not Pump(journal, end.destination, beat_s=0).flush(0.5)
    journal.close()
    assert len(end.server.requests) <= 2  # the second when its time is over


@pytest.mark.parametrize("batches", [True, False])
def test_killed_while_delivering(tmp_path: Path, batches: bool) -> None:
    """Processes killed with SIGKILL at the moment the server has their batch lose and double nothing."""
    api = TrackUsageServer(batches=batches)
    arrived = threading.Event()

    def answer(request: Request) -> Reply:
        reply = api(request)
        if request.path == "/trackUsage/batch" and not batches:
            return reply
        arrived.set()  # what it brought is kept, and the answer is on its way when the kill comes
        return reply

    server = ScriptedServer(answer)
    code = (
        "import sys, time, spryng_instrument as s\n"
        "s.instrument(destination=sys.argv[1], journal=sys.argv[2], beat_s=0.005)\n"
        "while True:\n"
        "    time.sleep(0.001)\n"
        "    print(s.track_usage(key='k', usage={'prompt_tokens': 1, 'completion_tokens': 1}), flush=True)\n"
    )
    returned: list[str] = []
    try:
        for _ in range(4):
            arrived.clear()
            process = subprocess.Popen(
                [sys.executable, "-c", code, server.url, str(tmp_path / "journal")], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            )  # fmt: skip
            assert process.stdout
            returned += [process.stdout.readline().strip() for _ in range(20)]
            assert arrived.wait(60)
            process.send_signal(signal.SIGKILL)
            returned += process.stdout.read().split()
            assert process.wait() == -signal.SIGKILL
            process.stdout.close()
        destination = HttpDestination(server.url, None)
        pumps.deliver_orphans(tmp_path / "journal", destination, timeout_s=60)
        destination.close()
    finally:
        server.close()
    printed = {line for line in returned if len(line) == 36}  # the kill may cut the last one off
    assert len(printed) >= 80
    assert printed <= set(api.kept)
    assert len(set(api.kept) - printed) <= 4 * 2  # recorded, and killed before they could be printed
    assert count_lines(tmp_path / "journal") == 0


def test_our_own_server(tmp_path: Path) -> None:
    """`spryng serve` takes what this destination sends: recorded, then duplicate; a conflict; back unchanged."""
    path = tmp_path / "usage.db"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "spryng_instrument", "serve", "--port", str(port), "--destination", f"sqlite:///{path}"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    destination = HttpDestination(f"http://127.0.0.1:{port}/", None)
    batch = [message(query="x" * number, writer="w", sequence=number + 1, key=None) for number in range(300)]
    try:
        deadline = time.monotonic() + 40
        while True:
            try:
                destination.check()
                break
            except StoreError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert destination.record(batch).count("recorded") == 300
        assert destination.record(batch).count("duplicate") == 300
        assert destination.record([message(id=batch[0].id, key="else")]).outcomes == ("conflict",)
    finally:
        destination.close()
        process.terminate()
        process.wait(120)
    kept = [row.message for row in SqliteStore(path, create=False).messages(limit=1000).rows]
    assert sorted(kept, key=lambda each: each.sequence or 0) == batch


def test_write_only() -> None:
    """Such a destination can be delivered to and not be read."""
    assert isinstance(open_destination("https://usage.example.com", KEY), HttpDestination)
    with pytest.raises(SettingsError, match="cannot be read"):
        open_store("https://usage.example.com")
