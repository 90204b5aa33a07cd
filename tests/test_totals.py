"""One question has one answer, wherever it is asked: terminal, JSON, CSV, export, Python, the server's API, its pages.

The ledger, one for each engine, has messages around midnights and changes of clocks; filters and zones are random. What
each says is compared with a sum over the messages that is computed here, by the calendar of Python's zoneinfo alone.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument import reports
from spryng_instrument.cli.commands import commands
from spryng_instrument.message import BILLABLE, Message, Usage, new_id
from spryng_instrument.store import open_store
from spryng_instrument.store.base import GROUPS, Cost, Record
from spryng_instrument.tables import decimals_for, money

from .messages import CHANGES, ZONES
from .servers import Postgres
from .serving import Serving, serving
from .test_processes import FULL

TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
MESSAGES = 600


@dataclass(frozen=True)
class Ledger:
    """A ledger that is filled, what it was filled with, and a server in front of it."""

    url: str
    messages: list[Message] = field(repr=False)
    costs: dict[str, Decimal] = field(repr=False)
    server: Serving


@contextmanager
def sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder}/usage.db"


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    with Postgres() as server, server.ledger() as url:
        yield url


ENGINES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {"sqlite": sqlite, "postgresql": postgresql}


@pytest.fixture(autouse=True, scope="module")
def no_settings() -> Iterator[None]:
    """Without settings of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SPRYNG_") and not name.startswith("SPRYNG_TEST")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="module", params=ENGINES)
def ledger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    folder = tmp_path_factory.mktemp("totals")
    with ENGINES[request.param](folder) as url, serving(url) as server:
        messages, costs = made(random.Random(7))
        store = open_store(url)
        for start in range(0, len(messages), 100):  # a part of them once the others are rolled up
            store.record(messages[start : start + 100])
            store.set_costs([Cost(id, cost, "test 1") for id, cost in costs.items()])
            store.roll_up()
        void = messages[::9]
        now = datetime.now(timezone.utc)
        store.append([Record(f"void:{each.id}", "void", now, {"reason": "a test"}, each.key, each.id) for each in void])
        store.close()
        yield Ledger(url, messages, costs, server)


def made(rng: random.Random) -> tuple[list[Message], dict[str, Decimal]]:
    """Messages on, right before and right after midnights and changes of clocks; the costs of those that have one."""
    edges = [change.astimezone(ZoneInfo(zone)) for change in CHANGES for zone in ZONES]
    edges += [edge.replace(hour=0, minute=0, second=0, microsecond=0) for edge in edges]
    messages, costs = [], {}
    for _ in range(MESSAGES):
        offset = timedelta(minutes=rng.choice([-1500, -61, -1, 0, 0, 1, 59, 61]), microseconds=rng.choice([-1, 0, 1]))
        counts = {name: rng.choice([None, 0, rng.randrange(10**6)]) for name in TOKENS}
        message = Message(
            id=new_id(),
            timestamp=rng.choice(edges).astimezone(ZoneInfo("UTC")) + offset,
            operation="chat.completions",
            status=rng.choice(["ok", "ok", "ok", "incomplete", "error", "cancelled"]),
            key=rng.choice([None, "acme", "Zoë & Söhne", 'quo"te, comma', "total"]),
            conversation_id=rng.choice([None, "c-1", "c-2", "return\r"]),
            tags=tuple(rng.sample(["support", "search", "a;b"], rng.randrange(4))),
            request_model=rng.choice([None, "asked"]),
            response_model=rng.choice([None, "priced-a", "priced-b", "unpriced"]),
            usage=None
            if rng.random() < 0.1 or not any(value is not None for value in counts.values())
            else Usage(**counts),
        )
        messages.append(message)
        if message.usage is not None and message.model not in (None, "unpriced", "asked"):
            costs[message.id] = Decimal(rng.randrange(10**12)) / 10**12
    return messages, costs


