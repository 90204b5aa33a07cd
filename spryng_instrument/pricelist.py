"""Prices of one's own, which come before the public ones: a discount, a fine-tuned model, machines of one's own.

    [[prices]]
    model = "ft:gpt-4o-mini*"     # a pattern; the first price in the file that fits a message is the one for it
    effective = 2026-01-01        # for messages from that day on, in UTC
    input = 0.30                  # US dollars for a million tokens
    cached = 0.15                 # of the input; default: as input
    output = 1.20

Invariant: what was used and has no price here is unknown, never free and never guessed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date, timezone
from decimal import Decimal, localcontext
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import msgspec

from spryng_instrument import toml
from spryng_instrument.errors import SettingsError
from spryng_instrument.message import Message, Usage
from spryng_instrument.store.base import EXACT

DEFAULT_FILE = ".spryng/prices.toml"
LARGEST, PLACES = 10**6, 12
"""US dollars for a million tokens, and their decimal places, at most."""
_MILLION = 1_000_000


def tier_of(message: Message) -> str:
    """The tier by which a message is charged: a batch, which reports none, by that of batches."""
    return "batch" if message.operation == "batches" else message.service_tier or "default"


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What tokens of a model cost, in US dollars for a million of them."""

    model: str
    """A pattern: "ft:gpt-4o-mini*". Of the answered model, or of the one asked for where none answered."""
    input: Decimal
    output: Decimal | None = None
    """None: for models that give none, as embeddings."""
    cached: Decimal | None = None
    """Of input that was read from the cache. None: as input."""
    cache_write: Decimal | None = None
    """Of input that was written to the cache. None: as input."""
    input_audio: Decimal | None = None
    """None: unknown, because audio costs many times what text costs."""
    output_audio: Decimal | None = None
    cached_audio: Decimal | None = None
    """Of audio that was read from the cache. None: unknown, as where it was not reported how much of that was audio."""
    input_image: Decimal | None = None
    """None: as input, which is how chat models charge it; models that make images charge more. With a price, input that
    does not say what of it was images is unknown."""
    output_image: Decimal | None = None
    """None: as output. With a price, output that does not say what of it was images is unknown."""
    cached_image: Decimal | None = None
    """Of images that were read from the cache, for models whose images have a price. None: unknown, likewise."""
    host: str = "*"
    """A pattern: where the calls go. Default: anywhere, and where it is not known."""
    service_tier: str = "default"
    """A pattern: "flex", "batch" or "*". Default: the standard one."""
    effective: date | None = None
    """The first day, in UTC. None: since ever."""

    def fits(self, message: Message) -> bool:
        """Whether it is for that message."""
        return (
            fnmatchcase(message.model or "", self.model)
            and fnmatchcase(message.host or "", self.host)
            and fnmatchcase(tier_of(message), self.service_tier)
            and (self.effective is None or message.timestamp.astimezone(timezone.utc).date() >= self.effective)
        )

    def cost_of(self, usage: Usage) -> Decimal | None:
        """US dollars, not rounded; None where something was used that has no price, or was not reported."""
        written, cached = usage.cache_write_tokens or 0, usage.cached_tokens or 0
        heard, said = usage.input_audio_tokens or 0, usage.output_audio_tokens or 0
        seen = 0 if self.input_image is None else usage.input_image_tokens
        drawn = 0 if self.output_image is None else usage.output_image_tokens
        if (seen is None and usage.input_tokens) or (drawn is None and usage.output_tokens):
            return None
        seen, drawn = seen or 0, drawn or 0
        heard_again = usage.cached_audio_tokens if heard and cached else 0
        seen_again = usage.cached_image_tokens if seen and cached else 0
        if heard_again is None or seen_again is None or ((heard or seen) and written):
            return None
        output = usage.output_tokens
        if output is None and (self.output is None or usage.total_tokens == usage.input_tokens):
            output = 0  # an embedding
        if usage.input_tokens is None or output is None:
            return None
        heard, seen, cached = heard - heard_again, seen - seen_again, cached - heard_again - seen_again
        parts = (
            (usage.input_tokens - cached - written - heard - heard_again - seen - seen_again, self.input),
            (cached, self.input if self.cached is None else self.cached),
            (written, self.input if self.cache_write is None else self.cache_write),
            (heard, self.input_audio),
            (heard_again, self.cached_audio),
            (seen, self.input_image),
            (seen_again, self.cached_image),
            (output - said - drawn, self.output),
            (said, self.output_audio),
            (drawn, self.output_image),
        )
        total = Decimal(0)
        with localcontext(EXACT):
            for tokens, price in parts:
                if tokens < 0 or (tokens and price is None):
                    return None
                total += tokens * (price or 0)
            return total / _MILLION


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prices: tuple[Price, ...]


@dataclass(frozen=True, slots=True)
class Pricelist:
    """The prices of a file."""

    prices: tuple[Price, ...] = ()
    version: str | None = None
    """"prices.toml 1f0a2b3c", another one for each text. None: there is no file."""

    def find(self, message: Message) -> Price | None:
        """The first price that fits."""
        return next((price for price in self.prices if price.fits(message)), None)


def pricelist() -> Pricelist:
    """The prices of SPRYNG_PRICES, or of DEFAULT_FILE if there is one. Read again when the file is another one.

    Raises:
        SettingsError: the file cannot be read, or something in it cannot be; the message has the file and the place.
        MissingExtraError: Python 3.10 needs a package to read it.
    """
    named = os.environ.get("SPRYNG_PRICES")
    path = named or DEFAULT_FILE
    try:
        found = os.stat(path)
    except OSError as exc:
        if named or not isinstance(exc, FileNotFoundError):
            raise SettingsError(f"the prices in {path} cannot be read: {exc.strerror}") from None
        return _NONE
    return _read(path, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=8)
def _read(path: str, *_: int) -> Pricelist:
    try:
        text = Path(path).read_text(encoding="utf-8")
        digest = sha256(text.encode()).hexdigest()[:8]
        prices = msgspec.convert(toml.read(text), _File).prices
        for number, price in enumerate(prices, 1):
            _check(f"prices[{number}], {price.model or 'no model'}: ", price)
    except (OSError, ValueError, msgspec.ValidationError) as exc:
        raise SettingsError(f"{path}: {exc}") from None
    return Pricelist(prices, f"{Path(path).name} {digest}")


def _check(where: str, price: Price) -> None:
    if not price.model:
        raise ValueError(f"{where}model={price.model!r} must be a pattern, as in gpt-4o*")
    for name in _AMOUNTS:
        value = getattr(price, name)
        if value is None:
            continue
        if not (value.is_finite() and 0 <= value <= LARGEST and value.as_tuple().exponent >= -PLACES):
            raise ValueError(
                f"{where}{name}={value} must be US dollars for a million tokens: from 0 to {LARGEST:,}, with at most "
                f"{PLACES} decimal places"
            )


_AMOUNTS = (
    "input", "output", "cached", "cache_write",
    "input_audio", "output_audio", "cached_audio", "input_image", "output_image", "cached_image",
)  # fmt: skip
_NONE = Pricelist()
