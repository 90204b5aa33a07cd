"""Budgets: what may be used, what is used, to the message; whose calls are refused; who is told, once.

Real ledgers, the real SDK, real processes and a real receiver that checks each signature.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spryng_instrument
from spryng_instrument import BudgetReached, spending, usage_context
from spryng_instrument import alerts as alerting
from spryng_instrument import recorder as recording
from spryng_instrument.alerts import Alerts
from spryng_instrument.budgets import Budget, Budgets, budget_states, read_budgets
from spryng_instrument.errors import BudgetExceeded, SettingsError, StoreError
from spryng_instrument.message import BILLABLE, Message, Usage, new_id
from spryng_instrument.prices import Source
from spryng_instrument.settings import resolve
from spryng_instrument.spending import Spending
from spryng_instrument.store.base import Filter, Record, UsageRow
from spryng_instrument.store.remote import RemoteLedger
from spryng_instrument.store.sqlite import SqliteStore
from spryng_instrument.testing import PracticeServer

from . import shapes, workers
from .conftest import Ledger
from .messages import message, needs_prices
from .scripted import Reply, ScriptedServer
from .serving import serving, spryng
from .shapes import SDK
from .test_processes import run

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ASK: dict[str, Any] = {"model": "gpt-4o-mini", "messages": HELLO}
KEY = b"a secret of thirty-two bytes ...".ljust(32, b".")
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of budgets: each given by its fields, a month of messages if nothing else is said."""

    def written(*budgets: dict[str, Any], head: str = "") -> str:
        lines = [head]
        for number, fields in enumerate(budgets):
            lines.append("[[budget]]")
            fields = {"name": f"b{number}", "period": "month", **fields}
            lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
        path = tmp_path / "budgets.toml"
        path.write_text("\n".join(lines))
        return str(path)

    return written


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call waits for a reading for as long as a busy machine takes."""
    monkeypatch.setattr(spending, "WAIT_S", 60.0)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is read every 50 ms."""
    monkeypatch.setattr(spending, "REFRESH_S", 0.05)


