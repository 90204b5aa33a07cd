"""The Track Usage API's JSON: a message goes over the wire unchanged; what cannot be true is refused by name."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from spryng_instrument.api import FUTURE, MAX_TAGS, MAX_TEXT, NO_KEY, message_of, seed_of, wire_of
from spryng_instrument.errors import ApiError, NewerError
from spryng_instrument.message import Message, Usage, decode, encode, new_id

from .messages import anything

NOW = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)


DEEP = '{"a":' * 600 + "1" + "}" * 600


def taken(**fields: Any) -> Message:
    return message_of(msgspec.json.encode({"key": "acme", **fields}), NOW)[0]


@settings(max_examples=200, deadline=None)
@given(anything)
def test_a_message_goes_both_ways(message: Message) -> None:
    """What a process of ours has recorded arrives as it was, a call without a key included."""
    message = decode(encode(message))
    names = ("key", "conversation_id", "request_model", "response_model", "operation")
    texts = {name: (getattr(message, name) or "").strip() or None for name in names}
    message = replace(
        message,
        **{**texts, "operation": texts["operation"] or "custom"},
        tags=tuple(dict.fromkeys(tag for tag in message.tags if tag.strip())),
        timestamp=min(message.timestamp, NOW),
        properties=message.properties or None,
        writer="0123456789abcdef",
    )
    arrived, own_time = message_of(msgspec.json.encode(wire_of(message)), NOW)
    assert arrived == message
    assert own_time


def test_the_seeds_json() -> None:
    """The request of the seed's document is taken by the seed's names."""
    completion = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o-mini-2024-07-18", "choices": [],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }  # fmt: skip
    message = taken(query="what is 2+123123", openAiResponse=completion, conversationId="test123", tags=["a", "b", "a"])
    assert (message.key, message.query, message.conversation_id) == ("acme", "what is 2+123123", "test123")
    assert (message.operation, message.model, message.response_id) == (
        "chat.completions",
        "gpt-4o-mini-2024-07-18",
        "chatcmpl-1",
    )
    assert message.tags == ("a", "b")
    assert message.usage == Usage(input_tokens=9, output_tokens=3, total_tokens=12)
    assert (message.timestamp, message.status) == (NOW, "ok")

    other = taken(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, conversationId="456")
    assert other.usage == Usage(input_tokens=0, output_tokens=0, total_tokens=0)
    assert other.operation == "custom"


def test_the_readmes_of_the_published_clients() -> None:
    """Their examples have a total of 1 for 1 + 1 tokens; it is kept as it was given."""
    assert taken(usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 1}).usage == Usage(1, 1, 1)


def test_a_model_as_a_process_saw_it() -> None:
    """Whatever a gateway calls its model, what was recorded of it is not refused here: that would be lost usage."""
    for model in (" ", "m" * 1000):
        message, _ = message_of(msgspec.json.encode({"key": "a", "writer": "w", "model": model}), NOW)
        assert message.response_model == model


def test_user_is_the_key() -> None:
    """spryngtime-analytics-sdk calls the key `user`; two that contradict are refused."""
    assert message_of(b'{"user": "acme"}', NOW)[0].key == "acme"
    assert message_of(b'{"user": "acme", "key": "acme"}', NOW)[0].key == "acme"
    with pytest.raises(ApiError, match=r"user='b' contradicts key='a'"):
        message_of(b'{"user": "b", "key": "a"}', NOW)


def test_our_own_fields() -> None:
    """Beyond the seed: id, time, latency, model and properties."""
    message = taken(
        messageId="m-1",
        timestamp="2020-01-01T01:00:00+01:00",
        latency=12.5,
        model="m",
        customProperties={"plan": "pro"},
    )
    assert message == Message(
        "m-1", datetime(2020, 1, 1, tzinfo=timezone.utc), "custom", key="acme", latency_ms=12.5, response_model="m",
        properties={"plan": "pro"},
    )  # fmt: skip
    assert taken().id != taken().id


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "body is not JSON"),
        ("[]", "body=[] Expected `object`, got `array`"),
        ('{"key": "a"', "body is not JSON"),
        ("[" * 100_000, "body Expected `object`, got `array`"),
        ('{"query": ' + '{"a":' * 100_000, "query Expected `str | null`, got `object`"),
        ('{"openAiResponse": ' + '{"a":' * 100_000, "body is not JSON"),
        ("{}", "key is required"),
        ('{"key": null}', "key is required"),
        ('{"key": ""}', "key='' must"),
        ('{"key": "  "}', "key='  ' must have 1 to 255"),
        ('{"key": 7}', "key=7 Expected `str | null`, got `int`"),
        (f'{{"key": "{"x" * (MAX_TEXT + 1)}"}}', "not 256"),
        ('{"key": "a", "conversation_id": "c"}', "conversation_id='c' is no field; there are: key, user, query"),
        ('{"key": "a", "tags": ["b", 7]}', "tags[1]=7 Expected `str`"),
        ('{"key": "a", "tags": "b"}', "tags='b' Expected"),
        ('{"key": "a", "tags": [' + '"t",' * MAX_TAGS + '"t"]}', "tags=1001 are too many; 1000 are allowed"),
        ('{"key": "a", "messageId": ""}', "messageId='' must have 1 to 255"),
        ('{"key": "a", "messageId": "a\\u0000b"}', "must have no blanks and no control"),
        ('{"key": "a", "timestamp": "2026-11-22T12:00:00"}', "timestamp='2026-11-22T12:00:00' has no zone"),
        ('{"key": "a", "timestamp": "yesterday"}', "timestamp='yesterday' Invalid RFC3339"),
        ('{"key": "a", "timestamp": "2026-11-22T12:05:01Z"}', "is in the future; it is 2026-11-22T12:00:00+00:00"),
        ('{"key": "a", "latency": -1}', "latency=-1.0 must be between 0"),
        ('{"key": "a", "usage": {"prompt_tokens": -1}}', "prompt_tokens=-1 must not be negative"),
        ('{"key": "a", "usage": {"prompt_tokens": 1.5}}', "prompt_tokens=1.5 must be a whole number"),
        ('{"key": "a", "usage": {"prompt_tokens": 1e400}}', "usage[...] Number out of range"),
        ('{"key": "a", "usage": {"tokens": 1}}', "usage has no field 'tokens'"),
        ('{"key": "a", "timestamp": "0001-01-01T00:00:00+23:00"}', "is before 1970-01-01T00:00:00+00:00"),
        ('{"key": "a", "openAiResponse": {"model": " ", "usage": {"total_tokens": 1}}}', "model=' ' must have 1"),
        ('{"key": "a", "usage": {"prompt_tokens": 1, "prompt_tokens_details": false}}', "_details=False must"),
        ('{"key": "a", "openAiResponse": {"usage": {"total_tokens": 1}, "tool_usage": ' + DEEP + "}}", "nested"),
        ('{"key": "a", "writer": "w", "toolUsage": ' + DEEP + "}", "is nested "),
        ('{"key": "a", "writer": null, "more": 1}', "more=1 is no field"),
        ('{"key": "a", "usage": {}}', "give the counts by name"),
        ('{"key": "a", "openAiResponse": {"object": "x"}}', "has neither a known `object` nor a usage"),
        ('{"key": "a", "customProperties": {"a": {}}}', "customProperties"),
        ('{"key": "a", "status": "fine"}', "status='fine' Invalid enum value"),
        ('{"key": "a", "writer": "w", "usage": {"input_tokens": 1000000000001}}', "must be between 0 and 10000"),
        ('{"key": "a", "writer": "w", "sequence": -1}', "sequence=-1 must be between"),
        ('{"key": "\\ud800"}', "body is not JSON"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_what_cannot_be_is_refused(body: str, said: str) -> None:
    """The error names the field, its value, and what is wrong."""
    with pytest.raises(ApiError) as error:
        message_of(body.encode(), NOW)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('"somethingNew": 5', "somethingNew=5 is of a newer version"),
        ('"usage": {"input_tokens": 5, "video_tokens": 7}', "usage.video_tokens=7 is of a newer version"),
    ],
)
def test_a_newer_process_says_more(more: str, said: str) -> None:
    """What a newer version has counted is not left out: it waits where it is, until this one is updated."""
    with pytest.raises(NewerError) as error:
        message_of(f'{{"key": "a", "writer": "w", "sequence": 1, {more}}}'.encode(), NOW)
    assert said in str(error.value)
    with pytest.raises(ApiError) as mistake:  # of anybody else, it is a mistake
        message_of(f'{{"key": "a", {more}}}'.encode(), NOW)
    assert not isinstance(mistake.value, NewerError)


def test_nearly_now() -> None:
    """Clocks differ a little, and any message may come late."""
    soon = (NOW + FUTURE - timedelta(seconds=1)).isoformat()
    assert taken(timestamp=soon).timestamp == NOW + FUTURE - timedelta(seconds=1)
    assert taken(timestamp="1970-01-01T00:00:00Z").timestamp.year == 1970


def test_what_any_server_takes() -> None:
    """A server that speaks only the seed's API gets its words, and a key also for a message that has none."""
    message = Message(new_id(), NOW, "responses", usage=Usage(input_tokens=5, output_tokens=None, cached_tokens=2))
    sent = msgspec.json.decode(msgspec.json.encode(seed_of(message)))
    assert sent["key"] == NO_KEY
    assert sent["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    assert sent["messageId"] == message.id
    assert "usage" not in msgspec.json.decode(msgspec.json.encode(seed_of(replace(message, usage=None))))
