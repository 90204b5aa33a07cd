"""Bills say what was used and what the plan asks for it: by hand, by Python's own sums, and whatever comes late."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument.billing.behind import behind
from spryng_instrument.billing.bills import Bill, Desk, invoice, invoices, sums
from spryng_instrument.billing.corrections import adjust, reprice, void
from spryng_instrument.billing.plans import Account, Plans, Version, billing_period, parse
from spryng_instrument.billing.rating import rated, round_money
from spryng_instrument.copying import copy
from spryng_instrument.errors import BillError
from spryng_instrument.message import BILLABLE, Message, Usage
from spryng_instrument.prices import rate
from spryng_instrument.store.base import Cost, Filter, Store, UsageRow
from spryng_instrument.store.postgres import PostgresStore
from spryng_instrument.store.sqlite import SqliteStore

from .messages import message, needs_prices
from .servers import Postgres
from .test_processes import FULL

JANUARY = datetime(2026, 1, 10, tzinfo=timezone.utc)
LATER = datetime(2027, 1, 1, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)
MODEL = "gpt-4o-mini-2024-07-18"


@contextmanager
def sqlite() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder:
        yield SqliteStore(Path(folder) / "usage.db")


@pytest.fixture
def store() -> Iterator[Store]:
    with sqlite() as store:
        yield store


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def fresh(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Store]]:
    if request.param == "sqlite":
        return sqlite
    server: Postgres = request.getfixturevalue("server")

    @contextmanager
    def postgresql() -> Iterator[Store]:
        with server.ledger() as url, closing(PostgresStore(url)) as store:
            yield store

    return postgresql


@pytest.fixture
def ledger(fresh: Callable[[], AbstractContextManager[Store]]) -> Iterator[Store]:
    with fresh() as store:
        yield store


def plan(rates: str, more: str = "", before: str = "") -> Plans:
    return parse(f'plan = "p"\n{before}\n[[plans.p]]\neffective = 2025-01-01\n{more}\nrates = [{rates}]')


def used(key: str | None = "acme", hours: float = 0, **fields: Any) -> Message:
    """A message of January, with usage."""
    fields.setdefault("usage", Usage(input_tokens=7, output_tokens=3, total_tokens=10))
    return message(key=key, timestamp=JANUARY + hours * HOUR, response_model=MODEL, **fields)


def bill_of(store: Store, plans: Plans, month: str = "2026-01", key: str = "acme") -> Bill:
    [bill] = Desk(store, plans, key, now=LATER).drafts(month).bills
    return bill


def close(store: Store, plans: Plans, month: str = "2026-01", key: str = "acme", **options: Any) -> Bill:
    return Desk(store, plans, key, now=LATER).close(month, key, **options)


def amounts(bill: Bill) -> list[tuple[str, str, Decimal]]:
    return [(line.month, line.text, line.amount) for line in bill.lines if line.amount]


def test_the_seeds_examples(ledger: Store) -> None:
    """companyA, by hand: three requests are three messages; six in one conversation are one conversation, for $1; and
    ten tokens are ten tokens."""
    three = [used("companyA", n, conversation_id=None) for n in range(3)]
    six = [used("companyA", n, conversation_id="test123") for n in range(6)]
    failed = [used("companyA", 9, status="error"), used("companyA", 9, status="cancelled")]  # shown, not billed
    ledger.record([*three, *six, *failed, used("companyB", 1)])

    bill = bill_of(ledger, plan("{ meter = 'messages', price = 0.25 }"), key="companyA")
    assert (bill.lines[0].quantity, bill.total) == (9, Decimal("2.25"))

    bill = bill_of(ledger, plan("{ meter = 'conversations', price = 1 }"), key="companyA")
    assert (bill.lines[0].quantity, bill.total) == (1, Decimal("1.00"))

    bill = bill_of(ledger, plan("{ meter = 'tokens', price = 0.01 }"), key="companyA")
    assert (bill.lines[0].quantity, bill.total) == (90, Decimal("0.90"))

    rates = "{ meter = 'input', price = 2.5, per = 1000 }, { meter = 'output', price = 10, per = 1000 }"
    bill = bill_of(ledger, plan(rates), key="companyA")
    # 63 input tokens at $2.50 a thousand are 15.75 cents, 27 output tokens at $10 are 27
    assert [line.amount for line in bill.lines] == [Decimal("0.16"), Decimal("0.27")]
    assert bill.total == Decimal("0.43")


@pytest.mark.parametrize(
    ("rates", "more", "expected"),
    [
        # 250 messages, 90 of them with gpt-4o; 1,000 input tokens each, of which 400 cached; 100 output
        ("{ meter = 'messages', price = 0.01 }", "", ["2.50"]),
        ("{ meter = 'messages', price = 0.01, included = 100 }", "", ["1.50"]),
        ("{ meter = 'messages', price = 0.01, included = 300 }", "", ["0.00"]),
        ("{ meter = 'messages', price = 5, per = 100, scheme = 'package' }", "", ["15"]),
        ("{ meter = 'messages', price = 5, per = 100, scheme = 'package', included = 50 }", "", ["10"]),
        ("{ meter = 'messages', tiers = [{ up_to = 100, price = 0.02 }, { price = 0.01 }] }", "", ["3.50"]),
        ("{ meter = 'messages', scheme = 'volume', tiers = [{ up_to = 100, price = 0.02 }, { price = 0.01 }] }", "",
         ["2.50"]),
        ("{ meter = 'messages', scheme = 'volume', tiers = [{ up_to = 250, price = 0.02 }, { price = 0.01 }] }", "",
         ["5.00"]),
        ("{ meter = 'messages', model = 'gpt-4o', price = 1 }, { meter = 'messages', price = 0.1 }", "", ["90", "16"]),
        ("{ meter = 'input', price = 1, per = 1_000 }", "", ["250"]),
        ("{ meter = 'input', price = 1, per = 1_000 }, { meter = 'cached', price = 0.1, per = 1_000 }", "",
         ["150", "10"]),
        ("{ meter = 'input', price = 1, per = 1_000 }, { meter = 'cached', model = 'gpt-4o', price = 0 }", "",
         ["214", "0"]),
        ("{ meter = 'tokens', price = 0.0001 }", "", ["27.50"]),
        ("{ meter = 'messages', price = 0.01 }", "minimum = 20", ["2.50", "17.50"]),
        ("{ meter = 'messages', price = 0.01 }", "minimum = 2", ["2.50", "0"]),
        ("{ meter = 'cost', markup = 0.20 }", "", ["3.60"]),
        ("{ meter = 'cost', markup = 0, included = 1 }", "", ["2"]),
        ("{ meter = 'cost', markup = 0 }", "currency = 'EUR'\nusd_rate = 0.9", ["2.70"]),
        ("{ meter = 'messages', price = 0.5 }", "currency = 'JPY'", ["125"]),
        ("{ meter = 'messages', price = 0.0101 }", "currency = 'KWD'", ["2.525"]),
    ],
)  # fmt: skip
def test_rates(rates: str, more: str, expected: list[str]) -> None:
    """Each kind of rate, by hand."""
    rows = [
        UsageRow("gpt-4o", "acme", messages=90, input_tokens=90_000, cached_tokens=36_000, output_tokens=9_000,
                 cost_usd=Decimal("1.25")),
        UsageRow("other", "acme", messages=160, input_tokens=160_000, cached_tokens=64_000, output_tokens=16_000,
                 cost_usd=Decimal("1.75")),
    ]  # fmt: skip
    [version] = plan(rates, more).plans["p"]
    found = rated(version, rows, 0, "2026-01")
    assert [line.amount for line in found.lines] == [Decimal(each) for each in expected]
    assert not found.gaps


@given(st.fractions(-1000, 1000), st.sampled_from(["USD", "JPY", "KWD"]))
def test_rounding(exact: Fraction, currency: str) -> None:
    """To the nearest minor unit, a half away from zero, and the same either side of it."""
    unit = {"USD": Decimal("0.01"), "JPY": Decimal(1), "KWD": Decimal("0.001")}[currency]
    rounded = round_money(exact, currency)
    assert rounded % unit == 0
    assert abs(Fraction(rounded) - exact) <= Fraction(unit) / 2
    assert round_money(-exact, currency) == -rounded
    assert round_money(Fraction(unit) / 2, currency) == unit


quantities = st.integers(0, 60)
prices = st.decimals(0, 10, places=3).map(lambda price: price + 0)
tiers = st.lists(st.tuples(st.integers(1, 20), prices), min_size=1, max_size=3)


@given(
    quantities,
    st.integers(0, 10),
    tiers,
    st.integers(1, 7),
    st.sampled_from(["graduated", "volume", "package", "flat"]),
)
def test_a_scheme_is_what_it_says(count: int, included: int, steps: list[Any], per: int, scheme: str) -> None:
    """Counted one unit at a time, what is billed comes to the same."""
    ends: list[int] = []
    for width, _ in steps:
        ends.append((ends[-1] if ends else 0) + width)
    given: dict[str, Any] = {"meter": "messages", "scheme": scheme, "per": per, "included": included}
    if scheme in ("flat", "package"):
        given["price"] = steps[0][1]
    else:
        given["tiers"] = [
            {"price": price, **({"up_to": end} if end != ends[-1] else {})}
            for end, (_, price) in zip(ends, steps, strict=True)
        ]
    version = msgspec.convert({"effective": "2025-01-01", "rates": [given]}, Version)

    def price_at(unit: int) -> Decimal:
        return next((price for end, (_, price) in zip(ends, steps, strict=True) if unit <= end), steps[-1][1])

    units = max(count - included, 0)
    if scheme == "package":
        expected = Fraction(-(-units // per)) * Fraction(steps[0][1])
    elif scheme == "volume":
        expected = Fraction(units) * Fraction(price_at(units)) / per
    else:
        each = [steps[0][1] if scheme == "flat" else price_at(unit) for unit in range(1, units + 1)]
        expected = sum((Fraction(price) / per for price in each), Fraction(0))
    found = rated(version, [UsageRow("m", "acme", messages=count)], 0, "2026-01")
    assert found.lines[0].amount == round_money(expected, "USD")


def test_what_is_unknown_is_a_gap() -> None:
    """A model without a price or a rate is named, with what it leaves out; it is not zero in silence."""
    rows = [
        UsageRow("known", "acme", messages=1, input_tokens=5, cost_usd=Decimal(1)),
        UsageRow("unknown", "acme", messages=3, unpriced=2, unreported=1, input_tokens=5),
    ]
    [version] = plan("{ meter = 'cost', markup = 0 }, { meter = 'input', model = 'known', price = 1 }").plans["p"]
    found = rated(version, rows, 0, "2026-01")
    assert found.gaps == ("No rate for 5 input of unknown.", "The cost of 2 messages of unknown is unknown.")
    assert found.notes == ("1 messages came without usage: nothing is billed for their tokens.",)
    [version] = plan("{ meter = 'messages', price = 1 }").plans["p"]
    assert rated(version, rows, 0, "2026-01").gaps == rated(version, rows, 0, "2026-01").notes == ()


def test_a_bill_with_gaps_is_not_closed(ledger: Store) -> None:
    """Unless that is asked for; once the price is known, what was left out is on the next bill."""
    plans = plan("{ meter = 'cost', markup = 1 }")
    [first, other] = [used(), used()]
    ledger.record([first, other])
    ledger.set_costs([Cost(first.id, Decimal(1), "v1")])
    with pytest.raises(BillError, match=rf"The cost of 1 messages of {MODEL} is unknown\. Upgrade the prices"):
        close(ledger, plans)
    assert invoices(ledger) == []
    closed = close(ledger, plans, without_gaps=True)
    assert closed.total == 2
    ledger.set_costs([Cost(other.id, Decimal(3), "v2")])
    late = bill_of(ledger, plans, "2026-02")
    assert amounts(late) == [("2026-01", "cost of the models, USD", Decimal(6))]
    assert {each.row.message.id: each.cost_usd for each in behind(ledger, closed)} == {first.id: 1, other.id: None}
    assert [(each.row.message.id, each.count, each.cost_usd) for each in behind(ledger, late)] == [(other.id, 0, 3)]


def test_a_closed_bill_never_changes(ledger: Store) -> None:
    """Whatever comes later: it is on the next bill, as a line of its own period."""
    plans = plan("{ meter = 'messages', price = 0.10 }, { meter = 'conversations', price = 1 }", "minimum = 5")
    first = [used(hours=n, conversation_id="c-1") for n in range(3)]
    ledger.record(first)
    closed = close(ledger, plans)
    assert closed.number == "000001"
    assert amounts(closed) == [
        ("2026-01", "messages", Decimal("0.30")),
        ("2026-01", "conversations", Decimal(1)),
        ("2026-01", "up to the minimum of 5", Decimal("3.70")),
    ]
    ledger.record([used(hours=99, conversation_id="c-2"), used(hours=24 * 31)])
    void(ledger, first[0].id, "a test call")
    adjust(ledger, plans, "acme", Decimal("-2.50"), "goodwill", "2026-01")
    assert bill_of(ledger, plans) == close(ledger, plans) == closed
    assert invoice(ledger, "000001") == closed
    february = close(ledger, plans, "2026-02")
    assert february.number == "000002"
    assert amounts(february) == [
        ("2026-02", "messages", Decimal("0.10")),
        ("2026-02", "up to the minimum of 5", Decimal("4.90")),
        ("2026-01", "conversations", Decimal(1)),
        ("2026-01", "up to the minimum of 5", Decimal("-1.00")),
        ("2026-01", "goodwill", Decimal("-2.50")),
    ]
    march = bill_of(ledger, plans, "2026-03")
    assert amounts(march) == [("2026-03", "up to the minimum of 5", Decimal(5))]
    assert sums([closed, february]) == {"USD": Decimal("7.50")}


def test_the_plan_of_a_closed_period_stays(store: Store) -> None:
    """What comes late is billed as the period was, though prices are others now."""
    store.record([used()])
    close(store, plan("{ meter = 'messages', price = 1 }"))
    store.record([used()])
    dearer = plan("{ meter = 'messages', price = 100 }")
    assert amounts(bill_of(store, dearer, "2026-02")) == [("2026-01", "messages", Decimal(1))]
    euros = plan("{ meter = 'messages', price = 1 }", "currency = 'EUR'")
    assert bill_of(store, euros, "2026-02").gaps == ("USD 1.00 of 2026-01 cannot be on a bill in EUR.",)
    assert bill_of(store, euros, "2026-02").lines[0].amount == 0


def test_versions_begin_with_a_period(store: Store) -> None:
    """A period is billed by the version that was effective when it began."""
    store.record([used(hours=24 * days) for days in (0, 10, 31)])
    plans = parse("""
        plan = "p"
        plans.p = [
          { effective = 2026-01-15, rates = [{ meter = "messages", price = 5 }] },
          { effective = 2026-01-01, rates = [{ meter = "messages", price = 1 }] },
        ]
    """)
    assert [bill_of(store, plans, month).total for month in ("2026-01", "2026-02")] == [2, 5]
    drafts = Desk(store, plans).drafts("2025-12")
    assert drafts.bills == []


def test_another_anchor_day_leaves_no_hole(store: Store) -> None:
    """Where a customer's anchor day or zone changes, the next period begins where the closed one ended, and none
    overlap."""
    rates = "{ meter = 'messages', price = 1 }"
    first, other = plan(rates), plan(rates, before='anchor_day = 15\nzone = "Asia/Kolkata"')
    store.record([used(hours=24 * days) for days in range(90)])
    january = close(store, first)
    february = close(store, other, "2026-02")
    assert february.start == january.stop
    assert february.stop == billing_period("2026-02", 15, "Asia/Kolkata")[1]
    march = close(store, first, "2026-03")
    assert march.start == february.stop
    assert [line.quantity for bill in (january, february, march) for line in bill.lines] == [22, 42, 17]


def test_another_anchor_day_changes_the_minimum(store: Store) -> None:
    """A period that is longer or shorter by it costs at least as much as its days do, and says so; so it stays when it
    is drawn up again, whatever the anchor day is by then."""
    rates = "{ meter = 'messages', price = 1 }"
    first, other = (plan(rates, "minimum = 28", f"anchor_day = {day}\nzone = 'Europe/Berlin'") for day in (1, 15))
    store.record([used()])
    bills = [close(store, first), close(store, other, "2026-02"), close(store, first, "2026-03")]
    assert [bill.total for bill in bills] == [28, 42, Decimal("15.35")]  # 42 days for 28, then 17 for 31
    assert [bill.notes for bill in bills] == [
        (),
        ("The period has 42 days instead of 28, as another anchor day made it: its minimum is 42.00 instead of 28.",),
        ("The period has 17 days instead of 31, as another anchor day made it: its minimum is 15.35 instead of 28.",),
    ]
    store.record([used(hours=24 * 30), used(hours=24 * 70)])
    april = bill_of(store, first, "2026-04")
    assert amounts(april) == [
        ("2026-04", "up to the minimum of 28", Decimal(28)),
        ("2026-02", "messages", Decimal(1)),
        ("2026-02", "up to the minimum of 42.00", Decimal(-1)),
        ("2026-03", "messages", Decimal(1)),
        ("2026-03", "up to the minimum of 15.35", Decimal(-1)),
    ]
    assert april.notes == ()


def test_another_zone_changes_no_minimum(store: Store) -> None:
    """Hours more or less are no day."""
    rates = "{ meter = 'messages', price = 1 }"
    first, other = (plan(rates, "minimum = 20", f"zone = '{zone}'") for zone in ("UTC", "Asia/Kolkata"))
    store.record([used()])
    bills = [close(store, first), close(store, other, "2026-02"), close(store, first, "2026-03")]
    assert [(bill.total, bill.notes) for bill in bills] == [(20, ())] * 3


def test_no_two_periods_overlap(store: Store) -> None:
    """Even where a customer moves from the last day and zone of a month to the first ones of the next."""
    rates = "{ meter = 'messages', price = 1 }"
    last, first = (
        plan(rates, before=f"anchor_day = {day}\nzone = '{zone}'")
        for day, zone in ((31, "Pacific/Pago_Pago"), (1, "Pacific/Kiritimati"))
    )
    store.record([used(hours=hours) for hours in range(24 * 90)])
    bills = [close(store, last), close(store, first, "2026-02"), close(store, first, "2026-03")]
    assert [bill.start for bill in bills[1:]] == [bill.stop for bill in bills[:-1]]
    assert all(bill.start <= bill.stop for bill in bills)
    assert sum(bill.total for bill in bills) == (bills[-1].stop - bills[0].start) / HOUR


def test_a_plan_that_is_taken_away(store: Store) -> None:
    """What its closed bills would be by now is said, with the amount; with a plan again, it is on the next bill."""
    rates = "[[plans.p]]\neffective = 2025-01-01\nrates = [{ meter = 'messages', price = 1.5 }]\n"
    without, again = parse(f"{rates}[keys.other]\nplan = 'p'"), parse(f"{rates}[keys.acme]\nplan = 'p'")
    sent = [used("acme"), used("acme"), used("acme")]
    store.record(sent)
    assert close(store, again).total == Decimal("4.5")
    assert Desk(store, without).drafts("2026-02").left_over == ()

    void(store, sent[0].id, "a test call")
    void(store, sent[1].id, "another one")
    store.record([used("acme")])

    drafts = Desk(store, without).drafts("2026-02")
    assert [bill.key for bill in drafts.bills] == ["other"]
    assert drafts.left_over == (("acme", "USD", Decimal("-1.5")),)
    assert Desk(store, without).drafts("2026-01").left_over == ()
    assert close(store, again, "2026-02").total == Decimal("-1.5")
    assert Desk(store, without).drafts("2026-03").left_over == ()


def test_who_is_billed(store: Store) -> None:
    """Every customer with a plan; those without one, and messages without a key, are named with what they used."""
    store.record([used("acme"), used("bluepeak"), used("bluepeak"), used(None), used("err", status="error")])
    rates = "[[plans.p]]\neffective = 2025-01-01\nrates = [{ meter = 'messages', price = 1 }]\n"
    plans = parse(f"{rates}[keys.acme]\nplan = 'p'\n[keys.quiet]\nplan = 'p'")
    drafts = Desk(store, plans).drafts("2026-01")
    assert [(bill.key, bill.total) for bill in drafts.bills] == [("acme", 1), ("quiet", 0)]
    assert drafts.unplanned == (("bluepeak", 2), (None, 1))
    with pytest.raises(BillError, match="nothing to bill 'bluepeak' for 2026-01: it has no message, or no plan"):
        close(store, plans, key="bluepeak")


def test_a_period_that_is_not_over(store: Store) -> None:
    """It is a draft: nothing freezes what may still come."""
    plans = plan("{ meter = 'messages', price = 1 }", before='zone = "America/Sao_Paulo"')
    store.record([used()])
    desk = Desk(store, plans, now=datetime(2026, 2, 1, 2, 59, tzinfo=timezone.utc))
    with pytest.raises(BillError, match=r"not over: it ends 2026-02-01 00:00 \(America/Sao_Paulo\)"):
        desk.close("2026-01", "acme")
    Desk(store, plans, now=datetime(2026, 2, 1, 3, tzinfo=timezone.utc)).close("2026-01", "acme")


def test_an_adjustment_is_billed_without_messages(store: Store) -> None:
    """A fee of a month in which nothing was used is on that month's bill, in any zone from the plan's first day on."""
    plans = parse("""
        plan = "p"
        zone = "Asia/Kolkata"
        plans.p = [{ effective = 2026-01-01, rates = [{ meter = "messages", price = 1 }] }]
    """)
    store.record([used(hours=-1_000)])
    adjust(store, plans, "acme", Decimal(99), "setting up", "2026-01")
    [bill] = Desk(store, plans).drafts("2026-01").bills
    assert (bill.key, bill.total) == ("acme", 99)
    assert Desk(store, plans).drafts("2026-02").bills == []


def test_an_adjustment_in_another_currency(store: Store) -> None:
    """Five euros are not five dollars: the bill of a customer whose plan became one in dollars says that they lack."""
    euros = plan("{ meter = 'messages', price = 1 }", "currency = 'EUR'")
    dollars = plan("{ meter = 'messages', price = 1 }")
    store.record([used()])
    adjust(store, euros, "acme", Decimal(5), "setting up", "2026-01")
    assert bill_of(store, euros).total == 6
    with pytest.raises(BillError, match=r"An adjustment of EUR 5 is not in USD: setting up\."):
        close(store, dollars)
    assert close(store, dollars, without_gaps=True).total == 1


def test_corrections_that_cannot_be(store: Store) -> None:
    """They are said, and change nothing."""
    plans = plan("{ meter = 'messages', price = 1 }")
    [one] = [used()]
    store.record([one])
    void(store, one.id, "a test")
    for what, said in [
        (lambda: void(store, "nothing", "why"), "there is no message 'nothing'"),
        (lambda: void(store, one.id, "again"), "is void since .*: a test"),
        (lambda: void(store, one.id, " "), "reason='' must be a text"),
        (lambda: adjust(store, plans, "acme", Decimal("0.001"), "why"), "amount=0.001 must be an amount of USD"),
        (lambda: adjust(store, plans, "acme", Decimal("NaN"), "why"), "amount=NaN must be"),
        (lambda: adjust(store, plans, "acme", Decimal(0), "why"), "other than 0"),
        (lambda: adjust(store, plans, "acme", Decimal("1e99999"), "why"), r"amount=1E\+99999 must be .* at most"),
        (lambda: adjust(store, plans, "", Decimal(1), "why"), "key='' is nobody"),
        (lambda: adjust(store, plans, "acmee", Decimal(1), "why"), r"key='acmee' is nobody: .*\[keys\.\"acmee\"\]"),
        (lambda: adjust(store, parse("plans = {}"), "acme", Decimal(1), "why"), "'acme' has no plan"),
        (lambda: invoice(store, "7"), "no closed bill '7'"),
    ]:
        with pytest.raises(BillError, match=said):
            what()
    assert store.records("adjustment") == []
    assert len(store.records("void")) == 1


@needs_prices
def test_prices_that_changed(ledger: Store) -> None:
    """A new price is shown before it is set, changes nothing that is closed, and the difference is on the next bill."""
    plans = plan("{ meter = 'cost', markup = 0 }")
    ledger.record(
        [used(usage=Usage(input_tokens=10_000_000, output_tokens=0, total_tokens=10_000_000)) for _ in range(2)]
    )
    ledger.set_costs([Cost(row.message.id, Decimal(2), "old") for row in ledger.messages().rows])
    closed = close(ledger, plans)
    assert closed.total == 4
    [change] = reprice(ledger, Filter())
    assert (change.model, change.messages, change.before_usd, change.after_usd) == (MODEL, 2, 4, 3)
    assert ledger.total().cost_usd == 4
    assert reprice(ledger, Filter(), apply=True) == [change]
    assert ledger.total().cost_usd == 3
    assert reprice(ledger, Filter(), apply=True) == []
    assert [record.body["models"][0]["after_usd"] for record in ledger.records("repricing")] == ["3.000000000000"]
    assert [each.cost_usd for each in behind(ledger, closed)] == [2, 2]
    late = close(ledger, plans, "2026-02")
    assert amounts(late) == [("2026-01", "cost of the models, USD", Decimal(-1))]
    assert [(each.count, each.cost_usd) for each in behind(ledger, late)] == [(0, Decimal("-0.5"))] * 2


def test_a_price_that_changes_while_bills_are_drawn_up(ledger: Store) -> None:
    """The messages behind a bill cost what they did when it counted them, not when it was closed."""
    plans = plan("{ meter = 'cost', markup = 0 }")
    [one] = [used()]
    ledger.record([one])
    ledger.set_costs([Cost(one.id, Decimal(2), "v1")])
    desk = Desk(ledger, plans, now=LATER)
    [draft] = desk.drafts("2026-01").bills
    ledger.reprice([Cost(one.id, Decimal(3), "v2")])
    closed = desk.close("2026-01", "acme")
    assert closed.total == draft.total == 2
    assert [each.cost_usd for bill in (draft, closed) for each in behind(ledger, bill)] == [2, 2]
    late = bill_of(ledger, plans, "2026-02")
    assert (late.total, [each.cost_usd for each in behind(ledger, late)]) == (1, [1])


def test_the_messages_behind_a_bill(ledger: Store) -> None:
    """They are those that it counted, however many came since: each once, and taken off again if it became void."""
    plans = plan("{ meter = 'messages', price = 1 }")
    first = [used(hours=n) for n in range(3)]
    gone, failed = used(), used(status="error")
    ledger.record([*first, gone, failed, used("other")])
    void(ledger, gone.id, "a test")
    closed = close(ledger, plans)
    late = [used(hours=n) for n in range(2)]
    ledger.record([*late, used(hours=24 * 31)])
    void(ledger, first[0].id, "a mistake")
    assert {each.row.message.id for each in behind(ledger, closed)} == {each.id for each in first}
    assert closed.counted[0].messages == 3
    february = close(ledger, plans, "2026-02")
    found = sorted((each.month, each.count, each.row.message.id) for each in behind(ledger, february))
    [own] = ledger.messages(Filter("acme", since=february.start)).rows
    expected = [("2026-01", 1, each.id) for each in late] + [
        ("2026-01", -1, first[0].id),
        ("2026-02", 1, own.message.id),
    ]
    assert found == sorted(expected)
    [line] = [line for line in february.lines if line.month == "2026-01"]
    assert line.quantity == sum(count for month, count, _ in found if month == "2026-01") == 1


def test_a_bill_is_drawn_up_while_messages_are_voided(ledger: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who voids all the time holds no bill up: it is of one moment, and says which messages were void then."""
    plans = plan("{ meter = 'messages', price = 1 }")
    messages = [used(hours=n) for n in range(8)]
    ledger.record(messages)
    void(ledger, messages[0].id, "an outage")
    others = iter(messages[1:])
    conversations = type(ledger)._conversations

    def voided_meanwhile(self: Any, facts: str) -> Any:
        """What the meter asks for when it has counted the messages, and is not at its end."""
        if (message := next(others, None)) is not None:
            void(ledger, message.id, "an outage")
        return conversations(self, facts)

    monkeypatch.setattr(type(ledger), "_conversations", voided_meanwhile)
    closed = close(ledger, plans)
    monkeypatch.undo()
    assert (closed.total, closed.counted[0].void) == (7, (messages[0].id,))
    assert {each.row.message.id for each in behind(ledger, closed)} == {each.id for each in messages[1:]}
    assert next(others, None) is not None
    late = close(ledger, plans, "2026-02")
    assert late.total == 1 - len(late.counted[1].void)


