"""The seams in the SDK's WebSocket connections: `parse_event`, through which every event passes to the caller;
`__init__`, which tells whose connection it is: of the context that it was made in, whoever reads from it later; `send`,
which tells the same of a response of the Responses API; and `close`, with which a live session ends for this side.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import iscoroutinefunction
from typing import Any

import wrapt

from spryng_instrument import recorder as recording
from spryng_instrument.connections import LIVE, REALTIME, RESPONSES, TRANSLATIONS, known, known_to, see_anew
from spryng_instrument.endpoints import Endpoint
from spryng_instrument.seams import wrap
from spryng_instrument.usage import fields_of

CONNECTIONS: dict[str, Endpoint] = {
    "openai.resources.beta.realtime.realtime": REALTIME,
    "openai.resources.realtime.realtime": REALTIME,
    "openai.resources.responses.responses": RESPONSES,
    "openai.resources.beta.responses.responses": RESPONSES,
    "openai.resources.realtime.translations.translations": TRANSLATIONS,
    "openai.resources.live.live": LIVE,
    "openai.resources.live.forks": LIVE,
    "openai.resources.live.sideband": LIVE,
}
"""The modules whose connections are watched, and what their responses are."""

LANES = "openai.lib.responses_websocket._session"
"""The module of the SDK's own lanes on one connection for responses: they send past its `send`."""

_hooked: set[str] = set()


def patch_sockets() -> None:
    """Watch the connections of every module that is loaded now or will be: none is loaded for this."""
    see_anew()
    for name in (*CONNECTIONS, LANES):
        if name in sys.modules:
            _patch_module(sys.modules[name])
        if name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_imported, name)


def _imported(module: Any) -> None:
    if recording.active is not None:
        _patch_module(module)


def _patch_module(module: Any) -> None:
    endpoint = CONNECTIONS.get(module.__name__, RESPONSES)
    for owner in list(vars(module).values()):
        if not isinstance(owner, type) or owner.__module__ != module.__name__:
            continue
        if owner.__name__.endswith("Lane"):
            _wrap_send(owner, _of_lane)
        elif "parse_event" in vars(owner):
            wrap(owner, "__init__", _opening(endpoint))
            wrap(owner, "parse_event", _reading(endpoint))
            if endpoint is RESPONSES:
                _wrap_send(owner, _of_connection)
            _wrap_close(owner)


def _wrap_send(owner: type, whose: _Whose) -> None:
    asking: Any = _asking_async if iscoroutinefunction(vars(owner).get("send")) else _asking
    wrap(owner, "send", partial(asking, whose))


_Whose = Callable[[Any, Mapping[str, Any]], tuple[Any, Mapping[str, Any]]]
"""Gives the connection that a sender sends over, and the fields of an event as it sends them."""


def _of_connection(connection: Any, fields: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    return connection, fields


def _of_lane(lane: Any, fields: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    return lane._session.connection, {**fields, "stream_id": lane._state.stream_id}


def _wrap_close(owner: type) -> None:
    for base in owner.__mro__:  # newer SDKs have it in a base class
        close = vars(base).get("close")
        if close is not None:
            wrap(base, "close", _closing_async if iscoroutinefunction(close) else _closing)
            return


def _opening(endpoint: Endpoint) -> Any:
    def __init__(wrapped: Any, connection: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        wrapped(*args, **kwargs)
        recorder = recording.active
        if recorder is not None:
            try:
                known_to(recorder, connection, endpoint)
            except Exception:
                recorder.bug("looking at a new connection")

    return __init__


def _reading(endpoint: Endpoint) -> Any:
    def parse_event(wrapped: Any, connection: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        event = wrapped(*args, **kwargs)
        recorder = recording.active
        if recorder is not None:
            try:
                known_to(recorder, connection, endpoint).see(event)
            except Exception:
                recorder.bug("reading an event of a connection")
        return event

    return parse_event


def _asking(whose: _Whose, wrapped: Any, sender: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    take_back = _asked(whose, sender, args, kwargs)
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        take_back()
        raise


async def _asking_async(whose: _Whose, wrapped: Any, sender: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    take_back = _asked(whose, sender, args, kwargs)
    try:
        return await wrapped(*args, **kwargs)
    except BaseException:
        take_back()
        raise


def _asked(whose: _Whose, sender: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
    """Before an event is sent, as what it asks for may come sooner than that returns. Gives what to do if it fails."""
    recorder = recording.active
    if recorder is not None:
        try:
            fields = fields_of(args[0] if args else kwargs.get("event"))
            if fields.get("type") == "response.create":
                connection, fields = whose(sender, fields)
                return known_to(recorder, connection, RESPONSES).ask(fields)
        except Exception:
            recorder.bug("looking at what a connection is asked for")
    return _nothing


def _nothing() -> None:
    pass


def _closing(wrapped: Any, connection: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return wrapped(*args, **kwargs)
    finally:  # not before: until it is closed, another thread may read what comes
        _closed(connection)


async def _closing_async(wrapped: Any, connection: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return await wrapped(*args, **kwargs)
    finally:
        _closed(connection)


def _closed(connection: Any) -> None:
    recorder = recording.active
    if recorder is not None:
        try:
            seen = known(connection)
            if seen is not None:
                seen.closed()
        except Exception:
            recorder.bug("looking at a closed connection")
