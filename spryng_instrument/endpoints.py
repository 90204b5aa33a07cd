"""A row per endpoint: which requests are messages, and how their replies and streams give usage. Pure functions.

Replies come as SDK objects of any version, as plain dicts or as bytes, and compatible servers send odd ones. What is
not there or makes no sense is read as None, "not reported"; nothing here raises on a reply, and nothing is estimated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from spryng_instrument.errors import UsageError
from spryng_instrument.message import Usage


class Endpoint(NamedTuple):
    """How one operation of the API is read."""

    operation: str
    stream_field: str
    """The field of a stream's chunk that holds what is wanted: the usage itself, or a whole response."""
    wants_stream_options: bool
    """Whether its streams report usage only when asked by stream_options.include_usage."""


_CHAT = Endpoint("chat.completions", "usage", True)
ENDPOINTS: dict[str, Endpoint] = {
    "/chat/completions": _CHAT,
    "/completions": Endpoint("completions", "usage", True),
    "/embeddings": Endpoint("embeddings", "usage", False),
    "/responses": Endpoint("responses", "response", False),
}
_OBJECTS = {
    "chat.completion": "chat.completions",
    "chat.completion.chunk": "chat.completions",
    "text_completion": "completions",
    "response": "responses",
    "list": "embeddings",
}
_PATH = re.compile(r"^(?:[a-z]+://[^/]*)?/?(?P<path>[^?#]*?)/?(?:[?#].*)?$", re.I)


def endpoint_of(method: str, url: str) -> Endpoint | None:
    """The endpoint of a request, or None if it is no message.

    Args:
        url: as the SDK holds it: a path below the base URL, or a whole URL; Azure's deployment paths too.
    """
    if method not in ("post", "POST", "Post"):
        return None
    found = ENDPOINTS.get(url)
    if found is not None:
        return found
    match = _PATH.match(url)
    segments = match["path"].split("/") if match else []
    for length in (2, 1):
        found = ENDPOINTS.get("/" + "/".join(segments[-length:]))
        if found is not None:
            return found
    return None


class Reading(msgspec.Struct, frozen=True, gc=False):
    """What a reply says of itself."""

    usage: Usage | None = None
    response_id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    failure: str | None = None
    """Why a reply that came with HTTP 200 is none: the code of its error."""


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
    response_id, model, tier = get("id"), get("model"), get("service_tier")
    return Reading(
        None if reported is None else usage_of(reported),
        response_id if type(response_id) is str and response_id else None,
        model if type(model) is str and model else None,
        tier if type(tier) is str else None,
        str(fields_of(get("error")).get("code") or "failed") if get("status") == "failed" else None,
    )


class Body(msgspec.Struct):
    """The few fields of a JSON body that are read; the rest, however long, is skipped unparsed."""

    id: Any = None
    model: Any = None
    usage: Any = None
    service_tier: Any = None
    status: Any = None
    error: Any = None

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


_body = msgspec.json.Decoder(Body)


def read_body(content: bytes) -> Reading:
    """What the bytes of a JSON reply say."""
    try:
        return read_fields(_body.decode(content).fields())
    except msgspec.MsgspecError:
        return read_reply(_lenient(content))
    except RecursionError:
        return NOTHING


def _lenient(content: bytes) -> object:
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
    if input_tokens is None:
        input_tokens = get("input_tokens")
    if output_tokens is None:
        output_tokens = get("output_tokens")
    if not given:
        given = get("input_tokens_details") or get("input_token_details")
    if not made:
        made = get("output_tokens_details") or get("output_token_details")
    given_get = _NO_FIELDS if given is None else fields_of(given).get
    made_get = _NO_FIELDS if made is None else fields_of(made).get
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
    )
    for count in counts:
        if count is not None and (type(count) is not int or not 0 <= count <= _MOST):
            counts = tuple(count if type(count) is int and 0 <= count <= _MOST else None for count in counts)
            break
    return None if counts == _NO_COUNTS else Usage(*counts)


_NO_COUNTS = (None,) * len(Usage.__struct_fields__)
_NO_FIELDS: Any = {}.get
_MOST = 10**12  # no model takes as many; sums of millions of such messages still fit 64 bits


_COUNTS = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens")
_DETAILS = {
    "prompt_tokens_details": True,
    "input_tokens_details": True,
    "completion_tokens_details": False,
    "output_tokens_details": False,
}


