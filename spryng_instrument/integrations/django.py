"""Whose usage a request is, for Django, sync and async.

    MIDDLEWARE = [..., "django.contrib.auth.middleware.AuthenticationMiddleware",
                  "spryng_instrument.integrations.django.UsageMiddleware"]
    SPRYNG = {"KEY": "shop.usage.customer_of", "TAGS": ["web"]}

Each value is a constant, a callable of the HttpRequest, plain or async, or the dotted path of one. The middlewares
above it have run when they are called: below AuthenticationMiddleware, request.user is there. What authenticates within
the view, as Django REST framework does, has not: there, use usage_context or tracked.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import AsyncGeneratorType
from typing import Any

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction, sync_to_async

from spryng_instrument.context import async_steps, usage_context
from spryng_instrument.integrations.values import Values
from spryng_instrument.integrations.wsgi import Steps, header

SETTINGS = ("KEY", "CONVERSATION_ID", "TAGS", "QUERY", "PROPERTIES", "BAGGAGE")

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class UsageMiddleware:
    """Attribute every OpenAI call that a request makes, those of a StreamingHttpResponse while it is sent included.

    Reads the Django setting SPRYNG: a dict of KEY, CONVERSATION_ID, TAGS, QUERY, PROPERTIES, and BAGGAGE (True: read
    the request's W3C baggage too; only behind a gateway that you trust, since a client could name another customer).

    Raises:
        ImproperlyConfigured: at start-up, if the setting cannot be used.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.async_mode: bool = iscoroutinefunction(get_response)
        if self.async_mode:
            markcoroutinefunction(self)
        self._values = Values(**_arguments(self.async_mode))

    def __call__(self, request: Any) -> Any:
        if self.async_mode:
            return self._async_call(request)
        context = self._values.of(request)
        with context:
            response = self.get_response(request)
        return _followed(context, response)

    async def _async_call(self, request: Any) -> Any:
        context = await self._values.async_of(request)
        with context:
            response = await self.get_response(request)
        return _followed(context, response)


def _arguments(async_mode: bool) -> dict[str, Any]:
    from django.conf import settings
    from django.core.exceptions import ImproperlyConfigured

    chosen = getattr(settings, "SPRYNG", {})
    unknown = set(chosen) - set(SETTINGS)
    if unknown:
        raise ImproperlyConfigured(f"SPRYNG has no {', '.join(sorted(unknown))}; it may have: {', '.join(SETTINGS)}")
    arguments = {name.lower(): _value(name, value, async_mode) for name, value in chosen.items() if name != "BAGGAGE"}
    if chosen.get("BAGGAGE"):
        read = header("baggage")
        arguments["baggage"] = lambda request: read(request.META)
    return arguments


def _value(name: str, value: Any, async_mode: bool) -> Any:
    from django.core.exceptions import ImproperlyConfigured
    from django.utils.module_loading import import_string

    if isinstance(value, str) and _DOTTED.fullmatch(value):
        try:
            value = import_string(value)
        except ImportError as exc:
            # Taken for a constant, a misspelt path would be billed as a customer.
            raise ImproperlyConfigured(
                f"SPRYNG[{name!r}] = {value!r} cannot be imported: {exc}. A constant with a dot is lambda request: ..."
            ) from exc
    if not callable(value):
        return value
    # As Django does for its own middlewares: request.user in a plain function may ask the database.
    if async_mode:
        return value if iscoroutinefunction(value) else sync_to_async(value, thread_sensitive=True)
    return async_to_sync(value) if iscoroutinefunction(value) else value


def _followed(context: usage_context, response: Any) -> Any:
    """The response, whose pieces are made in *context* if any are still to be made."""
    # A file calls nobody, and servers send one their own way.
    if not getattr(response, "streaming", False) or getattr(response, "file_to_stream", None) is not None:
        return response
    # streaming_content hides the iterator that is to be closed, and nothing public names what closes it.
    pieces = getattr(response, "_iterator", response.streaming_content)
    closers = getattr(response, "_resource_closers", [])
    closers[:] = [partial(_call_in, context, closer) for closer in closers]
    if isinstance(pieces, AsyncGeneratorType):
        response.streaming_content = async_steps(context, pieces)  # which closes it, in its context
    elif response.is_async:
        response.streaming_content = AsyncSteps(context, pieces)
    else:
        response.streaming_content = Steps(context, pieces)
    return response


class AsyncSteps:
    """An async iterator whose every step is made in *context*."""

    def __init__(self, context: usage_context, steps: AsyncIterator[Any]) -> None:
        self._context = context
        self._steps = steps

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        with self._context:
            return await self._steps.__anext__()


def _call_in(context: usage_context, func: Callable[[], Any]) -> Any:
    with context:
        return func()
