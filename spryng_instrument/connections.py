"""What is seen of the SDK's WebSocket connections, event by event, and whose it is.

A response is one message, from the event that creates it to the one that ends it; so is a transcription of what was
said, which another model makes than the session's, and a live session, whose usage is cumulative: the last one counts.
What is parsed twice counts once, also where several connections of the process see it: it is the first one's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from threading import RLock
from typing import Any
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from spryng_instrument.context import Scope, current_scope
from spryng_instrument.endpoints import Endpoint
from spryng_instrument.message import Status
from spryng_instrument.observe import Call
from spryng_instrument.recorder import Recorder
from spryng_instrument.tallies import EventTally, ResponseTally
from spryng_instrument.usage import Reading, fields_of, read_reply

SESSIONS = (
    "session.created",
    "session.started",
    "session.updated",
    "transcription_session.created",
    "transcription_session.updated",
)
"""Events that tell how a session is set up."""
SESSION_USAGE = "session.usage.updated"
SESSION_END = "session.closed"
TRANSCRIBED = "conversation.item.input_audio_transcription.completed"
DELEGATED = "response.event"
RESPONSE_ENDS = ("response.done", "response.completed", "response.incomplete", "response.failed")
_HELD = 10_000
"""Sessions of sidebands that are held when their sideband has gone."""
_REMEMBERED = 5_000
"""Ends that are remembered at least, so that none counts twice."""


class _RealtimeTally(ResponseTally):
    __slots__ = ()

    last_events = ("response.done",)


class _SessionTally(EventTally):
    """A session that is a message: what its events say of it replaces what they said before."""

    __slots__ = ()

    last_events = (SESSION_END,)

    def _answer(self, fields: Mapping[str, Any]) -> Any:
        return {**fields_of(self._told), **{name: value for name, value in fields.items() if value is not None}}


REALTIME = Endpoint("realtime", _RealtimeTally)
_TRANSCRIPTION = Endpoint("realtime.transcription")
RESPONSES = Endpoint("responses", ResponseTally)
TRANSLATIONS = Endpoint("realtime.translations", _SessionTally)
LIVE = Endpoint("live", _SessionTally)

_Asked = tuple[Scope, object]
"""The scope that a response was asked for in, and the model."""
_Name = tuple[object, str]
"""Whose id it is, a host's or that of one connection, and the id."""


class _SeenCall(Call):
    """What may be seen by more than one connection."""

    name: _Name | None = None
    seen: _Seen

    @property
    def has_begun(self) -> bool:
        """Whether its first token was seen."""
        return self._first_token is not None

    def _finish(self, status: Status, reading: Reading, **more: Any) -> None:
        if self.name is not None and (status != "incomplete" or reading.usage is not None):
            self.seen.ended(self.name)  # else what was used may be told yet, to another connection
        super()._finish(status, reading, **more)


class _Seen:
    """What the connections of this process have seen begin and end."""

    def __init__(self) -> None:
        self._lock = RLock()  # the garbage collector may close another connection meanwhile
        self._open: WeakValueDictionary[_Name, _SeenCall] = WeakValueDictionary()
        self._held: dict[_Name, _SeenCall] = {}
        self._ended: set[_Name] = set()
        self._ended_before: set[_Name] = set()

    def begin(self, name: _Name | None, make: Callable[[], _SeenCall], *, hold: bool = False) -> _SeenCall | None:
        """The call of that name, made now if it is new. None: it is at its end.

        Args:
            hold: whether it is kept when no connection sees it any more, for one that may see its end.
        """
        if name is None:
            return make()
        with self._lock:
            if name in self._ended or name in self._ended_before:
                return None
            call = self._open.get(name)
            if call is None:
                call = self._open[name] = make()
                call.name, call.seen = name, self
                if hold:
                    self._held[name] = call
                    for oldest in list(self._held)[:-_HELD]:
                        self._held.pop(oldest, None)
            return call

    def let_go(self) -> None:
        """Hold nothing any more."""
        self._held = {}

    def ended(self, name: _Name) -> None:
        """It is at its end. Waits for nothing: a finaliser may call it."""
        self._held.pop(name, None)
        self._ended.add(name)
        if len(self._ended) >= _REMEMBERED:
            self._ended_before, self._ended = self._ended, set()


