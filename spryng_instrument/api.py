"""The Track Usage API's JSON: what a server takes and what delivers to one; a message goes both ways unchanged.

Its first fields are the seed's own, by the seed's names. The others are what a process of ours knows of a call; what
such a process says (it names itself as `writer`) was checked when it was recorded, and is taken as it is, or not
at all: a field that is unknown here comes of a newer version, and waits there until this one is updated. What anybody
else says is checked here: a field that is unknown, or cannot be true, is refused with its name and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from types import NoneType
from typing import Any

import msgspec

from spryng_instrument.endpoints import operation_of
from spryng_instrument.errors import ApiError, NewerError, UsageError
from spryng_instrument.message import Message, Status, Usage, decode, encode, new_id
from spryng_instrument.usage import DETAILS, MOST, checked_usage, read_reply

MAX_TEXT = 255
"""Characters of a key, a conversation id, a tag, a message id or a model."""
MAX_TAGS = 1_000
MAX_PROPERTIES = 1_000
MAX_DEPTH = 100
"""Levels of toolUsage."""
MAX_MESSAGES = 1_000
"""Messages a batch."""
MAX_BYTES = 5_000_000
"""Bytes of a request's body, also once it is decompressed."""
EARLIEST = datetime(1970, 1, 1, tzinfo=timezone.utc)
"""No message is older: further back, there are times that other zones have no year for."""
FUTURE = timedelta(minutes=5)
"""How far a timestamp may be ahead of the server's clock."""
_NEWER = "is of a newer version of spryng_instrument than the server's. Update the server; the message waits until then"
NO_KEY = "(no key)"
"""The key of a message without one, for a server that wants one."""

Scalar = str | int | float | bool | None


