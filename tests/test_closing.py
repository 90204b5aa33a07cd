"""A month is closed while 16 processes write to it and pages are read: what is closed never changes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import pytest

from spryng_instrument.billing.behind import behind
from spryng_instrument.billing.bills import Bill, Desk, invoices
from spryng_instrument.billing.plans import parse
from spryng_instrument.message import BILLABLE
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Filter

from .servers import Postgres
from .serving import ROOT, serving
from .test_processes import FULL

WRITERS = 16
SECONDS = 20 if FULL else 5
"""For how long all is at work beside the closing."""
KEYS = ("acme", "bluepeak")
PLANS = parse("""
    plan = "p"
    [[plans.p]]
    effective = 2025-01-01
    minimum = 100
    rates = [
      { meter = "messages", tiers = [{ up_to = 100, price = 0.02 }, { price = 0.0151 }] },
      { meter = "conversations", price = 0.5 },
      { meter = "tokens", price = 0.7, per = 1000 },
    ]
""")
WRITES = """
import os, random, sys, time
from datetime import datetime, timedelta, timezone
from spryng_instrument.errors import StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store import open_store

url, stop = sys.argv[1:]
store, chance, count = open_store(url), random.Random(), 0
while not os.path.exists(stop):
    batch = [
        Message(
            id=new_id(),
            timestamp=datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(hours=chance.randrange(59 * 24)),
            operation="chat.completions", key=chance.choice(["acme", "bluepeak"]),
            conversation_id=f"c-{chance.randrange(2000)}", status=chance.choice(["ok", "ok", "ok", "error"]),
            response_model="m", usage=Usage(input_tokens=chance.randrange(1000), output_tokens=chance.randrange(100)),
        )
        for _ in range(20)
    ]
    while True:
        try:
            count += store.record(batch).count("recorded")
            break
        except StoreError:
            time.sleep(0.05)
    time.sleep(chance.random() / 4)
print(count)
"""
PAGES = ("/usage?by=key", "/usage?by=day&zone=Asia/Kolkata", "/messages?key=acme", "/conversations?key=bluepeak")
PAGES += ("/dashboard", "/dashboard/keys", "/dashboard/key?key=acme", "/dashboard/models")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/usage.db"
    else:
        with Postgres() as server, server.ledger() as url:
            yield url


def test_closing_while_all_is_at_work(url: str, tmp_path: Path) -> None:
    """Each closed bill stays what it was, to the byte, with the messages that it counted behind it; and once the next
    month is closed, all that was billed for January is what one bill of the whole January would say."""
    with ExitStack() as stack:
        store = stack.enter_context(closing(open_store(url)))
        store.record([])
        server = stack.enter_context(serving(url))
        stop = tmp_path / "stop"
        command = [sys.executable, "-c", WRITES, url, str(stop)]
        writers = [
            stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
            )
            for _ in range(WRITERS)
        ]
        answers: list[tuple[str, int]] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                for page in PAGES:
                    answers.append((page, server.get(page).status))

        def at_least(messages: int) -> None:
            until = time.monotonic() + 60
            while store.total().messages < messages and time.monotonic() < until:
                time.sleep(0.1)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            at_least(1_000)
            closed: dict[str, Bill] = {}
            for key in KEYS:
                closed[key] = Desk(store, PLANS, key).close("2026-01", key)
                time.sleep(SECONDS / 2)
                assert Desk(store, PLANS, key).close("2026-01", key) == closed[key]
            at_least(store.total().messages + 500)  # most of them of January: late
            while {page for page, _ in answers} != set(PAGES) and reader.is_alive():
                time.sleep(0.1)
            stop.touch()
            written = sum(int(writer.communicate(timeout=120)[0]) for writer in writers)
        finally:
            stop.touch()
            done.set()
            reader.join(60)
        assert {status for _, status in answers} == {200}, set(answers)
        assert {page for page, _ in answers} == set(PAGES)
        total = store.total()
        assert total.messages + total.errors == written
        for key in KEYS:
            assert list(invoices(store, key)) == [closed[key]]
            rows = [each.row.message for each in behind(store, closed[key])]
            assert len(rows) == closed[key].counted[0].messages
            assert sum(row.status in BILLABLE for row in rows) == closed[key].lines[0].quantity
            usages = [row.usage for row in rows if row.usage is not None]
            tokens = sum((usage.input_tokens or 0) + (usage.output_tokens or 0) for usage in usages)
            assert tokens == closed[key].lines[2].quantity
            late = Desk(store, PLANS, key).close("2026-02", key)
            assert any(line.month == "2026-01" and line.quantity for line in late.lines)
        january = datetime(2026, 1, 1, tzinfo=timezone.utc), datetime(2026, 2, 1, tzinfo=timezone.utc)
        meter = store.meter(Filter(since=january[0], until=january[1]))
        counted = sum(
            (line.quantity or Decimal(0))
            for bill in invoices(store)
            for line in bill.lines
            if line.month == "2026-01" and line.text == "messages"
        )
        assert counted == sum(row.messages for row in meter.rows)
        print(
            f"{written} messages by {WRITERS} writers, {len(answers)} pages read, {len(invoices(store))} bills closed"
        )
