"""Reconcile: real calls against the practice server, and what it tells of them as OpenAI's organization."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument.cli.commands import commands
from spryng_instrument.deferred import Deferred
from spryng_instrument.differences import CAUSES, COST, COST_CAUSES, MEANINGS, Line, name_of
from spryng_instrument.errors import OrganizationError, QueryError, SettingsError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.organization import Charge, Counts, ModelUsage, Organization, admin_client, fetch, host_of
from spryng_instrument.periods import period
from spryng_instrument.prices import price_source, rate
from spryng_instrument.reconcile import GROUPINGS, Reconciliation, compare, reconcile, recorded_by_day, span
from spryng_instrument.store.base import StoredMessage
from spryng_instrument.store.sqlite import SqliteStore
from spryng_instrument.testing import PracticeServer

from .conftest import Ledger
from .messages import needs_prices
from .shapes import SDK, http

HELLO = [{"role": "user", "content": "Where is my order? " * 100}]
CHAT: dict[str, Any] = {"model": "gpt-4o-mini", "messages": HELLO}
LATER = timedelta(days=3)
"""By then every day of the calls is closed."""


@pytest.fixture
def server() -> Iterator[PracticeServer]:
    """One whose day has only the test's own calls."""
    with PracticeServer() as server:
        yield server


@pytest.fixture
def client(server: PracticeServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key="practice", max_retries=0) as client:
        yield client


def environ(server: PracticeServer) -> dict[str, str]:
    return {"OPENAI_ADMIN_KEY": "sk-admin-practice", "OPENAI_BASE_URL": server.base_url}


def reconciled(ledger: Ledger, server: PracticeServer, *, later: timedelta = LATER, **more: Any) -> Reconciliation:
    """This month in the ledger, beside what the server tells of it."""
    ledger.messages()
    now = datetime.now(timezone.utc)
    # A month of the calls whole, however late in it the test runs.
    since, until = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0), now + timedelta(days=9)
    until = until.replace(hour=0, minute=0, second=0, microsecond=0)
    rate(ledger.store)
    with admin_client(environ(server)) as admin:
        organization = fetch(admin, *span(since, until, now + later))
        return reconcile(ledger.store, organization, host_of(admin), since, until, now=now + later, **more)


def causes(found: Reconciliation) -> dict[str, dict[str, Decimal]]:
    """The causes of each measure that differs, costs aside, which need prices."""
    return {line.measure: line.causes for line in found.total() if line.difference and line.measure != COST}


def leave_early(client: openai.OpenAI) -> None:
    """Begin to read a stream, and drop it."""
    next(iter(client.chat.completions.create(**CHAT, stream=True)))
    gc.collect()


# What really happens


def test_all_calls_agree(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """Chat, streams, completions, embeddings and responses: every number is OpenAI's, and refused calls are in none."""
    ledger = instrument()
    for model in ("gpt-4o-mini", "gpt-4.1", "gpt-5-mini"):
        client.chat.completions.create(model=model, messages=HELLO)
        list(client.chat.completions.create(model=model, messages=HELLO, stream=True))
    client.chat.completions.create(model="gpt-4.1", messages=[{"role": "user", "content": "order? " * 2_000}])
    client.completions.create(model="gpt-3.5-turbo-instruct", prompt="Where is my order?")
    client.embeddings.create(model="text-embedding-3-small", input="order")
    if SDK["responses API"]:
        client.responses.create(model="gpt-4.1", input="Where is my order?")
    with suppress(openai.BadRequestError):
        client.embeddings.create(model="no-such-model", input="order")
    with suppress(openai.InternalServerError):
        client.chat.completions.create(**CHAT, extra_headers={"x-practice-error": "503"})

    found = reconciled(ledger, server)

    assert not any(line.difference for line in found.lines if line.measure != COST)
    assert {line.measure: bool(line.ours) for line in found.total()} == {
        "requests": True, "input_tokens": True, "cached_tokens": True, "output_tokens": True,
        COST: price_source().version is not None,
    }  # fmt: skip
    assert found.is_explained


@needs_prices
def test_costs_agree(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """The list prices that messages get are those that OpenAI charges, to the trillionth."""
    ledger = instrument()
    for model in ("gpt-3.5-turbo", "gpt-4", "gpt-4-turbo", "gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-4.1-mini", "o3"):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "order? " * 2_000}])

    [cost] = [line for line in reconciled(ledger, server).lines if line.measure == COST]

    assert cost.ours > 0
    assert cost.difference == 0


