"""`spryng demo`: real calls of the real OpenAI SDK for eight customers, and the proof that the ledger has them all.

The calls go to the practice server on this machine, or with --live to OpenAI. What is recorded goes to a ledger of its
own, made anew each time, so that no demo ever adds to real usage.
"""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import spryng_instrument
from spryng_instrument.cli.printing import print_usage, say_gaps
from spryng_instrument.cli.tables import many, note
from spryng_instrument.errors import SettingsError, SpryngError
from spryng_instrument.reports import usage_report
from spryng_instrument.settings import Settings, resolve, sqlite_path
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Filter, Store
from spryng_instrument.testing import Exchange, PracticeServer

DESTINATION = "sqlite:///.spryng/demo/usage.db"
CALLS, LIVE_CALLS = 200, 16
THREADS, TASKS = 4, 8
CUSTOMERS = (
    "aurora-health", "bluepeak-logistics", "cedar-bank", "delta-foods",
    "evergreen-energy", "fjord-shipping", "harbor-insurance", "summit-legal",
)  # fmt: skip
QUESTIONS = (
    "Where is the parcel that was to arrive on Tuesday?",
    "Summarise the meeting of this morning in three sentences.",
    "Is this message spam: you have won a voyage around the world?",
    "Which of our offers suits a family with two small children?",
    "Translate the delivery terms into plain English.",
)
HANDBOOK = "You answer for the support desk, shortly and with a source for whatever you claim. " * 80
"""Longer than 1,024 tokens: OpenAI reads what it knows of it from its cache."""
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}

Request = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """One call to make."""

    kind: str
    key: str
    conversation_id: str | None
    tags: tuple[str, ...]
    path: str
    """Where the method lies on a client: "chat.completions"."""
    request: Request
    fails: bool = False

    @property
    def asynchronous(self) -> bool:
        """Whether the AsyncOpenAI client makes it."""
        return self.kind.startswith("async")


def run(*, live: bool, calls: int | None, destination: str | None) -> int:
    """Make the calls and print what they used. Returns the exit code.

    Raises:
        SpryngError: there is no OPENAI_API_KEY to --live with, or the ledger cannot be written.
    """
    started = time.perf_counter()
    if live and not os.environ.get("OPENAI_API_KEY"):
        raise SpryngError("--live calls the OpenAI API and needs OPENAI_API_KEY; without --live no key is needed")
    settings = _settings(destination)
    calls = calls or (LIVE_CALLS if live else CALLS)
    import openai

    where = "the OpenAI API" if live else "a practice server on this machine"
    note(f"{calls:,} calls for {len(CUSTOMERS)} customers, with the OpenAI SDK {openai.__version__}, to {where}")
    plans = plan(calls, live=live, responses=find_spec("openai.resources.responses") is not None)
    with nullcontext() if live else PracticeServer() as server:
        client: Request = {"max_retries": 2}
        if server is not None:
            client |= {"base_url": server.base_url, "api_key": "practice"}
            os.environ["NO_PROXY"] = f"{os.environ.get('NO_PROXY', '')},{server.host}"  # loopback needs none
        spryng_instrument.uninstrument()
        spryng_instrument.instrument(
            destination=settings.destination,
            journal=settings.journal,
            include_usage_hosts=() if server is None else (server.host,),
        )
        try:
            unexpected = make_calls(plans, client)
            delivered = spryng_instrument.flush(30)
            stats = spryng_instrument.stats()
        finally:
            spryng_instrument.uninstrument()
    if not delivered:
        raise SpryngError(f"{stats.waiting} messages wait in {settings.journal}: {stats.failure}")
    store = open_store(settings.destination, create=False)
    report = usage_report(store, "key")
    print_usage(report)
    sys.stdout.flush()
    say_gaps(report)
    wrong = unexpected or compare(store, len(plans), server.exchanges if server is not None else None)
    if wrong:
        note(f"The ledger does not agree: {wrong}. Please report it.")
        return 1
    counted = "" if live else f", every token as the server counted it ({time.perf_counter() - started:.1f} s)"
    total = report.total
    found = f"{many(total.messages, 'message')} and {many(total.errors, 'error')}"
    note(f"{calls:,} calls, {calls:,} recorded: {found}{counted}")
    usual = settings.destination == resolve({}).destination
    option = "" if usual else f" --destination {shlex.quote(destination or DESTINATION)}"
    for command in ("usage --by model", "messages", "doctor"):
        note(f"Next: spryng {command}{option}")
    note(f"In a browser, at http://127.0.0.1:8321: spryng serve{option}")
    return 0


