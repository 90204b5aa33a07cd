"""What a message cost: by prices of one's own, else list prices from genai-prices; frozen on it with their version.

Invariant: a cost is exact or it is None. A model, a tier or a kind of token that has no price is unknown, never free
and never guessed. Only tokens are priced: calls of hosted tools (web search, file search) are not in a usage.
This module knows the store, and nothing of the SDK.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec

from spryng_instrument.errors import SettingsError, StoreError, StoreNotOursError
from spryng_instrument.message import Message, Usage
from spryng_instrument.pricelist import pricelist, tier_of
from spryng_instrument.store.base import COST_UNIT, Cost, Store
from spryng_instrument.usage import usage_of

BATCH = 5_000
"""Messages a transaction."""
RULES = 2
"""Of what is made of the prices here. Counted up with every change that gives a message another cost, or one at all, so
that costs of before are looked at again: by `rate` where there was none, and by `spryng rate`."""
LARGEST_USD = Decimal(9_000_000)
"""What a store can hold for one message; no usage that is true costs more."""


class Source(NamedTuple):
    """Where prices come from."""

    version: str | None
    """"genai-prices 0.2.3 (rules 2)", "prices.toml 1f0a2b3c + genai-prices 0.2.3 (rules 2)": the prices, and the RULES
    by which they are applied. None: there are no prices here."""
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
    """The prices that there are. Cheap: those that are installed are not loaded for it."""
    try:
        own = pricelist().version
    except SettingsError as exc:  # nothing is priced until it is mended: a public price might be the wrong one
        return Source(None, str(exc))
    try:
        public = f"genai-prices {version('genai-prices')} (rules {RULES})"
        return Source(public if own is None else f"{own} + {public}")
    except PackageNotFoundError:
        if own is not None:
            return Source(f"{own} (rules {RULES})")
    if sys.version_info < (3, 11):
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Source(
            None, f"genai-prices needs Python 3.11 or newer, and this is {running}; run spryng on a newer one"
        )
    return Source(None, "genai-prices is not installed; pip install 'spryng-instrument[cli]'")


def load() -> None:
    """Load the prices, if they are installed, before a thread does.

    They bring an HTTP library along, and openai looks for that in sys.modules: while another thread imports it, a call
    would find the half of it.
    """
    with suppress(ModuleNotFoundError):
        import genai_prices.data_snapshot  # noqa: F401


def rate(store: Store, *, within_s: float = math.inf, again: bool = True) -> Rated:
    """Freeze the cost of every message of *store* that has usage and none yet, and was recorded before this was called.

    A message without a known price is looked at once by each version of the prices. A ledger that cannot be written now
    (read-only, or locked) stays as it is, and the reason is returned.

    Args:
        within_s: after so many seconds, the rest is left for the next time.
        again: whether to look at what another version had no price for. Who asks every few seconds does not: where two
            versions are at work, each would undo what the other has just done.

    Raises:
        StoreError: the ledger cannot be read.
    """
    source = price_source()
    if source.version is None:
        return Rated(reason=source.reason)
    until = time.monotonic() + within_s
    priced = 0
    unknown: Counter[str] = Counter()
    without_price: set[str] = set()
    last: set[str] = set()
    reason = None
    while reason is None:
        found = store.unpriced(source.version if again else None, BATCH)
        # Some come again where another version marks them as its own meanwhile, and all where a store keeps nothing.
        messages = [message for message in found if message.id not in without_price and message.id not in last]
        if not messages:
            break  # without asking for the lock of those who record
        in_time = takewhile(lambda _: time.monotonic() < until, messages)
        costs = [Cost(message.id, price_of(message), source.version) for message in in_time]
        try:
            store.set_costs(costs)
        except StoreNotOursError:
            raise
        except StoreError as exc:
            reason = f"costs could not be kept: {exc}"
            break
        priced += sum(cost.cost_usd is not None for cost in costs)
        without = [message for message, cost in zip(messages, costs, strict=False) if cost.cost_usd is None]
        unknown.update(message.model or "(unknown)" for message in without)
        without_price.update(message.id for message in without)
        last = {message.id for message in messages}
        if len(costs) < len(messages):
            reason = "not all of them were looked at yet; ask again"
        elif len(found) < BATCH:
            break  # those that come while we are at work are for the next time, or there were no end
    return Rated(priced, tuple(unknown.most_common()), reason)


def price_of(message: Message) -> Decimal | None:
    """US dollars for the tokens of *message*, rounded half-even to COST_UNIT; None where no price is known.

    The price is the one of the message's time, host, answered model and service tier.
    """
    try:
        costs = [_cost_of(part) for part in _parts_of(message)]
    except Exception:  # LookupError: no such model. Whatever else genai-prices raises, we know no price
        return None
    total = Decimal(0)
    for cost in costs:
        if cost is None or cost > LARGEST_USD:
            return None
        total += cost
    return total.quantize(COST_UNIT, rounding=ROUND_HALF_EVEN)


def _parts_of(message: Message) -> tuple[Message, ...]:
    """The use of each model: of the one that made an image, and of the one that has written an SVG of it."""
    svg = (message.tool_usage or {}).get("svg")
    if svg is None:
        return (message,)
    written = msgspec.structs.replace(
        message, usage=usage_of(svg), request_model=None, response_model=svg.get("model"), tool_usage=None
    )
    if message.usage == written.usage:  # no other was reported
        return (written,)
    return msgspec.structs.replace(message, tool_usage=None), written


def _cost_of(message: Message) -> Decimal | None:
    if message.usage is None or message.model is None:
        return None
    if own := pricelist().find(message):
        return own.cost_of(message.usage)
    return _calculate(message, message.usage, _provider(message.host, message.model))


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


def _context(tier: str) -> dict[str, str] | None:
    """The tier as genai-prices names it. None: the standard one."""
    if tier == "default":
        return None
    return {"processing": "batch"} if tier == "batch" else {"service_tier": tier}


_SUMS = ("batches", "agents.turns", "threads.runs", "live", "realtime.translations")
"""Operations that report one usage for several requests to the model."""


def _is_sum(message: Message) -> bool:
    """Whether the usage is that of several requests. A response is one until tools of the API's own have been used."""
    return message.operation in _SUMS or _any_count(message.tool_usage)


