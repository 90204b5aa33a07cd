"""The server while its ledger is slow, silent or asked for too much: messages are taken, and nobody waits for ever.

The application runs within the test, on a ledger that answers when the test says so.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from spryng_instrument.errors import StoreError
from spryng_instrument.server import answers, app, keys
from spryng_instrument.server.answers import Asking, BeingFound
from spryng_instrument.server.app import make_app
from spryng_instrument.server.keys import KeyRing
from spryng_instrument.store.base import ApiKey, Store
from spryng_instrument.store.postgres import PostgresStore
from spryng_instrument.store.postgres_connections import _CONNECTIONS, _KEPT
from spryng_instrument.store.sqlite import SqliteStore

from .servers import Postgres
from .serving import Answer, serving

SENT = {"key": "acme", "messageId": "m1", "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
PATIENCE_S = 20.0
"""How long a test waits for what must come."""


class Slow(SqliteStore):
    """A ledger whose questions wait for the test; but no longer than it has patience."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.go_on = threading.Event()
        self.keys_go_on = threading.Event()
        self.keys_go_on.set()
        self.asked: list[Any] = []
        """What usage was asked for, as the question was begun."""
        self.asked_for_keys = 0

    def usage_and_total(self, by: str, where: Any = None, **more: Any) -> Any:
        self.asked.append(where.key)
        self.go_on.wait(PATIENCE_S)
        return super().usage_and_total(by, where, **more)

    def api_keys(self, *, timeout_s: float | None = None) -> list[ApiKey]:
        self.asked_for_keys += 1
        if not self.keys_go_on.wait(PATIENCE_S if timeout_s is None else timeout_s):
            raise StoreError("is silent")
        return super().api_keys()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Slow]:
    store = Slow(tmp_path / "usage.db")
    store.record([])
    yield store
    store.go_on.set()
    store.keys_go_on.set()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


class Client:
    """Asks an application, as a server does."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def send(self, method: str, path: str, body: bytes = b"", gone: asyncio.Event | None = None) -> Answer:
        """The answer. *gone*: the client hangs up once that is set."""
        path, _, query = path.partition("?")
        headers = [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query.encode(), "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "root_path": "",
        }  # fmt: skip
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        said: dict[str, Any] = {}
        received = b""

        async def receive() -> Any:
            if gone is not None and gone.is_set():
                return {"type": "http.disconnect"}
            if waiting:
                return waiting.pop()
            await (gone or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def take(event: Any) -> None:
            nonlocal received
            said.update(event)
            received += event.get("body", b"")

        await asyncio.wait_for(self._app(scope, receive, take), PATIENCE_S)
        return Answer(said["status"], {name.decode(): value.decode() for name, value in said["headers"]}, received)

    async def get(self, path: str, gone: asyncio.Event | None = None) -> Answer:
        return await self.send("GET", path, gone=gone)

    async def post(self, **fields: Any) -> Answer:
        return await self.send("POST", "/trackUsage", json.dumps({**SENT, **fields}).encode())


@asynccontextmanager
async def asking(store: Store) -> AsyncIterator[Client]:
    """The application of a ledger; its questions go on at the end."""
    made = make_app(store, open_to_local=True)
    async with made.router.lifespan_context(made):
        try:
            yield Client(made)
        finally:
            if isinstance(store, Slow):
                store.go_on.set()
                store.keys_go_on.set()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what must come."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


# Keys.


async def test_known_keys_hold_while_they_are_read(store: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that is silent on its keys stops nobody whose key is known: they are read beside, once at a time."""
    monkeypatch.setattr(keys, "FRESH_S", 4.0)
    monkeypatch.setattr(keys, "READ_S", 1.0)
    async with asking(store) as client:
        assert (await client.post()).status == 200
        store.keys_go_on.clear()
        before, slowest, end = store.asked_for_keys, 0.0, time.monotonic() + 3.0
        while time.monotonic() < end:
            began = time.monotonic()
            statuses = {answer.status for answer in await asyncio.gather(*(client.post() for _ in range(5)))}
            slowest = max(slowest, time.monotonic() - began)
            assert statuses == {200}
            assert (await client.get("/readyz")).status == 200
            await asyncio.sleep(0.02)
        assert 1 <= store.asked_for_keys - before <= 2
        assert slowest < 0.9, "nobody waited for the keys"