def test_asking_is_no_message(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """OpenAI's own figures are asked for while calls are recorded, and that is not."""
    ledger = instrument()
    client.chat.completions.create(**CHAT)

    assert reconciled(ledger, server).is_explained
    assert len(ledger.messages()) == 1


def test_not_recorded_here(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """A call of a process that is not instrumented."""
    client.chat.completions.create(**CHAT)
    ledger = instrument()
    client.chat.completions.create(**CHAT)

    found = reconciled(ledger, server)

    usage = server.exchanges[0].usage or {}
    assert causes(found) == {
        "requests": {"not recorded here": 1},
        "input_tokens": {"not recorded here": usage["prompt_tokens"]},
        "output_tokens": {"not recorded here": usage["completion_tokens"]},
    }


def test_not_in_usage(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """Calls of another organization: this one's key tells nothing of them. On the day itself, it may be late."""
    ledger = instrument()
    client.chat.completions.create(**CHAT)
    server.stop()

    with PracticeServer(port=server.port) as other:
        closed, opened = reconciled(ledger, other), reconciled(ledger, other, later=timedelta(0))

    assert {measure: [*found] for measure, found in causes(closed).items()} == {
        measure: ["not in OpenAI's usage"] for measure in ("requests", "input_tokens", "output_tokens")
    }
    assert all([*found] == ["open day"] for found in causes(opened).values())
    assert opened.open_days == (datetime.now(timezone.utc).date(),)
    assert not closed.open_days or closed.open_days[0] > opened.open_days[0]


def test_no_usage_reported(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """Streams that were read raw or left early are messages with unknown tokens; OpenAI's are those."""
    ledger = instrument()
    client.chat.completions.create(**CHAT)
    leave_early(client)
    raw: Any = client.chat.completions.with_raw_response.create(**CHAT, stream=True)
    list(raw.parse())
    assert {message.usage is None for message in ledger.messages()} == {True, False}

    found = reconciled(ledger, server)

    assert {measure: [*by] for measure, by in causes(found).items()} == {
        "input_tokens": ["no usage reported"],
        "output_tokens": ["no usage reported"],
    }


def test_which_is_which_cannot_be_told(
    instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI
) -> None:
    """Tokens of a stream that did not report them, and of a call that is not here, are said to be of either."""
    client.chat.completions.create(**CHAT)
    ledger = instrument()
    leave_early(client)

    found = causes(reconciled(ledger, server))

    assert [*found["requests"]] == ["not recorded here"]
    assert [*found["input_tokens"]] == ["no usage reported or not recorded here"]


async def test_cancelled(instrument: Callable[..., Ledger]) -> None:
    """A task that was cancelled while the server was at work, which then was for nothing, and paid."""
    ledger, begun = instrument(), threading.Event()

    class Begins(PracticeServer):
        def _fault(self, *request: Any) -> str:
            begun.set()
            return super()._fault(*request)

    with Begins(latency_s=1.0) as server:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="practice", max_retries=0) as client:
            call = asyncio.create_task(client.chat.completions.create(**CHAT))
            await asyncio.to_thread(begun.wait, 60)
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call
        while not server.exchanges:
            await asyncio.sleep(0.02)
        server.latency_s = 0

        found = causes(await asyncio.to_thread(reconciled, ledger, server))

    assert [*found["requests"]] == ["cancelled"]
    assert [*found["output_tokens"]] == ["cancelled"]


def test_failed(instrument: Callable[..., Ledger]) -> None:
    """A call that timed out here, and was answered there."""
    ledger = instrument()
    with PracticeServer(latency_s=1.0) as server:
        with (
            openai.OpenAI(base_url=server.base_url, api_key="practice", max_retries=0, timeout=0.5) as client,
            pytest.raises(openai.APITimeoutError),
        ):
            client.chat.completions.create(**CHAT)
        while not server.exchanges:
            time.sleep(0.02)
        server.latency_s = 0
        found = causes(reconciled(ledger, server))

    assert [*found["requests"]] == ["failed"]
    assert [*found["input_tokens"]] == ["failed"]


def test_retried(instrument: Callable[..., Ledger], server: PracticeServer) -> None:
    """An answer that broke off was counted there, as was the one that the SDK then got. It says so of raw responses."""
    ledger = instrument()
    with openai.OpenAI(base_url=server.base_url, api_key="practice", max_retries=1) as client:
        raw = client.chat.completions.with_raw_response
        raw.create(**CHAT, extra_headers={"x-practice-error": "stream-disconnect-once"}).parse()
    if not ledger.message().retries:
        pytest.skip("this SDK does not say that it sent a call again")

    found = causes(reconciled(ledger, server))

    assert [*found["requests"]] == ["retried"]
    assert [*found["output_tokens"]] == ["retried"]


def test_recorded_by_hand(instrument: Callable[..., Ledger], server: PracticeServer) -> None:
    """A call of another client, handed to track_usage(), explains itself and nothing more."""
    ledger = instrument()
    url = f"{server.base_url}/chat/completions"
    replies = [
        http.post(url, json=CHAT, headers={"Authorization": "Bearer practice"}, trust_env=False).json()
        for _ in range(2)
    ]
    spryng_instrument.track_usage(key="acme", open_ai_response=replies[0])

    found = causes(reconciled(ledger, server))

    assert found["requests"] == {"recorded by hand": 1, "not recorded here": 1}
    assert found["output_tokens"] == dict.fromkeys(
        ("recorded by hand", "not recorded here"), replies[0]["usage"]["completion_tokens"]
    )


def test_unexplained(instrument: Callable[..., Ledger], server: PracticeServer, client: openai.OpenAI) -> None:
    """As many requests, and other tokens, where each was reported: that has no cause, and is not hidden."""
    ledger = instrument()
    client.chat.completions.create(**CHAT)
    message = ledger.message()
    assert message.usage is not None
    other = SqliteStore(ledger.path.with_name("other.db"))
    other.record([_with(message, usage=Usage(input_tokens=7, output_tokens=message.usage.output_tokens))])
    ledger.path = ledger.path.with_name("other.db")

    found = reconciled(ledger, server)

    [line] = [line for line in found.lines if line.measure == "input_tokens"]
    assert line.unexplained == line.difference == message.usage.input_tokens - 7
    assert not found.is_explained
    assert "unexplained" in found.by_cause()


# What cannot be had in a minute: other days, batches, charges

DAY = date(2026, 11, 10)
NOON = datetime(2026, 11, 10, 12, tzinfo=timezone.utc)
NOW = datetime(2026, 12, 10, tzinfo=timezone.utc)
OPENAI = "api.openai.com"


def a(**more: Any) -> Message:
    about: dict[str, Any] = {"timestamp": NOON, "operation": "chat.completions", "host": OPENAI}
    about |= {"response_model": "gpt-4o-2024-08-06", "usage": Usage(input_tokens=100, output_tokens=10)}
    return Message(**{"id": new_id(), **about, **more})


def _with(message: Message, **more: Any) -> Message:
    return Message(**{name: getattr(message, name) for name in message.__struct_fields__} | more)


def theirs(requests: int = 1, input_tokens: int = 100, output_tokens: int = 10, **more: Any) -> ModelUsage:
    about: dict[str, Any] = {"day": DAY, "model": "gpt-4o-2024-08-06", **more}
    return ModelUsage(counts=Counts(requests, input_tokens, 0, output_tokens), **about)


def compared(
    messages: Sequence[Message],
    usage: Sequence[ModelUsage],
    charges: Sequence[Charge] = (),
    *,
    cost: str | None = None,
    unread: Sequence[Message] = (),
    now: datetime = NOW,
) -> dict[tuple[str, str], dict[str, Decimal]]:
    """The causes of what differs, by day and measure; what has none is "unexplained"."""
    rows = [StoredMessage(message, None if cost is None else Decimal(cost)) for message in messages]
    lines, costs = compare(recorded_by_day(rows, OPENAI, unread), Organization(usage, charges), now)
    found = {}
    for line in (*lines, *costs):
        if line.difference:
            rest = {"unexplained": line.unexplained} if line.unexplained else {}
            found[f"{line.day:%m-%d}", line.measure] = {**line.causes, **rest}
    return found


def test_day_boundary() -> None:
    """A call over midnight counts here on the day it began, there on the day it ended."""
    late = a(timestamp=NOON.replace(hour=23, minute=59), latency_ms=90_000)
    tomorrow = DAY + timedelta(days=1)

    found = compared([late, a()], [theirs(), theirs(day=tomorrow)])

    assert found["11-10", "requests"] == {"day boundary": -1}
    assert found["11-11", "input_tokens"] == {"day boundary": 100}
    assert len({*map(str, found.values())}) == 6
    without = compared([a(), a()], [theirs(), theirs(day=tomorrow)])
    assert without["11-10", "requests"] == {"not in OpenAI's usage": -1}
    assert without["11-11", "requests"] == {"not recorded here": 1}


def test_batch() -> None:
    """A batch is one message with the tokens of all its requests; it may run on the next day."""
    batch = a(operation="batches", usage=Usage(input_tokens=5_000, output_tokens=500))
    tomorrow = DAY + timedelta(days=1)
    parts = [theirs(30, 3_000, 300, batch=True), theirs(20, 2_000, 200, batch=True, day=tomorrow)]

    assert compared([batch], [theirs(50, 5_000, 500, batch=True)]) == {("11-10", "requests"): {"batch": 49}}
    assert {cause for by in compared([batch], parts).values() for cause in by} == {"batch", "day boundary"}
    others = compared([batch], [theirs(50, 5_000, 500, batch=True), theirs(3, 300, 30)])
    assert others["11-10", "requests"] == {"batch": 50, "not recorded here": 2}
    assert others["11-10", "input_tokens"] == {"not recorded here": 300}


def test_run() -> None:
    """A run of an assistant calls the model as often as it needs to, and is one message."""
    assert compared([a(operation="threads.runs")], [theirs(4)]) == {("11-10", "requests"): {"batch": 3}}


def test_background() -> None:
    """A response that was begun, and not read since, is no message yet."""
    begun = a(usage=None, operation="responses")

    found = compared([], [theirs()], unread=[begun])

    assert {cause for by in found.values() for cause in by} == {"background"}


def test_other_hosts_are_others() -> None:
    """Azure's messages are not OpenAI's; those of OpenAI's regions are, and videos are in no usage."""
    regions = [a(), a(host="eu.api.openai.com")]
    others = [a(host="acme.openai.azure.com"), a(host="127.0.0.1:1"), a(operation="videos")]

    assert compared([*regions, *others], [theirs(2, 200, 20)]) == {}


def test_what_openai_does_not_count_is_not_compared() -> None:
    """OpenAI tells images and characters of some models, the API their tokens: only requests compare."""
    message = a(response_model="gpt-image-1", operation="images.generations")

    assert compared([message], [theirs(1, 0, 0, model="gpt-image-1", tells_tokens=False)]) == {}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o-mini-2024-07-18", "gpt-4o-mini"),
        ("gpt-4-0613", "gpt-4"),
        ("gpt-3.5-turbo-instruct:20230824-v2", "gpt-3.5-turbo-instruct"),
        ("ft:gpt-4o-mini-2024-07-18:acme::abc", "ft:gpt-4o-mini-2024-07-18:acme::abc"),
        ("text-embedding-3-small", "text-embedding-3-small"),
        (None, "(unknown)"),
    ],
)
def test_name_of(model: str | None, name: str) -> None:
    """A snapshot counts under its model's name: that is all there is to match where none has answered."""
    assert name_of(model) == name


def charge(amount: str, line_item: str | None = "gpt-4o-2024-08-06, input", currency: str = "usd") -> Charge:
    return Charge(DAY, line_item, Decimal(amount), currency)


@pytest.mark.parametrize(
    ("cost", "charges", "causes"),
    [
        ("0.5", [charge("0.5")], {}),
        ("0.5", [charge("0.25")], {"price": Decimal("-0.25")}),
        ("0.5", [charge("0.5"), charge("0.02", "web search tool calls")], {"other services": Decimal("0.02")}),
        ("0.5", [charge("0.5"), charge("0.0000003", "gpt-4o, output")], {"rounding": Decimal("0.0000003")}),
        ("0.5", [charge("0.46", currency="eur")], {"currency": Decimal("-0.5")}),
        (None, [charge("0.5")], {"no price": Decimal("0.5")}),
        ("0.5", [charge("0.6", None)], {"price": Decimal("0.1")}),
    ],
)
def test_costs(cost: str | None, charges: list[Charge], causes: dict[str, Decimal]) -> None:
    """Tokens that agree may cost more or less than their list price, for a reason."""
    found = compared([a()], [theirs()], charges, cost=cost)

    assert found == ({("11-10", COST): causes} if causes else {})


def test_open_costs() -> None:
    """Costs come later than usage."""
    found = compared([a()], [theirs()], cost="0.5", now=NOON + timedelta(hours=20))

    assert found == {("11-10", COST): {"open day": Decimal("-0.5")}}


@needs_prices
def test_cost_of_what_is_not_here() -> None:
    """Tokens of another application are worth their list price; what it pays beside that is the price."""
    found = compared([a()], [theirs(2, 1_100, 10)], [charge("0.5"), charge("0.003")], cost="0.5")

    assert found["11-10", COST] == {"not recorded here": Decimal("0.0025"), "price": Decimal("0.0005")}


def test_a_price_needs_all_tokens() -> None:
    """While tokens are unexplained, so is what they cost."""
    found = compared([a()], [theirs(1, 500, 10)], [charge("0.7")], cost="0.5")

    assert found["11-10", "input_tokens"] == {"unexplained": 400}
    assert found["11-10", COST] == {"unexplained": Decimal("0.2")}


# Whatever there is

days = st.sampled_from([DAY, DAY + timedelta(days=1), DAY + timedelta(days=2)])
models = st.sampled_from(["gpt-4o-2024-08-06", "gpt-4o", "gpt-4.1", "new"])
small = st.integers(0, 40)
messages = st.builds(
    a,
    timestamp=st.builds(
        lambda day, hour: datetime(day.year, day.month, day.day, hour, 59, tzinfo=timezone.utc),
        days,
        st.integers(0, 23),
    ),
    operation=st.sampled_from(["chat.completions", "batches", "threads.runs", "videos"]),
    status=st.sampled_from(["ok", "ok", "ok", "incomplete", "cancelled", "error"]),
    http_status=st.sampled_from([None, None, 500]),
    retries=st.sampled_from([None, 0, 2]),
    latency_ms=st.sampled_from([None, 5.0, 100_000_000.0]),
    host=st.sampled_from([OPENAI, OPENAI, "us.api.openai.com", "elsewhere", None]),
    response_model=models,
    usage=st.one_of(st.none(), st.builds(Usage, input_tokens=small, cached_tokens=small, output_tokens=small)),
)
stored = st.builds(StoredMessage, messages, st.one_of(st.none(), st.decimals(0, 1, places=6)))
usages = st.builds(
    ModelUsage,
    days,
    models,
    st.builds(Counts, small, small, small, small),
    st.booleans(),
    st.sampled_from([True] * 9 + [False]),
)
items = st.sampled_from(["gpt-4o, input", "gpt-4.1, output", "web search", None])
charged = st.builds(Charge, days, items, st.decimals(0, 1, places=7), st.sampled_from(["usd"] * 9 + ["eur"]))


@settings(deadline=None)
@given(
    st.lists(stored, max_size=12),
    st.lists(usages, max_size=8),
    st.lists(charged, max_size=4),
    st.lists(messages, max_size=2),
)
def test_causes_add_up(
    rows: list[StoredMessage], usage: list[ModelUsage], charges: list[Charge], unread: list[Message]
) -> None:
    """Of every number, what is explained and what is not add up to the difference, and nothing is explained twice."""
    now = datetime(2026, 11, 12, 18, tzinfo=timezone.utc)
    lines, costs = compare(recorded_by_day(rows, OPENAI, unread), Organization(usage, charges), now)

    for line in (*lines, *costs):
        parts = [*line.causes.values(), line.unexplained]
        assert sum(parts) == line.difference
        assert sum(map(abs, parts)) == abs(line.difference)  # all to the same side: no cause takes what another gave
        assert all(part in MEANINGS for cause in line.causes for part in cause.split(" or "))
    found = Reconciliation("2026-11", OPENAI, (), [*lines, *costs], ())
    for grouping in GROUPINGS:
        for total in found.total():
            if grouping != "model" or total.measure != COST:
                same = [line for line in found.grouped(grouping) if line.measure == total.measure]
                assert sum(line.ours for line in same) == total.ours
                assert sum(line.unexplained for line in same) == total.unexplained
    assert sum(line.ours for line in costs) == sum(
        row.cost_usd or 0
        for row in rows
        if row.message.host in (OPENAI, "us.api.openai.com")
        and row.message.status in ("ok", "incomplete")
        and row.message.operation != "videos"
    )
    json.dumps(found.as_json("day-model"))


def test_the_order_of_messages_does_not_matter() -> None:
    """The same ledger gives the same causes."""
    rows = [a(host=None), a(status="cancelled"), a(status="error", usage=None), a()]

    assert compared(rows, [theirs(4, 400, 40)]) == compared(rows[::-1], [theirs(4, 400, 40)])


def test_every_cause_is_found_here() -> None:
    """The table has no cause without words, and a line takes no more than is left, and never the other way."""
    assert len({*CAUSES}) == len(CAUSES)
    assert len({*COST_CAUSES}) == len(COST_CAUSES)
    line = Line("requests", Decimal(1), Decimal(6))
    for amount in (-3, 2, 0, 9):
        line.explain("batch", amount)
    assert line.causes == {"batch": 5}
    assert line.unexplained == 0


# OpenAI's answers


def test_all_pages_are_read(server: PracticeServer, client: openai.OpenAI) -> None:
    """A month and the days around it are more than the usage endpoints give at once."""
    client.chat.completions.create(**CHAT)
    now = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)

    with admin_client(environ(server)) as admin:
        found = fetch(admin, now - timedelta(days=80), now + timedelta(days=1))

    assert [(usage.day, usage.counts.requests) for usage in found.usage] == [(now.date(), 1)]
    asked = [exchange.path for exchange in server.exchanges if "usage/completions" in exchange.path]
    assert len(asked) == 3
    assert sum("page=" in path for path in asked) == 2