class TrackUsage(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """One message as it is sent."""

    key: str | msgspec.UnsetType | None = msgspec.UNSET
    """Whose usage it is. Required; null only from a process of ours, for a call outside any usage_context."""
    user: str | None = None
    """The same as key, as spryngtime-analytics-sdk calls it."""
    query: str | None = None
    """What the customer asked."""
    tags: tuple[str, ...] | None = None
    conversation_id: str | None = None
    """Relates many messages to one conversation."""
    open_ai_response: dict[str, Any] | None = None
    """A chat completion, completion, embedding or response of OpenAI: its model, id and usage are taken from it."""
    usage: dict[str, Any] | None = None
    """Tokens: prompt_tokens, completion_tokens, total_tokens, or input_tokens and output_tokens."""
    message_id: str | None = None
    """Unique to the message: sent again with the same, it is recorded once. Default: a new one."""
    timestamp: datetime | None = None
    """When it happened, with its zone (RFC 3339). Default: now."""
    latency: float | None = None
    """Milliseconds."""
    model: str | None = None
    """The model that answered. Default: the response's."""
    custom_properties: dict[str, Scalar] | None = None
    operation: str | None = None
    status: Status = "ok"
    request_model: str | None = None
    response_id: str | None = None
    request_id: str | None = None
    retries: int | None = None
    service_tier: str | None = None
    host: str | None = None
    streamed: bool = False
    error: str | None = None
    http_status: int | None = None
    time_to_first_token: float | None = None
    """Milliseconds."""
    call_site: str | None = None
    writer: str | None = None
    """The process of spryng_instrument that recorded it."""
    sequence: int | None = None
    """Number of the message within its writer."""
    tool_usage: dict[str, Any] | None = None


_RENAMED = {
    "latency": "latency_ms",
    "time_to_first_token": "time_to_first_token_ms",
    "custom_properties": "properties",
    "message_id": "id",
    "model": "response_model",
}
"""Fields that a Message calls otherwise."""
_SAME = tuple(
    name for name in TrackUsage.__struct_fields__ if name in Message.__struct_fields__ and name not in _RENAMED
)
_decoder = msgspec.json.Decoder(TrackUsage)


def wire_of(message: Message) -> TrackUsage:
    """A message as it is sent to a server of ours: nothing is lost."""
    fields = {name: getattr(message, name) for name in _SAME if name not in ("usage", "tags")}
    fields |= {ours: getattr(message, theirs) for ours, theirs in _RENAMED.items()}
    usage = None if message.usage is None else msgspec.to_builtins(message.usage)
    return TrackUsage(**fields, usage=usage, tags=message.tags or None)


def seed_of(message: Message) -> TrackUsage:
    """A message as any server takes it that speaks the seed's API: usage by the seed's names, and always a key."""
    usage = message.usage
    counts = None
    if usage is not None and (usage.input_tokens is not None or usage.output_tokens is not None):
        given, made = usage.input_tokens or 0, usage.output_tokens or 0
        counts = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
    return TrackUsage(
        key=NO_KEY if message.key is None else message.key,
        query=message.query,
        tags=message.tags or None,
        conversation_id=message.conversation_id,
        usage=counts,
        message_id=message.id,
        timestamp=message.timestamp,
        latency=message.latency_ms,
        model=message.model,
        custom_properties=message.properties,
    )


def message_of(raw: bytes | msgspec.Raw, now: datetime) -> tuple[Message, bool]:
    """The message of one item of JSON, and whether its time is its own, not the server's.

    Raises:
        ApiError: it is none, or cannot be true; the error names the field and its value.
        NewerError: it would lose a field.
    """
    try:
        return _message_of(raw, now)
    except RecursionError:
        raise ApiError("body", None, "is nested too deeply") from None


def _message_of(raw: bytes | msgspec.Raw, now: datetime) -> tuple[Message, bool]:
    sent = _decoded(raw)
    ours = sent.writer is not None
    key = _key(sent, ours)
    reading = read_reply(sent.open_ai_response)
    usage = _usage(sent, ours) or reading.usage
    operation = sent.operation or operation_of(sent.open_ai_response)
    if sent.open_ai_response is not None and operation is None and reading.usage is None:
        raise ApiError("openAiResponse", sent.open_ai_response, "has neither a known `object` nor a usage")
    _check(sent, reading.model if sent.model is None else sent.model, now)
    fields: dict[str, Any] = {name: getattr(sent, name) for name in _SAME}
    fields |= {theirs: getattr(sent, ours) for ours, theirs in _RENAMED.items()}
    fields["id"] = sent.message_id or new_id()
    fields["timestamp"] = now if sent.timestamp is None else sent.timestamp.astimezone(timezone.utc)
    fields["operation"] = operation or "custom"
    fields["key"] = key
    fields["tags"] = tuple(dict.fromkeys(sent.tags or ()))
    fields["properties"] = sent.custom_properties or None
    fields["usage"] = usage
    for name, said in (
        ("response_model", reading.model), ("response_id", reading.response_id),
        ("service_tier", reading.service_tier), ("tool_usage", reading.tool_usage),
    ):  # fmt: skip
        if fields[name] is None:
            fields[name] = said
    if not _is_shallow(fields["tool_usage"], MAX_DEPTH):
        raise ApiError("toolUsage", None, f"is nested more than {MAX_DEPTH} levels deep")
    message = Message(**fields)
    if b"\\u0000" in memoryview(raw).tobytes():
        message = decode(encode(message))  # which escapes it
    return message, sent.timestamp is not None


def _decoded(raw: bytes | msgspec.Raw) -> TrackUsage:
    try:
        return _decoder.decode(raw)
    except msgspec.ValidationError as exc:
        what, _, path = str(exc).partition(" - at `$")
        path = path.rstrip("`")
        field = path.lstrip(".") or "body"
        if what.startswith("Object contains unknown field"):
            field = what.split("`")[1]
            if isinstance(_value_at(raw, ["writer"]), str):
                raise NewerError(field, _value_at(raw, [field]), _NEWER) from None
            raise ApiError(field, _value_at(raw, [field]), f"is no field; there are: {', '.join(FIELDS)}") from None
        raise ApiError(field, _value_at(raw, path.replace("[", ".[").split(".")), what) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ApiError("body", None, f"is not JSON that can be read: {exc}") from None


FIELDS = tuple(
    msgspec.structs.fields(TrackUsage)[index].encode_name for index in range(len(TrackUsage.__struct_fields__))
)
"""The names of all fields on the wire."""


def _value_at(raw: bytes | msgspec.Raw, path: list[str]) -> Any:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):  # beyond where its first mistake is
        return None
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.strip("[]").isdigit() and int(part.strip("[]")) < len(value):
            value = value[int(part.strip("[]"))]
    return value


