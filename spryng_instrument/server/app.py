"""The Track Usage API as an ASGI application: its routes, who may use them, and what an error looks like.

Invariant: 200 is said after the commit. Every other answer is JSON that names the field and what is wrong with it; what
went wrong in here is in the log, not in the answer.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
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
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from spryng_instrument import __version__
from spryng_instrument.api import MAX_MESSAGES, Batch, Result, Results, message_of
from spryng_instrument.errors import ApiError, QueryError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.prices import rate
from spryng_instrument.server import metrics, reading
from spryng_instrument.server.bodies import Refused, read_body
from spryng_instrument.server.committer import Committer
from spryng_instrument.server.keys import KeyRing
from spryng_instrument.server.openapi import document
from spryng_instrument.settings import resolve
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Outcome, Receipt, Store
from spryng_instrument.store.rows import is_same

log = logging.getLogger("spryng_instrument")

OPEN_VARIABLE = "SPRYNG_SERVE_OPEN"
"""Set by `spryng serve` where it listens on loopback only: while no key was ever made, none is asked for."""
TIDY_EVERY_S = 10.0
READY_S = 1.0
"""How long an answer of /readyz holds: who asks it needs no key, and asking takes the ledger's lock."""
READERS = 8
"""Questions that are answered at a time; others wait for them."""
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
        # Questions have threads of their own: however many and slow they are, messages are taken.
        self._readers = anyio.CapacityLimiter(READERS)
        self._one = anyio.CapacityLimiter(1)
        self._ready: tuple[float, StoreError | None] = (-READY_S, None)
        self._said_at = -1.0
        self._stop = threading.Event()
        threading.Thread(target=self._tidy, name="spryng-tidy", daemon=True).start()

    async def authorize(self, request: Request, scope: str) -> None:
        """Let a request through that has a key of that scope.

        Raises:
            Refused: it has none.
        """
        if not self.keys.fresh:
            await anyio.to_thread.run_sync(self.keys.refresh, limiter=self._one)
        if self._open_to_local and self.keys.empty:
            # A page in a browser on this machine can have a name of its own resolve to loopback.
            hosts = request.headers.getlist("host")
            host = re.fullmatch(r"([\w.-]+|\[[\w:]+\])(:\d*)?", hosts[0]) if len(hosts) == 1 else None
            if host is None or not is_loopback(host[1]):
                raise Refused(403, "Host", f"{', '.join(hosts)!r} is not this machine; make a key: spryng keys create")
            return
        key = self.keys.find(request.headers.get("authorization"))
        if key is None:
            raise Refused(
                401, "Authorization", "needs an API key that is known and not revoked, bare or as Bearer",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if scope not in key.scopes:
            raise Refused(403, "Authorization", f"this key has the scope {' and '.join(key.scopes)}, not {scope}")

    async def ask(self, question: Callable[[Store, QueryParams], Response], request: Request) -> Response:
        """Answer a question of somebody who may read."""
        await self.authorize(request, "read")
        return await anyio.to_thread.run_sync(question, self.store, request.query_params, limiter=self._readers)

    async def ready(self) -> None:
        """Whether the ledger takes messages.

        Raises:
            StoreError: it does not.
        """
        await anyio.to_thread.run_sync(self._look, limiter=self._one)
        _, problem = self._ready
        if problem is not None:
            raise problem

    def _look(self) -> None:
        if time.monotonic() - self._ready[0] < READY_S:
            return
        problem = None
        try:
            self.store.record([], timeout_s=2.0)
        except StoreError as exc:
            problem = exc
        self._ready = (time.monotonic(), problem)

    def complain(self, problem: StoreError) -> None:
        """Log that the ledger does not answer, once a second: not for each of thousands of requests."""
        if time.monotonic() - self._said_at > 1:
            self._said_at = time.monotonic()
            log.error("the ledger does not answer: %s", problem)

    async def record(self, messages: Sequence[tuple[Message, bool]]) -> Receipt:
        """Record messages, each with whether its time is its own. One that is repeated without is a duplicate."""
        receipt = await self.committer.record([message for message, _ in messages])
        doubtful = [
            message.id
            for (message, own_time), outcome in zip(messages, receipt.outcomes, strict=True)
            if outcome == "conflict" and not own_time
        ]
        if doubtful:
            known = await anyio.to_thread.run_sync(self.store.found, doubtful, limiter=self._readers)

            def outcome_of(message: Message, own_time: bool, outcome: Outcome) -> Outcome:
                first = known.get(message.id)
                if outcome != "conflict" or own_time or first is None:
                    return outcome
                return "duplicate" if is_same(first, replace(message, timestamp=first.timestamp)) else "conflict"

            outcomes = zip(messages, receipt.outcomes, strict=True)
            receipt = Receipt(tuple(outcome_of(*sent, outcome) for sent, outcome in outcomes), receipt.reasons)
        metrics.count(receipt, self.committer.waiting)
        return receipt

    def close(self) -> None:
        """Record what was accepted, and let go of the store."""
        self._stop.set()
        self.committer.close()
        self.store.close()

    def _tidy(self) -> None:
        """Set costs and sum up as messages come, so that no question has to wait for what was left to do."""
        while not self._stop.wait(TIDY_EVERY_S):
            try:
                rate(self.store)
                while self.store.roll_up() and not self._stop.is_set():
                    pass
            except StoreError:
                pass  # the next time may work; what matters is said by those who record
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
    return await server.ask(reading.usage, request)


async def messages(server: Server, request: Request) -> Response:
    """GET /messages."""
    return await server.ask(reading.messages, request)


async def conversations(server: Server, request: Request) -> Response:
    """GET /conversations."""
    return await server.ask(reading.conversations, request)


async def show_metrics(server: Server, request: Request) -> Response:
    """GET /metrics."""
    await server.authorize(request, "read")
    return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)


async def healthz(server: Server, request: Request) -> Response:
    """GET /healthz: this process answers."""
    return _json({"status": "ok", "version": __version__})


async def readyz(server: Server, request: Request) -> Response:
    """GET /readyz: and its ledger takes messages."""
    await server.ready()
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
        path = request.scope["path"]
        if exc.status_code == 405:
            return _error(405, "method", f"{request.method} is not for {path}", dict(exc.headers or {}))
        return _error(exc.status_code, "path", f"{path!r} is not here; /openapi.json says what is")

    app = Starlette(
        routes=[route(*each) for each in ROUTES], lifespan=lifespan, exception_handlers={HTTPException: unknown}
    )
    app.router.redirect_slashes = False  # to where the Host header says
    return app


async def busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer, as an ASGI application, where there are too many connections."""
    answer = _error(503, "server", "has too many connections; try again", {"Retry-After": "2", "Connection": "close"})
    await answer(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


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
        named = re.match(r"\w+", str(exc))
        return _error(400, named[0] if named else "query", str(exc))
    except StoreError as exc:
        server.complain(exc)
        return _error(503, "ledger", "does not take or give messages now; try again", {"Retry-After": "2"})
    except Exception:
        log.exception("a bug of the server")
        return _error(500, "server", "has a bug; its log has more. What was sent may or may not be recorded")


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _error(status: int, field: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"field": field, "message": message}}, status, headers)
