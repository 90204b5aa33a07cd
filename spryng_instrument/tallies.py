"""What the chunks of one stream have said, for each family of streams. Pure functions and small state.

Cumulative usage is replaced, never summed. Odd chunks of compatible servers are read as far as they make sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from spryng_instrument.usage import NOTHING, Reading, fields_of, lenient, read_fields


class Tally:
    """The streams of chat completions and completions: chunks with choices, and with usage when that was asked for."""

    __slots__ = ("_finished", "_first", "_last", "_told", "choices", "complete", "told_all")

    plain_field: str | None = None
    """A field that only chunks have in which nothing else than text is of interest."""

    def __init__(self) -> None:
        self.choices = 1
        """How many were asked for: each finishes by itself."""
        self.complete = False
        """Whether the answer has come to its end: who stops reading now has left nothing out."""
        self.told_all = False
        """Whether nothing that is recorded can follow."""
        self._finished: set[object] = set()
        self._first: Mapping[str, Any] | None = None
        self._last: Mapping[str, Any] | None = None
        self._told: Mapping[str, Any] | None = None

    @property
    def may_end(self) -> bool:
        """Whether a stream that ends here is whole. These just end; those of events say so by their last."""
        return True

    def see(self, chunk: object) -> bool:
        """Take in a chunk; tells whether it carries a generated token."""
        fields = fields_of(chunk)
        if "event" in fields:  # assistants' streams, and events with a name in older SDKs, have the rest in `data`
            fields = fields_of(fields.get("data")) or fields
        return self._see(fields)

    def _see(self, fields: Mapping[str, Any]) -> bool:
        if self._first is None:
            self._first = fields
        self._last = fields
        told = fields.get("usage") is not None
        if told:
            self._told = fields
        choices = fields.get("choices")
        if type(choices) is not list:
            return False
        if told and not choices:
            self.told_all = self.complete  # before the finish, it is one of several cumulative reports
        else:
            self._finished.update(_finishing(choices))
            self.complete = len(self._finished) >= self.choices
        return any(_is_token(fields_of(choice)) for choice in choices)

    def reading(self) -> Reading:
        """What the stream said in all."""
        readings = [read_fields(fields) for fields in (self._told, self._last, self._first) if fields is not None]
        if not readings:
            return NOTHING
        return Reading(
            readings[0].usage if self._told is not None else None,
            next((reading.response_id for reading in readings if reading.response_id is not None), None),
            next((reading.model for reading in readings if reading.model is not None), None),
            next((reading.service_tier for reading in readings if reading.service_tier is not None), None),
        )


class EventTally(Tally):
    """Streams of events with a type, the last of which tells all: images, transcriptions, speech."""

    __slots__ = ("_failure",)

    last_events: tuple[str, ...] = (
        "image_generation.completed",
        "image_edit.completed",
        "transcript.text.done",
        "speech.audio.done",
    )
    """The events with which an answer ends."""

    def __init__(self) -> None:
        super().__init__()
        self._failure: str | None = None

    @property
    def may_end(self) -> bool:
        return self.complete

    def _answer(self, fields: Mapping[str, Any]) -> Any:
        """The answer as far as it is made, where an event has it."""
        return fields if fields.get("type") in self.last_events else None

    def _see(self, fields: Mapping[str, Any]) -> bool:
        answer = self._answer(fields)
        if answer is not None:
            self._told = fields_of(answer)
        kind = fields.get("type")
        if answer is not None and kind in self.last_events:
            self.complete = self.told_all = True
        elif kind == "error":
            self._failure = str(fields.get("code") or "failed")
        return type(kind) is str and kind.endswith(".delta")

    def reading(self) -> Reading:
        reading = NOTHING if self._told is None else read_fields(self._told)
        return reading if self._failure is None else msgspec.structs.replace(reading, failure=self._failure)


class ResponseTally(EventTally):
    """The streams of responses: some events hold the response as far as it is made."""

    __slots__ = ()

    plain_field = "item_id"  # the deltas, of which most of these streams consist
    last_events: tuple[str, ...] = ("response.completed", "response.incomplete", "response.failed")

    def _answer(self, fields: Mapping[str, Any]) -> Any:
        return fields.get("response")

    def reading(self) -> Reading:
        reading = super().reading()
        if self._told is not None and self._told.get("background") is True:
            return reading  # it goes on without this stream
        return msgspec.structs.replace(reading, status=None)


class RunTally(EventTally):
    """The streams of assistants' runs: some events hold the run. A run that requires action is not at its end."""

    __slots__ = ()

    def _see(self, fields: Mapping[str, Any]) -> bool:
        kind = fields.get("object")
        if kind == "thread.run":
            self._told = fields
            self.complete = fields.get("status") in ("completed", "incomplete", "failed", "cancelled", "expired")
            self.told_all = self.complete
        return kind == "thread.message.delta"


class SessionTally(EventTally):
    """The streams of agents' sessions: the first event has the session, and the turns are read elsewhere."""

    __slots__ = ()

    last_events = ("agent.session.created",)

    def _answer(self, fields: Mapping[str, Any]) -> Any:
        return fields.get("session")

    def reading(self) -> Reading:
        return msgspec.structs.replace(super().reading(), usage=None)


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
    """Whether a choice ends with this chunk."""
    choices = fields_of(chunk).get("choices")
    return type(choices) is list and bool(_finishing(choices))


def _finishing(choices: list[Any]) -> list[int]:
    """The numbers of those that end here."""
    ending = [fields for choice in choices if (fields := fields_of(choice)).get("finish_reason")]
    return [index if type(index := fields.get("index")) is int else 0 for fields in ending]


def forget_usage(chunk: Any) -> None:
    """Have a chunk look as if nobody had asked for usage: its `"usage": null` is our doing, not the caller's."""
    if fields_of(chunk).get("usage", 0) is not None:
        return
    extra = chunk if type(chunk) is dict else getattr(chunk, "__pydantic_extra__", None)
    if extra:  # an SDK whose chunks have no such field keeps it here, or with pydantic 1 among the fields
        extra.pop("usage", None)
    for name in ("__pydantic_fields_set__", "__fields_set__"):  # pydantic 2, pydantic 1
        fields_set = getattr(chunk, name, None)
        if type(fields_set) is set:
            fields_set.discard("usage")
            if name == "__fields_set__" and "usage" not in type(chunk).__fields__:
                chunk.__dict__.pop("usage", None)
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
                    data = lenient(whole)
                if type(data) is dict and not self.done:
                    found.append(data)
        return found
