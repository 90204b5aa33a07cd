"""Prices of one's own: by model, host, tier and day; exact, or unknown; and before the public ones."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from spryng_instrument.cli.commands import commands
from spryng_instrument.errors import SettingsError
from spryng_instrument.message import Message, Usage
from spryng_instrument.pricelist import Price, pricelist
from spryng_instrument.prices import Rated, price_of, price_source, rate
from spryng_instrument.store.sqlite import SqliteStore

from .messages import message

NEW_YEAR = datetime(2026, 1, 1, tzinfo=timezone.utc)
PRICES = """
[[prices]]
model = "ft:small*"
effective = 2026-01-01
input = 0.30
cached = 0.15
output = 1.20

[[prices]]
model = "ft:small*"
input = 3
output = 12

[[prices]]
model = "*"
host = "*.example.com"
service_tier = "flex"
input = 1.000000000001
output = 2
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPRYNG_PRICES", raising=False)
    return tmp_path


def written(text: str, path: str = ".spryng/prices.toml") -> Path:
    file = Path(path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def used(model: str, at: datetime = NEW_YEAR, host: str = "api.openai.com", tier: str | None = None) -> Message:
    """A message that used a million tokens in, a quarter of them cached, and half a million out."""
    usage = Usage(input_tokens=1_000_000, cached_tokens=250_000, output_tokens=500_000)
    return message(timestamp=at, response_model=model, host=host, service_tier=tier, usage=usage)


def test_the_first_that_fits() -> None:
    """By pattern, by day in UTC, by host and by tier; the rest is as public prices are, which know no such model."""
    written(PRICES)
    before = NEW_YEAR - timedelta(microseconds=1)
    assert price_of(used("ft:small:acme")) == Decimal("0.8625")  # 0.75 * 0.30 + 0.25 * 0.15 + 0.5 * 1.20
    assert price_of(used("ft:small:acme", before)) == 9  # 1 * 3 + 0.5 * 12: cached input has no price of its own
    assert price_of(used("any", host="eu.example.com", tier="flex")) == Decimal("2.000000000001")
    for other in (used("any", host="eu.example.com"), used("any", host="example.com", tier="flex"), used("ft:large")):
        assert price_of(other) is None
    assert price_of(used("ft:small:acme", tier="flex")) is None


@pytest.mark.parametrize(("service_tier", "fits"), [("batch", True), ("*", True), ("default", False), ("flex", False)])
def test_batches(service_tier: str, fits: bool) -> None:
    """A batch, whose answer has no tier, costs what is written for batches, and never what its calls would alone."""
    batch = message(operation="batches", response_model="own", usage=Usage(1, 1))
    assert Price(model="own", service_tier=service_tier, input=Decimal(1)).fits(batch) is fits


@pytest.mark.parametrize("name", ["gpt-4o-mini", "gpt-4o-mini-2024-07-18"])
def test_before_the_public_ones(name: str) -> None:
    """A discount on a model that is publicly priced; on another host it is not for, the public price stays."""
    public = price_of(used(name))
    written('[[prices]]\nmodel = "gpt-4o-mini*"\nhost = "api.openai.com"\ninput = 0.01\noutput = 0.02\n')
    assert price_of(used(name)) == Decimal("0.02")
    assert price_of(used(name, host="elsewhere.example")) == public


counts = st.none() | st.integers(0, 10**9)
amounts = st.decimals(0, 10**6, places=12)


@given(
    st.builds(
        Usage, input_tokens=counts, output_tokens=counts, cached_tokens=counts, cache_write_tokens=counts,
        input_audio_tokens=counts, output_audio_tokens=counts, input_image_tokens=counts, output_image_tokens=counts,
        cached_audio_tokens=counts, cached_image_tokens=counts, total_tokens=counts,
    ),
    st.builds(
        Price, model=st.just("*"), input=amounts, output=st.none() | amounts, cached=st.none() | amounts,
        cache_write=st.none() | amounts, input_audio=st.none() | amounts, output_audio=st.none() | amounts,
        input_image=st.none() | amounts, output_image=st.none() | amounts, cached_audio=st.none() | amounts,
        cached_image=st.none() | amounts,
    ),
)  # fmt: skip
def test_exact_or_unknown(usage: Usage, price: Price) -> None:
    """The cost is the sum over all tokens, each at its own price, as fractions say; or something has none."""
    cached, written = usage.cached_tokens or 0, usage.cache_write_tokens or 0
    heard, said = usage.input_audio_tokens or 0, usage.output_audio_tokens or 0
    seen = 0 if price.input_image is None else usage.input_image_tokens or 0
    drawn = 0 if price.output_image is None else usage.output_image_tokens or 0
    again = usage.cached_audio_tokens, usage.cached_image_tokens
    heard_again = (again[0] or 0) if heard and cached else 0
    seen_again = (again[1] or 0) if seen and cached else 0
    mixed = (
        (heard and cached and again[0] is None)
        or (seen and cached and again[1] is None)
        or ((heard or seen) and written)
    )
    heard, seen, cached = heard - heard_again, seen - seen_again, cached - heard_again - seen_again
    plain = (usage.input_tokens or 0) - cached - written - heard - heard_again - seen - seen_again
    text = (usage.output_tokens or 0) - said - drawn
    untold = (price.input_image is not None and usage.input_image_tokens is None and usage.input_tokens) or (
        price.output_image is not None and usage.output_image_tokens is None and usage.output_tokens
    )
    each = [
        (plain, price.input), (cached, price.input if price.cached is None else price.cached),
        (written, price.input if price.cache_write is None else price.cache_write), (heard, price.input_audio),
        (text, price.output), (said, price.output_audio), (seen, price.input_image), (drawn, price.output_image),
        (heard_again, price.cached_audio), (seen_again, price.cached_image),
    ]  # fmt: skip
    cost = price.cost_of(usage)
    if cost is not None:
        assert not untold
        assert not mixed
        assert Fraction(cost) == sum(Fraction(tokens) * Fraction(amount or 0) for tokens, amount in each) / 10**6
        assert all(tokens >= 0 and (amount is not None or not tokens) for tokens, amount in each)
        assert usage.input_tokens is not None
    elif usage.input_tokens is not None and usage.output_tokens is not None:
        odd = any(tokens < 0 or (tokens and amount is None) for tokens, amount in each)
        assert odd or untold or mixed


@pytest.mark.parametrize(
    ("usage", "own", "default"),
    [
        (Usage(10, 5, input_image_tokens=6, output_image_tokens=4), "204", "90"),  # 4 * 4 + 6 * 8 + 1 * 10 + 4 * 32.5
        (Usage(10, 5, input_image_tokens=0, output_image_tokens=0), "90", "90"),
        (Usage(10, 5, input_image_tokens=0), None, "90"),
        (Usage(10, 5, output_image_tokens=5), None, "90"),
        (Usage(10, 0, input_image_tokens=0, cached_tokens=5), "40", "40"),
        (Usage(10, 0, input_image_tokens=5, cached_tokens=5), None, "40"),
        (Usage(10, 0, input_image_tokens=5, cache_write_tokens=5), None, "40"),
        (Usage(10, 0, input_image_tokens=11), None, "40"),
    ],
)
def test_images(usage: Usage, own: str | None, default: str) -> None:
    """At their own price, once what was images is told; without one, they count as what they are part of."""
    price = Price(model="*", input=Decimal(4), output=Decimal(10))
    images = msgspec.structs.replace(price, input_image=Decimal(8), output_image=Decimal("32.5"))
    assert price.cost_of(usage) == Decimal(default) / 10**6
    assert images.cost_of(usage) == (None if own is None else Decimal(own) / 10**6)


def test_embeddings() -> None:
    """Output that was not reported is none where the total says so, or where the model gives none; else unknown."""
    for output in (None, Decimal(2)):
        price = Price(model="*", input=Decimal(1), output=output)
        assert price.cost_of(Usage(input_tokens=10, total_tokens=10)) == Decimal("0.00001")
    assert price.cost_of(Usage(input_tokens=10)) is None
    assert price.cost_of(Usage(input_tokens=10, total_tokens=12)) is None
    assert price.cost_of(Usage(output_tokens=10)) is None


def test_a_price_that_is_written_later(here: Path) -> None:
    """What had no price is looked at again, and gets one; what has a cost keeps it. The version names the file."""
    public = price_source().version
    store = SqliteStore(here / "usage.db")
    store.record([used("ft:small:acme"), used("ft:large:acme")])
    if public:
        assert rate(store).priced == 0

    file = written('[[prices]]\nmodel = "ft:small*"\ninput = 1\noutput = 1\n')
    version = price_source().version
    assert version is not None
    assert version.startswith("prices.toml ")
    assert public is None or version.endswith(f" + {public}")
    assert rate(store) == Rated(1, (("ft:large:acme", 1),))
    assert store.total().cost_usd == Decimal("1.5")
    assert rate(store) == Rated()

    file.write_text('[[prices]]\nmodel = "ft:*"\ninput = 2\noutput = 2\n')
    os.utime(file, ns=(1, 1))
    assert rate(store) == Rated(1)
    assert store.total().cost_usd == Decimal("4.5")


def test_doctor_names_them(here: Path) -> None:
    """By what costs are set, and what is wrong with it."""
    file = written(PRICES)
    assert f"prices      {price_source().version}\n" in CliRunner().invoke(commands, ["doctor"]).output
    SqliteStore(here / ".spryng/usage.db").record([used("ft:small:acme")])
    file.write_text("[[prices]]\nmodel = 'm'\n")
    said = CliRunner().invoke(commands, ["doctor"]).output
    assert "prices      none\n" in said
    assert "WARNING: costs are unknown: .spryng/prices.toml: Object missing required field `input`" in said


def test_a_file_of_any_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPRYNG_PRICES names it, and then it must be there."""
    assert pricelist().version is None
    written(PRICES, "ours.toml")
    monkeypatch.setenv("SPRYNG_PRICES", str(here / "ours.toml"))
    assert str(pricelist().version).startswith("ours.toml ")
    monkeypatch.setenv("SPRYNG_PRICES", str(here / "none.toml"))
    with pytest.raises(SettingsError, match=r"the prices in .*none\.toml cannot be read: No such file"):
        pricelist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", r"\.spryng/prices\.toml: Expected '=' after a key"),
        ("[[prices]]\ninput = 1", r"missing required field `model` - at `\$\.prices\[0\]`"),
        ('[[prices]]\nmodel = "m"', r"missing required field `input`"),
        ('[[prices]]\nmodel = ""\ninput = 1', r"prices\[1\], no model: model='' must be a pattern"),
        ('[[prices]]\nmodel = "m"\ninput = 1\nouput = 2', r"contains unknown field `ouput`"),
        ('[[prices]]\nmodel = "m"\ninput = "1 dollar"', r"Invalid decimal string - at `\$\.prices\[0\]\.input`"),
        ('[[prices]]\nmodel = "m"\ninput = -1', r"prices\[1\], m: input=-1 must be US dollars for a million tokens"),
        ('[[prices]]\nmodel = "m"\ninput = 1\noutput_image = -1', r"output_image=-1 must be US dollars"),
        ('[[prices]]\nmodel = "m"\ninput = inf', r"input=Infinity must be US dollars"),
        ('[[prices]]\nmodel = "m"\ninput = 1000001', r"input=1000001 must be .*from 0 to 1,000,000"),
        ('[[prices]]\nmodel = "m"\ninput = 0.0000000000001', r"at most 12 decimal places"),
        ('[[prices]]\nmodel = "m"\ninput = 1\neffective = "soon"', r"effective"),
        ("[prices]\nx = 1", r"Expected `array`, got `object`"),
        ("", r"missing required field `prices`"),
        ("\0", r"\.spryng/prices\.toml: "),
    ],
)  # fmt: skip
def test_what_cannot_be(here: Path, text: str, said: str) -> None:
    """The file, the place and the value are said; nothing is priced by half a file, nor by public prices instead."""
    written(text)
    with pytest.raises(SettingsError, match=said):
        pricelist()
    store = SqliteStore(here / "usage.db")
    store.record([used("gpt-4o-mini")])
    rated = rate(store)
    assert rated.priced == 0
    assert str(rated.reason).startswith(".spryng/prices.toml: ")
    assert [row.price_version for row in store.messages().rows] == [None]


def test_bytes_that_are_no_text(here: Path) -> None:
    """They are said, too; as is a folder of that name."""
    written("").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"\.spryng/prices\.toml: 'utf-8' codec"):
        pricelist()
    Path(".spryng/prices.toml").unlink()
    Path(".spryng/prices.toml").mkdir()
    with pytest.raises(SettingsError, match="Is a directory"):
        pricelist()