def checked_usage(reported: object) -> Usage:
    """The usage that a programmer hands over, by the chat or the responses names, in one form.

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
        if name in _DETAILS:
            for part, part_count in fields_of(count).items():
                _check_count(f"{name}.{part}", part_count)
        elif name in _COUNTS:
            _check_count(name, count)
        elif isinstance(reported, Mapping):
            raise UsageError(f"usage has no field {name!r}; it has: {', '.join((*_COUNTS, *_DETAILS))}")
    for one, other in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        if None not in (fields.get(one), fields.get(other)) and fields[one] != fields[other]:
            raise UsageError(f"usage: {one}={fields[one]} and {other}={fields[other]} contradict; give one of them")
    usage = usage_of(reported)
    if usage is None:
        raise UsageError(f"usage={reported!r}: holds no count; give one of: {', '.join(_COUNTS)}")
    parts = (usage.input_tokens or 0) + (usage.output_tokens or 0)
    if (
        usage.total_tokens is not None
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
    if count > _MOST:
        raise UsageError(f"usage: {name}={count} is too large; {_MOST} is the most that can be kept")


def operation_of(reply: object) -> str | None:
    """The operation that made a reply, by its `object` field."""
    return _OBJECTS.get(str(fields_of(reply).get("object")))


_TERMINAL = ("response.completed", "response.incomplete", "response.failed")


class Tally:
    """What the chunks of one stream have said so far. Cumulative usage is replaced, never summed."""

    __slots__ = ("_failure", "_first", "_last", "_told", "complete", "field", "told_all")

    def __init__(self, endpoint: Endpoint) -> None:
        self.field = endpoint.stream_field
        self.complete = False
        """Whether the answer has come to its end: who stops reading now has left nothing out."""
        self.told_all = False
        """Whether nothing that is recorded can follow."""
        self._first: Mapping[str, Any] | None = None
        self._last: Mapping[str, Any] | None = None
        self._told: Mapping[str, Any] | None = None
        self._failure: str | None = None

    @property
    def may_end(self) -> bool:
        """Whether a stream that ends here is whole. Responses say so by their last event; the others just end."""
        return self.complete or self.field != "response"

    def see(self, chunk: object) -> bool:
        """Take in a chunk; tells whether it carries a generated token."""
        fields = fields_of(chunk)
        if "event" in fields and type(fields.get("data")) is dict:
            fields = fields["data"]  # older SDKs wrap events that have a name
        if self._first is None:
            self._first = fields
        self._last = fields
        told = fields.get(self.field)
        if told is not None:
            self._told = fields
        if self.field == "response":
            kind = fields.get("type")
            if told is not None and kind in _TERMINAL:
                self.complete = self.told_all = True
            elif kind == "error":
                self._failure = str(fields.get("code") or "failed")
            return type(kind) is str and kind.endswith(".delta")
        choices = fields.get("choices")
        if type(choices) is not list:
            return False
        if told is not None and not choices:
            self.told_all = self.complete  # before the finish, it is one of several cumulative reports
        elif len(choices) == 1 and fields_of(choices[0]).get("finish_reason"):
            self.complete = True
        return any(_is_token(fields_of(choice)) for choice in choices)

    def reading(self) -> Reading:
        """What the stream said in all."""
        told = self._told
        if self.field == "response":
            reading = read_reply(told.get("response")) if told is not None else NOTHING
            return reading if self._failure is None else msgspec.structs.replace(reading, failure=self._failure)
        readings = [read_fields(fields) for fields in (told, self._last, self._first) if fields is not None]
        if not readings:
            return NOTHING
        return Reading(
            readings[0].usage if told is not None else None,
            next((reading.response_id for reading in readings if reading.response_id is not None), None),
            next((reading.model for reading in readings if reading.model is not None), None),
            next((reading.service_tier for reading in readings if reading.service_tier is not None), None),
        )


def _is_token(choice: Mapping[str, Any]) -> bool:
    if choice.get("text"):
        return True
    delta = fields_of(choice.get("delta"))
    return any(value for name, value in delta.items() if name != "role" and name[0] != "_")


def is_usage_chunk(chunk: object) -> bool:
    """Whether a chunk is the one that include_usage adds: no choices, only usage."""
    fields = fields_of(chunk)
    return fields.get("choices") == [] and fields.get("usage") is not None


def finishes(chunk: object) -> bool:
    """Whether a stream of one choice ends with this chunk, but for its usage."""
    choices = fields_of(chunk).get("choices")
    return type(choices) is list and len(choices) == 1 and bool(fields_of(choices[0]).get("finish_reason"))


def forget_usage(chunk: Any) -> None:
    """Have a chunk look as if nobody had asked for usage: its `"usage": null` is our doing, not the caller's."""
    if fields_of(chunk).get("usage", 0) is not None:
        return
    for name in ("__pydantic_fields_set__", "__fields_set__"):  # pydantic 2, pydantic 1
        fields_set = getattr(chunk, name, None)
        if type(fields_set) is set:
            fields_set.discard("usage")
            return


class SseLines:
    """The data of server-sent events out of bytes that are cut anywhere."""

    __slots__ = ("_after_cr", "_data", "_rest", "done")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._after_cr = False
        self.done = False
        """Whether the stream has said that it is at its end; the SDK reads nothing after that."""

    def feed(self, content: bytes) -> list[dict[str, Any]]:
        """The JSON objects that *content* completes."""
        if not content:
            return []
        if self._after_cr and content[0] == 10:
            content = content[1:]
        self._after_cr = content.endswith(b"\r")
        *lines, self._rest = (self._rest + content).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        found = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif not line and self._data:
                whole, self._data = b"\n".join(self._data), []
                try:
                    data = msgspec.json.decode(whole)
                except (msgspec.MsgspecError, RecursionError):
                    self.done = self.done or whole.lstrip().startswith(b"[DONE]")
                    data = _lenient(whole)
                if type(data) is dict and not self.done:
                    found.append(data)
        return found
