"""Message and Usage: the one contract that capture, journal, stores and reports share.

A message is one API request of a customer. It is made once, with its id, and never changed after. Counts are the
API's own: None says "not reported", 0 says "reported as zero"; nothing here is estimated.
"""

from __future__ import annotations

import os
import struct
from datetime import datetime
from itertools import count
from time import time_ns
from typing import Any, Literal

import msgspec

from spryng_instrument.checks import exact_text

Status = Literal["ok", "error", "incomplete", "cancelled"]
"""ok: answered. error: failed. incomplete: a stream that was left before its end. cancelled: by the caller's task.

Only ok and incomplete count as messages to bill."""

BILLABLE: tuple[Status, ...] = ("ok", "incomplete")


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Token counts of one call as the API reported them, in one form for every endpoint."""

    input_tokens: int | None = None
    """All input, cached and audio included."""
    output_tokens: int | None = None
    """All output, reasoning and audio included."""
    total_tokens: int | None = None
    """The total that the API reported; never computed."""
    cached_tokens: int | None = None
    """Part of the input that was read from the provider's cache."""
    cache_write_tokens: int | None = None
    """Part of the input that was written to the provider's cache."""
    reasoning_tokens: int | None = None
    """Part of the output that was spent on reasoning."""
    input_audio_tokens: int | None = None
    """Part of the input that was audio."""
    output_audio_tokens: int | None = None
    """Part of the output that was audio."""
    input_image_tokens: int | None = None
    """Part of the input that was images."""
    output_image_tokens: int | None = None
    """Part of the output that was images."""
    cached_audio_tokens: int | None = None
    """Part of the cached input that was audio."""
    cached_image_tokens: int | None = None
    """Part of the cached input that was images."""
    seconds: float | None = None
    """Seconds of audio, where the API counts those."""


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tracked API request."""

    id: str
    """UUIDv7, made when the call started. Every hop after that deduplicates by it."""
    timestamp: datetime
    """When the call started, UTC."""
    operation: str
    """"chat.completions", "completions", "embeddings", "responses", or what track_usage() was told."""
    status: Status = "ok"
    key: str | None = None
    """The customer. None: the call was made outside any usage_context."""
    conversation_id: str | None = None
    tags: tuple[str, ...] = ()
    query: str | None = None
    """What the customer asked, if that was to be recorded."""
    properties: dict[str, str | int | float | bool | None] | None = None
    request_model: str | None = None
    """The model asked for."""
    response_model: str | None = None
    """The model that answered, as the API names it."""
    response_id: str | None = None
    """The API's id of its answer, "chatcmpl-..." or "resp_..."."""
    request_id: str | None = None
    """The x-request-id header of the answer."""
    retries: int | None = None
    """How often the SDK sent the request again. None: it did not say."""
    service_tier: str | None = None
    host: str | None = None
    """Host and, if unusual, port that the request went to."""
    streamed: bool = False
    error: str | None = None
    """Name of the exception of a failed call."""
    http_status: int | None = None
    """HTTP status of a failed call."""
    latency_ms: float | None = None
    """From the start of the call to the end of its reply or stream."""
    time_to_first_token_ms: float | None = None
    """From the start of the call to the first generated token of its stream."""
    usage: Usage | None = None
    """None: the API reported no usage."""
    call_site: str | None = None
    """For a message without a key: "file.py:12", the line that made the call."""
    writer: str | None = None
    """The process that recorded the message (random, new after a fork)."""
    sequence: int | None = None
    """Number of the message within its writer, from 1 without gaps: a gap in the ledger is a proven loss."""
    tool_usage: dict[str, Any] | None = None
    """Use of the API's own tools, web searches and images for example, as the API reported it."""

    @property
    def model(self) -> str | None:
        """The model that answered, or else the one asked for."""
        return self.response_model or self.request_model


def _seed_ids() -> None:
    """74 random bits for this process, the last 48 of which count up from there."""
    global _id_format, _id_numbers
    a, b, start = struct.unpack(">HH6s", os.urandom(10))
    _id_format = f"%08x-%04x-7{a & 0xFFF:03x}-{b & 0x3FFF | 0x8000:04x}-%012x"
    _id_numbers = count(int.from_bytes(start, "big"))


_id_format = ""
_id_numbers = count()
_seed_ids()
os.register_at_fork(after_in_child=_seed_ids)  # or parent and child would make the same ids


def new_id(ns: int | None = None) -> str:
    """A UUIDv7 (RFC 9562): it sorts by the millisecond, and no other process makes it.

    Args:
        ns: nanoseconds since 1970 of what it names; default: now.
    """
    ms = (time_ns() if ns is None else ns) // 1_000_000
    return _id_format % (ms >> 16, ms & 0xFFFF, next(_id_numbers) & 0xFFFF_FFFF_FFFF)


def _exact(value: object) -> object:
    """What msgspec does not know, as JSON has it: subclasses of text and floats, and the text of anything else."""
    return float.__float__(value) if isinstance(value, float) else exact_text(value)


_encoder = msgspec.json.Encoder(enc_hook=_exact)
_decoder = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """One line of JSON, without its line feed. Text that is no valid Unicode is escaped, never a reason to lose it.

    So is NUL, which not every engine can keep.
    """
    try:
        line = _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_valid_text(message))
    return _encoder.encode(_valid_text(message)) if b"\\u0000" in line else line


def decode(line: bytes) -> Message:
    """The message of one line of JSON.

    Raises:
        msgspec.MsgspecError: the line is no message.
    """
    return _decoder.decode(line)


def _valid_text(message: Message) -> Message:
    def valid(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
        if isinstance(value, (tuple, list)):
            return type(value)(valid(item) for item in value)
        if isinstance(value, dict):
            return {valid(name): valid(item) for name, item in value.items()}
        return value

    return Message(**{name: valid(getattr(message, name)) for name in Message.__struct_fields__})
