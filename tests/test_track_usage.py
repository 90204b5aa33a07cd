"""track_usage(): the seed's call, for replies that did not come through the SDK; it checks what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument import track_usage, usage_context
from spryng_instrument.errors import MissingKeyError, UsageError
from spryng_instrument.message import Usage
from spryng_instrument.usage import checked_usage, usage_of
from tests.conftest import Ledger
from tests.shapes import to_dict


def test_the_seed_example(instrument: Callable[..., Ledger]) -> None:
    """The seed's call works as written, and returns the id of its message."""
    ledger = instrument()
    message_id = track_usage(
        key="company123",
        query="what is 2+123123",
        usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        conversation_id="test123",
        tags=["test", "test2"],
    )
    message = ledger.message()
    assert message.id == message_id
    assert (message.key, message.query, message.conversation_id) == ("company123", "what is 2+123123", "test123")
    assert message.tags == ("test", "test2")
    assert message.usage == Usage(input_tokens=1, output_tokens=1, total_tokens=2)


def test_it_takes_the_sdk_object_or_its_dict(instrument: Callable[..., Ledger], client: openai.OpenAI) -> None:
    """Of a completion, chat, embedding or response, object or dict, the same is recorded as the SDK call recorded."""
    ledger = instrument()
    with usage_context("acme", tags=["outer"]):
        replies: list[Any] = [
            client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "hi"}]),
            client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hi"),
            client.embeddings.create(model="text-embedding-3-small", input="hi"),
        ]
        if hasattr(client, "responses"):
            replies.append(client.responses.create(model="gpt-5-mini", input="hi"))
        for reply in replies:
            track_usage(open_ai_response=reply, tags=["by-hand"])
            track_usage(open_ai_response=to_dict(reply))
    messages = ledger.messages()
    count = len(replies)
    for position, seen in enumerate(messages[:count]):
        for by_hand in messages[count + 2 * position : count + 2 * position + 2]:
            assert by_hand.usage == seen.usage
            assert by_hand.usage is not None
            assert (by_hand.operation, by_hand.response_id, by_hand.model) == (
                seen.operation,
                seen.response_id,
                seen.model,
            )
            assert by_hand.key == "acme"
    assert messages[count].tags == ("outer", "by-hand")


NINE_AND_THREE = {"prompt_tokens": 9, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens=-1 must not be negative"),
        ({"input_tokens": 1.0}, "input_tokens=1.0 must be a whole number, not float"),
        ({"input_tokens": True}, "not bool"),
        ({"input_tokens": "7"}, "input_tokens='7' must be a whole number, not str"),
        ({"input_tokens": 10**12 + 1}, "is too large"),
        ({**NINE_AND_THREE, "total_tokens": 13}, "total_tokens=13 is not prompt_tokens=9 + completion_tokens=3"),
        ({"input_tokens": 9, "total_tokens": 11}, "total_tokens=11 is not input_tokens=9 + output_tokens=None"),
        ({"prompt_tokens": 9, "input_tokens": 8}, "prompt_tokens=9 and input_tokens=8 contradict"),
        ({"promt_tokens": 9}, "no field 'promt_tokens'; it has: prompt_tokens"),
        ({"input_tokens_details": {"cached_tokens": -2}}, "input_tokens_details.cached_tokens=-2 must not be negative"),
        ({}, "give the counts by name"),
        ({"prompt_tokens": None}, "holds no count"),
        (7, "give the counts by name"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_usage_that_cannot_be_is_refused(usage: Any, said: str, instrument: Callable[..., Ledger]) -> None:
    """A count that cannot be true is an error that names the field and its value, and nothing is recorded."""
    ledger = instrument()
    with pytest.raises(UsageError) as error:
        track_usage(key="acme", usage=usage)
    assert said in str(error.value)
    assert ledger.messages() == []


counts = st.integers(0, 10**11)


@given(counts, counts, st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 9))
def test_both_names_are_one_form(
    i: int, o: int, responses: bool, with_total: bool, cached: int, reasoning: int
) -> None:
    """By the chat names or the responses names, the same counts are the same Usage; a total is never made up."""
    names = ("input_tokens", "output_tokens") if responses else ("prompt_tokens", "completion_tokens")
    usage: dict[str, Any] = {names[0]: i, names[1]: o}
    if with_total:
        usage["total_tokens"] = i + o
    usage[f"{names[0]}_details"] = {"cached_tokens": cached}
    usage[f"{names[1]}_details"] = {"reasoning_tokens": reasoning}
    assert checked_usage(usage) == Usage(
        input_tokens=i,
        output_tokens=o,
        total_tokens=i + o if with_total else None,
        cached_tokens=cached,
        reasoning_tokens=reasoning,
    )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens", "other"]
        ),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.booleans(), st.lists(st.integers())),
    )
)
def test_no_usage_is_half_taken(usage: dict[str, Any]) -> None:
    """Whatever is handed over is either refused, or recorded with exactly the counts that were given."""
    try:
        taken = checked_usage(usage)
    except UsageError:
        return
    given = {name: count for name, count in usage.items() if count is not None}
    assert all(type(count) is int and count >= 0 for count in given.values())
    assert taken.input_tokens == given.get("prompt_tokens", given.get("input_tokens"))
    assert taken.output_tokens == given.get("completion_tokens", given.get("output_tokens"))
    assert taken.total_tokens == given.get("total_tokens")