def _key(sent: TrackUsage, ours: bool) -> str | None:
    key = sent.key
    if key is msgspec.UNSET or key is None:
        key = sent.user
    elif sent.user is not None and sent.user != key:
        raise ApiError("user", sent.user, f"contradicts key={key!r}; give one of them")
    if key is None and not (ours and sent.key is None):
        raise ApiError("key", None, "is required: whose usage is it?")
    return key


def _usage(sent: TrackUsage, ours: bool) -> Usage | None:
    if sent.usage is None:
        return None
    if not ours:
        for name in DETAILS:
            if not isinstance(sent.usage.get(name), (dict, NoneType)):
                raise ApiError(f"usage.{name}", sent.usage[name], "must be an object of counts")
        try:
            return checked_usage(sent.usage, any_total=True)
        except UsageError as exc:
            raise ApiError("usage", sent.usage, str(exc)) from None
    unknown = sorted(sent.usage.keys() - Usage.__struct_fields__)
    if unknown:
        raise NewerError(f"usage.{unknown[0]}", sent.usage[unknown[0]], _NEWER)
    try:
        usage = msgspec.convert(sent.usage, Usage)
    except msgspec.ValidationError as exc:
        raise ApiError("usage", sent.usage, str(exc)) from None
    for name in Usage.__struct_fields__:
        count = getattr(usage, name)
        if count is not None and not 0 <= count <= MOST:
            raise ApiError(f"usage.{name}", count, f"must be between 0 and {MOST}")
    return usage


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether no list or object in *value* is more than so many levels down: what is kept must be readable again."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return True
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in value)


def _check(sent: TrackUsage, model: str | None, now: datetime) -> None:
    texts = {
        "key": sent.key or None, "user": sent.user, "conversationId": sent.conversation_id,
        "messageId": sent.message_id, "writer": sent.writer,
        **({} if sent.writer else {"model": model, "requestModel": sent.request_model, "operation": sent.operation}),
        **{f"tags[{index}]": tag for index, tag in enumerate(sent.tags or ())},
    }  # fmt: skip
    for name, text in texts.items():
        if text is not None and (not text.strip() or len(text) > MAX_TEXT):
            raise ApiError(name, text, f"must have 1 to {MAX_TEXT} characters, not {len(text)} or only blanks")
    if sent.message_id is not None and (" " in sent.message_id or not sent.message_id.isprintable()):
        raise ApiError("messageId", sent.message_id, "must have no blanks and no control characters")
    if sent.key == "":
        raise ApiError("key", "", "must not be empty")
    if len(sent.tags or ()) > MAX_TAGS:
        raise ApiError("tags", len(sent.tags or ()), f"are too many; {MAX_TAGS} are allowed")
    if len(sent.custom_properties or ()) > MAX_PROPERTIES:
        raise ApiError("customProperties", len(sent.custom_properties or ()), f"are too many; {MAX_PROPERTIES} are")
    for name, number in (
        ("latency", sent.latency), ("timeToFirstToken", sent.time_to_first_token), ("retries", sent.retries),
        ("httpStatus", sent.http_status), ("sequence", sent.sequence),
    ):  # fmt: skip
        if number is not None and not 0 <= number <= MOST:
            raise ApiError(name, number, f"must be between 0 and {MOST}")
    if sent.timestamp is not None:
        if sent.timestamp.tzinfo is None:
            raise ApiError("timestamp", sent.timestamp.isoformat(), "has no zone; end it with Z or as in +01:00")
        if sent.timestamp < EARLIEST:
            raise ApiError("timestamp", sent.timestamp.isoformat(), f"is before {EARLIEST.isoformat()}")
        if sent.timestamp > now + FUTURE:
            raise ApiError("timestamp", sent.timestamp.isoformat(), f"is in the future; it is {now.isoformat()} here")


def body_of(messages: list[TrackUsage]) -> bytes:
    """The body of a batch."""
    return msgspec.json.encode({"messages": messages})


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    """Many messages in one request."""

    messages: list[msgspec.Raw]


class Result(msgspec.Struct, omit_defaults=True):
    """What became of one message."""

    id: str | None
    """The message's id. None: it could not be read."""
    status: str
    """"recorded"; "duplicate": it was there already, the same; "conflict": another one with this id was there, and is
    kept; "refused": it cannot be taken as it is, and `error` says why."""
    error: str | None = None


class Results(msgspec.Struct):
    """What became of the messages of a batch, in their order."""

    results: list[Result]
