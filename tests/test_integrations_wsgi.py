"""WSGI: whatever a request makes the application do is its customer's, and between two pieces nobody's."""

from __future__ import annotations

import contextvars
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import flask
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.serving import make_server

from spryng_instrument import usage_context
from spryng_instrument.context import current_scope
from spryng_instrument.integrations.wsgi import UsageMiddleware, header

BY_HEADER = {"key": header("X-Customer"), "conversation_id": header("x-conversation")}


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope else None


def environ(**own: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    setup_testing_defaults(made)
    return {**made, "QUERY_STRING": "", **own}


def start_response(status: str, headers: Any, exc_info: Any = None) -> Any: ...


def of(customer: str, conversation: str = "c1") -> dict[str, str]:
    return {"x-customer": customer, "x-conversation": conversation}


@pytest.fixture
def asking(client: openai.OpenAI) -> Callable[[str], Any]:
    """Ask OpenAI for an embedding of a text."""
    return lambda text: client.embeddings.create(model="text-embedding-3-small", input=text)


@pytest.fixture
def shop(asking: Callable[[str], Any]) -> flask.Flask:
    """A Flask application that calls OpenAI in its views, and while it streams."""
    app = flask.Flask(__name__)

    @app.get("/plain")
    def plain() -> str:
        asking("view")
        return str(key())

    @app.get("/stream")
    def stream() -> flask.Response:
        def pieces() -> Iterator[str]:
            for _ in range(3):
                asking("piece")
                yield f"{key()} "

        return flask.Response(pieces())

    @app.get("/fail")
    def fail() -> str:
        raise ValueError(key())

    app.wsgi_app = UsageMiddleware(app.wsgi_app, **BY_HEADER, tags=["web"])  # type: ignore[method-assign]
    return app


def test_flask(instrument: Callable[..., Any], shop: flask.Flask) -> None:
    """A view and a streamed response are recorded with their customer, conversation and tags."""
    ledger = instrument()
    client = shop.test_client()
    assert client.get("/plain", headers=of("acme")).text == "acme"
    assert client.get("/stream", headers=of("bluepeak", "c2")).text == "bluepeak " * 3
    assert client.get("/plain").text == "None"
    assert [(message.key, message.conversation_id, message.tags) for message in ledger.messages()] == [
        ("acme", "c1", ("web",)),
        *[("bluepeak", "c2", ("web",))] * 3,
        (None, None, ("web",)),
    ]
    assert key() is None


def test_concurrent_requests_are_never_mixed(instrument: Callable[..., Any], shop: flask.Flask) -> None:
    """50 requests to a threaded server, each of its own customer: each streams and is recorded as its own."""
    ledger = instrument()
    customers = [f"customer-{number}" for number in range(50)]
    with serving(shop) as url, httpx.Client(timeout=60) as client, ThreadPoolExecutor(10) as pool:
        replies = list(pool.map(lambda name: client.get(f"{url}/stream", headers=of(name, f"c-{name}")), customers))
    assert [reply.text for reply in replies] == [f"{name} " * 3 for name in customers]
    found = sorted((message.key or "", message.conversation_id or "") for message in ledger.messages())
    assert found == sorted((name, f"c-{name}") for name in customers for _ in range(3))


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """werkzeug's server, a thread for each request."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@given(st.lists(st.integers(0, 2), min_size=3, max_size=20), st.integers(0, 5))
def test_interleaved_on_one_thread(order: list[int], length: int) -> None:
    """However a server takes turns between responses on one thread, each piece is its own customer's, between is none.

    Whether it reads them to their end or closes them early.
    """
    saw: dict[str, list[str | None]] = {name: [] for name in ("c0", "c1", "c2")}

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        mine = saw[environ["HTTP_X_CUSTOMER"]]
        try:
            for _ in range(length):
                mine.append(key())
                yield b"piece"
        finally:
            mine.append(key())

    wrapped = UsageMiddleware(app, key=header("x-customer"))
    responses: list[Any] = [wrapped(environ(HTTP_X_CUSTOMER=name), start_response) for name in saw]
    for turn in order:
        next(responses[turn], None)
        assert key() is None
    for response in responses:
        response.close()
        assert key() is None
    for name, found in saw.items():
        assert set(found) <= {name}
    assert all(found for turn, found in enumerate(saw.values()) if turn in order)


def test_closed_early(instrument: Callable[..., Any], asking: Callable[[str], Any]) -> None:
    """What a response does when it is closed, because its client has left, is its customer's too."""
    ledger = instrument()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        try:
            yield b"one"
            yield b"two"
        finally:
            asking("closing")

    response: Any = UsageMiddleware(app, key="acme")(environ(), start_response)
    assert next(response) == b"one"
    response.close()
    assert ledger.message().key == "acme"


def test_in_several_contexts() -> None:
    """Pieces that are read in one Context, and a close in another, raise nothing and leave nothing set."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield str(key()).encode()
        yield str(key()).encode()

    response: Any = UsageMiddleware(app, key="acme")(environ(), start_response)
    assert contextvars.copy_context().run(next, response) == b"acme"
    with usage_context("bluepeak", tags=["outer"]):
        assert next(response) == b"acme"
        assert key() == "bluepeak"
    contextvars.copy_context().run(response.close)
    assert key() is None


def test_what_is_made_is_handed_on_as_it_is() -> None:
    """Lists, which servers take the length of, and files, which they send their own way, are handed on themselves."""
    bodies: list[Any] = [[b"a", b"b"], (b"a",), io.BytesIO(b"a"), FileWrapper(io.BytesIO(b"a"))]
    for body in bodies:
        wrapped = UsageMiddleware(lambda environ, start_response, body=body: body, key="acme")
        assert wrapped(environ(**{"wsgi.file_wrapper": FileWrapper}), start_response) is body
    assert b"".join(UsageMiddleware(lambda *_: bodies[-1], key="acme")(environ(), start_response)) == b"a"


def test_a_body_that_is_closed_apart_from_its_iterator() -> None:
    """A body whose __iter__ makes the iterator, and which has the close(), as frameworks' responses do, is followed."""
    saw: list[tuple[str, str | None]] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            saw.append(("iter", key()))
            return iter([b"a", b"b"])

        def close(self) -> None:
            saw.append(("close", key()))

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Body()

    body: Any = validator(UsageMiddleware(validator(app), key="acme"))(environ(), lambda *_: lambda data: None)
    assert b"".join(body) == b"ab"
    body.close()
    assert saw == [("iter", "acme"), ("close", "acme")]


def test_errors_pass(shop: flask.Flask) -> None:
    """What the application raises, when called or half-way, is what the server sees; nothing stays set."""
    shop.testing = True
    with pytest.raises(ValueError, match="acme"):
        shop.test_client().get("/fail", headers=of("acme"))

    failure = ValueError("half-way")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        yield b"one"
        raise failure

    response: Any = UsageMiddleware(app, key="acme")(environ(), start_response)
    next(response)
    with pytest.raises(ValueError, match="half-way") as caught:
        next(response)
    assert caught.value is failure
    assert key() is None


def test_values_and_a_raising_callable(caplog: pytest.LogCaptureFixture) -> None:
    """Callables get the environ; one that raises, or is async, is said once, and the request goes on without it."""

    def app(environ: Any, start_response: Any) -> list[Any]:
        scope = current_scope()
        assert scope is not None
        return [scope.key, scope.conversation_id, scope.tags, scope.query, scope.properties]

    async def conversation(environ: Any) -> str:
        return "c1"

    wrapped = UsageMiddleware(
        app,
        key=lambda environ: environ["NO_SUCH"],
        conversation_id=conversation,  # type: ignore[arg-type]
        tags=lambda environ: [environ["REQUEST_METHOD"]],
        query="q",
        properties={"plan": "pro"},
    )
    for _ in range(3):
        assert wrapped(environ(), start_response) == [None, None, ("GET",), "q", {"plan": "pro"}]
    first, second = caplog.records
    assert "<lambda> raised KeyError('NO_SUCH'); its requests go on without a key" in first.message
    assert "conversation raised TypeError('it is async, and nothing here can await it')" in second.message


def test_header_and_baggage() -> None:
    """A header is found by its name; with baggage=True that header is read, and explicit values win over it."""
    assert header("X-Customer")(environ(HTTP_X_CUSTOMER=" acme ")) == "acme"
    assert header("X-Customer")(environ(HTTP_X_CUSTOMER="")) is None
    assert header("content-type")(environ(CONTENT_TYPE="text/plain")) == "text/plain"

    def app(environ: Any, start_response: Any) -> list[Any]:
        scope = current_scope()
        return [scope and (scope.key, scope.conversation_id, scope.tags)]

    sent = environ(HTTP_BAGGAGE="spryng.key=acme,spryng.conversation_id=c1,spryng.tags=a", HTTP_X_TENANT="tenant")
    read = UsageMiddleware(app, baggage=True, key=header("x-tenant"), tags=["web"])
    assert read(sent, start_response) == [("tenant", "c1", ("a", "web"))]
    assert read(environ(), start_response) == [(None, None, ("web",))]
    assert UsageMiddleware(app)(sent, start_response) == [(None, None, ())]
