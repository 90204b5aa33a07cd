"""What the practice server tells of itself as OpenAI's organization: usage and costs of what it has answered, by day.

Invariant: every answer that has cost OpenAI something is in it once, whoever asked and whether they read it to its end.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from spryng_instrument.testing.answers import Json, Refusal

if TYPE_CHECKING:
    from spryng_instrument.testing import Exchange

DAY_S = 86_400
_ENDPOINTS = {"chat.completions": "completions", "completions": "completions", "responses": "completions"}
_ENDPOINTS |= {"embeddings": "embeddings"}
_OTHERS = ("images", "audio_speeches", "audio_transcriptions", "moderations", "decisions")
_FIELDS = ("project_id", "user_id", "api_key_id", "model", "batch", "service_tier", "line_item")
# US dollars for a million tokens: input, cached input, output. Source: https://platform.openai.com/docs/pricing
_PRICES = {
    "gpt-3.5-turbo": ("0.5", "0.5", "1.5"),
    "gpt-3.5-turbo-instruct": ("1.5", "1.5", "2"),
    "gpt-4": ("30", "30", "60"),
    "gpt-4-turbo": ("10", "10", "30"),
    "gpt-4o": ("2.5", "1.25", "10"),
    "gpt-4o-mini": ("0.15", "0.075", "0.6"),
    "gpt-4.1": ("2", "0.5", "8"),
    "gpt-4.1-mini": ("0.4", "0.1", "1.6"),
    "gpt-4.1-nano": ("0.1", "0.025", "0.4"),
    "gpt-5": ("1.25", "0.125", "10"),
    "gpt-5-mini": ("0.25", "0.025", "2"),
    "gpt-5-nano": ("0.05", "0.005", "0.4"),
    "o1": ("15", "7.5", "60"),
    "o3": ("2", "0.5", "8"),
    "o3-mini": ("1.1", "0.55", "4.4"),
    "o4-mini": ("1.1", "0.275", "4.4"),
    "text-embedding-ada-002": ("0.1", "0", "0"),
    "text-embedding-3-small": ("0.02", "0", "0"),
    "text-embedding-3-large": ("0.13", "0", "0"),
}


def organization(path: str, query: str, key: str, exchanges: Iterable[Exchange]) -> Json:
    """A page of one of the endpoints below /organization.

    Args:
        path: below /organization: "costs", "usage/completions".
        query: as in the URL.
        key: of who asks; only keys of administrators may.
    """
    kind = path.removeprefix("usage/")
    if path != "costs" and (kind == path or kind not in (*_ENDPOINTS.values(), *_OTHERS)):
        raise Refusal(404, f"Unknown request URL: GET /organization/{path}.", code="unknown_url")
    if not key.startswith("sk-admin-"):
        scope = "You have insufficient permissions for this operation. Missing scopes: api.usage.read."
        raise Refusal(403, f"{scope} The practice server takes keys that begin with sk-admin-.", code="missing_scope")
    asked = {name.removesuffix("[]"): values for name, values in parse_qs(query).items()}
    start = _number(asked, "start_time") // DAY_S * DAY_S
    end = _number(asked, "end_time", int(time.time()) + DAY_S)
    limit = _number(asked, "limit", 7, at_most=180 if path == "costs" else 31)
    at = _number(asked, "page", start)
    group_by, projects = asked.get("group_by", []), asked.get("project_ids")
    of_projects = [one for one in exchanges if projects is None or one.headers.get("openai-project") in projects]
    buckets = []
    for day in range(at, min(end, at + limit * DAY_S), DAY_S):
        answered = [one for one in of_projects if _is_charged(one) and one.time // DAY_S * DAY_S == day]
        found = _costs(answered, group_by) if path == "costs" else _usage(answered, kind, group_by)
        buckets.append({"object": "bucket", "start_time": day, "end_time": day + DAY_S, "results": list(found)})
    after = at + limit * DAY_S
    more = after < end
    return {"object": "page", "data": buckets, "has_more": more, "next_page": f"page_{after}" if more else None}


def _number(asked: Mapping[str, list[str]], name: str, default: int | None = None, at_most: int = 1 << 40) -> int:
    value = asked[name][0].removeprefix("page_") if name in asked else default
    if value is None or not str(value).isdecimal() or not 1 <= int(value) <= at_most:
        raise Refusal(400, f"'{name}' is {value!r}, not an integer from 1 to {at_most}.", name, "invalid_value")
    return int(value)


def _is_charged(exchange: Exchange) -> bool:
    """A stream that nobody read, or that was cut off, is charged for, too."""
    return exchange.status == 200 and exchange.usage is not None and exchange.endpoint in _ENDPOINTS


def _counts(exchange: Exchange) -> Counter[str]:
    usage = exchange.usage or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    counts = {
        "num_model_requests": 1,
        "input_tokens": usage.get("prompt_tokens", usage.get("input_tokens", 0)),
        "input_cached_tokens": details.get("cached_tokens", 0),
        "output_tokens": usage.get("completion_tokens", usage.get("output_tokens", 0)),
    }
    return Counter(counts)


def _usage(exchanges: list[Exchange], kind: str, group_by: list[str]) -> Iterator[Json]:
    by_model: dict[str | None, Counter[str]] = {}
    for exchange in exchanges:
        if _ENDPOINTS[exchange.endpoint] == kind:
            model = exchange.model if "model" in group_by else None
            by_model.setdefault(model, Counter()).update(_counts(exchange))
    for model, counts in by_model.items():
        batch = False if "batch" in group_by else None
        named = dict.fromkeys(_FIELDS[:-1]) | {"model": model, "batch": batch}
        told = (
            counts if kind == "completions" else {name: counts[name] for name in ("num_model_requests", "input_tokens")}
        )
        yield {"object": f"organization.usage.{kind}.result", **told, **named}


def _costs(exchanges: list[Exchange], group_by: list[str]) -> Iterator[Json]:
    by_item: dict[str | None, Decimal] = {}
    for exchange in exchanges:
        name = re.sub(r"[-:]\d{4}.*", "", exchange.model or "")
        counts = _counts(exchange)
        uncached = counts["input_tokens"] - counts["input_cached_tokens"]
        parts = {"input": uncached, "cached input": counts["input_cached_tokens"], "output": counts["output_tokens"]}
        for (part, count), price in zip(parts.items(), _PRICES.get(name, ("0", "0", "0")), strict=True):
            item = f"{exchange.model}, {part}" if "line_item" in group_by else None
            by_item[item] = by_item.get(item, Decimal(0)) + count * Decimal(price) / 1_000_000
    for item, amount in by_item.items():
        if amount:
            value = {"value": float(amount), "currency": "usd"}
            yield {"object": "organization.costs.result", "amount": value, "line_item": item, "project_id": None}
