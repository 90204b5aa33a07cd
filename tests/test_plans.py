"""A file of plans is checked whole: what it says is exact, and what cannot be is named with its place and value."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument.billing.currencies import EXPONENT
from spryng_instrument.billing.plans import EXAMPLE, billing_period, load, month_of, next_month, parse
from spryng_instrument.billing.rating import rated
from spryng_instrument.errors import PlanError, QueryError
from spryng_instrument.periods import zone_of
from spryng_instrument.store.base import UsageRow

PLAN = """
plan = "pro"
[[plans.pro]]
effective = 2026-01-01
rates = [{ meter = "messages", price = 0.10 }]
"""


def test_a_whole_file() -> None:
    """Everything that a file can say, with every number as its digits say."""
    plans = parse("""
        plan = "pro"
        zone = "Europe/Berlin"
        issuer = "Example Ltd"
        [[plans.pro]]
        effective = 2026-01-01
        currency = "EUR"
        minimum = 20
        usd_rate = 0.1
        rates = [
          { meter = "conversations", price = 1.00, included = 5, name = "chats" },
          { meter = "input", model = "gpt-4o*", price = 2.50, per = 1_000_000 },
          { meter = "input", tiers = [{ up_to = 10, price = 0.3 }, { price = 0.2 }], scheme = "volume" },
          { meter = "messages", price = 5, per = 100, scheme = "package" },
          { meter = "cost", markup = 0.20 },
        ]
        [[plans.pro]]
        effective = 2026-06-15
        currency = "EUR"
        rates = [{ meter = "messages", price = 0.1 }]
        [keys.acme]
        anchor_day = 31
        name = "Acme Inc."
    """)
    acme, other = plans.account("acme"), plans.account("other")
    assert (acme.plan, acme.zone, acme.anchor_day, acme.name) == ("pro", "Europe/Berlin", 31, "Acme Inc.")
    assert (other.plan, other.zone, other.anchor_day, other.name) == ("pro", "Europe/Berlin", 1, "other")
    first = plans.version("pro", date(2026, 6, 14))
    assert first is not None
    assert first.minimum == 20
    assert first.usd_rate == Decimal("0.1")
    assert [rate.text for rate in first.rates] == [
        "chats", "input tokens, gpt-4o*", "input tokens", "messages", "cost of the models, USD",
    ]  # fmt: skip
    assert first.rate_of("input", "gpt-4o-mini") == 1
    assert first.rate_of("input", None) == first.rate_of("input", "o3") == 2
    later = plans.version("pro", date(2026, 6, 15))
    assert later is not None
    assert later.rates[0].price == Decimal("0.1")
    assert plans.version("pro", date(2025, 12, 31)) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plan = ", r"test\.toml: Invalid value"),
        ("", r"Object missing required field `plans`"),
        (PLAN + "anchor_day = 3", r"unknown field `anchor_day`"),
        ("anchor_day = 32" + PLAN, r"anchor_day=32 must be between 1 and 31"),
        ('zone = "Mars"' + PLAN, r"zone 'Mars' is unknown; give an IANA name"),
        (PLAN.replace('plan = "pro"', 'plan = "gold"'), r"plan='gold' is not there; there are: pro"),
        (PLAN + '[keys.acme]\nplan = "gold"', r"keys\.acme: plan='gold' is not there"),
        (PLAN + "[keys.acme]\nzoom = 1", r"unknown field `zoom` - at `\$\.keys\[\.\.\.\]`"),
        (PLAN.replace("2026-01-01", '"soon"'), r"Invalid .* - at `\$\.plans\[\.\.\.\]\[0\]\.effective`"),
        (PLAN.replace("0.10", "-0.10"), r"plans\.pro of 2026-01-01: rates\[1\], messages: price=-0\.10 must"),
        (PLAN.replace("0.10", "nan"), r"price=NaN must be a number that is not negative"),
        (PLAN.replace("0.10", "inf"), r"price=Infinity must be"),
        (PLAN.replace("0.10", '"much"'), r"Invalid decimal string - at"),
        (PLAN.replace(", price = 0.10", ""), r"scheme flat takes a price and no tiers"),
        (PLAN.replace("messages", "minutes"), r"Invalid enum value 'minutes'"),
        (PLAN.replace("price = 0.10", "price = 1, per = 0"), r"per=0 must be 1 or more"),
        (PLAN.replace("price = 0.10", "markup = 0.1"), r"markup=0\.1 is for the meter cost"),
        (PLAN.replace("messages", "cost"), r"takes markup, as in markup = 0\.2"),
        (PLAN.replace("rates = [{ meter", 'rates = [{ model = "a", meter').replace("messages", "conversations"),
         r"model='a': a conversation may be with many models"),
        (PLAN.replace("price = 0.10", "tiers = [{ price = 1 }, { price = 2 }]"), r"every tier but the last has up"),
        (PLAN.replace("price = 0.10", "tiers = [{price = 1, up_to = 5}, {price = 2, up_to = 9}]"), r"the last has"),
        (PLAN.replace("price = 0.10", "tiers = [{price = 1, up_to = 5}, {price = 1, up_to = 5}, {price = 2}]"),
         r"up_to=5 must be more than 5"),
        (PLAN.replace("price = 0.10", 'price = 1, scheme = "volume"'), r"scheme volume takes no price but tiers"),
        (PLAN.replace("rates = [", 'rates = [{ meter = "messages", price = 1 }, '), r"rate for messages before"),
        (PLAN.replace("rates = [", 'currency = "EURO"\nrates = ['), r"currency='EURO' is no code of ISO 4217"),
        (PLAN.replace('rates = [{ meter = "messages", price = 0.10 }]',
                      'currency = "EUR"\nrates = [{ meter = "cost", markup = 0 }]'), r"needs usd_rate: EUR for one US"),
        (PLAN.replace("messages", "cached"), r"cached is for a part of input: give a rate for input, too"),
        (PLAN.replace("rates = [", 'rates = [{ meter = "tokens", price = 1 }, { meter = "output", price = 1 }, '),
         r"tokens are input and output together"),
        (PLAN.replace('rates = [{ meter = "messages", price = 0.10 }]', "rates = []"), r"has no rates"),
        (PLAN.replace("rates = [", "minimum = -1\nrates = ["), r"minimum=-1 must be"),
        (PLAN + PLAN.partition("\n[")[2].join(["[", ""]), r"two versions that are effective on 2026-01-01"),
        (PLAN + "[[plans.pro]]\neffective = 2027-01-01\ncurrency = 'EUR'\nminimum = 1\nrates=[]", r"EUR and in"),
        (PLAN.replace("[[plans.pro]]", "[plans]\nnone = []\n[[plans.pro]]"), r"plans\.none has no version"),
        ("anchor_day = 0" + PLAN, r"zone='UTC' and anchor_day=0 must say"),
        ('zone = ""' + PLAN, r"zone='' and anchor_day=1 must say"),
        (PLAN + '[keys.""]', r'keys\."" is nobody'),
        (PLAN.replace("rates", "usd_rate = 0.9\nrates"), r"usd_rate=0\.9: one US dollar is 1 USD"),
        (PLAN.replace("0.10", "1e13"), r"price=1E\+13 must be at most 1,000,000,000,000"),
        (PLAN.replace("0.10", "1e-16"), r"with at most 15 decimal places"),
        (PLAN.replace("0.10", "1, included = nan"), r"included=NaN must be a number"),
        (PLAN.replace("0.10", "1, per = 9_000_000_000_000"), r"per=9000000000000 must be 1 or more, and at most"),
        (PLAN.replace("0.10", "1e" + "9" * 30), r"test\.toml: a number in it has too many digits"),
        ("a = " + "[" * 100_000 + "]" * 100_000, r"test\.toml: it is nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    """It is said with the file, the place and the value."""
    (tmp_path / "test.toml").write_text(text)
    with pytest.raises(PlanError, match=said) as caught:
        load(tmp_path / "test.toml")
    assert "test.toml: " in str(caught.value)


NAMES = (
    "plan", "plans", "p", "zone", "anchor_day", "keys", "effective", "rates", "currency", "minimum", "usd_rate",
    "meter", "model", "price", "per", "included", "scheme", "tiers", "markup", "up_to", "name",
)  # fmt: skip
numbers = (
    st.integers() | st.decimals(allow_nan=True).map(lambda number: f"{number:E}".lower()) | st.just("0x" + "f" * 9000)
)
words = st.sampled_from(
    ["p", "", "UTC", "EUR", "messages", "cost", "cached", "input", "flat", "volume", "package", "America", "\x1b", "*"]
).map(json.dumps)
values = st.recursive(
    numbers.map(str) | words | st.sampled_from(["true", "nan", "2026-01-01", "2026-01-01T00:00:00Z", "07:00:00"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda each: f"[{', '.join(each)}]")
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4).map(
            lambda each: f"{{{', '.join(f'{name} = {value}' for name, value in each.items())}}}"
        )
    ),
    max_leaves=8,
)
rates = st.dictionaries(st.sampled_from(NAMES[11:]), values, max_size=5).map(
    lambda rate: {"meter": '"messages"', **rate}
)
versions = st.dictionaries(st.sampled_from(NAMES[7:11]), values, max_size=3)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(NAMES[:6]), values, max_size=3), versions, rates)
def test_whatever_a_file_says(top: dict[str, str], version: dict[str, str], rate: dict[str, str]) -> None:
    """It is a plan, by which something can be billed, or a PlanError."""

    def table(of: dict[str, str]) -> str:
        return "".join(f"{name} = {value}\n" for name, value in of.items())

    one = f"[{{ {', '.join(f'{name} = {value}' for name, value in rate.items())} }}]"
    text = table(top) + "[[plans.p]]\n" + table({"effective": "2026-01-01", "rates": one, **version})
    try:
        plans = parse(text)
    except PlanError:
        return
    rows = [UsageRow("m", "acme", messages=7, input_tokens=2**63, cost_usd=Decimal("1e-12"))]
    for each in (each for versions in plans.plans.values() for each in versions):
        found = rated(each, rows, 3, "2026-01")
        assert all(line.amount == round(line.amount, EXPONENT[each.currency]) >= 0 for line in found.lines)


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there is said, with an example that can be pasted."""
    with pytest.raises(PlanError, match="there are no plans at") as caught:
        load(tmp_path / "plans.toml")
    assert EXAMPLE in str(caught.value)
    assert parse(EXAMPLE).plan == "standard"
    (tmp_path / "plans.toml").write_bytes(b"\xff")
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "plans.toml")