@dataclass(frozen=True)
class Question:
    """What is asked, in the words of the command line, the API and Python, which are the same."""

    by: str
    zone: str
    window: str | None = None
    key: str | None = None
    no_key: bool = False
    tags: tuple[str, ...] = ()
    model: str | None = None
    conversation: str | None = None
    since: str | None = None
    until: str | None = None
    month: str | None = None

    def options(self, *but: str) -> list[str]:
        words = []
        for name in ("by", "window", "key", "model", "conversation", "since", "until", "month"):
            if (value := getattr(self, name)) is not None and name not in but:
                words += [f"--{name}", value]
        words += [word for tag in self.tags for word in ("--tag", tag)]
        return [*words, "--tz", self.zone, *(["--no-key"] if self.no_key else [])]

    def query(self, *but: str, **more: str) -> str:
        given = [(name, value) for name, value in vars(self).items() if isinstance(value, str) and name not in but]
        given += [("tag", tag) for tag in self.tags] + ([("no_key", "true")] if self.no_key else [])
        return urlencode([*given, *more.items()])

    def page(self, name: str, *but: str) -> str:
        """Address of a page of the dashboard, which shows the last 30 days unless told otherwise."""
        period = {} if self.since or self.until or self.month else {"preset": "all"}
        return f"/dashboard/{name}?{self.query(*but, **period)}"

    def matches(self, message: Message) -> bool:
        local = message.timestamp.astimezone(ZoneInfo(self.zone))
        return (
            (self.key is None or message.key == self.key)
            and (not self.no_key or message.key is None)
            and set(self.tags) <= set(message.tags)
            and (self.model is None or message.model == self.model)
            and (self.conversation is None or message.conversation_id == self.conversation)
            and (self.month is None or f"{local:%Y-%m}" == self.month)
            and (self.since is None or local.date() >= date.fromisoformat(self.since))
            and (self.until is None or local.date() <= date.fromisoformat(self.until))
        )


maybe = lambda *values: st.sampled_from([None, None, *values])  # noqa: E731
DAYS = sorted({(change + timedelta(days=days)).date().isoformat() for change in CHANGES for days in (-1, 0, 1)})
periods = st.one_of(
    st.just({}),
    st.sampled_from(sorted({day[:7] for day in DAYS})).map(lambda month: {"month": month}),
    st.sampled_from(DAYS).map(lambda day: {"since": day}),
    st.sampled_from(DAYS).map(lambda day: {"until": day}),
    st.sets(st.sampled_from(DAYS), min_size=1, max_size=2).map(lambda days: {"since": min(days), "until": max(days)}),
)
who = st.sampled_from([{}, {}, {"key": "acme"}, {"key": "total"}, {"key": 'quo"te, comma'}, {"no_key": True}])
questions = st.builds(
    lambda period, who, **more: Question(**period, **who, **more),
    periods,
    who,
    by=st.sampled_from(GROUPS),
    zone=st.sampled_from(ZONES),
    tags=st.sampled_from([(), (), ("support",), ("support", "a;b")]),
    model=maybe("priced-a", "unpriced", "asked"),
    conversation=maybe("c-1", "return\r"),
)


def summed(messages: list[Message], costs: dict[str, Decimal]) -> dict[str, Any]:
    """What there is to count, by hand."""
    bill = [message for message in messages if message.status in BILLABLE]
    known = [costs[message.id] for message in messages if message.id in costs]
    tokens = {name: sum(getattr(message.usage, name, None) or 0 for message in messages) for name in TOKENS}
    return {
        "messages": len(bill),
        "conversations": len({(message.key, message.conversation_id) for message in bill if message.conversation_id}),
        "errors": sum(message.status == "error" for message in messages),
        "cancelled": sum(message.status == "cancelled" for message in messages),
        "unreported": sum(message.usage is None for message in bill),
        "unpriced": sum(message.usage is not None and message.id not in costs for message in messages),
        **tokens,
        "cost_usd": sum(known, Decimal(0)) if known else None,
    }