def plan(calls: int, *, live: bool, responses: bool) -> list[Plan]:
    """What to call: each customer with its own share, habits and conversations, the same every time."""
    rng = random.Random(2026)
    shares = {
        "chat": 40, "stream": 30, "async chat": 40, "async stream": 30, "tool": 15, "embedding": 20,
        "completion": 8, "cached": 10, "retry": 4, "error": 3, "response": 20, "async response stream": 15,
    }  # fmt: skip
    absent = (() if responses else ("response", "async response stream")) + (("completion", "cached") if live else ())
    kinds = [kind for kind in shares if kind not in absent]
    # Every kind and every customer at least once, then by their shares.
    chosen = [*kinds, *rng.choices(kinds, [shares[kind] for kind in kinds], k=calls)][:calls]
    keys = [*CUSTOMERS, *rng.choices(CUSTOMERS, range(len(CUSTOMERS), 0, -1), k=calls)][:calls]
    return [_plan(kind, key, rng, live) for kind, key in zip(chosen, keys, strict=True)]


def _plan(kind: str, key: str, rng: random.Random, live: bool) -> Plan:
    question = rng.choice(QUESTIONS)
    talk = f"{key[:2]}-{rng.randint(1, 6)}"
    messages = [{"role": "user", "content": question}]
    model = "gpt-4.1-nano" if live else rng.choice(("gpt-4o-mini", "gpt-4o-mini", "gpt-4.1-mini", "gpt-5-mini"))
    chat: Request = {"model": model, "messages": messages, **({"max_tokens": 16} if live else {})}
    path = "chat.completions"
    match kind.removeprefix("async "):
        case "stream":
            return Plan(kind, key, talk, ("support", "live"), path, {**chat, "stream": True})
        case "tool":
            asked = [{"role": "user", "content": "What will the weather be in Lisbon tomorrow?"}]
            return Plan(kind, key, talk, ("agent",), path, {**chat, "messages": asked, "tools": [WEATHER]})
        case "embedding":
            return Plan(
                kind, key, None, ("search",), "embeddings", {"model": "text-embedding-3-small", "input": question}
            )
        case "completion":
            request = {"model": "gpt-3.5-turbo-instruct", "prompt": question, "max_tokens": 32}
            return Plan(kind, key, None, ("summary",), "completions", request)
        case "cached":
            asked = [{"role": "system", "content": HANDBOOK}, *messages]
            return Plan(kind, key, talk, ("support",), path, {**chat, "messages": asked})
        case "retry":
            header = {} if live else {"extra_headers": {"x-practice-error": "429-once"}}
            return Plan(kind, key, talk, ("support",), path, {**chat, **header})
        case "error":
            return Plan(kind, key, talk, ("support",), path, {**chat, "model": "no-such-model"}, fails=True)
        case "response" | "response stream":
            request = {"model": "gpt-4.1-nano" if live else "gpt-4.1", "input": question, "max_output_tokens": 64}
            more = {"stream": True} if kind.endswith("stream") else {}
            return Plan(kind, key, talk, ("agent", "summary"), "responses", {**request, **more})
    return Plan(kind, key, talk, ("support",), path, chat)