def test_a_revoked_key_is_refused_in_time(store: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first request, too, after hours without one; while the ledger is silent, it is asked once, and holds."""
    monkeypatch.setattr(keys, "FRESH_S", 0.2)
    monkeypatch.setattr(keys, "READ_S", 0.05)
    made, text = keys.create(store, "app", ("ingest",))
    ring = KeyRing(store)
    ring.refresh()
    assert ring.find(text) == made
    keys.revoke(store, made.id)
    time.sleep(0.25)
    assert not ring.fresh, "the next request waits for the keys"
    store.keys_go_on.clear()
    before = store.asked_for_keys
    for _ in range(5):
        ring.refresh()
    assert store.asked_for_keys - before == 1
    assert ring.find(text) == made
    store.keys_go_on.set()
    time.sleep(0.25)
    ring.refresh()
    assert ring.find(text) is None


def test_keys_that_were_never_read(store: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many who wait for them in vain, one asks; and again after a while."""
    monkeypatch.setattr(keys, "READ_S", 0.05)
    monkeypatch.setattr(keys, "AGAIN_S", 0.3)
    store.keys_go_on.clear()
    ring = KeyRing(store)
    for _ in range(5):
        with pytest.raises(StoreError, match="silent"):
            ring.refresh()
    assert store.asked_for_keys == 1
    store.keys_go_on.set()
    time.sleep(0.35)
    ring.refresh()
    assert ring.fresh


# Questions.


async def test_slow_pages_keep_no_message_waiting(store: Slow) -> None:
    """However many readers wait for slow pages, a message is recorded, and one that is sent again is a duplicate."""
    async with asking(store) as client:
        assert (await client.post()).json()["status"] == "recorded"
        pages = [asyncio.create_task(client.get(f"/dashboard/keys?key=k{number}")) for number in range(app.READERS + 4)]
        await until(lambda: len(store.asked) == app.READERS)
        assert (await client.post(messageId="m2")).json()["status"] == "recorded"
        assert (await client.post()).json()["status"] == "duplicate"
        assert (await client.get("/readyz")).status == 200
        store.go_on.set()
        assert {page.status for page in await asyncio.gather(*pages)} == {200}


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The questions that requests wait for, because they are being found for others."""
    waited_for: list[Any] = []
    wait_for = Asking.wait_for

    async def counted(self: Asking, found: BeingFound) -> None:
        waited_for.append(found.question)
        await wait_for(self, found)

    monkeypatch.setattr(Asking, "wait_for", counted)
    return waited_for


@pytest.mark.parametrize("most", [answers.HELD_ROWS, 0], ids=["held", "too large to be held"])
async def test_a_page_that_is_reloaded_takes_one_reader(
    store: Slow, waiting: list[Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Who asks for a page that is being found waits for that, in nobody's way, and it is found once."""
    monkeypatch.setattr(answers, "HELD_ROWS", most)
    async with asking(store) as client:
        assert (await client.post()).status == 200
        pages = [asyncio.create_task(client.get("/dashboard/keys?preset=all")) for _ in range(3 * app.READERS)]
        await until(lambda: len(waiting) == len(pages) - 1)
        assert (await client.get("/messages")).status == 200
        store.go_on.set()
        shown = await asyncio.gather(*pages)
        assert {(page.status, b"acme" in page.body) for page in shown} == {(200, True)}
    assert len(store.asked) == 1


async def test_what_goes_wrong_is_told_to_all_who_wait(
    store: Slow, waiting: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks a ledger that does not answer again for each of them; who comes later does."""
    async with asking(store) as client:
        assert (await client.post()).status == 200
        right = store.usage_and_total

        def wrong(*given: Any, **more: Any) -> Any:
            right(*given, **more)
            raise StoreError("broken")

        monkeypatch.setattr(store, "usage_and_total", wrong)
        pages = [asyncio.create_task(client.get("/dashboard/keys?preset=all")) for _ in range(10)]
        await until(lambda: len(waiting) == len(pages) - 1)
        store.go_on.set()
        assert {page.status for page in await asyncio.gather(*pages)} == {503}
        assert len(store.asked) == 1
        monkeypatch.setattr(store, "usage_and_total", right)
        assert (await client.get("/dashboard/keys?preset=all")).status == 200


@pytest.mark.parametrize("fails", [False, True])
async def test_programs_that_ask_the_same(
    store: Slow, waiting: list[Any], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Of many programs that ask the same, one has it found, for all who came meanwhile: not what was begun before they
    asked, which may lack what they know to be recorded, or fail. They wait in nobody's way."""
    gates = [threading.Event(), threading.Event()]
    others = 3 * app.READERS

    def gated(*given: Any, **more: Any) -> Any:
        gate = gates[len(store.asked)]
        store.asked.append(given)
        answer = SqliteStore.usage_and_total(store, *given, **more)
        gate.wait(PATIENCE_S)
        if fails and gate is gates[0]:
            raise StoreError("broken")
        return answer

    monkeypatch.setattr(store, "usage_and_total", gated)
    async with asking(store) as client:
        first = asyncio.create_task(client.get("/usage"))
        await until(lambda: len(store.asked) == 1)
        assert (await client.post()).status == 200
        asked = [asyncio.create_task(client.get("/usage")) for _ in range(others)]
        await until(lambda: len(waiting) == others)
        assert (await client.get("/messages")).status == 200
        gates[0].set()
        await until(lambda: len(waiting) == others + others - 1)
        gates[1].set()
        found = await asyncio.gather(*asked)
        assert {(answer.status, answer.json()["total"]["messages"]) for answer in found} == {(200, 1)}
        assert (await first).status == (503 if fails else 200)
    assert len(store.asked) == 2


async def test_more_questions_than_can_wait(store: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked while enough waits is answered "later" at once, by the API and on pages; what waits is answered."""
    monkeypatch.setattr(app, "WAITING", 5)
    async with asking(store) as client:
        assert (await client.post()).status == 200
        sent = [asyncio.create_task(client.get(f"/usage?key=k{number}")) for number in range(app.READERS + 5)]
        await until(lambda: len(store.asked) == app.READERS)
        answer = await client.get("/usage")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert answer.error == "server: is busy: 5 questions wait for an answer; try again"
        page = await client.get("/dashboard")
        assert (page.status, page.headers["retry-after"]) == (503, "2")
        assert b"5 questions wait for an answer; try again" in page.body
        assert (await client.post(messageId="m2")).json()["status"] == "recorded"
        store.go_on.set()
        assert {answer.status for answer in await asyncio.gather(*sent)} == {200}
        assert (await client.get("/usage")).status == 200


@pytest.mark.parametrize("path", ["/usage?key={}", "/dashboard/keys?key={}"])
async def test_nobody_is_answered_who_has_gone(store: Slow, path: str) -> None:
    """A question is not put to the ledger if its client has hung up before its turn came."""
    gone = asyncio.Event()
    async with asking(store) as client:
        assert (await client.post()).status == 200
        first = [asyncio.create_task(client.get(path.format(f"k{number}"))) for number in range(app.READERS)]
        await until(lambda: len(store.asked) == app.READERS)
        later = [asyncio.create_task(client.get(path.format(f"gone{number}"), gone)) for number in range(5)]
        stays = asyncio.create_task(client.get(path.format("stays")))
        await asyncio.sleep(0.2)
        gone.set()
        store.go_on.set()
        assert {answer.status for answer in await asyncio.gather(*first, stays)} == {200}
        await asyncio.gather(*later)
    assert sorted(store.asked) == sorted([*(f"k{number}" for number in range(app.READERS)), "stays"])


async def test_pages_that_want_more_connections_than_there_are(postgres: Postgres) -> None:
    """Overviews ask two questions at a time. They do not block each other, nor anybody who records."""
    with postgres.ledger() as url, closing(PostgresStore(url)) as store, psycopg.connect(url) as other:
        async with asking(store) as client:
            assert (await client.post()).json()["status"] == "recorded"
            other.execute("LOCK TABLE rollups IN ACCESS EXCLUSIVE MODE")
            try:
                pages = [asyncio.create_task(client.get(f"/dashboard?tag=t{number}")) for number in range(app.READERS)]
                most = _CONNECTIONS - _KEPT
                blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted"
                await until(lambda: other.execute(blocked).fetchone() == (most,))
                assert (await client.post(messageId="m2")).json()["status"] == "recorded"
                assert (await client.post()).json()["status"] == "duplicate"
                assert (await client.get("/readyz")).status == 200
            finally:
                other.rollback()
            assert {page.status for page in await asyncio.gather(*pages)} == {200}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_ends_though_a_question_does_not(postgres: Postgres, workers: str, number: signal.Signals) -> None:
    """Once what was accepted is recorded, and questions had their time, the process ends; it waits for no thread."""
    with postgres.ledger() as url, closing(PostgresStore(url)) as store, psycopg.connect(url) as readers:
        with serving(url, "--workers", workers, LIMITS="serve.SHUTDOWN_S=4") as server, ThreadPoolExecutor(4) as pool:
            readers.execute("LOCK TABLE rollups IN ACCESS EXCLUSIVE MODE")
            for path in ("/usage", "/dashboard"):
                pool.submit(server.get, path)
            end = time.monotonic() + PATIENCE_S
            while readers.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (3,):
                assert time.monotonic() < end
                time.sleep(0.01)
            with psycopg.connect(url) as writers:
                writers.execute("LOCK TABLE writers IN ACCESS EXCLUSIVE MODE")
                sent = pool.submit(server.post, SENT)
                while writers.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() != (4,):
                    assert time.monotonic() < end
                    time.sleep(0.01)
                server.process.send_signal(number)
                time.sleep(0.3)
                assert server.process.poll() is None
            assert sent.result(PATIENCE_S).json()["status"] == "recorded"
            assert server.process.wait(PATIENCE_S) == 0, server.text()
        readers.rollback()
        assert store.total().messages == 1