def test_projects(server: PracticeServer) -> None:
    """Only what a project has used."""
    for project in ("proj_a", "proj_b"):
        headers = {"OpenAI-Project": project}
        with openai.OpenAI(base_url=server.base_url, api_key="practice", default_headers=headers) as client:
            client.embeddings.create(model="text-embedding-3-small", input="order")
    now = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)

    with admin_client(environ(server)) as admin:
        [usage] = fetch(admin, now, now + timedelta(days=1), ["proj_a"]).usage

    assert usage.counts.requests == 1


@pytest.mark.skipif(not hasattr(openai.OpenAI, "admin"), reason="this SDK has no admin endpoints")
def test_the_sdk_reads_the_same(server: PracticeServer, client: openai.OpenAI) -> None:
    """The practice server answers the SDK's own admin methods, too."""
    client.chat.completions.create(**CHAT)
    usage = server.exchanges[0].usage or {}
    start = int(datetime.now(timezone.utc).timestamp()) - 86_400

    with openai.OpenAI(base_url=server.base_url, api_key="practice", admin_api_key="sk-admin-practice") as admin:
        page = admin.admin.organization.usage.completions(start_time=start, group_by=["model", "batch"])
        costs = admin.admin.organization.usage.costs(start_time=start, group_by=["line_item"])

    [result] = [result for bucket in page.data for result in bucket.results]
    assert result.object == "organization.usage.completions.result"
    assert (result.input_tokens, result.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    items = [result for bucket in costs.data for result in bucket.results]
    assert {getattr(item, "line_item", "") for item in items} == {
        "gpt-4o-mini-2024-07-18, input", "gpt-4o-mini-2024-07-18, output",
    }  # fmt: skip


def _told(answer: Any, status: int = 200) -> tuple[openai.OpenAI, datetime, datetime]:
    """A client that is told this, and a day to ask it for."""
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    headers = {"content-type": "application/json"}
    transport = http.MockTransport(lambda request: http.Response(status, headers=headers, content=content))
    web = http.Client(transport=transport, trust_env=False)
    return openai.OpenAI(api_key="sk-admin", max_retries=0, http_client=web), NOON.replace(hour=0), NOON


def test_amounts_are_exact() -> None:
    """OpenAI writes amounts as numbers or as texts; the digits are kept."""
    results = [
        {"object": "organization.costs.result", "amount": {"value": value, "currency": "usd"}, "line_item": "x"}
        for value in (0.06, "0.8958740000000000", 1, None)
    ]
    bucket = {"object": "bucket", "start_time": int(NOON.timestamp()), "end_time": 0, "results": results}

    found = fetch(*_told({"object": "page", "data": [bucket], "has_more": False, "next_page": None}))

    assert [charge.amount for charge in found.charges] == [Decimal("0.06"), Decimal("0.895874"), Decimal(1)]


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ({"data": [{"start_time": "soon", "results": []}]}, 200, "answers what is no page of usage"),
        ({"data": [], "has_more": True, "next_page": "p"}, 200, "goes round in circles"),
        ({"error": {"message": "Bad key."}}, 401, r"refuses OPENAI_ADMIN_KEY \(401\): .*Bad key.*admin-keys"),
        ({"error": {"message": "No scope."}}, 403, r"refuses OPENAI_ADMIN_KEY \(403\): .*No scope"),
        ({"error": {"message": "What?"}}, 404, "is not there .*OPENAI_BASE_URL"),
        ({"error": {"message": "Slow down."}}, 429, "answers 429: .*Slow down"),
        (b"<html>", 502, "answers 502"),
    ],
)
def test_what_is_answered_instead(answer: Any, status: int, said: str) -> None:
    """An error says who answered what, and what to do."""
    with pytest.raises(OrganizationError, match=said):
        fetch(*_told(answer, status))


