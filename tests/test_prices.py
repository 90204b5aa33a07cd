"""What a message cost: exactly, by its own time, host, model and tier, or not at all."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spryng_instrument import prices
from spryng_instrument.billing.corrections import Repriced, reprice
from spryng_instrument.errors import StoreBusyError, StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.prices import RULES, Rated, Source, price_of, price_source, rate
from spryng_instrument.store.base import COST_UNIT, Cost, Filter
from spryng_instrument.store.sqlite import SqliteStore

try:
    import genai_prices
except ModuleNotFoundError:
    genai_prices = None

priced = pytest.mark.skipif(genai_prices is None, reason="genai-prices is not installed (it needs Python 3.11)")
NOW = datetime(2026, 11, 22, 12, tzinfo=timezone.utc)


def message(model: str | None = "text", *, at: datetime = NOW, tier: str | None = None, host: str | None = None,
            asked: str | None = None, operation: str = "chat.completions", tools: dict[str, Any] | None = None,
            **counts: int | None) -> Message:  # fmt: skip
    """A message that used *counts*, by short names."""
    usage = Usage(**{f"{name}_tokens": count for name, count in counts.items()}) if counts else None
    return Message(id=new_id(), timestamp=at, operation=operation, key="acme", request_model=asked,
                   response_model=model, service_tier=tier, host=host, usage=usage, tool_usage=tools)  # fmt: skip


def svg(**fields: Any) -> dict[str, Any]:
    """Use of a language model that has written an SVG, as it is recorded."""
    return {"svg": {"model": "text", "input_tokens": 100, "output_tokens": 10, "reasoning_tokens": 0, **fields}}


@pytest.fixture
def price_list() -> Iterator[None]:
    """Prices of our own, so that no list price's change fails a test."""
    from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot
    from genai_prices.types import (
        ClauseEquals,
        ConditionalPrice,
        ModelInfo,
        ModelPrice,
        PriceVariant,
        Provider,
        StartDateConstraint,
        Tier,
        TieredPrices,
    )

    def price(**each: str) -> ModelPrice:
        return ModelPrice(**{f"{name}_mtok": Decimal(value) for name, value in each.items()})

    def model(name: str, prices: Any, *variants: PriceVariant) -> ModelInfo:
        return ModelInfo(id=name, match=ClauseEquals(name), prices=prices, price_variants=list(variants))

    text = price(input="2", output="8", cache_read="0.5")
    audio = price(input="2", output="8", input_audio="40", output_audio="80")
    cut = [
        ConditionalPrice(prices=price(input="10", output="40")),
        ConditionalPrice(StartDateConstraint(date(2026, 6, 1)), prices=price(input="2", output="8")),
    ]
    long = ModelPrice(input_mtok=TieredPrices(Decimal(2), [Tier(272_000, Decimal(4))]), output_mtok=Decimal(8))
    halved = ModelPrice(input_mtok=TieredPrices(Decimal(1), [Tier(272_000, Decimal(2))]), output_mtok=Decimal(4))
    flex = PriceVariant(
        {"service_tier": "flex"},
        price(input="1", output="4", cache_read="0.25"),
        StartDateConstraint(date(2026, 10, 1)),
    )
    partial = PriceVariant({"processing": "batch"}, price(input="1", output="4"))
    batched = PriceVariant({"processing": "batch"}, price(input="2.5", output="5", input_image="4"))
    same = PriceVariant({"service_tier": "scale"}, ModelPrice())
    openai = Provider(
        id="openai",
        name="OpenAI",
        api_pattern=r"https://api\.openai\.com",
        models=[
            model("text", text, flex, partial, same),
            model("embedding", price(input="0.02")),
            model("audio", audio),
            model("images", price(input="5", output="10", input_image="8", output_image="32"), batched),
            model("sees", price(input="4", cache_read="0.4", input_image="5", cache_image_read="0.5", output="40")),
            model("hears", price(input="2", cache_read="0.5", input_audio="40", cache_audio_read="4", output="8")),
            model("hears-free", price(input="2", cache_read="0.5", input_audio="40", cache_audio_read="0", output="8")),
            model("hears-anew", price(input="2", cache_read="0.5", input_audio="40", output="8")),
            model("writes", price(input="2", output="8", cache_read="0.2", cache_write="2.5")),
            model("was-dearer", cut),
            model("long", long),
            model("long-batch", long, PriceVariant({"processing": "batch"}, halved)),
            model("free", ModelPrice()),
            model("gpt-oss-20b", text),
        ],
    )
    azure = Provider(
        id="azure",
        name="Azure",
        api_pattern=r"https://[a-z]+\.openai\.azure\.com",
        models=[model("text", price(input="3", output="9"))],
        fallback_model_providers=["openai"],
    )
    groq = Provider(
        id="groq",
        name="Groq",
        api_pattern=r"https://api\.groq\.com",
        models=[
            model("llama", price(input="0.05", output="0.08")),
            model("gpt-oss-20b", price(input="0.1", output="0.5")),
        ],
    )
    set_custom_snapshot(DataSnapshot([openai, azure, groq], from_auto_update=False))
    yield
    set_custom_snapshot(None)


