"""Reads usage out of replies: SDK objects of any version, plain dicts or bytes. Pure functions.

Compatible servers send odd replies. What is not there or makes no sense is read as None, "not reported"; nothing here
raises on a reply, and nothing is estimated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from spryng_instrument.errors import UsageError
from spryng_instrument.message import Usage


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What a reply says of itself."""

    usage: Usage | None = None
    response_id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    failure: str | None = None
    """Why a reply that came with HTTP 200 is none: the code of its error."""
    tool_usage: dict[str, Any] | None = None
    """Use of the API's own tools, as reported."""
    status: str | None = None
    """Where the work stands, for an answer that is made in the background."""


NOTHING = Reading()


def fields_of(value: Any) -> Mapping[str, Any]:
    """The fields of an SDK object or dict, those that its SDK does not know yet included; {} for anything else."""
    try:
        extra = value.__pydantic_extra__  # where pydantic 2 keeps them; None for most objects
    except AttributeError:
        if type(value) is dict or isinstance(value, Mapping):
            return value
        return getattr(value, "__dict__", None) or {}
    fields: dict[str, Any] = value.__dict__
    return {**fields, **extra} if extra else fields


def read_reply(reply: object) -> Reading:
    """What a whole reply says: an SDK object or a dict."""
    return read_fields(fields_of(reply))


def read_fields(fields: Mapping[str, Any]) -> Reading:
    """The same of the fields of a reply."""
    get = fields.get
    reported = get("usage")
    response_id, model, tier, status = get("id"), get("model"), get("service_tier"), get("status")
    tools, svg = get("tool_usage"), get("svg_usage")
    if svg is not None:  # of an image that a language model has drawn
        tools = {"svg": svg}
        if reported is None:
            reported, model = svg, fields_of(svg).get("model")
    return Reading(
        None if reported is None else usage_of(reported),
        response_id if type(response_id) is str and response_id else None,
        model if type(model) is str and model else None,
        tier if type(tier) is str else None,
        None if status != "failed" else _code_of(get("error")) or _code_of(get("last_error")) or "failed",
        None if tools is None else _plain(tools),
        status if type(status) is str else None,
    )


def _code_of(error: object) -> str | None:
    code = fields_of(error).get("code")
    return None if code is None else str(code)


def _plain(value: Any) -> Any:
    """An SDK object as the JSON that it came from, without what was null or not there."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {str(name): _plain(item) for name, item in fields_of(value).items() if item is not None} or None


class Body(msgspec.Struct):
    """The few fields of a JSON body that are read; the rest, however long, is skipped unparsed."""

    id: Any = None
    model: Any = None
    usage: Any = None
    service_tier: Any = None
    status: Any = None
    error: Any = None
    last_error: Any = None
    tool_usage: Any = None
    svg_usage: Any = None

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


_body = msgspec.json.Decoder(Body)


def read_body(content: bytes) -> Reading:
    """What the bytes of a JSON reply say."""
    try:
        return read_fields(_body.decode(content).fields())
    except msgspec.MsgspecError:
        return read_reply(lenient(content))
    except RecursionError:
        return NOTHING


def lenient(content: bytes) -> object:
    """What the SDK's own parser makes of JSON that is not quite: NaN, lone surrogates, counts of 30 digits."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def usage_of(reported: object) -> Usage | None:
    """The usage that a reply reports, by the names of any endpoint, in one form. None if it holds no count at all."""
    get = fields_of(reported).get
    input_tokens, output_tokens = get("prompt_tokens"), get("completion_tokens")
    given, made = get("prompt_tokens_details"), get("completion_tokens_details")
    if not input_tokens:  # a gateway that gives both names may leave zero under one
        input_tokens = input_tokens if (other := get("input_tokens")) is None else other
    if not output_tokens:
        output_tokens = output_tokens if (other := get("output_tokens")) is None else other
    if not given:
        given = get("input_tokens_details") or get("input_token_details")
    if not made:
        made = get("output_tokens_details") or get("output_token_details")
    given_get = _NO_FIELDS if given is None else fields_of(given).get
    made_get = _NO_FIELDS if made is None else fields_of(made).get
    cached = given_get(CACHED)
    cached_get = _NO_FIELDS if cached is None else fields_of(cached).get
    counts: tuple[Any, ...] = (
        input_tokens,
        output_tokens,
        get("total_tokens"),
        given_get("cached_tokens"),
        given_get("cache_write_tokens"),
        made_get("reasoning_tokens"),
        given_get("audio_tokens"),
        made_get("audio_tokens"),
        given_get("image_tokens"),
        made_get("image_tokens"),
        cached_get("audio_tokens"),
        cached_get("image_tokens"),
    )
    seconds = get("seconds")
    if seconds is not None:
        seconds = seconds if type(seconds) in (int, float) and 0 <= seconds <= MOST else None
    for count in counts:
        if count is not None and (type(count) is not int or not 0 <= count <= MOST):
            counts = tuple(map(_count, counts))
            break
    return None if seconds is None and counts == _NO_COUNTS else Usage(*(*counts, seconds))


