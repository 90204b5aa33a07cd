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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from spryng_instrument import __version__
from spryng_instrument.alerts import Alerts
from spryng_instrument.api import MAX_MESSAGES, Batch, Result, Results, message_of
from spryng_instrument.budgets import Budgets, budget_states, read_budgets
from spryng_instrument.errors import ApiError, NewerError, QueryError, StoreError
from spryng_instrument.message import Message
from spryng_instrument.prices import rate
from spryng_instrument.server import metrics, reading
from spryng_instrument.server.answers import Answers, Asking, BeingFound
from spryng_instrument.server.bodies import Refused, read_body
from spryng_instrument.server.committer import Committer
from spryng_instrument.server.dashboard import routes as dashboard_routes
from spryng_instrument.server.keys import KeyRing
from spryng_instrument.server.openapi import document
from spryng_instrument.settings import resolve
from spryng_instrument.store import open_store
from spryng_instrument.store.base import Outcome, Receipt, Store
from spryng_instrument.store.rows import is_same

log = logging.getLogger("spryng_instrument")
T = TypeVar("T")

OPEN_VARIABLE = "SPRYNG_SERVE_OPEN"
"""Set by `spryng serve` where it listens on loopback only: while no key was ever made, none is asked for."""
TIDY_EVERY_S = 10.0
LOOK_AGAIN_S = 3600.0
"""How long what another version of the prices had no price for is left alone."""
READY_S = 1.0
"""How long an answer of /readyz holds: who asks it needs no key, and asking takes the ledger's lock."""
READERS = 8
"""Questions that are answered at a time; others wait for them."""
WAITING = 32
"""Questions that may wait; more are answered with "later"."""
FOUND_S = 5.0
"""How long the ledger may take to say what a message is that was sent again."""
_Handler = Callable[["Server", Request], Awaitable[Response]]