class _Lane:
    """The responses that a connection was asked for, which it gives one after the other."""

    __slots__ = ("asked", "last", "queued", "runs")

    def __init__(self, scope: Scope, asked: deque[_Asked] | None = None) -> None:
        self.asked: deque[_Asked] = deque() if asked is None else asked
        self.queued: deque[_Asked] = deque()
        """Those that are sent once the connection is made again."""
        self.last: _Asked = scope, None
        """What the response that came last was asked with: one that follows without being asked for goes on with it."""
        self.runs = False

    def begin(self) -> _Asked:
        """A response begins: the first that was asked for, if one was."""
        self.runs = True
        with suppress(IndexError):
            self.last = self.asked.popleft()
        return self.last

    def refused(self, fields: Mapping[str, Any]) -> None:
        """An error came: one without a number is no event of a response, but comes instead of the next one."""
        if not self.runs or fields.get("sequence_number") is None:
            with suppress(IndexError):
                self.asked.popleft()


_seen = _Seen()


def see_anew() -> None:
    """Forget what was seen. What is held is recorded as it stands."""
    global _seen
    _seen.let_go()
    _seen = _Seen()


os.register_at_fork(after_in_child=see_anew)  # another thread may have held the lock

_NO_SCOPE = Scope()
_numbers = count()
_watched: WeakKeyDictionary[Any, Connection] = WeakKeyDictionary()


def known(connection: Any) -> Connection | None:
    """What was seen of a connection of the SDK."""
    return _watched.get(connection)


def known_to(recorder: Recorder, connection: Any, endpoint: Endpoint) -> Connection:
    """What was seen of a connection of the SDK, since *recorder* is there; what it is of, if it is new."""
    known = _watched.get(connection)
    if known is None or known.recorder is not recorder:
        # One that is older than instrument() is of whoever reads from it first.
        scope = current_scope() or _NO_SCOPE if known is None else known.scope
        known = _watched[connection] = Connection(recorder, endpoint, scope, connection)
    return known