def _count(value: object) -> int | None:
    """A count that is not written as one, as the SDK reads it: 9.0 and "9" are 9. None: it makes no sense."""
    if (isinstance(value, float) and value.is_integer()) or (
        isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20
    ):
        value = int(value)
    return value if type(value) is int and 0 <= value <= MOST else None


_NO_COUNTS = (None,) * (len(Usage.__struct_fields__) - 1)
_NO_FIELDS: Any = {}.get
CACHED = "cached_tokens_details"
"""Among the details of the input: those of what of it was cached."""
MOST = 10**12
"""The largest count that is kept: no model takes as many, and sums of millions of them still fit 64 bits."""


COUNTS = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens")
DETAILS = {
    "prompt_tokens_details": True,
    "input_tokens_details": True,
    "completion_tokens_details": False,
    "output_tokens_details": False,
}


def checked_usage(reported: object, *, any_total: bool = False) -> Usage:
    """The usage that a programmer hands over, by the chat or the responses names, in one form.

    Args:
        reported: the counts by name.
        any_total: whether a total is taken that does not add up: the examples of the published clients have one.

    Raises:
        UsageError: a field is unknown, negative or no whole number, two names contradict, or the total does not add up.
    """
    fields = fields_of(reported)
    if not fields:
        raise UsageError(
            f"usage={reported!r}: give the counts by name, as in "
            '{"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}'
        )
    for name, count in fields.items():
        if name in DETAILS:
            for part, part_count in fields_of(count).items():
                if part == CACHED:
                    for inner, inner_count in fields_of(part_count).items():
                        _check_count(f"{name}.{part}.{inner}", inner_count)
                else:
                    _check_count(f"{name}.{part}", part_count)
        elif name in COUNTS:
            _check_count(name, count)
        elif isinstance(reported, Mapping):
            raise UsageError(f"usage has no field {name!r}; it has: {', '.join((*COUNTS, *DETAILS))}")
    for one, other in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        if None not in (fields.get(one), fields.get(other)) and fields[one] != fields[other]:
            raise UsageError(f"usage: {one}={fields[one]} and {other}={fields[other]} contradict; give one of them")
    usage = usage_of(reported)
    if usage is None:
        raise UsageError(f"usage={reported!r}: holds no count; give one of: {', '.join(COUNTS)}")
    parts = (usage.input_tokens or 0) + (usage.output_tokens or 0)
    if (
        not any_total
        and usage.total_tokens is not None
        and usage.total_tokens != parts
        and (usage.input_tokens is not None or usage.output_tokens is not None)
    ):
        names = (
            ("prompt_tokens", "completion_tokens") if "prompt_tokens" in fields else ("input_tokens", "output_tokens")
        )
        raise UsageError(
            f"usage: total_tokens={usage.total_tokens} is not {names[0]}={usage.input_tokens} "
            f"+ {names[1]}={usage.output_tokens}; correct it or leave total_tokens out"
        )
    return usage


def _check_count(name: str, count: object) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise UsageError(f"usage: {name}={count!r} must be a whole number, not {type(count).__name__}")
    if count < 0:
        raise UsageError(f"usage: {name}={count} must not be negative")
    if count > MOST:
        raise UsageError(f"usage: {name}={count} is too large; {MOST} is the most that can be kept")
