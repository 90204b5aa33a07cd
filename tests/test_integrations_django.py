"""Django, sync and async: a request's calls are its user's, while it streams too."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import django
import httpx
import openai
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings

FOLDER = tempfile.TemporaryDirectory()
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "spryng_instrument.integrations.django.UsageMiddleware",
]
settings.configure(
    SECRET_KEY="practice",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(Path(FOLDER.name) / "db.sqlite3")}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    MIDDLEWARE=MIDDLEWARE,
)
django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.db import connections  # noqa: E402
from django.http import FileResponse, HttpResponse, StreamingHttpResponse  # noqa: E402
from django.test import AsyncClient, Client, RequestFactory, override_settings  # noqa: E402
from django.urls import path  # noqa: E402

from spryng_instrument.context import current_scope  # noqa: E402
from spryng_instrument.integrations.django import UsageMiddleware  # noqa: E402
from spryng_instrument.testing import PracticeServer  # noqa: E402

asking: Any = None
closed: list[str | None] = []


def key() -> str | None:
    scope = current_scope()
    return scope.key if scope else None


def plain(request: Any) -> HttpResponse:
    asking("view")
    return HttpResponse(str(key()))


async def async_plain(request: Any) -> HttpResponse:
    await asyncio.sleep(0.001)
    return HttpResponse(str(key()))


def stream(request: Any) -> StreamingHttpResponse:
    def pieces() -> Iterator[str]:
        try:
            for _ in range(3):
                asking("piece")
                yield f"{key()} "
        finally:
            closed.append(key())

    return StreamingHttpResponse(pieces())


async def async_stream(request: Any) -> StreamingHttpResponse:
    async def pieces() -> AsyncIterator[str]:
        try:
            for _ in range(int(request.GET.get("pieces", 3))):
                await asyncio.sleep(0.001)
                yield f"{key()} "
        finally:
            closed.append(key())

    return StreamingHttpResponse(pieces())


async def odd_stream(request: Any) -> StreamingHttpResponse:
    class Pieces:
        left = 3

        def __aiter__(self) -> Pieces:
            return self

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return f"{key()} "

    return StreamingHttpResponse(Pieces())


def file(request: Any) -> FileResponse:
    return FileResponse(Path(__file__).open("rb"))


urlpatterns = [
    path("plain", plain),
    path("async-plain", async_plain),
    path("stream", stream),
    path("async-stream", async_stream),
    path("odd-stream", odd_stream),
    path("file", file),
]


def customer_of(request: Any) -> str | None:
    """By dotted path: asks the database who the session's user is."""
    return request.user.username or None


async def async_customer_of(request: Any) -> str | None:
    user = await request.auser()
    return user.username or None


def by_header(request: Any) -> str | None:
    return request.headers.get("x-customer")


HERE = __name__


@pytest.fixture(scope="module", autouse=True)
def _database() -> Iterator[None]:
    call_command("migrate", verbosity=0)
    for name in ("acme", "bluepeak"):
        User.objects.create_user(name)
    yield
    connections.close_all()
    FOLDER.cleanup()


@pytest.fixture(autouse=True)
def _asking(client: openai.OpenAI) -> Iterator[None]:
    global asking
    asking = lambda text: client.embeddings.create(model="text-embedding-3-small", input=text)  # noqa: E731
    closed.clear()
    yield
    asking = None


def logged_in(name: str, kind: Any = Client) -> Any:
    client = kind()
    client.force_login(User.objects.get(username=name))
    return client


@pytest.mark.parametrize(
    "by", [f"{HERE}.customer_of", f"{HERE}.async_customer_of", customer_of], ids=["path", "async-path", "callable"]
)
def test_the_user_is_the_customer(by: Any, instrument: Callable[..., Any]) -> None:
    """Views and streams are recorded with the user that Django knows, by a path or a plain or async callable."""
    ledger = instrument()
    with override_settings(SPRYNG={"KEY": by, "CONVERSATION_ID": lambda request: request.path, "TAGS": ["web"]}):
        assert logged_in("acme").get("/plain").text == "acme"
        assert b"".join(logged_in("bluepeak").get("/stream")) == b"bluepeak " * 3
        assert Client().get("/plain").text == "None"
    assert [(message.key, message.conversation_id, message.tags) for message in ledger.messages()] == [
        ("acme", "/plain", ("web",)),
        *[("bluepeak", "/stream", ("web",))] * 3,
        (None, "/plain", ("web",)),
    ]
    assert key() is None


@pytest.mark.parametrize("by", [f"{HERE}.customer_of", f"{HERE}.async_customer_of"])
def test_the_user_under_asgi(by: str) -> None:
    """The same in async requests, where a plain callable may ask the database all the same."""

    async def main(client: Any) -> list[str]:
        return [
            (await client.get("/async-plain")).text,
            b"".join([piece async for piece in await client.get("/async-stream")]).decode(),
            (await client.get("/plain")).text,
        ]

    with override_settings(SPRYNG={"KEY": by}):
        assert async_to_sync(main)(logged_in("acme", AsyncClient)) == ["acme", "acme " * 3, "acme"]


def test_a_stream_that_is_closed_early(instrument: Callable[..., Any]) -> None:
    """Between two pieces of a stream nobody is set, and when it is closed early its end is its customer's."""
    ledger = instrument()
    with override_settings(SPRYNG={"KEY": by_header}):
        environ = Client()._base_environ(PATH_INFO="/stream", HTTP_X_CUSTOMER="acme")
        response = get_wsgi_application()(environ, lambda *_: None)
        pieces = iter(response)
        assert next(pieces) == b"acme "
        assert key() is None
        response.close()
    assert (closed, key()) == (["acme"], None)
    assert ledger.message().key == "acme"


