"""Tasks of every async library, and threads that they start, belong to whoever started them."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import anyio.to_thread
import openai
import pytest

from spryng_instrument import usage_context
from spryng_instrument.context import current_scope
from tests.shapes import CHAT

BACKENDS = ["asyncio", "trio"]


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope is not None else None


# Under trio the SDK leaves async generators of its own half read at [DONE], and trio says so; with or without us.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_in_task_groups(backend, practice, instrument):
    """Calls of concurrent tasks are their own customers', under asyncio and trio."""
    ledger = instrument()

    async def ask(client: Any, customer: str) -> None:
        with usage_context(customer):
            await client.chat.completions.create(**CHAT)
            async with anyio.create_task_group() as group:
                group.start_soon(stream, client)

    async def stream(client: Any) -> None:
        async for _ in await client.chat.completions.create(**CHAT, stream=True):
            await anyio.sleep(0)

    async def main() -> None:
        client = openai.AsyncOpenAI(base_url=practice.base_url, api_key="practice", max_retries=0)
        async with client, anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(ask, client, f"customer-{number}")

    anyio.run(main, backend=backend)
    found = sorted((message.key, message.streamed, message.status) for message in ledger.messages())
    assert found == sorted((f"customer-{n}", streamed, "ok") for n in range(10) for streamed in (False, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_of_async_code(backend):
    """anyio.to_thread and asyncio.to_thread run in the context of who called them."""

    async def main() -> None:
        with usage_context("acme"):
            assert await anyio.to_thread.run_sync(key) == "acme"
            if backend == "asyncio":
                assert await asyncio.to_thread(key) == "acme"
        assert await anyio.to_thread.run_sync(key) is None

    anyio.run(main, backend=backend)