SEARCHED = {"web_search": {"num_requests": 1}}
UNUSED = {
    "image_gen": {"input_tokens": 0, "input_tokens_details": {"text_tokens": 0}},
    "web_search": {"num_requests": 0},
}

KNOWN = [
    ("input and output", message(input=1000, output=100), "0.0028"),
    ("cached is a part of input, at its own price", message(input=1000, cached=400, output=100), "0.0022"),
    ("reasoning is a part of output", message(input=1000, output=100, reasoning=60), "0.0028"),
    ("image is a part of input, as text", message(input=1000, output=100, input_image=900), "0.0028"),
    ("images, at their own price", message("images", input=10, input_image=6, output=5, output_image=4), "0.000206"),
    ("no images, reported", message("images", input=100, input_image=0, output=50, output_image=0), "0.001"),
    ("images that are the output", message("sees", input=10, input_image=6, output=5, output_image=5), "0.000246"),
    ("cached, and no images", message("sees", input=100, cached=50, input_image=0, output=0), "0.00022"),
    ("embedded is text", message("images", operation="embeddings", input=100, output=0), "0.0005"),
    ("images in a batch", message("images", input=9, input_image=9, output=0, operation="batches"), "0.000036"),
    ("an SVG alone, by the model that wrote it", message("images", input=100, output=10, tools=svg()), "0.00028"),
    ("an SVG and an image, each by its model", message("audio", input=50, output=5, tools=svg()), "0.00042"),
    ("some of both", message("hears", input=99, cached=60, input_audio=50, cached_audio=30, output=0), "0.000973"),
    ("free again", message("hears-free", input=99, cached=60, input_audio=50, cached_audio=30, output=0), "0.000853"),
    ("no audio cached", message("hears", input=99, cached=40, input_audio=50, cached_audio=0, output=0), "0.002038"),
    ("seen again", message("sees", input=99, cached=50, input_image=60, cached_image=30, output=0), "0.000249"),
    ("without a price of its own, cached is input", message("audio", input=1000, cached=400, output=100), "0.0028"),
    ("without a price of its own, written is input", message(input=1000, cache_write=900, output=100), "0.0028"),
    ("written to the cache", message("writes", input=1000, cached=200, cache_write=300, output=10), "0.00187"),
    ("audio", message("audio", input=100, input_audio=60, output=50, output_audio=40), "0.00576"),
    ("a transcription", message("audio", input=9, input_audio=8, output=0, operation="audio.translations"), "0.000322"),
    ("reported zero audio needs no price", message(input=1000, output=100, input_audio=0, output_audio=0), "0.0028"),
    ("embeddings have no output", message("embedding", input=7, total=7), "0.00000014"),
    ("embeddings that report output 0", message("embedding", input=7, output=0, total=7), "0.00000014"),
    ("output not reported, but in the total", message(input=1000, total=1000), "0.002"),
    ("zero costs zero", message(input=0, output=0), "0"),
    ("before the price was cut", message("was-dearer", input=1000, output=100, at=NOW.replace(month=5)), "0.014"),
    ("after it", message("was-dearer", input=1000, output=100), "0.0028"),
    ("a long prompt has its own price", message("long", input=300_000, output=0), "1.2"),
    ("no request of a sum is long", message("long", input=272_000, output=0, operation="threads.runs"), "0.544"),
    ("no tool was used", message("long", input=300_000, output=0, operation="responses", tools=UNUSED), "1.2"),
    ("a sum of one price", message(input=300_000, output=0, operation="agents.turns"), "0.6"),
    ("the standard tier by its name", message(input=1000, output=100, tier="default"), "0.0028"),
    ("flex", message(input=1000, cached=400, output=100, tier="flex"), "0.0011"),
    ("batch", message(input=1000, output=100, tier="batch"), "0.0014"),
    ("a short batch", message("long-batch", input=272_000, output=0, operation="batches"), "0.272"),
    ("a batch says no tier", message(input=1000, output=100, operation="batches"), "0.0014"),
    ("a tier that is said to cost the same", message(input=1000, output=100, tier="scale"), "0.0028"),
    ("api.openai.com", message(input=1000, output=100, host="api.openai.com"), "0.0028"),
    ("Azure's own price", message(input=1000, output=100, host="acme.openai.azure.com"), "0.0039"),
    ("Azure has OpenAI's models", message("embedding", input=50, host="acme.openai.azure.com"), "0.000001"),
    ("another provider", message("llama", input=1000, output=100, host="api.groq.com"), "0.000058"),
    ("open weights that are sold", message("gpt-oss-20b", input=1000, output=100, host="api.groq.com"), "0.00015"),
    ("a gateway", message(input=1000, output=100, host="gateway.acme.dev"), "0.0028"),
    ("the practice server", message(input=1000, output=100, host="127.0.0.1:40123"), "0.0028"),
    ("the model asked for, if none answered", message(None, asked="text", input=1000, output=100), "0.0028"),
    ("the model that answered wins", message("text", asked="embedding", input=1000, output=100), "0.0028"),
    ("one token", message("embedding", input=1), "0.00000002"),
]  # fmt: skip


