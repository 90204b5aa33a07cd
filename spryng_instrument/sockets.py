"""The seam in the SDK's WebSocket connections: `parse_event`, through which every event passes to the caller.

A response is one message, from the event that creates it to the one that ends it; so is a transcription of what was
said, and a live session, whose usage is cumulative and told at its end. An event that is parsed twice counts once.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

import wrapt

from spryng_instrument import recorder as recording
from spryng_instrument.context import Scope, current_scope
from spryng_instrument.endpoints import Endpoint
from spryng_instrument.observe import Call
from spryng_instrument.recorder import Recorder
from spryng_instrument.seams import wrap
from spryng_instrument.tallies import EventTally, ResponseTally
from spryng_instrument.usage import fields_of, read_reply

TRANSCRIBED = "conversation.item.input_audio_transcription.completed"
RESPONSE_ENDS = ("response.done", "response.completed", "response.incomplete", "response.failed")
_REMEMBERED = 1_000
"""Ends of a connection that are remembered, so that none counts twice."""


class _RealtimeTally(ResponseTally):
    __slots__ = ()

    last_events = ("response.done",)


_REALTIME = Endpoint("realtime", _RealtimeTally)
_TRANSCRIPTION = Endpoint("realtime.transcription")
_LIVE = Endpoint("live", EventTally)

CONNECTIONS: dict[str, Endpoint] = {
    "openai.resources.beta.realtime.realtime": _REALTIME,
    "openai.resources.realtime.realtime": _REALTIME,
    "openai.resources.responses.responses": Endpoint("responses", ResponseTally),
    "openai.resources.beta.responses.responses": Endpoint("responses", ResponseTally),
    "openai.resources.realtime.translations.translations": Endpoint("realtime.translations"),
    "openai.resources.live.live": _LIVE,
    "openai.resources.live.forks": _LIVE,
    "openai.resources.live.sideband": _LIVE,
}
"""The modules whose connections are watched, and what their responses are."""

_NO_SCOPE = Scope()
_hooked: set[str] = set()


def patch_sockets() -> None:
    """Watch the connections of every module that is loaded now or will be: none is loaded for this."""
    for name in CONNECTIONS:
        if name in sys.modules:
            _patch_module(sys.modules[name])
        if name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_imported, name)


def _imported(module: Any) -> None:
    if recording.active is not None:
        _patch_module(module)


def _patch_module(module: Any) -> None:
    for owner in list(vars(module).values()):
        if isinstance(owner, type) and owner.__module__ == module.__name__ and "parse_event" in vars(owner):
            wrap(owner, "parse_event", _watching(CONNECTIONS[module.__name__]))


def _watching(endpoint: Endpoint) -> Any:
    watched: WeakKeyDictionary[Any, _Connection] = WeakKeyDictionary()

    def parse_event(wrapped: Any, connection: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        event = wrapped(*args, **kwargs)
        recorder = recording.active
        if recorder is not None:
            try:
                known = watched.get(connection)
                if known is None or known.recorder is not recorder:
                    known = watched[connection] = _Connection(recorder, endpoint)
                known.see(event)
            except Exception:
                recorder.bug("reading an event of a connection")
        return event

    return parse_event


class _Connection:
    """What was seen of one connection."""

    def __init__(self, recorder: Recorder, endpoint: Endpoint) -> None:
        self.recorder = recorder
        self._endpoint = endpoint
        self._model: object = None
        self._responses: dict[str, Call] = {}
        """Those that were created and did not end, by their ids."""
        self._ended: dict[str, None] = {}

    def see(self, event: Any) -> None:
        fields = fields_of(event)
        kind = fields.get("type")
        if kind in ("session.created", "session.updated"):
            self._model = fields_of(fields.get("session")).get("model") or self._model
        elif kind == "response.created":
            name = str(fields_of(fields.get("response")).get("id") or fields.get("event_id"))
            if name not in self._responses and name not in self._ended:
                self._responses[name] = self._open()
        elif kind in RESPONSE_ENDS:
            name = str(fields_of(fields.get("response")).get("id") or fields.get("event_id"))
            if self._is_new(name):
                call = self._responses.pop(name) if name in self._responses else self._open()
                call.see(event)
        elif kind == TRANSCRIBED:
            if self._is_new(f"{fields.get('item_id')}/{fields.get('content_index')}"):
                self._begin(_TRANSCRIPTION).answered(read_reply(event))
        elif kind == "session.closed":
            if self._is_new("session.closed"):
                session = fields_of(fields.get("session"))
                self._model = session.get("model") or self._model
                self._begin(self._endpoint).answered(
                    read_reply({"id": session.get("id"), "usage": fields.get("usage")})
                )
        elif type(kind) is str and kind.endswith(".delta") and not kind.startswith("conversation."):
            ours = self._responses.get(str(fields.get("response_id"))) or next(iter(self._responses.values()), None)
            if ours is not None:
                ours.see(event)

    def _begin(self, endpoint: Endpoint) -> Call:
        scope = current_scope() or _NO_SCOPE
        key = scope.key or self.recorder.settings.default_key  # too late to refuse it: it is answered and paid for
        return Call(self.recorder, endpoint, scope, key, None, self._model)

    def _open(self) -> Call:
        call = self._begin(self._endpoint)
        call.opened()
        return call

    def _is_new(self, name: str) -> bool:
        if name == "None":
            return True
        if name in self._ended:
            return False
        self._ended[name] = None
        if len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]
        return True