def test_a_bill_is_found_by_its_number(ledger: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many bills are closed, one of them is read without the others."""
    plans = plan("{ meter = 'messages', price = 1 }")
    keys = ["acme", "bluepeak", "other"]
    ledger.record([used(key) for key in keys])
    bills = [close(ledger, plans, key=key) for key in keys]
    read: list[int] = []
    records = type(ledger).records

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        found = records(self, *args, **named)
        read.append(len(found))
        return found

    monkeypatch.setattr(type(ledger), "records", counted)
    assert [invoice(ledger, str(bill.number)) for bill in bills] == bills
    assert read == [1, 1, 1]
    for number in ("000004", "1", "", "\0", "\ud800"):
        with pytest.raises(BillError, match="no closed bill"):
            invoice(ledger, number)


def test_many_close_at_once(ledger: Store) -> None:
    """Each customer gets one bill of a period; numbers have no gaps, and nothing is billed by two."""
    plans = plan("{ meter = 'messages', price = 1 }")
    keys = [f"customer-{number}" for number in range(6)]
    ledger.record([used(key) for key in keys])
    ledger.record([used("acme")])
    close(ledger, plans)
    ledger.record([used("acme")])  # late: on one of the next two bills, not on both
    jobs = [("2026-01", key) for key in keys] * 2 + [("2026-02", "acme"), ("2026-03", "acme")] * 2
    with ThreadPoolExecutor(4) as pool:
        bills = list(pool.map(lambda job: close(ledger, plans, *job), jobs))
    there = invoices(ledger)
    assert [bill.number for bill in there] == [f"{number:06d}" for number in range(1, 10)]
    assert {bill.number for bill in bills} == {bill.number for bill in there[1:]}
    assert sum(line.amount for bill in there for line in bill.lines if line.month == "2026-01") == 8


def test_a_copied_ledger_bills_the_same(server: Postgres) -> None:
    """From engine to engine and back: closed bills are the same, so is what later ones differ by, and so are the
    messages behind them with what they cost then, whatever becomes of the copy."""
    plans = plan("{ meter = 'messages', price = 1 }, { meter = 'cost', markup = 0 }", "minimum = 3")
    with sqlite() as first, sqlite() as last, server.ledger() as url, closing(PostgresStore(url)) as second:
        sent = [used(hours=n, conversation_id="c") for n in range(5)]
        first.record(sent)
        first.set_costs([Cost(each.id, Decimal(n), "v1") for n, each in enumerate(sent)])
        unknown = used(hours=6)
        first.record([unknown])
        closed = close(first, plans, without_gaps=True)
        first.record([used(hours=9), used(hours=24 * 31)])
        first.set_costs([Cost(unknown.id, Decimal(7), "v1")])
        void(first, sent[1].id, "a test")
        first.reprice([Cost(sent[2].id, Decimal("0.5"), "v2")])
        adjust(first, plans, "acme", Decimal("-0.25"), "goodwill", "2026-01")
        drafts, listed, in_source = [], [], listed_behind(first, closed)
        for source, target in ((first, second), (second, last), (second, first)):
            assert copy(source, target).differences == []
            assert invoices(target) == [closed]
            late = bill_of(target, plans, "2026-02")
            drafts.append((late.lines, late.total, late.gaps, late.notes))
            listed.append([listed_behind(target, each) for each in (closed, late)])
        assert drafts == [drafts[0]] * 3
        assert listed == [[in_source, listed[0][1]]] * 3
        assert len(in_source) == 6
        assert {count for _, _, count, _ in listed[0][1]} == {1, 0, -1}
        february = close(second, plans, "2026-02", without_gaps=True)
        assert [each.month for each in behind(second, bill_of(second, plans, "2026-03"))] == []
        close(last, plans, "2026-02", without_gaps=True)
        assert copy(second, last).differences == [
            "document invoice:000002 is another one",
            "document invoice 2 of acme is another one",
        ]
        assert copy(second, first).differences == []
        assert invoices(first) == [closed, february]
        assert listed_behind(first, february) == listed_behind(second, february)
        for ledger in (second, last):
            ledger.record([used(hours=12)])
            void(ledger, sent[3].id, "a test")
            ledger.reprice([Cost(each.id, Decimal(9), "v3") for each in sent])
            assert listed_behind(ledger, closed) == in_source


def listed_behind(ledger: Store, bill: Bill) -> set[tuple[str, str, int, Decimal | None]]:
    return {(each.row.message.id, each.month, each.count, each.cost_usd) for each in behind(ledger, bill)}


MONTHS = ("2026-01", "2026-02", "2026-03")
moments = st.integers(0, 90 * 24 - 1).map(lambda hours: datetime(2026, 1, 1, tzinfo=timezone.utc) + hours * HOUR)
counts = st.integers(0, 50)
some = st.builds(
    message,
    timestamp=moments,
    key=st.just("acme"),
    status=st.sampled_from(["ok", "ok", "ok", "incomplete", "error"]),
    conversation_id=st.sampled_from([None, "c-1", "c-2", "c-3"]),
    response_model=st.sampled_from(["m-1", "m-2"]),
    usage=st.builds(Usage, input_tokens=counts, output_tokens=counts),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("record"), st.lists(some, max_size=4)),
        st.tuples(st.just("void"), st.integers(0, 30)),
        st.tuples(st.just("adjust"), st.integers(-500, 500).filter(bool)),
        st.tuples(st.just("price"), st.integers(1, 10**12)),
        st.tuples(st.just("cost"), st.integers(1, 10**12)),
        st.tuples(st.just("close"), st.none()),
    ),
    max_size=12,
)
SCHEMES: dict[str, Callable[[Fraction], Fraction]] = {
    "{ meter = 'messages', price = 0.015 }": lambda count: count * 15 / 1000,
    "{ meter = 'messages', tiers = [{ up_to = 2, price = 0.5 }, { price = 0.333 }] }": lambda count: (
        min(count, Fraction(2)) / 2 + max(count - 2, Fraction(0)) * 333 / 1000
    ),
    "{ meter = 'input', price = 0.007, included = 20 }": lambda count: max(count - 20, Fraction(0)) * 7 / 1000,
    "{ meter = 'output', scheme = 'volume', tiers = [{ up_to = 40, price = 0.01 }, { price = 0.007 }]}": lambda count: (
        count / 100 if count <= 40 else count * 7 / 1000
    ),
    "{ meter = 'conversations', price = 1 }": lambda count: count,
    "{ meter = 'tokens', price = 3, per = 7, scheme = 'package' }": lambda count: Fraction(ceil(count / 7) * 3),
    "{ meter = 'cost', markup = 0.15 }": lambda usd: usd * 115 / 100,
}
"""Rates, and what a quantity costs by each, by hand."""


def by_hand(ledger: Store, rates: list[str], minimum: int, start: datetime, stop: datetime) -> Decimal:
    """What a period costs, from the messages themselves: nothing of it is the code that draws up bills."""
    void = {record.subject for record in ledger.records("void")}
    rows = [row for row in ledger.messages(limit=10_000).rows if row.message.id not in void]
    rows = [row for row in rows if row.message.status in BILLABLE]
    begun: dict[str | None, datetime] = {}
    for each in (row.message for row in rows):
        begun[each.conversation_id] = min(each.timestamp, begun.get(each.conversation_id, each.timestamp))
    inside = [row for row in rows if start <= row.message.timestamp < stop]
    usages = [row.message.usage or Usage() for row in inside]
    tokens = {name: sum(getattr(usage, f"{name}_tokens") or 0 for usage in usages) for name in ("input", "output")}
    quantities = {
        "messages": len(inside),
        "conversations": sum(name is not None and start <= first < stop for name, first in begun.items()),
        **tokens,
        "tokens": sum(tokens.values()),
        "cost": sum(Fraction(row.cost_usd or 0) for row in inside),
    }
    total = Decimal(0)
    for each in rates:
        exact = SCHEMES[each](Fraction(quantities[each.split("'")[1]]))
        total += Decimal(floor(exact * 100 + Fraction(1, 2))) / 100
    return max(total, Decimal(minimum))


def everything(ledger: Store, plans: Plans, doing: list[tuple[str, Any]]) -> None:
    """Do all that, then close what is open and one more month, so that nothing is left to bill."""
    sent: list[Message] = []
    months = list(MONTHS)
    for what, value in doing:
        if what == "record":
            new = list({each.id: each for each in value}.values())
            ledger.record(new)
            sent += new
        elif what == "void" and sent:
            with suppress(BillError):  # it is void already
                void(ledger, sent[value % len(sent)].id, "a test")
        elif what == "adjust":
            adjust(ledger, plans, "acme", Decimal(value) / 100, "a test", MONTHS[value % 3])
        elif what == "price":
            ledger.reprice([Cost(each.id, Decimal(value) / 10**12, "v") for each in sent[::2]])
        elif what == "cost":
            ledger.set_costs([Cost(each.id, Decimal(value) / 10**12, "v") for each in sent[::3]])
        elif what == "close" and months:
            close(ledger, plans, months.pop(0), without_gaps=True)
    for month in [*months, "2026-04"]:
        close(ledger, plans, month, without_gaps=True)


@settings(max_examples=60 if FULL else 12, deadline=None)
@given(st.lists(st.sampled_from(list(SCHEMES)), min_size=1, max_size=4, unique=True), st.sampled_from([0, 3]), steps)
def test_whatever_comes_when_the_same_is_billed(
    fresh: Callable[[], AbstractContextManager[Store]], rates: list[str], minimum: int, doing: list[tuple[str, Any]]
) -> None:
    """However the time is split by closing bills, all that is billed for a period is what one bill of it would say;
    the lines of every bill add up to its total; and the messages behind them are those of the lines."""
    if any("'tokens'" in each for each in rates):
        rates = [each for each in rates if "'input'" not in each and "'output'" not in each]
    if sum("'messages'" in each for each in rates) == 2:
        rates = rates[:1]
    plans = msgspec.structs.replace(plan(", ".join(rates), f"minimum = {minimum}"), keys={"acme": Account()})
    with fresh() as ledger:
        everything(ledger, plans, doing)
        bills = invoices(ledger)
        assert [bill.month for bill in bills] == [*MONTHS, "2026-04"]
        for bill in bills:
            assert bill.total == sum(line.amount for line in bill.lines)
            own = [row for row in behind(ledger, bill) if row.month == bill.month]
            assert sum(row.cost_usd or 0 for row in own) == bill.counted[0].cost_usd
        for month in MONTHS:
            start, stop = billing_period(month, 1, "UTC")
            meter = ledger.meter(Filter("acme", since=start, until=stop))
            once = rated(plans.plans["p"][0], meter.rows, meter.conversations.get("acme", 0), month).lines
            billed: dict[str, Decimal] = {}
            for line in (line for bill in bills for line in bill.lines if line.month == month):
                billed[line.id] = billed.get(line.id, Decimal(0)) + line.amount
            for line in once:
                assert billed.pop(line.id, 0) == line.amount, line
            corrected = [record for record in ledger.records("adjustment") if record.subject == month]
            assert billed == {record.id: Decimal(record.body["amount"]) for record in corrected}
            expected = by_hand(ledger, rates, minimum, start, stop) + sum(billed.values())
            assert expected == sum(line.amount for bill in bills for line in bill.lines if line.month == month)
            rows = [row for bill in bills for row in behind(ledger, bill) if row.month == month]
            assert all(row.row.message.status in BILLABLE for row in rows)
            assert sum(row.count for row in rows) == sum(row.messages for row in meter.rows)
            tokens = sum(row.count * ((row.row.message.usage or Usage()).input_tokens or 0) for row in rows)
            assert tokens == sum(row.input_tokens for row in meter.rows)
            assert sum((row.cost_usd or 0) for row in rows) == sum((row.cost_usd or 0) for row in meter.rows)


@needs_prices
def test_rates_of_a_demo(store: Store) -> None:
    """A bill that goes by cost has what `rate` has priced."""
    store.record([used(usage=Usage(input_tokens=1_000_000, output_tokens=1_000_000, total_tokens=2_000_000))])
    rate(store)
    assert bill_of(store, plan("{ meter = 'cost', markup = 0.5 }")).total == Decimal("1.13")  # 0.75 and a half of it
