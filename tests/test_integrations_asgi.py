"""ASGI: whatever a request or websocket makes the application do is its customer's."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import BackgroundTasks, Depends, FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from spryng_instrument import usage_context
from spryng_instrument.context import current_scope
from spryng_instrument.integrations.asgi import UsageMiddleware, header
from spryng_instrument.testing import PracticeServer

BY_HEADER = {"key": header("X-Customer"), "conversation_id": header("x-conversation")}


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope else None


def of(customer: str, conversation: str = "c1") -> dict[str, str]:
    return {"x-customer": customer, "x-conversation": conversation}


@pytest.fixture
async def asking(practice: PracticeServer) -> AsyncIterator[Callable[[str], Any]]:
    """Ask OpenAI for an embedding of a text."""
    async with openai.AsyncOpenAI(base_url=practice.base_url, api_key="practice", max_retries=0) as client:

        async def ask(text: str) -> None:
            await client.embeddings.create(model="text-embedding-3-small", input=text)

        yield ask


@asynccontextmanager
async def calling(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client


@pytest.fixture
def shop(asking: Callable[[str], Any]) -> FastAPI:
    """An application that calls OpenAI in every place where one can."""
    app = FastAPI()
    app.add_middleware(UsageMiddleware, **BY_HEADER, tags=["web"])

    async def depends() -> AsyncIterator[None]:
        await asking("dependency")
        yield
        await asking("dependency's end")

    @app.get("/plain")
    async def plain(_: None = Depends(depends)) -> str | None:
        await asking("view")
        return key()

    @app.get("/threaded")
    def threaded() -> str | None:
        asyncio.run(asyncio.sleep(0))
        return key()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for _ in range(3):
                await asking("piece")
                await asyncio.sleep(0.001)
                yield f"{key()} "

        return StreamingResponse(pieces())

    @app.get("/threaded-stream")
    def threaded_stream() -> StreamingResponse:
        return StreamingResponse(f"{key()} " for _ in range(3))

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> str:
        tasks.add_task(asking, "background")
        return "soon"

    @app.websocket("/chat")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(f"{text}: {key()}")

    return app


async def test_every_place_of_an_application(instrument: Callable[..., Any], shop: FastAPI) -> None:
    """View, dependency, streamed body and background task are recorded with the customer, conversation and tags."""
    ledger = instrument()
    async with calling(shop) as client:
        assert (await client.get("/plain", headers=of("acme"))).json() == "acme"
        assert (await client.get("/stream", headers=of("bluepeak", "c2"))).text == "bluepeak " * 3
        assert (await client.get("/background", headers=of("cedar"))).json() == "soon"
        assert (await client.get("/threaded", headers=of("delta"))).json() == "delta"
        assert (await client.get("/threaded-stream", headers=of("delta"))).text == "delta " * 3
        assert (await client.get("/plain")).json() is None
    found = [(message.key, message.conversation_id, message.tags) for message in ledger.messages()]
    assert found == [
        *[("acme", "c1", ("web",))] * 3,
        *[("bluepeak", "c2", ("web",))] * 3,
        ("cedar", "c1", ("web",)),
        *[(None, None, ("web",))] * 3,
    ]
    assert current_scope() is None


async def test_concurrent_requests_are_never_mixed(instrument: Callable[..., Any], shop: FastAPI) -> None:
    """50 requests at once, each of its own customer: each streams its own, and each is recorded as its own."""
    ledger = instrument()
    customers = [f"customer-{number}" for number in range(50)]
    async with calling(shop) as client:
        replies = await asyncio.gather(*(client.get("/stream", headers=of(name, f"c-{name}")) for name in customers))
    assert [reply.text for reply in replies] == [f"{name} " * 3 for name in customers]
    found = sorted((message.key or "", message.conversation_id or "") for message in ledger.messages())
    assert found == sorted((name, f"c-{name}") for name in customers for _ in range(3))


def test_a_websocket_for_its_whole_life(shop: FastAPI) -> None:
    """Every message of a websocket is answered in its customer's context, two sockets at once in each its own."""
    with TestClient(shop) as client:
        connect = client.websocket_connect
        with connect("/chat", headers=of("acme")) as one, connect("/chat", headers=of("bluepeak")) as other:
            for text in ("hello", "again"):
                for socket, name in ((one, "acme"), (other, "bluepeak")):
                    socket.send_text(text)
                    assert socket.receive_text() == f"{text}: {name}"


async def test_a_client_that_leaves(instrument: Callable[..., Any], asking: Callable[[str], Any]) -> None:
    """When a client hangs up within a stream, what it got is recorded as its own, and the server goes on clean."""
    ledger = instrument()
    closed: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    after: list[str | None] = []

    async def view(request: Any) -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                while True:
                    await asking("piece")
                    yield "piece " * 1000
            finally:
                if not closed.done():
                    closed.set_result(key())

        return StreamingResponse(pieces())

    async def next_view(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(key()))

    inner = UsageMiddleware(Starlette(routes=[Route("/", view), Route("/next", next_view)]), **BY_HEADER)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await inner(scope, receive, send)
        finally:
            after.append(key())

    async with serving(app) as url, httpx.AsyncClient(timeout=60) as client:
        async with client.stream("GET", url, headers=of("acme")) as reply:
            async for _ in reply.aiter_bytes():
                break
        await asyncio.wait_for(asyncio.shield(closed), 10)
        assert (await client.get(f"{url}/next", headers=of("bluepeak"))).text == "bluepeak"
        assert (await client.get(f"{url}/next")).text == "None"
    assert {message.key for message in ledger.messages()} == {"acme"}
    assert set(after) == {None}


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[str]:
    """uvicorn, in this loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="error", ws="none"))
    server.capture_signals = _no_signals  # type: ignore[method-assign]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await running


class _no_signals:
    def __enter__(self) -> None: ...
    def __exit__(self, *exc: object) -> None: ...


async def test_closed_in_another_context() -> None:
    """A request whose task is cancelled, or whose steps run in several Contexts, raises nothing of ours."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})
        await asyncio.sleep(60)

    wrapped = UsageMiddleware(app, key="acme")
    started = asyncio.Event()

    async def send(message: Any) -> None:
        started.set()

    task = asyncio.create_task(wrapped({"type": "http", "headers": []}, None, send))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    driven: Any = wrapped({"type": "http", "headers": []}, None, send)
    contextvars.copy_context().run(driven.send, None)
    with usage_context("bluepeak"):
        driven.close()
        assert key() == "bluepeak"
    assert key() is None