@pytest.mark.parametrize(
    ("month", "anchor", "zone", "start", "stop"),
    [
        ("2026-11", 1, "UTC", "2026-11-01T00:00+00:00", "2026-12-01T00:00+00:00"),
        ("2026-12", 15, "Europe/Berlin", "2026-12-14T23:00+00:00", "2027-01-14T23:00+00:00"),
        ("2026-03", 1, "Europe/Berlin", "2026-02-28T23:00+00:00", "2026-03-31T22:00+00:00"),
        ("2026-01", 31, "UTC", "2026-01-31T00:00+00:00", "2026-02-28T00:00+00:00"),
        ("2026-02", 31, "UTC", "2026-02-28T00:00+00:00", "2026-03-31T00:00+00:00"),
        ("2028-02", 30, "Asia/Kolkata", "2028-02-28T18:30+00:00", "2028-03-29T18:30+00:00"),
    ],
)
def test_billing_periods(month: str, anchor: int, zone: str, start: str, stop: str) -> None:
    """A period begins at midnight of its anchor day, in its zone."""
    assert billing_period(month, anchor, zone) == (datetime.fromisoformat(start), datetime.fromisoformat(stop))


@given(
    st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(timezone.utc)),  # noqa: DTZ001
    st.integers(1, 31),
    st.sampled_from(["UTC", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo", "Europe/Berlin"]),
)
def test_every_moment_is_in_one_period(moment: datetime, anchor: int, zone: str) -> None:
    """Periods join: where one stops, the next one starts."""
    month = month_of(moment, anchor, zone)
    start, stop = billing_period(month, anchor, zone)
    assert start <= moment < stop
    assert billing_period(next_month(month), anchor, zone)[0] == stop
    assert timedelta(days=27) < stop - start < timedelta(days=33)
    assert start.astimezone(zone_of(zone)).strftime("%Y-%m") == month


@pytest.mark.parametrize("month", ["2026-13", "november", "2026-1", "0000-01", "２０２６-01", "2026-01\n"])
def test_no_month(month: str) -> None:
    """What is no month is said."""
    with pytest.raises(QueryError, match=re.escape(f"month={month!r} is no month")):
        billing_period(month, 1, "UTC")