@priced
@pytest.mark.usefixtures("price_list")
@pytest.mark.parametrize(("of", "cost"), [case[1:] for case in KNOWN], ids=[case[0] for case in KNOWN])
def test_known(of: Message, cost: str) -> None:
    """Every token is priced once, with the price of its kind, time, host and tier."""
    assert price_of(of) == Decimal(cost)


UNKNOWN = [
    ("no usage", message()),
    ("no model", message(None, input=1, output=1)),
    ("no such model", message("gpt-99", input=1, output=1)),
    ("output of a model that has no price for it", message("embedding", input=7, output=1)),
    ("a model without any price", message("free", input=7)),
    ("audio without a price, which costs far more than text", message(input=100, output=50, output_audio=40)),
    ("images of which some may be cached", message("sees", input=100, cached=50, input_image=60, output=0)),
    ("audio of which some may be cached", message("hears", input=99, cached=60, input_audio=50, output=0)),
    ("more cached audio than audio", message("hears", input=99, cached=60, input_audio=9, cached_audio=10, output=0)),
    (
        "no price for what was heard again",
        message("hears-anew", input=99, cached=60, input_audio=50, cached_audio=30, output=0),
    ),
    ("an SVG alone, by an unknown model", message("text", input=100, output=10, tools=svg(model="gpt-99"))),
    ("an SVG alone, by nobody", message("text", input=100, output=10, tools=svg(model=None))),
    ("an SVG by an unknown model beside an image", message(input=50, output=5, tools=svg(model="gpt-99"))),
    ("an SVG beside an image without a price", message("gpt-99", input=50, output=5, tools=svg())),
    ("an SVG beside an image without usage", message(tools=svg())),
    ("an SVG that says nothing", message(input=50, output=5, tools={"svg": {"model": "text"}})),
    ("an SVG that is none", message(input=50, output=5, tools={"svg": "odd"})),
    ("what was heard, if not how much", message("audio", input=100, output=0, operation="audio.transcriptions")),
    ("what was said, if not how much", message("audio", input=9, input_audio=0, output=50, operation="realtime")),
    ("input, any of which may be images", message("images", input=100, output=50, output_image=50)),
    ("output, any of which may be images", message("images", input=100, input_image=0, output=50)),
    (
        "images in a batch that has no price for them",
        message("images", input=0, output=9, output_image=9, operation="batches"),
    ),
    ("output not reported", message(input=1000)),
    ("input not reported", message(output=1000)),
    ("a total alone", message(total=1000)),
    ("more cached than input", message(input=10, cached=11, output=1)),
    ("priority has no price", message(input=1000, output=100, tier="priority")),
    ("auto says nothing", message(input=1000, output=100, tier="auto")),
    ("flex before its price began", message(input=1000, output=100, tier="flex", at=NOW.replace(month=9))),
    ("batch without a price for what was cached", message(input=1000, cached=10, output=100, tier="batch")),
    ("a batch without a price for what was cached", message(input=9, cached=1, output=1, operation="batches")),
    ("a batch of a model without a price for it", message("embedding", input=7, total=7, operation="batches")),
    ("flex of OpenAI's model at Azure", message("embedding", input=9, tier="flex", host="acme.openai.azure.com")),
    ("another provider's model at a gateway", message("llama", input=1, output=1, host="gateway.acme.dev")),
    ("open weights at any host", message("gpt-oss-20b", input=1, output=1, host="127.0.0.1:8000")),
    ("OpenAI's model at a provider without it", message(input=1, output=1, host="api.groq.com")),
    *(
        (
            f"{operation}, of whose requests some may be long",
            message("long", input=272_001, output=0, operation=operation),
        )
        for operation in ("agents.turns", "threads.runs")
    ),
    ("what a batch of long requests costs", message("long-batch", input=272_001, output=0, operation="batches")),
    ("a response that has searched, as often as it liked", message("long", input=272_001, output=0, tools=SEARCHED)),
    ("more than all money", message(input=10**16, output=0)),
]