async def test_values_are_constants_or_callables(caplog: pytest.LogCaptureFixture) -> None:
    """Each value is a constant or a plain or async callable of the ASGI scope; inside them, usage_context adds up."""
    saw: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with usage_context(tags=["inner"]):
            inner = current_scope()
            assert inner is not None
            saw.append((inner.key, inner.conversation_id, inner.tags, inner.query, inner.properties))

    async def conversation(scope: Any) -> str:
        await asyncio.sleep(0)
        return str(scope["path"])

    wrapped = UsageMiddleware(
        app,
        key="acme",
        conversation_id=conversation,
        tags=lambda scope: (tag for tag in ("a", "b")),
        query=lambda scope: None,
        properties=lambda scope: {"method": scope["method"]},
    )
    for path in ("/one", "/two"):
        await wrapped({"type": "http", "headers": [], "path": path, "method": "GET"}, None, None)
    assert saw == [("acme", path, ("a", "b", "inner"), None, {"method": "GET"}) for path in ("/one", "/two")]
    assert not caplog.records


async def test_a_raising_callable_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A callable that raises is said once, and each request goes on without that value, but with the others."""

    def customer(scope: Any) -> str:
        raise LookupError("no such customer")

    async def conversation(scope: Any) -> str:
        raise RuntimeError("neither")

    def tags(scope: Any) -> Iterator[str]:
        yield "a"
        raise ValueError("half-way")

    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse(f"{key()} {current_scope().query}"))])  # type: ignore[union-attr]
    wrapped = UsageMiddleware(app, key=customer, conversation_id=conversation, tags=tags, query="q")
    async with calling(wrapped) as client:
        for _ in range(3):
            assert (await client.get("/")).text == "None q"
    said = [record for record in caplog.records if record.name == "spryng_instrument"]
    assert [record.levelno for record in said] == [logging.ERROR] * 3
    assert "key=" in said[0].message
    assert "customer raised LookupError('no such customer')" in said[0].message
    assert "conversation raised RuntimeError('neither')" in said[1].message
    assert "tags raised ValueError('half-way')" in said[2].message


async def test_errors_of_the_application_pass() -> None:
    """What the application raises is what the server sees, and nothing stays set."""
    failure = ValueError("mine")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise failure

    with pytest.raises(ValueError, match="mine") as caught:
        await UsageMiddleware(app, key="acme")({"type": "http", "headers": []}, None, None)
    assert caught.value is failure
    assert key() is None


def test_lifespan_passes() -> None:
    """Start-up and shutdown belong to no request, so to no customer; what they share with requests arrives."""
    saw: list[str | None] = []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        saw.append(key())
        yield {"model": "gpt-4o-mini"}
        saw.append(key())

    async def view(request: Any) -> PlainTextResponse:
        return PlainTextResponse(f"{request.state.model} {key()}")

    app = UsageMiddleware(Starlette(routes=[Route("/", view)], lifespan=lifespan), key="acme")
    with TestClient(app) as client:
        assert client.get("/").text == "gpt-4o-mini acme"
    assert saw == [None, None]


@pytest.mark.parametrize(
    ("headers", "customer"),
    [
        ([(b"x-customer", b"acme")], "acme"),
        ([(b"a", b"b"), (b"X-Customer", b" S\xf6hne "), (b"x-customer", b"second")], "Söhne"),
        ([(b"x-customer", b"")], None),
        ([], None),
    ],
    ids=repr,
)
def test_header(headers: Any, customer: str | None) -> None:
    """A header is found whatever its capitals, read as latin-1, and is nothing where it is empty or not there."""
    assert header("X-customer")({"type": "http", "headers": headers}) == customer


async def test_baggage_is_outermost_and_only_if_asked() -> None:
    """With baggage=True the incoming header is read; explicit values win over it, and tags add up."""

    async def view(request: Any) -> PlainTextResponse:
        scope = current_scope()
        return PlainTextResponse(repr(scope and (scope.key, scope.conversation_id, scope.tags)))

    app = Starlette(routes=[Route("/", view)])
    both = [
        ("baggage", "spryng.key=acme,spryng.tags=a"),
        ("baggage", "spryng.conversation_id=c%2F1"),
        ("x-tenant", "b"),
    ]
    for wrapped, found in (
        (UsageMiddleware(app, baggage=True), ("acme", "c/1", ("a",))),
        (UsageMiddleware(app, baggage=True, key=header("x-tenant"), tags=["web"]), ("b", "c/1", ("a", "web"))),
        (UsageMiddleware(app, baggage=True, key=header("x-absent")), ("acme", "c/1", ("a",))),
        (UsageMiddleware(app), (None, None, ())),
    ):
        async with calling(wrapped) as client:
            assert (await client.get("/", headers=both)).text == repr(found)