async def test_a_client_that_leaves_an_async_stream() -> None:
    """When the client hangs up, the stream's end runs in its customer's context, and the server's task has none."""
    first, gone = asyncio.Event(), asyncio.Event()
    requests: list[Any] = [{"type": "http.request", "body": b""}]

    async def receive() -> Any:
        if not requests:
            await gone.wait()
            return {"type": "http.disconnect"}
        return requests.pop()

    async def send(message: Any) -> None:
        if message.get("body"):
            assert message["body"] == b"acme "
            first.set()

    scope = {"type": "http", "method": "GET", "path": "/async-stream", "query_string": b"pieces=100000"}
    with override_settings(SPRYNG={"KEY": by_header}):
        app = get_asgi_application()
        serving = asyncio.create_task(app({**scope, "headers": [(b"x-customer", b"acme")]}, receive, send))
        await first.wait()
        gone.set()
        await serving
    gc.collect()
    for _ in range(100):
        if closed:
            break
        await asyncio.sleep(0.01)
    assert (closed, key()) == (["acme"], None)


def test_a_stream_that_the_loop_closes(caplog: pytest.LogCaptureFixture) -> None:
    """A stream that is still open when its loop ends is closed with the loop, and nothing is said of it."""
    kept = []

    async def main() -> None:
        response = await AsyncClient().get("/async-stream", headers={"x-customer": "acme"})
        kept.append(aiter(response))
        assert await anext(kept[0]) == b"acme "

    with override_settings(SPRYNG={"KEY": by_header}):
        asyncio.run(main())
    assert len(closed) == 1
    assert not caplog.records


async def test_other_async_iterators_and_files() -> None:
    """An async iterator that is no generator streams within its context; a file is sent as Django does without us."""
    with override_settings(SPRYNG={"KEY": by_header}):
        response = await AsyncClient().get("/odd-stream", headers={"x-customer": "acme"})
        assert b"".join([piece async for piece in response]) == b"acme " * 3
    with override_settings(SPRYNG={"KEY": "acme"}):
        sent = UsageMiddleware(file)(RequestFactory().get("/file"))
        assert sent.file_to_stream is not None
        assert sent.getvalue() == Path(__file__).read_bytes()
        sent.close()


async def test_concurrent_async_requests_are_never_mixed() -> None:
    """50 async requests at once through Django's ASGI handler: each streams as its own customer."""
    customers = [f"customer-{number}" for number in range(50)]
    with override_settings(SPRYNG={"KEY": by_header}):
        transport = httpx.ASGITransport(get_asgi_application())
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            replies = await asyncio.gather(
                *(client.get("/async-stream", headers={"x-customer": name}) for name in customers)
            )
    assert [reply.text for reply in replies] == [f"{name} " * 3 for name in customers]
    gc.collect()
    assert closed
    assert set(closed) <= set(customers)


def test_concurrent_requests_are_never_mixed(instrument: Callable[..., Any], practice: PracticeServer) -> None:
    """50 requests through Django's WSGI handler, on ten threads: each streams and is recorded as its own."""
    ledger = instrument()
    customers = [f"customer-{number}" for number in range(50)]
    with override_settings(SPRYNG={"KEY": by_header}):
        transport = httpx.WSGITransport(get_wsgi_application())
        with httpx.Client(transport=transport, base_url="http://shop") as client, ThreadPoolExecutor(10) as pool:
            replies = list(pool.map(lambda name: client.get("/stream", headers={"x-customer": name}), customers))
    assert [reply.text for reply in replies] == [f"{name} " * 3 for name in customers]
    assert sorted(message.key or "" for message in ledger.messages()) == sorted(customers * 3)


def test_a_raising_callable_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A callable that raises is said once, and each request goes on without its value."""

    def customer(request: Any) -> str:
        raise LookupError("no such customer")

    with override_settings(SPRYNG={"KEY": customer, "QUERY": "q"}):
        client = Client()
        assert [client.get("/plain").text for _ in range(3)] == ["None"] * 3
    [record] = [record for record in caplog.records if record.name == "spryng_instrument"]
    assert "customer raised LookupError('no such customer')" in record.message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"KEY": "shop.usage.custmer_of"}, r"SPRYNG\['KEY'\] = 'shop.usage.custmer_of' cannot be imported"),
        ({"KEY": f"{HERE}.absent"}, "cannot be imported"),
        ({"CUSTOMER": "acme"}, "SPRYNG has no CUSTOMER; it may have: KEY, CONVERSATION_ID"),
    ],
    ids=["module", "name", "setting"],
)
def test_a_wrong_setting_is_said_at_start_up(setting: Any, said: str) -> None:
    """A misspelt path is no customer's name: Django does not start."""
    with override_settings(SPRYNG=setting), pytest.raises(ImproperlyConfigured, match=said):
        UsageMiddleware(lambda request: None)


def test_constants_baggage_and_no_setting() -> None:
    """Constants are taken as they are; baggage is read only if asked; without a setting nothing is set."""
    header = {"baggage": "spryng.key=acme"}
    for setting, found in (
        ({"KEY": "constant", "TAGS": "web", "PROPERTIES": {"plan": "pro"}}, "constant"),
        ({"BAGGAGE": True}, "acme"),
        ({"BAGGAGE": True, "KEY": by_header}, "acme"),
        ({}, "None"),
    ):
        with override_settings(SPRYNG=setting):
            assert Client().get("/plain", headers=header).text == found
    with contextlib.suppress(AttributeError):
        del settings.SPRYNG
    assert Client().get("/plain", headers=header).text == "None"