@priced
@pytest.mark.usefixtures("price_list")
@pytest.mark.parametrize("of", [case[1] for case in UNKNOWN], ids=[case[0] for case in UNKNOWN])
def test_unknown(of: Message) -> None:
    """What has no price of its own is unknown: never free, never guessed, never an exception."""
    assert price_of(of) is None


@priced
@pytest.mark.usefixtures("price_list")
def test_rounded_half_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are rounded to a trillionth of a dollar, ties to the even one."""
    exact = iter([Decimal("1.0000000000005"), Decimal("1.0000000000015"), Decimal("1.00000000000051")])
    monkeypatch.setattr(prices, "_calculate", lambda *_: next(exact))

    costs = [price_of(message(input=1, output=1)) for _ in range(3)]

    assert costs == [Decimal("1.000000000000"), Decimal("1.000000000002"), Decimal("1.000000000001")]
    assert all(cost is not None and cost.as_tuple().exponent == COST_UNIT.as_tuple().exponent for cost in costs)


@priced
@pytest.mark.parametrize(
    ("model", "counts", "cost"),
    [
        ("gpt-4o-mini-2024-07-18", {"input": 1000, "cached": 200, "output": 100}, "0.000195"),
        ("gpt-4.1-2025-04-14", {"input": 1000, "output": 100}, "0.0028"),
        ("text-embedding-3-small", {"input": 1000, "total": 1000}, "0.00002"),
        ("gpt-3.5-turbo-instruct:20230824-v2", {"input": 10, "output": 20}, "0.000055"),
        ("gpt-image-1.5", {"input": 150, "input_image": 100, "output": 1000, "output_image": 1000}, "0.03305"),
        ("gpt-image-1", {"input": 150, "input_image": 100, "output": 1000, "output_image": 1000}, "0.04125"),
        ("gpt-5-2025-08-07", {"operation": "batches", "input": 1000, "output": 1000}, "0.005625"),
    ],
)
def test_real_list_prices(model: str, counts: dict[str, Any], cost: str) -> None:
    """The prices that are installed give what OpenAI's page says."""
    assert price_of(message(model, host="api.openai.com", **counts)) == Decimal(cost)