def make_calls(plans: list[Plan], client: Request) -> str | None:
    """Make all calls: a part by threads, the others by tasks. Returns what went wrong that was not meant to."""
    import openai
    from rich.console import Console
    from rich.progress import Progress

    wrong: list[str] = []

    def settle(call: Plan, error: Exception | None) -> None:
        progress.advance(bar)
        if (error is not None) is not call.fails:
            wrong.append(f"the {call.kind} call {'failed with ' + repr(error) if error else 'should have failed'}")

    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("calling", total=len(plans))
        with openai.OpenAI(**client) as sync, ThreadPoolExecutor(THREADS) as pool:
            for call in plans:
                if not call.asynchronous:
                    pool.submit(_call, sync, call, settle)
        asyncio.run(_call_all([call for call in plans if call.asynchronous], client, settle))
    return wrong[0] if wrong else None


Settle = Callable[[Plan, Exception | None], None]


def _method(client: object, path: str) -> Any:
    for name in path.split("."):
        client = getattr(client, name)
    return client.create  # type: ignore[attr-defined]


def _call(client: object, call: Plan, settle: Settle) -> None:
    try:
        with spryng_instrument.usage_context(key=call.key, conversation_id=call.conversation_id, tags=call.tags):
            reply = _method(client, call.path)(**call.request)
            if call.request.get("stream"):
                for _ in reply:
                    pass
    except Exception as exc:
        settle(call, exc)
    else:
        settle(call, None)


async def _call_all(calls: list[Plan], client: Request, settle: Settle) -> None:
    import openai

    @spryng_instrument.tracked(
        key=lambda call: call.key, conversation_id=lambda call: call.conversation_id, tags=lambda call: call.tags
    )
    async def make(call: Plan) -> None:
        reply = await _method(asynchronous, call.path)(**call.request)
        if call.request.get("stream"):
            async for _ in reply:
                pass

    async def settled(call: Plan) -> None:
        async with slots:
            try:
                await make(call)
            except Exception as exc:
                settle(call, exc)
            else:
                settle(call, None)

    slots = asyncio.Semaphore(TASKS)
    async with openai.AsyncOpenAI(**client) as asynchronous:
        await asyncio.gather(*map(settled, calls))


def compare(store: Store, calls: int, exchanges: list[Exchange] | None) -> str | None:
    """Compare the ledger with the server's own record, exchange by exchange. Returns what differs.

    Args:
        exchanges: None: the server keeps no record that could be compared with.
    """
    messages = [row.message for row in store.messages(Filter(), limit=calls + 1).rows]
    if len(messages) != calls:
        return f"{calls} calls, {len(messages)} messages"
    if exchanges is None:
        return None
    recorded: Counter[tuple[Any, ...]] = Counter(
        (message.operation, message.response_id, message.usage.input_tokens, message.usage.output_tokens or 0)
        for message in messages
        if message.usage is not None
    )
    served: Counter[tuple[Any, ...]] = Counter(
        (
            exchange.endpoint,
            exchange.response_id,
            exchange.usage.get("prompt_tokens", exchange.usage.get("input_tokens")),
            exchange.usage.get("completion_tokens", exchange.usage.get("output_tokens", 0)),
        )
        for exchange in exchanges
        if exchange.usage is not None and exchange.usage_sent
    )
    differing = (recorded - served) + (served - recorded)
    return f"the usage of {differing.total()} exchanges differs, as {next(iter(differing))}" if differing else None


def _settings(destination: str | None) -> Settings:
    """Where the demo records: its own ledger, which begins anew, or another one that is new."""
    ledger = sqlite_path(resolve({"destination": destination or DESTINATION}).destination)
    if destination is None:
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{ledger}{suffix}")
    elif ledger.exists():
        raise SettingsError(f"{ledger} is there already; a demo must not mix with real messages: name a new file")
    # A journal of its own, whatever SPRYNG_JOURNAL says: there, real messages may wait for the real ledger.
    return resolve({"destination": f"sqlite:///{ledger}", "journal": f"{ledger}.journal"})