class Server:
    """What the routes share.

    Args:
        store: the ledger.
        open_to_local: whether no key is asked for while none was ever made. Only for a server on loopback.
        budgets: whose alerts it tells.

    Raises:
        SettingsError: they have a webhook, and no secret to sign with.
    """

    def __init__(self, store: Store, *, open_to_local: bool = False, budgets: Budgets | None = None) -> None:
        self.store = store
        self.keys = KeyRing(store)
        self.committer = Committer(store)
        self.answers = Answers()
        self.dashboard = dashboard_routes.Dashboard(store)
        self._open_to_local = open_to_local
        self._budgets = budgets
        self._alerts = None if budgets is None else Alerts(store, budgets)
        # Questions have threads of their own: however many and slow they are, messages are taken.
        self._readers = anyio.CapacityLimiter(READERS)
        self._reading = anyio.CapacityLimiter(READERS)  # threads of those who have their turn: it never makes them wait
        self._finders = anyio.CapacityLimiter(2)
        self._key_readers = anyio.CapacityLimiter(1)
        self._lookers = anyio.CapacityLimiter(1)
        self._ready: tuple[float, StoreError | None] = (-READY_S, None)
        self._said_at = -1.0
        self._stop = threading.Event()
        threading.Thread(target=self._tidy, name="spryng-tidy", daemon=True).start()

    async def authorize(self, request: Request, scope: str) -> None:
        """Let a request through that has a key of that scope.

        Raises:
            Refused: it has none.
        """
        if await self.is_open():
            self.check_host(request)
            return
        key = self.keys.find(request.headers.get("authorization"))
        if key is None:
            raise Refused(
                401, "Authorization", "needs an API key that is known and not revoked, bare or as Bearer",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if scope not in key.scopes:
            raise Refused(403, "Authorization", f"this key has the scope {' and '.join(key.scopes)}, not {scope}")

    async def is_open(self) -> bool:
        """Whether nobody is asked for a key: none was made, and only this machine can reach the server."""
        if self.keys.fresh:
            self.keys.refresh_soon()
        else:
            await anyio.to_thread.run_sync(self.keys.refresh, limiter=self._key_readers)
        return self._open_to_local and self.keys.empty

    def check_host(self, request: Request) -> None:
        """Let a request through that was meant for this machine, where no key is asked for.

        Raises:
            Refused: a page in a browser on this machine had a name of its own resolve to loopback.
        """
        hosts = request.headers.getlist("host")
        host = re.fullmatch(r"([\w.-]+|\[[\w:]+\])(:\d*)?", hosts[0]) if len(hosts) == 1 else None
        if host is None or not is_loopback(host[1]):
            raise Refused(403, "Host", f"{', '.join(hosts)!r} is not this machine; make a key: spryng keys create")

    def check_room(self) -> None:
        """Let a question wait for a reader.

        Raises:
            Refused: too many do.
        """
        waiting = self._readers.statistics().tasks_waiting
        if waiting >= WAITING:
            text = f"is busy: {waiting} questions wait for an answer; try again"
            raise Refused(503, "server", text, {"Retry-After": "2"})

    async def read(self, question: Callable[[], T], request: Request | None = None) -> T:
        """Answer a question in a thread of the readers.

        Args:
            request: who asks, if nothing more is to be read from it: it may have gone when its turn comes.

        Raises:
            Refused: it has.
        """
        async with self._readers:
            if request is not None and await request.is_disconnected():
                raise Refused(408, "client", "has hung up")
            return await anyio.to_thread.run_sync(question, limiter=self._reading)

    async def find(self, question: Callable[[], T], answers: Asking, request: Request) -> T:
        """The same. While another request finds what is asked for, it does not take the place of a reader."""
        while True:
            try:
                return await self.read(question, request)
            except BeingFound as exc:
                await answers.wait_for(exc)

    async def ask(self, question: Callable[[Store, QueryParams], Response], request: Request) -> Response:
        """Answer a question of somebody who may read."""
        await self.authorize(request, "read")
        self.check_room()
        return await self.read(lambda: question(self.store, request.query_params), request)

    async def csv(self, parts: Iterator[str]) -> Response:
        """A file that is read and sent a part at a time, however large it is."""
        first = await self.read(lambda: next(parts))
        return StreamingResponse(self._parts(first, parts), media_type="text/csv; charset=utf-8")

    async def _parts(self, first: str, parts: Iterator[str]) -> AsyncIterator[str]:
        part: str | None = first
        while part is not None:
            yield part
            part = await self.read(lambda: next(parts, None))

    async def ready(self) -> None:
        """Whether the ledger takes messages.

        Raises:
            StoreError: it does not.
        """
        await anyio.to_thread.run_sync(self._look, limiter=self._lookers)
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
            find = partial(self.store.found, doubtful, timeout_s=FOUND_S)
            known = await anyio.to_thread.run_sync(find, limiter=self._finders)

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
        if self._alerts is not None:
            self._alerts.close()
        self.committer.close()
        self.store.close()

    def _tidy(self) -> None:
        """Set costs and sum up as messages come, so that no question has to wait; and tell of budgets."""
        again_at = 0.0
        while not self._stop.wait(TIDY_EVERY_S):
            try:
                again = time.monotonic() >= again_at
                if rate(self.store, within_s=TIDY_EVERY_S, again=again).reason is None and again:
                    again_at = time.monotonic() + LOOK_AGAIN_S
                until = time.monotonic() + TIDY_EVERY_S
                while time.monotonic() < until and not self._stop.is_set() and self.store.roll_up():
                    pass
                if self._alerts is not None and self._budgets is not None:
                    now = datetime.now(timezone.utc)
                    states = budget_states(self.store, self._budgets.budgets, now)
                    self._alerts.look(states, now, within_s=TIDY_EVERY_S)
                    if self._alerts.wants_to_post:
                        self._alerts.post()
            except StoreError:
                pass  # the next time may work; what matters is said by those who record
            except Exception:
                log.exception("costs could not be set, or budgets not be looked up")


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
        except NewerError:
            raise  # they are all of one process, which sends them all again
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
    """GET /usage: of many processes that ask the same for their budgets, one has it found."""
    answers = Asking(server.answers, time.monotonic())
    await server.authorize(request, "read")
    server.check_room()
    found = await server.find(partial(reading.usage, server.store, request.query_params, answers), answers, request)
    return found if isinstance(found, Response) else await server.csv(found)


async def messages(server: Server, request: Request) -> Response:
    """GET /messages."""
    return await server.ask(reading.messages, request)


async def conversations(server: Server, request: Request) -> Response:
    """GET /conversations."""
    return await server.ask(reading.conversations, request)


async def bills(server: Server, request: Request) -> Response:
    """GET /bills."""
    return await server.ask(reading.bills, request)


async def recorded(server: Server, request: Request) -> Response:
    """GET /recorded."""
    return await server.ask(reading.recorded, request)


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
    ("GET", "/recorded", recorded),
    ("GET", "/bills", bills),
    ("GET", "/metrics", show_metrics),
    ("GET", "/healthz", healthz),
    ("GET", "/readyz", readyz),
    ("GET", "/openapi.json", openapi),
)


def make_app(store: Store, *, open_to_local: bool = False, budgets: Budgets | None = None) -> Starlette:
    """The application of one ledger."""
    servers: list[Server] = []

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        servers.append(Server(store, open_to_local=open_to_local, budgets=budgets))
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
        if exc.status_code == 404 and (page := dashboard_routes.unknown(path)):
            return page
        if exc.status_code == 405:
            return _error(405, "method", f"{request.method} is not for {path}", dict(exc.headers or {}))
        return _error(exc.status_code, "path", f"{path!r} is not here; /openapi.json says what is")

    app = Starlette(
        routes=[route(*each) for each in (*ROUTES, *dashboard_routes.ROUTES)],
        lifespan=lifespan,
        exception_handlers={HTTPException: unknown},
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
    budgets = None if settings.budgets is None else read_budgets(settings.budgets)
    return make_app(
        open_store(settings.destination), open_to_local=os.environ.get(OPEN_VARIABLE) == "1", budgets=budgets
    )


async def _answer(handler: _Handler, server: Server, request: Request) -> Response:
    try:
        return await handler(server, request)
    except Refused as exc:
        return _error(exc.status, exc.field, exc.message, exc.headers)
    except ApiError as exc:
        return _error(412 if isinstance(exc, NewerError) else 400, exc.field, str(exc))
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