def _any_count(reported: object) -> bool:
    if isinstance(reported, dict):
        return any(map(_any_count, reported.values()))
    return isinstance(reported, (int, float)) and reported > 0


def _calculate(message: Message, usage: Usage, provider: dict[str, Any]) -> Decimal | None:
    """What genai-prices calculates, or None if that leaves out or guesses a part of what was used."""
    import genai_prices

    # It wants input and output with all that is part of them, as Usage has them, and takes the parts apart itself.
    # Parts without a price of their own count as what they are part of: images, where chat models bill them as text.
    # Zero is left out: zero audio tokens, reported, must not ask for a price of audio. But where a cache was used, it
    # raises unless it is told, be it zero, how much of that was audio or images which have a price of their own.
    reported = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cache_read_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "input_audio_tokens": usage.input_audio_tokens,
        "output_audio_tokens": usage.output_audio_tokens,
        "input_image_tokens": usage.input_image_tokens,
        "output_image_tokens": usage.output_image_tokens,
    }
    counts = {name: count for name, count in reported.items() if count}
    for kind in ("audio", "image"):
        cached = getattr(usage, f"cached_{kind}_tokens")
        if cached is not None and usage.cached_tokens and counts.get(f"input_{kind}_tokens"):
            counts[f"cache_{kind}_read_tokens"] = cached
    context = _context(tier_of(message))
    options: dict[str, Any] = provider if context is None else {**provider, "price_context": context}
    calculation = genai_prices.calc_price(
        genai_prices.Usage(**counts), message.model or "", genai_request_timestamp=message.timestamp, **options
    )
    if not _is_whole(usage, counts, calculation.model_price):
        return None
    if not all(_is_told(kind, usage, counts, calculation.model_price) for kind in _kinds_of(message.operation)):
        return None
    if context is not None and not _has_tier(calculation, context, counts, message.timestamp):
        return None
    if _is_sum(message) and counts.get("input_tokens", 0) > _same_up_to(calculation.model_price):
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
    "input_image_tokens": "input_image_mtok",
    "output_image_tokens": "output_image_mtok",
    "cache_audio_read_tokens": "cache_audio_read_mtok",
    "cache_image_read_tokens": "cache_image_read_mtok",
}


def _is_whole(usage: Usage, counts: dict[str, int], prices: Any) -> bool:
    """Whether everything that was used was reported, and has a price."""
    needed = ["input_tokens", "output_tokens", "input_audio_tokens", "output_audio_tokens"]
    # Audio costs many times what text costs: where it has no price of its own, that of text would be wrong. So would be
    # the price of either for what was cached of audio or images, where both have one.
    if prices.cache_read_mtok is not None:
        kinds = [kind for kind in ("audio", "image") if getattr(prices, f"input_{kind}_mtok", None) is not None]
        needed += [f"cache_{kind}_read_tokens" for kind in kinds]
    if any(counts.get(name) and getattr(prices, _PRICES[name], None) is None for name in needed):
        return False
    if usage.input_tokens is None:
        return False
    # Embeddings report no output, and have none. Elsewhere, output that was not reported is unknown.
    has_output = prices.output_mtok is not None and usage.total_tokens != usage.input_tokens
    return usage.output_tokens is not None or not has_output


def _kinds_of(operation: str) -> tuple[str, ...]:
    """The kinds of tokens, beside text, of which a usage must say how many it is of.

    Chat that says nothing of audio is taken for text: OpenAI's answers always say it, and those of others never.
    """
    if operation == "embeddings":
        return ()  # of text alone, by this API
    return ("image", "audio") if operation.startswith(("audio.", "realtime")) else ("image",)


def _is_told(kind: str, usage: Usage, counts: dict[str, int], prices: Any) -> bool:
    """Whether it was reported how many of the tokens were of that kind, if that makes a difference to their price."""
    for whole, part in (("input_tokens", f"input_{kind}_tokens"), ("output_tokens", f"output_{kind}_tokens")):
        own = getattr(prices, _PRICES[part], None)
        differs = own is not None and own != getattr(prices, _PRICES[whole], None)
        if differs and counts.get(whole) and getattr(usage, part) is None:
            return False
    return True


def _same_up_to(prices: Any) -> float:
    """The most input tokens with which a request costs what the shortest costs, for each of them."""
    # The prices of long requests count by one request's input. Where all together have no more, none of them is long.
    starts = [price.tiers[0].start for price in vars(prices).values() if getattr(price, "tiers", None)]
    return min(starts, default=math.inf)


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
