"""What a message cost: list prices from genai-prices, as Decimal, frozen on the message with the price's version.

Invariant: a cost is exact or it is None. A model, a tier or a kind of token that has no price is unknown, never free
and never guessed. Only tokens are priced: calls of hosted tools (web search, file search) are not in a usage.
This module knows the store, and nothing of the SDK.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from spryng_instrument.errors import StoreError, StoreNotOursError
from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import COST_UNIT, Cost, Store

BATCH = 5_000
"""Messages a transaction."""
LARGEST_USD = Decimal(9_000_000)
"""What a store can hold for one message; no usage that is true costs more."""


class Source(NamedTuple):
    """Where prices come from."""

    version: str | None
    """"genai-prices 0.2.3". None: there are no prices here."""
    reason: str | None = None
    """Why there are none, and what to do."""


@dataclass(frozen=True, slots=True)
class Rated:
    """What became of the messages that had no cost."""

    priced: int = 0
    unknown: tuple[tuple[str, int], ...] = ()
    """(model, messages) that this version of the prices has no price for, the most first."""
    reason: str | None = None
    """Why not all were looked at: no prices here, or a ledger that cannot be written. None: they were."""


def price_source() -> Source:
    """The prices that are installed. Cheap: they are not loaded for it."""
    try:
        return Source(f"genai-prices {version('genai-prices')}")
    except PackageNotFoundError:
        pass
    if sys.version_info < (3, 11):
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Source(
            None, f"genai-prices needs Python 3.11 or newer, and this is {running}; run spryng on a newer one"
        )
    return Source(None, "genai-prices is not installed; pip install 'spryng-instrument[cli]'")


def rate(store: Store) -> Rated:
    """Freeze the cost of every message of *store* that has usage and none yet.

    A message without a known price is looked at once by each version of the prices. A ledger that cannot be written now
    (read-only, or locked) stays as it is, and the reason is returned.

    Raises:
        StoreError: the ledger cannot be read.
    """
    source = price_source()
    if source.version is None:
        return Rated(reason=source.reason)
    priced = 0
    unknown: Counter[str] = Counter()
    for messages in _unpriced(store, source.version):
        costs = [Cost(message.id, price_of(message), source.version) for message in messages]
        try:
            store.set_costs(costs)
        except StoreNotOursError:
            raise
        except StoreError as exc:
            return Rated(priced, tuple(unknown.most_common()), f"costs could not be kept: {exc}")
        priced += sum(cost.cost_usd is not None for cost in costs)
        unknown.update(
            message.model or "(unknown)" for message, cost in zip(messages, costs, strict=True) if cost.cost_usd is None
        )
    return Rated(priced, tuple(unknown.most_common()))


def _unpriced(store: Store, price_version: str) -> Iterator[list[Message]]:
    before: set[str] = set()
    while messages := store.unpriced(price_version, BATCH):
        ids = {message.id for message in messages}
        if ids <= before:  # a store that keeps nothing must not keep us here for ever
            return
        before = ids
        yield messages


def price_of(message: Message) -> Decimal | None:
    """US dollars for the tokens of *message*, rounded half-even to COST_UNIT; None where no price is known.

    The price is the one of the message's time, host, answered model and service tier.
    """
    if message.usage is None or message.model is None:
        return None
    try:
        provider = _provider(message.host, message.model)
        cost = _calculate(message.usage, message.model, message.timestamp, _context(message.service_tier), provider)
    except Exception:  # LookupError: no such model. Whatever else genai-prices raises, we know no price
        return None
    if cost is None or cost > LARGEST_USD:
        return None
    return cost.quantize(COST_UNIT, rounding=ROUND_HALF_EVEN)


def _provider(host: str | None, model: str) -> dict[str, Any]:
    """Whose prices count: the host's, if genai-prices knows it; else OpenAI's list prices, as for a gateway."""
    if host:
        from genai_prices.data_snapshot import get_snapshot

        url = f"https://{host}/"
        with suppress(LookupError):
            get_snapshot().find_provider(None, None, url)
            return {"provider_api_url": url}
    if model.lower().startswith("gpt-oss"):
        raise LookupError("OpenAI gives these weights away; what they cost is for each host to say")
    return {"provider_id": "openai"}


def _context(service_tier: str | None) -> dict[str, str] | None:
    """The tier as genai-prices names it. None: the standard one."""
    if service_tier in (None, "default"):
        return None
    return {"processing": "batch"} if service_tier == "batch" else {"service_tier": str(service_tier)}


def _calculate(
    usage: Usage, model: str, timestamp: datetime, context: dict[str, str] | None, provider: dict[str, Any]
) -> Decimal | None:
    """What genai-prices calculates, or None if that leaves out or guesses a part of what was used."""
    import genai_prices

    # It wants input and output with all that is part of them, as Usage has them, and takes the parts apart itself.
    # Parts without a price of their own count as what they are part of. Image tokens are left to that: chat models bill
    # them as text. Zero is left out: zero audio tokens, reported, must not ask for a price of audio.
    reported = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "input_audio_tokens": usage.input_audio_tokens,
        "output_audio_tokens": usage.output_audio_tokens,
    }
    counts = {name: count for name, count in reported.items() if count}
    options: dict[str, Any] = provider if context is None else {**provider, "price_context": context}
    calculation = genai_prices.calc_price(
        genai_prices.Usage(**counts), model, genai_request_timestamp=timestamp, **options
    )
    if not _is_whole(usage, counts, calculation.model_price):
        return None
    if context is not None and not _has_tier(calculation, context, counts, timestamp):
        return None
    total: Decimal = calculation.total_price
    return total


_PRICES = {
    "input_tokens": "input_mtok",
    "output_tokens": "output_mtok",
    "cache_read_tokens": "cache_read_mtok",
    "cache_write_tokens": "cache_write_mtok",
    "input_audio_tokens": "input_audio_mtok",
    "output_audio_tokens": "output_audio_mtok",
}


def _is_whole(usage: Usage, counts: dict[str, int], prices: Any) -> bool:
    """Whether everything that was used was reported, and has a price."""
    for name in ("input_tokens", "output_tokens", "input_audio_tokens", "output_audio_tokens"):
        # Audio costs many times what text costs: where it has no price of its own, that of text would be wrong.
        if counts.get(name) and getattr(prices, _PRICES[name], None) is None:
            return False
    if usage.input_tokens is None:
        return False
    # Embeddings report no output, and have none. Elsewhere, output that was not reported is unknown.
    has_output = prices.output_mtok is not None and usage.total_tokens != usage.input_tokens
    return usage.output_tokens is not None or not has_output


def _has_tier(calculation: Any, context: dict[str, str], counts: dict[str, int], timestamp: datetime) -> bool:
    """Whether genai-prices priced the tier itself, and did not fall back on the standard price in silence."""
    model = calculation.model
    if not any(model is own for own in calculation.provider.models):
        return False  # the model of another provider: genai-prices ignores the tier then
    for variant in model.price_variants or ():
        active = variant.constraint is None or variant.constraint.active(timestamp)
        if active and variant.when == context:
            own = {key for key, price in vars(variant.prices).items() if price is not None}
            needed = {
                _PRICES[name] for name in counts if getattr(calculation.model_price, _PRICES[name], None) is not None
            }
            # A variant without any price says "as standard"; one with some must have each that is needed.
            return not own or needed <= own
    return False
