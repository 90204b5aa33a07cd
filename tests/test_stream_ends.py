"""What is left when a stream has ended in any way: the connections that were left without us, nothing in memory."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import closing, suppress
from typing import Any

import openai
import pytest

import spryng_instrument
from spryng_instrument import recorder, usage_context
from tests.shapes import CHAT, http

ENDS = ["read", "close", "break", "break and close", "with", "exception", "never read", "first chunk", "in a thread"]


def leave(stream: Any, how: str) -> None:
    chunks = iter(stream)
    if how == "read":
        list(chunks)
    elif how == "close":
        stream.response.close()
    elif how in ("break", "break and close", "first chunk"):
        for _ in chunks:
            break
        if how == "break and close":
            stream.response.close()
    elif how == "with":
        with closing(stream.response):
            next(chunks)
    elif how == "exception":
        with suppress(KeyError):
            for _ in chunks:
                raise KeyError
    elif how == "in a thread":
        thread = threading.Thread(target=list, args=(chunks,))
        thread.start()
        thread.join()


def connections(base_url: str, how: str) -> tuple[list[str], int]:
    """The pool's connections after streams that ended so, and how many streams are still in memory."""
    http_client = http.Client()
    alive = []
    with openai.OpenAI(base_url=base_url, api_key="practice", max_retries=0, http_client=http_client) as client:
        for _ in range(3):
            with usage_context("acme"):
                stream = client.chat.completions.create(**CHAT, stream=True)
            leave(stream, how)
            alive.append(weakref.ref(stream))
            del stream
            gc.collect()
        pool = http_client._transport._pool
        # Without the connection's port: "IDLE", "ACTIVE", "CLOSED".
        return [connection.info().split(",")[1].strip() for connection in pool.connections], sum(
            ref() is not None for ref in alive
        )


@pytest.mark.parametrize("how", ENDS)
def test_the_pool_is_left_as_without_us(how, practice, instrument):
    """However streams end, the pool has the connections it would have had, no stream is kept, and each is a message."""
    bare = connections(practice.base_url, how)
    ledger = instrument()
    assert connections(practice.base_url, how) == bare
    assert bare[1] == 0
    messages = ledger.messages()
    assert len(messages) == 3
    whole = how in ("read", "in a thread")
    assert {message.status for message in messages} == {"ok" if whole else "incomplete"}
    assert {message.key for message in messages} == {"acme"}
    assert recorder.active is not None
    assert not recorder.active.open_calls


def test_collected_on_another_thread(practice, instrument):
    """A stream dropped in a cycle, and collected by a thread that was never in its context, is its customer's."""
    ledger = instrument()
    with openai.OpenAI(base_url=practice.base_url, api_key="practice", max_retries=0) as client:
        for read in (False, True):
            with usage_context(f"read {read}"):
                stream = client.chat.completions.create(**CHAT, stream=True)
            if read:
                for _ in stream:
                    break
            cycle: list[Any] = [stream]
            cycle.append(cycle)
            del stream, cycle
        collector = threading.Thread(target=gc.collect)
        collector.start()
        collector.join()
    assert spryng_instrument.flush()
    assert [(message.key, message.status) for message in ledger.messages()] == [
        ("read False", "incomplete"),
        ("read True", "incomplete"),
    ]
