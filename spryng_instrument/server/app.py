"""The Track Usage API as an ASGI application: its routes, who may use them, and what an error looks like.

Invariant: 200 is said after the commit. Every other answer is JSON that names the field and what is wrong with it; what
went wrong in here is in the log, not in the answer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from typing import Any

import anyio.to_thread
import msgspec
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from spryng_instrument import __version__
from spryng_instrument.api import MAX_MESSAGES, Batch, Result, Results, message_of
from spryng_instrument.errors import ApiError, QueryError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.prices import price_source, rate
from spryng_instrument.server import metrics, reading
from spryng_instrument.server.bodies import Refused, read_body
from spryng_instrument.server.committer import Committer
from spryng_instrument.server.keys import KeyRing
from spryng_instrument.server.openapi import document
from spryng_instrument.settings import resolve
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Receipt, Store
from spryng_instrument.store.rows import is_same

log = logging.getLogger("spryng_instrument")

OPEN_VARIABLE = "SPRYNG_SERVE_OPEN"
"""Set by `spryng serve` where it listens on loopback only: while no key was ever made, none is asked for."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
RATE_EVERY_S = 10.0
_Handler = Callable[["Server", Request], Awaitable[Response]]


class Server:
    """What the routes share.

    Args:
        store: the ledger.
        open_to_local: whether no key is asked for while none was ever made. Only for a server on loopback.
    """

    def __init__(self, store: Store, *, open_to_local: bool = False) -> None:
        self.store = store
        self.keys = KeyRing(store)
        self.committer = Committer(store)
        self._open_to_local = open_to_local
        self._stop = threading.Event()
        if price_source().version is not None:
            threading.Thread(target=self._rate, name="spryng-prices", daemon=True).start()

    async def authorize(self, request: Request, scope: str) -> None:
        """Let a request through that has a key of that scope.

        Raises:
            Refused: it has none.
        """
        if not self.keys.fresh:
            await anyio.to_thread.run_sync(self.keys.refresh)
        if self._open_to_local and self.keys.empty:
            # A page in a browser on this machine can have a name of its own resolve to loopback.
            if request.url.hostname not in LOCAL_HOSTS:
                raise Refused(
                    403, "Host", f"{request.url.hostname!r} is not this machine; make a key: spryng keys create"
                )
            return
        key = self.keys.find(request.headers.get("authorization"))
        if key is None:
            raise Refused(
                401, "Authorization", "needs an API key that is known and not revoked, bare or as Bearer",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if scope not in key.scopes:
            raise Refused(403, "Authorization", f"this key has the scope {' and '.join(key.scopes)}, not {scope}")

    async def record(self, messages: Sequence[tuple[Message, bool]]) -> Receipt:
        """Record messages, each with whether its time is its own. One that is repeated without is a duplicate."""
        receipt = await self.committer.record([message for message, _ in messages])
        doubtful = {
            message.id: message
            for (message, own_time), outcome in zip(messages, receipt.outcomes, strict=True)
            if outcome == "conflict" and not own_time
        }
        if doubtful:
            found = await anyio.to_thread.run_sync(self.store.found, list(doubtful))
            same = {
                id for id, known in found.items() if is_same(known, replace(doubtful[id], timestamp=known.timestamp))
            }
            receipt = Receipt(
                tuple(
                    "duplicate" if outcome == "conflict" and message.id in same else outcome
                    for (message, _), outcome in zip(messages, receipt.outcomes, strict=True)
                ),
                receipt.reasons,
            )
        metrics.count(receipt)
        return receipt

    def close(self) -> None:
        """Record what was accepted, and let go of the store."""
        self._stop.set()
        self.committer.close()
        self.store.close()

    def _rate(self) -> None:
        """Set costs as messages come, so that no question has to wait for those of many."""
        while not self._stop.wait(RATE_EVERY_S):
            try:
                rate(self.store)
            except StoreError:
                pass  # the next one may work; what matters is said by those who record
            except Exception:
                log.exception("costs could not be set")


async def track(server: Server, request: Request) -> Response:
    """POST /trackUsage."""
    await server.authorize(request, "ingest")
    message, own_time = message_of(await read_body(request), datetime.now(timezone.utc))
    receipt = await server.record([(message, own_time)])
    [outcome] = receipt.outcomes
    if outcome == "conflict":
        raise Refused(409, "messageId", f"{message.id!r}: another message has this id, and is kept")
    if outcome == "refused":
        raise Refused(422, "body", receipt.reasons.get(message.id, "cannot be recorded"))
    return _json({"id": message.id, "status": outcome})


async def track_batch(server: Server, request: Request) -> Response:
    """POST /trackUsage/batch: an answer for each message."""
    await server.authorize(request, "ingest")
    body = await read_body(request)
    try:
        batch = msgspec.json.decode(body, type=Batch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Refused(400, "body", f'is no batch: {exc}; send {{"messages": [...]}}') from None
    if len(batch.messages) > MAX_MESSAGES:
        raise Refused(413, "messages", f"are {len(batch.messages)}, {MAX_MESSAGES} are allowed at a time")
    now = datetime.now(timezone.utc)
    results: list[Result | None] = []
    taken: list[tuple[Message, bool]] = []
    for raw in batch.messages:
        try:
            taken.append(message_of(raw, now))
            results.append(None)
        except ApiError as exc:
            results.append(Result(None, "refused", str(exc)))
    receipt = await server.record(taken)
    answers = iter(
        Result(message.id, outcome, _why(outcome, receipt.reasons.get(message.id)))
        for (message, _), outcome in zip(taken, receipt.outcomes, strict=True)
    )
    return _json(Results([result or next(answers) for result in results]))


def _why(outcome: str, reason: str | None) -> str | None:
    return "another message has this id, and is kept" if outcome == "conflict" else reason


async def usage(server: Server, request: Request) -> Response:
    """GET /usage."""
    await server.authorize(request, "read")
    return await anyio.to_thread.run_sync(reading.usage, server.store, request.query_params)


async def messages(server: Server, request: Request) -> Response:
    """GET /messages."""
    await server.authorize(request, "read")
    return await anyio.to_thread.run_sync(reading.messages, server.store, request.query_params)


async def conversations(server: Server, request: Request) -> Response:
    """GET /conversations."""
    await server.authorize(request, "read")
    return await anyio.to_thread.run_sync(reading.conversations, server.store, request.query_params)


async def show_metrics(server: Server, request: Request) -> Response:
    """GET /metrics."""
    await server.authorize(request, "read")
    return Response(metrics.text(server.committer.waiting), media_type=metrics.CONTENT_TYPE)


async def healthz(server: Server, request: Request) -> Response:
    """GET /healthz: this process answers."""
    return _json({"status": "ok", "version": __version__})


async def readyz(server: Server, request: Request) -> Response:
    """GET /readyz: and its ledger takes messages."""
    await anyio.to_thread.run_sync(lambda: server.store.record([], timeout_s=2.0))
    return _json({"status": "ok"})


async def openapi(server: Server, request: Request) -> Response:
    """GET /openapi.json."""
    return _json(document())


ROUTES: tuple[tuple[str, str, _Handler], ...] = (
    ("POST", "/trackUsage", track),
    ("POST", "/trackUsage/batch", track_batch),
    ("GET", "/usage", usage),
    ("GET", "/messages", messages),
    ("GET", "/conversations", conversations),
    ("GET", "/metrics", show_metrics),
    ("GET", "/healthz", healthz),
    ("GET", "/readyz", readyz),
    ("GET", "/openapi.json", openapi),
)


def make_app(store: Store, *, open_to_local: bool = False) -> Starlette:
    """The application of one ledger."""
    servers: list[Server] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        servers.append(Server(store, open_to_local=open_to_local))
        yield
        await anyio.to_thread.run_sync(servers.pop().close)

    def route(method: str, path: str, handler: _Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            started = time.perf_counter()
            response = await _answer(handler, servers[0], request)
            metrics.answered(path, response.status_code, time.perf_counter() - started)
            return response

        return Route(path, endpoint, methods=[method], name=handler.__name__)

    async def unknown(request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        path = request.url.path
        if exc.status_code == 405:
            return _error(405, "method", f"{request.method} is not for {path}", dict(exc.headers or {}))
        return _error(exc.status_code, "path", f"{path!r} is not here; /openapi.json says what is")

    return Starlette(
        routes=[route(*each) for each in ROUTES], lifespan=lifespan, exception_handlers={HTTPException: unknown}
    )


def app_from_environment() -> Starlette:
    """The application of SPRYNG_DESTINATION, for the worker processes of `spryng serve`, or any ASGI server."""
    settings = resolve({})
    return make_app(open_store(settings.destination), open_to_local=os.environ.get(OPEN_VARIABLE) == "1")


async def _answer(handler: _Handler, server: Server, request: Request) -> Response:
    try:
        return await handler(server, request)
    except Refused as exc:
        return _error(exc.status, exc.field, exc.message, exc.headers)
    except ApiError as exc:
        return _error(400, exc.field, str(exc))
    except QueryError as exc:
        return _error(400, "query", str(exc))
    except StoreError as exc:
        log.error("the ledger does not answer: %s", exc)
        return _error(503, "ledger", "does not take or give messages now; try again", {"Retry-After": "2"})
    except Exception:
        log.exception("a bug of the server")
        return _error(500, "server", "has a bug; its log has more. What was sent may or may not be recorded")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _error(status: int, field: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"field": field, "message": message}}, status, headers)
