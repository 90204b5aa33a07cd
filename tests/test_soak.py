"""A soak: threads and tasks, streams and errors, streams that are left and tasks that are cancelled, for long.

SPRYNG_SOAK=200000 python -m pytest -s tests/test_soak.py
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import openai
import pytest

import spryng_instrument
from spryng_instrument import usage_context
from tests.shapes import CHAT, Parts, http, sse

CALLS = int(os.environ.get("SPRYNG_SOAK", "3000"))
THREADS = TASKS = 64
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "gpt-4o-mini-2024-07-18"}
PLAIN = json.dumps({**HEAD, "object": "chat.completion", "choices": [], "usage": USAGE}).encode()
TEXT = {**HEAD, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}], "usage": None}
LAST = {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None}
STREAM = sse(TEXT, TEXT, TEXT, LAST, {**HEAD, "choices": [], "usage": USAGE}, "[DONE]")
ERROR = json.dumps({"error": {"message": "no", "type": "server_error"}}).encode()


def answer(request: Any) -> Any:
    if "x-fail" in request.headers:
        return http.Response(500, content=ERROR, headers={"content-type": "application/json"})
    if json.loads(request.content).get("stream"):
        parts = [STREAM[start : start + 200] for start in range(0, len(STREAM), 200)]
        return http.Response(200, headers={"content-type": "text/event-stream"}, stream=Parts(parts))
    return http.Response(200, content=PLAIN, headers={"content-type": "application/json"})


async def slow_answer(request: Any) -> Any:
    await asyncio.sleep(0)
    return answer(request)


def options(draw: random.Random) -> dict[str, Any]:
    fails = draw.random() < 0.05
    return {**CHAT, "stream": draw.random() < 0.5, "extra_headers": {"x-fail": "1"} if fails else {}}


def work(client: Any, count: int, name: str, made: Counter[str]) -> None:
    """One thread's calls."""
    draw = random.Random(name)
    for _ in range(count):
        asked = options(draw)
        made[name] += 1
        with usage_context(name):
            try:
                reply = client.chat.completions.create(**asked)
                if asked["stream"]:
                    left_after = 1 if draw.random() < 0.1 else 100
                    for number, _chunk in enumerate(reply):
                        if number == left_after:
                            break
                    if left_after == 1 and draw.random() < 0.5:
                        reply.response.close()
            except openai.InternalServerError:
                pass


async def awork(client: Any, count: int, name: str, made: Counter[str]) -> None:
    """One task's calls, some of which are cancelled."""
    draw = random.Random(name)
    for _ in range(count):
        asked = options(draw)
        made[name] += 1
        call = asyncio.ensure_future(acall(client, asked, name, draw.random() < 0.1))
        if draw.random() < 0.02:
            await asyncio.sleep(0)
            call.cancel()
        with suppress(openai.InternalServerError, asyncio.CancelledError):
            await call


async def acall(client: Any, asked: dict[str, Any], name: str, leaves: bool) -> None:
    with usage_context(name):
        reply = await client.chat.completions.create(**asked)
        if asked["stream"]:
            async for _chunk in reply:
                if leaves:
                    await reply.response.aclose()
                    break


def memory_mb() -> float:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.timeout(3600)
def test_soak(instrument, capsys):
    """Every call that was made is one message, of the right customer; nothing is dropped, nothing goes wrong inside."""
    ledger = instrument(include_usage_hosts=["api.openai.com"])
    gc.enable()
    client = openai.OpenAI(api_key="x", max_retries=0, http_client=http.Client(transport=http.MockTransport(answer)))
    made: Counter[str] = Counter()
    memory = []

    def round_of(count: int, number: int) -> None:
        each = count // (THREADS + TASKS)
        threads = [
            threading.Thread(target=work, args=(client, each, f"thread-{number}-{index}", made))
            for index in range(THREADS)
        ]
        for thread in threads:
            thread.start()

        async def tasks() -> None:
            transport = http.MockTransport(slow_answer)
            async with openai.AsyncOpenAI(
                api_key="x", max_retries=0, http_client=http.AsyncClient(transport=transport)
            ) as aclient:
                await asyncio.gather(*(awork(aclient, each, f"task-{number}-{index}", made) for index in range(TASKS)))

        asyncio.run(tasks())
        for thread in threads:
            thread.join()

    for number in range(10):
        round_of(CALLS // 10, number)
        gc.collect()
        assert spryng_instrument.flush(120)
        memory.append(memory_mb())
    stats = spryng_instrument.stats()
    total = ledger.store.total()
    by_key = {row.group: row for row in ledger.store.usage("key")}
    found = {key: row.messages + row.errors + row.cancelled for key, row in by_key.items()}
    with capsys.disabled():
        print(f"\n{made.total():,} calls made, {stats.recorded:,} recorded, {total.errors:,} errors, "
              f"{total.cancelled:,} cancelled, {total.unreported:,} without usage; memory after each tenth in MB: "
              f"{' '.join(f'{used:.0f}' for used in memory)}")  # fmt: skip
    assert stats.recorded == stats.delivered == sum(found.values())
    assert (stats.dropped, stats.errors, stats.set_aside, stats.unattributed, stats.failure) == (0, 0, 0, 0, None)
    assert found == made