def test_nobody_there() -> None:
    """A server that cannot be reached is named, and no password to it is."""
    client = openai.OpenAI(api_key="sk-admin", base_url="http://me:secret@127.0.0.1:9/v1", max_retries=0)
    with (
        client,
        pytest.raises(
            OrganizationError, match=r"^http://[^/]*127.0.0.1:9/v1/organization/usage/.* cannot be reached"
        ) as caught,
    ):
        fetch(client, NOON, NOON)
    assert "secret" not in str(caught.value)


def test_no_admin_key() -> None:
    """It says where to make one."""
    with pytest.raises(SettingsError, match=r"OPENAI_ADMIN_KEY is not set.*platform.openai.com/settings"):
        admin_client({"OPENAI_API_KEY": "sk-1"})


def test_a_month_to_come() -> None:
    """There is nothing to compare."""
    since, until = period(None, None, "2026-12", "UTC")
    assert since is not None
    assert until is not None
    with pytest.raises(QueryError, match="month=2026-12 has not begun"):
        span(since, until, NOON)
    with pytest.raises(QueryError, match="by='tag' must be one of: day, model, day-model"):
        Reconciliation("2026-11", OPENAI, (), [], ()).grouped("tag")


# The command


@pytest.fixture
def command(ledger: Ledger, server: PracticeServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-practice")
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)

    def run(*options: str) -> Any:
        ledger.messages()
        return CliRunner().invoke(commands, ["reconcile", "--destination", ledger.url, *options], prog_name="spryng")

    return run