def used(key: str | None, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    """By budget: what this process takes for used, and in flight."""
    ours = recording.active.budgets if recording.active is not None else None
    assert ours is not None
    return used_by(ours, key, tags)


def used_by(ours: Spending, key: str | None, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    with ours._lock:
        ours._settle()
        return {tally.budget.name: (tally.messages, tally.tokens, tally.in_flight) for tally in ours._of(key, tags)}


def until(condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


# The file.


def test_a_file(write: Write) -> None:
    """Every field, and the defaults; money is exact."""
    path = write(
        {"name": "acme", "key": "acme", "tag": "support", "messages": 1000, "tokens": 5, "hard": True,
         "on_unknown": "closed", "anchor_day": 31},
        {"period": "day", "key": "*", "cost_usd": 1},
        head='webhook = "https://hooks.example.com/x"\nzone = "Europe/Berlin"',
    )  # fmt: skip
    text = Path(path).read_text().replace("cost_usd = 1", "cost_usd = 0.1")
    Path(path).write_text(text)
    assert read_budgets(path) == Budgets(
        (
            Budget("acme", "month", "acme", "support", 1000, 5, None, True, "closed", 31, "Europe/Berlin"),
            Budget("b1", "day", "*", cost_usd=Decimal("0.1"), zone="Europe/Berlin"),
        ),
        "https://hooks.example.com/x",
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[budget", "is no TOML"),
        ("budget = 3", "budget must be tables, each beginning with a line [[budget]]"),
        ("webhok = 'https://x'", "'webhok' is unknown; there are: webhook, zone, budget"),
        ("webhook = 'ftp://x'", "webhook='ftp://x' must be a URL that begins with https://"),
        ("zone = 'Berlin'", "zone='Berlin' must be an IANA name, as in 'Europe/Berlin'"),
        ("[[budget]]\nperiod = 'day'\nmessages = 1", "budget number 1: name is missing"),
        ("[[budget]]\nname = 'a'\nmessages = 1", "budget 'a': period is missing: it must be 'day' or 'month'"),
        ("[[budget]]\nname = 'a'\nperiod = 'week'\nmessages = 1", "budget 'a': period='week' must be 'day' or 'month'"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'", "budget 'a': it has no limit; give one or more of: messages, "),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = -5", "budget 'a': messages=-5 must be a whole number"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 0", "messages=0 must be a whole number, 1 or more"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = true", "messages=True must be a whole number"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\ntokens = 1.5", "tokens=1.5 must be a whole number"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\ncost_usd = '5'", "cost_usd='5' must be a number of US dollars"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\ncost_usd = nan", "cost_usd=NaN must be a number of US dollars"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\nhard = 1", "hard=1 must be true or false"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\nkey = ''", "key='' must be a customer's key, or '*'"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\nkeys = 'x'", "budget 'a': 'keys' is unknown; there"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\non_unknown = 'ask'", "must be 'open' or 'closed'"),
        ("[[budget]]\nname = 'a'\nperiod = 'month'\nmessages = 1\nanchor_day = 32", "must be a day of the month, 1 to"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\nanchor_day = 3", "anchor_day=3 is for period='month'"),
        ("[[budget]]\nname = 'a'\nperiod = 'day'\nmessages = 1\n" * 2, "name='a' is given to two budgets"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(tmp_path: Path, text: str, said: str) -> None:
    """The error names the file, the budget, the field, its value and what is allowed."""
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        read_budgets(str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_instrument_says_it_too(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not there, a destination that cannot be asked, a webhook without a secret: nothing begins."""
    with pytest.raises(SettingsError, match=r"budgets='.*none.toml' cannot be read: No such file"):
        spryng_instrument.instrument(budgets=tmp_path / "none.toml", journal=tmp_path / "j")
    path = write({"messages": 1}, head='webhook = "https://hooks.example.com"')
    with pytest.raises(SettingsError, match="cannot be asked what was used"):
        spryng_instrument.instrument(budgets=path, destination="cloudevents+http://127.0.0.1:9", journal=tmp_path / "j")
    for secret in (None, "", "secret", "whsec_!", "whsec_c2hvcnQ="):
        if secret is not None:
            monkeypatch.setenv("SPRYNG_WEBHOOK_SECRET", secret)
        with pytest.raises(SettingsError, match=r"SPRYNG_WEBHOOK_SECRET.*openssl rand"):
            spryng_instrument.instrument(budgets=path, destination=f"sqlite:///{tmp_path}/u.db")
    with pytest.raises(SettingsError, match="on_budget='explode': must be one of 'raise', 'warn', or a plain function"):
        spryng_instrument.instrument(on_budget="explode")
    assert recording.active is None


# Periods.


@pytest.mark.parametrize(
    ("zone", "period", "anchor", "time", "start", "stop"),
    [
        ("UTC", "day", 1, "2026-11-25T23:59:59", "2026-11-25T00:00", "2026-11-26T00:00"),
        ("Asia/Kolkata", "day", 1, "2026-11-25T18:30:00", "2026-11-25T18:30", "2026-11-26T18:30"),
        ("Europe/Berlin", "day", 1, "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),  # 23 hours
        ("Europe/Berlin", "day", 1, "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00"),  # 25 hours
        ("America/Sao_Paulo", "day", 1, "2018-11-04T12:00", "2018-11-04T03:00", "2018-11-05T02:00"),  # no midnight
        ("Europe/Berlin", "month", 1, "2026-03-31T22:00", "2026-03-31T22:00", "2026-04-30T22:00"),
        ("UTC", "month", 15, "2026-01-14T12:00", "2025-12-15T00:00", "2026-01-15T00:00"),
        ("UTC", "month", 15, "2026-12-15T00:00", "2026-12-15T00:00", "2027-01-15T00:00"),
        ("UTC", "month", 31, "2026-02-28T12:00", "2026-02-28T00:00", "2026-03-31T00:00"),
        ("UTC", "month", 31, "2026-02-27T12:00", "2026-01-31T00:00", "2026-02-28T00:00"),
        ("UTC", "month", 30, "2028-03-01T12:00", "2028-02-29T00:00", "2028-03-30T00:00"),
    ],
)  # fmt: skip
def test_periods(zone: str, period: str, anchor: int, time: str, start: str, stop: str) -> None:
    """Days and months are those of the budget's zone, with its changes of the clock, from its anchor day."""

    def moment(text: str) -> datetime:
        return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)

    budget = Budget("b", period, messages=1, anchor_day=anchor, zone=zone)
    assert budget.period_of(moment(time)) == (moment(start), moment(stop))


@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone.utc)),  # noqa: DTZ001
    st.sampled_from(["UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin", "Africa/Cairo"]),
    st.sampled_from(["day", "month"]),
    st.integers(1, 31),
)
def test_each_moment_is_in_one_period(time: datetime, zone: str, period: str, anchor: int) -> None:
    """Periods follow one another without a gap and without an overlap, whatever the zone and the anchor."""
    budget = Budget("b", period, messages=1, anchor_day=anchor, zone=zone)
    start, stop = budget.period_of(time)
    assert start <= time < stop
    assert budget.period_of(start) == budget.period_of(stop - timedelta(microseconds=1)) == (start, stop)
    assert budget.period_of(stop)[0] == stop
    assert budget.period_of(start - timedelta(microseconds=1))[1] == start


# Calls.


def test_exactly_as_many_as_allowed(
    instrument: Any, write: Write, client: openai.OpenAI, practice: PracticeServer
) -> None:
    """N calls go out, the next is refused before it is sent: no message, nothing retried, and the error says it all."""
    sent = len(practice.exchanges)
    ledger: Ledger = instrument(budgets=write({"key": "acme", "messages": 5, "hard": True}))
    retrying = client.with_options(max_retries=3)
    for _ in range(5):
        with usage_context("acme"):
            retrying.chat.completions.create(**ASK)
    for _ in range(3):
        with usage_context("acme"), pytest.raises(BudgetExceeded) as error:
            retrying.chat.completions.create(**ASK)
    with usage_context("other"):
        retrying.chat.completions.create(**ASK)

    reached = error.value.reached
    assert (reached.budget, reached.key, reached.unit, reached.used, reached.limit) == ("b0", "acme", "messages", 5, 5)
    assert pickle.loads(pickle.dumps(error.value)).reached == reached
    assert str(error.value).startswith("budget 'b0' of 'acme' is used up: 5 of 5 messages; it begins anew at 2")
    assert (error.value.__cause__, error.value.__context__) == (None, None)
    assert len(practice.exchanges) - sent == 6
    assert Counter(each.key for each in ledger.messages()) == {"acme": 5, "other": 1}
    assert (spryng_instrument.stats().refused, spryng_instrument.stats().recorded) == (3, 6)


@pytest.mark.parametrize("mode", ["threads", "tasks"])
def test_never_more_at_once(instrument: Any, write: Write, practice: PracticeServer, mode: str) -> None:
    """However many calls are made at once, exactly as many go out as there is room for: those in flight take room."""
    ledger: Ledger = instrument(budgets=write({"key": "*", "messages": 20, "hard": True}), beat_s=0.01)
    refused = Counter[str]()

    if mode == "threads":
        with openai.OpenAI(base_url=practice.base_url, api_key="practice", max_retries=0) as sdk:

            def work(number: int) -> None:
                for _ in range(10):
                    with usage_context(f"key{number % 2}"):
                        try:
                            sdk.chat.completions.create(**ASK)
                        except BudgetExceeded:
                            refused[f"key{number % 2}"] += 1

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
    else:

        async def all_at_once() -> None:
            async with openai.AsyncOpenAI(base_url=practice.base_url, api_key="practice", max_retries=0) as sdk:

                async def one(number: int) -> None:
                    with usage_context(f"key{number % 2}"):
                        try:
                            await sdk.chat.completions.create(**ASK)
                        except BudgetExceeded:
                            refused[f"key{number % 2}"] += 1

                await asyncio.gather(*(one(number) for number in range(80)))

        asyncio.run(all_at_once())
    assert refused == {"key0": 20, "key1": 20}
    assert Counter(each.key for each in ledger.messages()) == {"key0": 20, "key1": 20}
    assert used("key0") == {"b0": (20, used("key0")["b0"][1], 0)}


def test_calls_in_flight_take_room(instrument: Any, write: Write) -> None:
    """While a call is under way another one has no room; once it failed, it has."""
    instrument(budgets=write({"messages": 1, "hard": True}))
    with PracticeServer(latency_s=0.5) as slow, openai.OpenAI(
        base_url=slow.base_url, api_key="practice", max_retries=0
    ) as sdk, ThreadPoolExecutor(1) as pool:  # fmt: skip
        failing = pool.submit(sdk.chat.completions.create, **ASK, extra_headers={"x-practice-error": "500"})
        until(lambda: used(None)["b0"][2] == 1)
        with pytest.raises(BudgetExceeded, match=r"0 of 1 messages, and 1 in flight"):
            sdk.chat.completions.create(**ASK)
        with pytest.raises(openai.InternalServerError):
            failing.result()
        sdk.chat.completions.create(**ASK)
        with pytest.raises(BudgetExceeded, match="1 of 1 messages;"):
            sdk.chat.completions.create(**ASK)


def test_streams_take_room_until_they_end(instrument: Any, write: Write, client: openai.OpenAI) -> None:
    """A stream is in flight until it is read, left, or dropped and collected; then it is a message."""
    instrument(budgets=write({"messages": 3, "hard": True}))
    first = client.chat.completions.create(**ASK, stream=True)
    second = client.chat.completions.create(**ASK, stream=True)
    third = client.chat.completions.create(**ASK, stream=True)
    assert used(None)["b0"][::2] == (0, 3)
    with pytest.raises(BudgetExceeded, match="0 of 3 messages, and 3 in flight"):
        client.chat.completions.create(**ASK, stream=True)
    list(first)
    iterator = iter(second)
    next(iterator)
    second.response.close()
    del second, iterator
    assert used(None)["b0"][::2] == (2, 1)
    third.response.close()
    del third
    assert used(None)["b0"][::2] == (3, 0)


def test_whose_budget_it_is(instrument: Any, write: Write, client: openai.OpenAI) -> None:
    """Of one customer, of each customer, of all together, of a tag; from usage_context, tracked and track_usage."""
    path = write(
        {"name": "acme", "key": "acme", "messages": 99}, {"name": "each", "key": "*", "tokens": 10**6},
        {"name": "all", "messages": 99}, {"name": "support", "tag": "support", "period": "day", "messages": 99},
    )  # fmt: skip
    instrument(budgets=path)
    with usage_context("acme", tags=["support", "x"]):
        client.chat.completions.create(**ASK)

    @spryng_instrument.tracked(key="bluepeak", tags=["support"])
    def call() -> None:
        client.embeddings.create(model="text-embedding-3-small", input="hello")

    call()
    client.chat.completions.create(**ASK)
    spryng_instrument.track_usage(key="acme", usage={"input_tokens": 2, "output_tokens": 1})

    def messages(key: str | None, *tags: str) -> dict[str, int]:
        return {name: counts[0] for name, counts in used(key, tags).items()}

    expected = [
        (("acme",), {"acme": 2, "each": 2, "all": 4}),
        (("acme", "support"), {"acme": 2, "each": 2, "all": 4, "support": 2}),
        (("bluepeak",), {"each": 1, "all": 4}), ((None,), {"all": 4}), (("new",), {"each": 0, "all": 4}),
    ]  # fmt: skip
    for asked, counts in expected:
        assert messages(*asked) == counts
    assert spryng_instrument.flush()
    ours = recording.active.budgets if recording.active is not None else None
    assert ours is not None
    ours.refresh()
    assert not ours._own
    for asked, counts in expected:
        assert messages(*asked) == counts


def test_a_function_of_the_users(instrument: Any, write: Write, client: openai.OpenAI) -> None:
    """It gets the figures. What it raises reaches the caller as it was raised; if it returns, the call goes through."""
    told: list[BudgetReached] = []
    mine = ValueError("mine")

    def on_budget(reached: BudgetReached) -> None:
        told.append(reached)
        if len(told) == 2:
            raise mine

    ledger: Ledger = instrument(budgets=write({"key": "*", "messages": 1, "hard": True}), on_budget=on_budget)
    with usage_context("acme"):
        client.chat.completions.create(**ASK)
        client.chat.completions.create(**ASK)
        with pytest.raises(ValueError, match="mine") as error:
            client.chat.completions.create(**ASK)
    assert error.value is mine
    assert (mine.__cause__, mine.__context__) == (None, None)
    assert [(each.used, each.in_flight, each.limit) for each in told] == [(1, 0, 1), (2, 0, 1)]
    assert told[0].start < datetime.now(timezone.utc) < told[0].resets_at
    assert len(ledger.messages()) == 2
    assert spryng_instrument.stats().refused == 1


def test_warn(instrument: Any, write: Write, client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """on_budget="warn" lets calls through, and says so once; a soft budget does not even that."""
    ledger: Ledger = instrument(
        budgets=write({"messages": 1, "hard": True}, {"messages": 1, "tokens": 1}), on_budget="warn"
    )
    for _ in range(4):
        client.chat.completions.create(**ASK)
    assert len(ledger.messages()) == 4
    [said] = [record.message for record in caplog.records if "lets calls through" in record.message]
    assert said.startswith("budget 'b0' is used up: 1 of 1 messages; ")


def test_tokens(instrument: Any, write: Write, client: openai.OpenAI) -> None:
    """Once the tokens are used, calls are refused; those of the call that used them up are beyond the limit."""
    ledger: Ledger = instrument(budgets=write({"tokens": 10, "hard": True}))
    client.chat.completions.create(**ASK)
    with pytest.raises(BudgetExceeded, match=r"of 10 tokens"):
        client.chat.completions.create(**ASK)
    usage = ledger.message().usage
    assert usage is not None
    assert used(None)["b0"][1] == (usage.input_tokens or 0) + (usage.output_tokens or 0)


@needs_prices
def test_money(instrument: Any, write: Write, client: openai.OpenAI, fast: None) -> None:
    """What the ledger has priced counts, once it has: a reading prices it."""
    path = write({"cost_usd": 1, "hard": True})
    Path(path).write_text(Path(path).read_text().replace("cost_usd = 1", "cost_usd = 0.0000001"))
    instrument(budgets=path, beat_s=0.01)
    client.chat.completions.create(**ASK)

    def refused() -> BudgetExceeded | None:
        try:
            client.chat.completions.create(**ASK)
        except BudgetExceeded as exc:
            return exc
        return None

    assert "of 0.0000001 USD" in str(until(refused))


def test_readings_do_not_wait_for_all_prices(write: Write, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many messages have no cost yet, a reading comes after a stated time; later ones have the other costs."""
    monkeypatch.setattr(spending, "PRICE_S", 0.3)

    def slowly(_: Message) -> Decimal:
        time.sleep(0.02)
        return Decimal(1)

    monkeypatch.setattr("spryng_instrument.prices.price_source", lambda: Source("of the test"))
    monkeypatch.setattr("spryng_instrument.prices.price_of", slowly)
    SqliteStore(ledger.path).record(
        [message(usage=Usage(input_tokens=1), timestamp=datetime.now(timezone.utc)) for _ in range(50)]
    )
    resolved = resolve({"destination": f"sqlite:///{ledger.path}", "budgets": write({"cost_usd": 1000})})
    ours = spending.open_spending(resolved, nothing_waits=lambda: True, bug=pytest.fail)
    assert ours is not None
    read = []
    for _ in range(20):
        ours.refresh()
        with ours._lock:
            [tally] = ours._of(None, ())
        read.append(tally.cost_usd)
        if tally.cost_usd == 50:
            break
    ours.stop(1)
    assert read[0] < 50
    assert read[-1] == 50


# What is used.


keys = st.sampled_from([None, "acme", "bluepeak"])
tags = st.sampled_from([(), ("support",), ("support", "x")])
spent = st.builds(
    lambda key, tags, status, usage: (key, tags, status, usage),
    keys, tags, st.sampled_from(["ok", "ok", "incomplete", "error", "cancelled"]),
    st.none() | st.builds(Usage, input_tokens=st.none() | st.integers(0, 50), output_tokens=st.integers(0, 50)),
)  # fmt: skip
steps = st.lists(st.one_of(
    st.tuples(st.just("ours"), spent), st.tuples(st.just("theirs"), spent), st.tuples(st.just("yesteryear"), spent),
    st.tuples(st.just("deliver"), st.integers(0, 3)), st.tuples(st.just("read"), st.integers(0, 3)),
), max_size=25)  # fmt: skip
BUDGETS = Budgets((
    Budget("acme", "month", "acme", messages=9), Budget("each", "day", "*", messages=9),
    Budget("all", "month", messages=9), Budget("support", "day", None, "support", messages=9),
))  # fmt: skip


class Racing:
    """A ledger in which messages of ours arrive just as it is asked."""

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.arriving: list[Message] = []

    def _arrive(self) -> None:
        if self.arriving:
            self.store.record([self.arriving.pop()])

    def usage(self, by: str, where: Filter = Filter(), *, zone: str = "UTC") -> list[UsageRow]:  # noqa: B008
        self._arrive()
        rows = self.store.usage(by, where, zone=zone)
        self._arrive()
        return rows

    def total(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        self._arrive()
        row = self.store.total(where)
        self._arrive()
        return row

    def found(self, ids: Any) -> Any:
        found = self.store.found(ids)
        self._arrive()
        return found

    def close(self) -> None:
        pass


@settings(max_examples=60, deadline=None)
@given(steps)
def test_used_is_the_sum_over_messages(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Whatever is recorded, delivered and read in whatever order, also while the ledger is asked: each message that
    this process can know of counts once, and none of another year."""
    ledger = Racing(SqliteStore(tmp_path_factory.mktemp("used") / "usage.db"))
    waiting: list[Message] = []
    ours = Spending(
        BUDGETS, ledger, None, on_budget="raise", nothing_waits=lambda: not waiting and not ledger.arriving,
        bug=lambda doing: pytest.fail(doing),
    )  # fmt: skip
    known: list[Message] = []
    theirs: list[Message] = []
    now = datetime.now(timezone.utc)
    for what, value in steps:
        if what in ("ours", "theirs", "yesteryear"):
            key, tags, status, usage = value
            time_ = now if what != "yesteryear" else now - timedelta(days=365)
            made = Message(new_id(), time_, "custom", status, key, tags=tags, usage=usage)
            if what == "theirs":
                ledger.store.record([made])
                theirs.append(made)
            else:
                ours.ended(made)
                waiting.append(made)
                known += [made] if what == "ours" else []
        elif what == "deliver":
            ledger.store.record(waiting[:value])
            del waiting[:value]
        else:
            ledger.arriving, waiting = waiting[:value], waiting[value:]
            ours.refresh()
            waiting = [*ledger.arriving, *waiting]
            ledger.arriving = []
            known += theirs
            theirs = []
        for key, tags in ((None, ()), ("acme", ()), ("acme", ("support",)), ("bluepeak", ("support", "x"))):
            found = used_by(ours, key, tags)
            for budget in BUDGETS.budgets:
                counted = [
                    each
                    for each in known
                    if budget.concerns(key, tags) and budget.concerns(each.key, each.tags)
                    and (budget.key != "*" or each.key == key)
                ]  # fmt: skip
                if budget.concerns(key, tags):
                    messages = sum(each.status in BILLABLE for each in counted)
                    tokens = sum(
                        (each.usage.input_tokens or 0) + (each.usage.output_tokens or 0)
                        for each in counted
                        if each.usage is not None
                    )
                    assert found[budget.name] == (messages, tokens, 0), (budget, key, tags)


def test_a_period_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At midnight the day's budget begins anew and the month's goes on; who began before it counts in the old day."""
    clock = [datetime(2026, 11, 25, 23, 59, 59, tzinfo=timezone.utc)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return clock[0]

    class Time:
        monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)
        time = staticmethod(lambda: clock[0].timestamp())

    monkeypatch.setattr(spending, "datetime", Clock)
    monkeypatch.setattr(spending, "time", Time)
    store = SqliteStore(tmp_path / "usage.db")
    day, month = Budget("day", "day", messages=2, hard=True), Budget("month", "month", messages=3)
    ours = Spending(
        Budgets((day, month)), store, None, on_budget="raise", nothing_waits=lambda: False, bug=lambda doing: None
    )
    monkeypatch.setattr(ours, "keep_up", lambda: None)
    ours.refresh()
    first, second = ours.admit(None, ()), ours.admit(None, ())
    assert used_by(ours, None) == {"day": (0, 0, 2), "month": (0, 0, 2)}
    ours.ended(message(timestamp=clock[0]), first)
    late = message(timestamp=clock[0])
    clock[0] += timedelta(seconds=2)
    third = ours.admit(None, ())
    assert used_by(ours, None) == {"day": (0, 0, 1), "month": (1, 0, 2)}
    ours.ended(late, second)
    ours.ended(message(timestamp=clock[0]), third)
    assert used_by(ours, None) == {"day": (1, 0, 0), "month": (3, 0, 0)}


def test_other_processes_are_seen(
    instrument: Any, write: Write, client: openai.OpenAI, ledger: Ledger, fast: None
) -> None:
    """What another process has delivered counts from the next reading on; before the first call, from the first."""
    SqliteStore(ledger.path).record([message(timestamp=datetime.now(timezone.utc), key="acme") for _ in range(2)])
    instrument(budgets=write({"key": "acme", "messages": 4, "hard": True}))
    with usage_context("acme"):
        client.chat.completions.create(**ASK)
        assert used("acme")["b0"][0] == 3
        SqliteStore(ledger.path).record([message(timestamp=datetime.now(timezone.utc), key="acme")])
        until(lambda: used("acme")["b0"][0] == 4)
        with pytest.raises(BudgetExceeded):
            client.chat.completions.create(**ASK)


def test_the_first_call_waits_for_the_ledger(
    instrument: Any, write: Write, client: openai.OpenAI, ledger: Ledger
) -> None:
    """A budget that is used up refuses the very first call of a process, sync or async."""
    SqliteStore(ledger.path).record([message(timestamp=datetime.now(timezone.utc), key="acme")])
    path = write({"key": "acme", "messages": 1, "hard": True})
    instrument(budgets=path)
    with usage_context("acme"), pytest.raises(BudgetExceeded):
        client.chat.completions.create(**ASK)
    spryng_instrument.uninstrument()

    instrument(budgets=path)

    async def first() -> None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="practice", max_retries=0) as sdk:
            with usage_context("acme"), pytest.raises(BudgetExceeded):
                await sdk.chat.completions.create(**ASK)

    asyncio.run(first())


def test_no_loop_is_blocked(
    instrument: Any, write: Write, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call waits for the ledger, other tasks of its loop go on; it does not wait for ever."""
    reading = threading.Event()
    monkeypatch.setattr(SqliteStore, "total", lambda self, where: reading.wait(20) and UsageRow(None))
    monkeypatch.setattr(spending, "WAIT_S", 0.5)
    instrument(budgets=write({"messages": 1, "hard": True}), exit_timeout_s=0.1)

    async def first() -> list[str]:
        happened = []

        async def call() -> None:
            async with openai.AsyncOpenAI(base_url=client.base_url, api_key="practice", max_retries=0) as sdk:
                await sdk.chat.completions.create(**ASK)
            happened.append("called")

        calling = asyncio.create_task(call())
        while not calling.done():
            await asyncio.sleep(0.01)
            happened.append("went on")
        await calling
        return happened

    happened = asyncio.run(first())
    reading.set()
    assert happened.index("called") > 5


@pytest.mark.skipif(not SDK["responses API"], reason=f"openai {openai.__version__} has no responses API")
async def test_background_work_takes_no_room(instrument: Any, write: Write) -> None:
    """What is answered before it is done is in flight until it is answered, and used once it is seen to be done."""
    instrument(budgets=write({"messages": 1, "hard": True}))
    queued = {"id": "resp_1", "object": "response", "status": "queued", "model": "gpt-5", "output": [], "usage": None}
    done = {**queued, "status": "completed", "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}
    bodies = [json.dumps(body).encode() for body in (queued, done)]
    transport, _ = shapes.serving(*((200, "application/json", [body]) for body in bodies))
    async with shapes.client_of("sync", transport=transport) as sdk:
        sdk.responses.create(model="gpt-5", input="x", extra_body={"background": True})
        assert used(None)["b0"] == (0, 0, 0)
        sdk.responses.retrieve("resp_1")
        assert used(None)["b0"] == (1, 5, 0)
        with pytest.raises(BudgetExceeded):
            sdk.responses.create(model="gpt-5", input="x", extra_body={"background": True})


# Where the ledger cannot be read.


@pytest.mark.parametrize("on_unknown", ["open", "closed"])
def test_a_ledger_that_cannot_be_read(
    instrument: Any, write: Write, client: openai.OpenAI, ledger: Ledger, on_unknown: str, fast: None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Open lets calls through, closed refuses them; what this process did itself counts; later on, all does."""
    ledger.path.write_bytes(b"no ledger" * 1000)
    instrument(budgets=write({"messages": 2, "hard": True, "on_unknown": on_unknown}), beat_s=0.02)
    if on_unknown == "closed":
        with pytest.raises(
            BudgetExceeded, match=r"budget 'b0' is unknown, and closed: the ledger was not read yet \(.*is no"
        ):
            client.chat.completions.create(**ASK)
    else:
        client.chat.completions.create(**ASK)
        client.chat.completions.create(**ASK)
        with pytest.raises(BudgetExceeded, match="2 of 2 messages"):
            client.chat.completions.create(**ASK)
    assert len([each for each in caplog.records if each.message.startswith("budgets cannot be looked up")]) == 1
    ledger.path.unlink()
    until(lambda: recording.active and recording.active.budgets and recording.active.budgets.failure is None)
    if on_unknown == "closed":
        client.chat.completions.create(**ASK)
    else:
        until(lambda: spryng_instrument.stats().waiting == 0)
        with pytest.raises(BudgetExceeded, match="2 of 2 messages;"):
            client.chat.completions.create(**ASK)


def test_a_reading_grows_old(instrument: Any, write: Write, client: openai.OpenAI, ledger: Ledger, fast: None,
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A reading holds for a stated time, then the budget is unknown."""
    monkeypatch.setattr(spending, "IN_TIME_S", 0.3)
    instrument(budgets=write({"messages": 10**6, "hard": True, "on_unknown": "closed"}))
    client.chat.completions.create(**ASK)
    assert spryng_instrument.flush()
    garbage = ledger.path.with_name("garbage")
    garbage.write_bytes(b"no ledger" * 1000)
    garbage.replace(ledger.path)  # at once: a reader that finds none, or a part, may make a ledger of it

    def unknown() -> bool:
        try:
            client.chat.completions.create(**ASK)
        except BudgetExceeded as exc:
            return bool(re.search(r"the ledger was not read for \d+ s \(.*is no ledger", str(exc)))
        return False

    until(unknown)


class Failing(Racing):
    """A ledger that cannot be read while it *fails*."""

    fails = True

    def total(self, where: Filter = Filter()) -> UsageRow:  # noqa: B008
        if self.fails:
            raise StoreError("it does not answer")
        return super().total(where)


def test_a_ledger_that_fails_is_asked_ever_less(ledger: Ledger) -> None:
    """With each reading that fails the next one is later, up to about a minute, and not at the same moment in each
    process; a reading holds for no longer because of that; after one that succeeds, they are as often as before."""
    failing = Failing(SqliteStore(ledger.path))

    def spending_of_a_process() -> Spending:
        return Spending(
            Budgets((Budget("all", "month", messages=1),)), failing, None, on_budget="raise",
            nothing_waits=lambda: True, bug=pytest.fail,
        )  # fmt: skip

    processes = [spending_of_a_process() for _ in range(20)]
    pauses = []
    for _ in range(12):
        for ours in processes:
            ours._attempt()
        pauses.append([ours._pause_s for ours in processes])
    assert all(before < after for before, after in zip(pauses[0], pauses[2], strict=True))
    assert 45 < min(pauses[-1]) < max(pauses[-1]) < 75
    assert max(pauses[-1]) - min(pauses[-1]) > 1
    ours = processes[0]
    assert not ours._in_time()
    failing.fails = False
    ours._attempt()
    assert ours._in_time()
    interval_s = ours._interval_s
    assert ours._pause_s == interval_s < 20
    failing.fails = True
    for _ in range(12):
        ours._attempt()
    assert ours._pause_s > 45
    assert ours._interval_s == interval_s


def test_what_is_lost_is_forgotten(instrument: Any, write: Write, client: openai.OpenAI, ledger: Ledger) -> None:
    """A message that the ledger can never take is not remembered for ever."""
    instrument(budgets=write({"messages": 9}))
    ours = recording.active.budgets if recording.active is not None else None
    assert ours is not None
    ours.ended(message(timestamp=datetime.now(timezone.utc)))
    assert used(None)["b0"][0] == 1
    ours.refresh()
    assert used(None)["b0"][0] == 0
    assert not ours._own


# Processes and threads.


def test_a_message_that_a_bug_has_kept_out_takes_no_room(
    instrument: Any, write: Write, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call went through, and the next one does."""
    instrument(budgets=write({"messages": 1, "hard": True}))
    with monkeypatch.context() as broken:
        broken.setattr(recording, "strict", False)
        broken.setattr(recording, "encode", lambda message: 1 / 0)
        client.chat.completions.create(**shapes.CHAT)
    client.chat.completions.create(**shapes.CHAT)
    with pytest.raises(BudgetExceeded):
        client.chat.completions.create(**shapes.CHAT)
    assert spryng_instrument.stats().errors == 1


@needs_prices
def test_no_call_meets_half_an_import(write: Write) -> None:
    """Prices are loaded by instrument(), not by a thread beside a call: the HTTP library that comes with them is one
    that openai looks for, and would find the half of."""
    code = (
        "import sys, spryng_instrument as s; before = 'genai_prices' in sys.modules;"
        "s.instrument(destination=f'sqlite:///{sys.argv[1]}/u.db', budgets=sys.argv[2]);"
        "print(before, 'genai_prices.data_snapshot' in sys.modules)"
    )
    path = write({"cost_usd": 1})
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(path).parent), path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True"]


def test_no_budgets_no_thread(instrument: Any, write: Write, client: openai.OpenAI) -> None:
    """Without budgets nothing of them is loaded or runs; with them one thread does, from the first call, to the end."""
    code = (
        "import sys, threading, spryng_instrument as s; s.instrument(destination=f'sqlite:///{sys.argv[1]}/u.db');"
        "s.track_usage(key='a', usage={'input_tokens': 1}); s.flush();"
        "print(*sys.modules, *[t.name for t in threading.enumerate()])"
    )
    path = write()
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(path).parent)], capture_output=True, text=True, check=True
    )
    assert "spryng-pump" in done.stdout
    assert "budgets" not in done.stdout
    assert "spending" not in done.stdout

    def threads() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("spryng-")]

    instrument(budgets=path)
    client.chat.completions.create(**ASK)
    assert "spryng-budgets" not in threads()
    spryng_instrument.uninstrument()
    instrument(budgets=write({"messages": 5}))
    assert "spryng-budgets" not in threads()
    client.chat.completions.create(**ASK)
    assert "spryng-budgets" in threads()
    spryng_instrument.uninstrument()
    assert threads() == []


def test_idle_processes_leave_the_ledger_alone(instrument: Any, write: Write, client: openai.OpenAI, fast: None,
                                               monkeypatch: pytest.MonkeyPatch, ledger: Ledger) -> None:  # fmt: skip
    """Without calls nothing is read; the first call after that finds a reading of its moment."""
    monkeypatch.setattr(spending, "IDLE_AFTER_S", 0.2)
    monkeypatch.setattr(spending, "IN_TIME_S", 0.1)
    instrument(budgets=write({"messages": 3, "hard": True}))
    client.chat.completions.create(**ASK)
    ours = recording.active.budgets if recording.active is not None else None
    assert ours is not None
    until(lambda: ours._idle)
    read_at = ours._read_at
    SqliteStore(ledger.path).record([message(timestamp=datetime.now(timezone.utc)) for _ in range(2)])
    until(lambda: not ours._in_time())
    assert ours._read_at == read_at
    with pytest.raises(BudgetExceeded):
        client.chat.completions.create(**ASK)


def test_a_forked_child_counts_for_itself(write: Write, tmp_path: Path) -> None:
    """A child takes over what its parent had read, has a thread of its own, and no lock of its parent's holds it up."""
    write({"key": "acme", "messages": 10, "hard": True})
    told = run("budget_fork", tmp_path)
    assert told["ended"] == [True] * 3
    assert told["sent"] == [8, 0, 0]


def test_many_processes_share_a_budget(write: Write, tmp_path: Path) -> None:
    """Four processes go beyond a shared budget by no more than what is sent within the staleness.

    That is: when a process let its last call out, it had read of fewer calls than the limit. What had returned in any
    process 2 s before that reading, which is 40 of their beats, was in the ledger by then.
    """
    write({"key": "acme", "messages": 600, "hard": True})
    told = run("budget_share", tmp_path, processes=4)
    assert told["ended"] == [True] * 4
    times = sorted(time for calls in told["calls"] for time, _ in calls)
    assert len(times) >= 600
    assert times[599] - times[0] > 2.5  # or nothing would be tested
    for calls in told["calls"]:
        assert sum(time < calls[-1][1] - 2 for time in times) < 600
    print(f"{len(times)} calls went out of 600")


# Alerts.


class Receiver:
    """A webhook's receiver as a customer would write it: it checks the signature, and remembers what it was told.

    Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """

    def __init__(self) -> None:
        self.status = 200
        self.refuses: dict[str | None, int] = {}
        """Status by customer."""
        self.hangs_s = 0.0
        self.got: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                id, stamp = self.headers["webhook-id"], self.headers["webhook-timestamp"]
                signed = hmac.new(KEY, f"{id}.{stamp}.".encode() + body, hashlib.sha256).digest()
                assert self.headers["webhook-signature"] == f"v1,{base64.b64encode(signed).decode()}"
                assert abs(int(stamp) - time.time()) < 60
                assert self.headers["content-type"] == "application/json"
                outer.got.append((id, json.loads(body)))
                time.sleep(outer.hangs_s)
                self.send_response(outer.refuses.get(outer.got[-1][1]["data"]["key"], outer.status))
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def told(self) -> list[tuple[str, str | None, int]]:
        return [
            (body["data"]["budget"], body["data"]["key"], body["data"]["threshold_percent"]) for _, body in self.got
        ]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("SPRYNG_WEBHOOK_SECRET", SECRET)
    receiver = Receiver()
    yield receiver
    receiver.close()


def test_alerts(instrument: Any, write: Write, client: openai.OpenAI, receiver: Receiver, fast: None,
                caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """At 50, 80 and 100 % the receiver and the log are told, once, with the figures."""
    ledger: Ledger = instrument(
        budgets=write({"key": "*", "tag": "t", "messages": 4}, head=f'webhook = "{receiver.url}"'), beat_s=0.02
    )
    with usage_context("acme", tags=["t"]):
        client.chat.completions.create(**ASK)
        client.chat.completions.create(**ASK)
        until(lambda: receiver.told == [("b0", "acme", 50)])
        client.chat.completions.create(**ASK)
        client.chat.completions.create(**ASK)
        until(lambda: len(receiver.told) == 3)
        client.chat.completions.create(**ASK)
    until(lambda: len(ledger.store.records("alert.sent")) == 3)
    time.sleep(0.3)
    assert receiver.told == [("b0", "acme", 50), ("b0", "acme", 80), ("b0", "acme", 100)]
    id, body = receiver.got[0]
    start, stop = Budget("b", "month").period_of(datetime.now(timezone.utc))
    assert id == ledger.store.records("alert")[0].id.replace(":", "_")
    assert body["type"] == "budget.alert"
    assert body["data"] == {
        "budget": "b0", "key": "acme", "tag": "t", "threshold_percent": 50, "unit": "messages", "used": 2, "limit": 4,
        "at_least": False, "hard": False, "since": start.isoformat(), "until": stop.isoformat(),
    }  # fmt: skip
    said = [each.message for each in caplog.records if "has reached" in each.message]
    assert said[0].startswith("budget 'b0' of 'acme' has reached 50 %: 2 of 4 messages; it begins anew at ")
    assert len(said) == 3


def test_four_processes_tell_once(write: Write, tmp_path: Path, receiver: Receiver) -> None:
    """Four processes see the thresholds passed at the same moment: each alert is told exactly once."""
    write({"key": "acme", "messages": 40}, head=f'webhook = "{receiver.url}"')
    told = run("budget_alerts", tmp_path, processes=4, calls=10)
    assert told["ended"] == [True] * 4
    assert sorted(receiver.told) == [("b0", "acme", 50), ("b0", "acme", 80), ("b0", "acme", 100)]
    assert len({id for id, _ in receiver.got}) == 3


def test_killed_before_it_posted(write: Write, tmp_path: Path, receiver: Receiver) -> None:
    """Who appended an alert and was killed has told nobody: after a minute another one does, with the same id, once."""
    path = write({"key": "acme", "messages": 1}, head=f'webhook = "{receiver.url}"')
    run("budget_die", tmp_path, status=-signal.SIGKILL)
    store = SqliteStore(workers.ledger_of(tmp_path))
    appended = store.records("alert")
    assert len(appended) == 3
    assert receiver.got == []
    budgets, now = read_budgets(path), datetime.now(timezone.utc)
    others = [Alerts(store, budgets) for _ in range(3)]
    for other in others:
        other.look(budget_states(store, budgets.budgets, now), now)
        other.post(now)
    assert receiver.got == []
    later = now + timedelta(seconds=61)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda other: other.post(later), others))
    assert sorted(id for id, _ in receiver.got) == sorted(each.id.replace(":", "_") for each in appended)
    for other in others:
        other.post(later + timedelta(hours=3))
    assert len(receiver.got) == 3


@pytest.mark.parametrize("status", [500, 302, 410])
def test_a_receiver_that_fails(write: Write, ledger: Ledger, receiver: Receiver, status: int,
                               monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """It is tried again at growing intervals, said once, until it acknowledges; a redirect is not followed."""
    monkeypatch.setattr(alerting, "TRIES_S", (0.0, 0.01, 0.01))
    receiver.status = status
    ledger_store = SqliteStore(ledger.path)
    ledger_store.record([message(timestamp=datetime.now(timezone.utc))])
    budgets = read_budgets(write({"messages": 2}, head=f'webhook = "{receiver.url}"'))
    now = datetime.now(timezone.utc)
    alerts = Alerts(ledger_store, budgets)
    alerts.look(budget_states(ledger_store, budgets.budgets, now), now)
    assert alerts.wants_to_post
    alerts.post(now)
    first = 1 if status == 410 else 3  # what is refused is not sent at once again
    assert len(receiver.got) == first
    passed = []
    for seconds in range(0, 600, 10):
        before = len(receiver.got)
        alerts.post(now + timedelta(seconds=seconds))
        if len(receiver.got) > before:
            passed.append(seconds)
    assert passed == [60, 180, 420]
    receiver.status = 204
    alerts.post(now + timedelta(hours=2))
    alerts.post(now + timedelta(hours=9))
    assert len(receiver.got) == first + 4
    assert len({id for id, _ in receiver.got}) == 1
    assert len([each for each in caplog.records if "could not be posted" in each.message]) == 1


@pytest.fixture
def many_alerts(write: Write, ledger: Ledger, receiver: Receiver,
                monkeypatch: pytest.MonkeyPatch) -> tuple[Alerts, SqliteStore]:  # fmt: skip
    """Of 20 customers, c00 to c19, three alerts each: appended, and not posted."""
    store = SqliteStore(ledger.path)
    now = datetime.now(timezone.utc)
    store.record([message(key=f"c{number:02}", timestamp=now) for number in range(20)])
    budgets = read_budgets(write({"key": "*", "messages": 1}, head=f'webhook = "{receiver.url}"'))
    alerts = Alerts(store, budgets)
    alerts.look(budget_states(store, budgets.budgets, now), now)
    assert len(store.records("alert")) == 60
    monkeypatch.setattr(alerting, "ROUND_S", 120.0)
    return alerts, store


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("again", [False, True], ids=["new", "due again"])
def test_a_refused_alert_keeps_no_other_from_being_told(
    many_alerts: tuple[Alerts, SqliteStore], receiver: Receiver, status: int, again: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """What the receiver has something against is posted again at growing intervals, and said; all others are told."""
    alerts, store = many_alerts
    receiver.refuses = {"c00": status}
    now = datetime.now(timezone.utc)
    if again:
        alerts._new.clear()  # whoever appended them was killed
        now += timedelta(seconds=61)
    alerts.post(now)
    assert len(store.records("alert.sent")) == 57
    assert len(receiver.got) == 60
    alerts.post(now + timedelta(seconds=30))
    assert len(receiver.got) == 60
    assert f"the webhook answered {status}" in caplog.text
    receiver.refuses = {}
    alerts.post(now + timedelta(hours=2))
    assert len(store.records("alert.sent")) == 60


def test_an_alert_that_breaks_the_receiver_keeps_no_other_from_being_told(
    many_alerts: tuple[Alerts, SqliteStore], receiver: Receiver
) -> None:
    """A receiver that fails with some alerts is told the others in the rounds after."""
    alerts, store = many_alerts
    alerts._new.clear()
    receiver.refuses = {"c00": 500}
    for seconds in (61, 76, 91, 106):
        alerts.post(datetime.now(timezone.utc) + timedelta(seconds=seconds))
    assert len(store.records("alert.sent")) == 57


@pytest.mark.parametrize("status", [500, 408, 429])
def test_a_receiver_that_is_down_is_asked_once_a_round(
    many_alerts: tuple[Alerts, SqliteStore], receiver: Receiver, status: int
) -> None:
    """However many alerts are due, a round in which the receiver takes none posts one of them and appends for one."""
    alerts, store = many_alerts
    alerts._new.clear()
    receiver.status = status
    for number, seconds in enumerate((61, 76, 91), 1):
        alerts.post(datetime.now(timezone.utc) + timedelta(seconds=seconds))
        assert (len(receiver.got), len(store.records("alert.again"))) == (number, number)
    assert len({id for id, _ in receiver.got}) == 3
    receiver.status = 200
    alerts.post(datetime.now(timezone.utc) + timedelta(hours=1))
    assert len(store.records("alert.sent")) == 60


def test_a_round_of_posts_ends(many_alerts: tuple[Alerts, SqliteStore], receiver: Receiver,
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A slow receiver holds whoever posts for a stated time; what it was not told in it is told in the next rounds."""
    alerts, store = many_alerts
    monkeypatch.setattr(alerting, "ROUND_S", 2.0)
    receiver.hangs_s = 0.7
    alerts.post()
    assert 1 <= len(receiver.got) <= 3
    now = datetime.now(timezone.utc) + timedelta(seconds=61)
    before = len(receiver.got)
    alerts.post(now)
    assert before < len(receiver.got) <= before + 3
    receiver.hangs_s = 0.0
    monkeypatch.setattr(alerting, "ROUND_S", 120.0)
    alerts.post(now + timedelta(seconds=1))
    assert len(store.records("alert.sent")) == 60
    assert len({id for id, _ in receiver.got}) == len(receiver.got)


def test_a_receiver_that_hangs_disturbs_nobody(instrument: Any, write: Write, client: openai.OpenAI, receiver: Receiver,
                                               fast: None) -> None:  # fmt: skip
    """While a receiver does not answer, budgets are read, calls go out and uninstrument() ends."""
    receiver.hangs_s = 30.0
    path = write({"messages": 1, "on_unknown": "closed"}, {"messages": 9, "hard": True, "on_unknown": "closed"},
                 head=f'webhook = "{receiver.url}"')  # fmt: skip
    instrument(budgets=path, beat_s=0.02, exit_timeout_s=0.2)
    client.chat.completions.create(**ASK)
    until(lambda: receiver.got)
    ours = recording.active.budgets if recording.active is not None else None
    assert ours is not None
    read_at = ours._read_at
    until(lambda: ours._read_at != read_at)
    client.chat.completions.create(**ASK)


def test_a_limit_that_is_raised_is_told_anew(write: Write, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Within a period each alert of a limit is told once, by whoever; a limit that was changed has its own."""
    store = SqliteStore(ledger.path)
    store.record([message(timestamp=datetime.now(timezone.utc)) for _ in range(8)])
    now = datetime.now(timezone.utc)
    for limit, more in ((8, 3), (8, 0), (10, 2), (8, 0)):
        budgets = read_budgets(write({"messages": limit}))
        caplog.clear()
        Alerts(store, budgets).look(budget_states(store, budgets.budgets, now), now)
        assert len(caplog.records) == more
    assert len(store.records("alert")) == 5


class SlowToAppend(SqliteStore):
    """A ledger that takes 50 ms for each document."""

    def append(self, records: Sequence[Record]) -> bool:
        time.sleep(0.05)
        return super().append(records)


def test_readings_do_not_wait_for_alerts(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many alerts there are to append, the next reading is soon, and not believed for longer; they are appended
    after the readings that follow."""
    monkeypatch.setattr(spending, "TELL_S", 0.4)
    store = SlowToAppend(ledger.path)
    store.record([message(key=f"c{number:02}", timestamp=datetime.now(timezone.utc)) for number in range(10)])
    budgets = Budgets((Budget("each", "month", "*", messages=1),))
    ours = Spending(
        budgets, store, Alerts(store, budgets), on_budget="raise", nothing_waits=lambda: True, bug=pytest.fail
    )
    started = time.monotonic()
    ours.refresh()
    took_s = time.monotonic() - started
    assert 0 < len(store.records("alert")) < 30
    assert ours._interval_s < 10 * took_s
    for _ in range(9):
        ours.refresh()
    assert len(store.records("alert")) == 30


# Behind a server.


def test_behind_a_server(tmp_path: Path, instrument: Any, write: Write, client: openai.OpenAI, fast: None,
                         receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """With a key that may read, budgets hold as on a ledger of one's own, and the server tells the alerts; with one
    that may not, calls go through, and the log says what to do, once."""
    path = write({"key": "acme", "messages": 3, "hard": True}, head=f'webhook = "{receiver.url}"')
    url = f"sqlite:///{tmp_path}/server.db"

    def key(*scopes: str) -> str:
        more = [word for scope in scopes for word in ("--scope", scope)]
        return spryng("keys", "create", "app", *more, cwd=tmp_path, SPRYNG_DESTINATION=url).stdout.strip()

    both, ingest = key("ingest", "read"), key("ingest")
    environ = {"SPRYNG_BUDGETS": path, "SPRYNG_WEBHOOK_SECRET": SECRET, "LIMITS": "app.TIDY_EVERY_S=0.1"}
    with serving(url, **environ) as server:
        server.key = ingest
        for _ in range(2):
            assert server.post({"key": "acme", "usage": {"prompt_tokens": 1}}).status == 200
        instrument(destination=server.url, journal=tmp_path / "journal", api_key=both, budgets=path, beat_s=0.02)
        with usage_context("acme"):
            client.chat.completions.create(**ASK)
            with pytest.raises(BudgetExceeded, match="3 of 3 messages"):
                client.chat.completions.create(**ASK)
            ours = recording.active.budgets if recording.active is not None else None
            assert ours is not None
            assert spryng_instrument.flush()
            ours.refresh()
            assert not ours._own
            assert used("acme")["b0"][::2] == (3, 0)
        until(lambda: len(receiver.told) == 3)
        spryng_instrument.uninstrument()

        instrument(destination=server.url, journal=tmp_path / "journal", api_key=ingest, budgets=path)
        with usage_context("acme"):
            for _ in range(3):
                client.chat.completions.create(**ASK)
        [said] = [each.message for each in caplog.records if "cannot be looked up" in each.message]
        assert "answered 403: the API key may not read. Make one that may: spryng keys create" in said
        spryng_instrument.uninstrument()
        assert sorted(receiver.told) == [("b0", "acme", 50), ("b0", "acme", 80), ("b0", "acme", 100)]


def test_the_server_says_what_is_recorded(tmp_path: Path) -> None:
    """GET /recorded has those of the ids that are in the ledger."""
    with serving(f"sqlite:///{tmp_path}/usage.db") as server:
        id = server.post({"key": "acme", "usage": {"prompt_tokens": 1}}).json()["id"]
        assert server.get(f"/recorded?id={new_id()}&id={id}").json() == {"ids": [id]}
        assert server.get("/recorded").json() == {"ids": []}
        assert server.get("/recorded?key=acme").error == "key: key='acme' is no parameter of /recorded; there are: id"
        many = "&".join(["id=x"] * 501)
        assert server.get(f"/recorded?{many}").error == "id: id='x' and others are 501; 500 are allowed"


def test_a_server_with_budgets_that_cannot_be(tmp_path: Path, write: Write) -> None:
    """It does not start, and says why."""
    path = write({"messages": -1})
    done = spryng("serve", "--port", "1", cwd=tmp_path, SPRYNG_BUDGETS=path)
    assert done.returncode == 2
    assert "budget 'b0': messages=-1 must be a whole number" in done.stderr


# The command line.


def test_the_command(tmp_path: Path, write: Write, ledger: Ledger) -> None:
    """A line for each limit and customer; JSON has the same; `check` ends with 3 if one is used up."""
    path = write(
        {"name": "each", "key": "*", "messages": 2, "hard": True}, {"name": "all", "tokens": 100, "tag": "t"},
    )  # fmt: skip
    now = datetime.now(timezone.utc)
    usage = Usage(input_tokens=40, output_tokens=19)
    store = SqliteStore(ledger.path)
    store.record([message(timestamp=now, key="acme", tags=("t",), usage=usage), message(timestamp=now, key="b")])

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return spryng("budgets", *words, "--destination", ledger.url, cwd=tmp_path, SPRYNG_BUDGETS=path)

    shown = command().stdout.splitlines()
    assert shown[0].split()[:7] == ["budget", "key", "tag", "used", "limit", "%", "state"]
    assert [line.split()[:9] for line in shown[1:]] == [
        ["each", "acme", "-", "1", "messages", "2", "messages", "50", "ok"],
        ["each", "b", "-", "1", "messages", "2", "messages", "50", "ok"],
        ["all", "(all)", "t", "59", "tokens", "100", "tokens", "59", "ok"],
    ]
    done = command("check")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == "0 of 3 limits reached"
    assert done.stderr.count("has reached 50 %") == 3
    store.record([message(timestamp=now, key="acme")])
    done = command("check", "--json")
    assert done.returncode == 3
    [found] = json.loads(done.stdout)
    assert found | {"since": None, "until": None} == {
        "budget": "each", "key": "acme", "tag": None, "unit": "messages", "used": 2, "limit": 2, "percent": 100,
        "at_least": False, "hard": True, "state": "refusing", "since": None, "until": None,
    }  # fmt: skip
    assert len(json.loads(command("--json").stdout)) == 3
    done = spryng("budgets", cwd=tmp_path)
    assert done.returncode == 2
    assert "which budgets? Give --budgets FILE, or set SPRYNG_BUDGETS" in done.stderr


def test_a_server_with_very_many_customers() -> None:
    """What each of 150,000 customers used is read from a server; for all of them together, few rows are asked for."""
    row = {"conversations": 3, "errors": 0, "cancelled": 0, "unreported": 0, "unpriced": 0, "input_tokens": 12345,
           "cached_tokens": 1000, "output_tokens": 5432, "reasoning_tokens": 0, "cost_usd": "0.123456"}  # fmt: skip
    rows = [{"key": f"customer-{number:08}", "messages": number, **row} for number in range(150_000)]
    whole = json.dumps({"rows": rows, "total": {"messages": 7, **row}}).encode()
    few = json.dumps({"rows": [], "total": {"messages": 7, **row}}).encode()
    with (
        closing(ScriptedServer(lambda asked: Reply(200, whole if "by=key" in asked.path else few))) as server,
        closing(RemoteLedger(server.url, None, timeout_s=60)) as ledger,
    ):
        assert ledger.total().messages == 7
        assert "by=key" not in server.requests[0].path
        assert [found.messages for found in ledger.usage("key")] == list(range(150_000))