@priced
def test_rates_each_message_once(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """rate() freezes costs in batches, lists what it has no price for, and then has nothing to do."""
    monkeypatch.setattr(prices, "BATCH", 3)
    store = SqliteStore(tmp_path / "usage.db")
    known = [message(input=1000, output=100) for _ in range(7)]
    store.record([*known, *(message("gpt-99", input=1) for _ in range(5)), message("llama", input=1), message()])

    rated = rate(store)

    assert rated == Rated(7, (("gpt-99", 5), ("llama", 1)))
    assert store.total().cost_usd == Decimal("0.0196")
    assert store.total().unpriced == 6
    assert {row.price_version for row in store.messages().rows if row.message.usage} == {price_source().version}
    assert rate(store) == Rated()


@priced
def test_newer_prices_look_again(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version prices what the older could not, and never changes a cost that is frozen."""
    store = SqliteStore(tmp_path / "usage.db")
    old, new = message(input=1000, output=100), message("gpt-99", input=1000, output=100)
    store.record([old, new])
    monkeypatch.setattr(prices, "price_source", lambda: Source("genai-prices 0.1"))
    rate(store)
    monkeypatch.setattr(prices, "price_source", lambda: Source("genai-prices 0.2"))
    monkeypatch.setattr(prices, "price_of", lambda _: Decimal(5))

    assert rate(store) == Rated(1)

    found = {row.message.id: (row.cost_usd, row.price_version) for row in store.messages().rows}
    assert found[old.id] == (Decimal("0.0028"), "genai-prices 0.1")
    assert found[new.id] == (Decimal(5), "genai-prices 0.2")


@priced
def test_newer_rules_look_again(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prices, applied otherwise: what had no cost is looked at once more, and `spryng rate` shows the rest."""
    store = SqliteStore(tmp_path / "usage.db")
    wrong, none = message(input=1000, output=100, operation="batches"), message("was-dearer", input=1000, output=0)
    store.record([wrong, none])
    with monkeypatch.context() as patch:
        patch.setattr(prices, "RULES", RULES - 1)
        patch.setattr(prices, "price_of", lambda each: Decimal("0.0028") if each.id == wrong.id else None)
        assert rate(store) == Rated(1, (("was-dearer", 1),))

    assert rate(store) == Rated(1)
    assert store.total().cost_usd == Decimal("0.0048")
    assert reprice(store, Filter()) == [Repriced("text", 1, Decimal("0.0028"), Decimal("0.0014"))]


class Forgetful:
    """A store that keeps no cost, without saying so."""

    def __init__(self) -> None:
        self.only = message("gpt-99", input=1)
        self.asked = 0

    def unpriced(self, price_version: str, limit: int = 1_000) -> list[Message]:
        return [self.only]

    def set_costs(self, costs: Sequence[Cost]) -> None:
        self.asked += 1


@priced
def test_terminates() -> None:
    """A store that keeps nothing is asked once, not for ever."""
    store = Forgetful()

    rate(store)  # type: ignore[arg-type]

    assert store.asked == 1


@priced
def test_ends_while_messages_come(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message that was there is priced; a report does not run after those that come meanwhile."""
    monkeypatch.setattr(prices, "BATCH", 3)
    store = SqliteStore(tmp_path / "usage.db")
    there = [message(input=1000, output=100) for _ in range(7)]
    store.record(there)
    keep, late = store.set_costs, [message(input=1000, output=100) for _ in range(20)]

    def keep_and_record(costs: Sequence[Cost]) -> None:
        keep(costs)
        store.record([late.pop()])  # IndexError: it was asked for ever

    monkeypatch.setattr(store, "set_costs", keep_and_record)
    rated = rate(store)

    assert rated.reason is None
    costs = {row.message.id: row.cost_usd for row in store.messages().rows}
    assert {costs[each.id] for each in there} == {Decimal("0.0028")}


@priced
def test_nothing_to_do_writes_nothing(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page asks: where all that there is has its cost, nobody who records waits for that."""
    store = SqliteStore(tmp_path / "usage.db")
    store.record([message(input=1000, output=100)])
    rate(store)
    monkeypatch.setattr(store, "set_costs", lambda costs: pytest.fail("it took the lock"))
    for again in (True, False):
        assert rate(store, again=again) == Rated()


@priced
def test_two_versions_at_work(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks once at what has no price, though the other marks it as looked at by itself all the while; and who
    asks every few seconds leaves it alone."""
    monkeypatch.setattr(prices, "BATCH", 3)
    store = SqliteStore(tmp_path / "usage.db")
    there = [message("gpt-99", input=1) for _ in range(7)]
    store.record(there)
    keep, turns = store.set_costs, count()

    def keep_and_undo(costs: Sequence[Cost]) -> None:
        keep(costs)
        assert next(turns) < 20
        keep([Cost(each.id, None, "genai-prices 0.1") for each in there])

    monkeypatch.setattr(store, "set_costs", keep_and_undo)
    assert rate(store).unknown == (("gpt-99", 3),)  # the other was faster
    monkeypatch.setattr(store, "set_costs", keep)
    assert rate(store, again=False) == Rated()
    assert rate(store) == Rated(0, (("gpt-99", 7),))
    assert rate(store) == Rated()


@priced
def test_ends_in_time(tmp_path: Path, price_list: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more than there is time for, that is said, and the next one goes on."""
    monkeypatch.setattr(prices, "BATCH", 2)
    store = SqliteStore(tmp_path / "usage.db")
    store.record([message(input=1000, output=100) for _ in range(7)])

    with monkeypatch.context() as patch:
        seconds = iter(range(100))
        patch.setattr(prices, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
        rated = rate(store, within_s=5.5)

    assert rated == Rated(5, (), "not all of them were looked at yet; ask again")
    assert store.total().unpriced == 2
    assert rate(store, within_s=60) == Rated(2)


@priced
@pytest.mark.parametrize("error", [StoreError("read-only"), StoreBusyError("locked")])
def test_read_only(tmp_path: Path, error: StoreError, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that cannot be written now can still be reported on; the reason is said."""
    store = SqliteStore(tmp_path / "usage.db")
    store.record([message(input=1000, output=100)])

    def refuse(costs: Sequence[Cost]) -> None:
        raise error

    monkeypatch.setattr(store, "set_costs", refuse)

    assert rate(store).reason == f"costs could not be kept: {error}"


def test_without_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without genai-prices there are no costs, and what to do is said."""

    def nowhere(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(prices, "version", nowhere)
    store = SqliteStore(tmp_path / "usage.db")
    store.record([message(input=1000, output=100)])

    rated = rate(store)

    assert price_source().version is None
    if sys.version_info < (3, 11):
        assert rated.reason == "genai-prices needs Python 3.11 or newer, and this is 3.10; run spryng on a newer one"
    else:
        assert rated.reason == "genai-prices is not installed; pip install 'spryng-instrument[cli]'"
    assert store.total().unpriced == 1


@pytest.mark.skipif(genai_prices is not None, reason="genai-prices is installed")
def test_missing_is_no_error() -> None:
    """Where genai-prices is not installed, every price is unknown."""
    assert price_of(message("gpt-4o-mini", input=1, output=1, host="api.openai.com")) is None
    assert price_source().version is None


def test_source_is_named() -> None:
    """The version that is frozen with a cost names the package, its release, and the rules by which it is applied."""
    version, reason = price_source()

    assert (version is None) is (genai_prices is None)
    named = "" if version is None else f"genai-prices {importlib.metadata.version('genai-prices')} (rules {RULES})"
    assert (version or "") == named
    assert (reason is None) is (version is not None)


@priced
@pytest.mark.usefixtures("price_list")
def test_what_genai_prices_raises_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """No error of genai-prices ever ends a report."""
    assert genai_prices is not None

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken price data")

    monkeypatch.setattr(genai_prices, "calc_price", broken)

    assert price_of(message(input=1, output=1)) is None


@priced
@pytest.mark.usefixtures("price_list")
def test_any_day() -> None:
    """The price of a day is that day's in UTC, whatever the day of whoever asks."""
    last = datetime(2026, 5, 31, 23, 59, 59, tzinfo=timezone.utc)

    assert price_of(message("was-dearer", input=1, output=0, at=last)) == Decimal("0.00001")
    assert price_of(message("was-dearer", input=1, output=0, at=last + timedelta(seconds=1))) == Decimal("0.000002")