def test_a_key_is_required(instrument: Callable[..., Ledger]) -> None:
    """The key comes from the call, else the context, else default_key; without any it is an error."""
    ledger = instrument()
    with pytest.raises(MissingKeyError, match="give key="):
        track_usage(usage={"input_tokens": 1})
    with usage_context("acme"):
        track_usage()
    track_usage(key="other")
    assert [message.key for message in ledger.messages()] == ["acme", "other"]


def test_what_is_no_reply_is_refused(instrument: Callable[..., Ledger], client: openai.OpenAI) -> None:
    """A stream, a string or another dict is no reply: the error says what is taken."""
    instrument()
    stream = client.chat.completions.create(
        model="gpt-4o-mini", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    for other in (stream, "text", {"object": "thread"}, 7):
        with pytest.raises(UsageError, match="must be a chat completion, completion, embedding or response"):
            track_usage(key="acme", open_ai_response=other)
    stream.response.close()


def test_times_are_aware(instrument: Callable[..., Ledger]) -> None:
    """A time may be given, of any zone, and is kept in UTC; one without a zone is refused."""
    ledger = instrument()
    moment = datetime(2026, 3, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    track_usage(key="acme", timestamp=moment, latency_ms=12.5, model="other-model", operation="rerank")
    for other in (datetime(2026, 3, 1), "2026-03-01T00:00:00Z"):  # noqa: DTZ001
        with pytest.raises(UsageError, match="must be a datetime with its zone"):
            track_usage(key="acme", timestamp=other)
    message = ledger.message()
    assert message.timestamp == moment
    assert message.timestamp.utcoffset() == timedelta(0)
    assert (message.model, message.operation, message.latency_ms) == ("other-model", "rerank", 12.5)


@pytest.mark.parametrize("latency_ms", [Decimal("1.5"), "12", -1, math.nan, math.inf])
def test_a_latency_is_a_number(latency_ms: Any, instrument: Callable[..., Ledger]) -> None:
    """What no reader of the journal could read is refused, not recorded."""
    ledger = instrument()
    with pytest.raises(UsageError, match=r"latency_ms=.* must be a number of milliseconds"):
        track_usage(key="acme", latency_ms=latency_ms)
    assert ledger.messages() == []


def test_an_operation_is_text(instrument: Callable[..., Ledger]) -> None:
    """One that is none is said and left out, like a key; the message is recorded."""
    ledger = instrument()
    track_usage(key="acme", operation=b"rerank")
    assert ledger.message().operation == "custom"
    assert spryng_instrument.stats().set_aside == 0


def test_what_of_the_cached_was_audio() -> None:
    """Realtime answers say it, one level further down; by hand, it is checked like any other count."""
    details = {
        "cached_tokens": 40,
        "audio_tokens": 60,
        "cached_tokens_details": {"audio_tokens": 30, "text_tokens": 10},
    }
    read = Usage(input_tokens=100, cached_tokens=40, input_audio_tokens=60, cached_audio_tokens=30)
    assert usage_of({"input_tokens": 100, "input_token_details": details}) == read
    assert checked_usage({"input_tokens": 100, "input_tokens_details": details}) == read
    with pytest.raises(UsageError, match=r"input_tokens_details\.cached_tokens_details\.audio_tokens=-1 must not be"):
        checked_usage(
            {"input_tokens": 1, "input_tokens_details": {"cached_tokens_details": {"audio_tokens": -1}}},
        )


def test_counts_that_are_not_written_as_counts() -> None:
    """Gateways write 9.0 and "9", which the SDK reads as 9; what is no whole number makes no sense."""
    odd = {"prompt_tokens": 9.0, "completion_tokens": "3", "total_tokens": 12.5}
    assert usage_of(odd) == Usage(input_tokens=9, output_tokens=3)
    assert usage_of({"prompt_tokens": 9.0, "completion_tokens": True, "total_tokens": "-1"}) == Usage(input_tokens=9)
    assert usage_of({"prompt_tokens": "9" * 5_000, "completion_tokens": math.nan, "total_tokens": 1e300}) is None


def test_a_gateway_that_gives_both_names() -> None:
    """Zero under one name does not hide the count under the other; zero under both, or one alone, is zero."""
    both = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 300, "input_tokens": 283, "output_tokens": 17}
    assert usage_of(both) == Usage(input_tokens=283, output_tokens=17, total_tokens=300)
    assert usage_of({"prompt_tokens": 0, "input_tokens": None}) == Usage(input_tokens=0)
    assert usage_of({"prompt_tokens": 0, "input_tokens": 0}) == Usage(input_tokens=0)
