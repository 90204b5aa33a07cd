"""The destination cloudevents+https://: what it posts is CloudEvents, by the vendors' own words, each message once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import count
from typing import Any

import pytest
from cloudevents.http import from_json
from openmeter.models import Event

from spryng_instrument.api import NO_KEY
from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store import open_destination, open_store
from spryng_instrument.store.cloudevents import CloudEventsDestination

from .scripted import Reply, Request, ScriptedServer

NOW = datetime(2026, 11, 22, 12, 0, 0, 250000, tzinfo=timezone.utc)


class Collector:
    """It keeps events by source and id, as OpenMeter does, and answers 204."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, str], Any] = {}
        self.bad: set[str] = set()
        self.script: list[Reply] = []
        self.server = ScriptedServer(self.answer)
        self.destination = CloudEventsDestination(f"{self.server.url}/api/v1/events", "secret")

    def answer(self, request: Request) -> Reply:
        reply = self.script.pop(0) if self.script else Reply(204)
        batch = json.loads(request.body)
        if any(event["id"] in self.bad for event in batch):
            return Reply(400, b'{"title": "Bad Request", "detail": "subject is odd"}')
        if reply.status < 300:
            self.events |= {(event["source"], event["id"]): event for event in batch}
        return reply


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.destination.close()
    collector.server.close()


def message(**fields: Any) -> Message:
    fields = {"id": new_id(), "key": "acme", "operation": "chat.completions", "timestamp": NOW, **fields}
    return Message(**fields)


def test_an_event_says_what_the_message_does(collector: Collector) -> None:
    """Numbers are numbers, what was not reported is left out, 0 stays 0."""
    sent = message(
        conversation_id="c", tags=("a", "b"), request_model="gpt", usage=Usage(input_tokens=7, output_tokens=0)
    )
    assert collector.destination.record([sent]).outcomes == ("recorded",)

    [request] = collector.server.requests
    assert request.path == "/api/v1/events"
    assert request.headers["content-type"] == "application/cloudevents-batch+json"
    assert request.headers["authorization"] == "Bearer secret"
    [event] = json.loads(request.body)
    assert event == {
        "specversion": "1.0",
        "id": sent.id,
        "source": "spryng_instrument",
        "type": "spryng.message",
        "subject": "acme",
        "time": "2026-11-22T12:00:00.250000Z",
        "datacontenttype": "application/json",
        "data": {
            "operation": "chat.completions", "status": "ok", "key": "acme", "conversation_id": "c", "tags": ["a", "b"],
            "request_model": "gpt", "model": "gpt", "input_tokens": 7, "output_tokens": 0, "messages": 1,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "sent",
    [
        message(),
        message(key=None, id="any id/ü"),
        message(status="error", error="APITimeoutError", http_status=500),
        message(usage=Usage(seconds=1.5), properties={"plan": "pro", "seats": 3, "trial": False, "none": None}),
        message(tool_usage={"web_search": {"count": 2}}, query="Grüße\n"),
    ],
    ids=["plain", "no key", "failed", "seconds", "tools"],
)
def test_the_vendors_can_read_it(collector: Collector, sent: Message) -> None:
    """The CloudEvents SDK and OpenMeter's SDK read each event of a batch, and find the same in it."""
    collector.destination.record([sent])
    [raw] = json.loads(collector.server.requests[0].body)

    event = from_json(json.dumps(raw))
    assert event["id"] == sent.id
    assert event["subject"] == (sent.key or NO_KEY)
    assert datetime.fromisoformat(event["time"].replace("Z", "+00:00")) == NOW

    read = Event(raw)
    assert (read.id, read.source, read.type, read.specversion) == (
        sent.id,
        "spryng_instrument",
        "spryng.message",
        "1.0",
    )
    assert read.subject == (sent.key or NO_KEY)
    assert read.time == NOW
    assert read.data == raw["data"]
    assert read.data["messages"] == (1 if sent.status == "ok" else 0)


def test_failures_are_no_messages(collector: Collector) -> None:
    """A meter that sums `$.messages` counts what is to be billed."""
    collector.destination.record([message(status=status) for status in ("ok", "error", "incomplete", "cancelled")])
    counted = [event["data"]["messages"] for event in collector.events.values()]
    assert counted == [1, 0, 1, 0]


def test_sent_again_is_the_same_event(collector: Collector) -> None:
    """A batch whose answer was lost is sent again with the same source and ids: it is counted once."""
    batch = [message() for _ in range(5)]
    collector.script = [Reply(204, lost=True), Reply(200, b"cut off in the middle", half=True)]
    for _ in range(2):
        with pytest.raises(StoreError):
            collector.destination.record(batch)
    assert collector.destination.record(batch).outcomes == ("recorded",) * 5
    assert len(collector.events) == 5


@pytest.mark.parametrize("status", [401, 403, 404, 405, 429, 500, 302])
def test_held(collector: Collector, status: int) -> None:
    """Whatever may pass holds the batch back."""
    collector.script = [Reply(status, headers={"retry-after": "9"})]
    with pytest.raises(StoreError) as failed:
        collector.destination.record([message()])
    assert failed.value.retry_after_s == 9
    assert "secret" not in str(failed.value)


def test_a_bad_event_is_refused_alone(collector: Collector) -> None:
    """The one that the collector cannot take is set aside with its reason; the others arrive."""
    batch = [message() for _ in range(8)]
    collector.bad = {batch[2].id}
    receipt = collector.destination.record(batch)
    assert receipt.outcomes == ("recorded",) * 2 + ("refused",) + ("recorded",) * 5
    assert receipt.reasons == {batch[2].id: "400 subject is odd"}
    assert len(collector.events) == 7


def test_write_only() -> None:
    """Such a destination can be delivered to and not be read."""
    url = "cloudevents+https://openmeter.example.com/api/v1/events"
    destination = open_destination(url, "k")
    assert isinstance(destination, CloudEventsDestination)
    assert destination.url == "https://openmeter.example.com/api/v1/events"
    with pytest.raises(SettingsError, match="cannot be read"):
        open_store(url)


@pytest.mark.parametrize("bad", [[0], [37], [5, 6, 63], range(64)], ids=["first", "middle", "some", "all"])
def test_what_is_refused_is_found_in_many_tries(collector: Collector, bad: Sequence[int]) -> None:
    """Where the other end lets us ask twice only before it wants a pause, each try goes on from where the last one
    ended: no more is sent than in one try without pauses, and what was taken is not sent again."""
    batch = [message(key=f"k{number}") for number in range(64)]
    collector.bad = {batch[number].id for number in bad}
    wanted = collector.destination.record(batch).outcomes
    needed = len(collector.server.requests)
    usual = collector.answer
    asked = count(1)
    collector.server.answer = lambda request: Reply(429) if next(asked) % 3 == 0 else usual(request)

    tries = 0
    while True:
        tries += 1
        with suppress(StoreError):
            outcomes = collector.destination.record(batch).outcomes
            break
        assert tries < 200

    assert outcomes == wanted == tuple("refused" if number in bad else "recorded" for number in range(64))
    assert len(collector.server.requests) - needed == needed + tries - 1
    collector.server.answer, again = usual, message()
    assert collector.destination.record([again, *batch[:1]]).outcomes[0] == "recorded"
    assert not collector.destination._settled