def run(*words: str) -> str:
    result = CliRunner().invoke(commands, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def amount(text: str | None) -> Decimal | None:
    return Decimal(text) if text else None


@settings(max_examples=150 if FULL else 30, deadline=None)
@given(question=questions)
def test_one_question_has_one_answer(ledger: Ledger, question: Question) -> None:
    """Terminal = JSON = CSV = export = Python = API = page = the sum over the messages, to a trillionth of a dollar."""
    wanted = summed([message for message in ledger.messages if question.matches(message)], ledger.costs)
    command = ["usage", "--destination", ledger.url, *question.options()]

    as_json = json.loads(run(*command, "--json"))
    void = summed([message for message in ledger.messages[::9] if question.matches(message)], ledger.costs)
    for said, sums in ((as_json["total"], wanted), (as_json["voided"], void)):
        assert {**said, "cost_usd": amount(said["cost_usd"])} == sums

    served = ledger.server.get(f"/usage?{question.query()}")
    assert served.json() == as_json

    asked = {name: value for name, value in vars(question).items() if value is not None}
    assert reports.usage(**asked, destination=ledger.url).as_json() == as_json

    as_csv = run(*command, "--format", "csv")
    assert ledger.server.get(f"/usage?{question.query()}&format=csv").body.decode() == as_csv
    assert ledger.server.get(question.page("usage.csv")).body.decode() == as_csv
    rows = list(csv.DictReader(io.StringIO(as_csv, newline=""), strict=True))
    assert len(rows) == len(as_json["rows"])
    if question.by != "tag":
        costs = [Decimal(row["cost_usd"]) for row in rows if row["cost_usd"]]
        assert (sum(costs, Decimal(0)) if costs else None) == wanted["cost_usd"]
        assert all(
            sum(int(row[name]) for row in rows) == wanted[name]
            for name in wanted
            if name not in ("cost_usd", "conversations")
        )

    if rows:
        line = run(*command).splitlines()[-1]
        names = ("messages", "conversations", "errors", "input_tokens", "cached_tokens", "output_tokens")
        assert re.split(r"\s{2,}", line)[1:7] == [f"{wanted[name]:,}" for name in names]
        page = ledger.server.get(question.page("tags", "by")).body.decode()
        [total] = re.findall(r"<tfoot>(.*?)</tfoot>", page, re.S)
        cost, *shown = re.findall(r"<td class=\"n\"><a [^>]*>([^<]*)</a></td>", total)
        names = ("messages", "conversations", "input_tokens", "cached_tokens", "output_tokens", "errors")
        assert shown == [f"{wanted[name]:,}" for name in names]
        assert cost == money(wanted["cost_usd"], wanted["unpriced"], decimals_for(wanted["cost_usd"]))

    exported = run("export", "--destination", ledger.url, *question.options("by", "window"))
    written = list(csv.DictReader(io.StringIO(exported, newline=""), strict=True))
    paged = ledger.server.get(question.page("messages.csv", "by")).body.decode()
    assert sorted(map(str, csv.DictReader(io.StringIO(paged, newline="")))) == sorted(map(str, written))
    costs = [Decimal(row["cost_usd"]) for row in written if row["cost_usd"]]
    assert (sum(costs, Decimal(0)) if costs else None) == wanted["cost_usd"]
    assert sum(row["status"] in BILLABLE for row in written) == wanted["messages"]
    assert {name: sum(int(row[name] or 0) for row in written) for name in TOKENS} == {
        name: wanted[name] for name in TOKENS
    }


@settings(max_examples=40 if FULL else 8, deadline=None)
@given(
    question=questions.filter(lambda question: question.by not in ("day", "month")),
    window=st.sampled_from(["day", "month"]),
)
def test_windows_add_up(ledger: Ledger, question: Question, window: str) -> None:
    """Cut into days or months of the zone, each day has what is asked of it alone, and all days have the total."""
    asked = {name: value for name, value in vars(question).items() if value is not None}
    report = reports.usage(**{**asked, "window": window}, destination=ledger.url)
    by_window: dict[str, list[Message]] = {}
    for message in filter(question.matches, ledger.messages):
        local = message.timestamp.astimezone(ZoneInfo(question.zone))
        by_window.setdefault(f"{local:%Y-%m-%d}"[: 10 if window == "day" else 7], []).append(message)

    assert sorted(by_window) == list(dict.fromkeys(report.windows))
    if question.by != "tag":
        for label, messages in by_window.items():
            rows = [row for row, of in zip(report.rows, report.windows, strict=True) if of == label]
            wanted = summed(messages, ledger.costs)
            assert sum(row.messages for row in rows) == wanted["messages"]
            assert sum((row.cost_usd or Decimal(0) for row in rows), Decimal(0)) == (wanted["cost_usd"] or 0)
