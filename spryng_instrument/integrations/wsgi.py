"""Whose usage a request is, for every WSGI application: Flask, Pyramid, Django's WSGI.

    app.wsgi_app = UsageMiddleware(app.wsgi_app, key=header("x-customer"))

The context is set while the application is called, while each piece of its response is made, and while that is closed:
never between two pieces, where the server does as it likes with the thread. This module imports no framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from io import IOBase
from typing import TYPE_CHECKING, Any

from spryng_instrument.integrations.values import Values

if TYPE_CHECKING:
    from spryng_instrument.context import Scalar, usage_context

Environ = dict[str, Any]
App = Callable[[Environ, Any], Iterable[bytes]]


def header(name: str) -> Callable[[Environ], str | None]:
    """A callable that reads a request's header. None: there is none, or it is empty.

    What a header says is what the client says, unless a gateway that you trust has set it.
    """
    wanted = name.upper().replace("-", "_")
    if wanted not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        wanted = f"HTTP_{wanted}"

    def read(environ: Environ) -> str | None:
        return environ.get(wanted, "").strip() or None

    return read


class UsageMiddleware:
    """Attribute every OpenAI call that a request makes.

    Each value is a constant or a callable of the WSGI environ. One that raises is said in the log, once, and the
    request goes on without it.

    Args:
        app: the WSGI application.
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
        key: str | Callable[[Environ], str | None] | None = None,
        conversation_id: str | Callable[[Environ], str | None] | None = None,
        tags: Iterable[str] | Callable[[Environ], Iterable[str]] = (),
        query: str | Callable[[Environ], str | None] | None = None,
        properties: Mapping[str, Scalar] | Callable[[Environ], Mapping[str, Scalar] | None] | None = None,
        baggage: bool = False,
    ) -> None:
        self.app = app
        self._values = Values(
            key=key,
            conversation_id=conversation_id,
            tags=tags,
            query=query,
            properties=properties,
            baggage=header("baggage") if baggage else None,
        )

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        context = self._values.of(environ)
        with context:
            body = self.app(environ, start_response)
        return body if _is_made(body, environ) else _Response(context, body)


def _is_made(body: Iterable[bytes], environ: Environ) -> bool:
    """Whether all of a response is there. The server knows these by their type, and sends them its own way."""
    wrapper = environ.get("wsgi.file_wrapper")
    return isinstance(body, (list, tuple, IOBase)) or (isinstance(wrapper, type) and isinstance(body, wrapper))


class Steps:
    """An iterator whose every step is made in *context*."""

    def __init__(self, context: usage_context, steps: Iterable[Any]) -> None:
        self._context = context
        self._source = steps
        self._steps: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._context:
            if self._steps is None:
                self._steps = iter(self._source)
            return next(self._steps)


class _Response(Steps):
    def close(self) -> None:
        close = getattr(self._source, "close", None)
        if close is not None:
            with self._context:  # a generator's own finally may call OpenAI too
                close()