def test_the_command_agrees(
    instrument: Callable[..., Ledger], client: openai.OpenAI, command: Callable[..., Any]
) -> None:
    """A day that agrees is one line; the day is not over, and that is said."""
    instrument()
    client.chat.completions.create(**CHAT)

    done = command("--by", "day-model")

    assert done.exit_code == 0, done.output
    day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    assert [line.split() for line in done.stdout.splitlines() if day in line] == (
        [[day, "gpt-4o-mini", "requests", "1", "1", "0", "equal"]]
        + [[day, "(all)", "cost", "USD", *line.split()[4:]] for line in done.stdout.splitlines() if "(all)" in line]
    )
    assert f"{day} is not over at 127.0.0.1" in done.stderr


def test_the_command_names_causes(
    instrument: Callable[..., Ledger], client: openai.OpenAI, command: Callable[..., Any]
) -> None:
    """The table, CSV and JSON have the same numbers and causes."""
    client.chat.completions.create(**CHAT)
    instrument()
    client.chat.completions.create(**CHAT)

    table, csv, found = command("--by", "model"), command("--by", "model", "--format", "csv"), command("--json")

    assert table.exit_code == csv.exit_code == found.exit_code == 0, table.output
    assert "gpt-4o-mini  requests" in table.stdout
    assert "not recorded here: +1 request, +508 input tokens" in table.stderr
    assert "other applications" in table.stderr
    assert "Every difference has a cause." in table.stderr
    assert 'gpt-4o-mini,requests,1,2,1,0,"{""not recorded here"": 1}"' in csv.stdout
    [requests] = [row for row in json.loads(found.stdout)["total"] if row["measure"] == "requests"]
    assert requests == {
        "day": None, "model": None, "measure": "requests", "ours": 1, "openai": 2, "difference": 1,
        "causes": {"not recorded here": 1}, "unexplained": 0,
    }  # fmt: skip
    assert json.loads(found.stdout)["explained"] is True


