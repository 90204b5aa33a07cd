"""Whose usage a request is, for every ASGI application: Starlette, FastAPI, Litestar, Quart, Django's ASGI.

    app.add_middleware(UsageMiddleware, key=header("x-customer"))

The context is set for all that the application does for a request: its streamed body, its background tasks, and the
whole life of a websocket. This module imports no framework.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from spryng_instrument.integrations.values import Values

if TYPE_CHECKING:
    from spryng_instrument.context import Scalar

HttpScope = MutableMapping[str, Any]
"""The ASGI scope of a connection; not our Scope."""
App = Callable[[HttpScope, Any, Any], Awaitable[None]]


def header(name: str) -> Callable[[HttpScope], str | None]:
    """A callable that reads a request's header, the first of that name. None: there is none, or it is empty.

    What a header says is what the client says, unless a gateway that you trust has set it.
    """
    wanted = name.lower().encode("latin-1")

    def read(scope: HttpScope) -> str | None:
        return next(_headers(scope, wanted), "").strip() or None

    return read


class UsageMiddleware:
    """Attribute every OpenAI call that a request or websocket makes.

    Each value is a constant or a callable of the ASGI scope, plain or async. One that raises is said in the log,
    once, and the request goes on without it.

    Args:
        app: the ASGI application.
        key: the customer.
        conversation_id: relates many messages to one conversation of that customer.
        tags: labels to filter by.
        query: what the customer asked.
        properties: further facts to keep with each message.
        baggage: read the request's W3C baggage too; the values above win. Only behind a gateway that you trust, since
            a client could name another customer.
    """

    def __init__(
        self,
        app: App,
        *,
        key: str | Callable[[HttpScope], str | Awaitable[str | None] | None] | None = None,
        conversation_id: str | Callable[[HttpScope], str | Awaitable[str | None] | None] | None = None,
        tags: Iterable[str] | Callable[[HttpScope], Iterable[str] | Awaitable[Iterable[str]]] = (),
        query: str | Callable[[HttpScope], str | Awaitable[str | None] | None] | None = None,
        properties: Mapping[str, Scalar]
        | Callable[[HttpScope], Mapping[str, Scalar] | Awaitable[Mapping[str, Scalar] | None] | None]
        | None = None,
        baggage: bool = False,
    ) -> None:
        self.app = app
        self._values = Values(
            key=key,
            conversation_id=conversation_id,
            tags=tags,
            query=query,
            properties=properties,
            baggage=_baggage if baggage else None,
        )

    async def __call__(self, scope: HttpScope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        with await self._values.async_of(scope):
            await self.app(scope, receive, send)


def _headers(scope: HttpScope, wanted: bytes) -> Iterator[str]:
    return (value.decode("latin-1") for name, value in scope.get("headers") or () if name.lower() == wanted)


def _baggage(scope: HttpScope) -> str:
    return ",".join(_headers(scope, b"baggage"))