class Connection:
    """What was seen of one connection."""

    def __init__(self, recorder: Recorder, endpoint: Endpoint, scope: Scope, connection: Any) -> None:
        self.recorder = recorder
        self.scope = scope
        self._endpoint = endpoint
        self._connection = ref(connection)
        self._transport = self._transport_now()
        self._host, session_id = _handshake_of(self._transport)
        self._number = next(_numbers)
        self._model: object = None
        self._transcriber: object = None
        """The model that transcribes what the user says. None: not told, and never the session's own."""
        self._is_sideband = session_id is not None
        self._session_id: object = session_id
        self._session: _SeenCall | None = None
        """The session, where that is a message."""
        self._lanes: dict[str | None, _Lane] = {}
        self._responses: dict[_Name | None, _SeenCall] = {}
        """Those that were created and did not end."""

    def ask(self, fields: Mapping[str, Any]) -> Callable[[], None]:
        """A response is asked for. Gives what takes that back."""
        self._look_at_transport()
        scope = current_scope()
        if scope is None or (scope.key is None and self.scope.key is not None):
            scope = self.scope
        asked, lane = (scope, fields.get("model")), self._lane(fields)
        # While the SDK makes the connection again, it keeps what is to be sent.
        waiting = lane.queued if getattr(self._connection(), "_is_reconnecting", False) else lane.asked
        waiting.append(asked)

        def take_back() -> None:
            with suppress(ValueError):
                waiting.remove(asked)

        return take_back

    def _transport_now(self) -> Any:
        """The WebSocket below."""
        return getattr(self._connection(), "_connection", None)

    def _look_at_transport(self) -> None:
        """If it was made again: what was asked for over the one before comes no more."""
        transport = self._transport_now()
        if transport is not self._transport:
            self._transport, self._responses = transport, {}
            self._lanes = {name: _Lane(self.scope, lane.queued) for name, lane in self._lanes.items()}

    def _lane(self, fields: Mapping[str, Any]) -> _Lane:
        name = fields.get("stream_id")
        lane = self._lanes.get(name if type(name) is str else None)
        if lane is None:
            lane = self._lanes[name if type(name) is str else None] = _Lane(self.scope)
        return lane

    def see(self, event: Any) -> None:
        fields = fields_of(event)
        kind = fields.get("type")
        if type(kind) is str and kind.endswith(".delta"):  # most are
            self._see_delta(kind, fields)
        elif kind in SESSIONS or kind in (SESSION_USAGE, SESSION_END):
            self._see_session(fields)
        elif kind == TRANSCRIBED:
            item = fields.get("item_id") and f"{fields['item_id']}/{fields.get('content_index')}"
            name = self._name(item, fields.get("event_id"), by_api=False)  # a client may have named it
            call = self._begin(name, _TRANSCRIPTION, lambda: (self.scope, self._transcriber))
            if call is not None:
                call.answered(read_reply(event))
        elif kind == DELEGATED:  # by a live session, to a model of its own
            self._see_response(fields_of(fields.get("event")), RESPONSES, lambda: (self.scope, None))
        elif self._endpoint is not RESPONSES:  # the server may begin one unasked: when the user has stopped speaking
            self._see_response(fields, self._endpoint, lambda: (self.scope, self._model))
        else:
            self._look_at_transport()
            lane = self._lane(fields)
            self._see_response(fields, self._endpoint, lane.begin)
            if kind in RESPONSE_ENDS:
                lane.runs = False
            elif kind == "error":
                lane.refused(fields)

    def _see_response(self, fields: Mapping[str, Any], endpoint: Endpoint, asked: Callable[[], _Asked]) -> None:
        kind, running = fields.get("type"), self._responses
        if kind == "response.created":
            name = self._name(fields_of(fields.get("response")).get("id"))
            if name is not None and name not in running:
                created = self._begin(name, endpoint, asked)
                if created is not None:
                    running[name] = created
        elif kind in RESPONSE_ENDS:
            name = self._name(fields_of(fields.get("response")).get("id"), fields.get("event_id"))
            call = running.pop(name, None) or self._begin(name, endpoint, asked)
            if call is not None:
                call.see(fields)
        elif type(kind) is str and kind.endswith(".delta"):
            self._see_delta(kind, fields)

    def _see_delta(self, kind: str, fields: Mapping[str, Any]) -> None:
        running = self._responses
        if running and kind.startswith("response."):
            ours = running.get(self._name(fields.get("response_id"))) or next(iter(running.values()), None)
            if ours is not None and not ours.has_begun:
                ours.see(fields)

    def _see_session(self, fields: Mapping[str, Any]) -> None:
        session = fields_of(fields.get("session"))
        self._model = session.get("model") or self._model
        self._transcriber = _transcriber_of(session) or self._transcriber
        told_id = session.get("id") or self._session_id
        if self._endpoint.tally is not _SessionTally:
            self._session_id = told_id
            return  # its responses are the messages
        if told_id != self._session_id and self._session_id is not None:
            self._session = None  # connected again, to another one
        self._session_id = told_id
        if self._session is None:
            # A session goes on without its sideband, which may come back.
            name = (self._host or self._number, str(told_id or "session"))
            asked = self.scope, self._model
            self._session = self._begin(name, self._endpoint, lambda: asked, hold=self._is_sideband)
        if self._session is not None:
            told = {"id": told_id, "model": self._model, "usage": fields.get("usage")}
            self._session.see({"type": fields["type"], **told})

    def closed(self) -> None:
        """The connection is closed: a session that no other one sees is dropped with this, and recorded as it stands.

        Responses are not, before the connection is: the end of one may have been received, and be read after this.
        """
        self._session = None

    def _begin(
        self, name: _Name | None, endpoint: Endpoint, asked: Callable[[], _Asked], *, hold: bool = False
    ) -> _SeenCall | None:
        """The call of that name. None: it is at its end."""
        return _seen.begin(name, partial(self._open, endpoint, asked), hold=hold)

    def _open(self, endpoint: Endpoint, asked: Callable[[], _Asked]) -> _SeenCall:
        scope, model = asked()
        key = scope.key or self.recorder.settings.default_key  # too late to refuse it: it is answered and paid for
        call = _SeenCall(self.recorder, endpoint, scope, key, self._host, model)
        call.opened(streamed=endpoint is not _TRANSCRIPTION)
        return call

    def _name(self, told: object, otherwise: object = None, *, by_api: bool = True) -> _Name | None:
        """What is told by an id is known by it on every connection of that session; and, if OpenAI's API has made the
        id, on every other one to that. By anything else, it is known on this connection only.
        """
        if not told:
            return (self._number, str(otherwise)) if otherwise else None
        if by_api and (self._host or "").endswith("api.openai.com"):
            return self._host, str(told)
        if self._session_id:
            return self._host or self._number, f"{self._session_id}/{told}"
        return self._number, str(told)


def _handshake_of(transport: Any) -> tuple[str | None, str | None]:
    """What a WebSocket says of where it was made to: host and, if unusual, port; the session or call, of a sideband."""
    request: Any = getattr(transport, "request", None)
    try:
        host = request.headers.get_all("Host")[0]  # the URL's; a header of the caller's own comes after it
        path, _, query = request.path.partition("?")
        *_, session_id, last = path.split("/")
        joined = session_id if last == "attach" else dict(parse_qsl(query)).get("call_id")
    except (AttributeError, LookupError, TypeError, ValueError):
        return None, None
    return host.lower() if type(host) is str else None, joined


def _transcriber_of(session: Mapping[str, Any]) -> object:
    heard = fields_of(fields_of(session.get("audio")).get("input")).get("transcription")
    if heard is None:
        heard = session.get("input_audio_transcription")  # in the beta
    return fields_of(heard).get("model")