def test_the_command_knows_what_is_not_read(
    ledger: Ledger, server: PracticeServer, client: openai.OpenAI, command: Callable[..., Any]
) -> None:
    """A response in the background waits in the journal until it is read."""
    client.chat.completions.create(**CHAT)
    SqliteStore(ledger.path).record([a(timestamp=NOON)])
    begun = a(timestamp=datetime.now(timezone.utc), host=server.base_url.split("/")[2], usage=None)
    Deferred(ledger.journal).keep("resp_1", _with(begun, response_model="gpt-4o-mini"))

    done = command()

    assert done.exit_code == 0, done.output
    assert "background: +1 request, +508 input tokens" in done.stderr


def test_the_command_finds_something_wrong(
    ledger: Ledger, server: PracticeServer, client: openai.OpenAI, command: Callable[..., Any]
) -> None:
    """Exit code 3: tokens that differ for no reason."""
    client.chat.completions.create(**CHAT)
    host = server.base_url.split("/")[2]
    SqliteStore(ledger.path).record([a(timestamp=datetime.now(timezone.utc), host=host, response_model="gpt-4o-mini")])

    done = command()

    assert done.exit_code == 3, done.output
    assert "unexplained: +" in done.stderr


@pytest.mark.parametrize(
    ("variables", "options", "exit_code", "said"),
    [
        ({"OPENAI_ADMIN_KEY": ""}, [], 2, "OPENAI_ADMIN_KEY is not set"),
        ({"OPENAI_ADMIN_KEY": "sk-proj-1"}, [], 1, "refuses OPENAI_ADMIN_KEY (403)"),
        ({}, ["--month", "2999-01"], 2, "has not begun"),
        ({}, ["--month", "May"], 2, "is no month"),
        ({}, ["--month", "2020-01"], 0, "Neither the ledger nor 127.0.0.1"),
    ],
)
def test_the_command_fails_clearly(
    command: Callable[..., Any],
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    options: list[str],
    exit_code: int,
    said: str,
) -> None:
    """What is wrong, and whether it can be typed better."""
    SqliteStore(ledger.path).record([a()])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    done = command(*options)

    assert done.exit_code == exit_code, done.output
    assert said in done.stderr
