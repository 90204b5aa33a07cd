"""Values that a request gives, as a usage_context. What goes wrong is said in the log, and the request goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from inspect import isawaitable, iscoroutine
from typing import Any

from spryng_instrument.checks import clean_name, clean_properties, clean_query, clean_tags
from spryng_instrument.context import usage_context
from spryng_instrument.integrations.baggage import read_members

log = logging.getLogger("spryng_instrument")

_CLEAN: dict[str, Callable[[Any], Any]] = {
    "key": lambda value: clean_name("key", value),
    "conversation_id": lambda value: clean_name("conversation_id", value),
    "tags": clean_tags,
    "query": clean_query,
    "properties": clean_properties,
}


class Values:
    """The arguments of usage_context for each request: constants, and callables of the request.

    Args:
        baggage: reads the request's baggage header, whose values are the outermost. None: it is not read.
        own: the arguments of usage_context by name.
    """

    def __init__(self, *, baggage: Callable[[Any], str | None] | None = None, **own: Any) -> None:
        self._computed = {name: value for name, value in own.items() if callable(value)}
        self._fixed = {name: _CLEAN[name](value) for name, value in own.items() if not callable(value)}
        self._baggage = baggage
        self._constant = None if self._computed or baggage else usage_context(**self._fixed)
        self._said: set[str] = set()

    def of(self, request: Any) -> usage_context:
        """The context of *request*; its callables are plain functions."""
        if self._constant is not None:
            return self._constant
        found = dict(self._fixed)
        for name, value in self._computed.items():
            try:
                got = value(request)
                if isawaitable(got):
                    if iscoroutine(got):
                        got.close()
                    raise TypeError("it is async, and nothing here can await it")
                found[name] = _CLEAN[name](got)
            except Exception as exc:
                self._say(name, exc)
        return self._within_baggage(request, found)

    async def async_of(self, request: Any) -> usage_context:
        """The context of *request*; its callables are plain or async functions."""
        if self._constant is not None:
            return self._constant
        found = dict(self._fixed)
        for name, value in self._computed.items():
            try:
                got = value(request)
                found[name] = _CLEAN[name](await got if isawaitable(got) else got)
            except Exception as exc:
                self._say(name, exc)
        return self._within_baggage(request, found)

    def _within_baggage(self, request: Any, own: dict[str, Any]) -> usage_context:
        outer = read_members(self._baggage(request)) if self._baggage is not None else {}
        for name, value in outer.items():
            own[name] = value + (own.get(name) or ()) if name == "tags" else own.get(name) or value
        return usage_context(**{name: value for name, value in own.items() if value is not None})

    def _say(self, name: str, exc: Exception) -> None:
        if name in self._said:
            return
        self._said.add(name)
        value = self._computed[name]
        log.error(
            "%s=%s raised %r; its requests go on without a %s. This is said once",
            name,
            getattr(value, "__qualname__", value),
            exc,
            name,
            exc_info=exc,
        )
