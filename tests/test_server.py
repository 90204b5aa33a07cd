"""The server of the Track Usage API: real processes, real sockets, real kills. What it said 200 to is in the ledger."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import socket
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from http.client import HTTPException
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spryng_instrument.api import MAX_BYTES, MAX_MESSAGES, wire_of
from spryng_instrument.errors import StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store.base import GROUPS
from spryng_instrument.store.http import HttpDestination
from spryng_instrument.store.sqlite import SqliteStore

from .serving import Answer, Serving, serving, spryng

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


def ledger_of(path: Path) -> list[Message]:
    """What is in the ledger, oldest first."""
    return [row.message for row in SqliteStore(path, create=False).messages(limit=10**6).rows][::-1]


def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Path]]:
    """A server without keys, and its ledger; for tests that leave it as it is, but for messages of their own."""
    path = tmp_path_factory.mktemp("shared") / "usage.db"
    with serving(url(path), LIMITS="serve.HEADERS_S=1.5 bodies.BODY_S=1.5") as server:
        yield server, path
        assert "Traceback" not in server.text()


@pytest.fixture
def server(shared: tuple[Serving, Path]) -> Serving:
    return shared[0]


@pytest.fixture
def found(shared: tuple[Serving, Path]) -> Callable[..., list[Message]]:
    """The messages of a customer."""
    return lambda key: [message for message in ledger_of(shared[1]) if message.key == key]


def body(**fields: Any) -> dict[str, Any]:
    return {"key": "acme", "usage": USAGE, **fields}


# What is acknowledged is recorded, once.


def test_killed_after_200(tmp_path: Path) -> None:
    """A server that is killed the moment it said 200 has the message on the disk."""
    path = tmp_path / "usage.db"
    with serving(url(path)) as server:
        for round_ in range(3):
            assert server.post(body(messageId=f"m{round_}")).json() == {"id": f"m{round_}", "status": "recorded"}
            server.kill()
            assert [message.id for message in ledger_of(path)] == [f"m{each}" for each in range(round_ + 1)]
            if round_ < 2:
                server.start()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_any_moment(tmp_path: Path, workers: str) -> None:
    """Six clients send, each message until it is acknowledged, while the server is killed: each id is there once."""
    path = tmp_path / "usage.db"
    acknowledged: list[str] = []
    tries = Counter[str]()
    over = threading.Event()

    def client(name: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            ids = [f"{name}-{number}-{part}" for part in range(1 + number % 3)]
            messages = [body(messageId=id, key=f"c{name}") for id in ids]
            while True:
                tries[ids[0]] += 1
                with suppress(OSError, HTTPException):
                    if len(ids) == 1:
                        answer = server.post(messages[0])
                        outcomes = [answer.json()] if answer.status == 200 else []
                    else:
                        answer = server.post({"messages": messages}, "/trackUsage/batch")
                        outcomes = answer.json()["results"] if answer.status == 200 else []
                    if outcomes:
                        assert [each["id"] for each in outcomes] == ids
                        assert {each["status"] for each in outcomes} <= {"recorded", "duplicate"}
                        acknowledged.extend(ids)
                        break
                    assert answer.status == 503, answer
                time.sleep(0.02)

    with serving(url(path), "--workers", workers) as server, ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client, name) for name in range(6)]
        for _ in range(3):
            time.sleep(0.4)
            server.kill()
            server.start()
        over.set()
        for each in clients:
            each.result()
        assert server.stop() == 0
    ids = Counter(message.id for message in ledger_of(path))
    assert set(ids.values()) == {1}
    assert set(ids) == set(acknowledged)
    assert len(acknowledged) == len(set(acknowledged)) > 50
    total = SqliteStore(path).total()
    assert (total.messages, total.input_tokens) == (len(ids), 9 * len(ids))


@pytest.mark.parametrize("timestamp", [{}, {"timestamp": "2026-01-01T00:00:00Z"}], ids=["no time", "a time"])
def test_sent_again(server: Serving, found: Any, timestamp: dict[str, str]) -> None:
    """The same again is a duplicate, though its time was the server's. Another body is a conflict; the first stays."""
    name = f"again{len(timestamp)}"
    first = body(key=name, messageId=name, **timestamp)
    assert server.post(first).json() == {"id": name, "status": "recorded"}
    assert server.post(first).json() == {"id": name, "status": "duplicate"}
    assert server.post({**first, "tags": []}).json()["status"] == "duplicate"  # says the same
    for other in ({"query": "x"}, {"usage": {"prompt_tokens": 1}}, {"user": None, "latency": 5}):
        answer = server.post({**first, **other})
        assert (answer.status, answer.error.split(":")[0]) == (409, "messageId")
        assert name in answer.error
    if timestamp:
        assert server.post({**first, "timestamp": "2026-01-01T00:00:01Z"}).status == 409
    batch = [first, {**first, "query": "x"}, first]
    results = server.post({"messages": batch}, "/trackUsage/batch").json()["results"]
    assert [each["status"] for each in results] == ["duplicate", "conflict", "duplicate"]
    [kept] = found(name)
    assert (kept.query, kept.usage) == (None, Usage(9, 3, 12))


def test_the_same_at_once(server: Serving, found: Any) -> None:
    """Of ten that send the same at the same moment, one has recorded it; the others are told duplicate."""
    with ThreadPoolExecutor(10) as pool:
        said = [*pool.map(lambda _: server.post(body(key="at-once", messageId="at-once")).json(), range(10))]
    assert Counter(each["status"] for each in said) == {"recorded": 1, "duplicate": 9}
    assert len(found("at-once")) == 1


def test_a_batch_answers_for_each(server: Serving, found: Any) -> None:
    """Bad messages between good ones: each has its own answer, in order; the good ones are recorded."""
    batch: list[Any] = [
        body(key="batch", messageId="b1"),
        body(key=""),
        body(key="batch", messageId="b1"),
        {"key": "batch", "conversation_id": "c"},
        body(key="batch", messageId="b1", query="another"),
        7,
        "\0",
        body(key="batch", messageId="b2", query="a\0b"),
        None,
        [],
        body(key="batch", timestamp="2099-01-01T00:00:00Z"),
        body(key="batch", timestamp="0001-01-01T00:00:00+23:00"),
        body(key="batch", messageId="b3"),
    ]
    answer = server.post({"messages": batch}, "/trackUsage/batch")
    results = answer.json()["results"]
    assert answer.status == 200
    assert [each["status"] for each in results] == [
        "recorded", "refused", "duplicate", "refused", "conflict", "refused", "refused", "recorded", "refused",
        "refused", "refused", "refused", "recorded",
    ]  # fmt: skip
    assert [each["id"] for each in results] == [
        "b1", None, "b1", None, "b1", None, None, "b2", None, None, None, None, "b3"
    ]  # fmt: skip
    assert "key=''" in results[1]["error"]
    assert "conversation_id='c' is no field" in results[3]["error"]
    assert "is kept" in results[4]["error"]
    assert "1970" in results[11]["error"]
    assert all("error" in each for each in results if each["status"] not in ("recorded", "duplicate"))
    assert sorted(message.id for message in found("batch")) == ["b1", "b2", "b3"]
    assert next(message.query for message in found("batch") if message.id == "b2") == "a\\x00b"
    assert server.post({"messages": []}, "/trackUsage/batch").json() == {"results": []}


def test_messages_of_a_newer_process(server: Serving, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this server would leave out of a message holds its batch back, all of it, in the process that has it."""
    destination = HttpDestination(server.url, None)
    batch = [Message(f"newer-{number}", MONTHS[0], "chat", key="newer", writer="w", sequence=1) for number in range(2)]
    newer = {**msgspec.to_builtins(wire_of(batch[1])), "videoTokens": 7}
    with monkeypatch.context() as patched:
        patched.setattr(destination, "_body", lambda _: msgspec.json.encode({"messages": [wire_of(batch[0]), newer]}))
        with pytest.raises(StoreError, match=r"older than this process.* Update it .*videoTokens=7"):
            destination.record(batch)
    assert found("newer") == []
    answer = server.post({**newer, "usage": {"video_tokens": 7}})
    assert (answer.status, answer.json()["error"]["field"]) == (412, "videoTokens")
    assert destination.record(batch).outcomes == ("recorded", "recorded")
    destination.close()


def test_a_message_that_the_ledger_refuses(tmp_path: Path) -> None:
    """It is refused alone: in a batch, and among requests that share its transaction."""
    path = tmp_path / "usage.db"
    with serving(url(path)) as server:
        with closing(sqlite3.connect(path)) as db:  # a ledger with a rule of its own
            db.execute(
                "CREATE TRIGGER picky BEFORE INSERT ON messages WHEN NEW.key = 'evil' "
                "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
            )
        answer = server.post(body(key="evil"))
        assert (answer.status, answer.error.split(":")[0]) == (422, "body")
        batch = [body(messageId="g1"), body(key="evil", messageId="e1"), body(messageId="g2")]
        results = server.post({"messages": batch}, "/trackUsage/batch").json()["results"]
        assert [each["status"] for each in results] == ["recorded", "refused", "recorded"]
        with ThreadPoolExecutor(12) as pool:
            keys = ["evil" if number % 4 == 0 else "good" for number in range(24)]
            statuses = [*pool.map(lambda key: server.post(body(key=key)).status, keys)]
        assert statuses == [422 if key == "evil" else 200 for key in keys]
        assert "not this one" in server.text()  # the reason is for the log, not for whoever sent it
    assert Counter(message.key for message in ledger_of(path)) == {"acme": 2, "good": 18}


# Limits.


def test_how_many(server: Serving) -> None:
    """MAX_MESSAGES at a time, and not one more."""
    results = server.post({"messages": [body(key="many")] * MAX_MESSAGES}, "/trackUsage/batch").json()["results"]
    assert len({each["id"] for each in results if each["status"] == "recorded"}) == MAX_MESSAGES
    answer = server.post({"messages": [body(key="many")] * (MAX_MESSAGES + 1)}, "/trackUsage/batch")
    assert (answer.status, answer.error) == (413, "messages: are 1001, 1000 are allowed at a time")


def test_how_large(server: Serving, found: Any) -> None:
    """A body of MAX_BYTES is taken, plain or compressed; one byte more is not, and who sends it sees why."""

    def sized(size: int) -> bytes:
        rest = len(json.dumps(body(key="large", query="")).encode())
        return json.dumps(body(key="large", query="x" * (size - rest))).encode()

    assert server.post(sized(MAX_BYTES)).status == 200
    assert server.post(sized(MAX_BYTES), zipped=True).status == 200
    for zipped in (False, True):
        for size in (MAX_BYTES + 1, MAX_BYTES + 3_000_000):
            answer = server.post(sized(size), zipped=zipped)
            assert (answer.status, answer.error.split(":")[0]) == (413, "body")
    assert len(found("large")) == 2


def memory_kb(pid: int, name: str = "VmHWM") -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1])


def head(*lines: str, path: str = "/trackUsage", method: str = "POST", host: str = "127.0.0.1") -> bytes:
    kind = ["Content-Type: application/json"] if method == "POST" else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *kind, *lines, "", ""]).encode("latin-1")


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def answers(received: bytes) -> list[Answer]:
    """The answers of one connection, each with a Content-Length."""
    found = []
    while received:
        text, _, received = received.partition(b"\r\n\r\n")
        status, *lines = text.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        found.append(Answer(int(status.split()[1]), headers, received[:length]))
        received = received[length:]
    return found


GOOD = json.dumps(body(key="raw")).encode()
DEEP = b'{"a":' * 600 + b"1" + b"}" * 600
ZIPPED = gzip.compress(GOOD, mtime=0)
BOMB = gzip.compress(b" " * 100_000_000 + GOOD, mtime=0)
EMPTY_BLOCKS = gzip.compress(b"", mtime=0)[:10] + b"\x00\x00\x00\xff\xff" * 1_500_000  # inflates to nothing, for ever


@pytest.mark.parametrize(
    ("lines", "content", "status", "said"),
    [
        (["Content-Encoding: gzip"], BOMB, 413, "body: is larger"),
        (["Content-Encoding: gzip"], EMPTY_BLOCKS, 413, "body: is larger"),
        (["Content-Encoding: gzip"], ZIPPED[:-1], 400, "body: is gzip data that is cut off"),
        (["Content-Encoding: gzip"], ZIPPED[: len(ZIPPED) // 2], 400, "body: is gzip data that is cut off"),
        (["Content-Encoding: gzip"], b"", 400, "body: is gzip data that is cut off"),
        (["Content-Encoding: gzip"], ZIPPED * 2, 400, "body: has something after"),
        (["Content-Encoding: gzip"], ZIPPED + b"\0", 400, "body: has something after"),
        (["Content-Encoding: gzip"], GOOD, 400, "body: is no gzip data"),
        (["Content-Encoding: gzip"], ZIPPED[:-6] + b"abcdef", 400, "body: is no gzip data"),
        (["Content-Encoding: gzip"], zlib.compress(GOOD), 400, "body: is no gzip data"),
        (["Content-Encoding: deflate"], zlib.compress(GOOD), 415, "Content-Encoding: 'deflate'"),
        (["Content-Encoding: gzip, gzip"], gzip.compress(ZIPPED, mtime=0), 415, "Content-Encoding: 'gzip, gzip'"),
        (["Content-Encoding: gzip"] * 2, gzip.compress(ZIPPED, mtime=0), 415, "Content-Encoding: 'gzip, gzip'"),
        (["Content-Encoding: identity", "Content-Encoding: gzip"], ZIPPED, 415, "Content-Encoding: 'identity, gzip'"),
        (["Content-Encoding: br"], b"x", 415, "Content-Encoding: 'br'"),
        (["Content-Encoding: GZIP"], ZIPPED, 200, ""),
        (["Content-Encoding: identity"], GOOD, 200, ""),
        ([], ZIPPED, 400, "body is not JSON"),
        ([], b"", 400, "body is not JSON"),
        ([], b"\xff\xfe", 400, "body is not JSON"),
        ([], b'{"key": "\xed\xa0\x80"}', 400, "body is not JSON"),
        ([], b'{"key": "a\x00b"}', 400, "body is not JSON"),
        ([], b'{"key": "\\ud800"}', 400, "body is not JSON"),
        ([], b'{"key": NaN}', 400, "body is not JSON"),
        ([], b"[" * 200_000, 400, "body"),
        ([], b'{"key": "a", "openAiResponse": ' + b'{"a":' * 200_000, 400, "body"),
        ([], b'{"key": "a", "openAiResponse": {"usage": {"seconds": 1}, "tool_usage": ' + DEEP + b"}}", 400, "nested"),
        ([], b'{"key": "a", "writer": "w", "toolUsage": ' + DEEP + b"}", 400, "nested"),
        ([], b'{"key": "a", "usage": {"prompt_tokens": ' + b"[" * 900 + b"]" * 900 + b"}}", 400, ""),
        ([], b'{"key": "a", "query": ' + b"[" * 900 + b"]" * 900 + b"}", 400, ""),
        ([], b'{"key": "a", "customProperties": {"n": 1' + b"0" * 5000 + b"}}", 400, "customProperties"),
        ([], b'{"key": "a", "openAiResponse": {"usage": {"seconds":1},"model": "' + b"m" * 300 + b'"}}', 400, "model"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bodies(server: Serving, lines: list[str], content: bytes, status: int, said: str) -> None:
    """Whatever a body is, and however it is sent, it is taken, or refused by a JSON error; memory stays small."""
    before = memory_kb(server.pid)
    whole = server.raw(head(*lines, f"Content-Length: {len(content)}", "Connection: close") + content)
    parts = [content[start : start + 60_000] for start in range(0, len(content), 60_000)]
    split = server.raw(head(*lines, "Transfer-Encoding: chunked", "Connection: close") + chunked(*parts, b""))
    for received in (whole, split):
        [answer] = answers(received)
        assert answer.status == status, answer
        if status != 200:
            assert said in answer.error
    assert memory_kb(server.pid) - before < 60_000


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (head("Content-Length: 99999999999999999999"), {400}),
        (head("Content-Length: -1"), {400}),
        (head("Content-Length: 5", "Content-Length: 6") + GOOD, {400}),
        (head("Content-Length: 5", "Transfer-Encoding: chunked") + GOOD, {400}),
        (head("Transfer-Encoding: chunked") + b"zz\r\n", {400}),
        (head("Transfer-Encoding: chunked") + b"ffffffffffffffffff\r\n", {400}),
        (head("Transfer-Encoding: gzip") + GOOD, {400}),
        (head("Content-Length: 6000000"), {413, 408}),
        (head(f"Content-Length: {len(GOOD) - 1}") + GOOD, {400}),
        (head("X: " + "y" * 400_000), {431}),
        (head("X: " + "y" * 10_000_000), {431}),
        (head(*[f"X{each}: y" for each in range(20_000)]), {431}),
        (head(path="/" + "y" * 100_000), {431, 400}),
        (head("A\x00b: c"), {400}),
        (head("A: \x00"), {400}),
        (b"\r\n\r\n\x16\x03\x01\x02\x00", {400}),
        (b"\xff" * 50, {400}),
        (head("Connection: close", method="GET", path="/%zz%00%ff"), {404}),
        (head("Connection: close", method="GET", path="/usage?by=\xff"), {400}),
        (head("Connection: close", method="GET", path="/usage?%ff=%fe"), {400}),
        (head("Connection: close", method="DELETE", path="/usage"), {405}),
        (head("Connection: close", method="OPTIONS", path="*"), {404}),
        (head("Connection: close", method="OPTIONS", path="/trackUsage"), {405}),
        (head("Connection: close", method="GET", path="/usage/"), {404}),
        (head("Connection: close", method="GET", path="//evil.example/usage"), {404}),
        (head("Connection: close", "Authorization: \xff\xfe\x80", method="GET", path="/usage"), {200}),
        (head("Connection: close", "Expect: 100-continue", method="GET", path="/healthz"), {200}),
        (b"GET /usage HTTP/1.0\r\n\r\n", {403}),
        (b"GET /usage HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", {403}),
        (head("Connection: close", method="GET", path="/usage", host=""), {403}),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_requests_that_are_none(server: Serving, sent: bytes, statuses: set[int]) -> None:
    """Broken heads, lies about lengths and too much of everything: an error in JSON, and the connection ends."""
    received = answers(server.raw(sent, timeout_s=60))
    assert received[-1].status in statuses, received
    for answer in received:
        if answer.status != 200:
            assert answer.error


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1", True), ("localhost:1", True), ("LOCALHOST", True), ("[::1]:8321", True), ("127.0.0.2:8", True),
        ("evil.example", False), ("evil_host.example", False), ("127.0.0.1.evil.example", False), ("[", False),
        ("localhost.evil.example:80", False), ("127.0.0.1:80@evil.example", False), ("0.0.0.0", False),
        ("evil.example:99999", False), ("evil.example/127.0.0.1", False), ("a b", False), (":", False),
    ],
)  # fmt: skip
def test_no_other_name_leads_here(server: Serving, host: str, allowed: bool) -> None:
    """While no key is asked for, a page whose own name resolves to this machine can neither send nor read."""
    for request in (
        head("Connection: close", method="GET", path="/usage", host=host),
        head("Connection: close", f"Content-Length: {len(GOOD)}", host=host) + GOOD,
    ):
        [answer] = answers(server.raw(request))
        assert answer.status == (200 if allowed else 403)
        assert allowed or answer.error.startswith("Host: ")


def test_only_json_is_taken(server: Serving) -> None:
    """What a page can send to any server without asking, a form or text, is refused."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = server.send("POST", "/trackUsage", GOOD, {"Content-Type": kind})
        assert (answer.status, answer.error.split(":")[0]) == (415, "Content-Type")
    assert server.send("POST", "/trackUsage", GOOD, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200


@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        (b"", b"", None),  # says nothing at all
        (b"", b"\r\n", None),
        (b"POST /trackUsage HTTP/1.1\r\n", b"X: y\r\n", None),
        (head("Content-Length: 1000"), b"x", 408),
        (head("Transfer-Encoding: chunked"), b"1\r\n \r\n", 408),
        (head("Content-Encoding: gzip", "Content-Length: 1000") + ZIPPED[:10], b"", 408),
    ],
    ids=["silence", "blanks", "head", "body", "chunks", "gzip"],
)
def test_slow_clients_are_cut_off(server: Serving, first: bytes, then: bytes, status: int | None) -> None:
    """Whoever takes too long over a head or a body is hung up on, however steadily it goes on."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(first)
        sock.settimeout(0.1)
        received, until = b"", time.monotonic() + 8
        with suppress(ConnectionError):
            while time.monotonic() < until:
                if then:
                    sock.sendall(then)
                try:
                    part = sock.recv(65536)
                except TimeoutError:
                    continue
                if not part:
                    break
                received += part
    assert time.monotonic() < until, "it was not cut off"
    assert [answer.status for answer in answers(received)] == ([] if status is None else [status])


def test_slow_after_the_answer(server: Serving) -> None:
    """A connection is not kept by blanks between requests, nor by a body that goes on after its request was refused."""
    healthy = head(method="GET", path="/healthz")
    refused = head("Content-Length: 4000000", path="/nowhere")
    for sent, goes_on in ((healthy, b"\r\n"), (refused, b"x")):
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            sock.sendall(sent)
            assert sock.recv(65536)
            until = time.monotonic() + 12
            with suppress(ConnectionError):
                while time.monotonic() < until:
                    sock.sendall(goes_on)
                    time.sleep(0.1)
            assert time.monotonic() < until, "it was not cut off"


def test_pipelined_and_kept_alive(server: Serving, found: Any) -> None:
    """Requests that are sent at once on one connection are answered in order; a refused one does not end it."""
    bad = b'{"key": ""}'
    one = head(f"Content-Length: {len(GOOD)}") + GOOD.replace(b'"raw"', b'"pip"')
    wrong = head(f"Content-Length: {len(bad)}") + bad
    unread = head("Content-Encoding: br", f"Content-Length: {len(GOOD)}") + GOOD
    upgrade = head("Connection: Upgrade", "Upgrade: h2c", method="GET", path="/healthz")
    last = head("Connection: close", method="GET", path="/healthz")
    received = answers(server.raw(one + wrong + unread + one + wrong * 20 + one + last))
    assert [answer.status for answer in received] == [200, 400, 415, 200, *[400] * 20, 200, 200]
    assert answers(server.raw(upgrade + last))[0].status == 200
    assert len(found("pip")) == 3


# Keys.


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    """Without a key made, the server does not listen where others reach it, and says what to do."""
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        done = spryng("serve", "--host", host, "--destination", url(tmp_path / "usage.db"), cwd=tmp_path)
        assert done.returncode == 2
        assert "without a key" in done.stderr
        assert "spryng keys create NAME" in done.stderr
    with serving(url(tmp_path / "usage.db")) as server:
        assert "listens on this machine only" in server.text()


def create(path: Path, name: str, *scopes: str) -> str:
    options = [part for scope in scopes for part in ("--scope", scope)]
    done = spryng("keys", "create", name, *options, "--destination", url(path), cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_keys(tmp_path: Path) -> None:
    """From the first key on everything needs one, of the right scope; a revoked one is refused, and opens nothing."""
    path = tmp_path / "usage.db"
    with serving(url(path), LIMITS="keys.FRESH_S=0.1") as server:
        assert server.get("/usage").status == 200

        ingest, read, both = create(path, "app"), create(path, "Ann", "read"), create(path, "all", "read", "ingest")
        time.sleep(0.15)
        for path_ in (
            "/usage",
            "/messages",
            "/conversations",
            "/recorded",
            "/metrics",
            "/trackUsage",
            "/trackUsage/batch",
        ):
            answer = server.post(body(), path_) if "track" in path_ else server.get(path_)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.error.startswith("Authorization: ")
        for open_ in ("/healthz", "/readyz", "/openapi.json"):
            assert server.get(open_).status == 200

        assert server.post(body(), Authorization=ingest).status == 200
        assert server.post(body(), Authorization=f"Bearer {ingest}").status == 200
        assert server.post(body(), Authorization=f"bearer  {ingest} ").status == 200
        assert server.get("/usage", Authorization=read).status == 200
        assert server.post(body(), Authorization=both).status == server.get("/usage", Authorization=both).status == 200
        refused = server.get("/usage", Authorization=ingest)
        assert (refused.status, refused.error) == (403, "Authorization: this key has the scope ingest, not read")
        assert server.post(body(), Authorization=read).status == 403

        id = ingest.split("_")[1]
        other = both.split("_")[1]
        for wrong in (
            "", "x", "Bearer", "Bearer ", f"Basic {ingest}", ingest[:-1], ingest + "x", f"{ingest} x", id,
            f"spryng_{id}_", f"spryng_{other}_{ingest.split('_', 2)[2]}", ingest.swapcase(), f"Bearer Bearer {ingest}",
            "spryng__", "_" * 1000, "\xff\xfe", "spryng_00000000_" + "x" * 43,
        ):  # fmt: skip
            assert server.post(body(), Authorization=wrong).status == 401, wrong

        for key in (ingest, read, both):
            revoked = spryng("keys", "revoke", key.split("_")[1], "--destination", url(path), cwd=tmp_path)
            assert (revoked.returncode, "is revoked" in revoked.stderr) == (0, True)
        time.sleep(0.15)
        for key in (ingest, read, both, ""):
            assert (
                server.post(body(), Authorization=key).status == server.get("/usage", Authorization=key).status == 401
            )
        assert server.stop() == 0
        server.start()
        assert server.post(body()).status == 401
        assert "Every API key is revoked" in server.text()

        kept = b"".join(each.read_bytes() for each in tmp_path.iterdir() if each.is_file())
        for key in (ingest, read, both):
            secret = key.split("_", 2)[2]
            assert secret not in server.text()
            assert secret.encode() not in kept
    done = spryng("serve", "--host", "0.0.0.0", "--destination", url(path), cwd=tmp_path)
    assert done.returncode == 2  # a revoked key lets nobody in


def test_the_first_key_closes_every_worker(tmp_path: Path) -> None:
    """Each worker reads the keys for itself."""
    path = tmp_path / "usage.db"
    with serving(url(path), "--workers", "2", LIMITS="keys.FRESH_S=0.1") as server:
        key = create(path, "app", "ingest", "read")
        time.sleep(0.15)
        assert {server.post(body()).status for _ in range(20)} == {401}
        assert {server.post(body(), Authorization=key).status for _ in range(20)} == {200}


def test_commands_of_keys(tmp_path: Path) -> None:
    """create shows the key once, on stdout; list shows everything else; mistakes are said with what to do."""
    path = tmp_path / "usage.db"
    to = ("--destination", url(path))
    none = spryng("keys", "list", *to, cwd=tmp_path)
    assert (none.returncode, "there is no ledger" in none.stderr) == (1, True)
    for name in ("", "  ", "a\nb", "x" * 256, "\x1b[31mred"):
        done = spryng("keys", "create", name, *to, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "printable characters" in done.stderr
    assert spryng("keys", "create", "a", "--scope", "write", *to, cwd=tmp_path).returncode == 2

    done = spryng("keys", "create", "Bob's [bold]app", *to, cwd=tmp_path)
    text = done.stdout.strip()
    assert done.stdout.count("\n") == 1
    assert text.startswith("spryng_")
    assert text not in done.stderr
    assert "cannot be shown again" in done.stderr
    listed = spryng("keys", "list", *to, cwd=tmp_path)
    assert "Bob's [bold]app" in listed.stdout
    [record] = [json.loads(line) for line in spryng("keys", "list", "--json", *to, cwd=tmp_path).stdout.splitlines()]
    assert (record["id"], record["name"], record["scopes"]) == (text.split("_")[1], "Bob's [bold]app", "ingest")
    assert text.split("_", 2)[2] not in listed.stdout + json.dumps(record)
    for id in ("nope", "", "'; DROP TABLE api_keys; --"):
        gone = spryng("keys", "revoke", id, *to, cwd=tmp_path)
        assert (gone.returncode, "`spryng keys list` names them" in gone.stderr) == (2, True)
    first = spryng("keys", "revoke", record["id"], *to, cwd=tmp_path)
    again = spryng("keys", "revoke", record["id"], *to, cwd=tmp_path)
    assert first.returncode == again.returncode == 0


def test_without_the_extra(tmp_path: Path) -> None:
    """The pip line is said, by every command that needs it."""
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    done = spryng("serve", cwd=tmp_path, PYTHONPATH=paths)
    assert done.returncode == 2
    assert "pip install 'spryng-instrument[server]'" in done.stderr


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    """It is said at start, with its name; nothing is served."""
    not_ours = tmp_path / "theirs.db"
    not_ours.write_text("no ledger at all, but a text that is long enough to be taken for something")
    for place in (not_ours, tmp_path / "theirs.db" / "usage.db", Path("/proc/usage.db")):
        done = spryng("serve", "--destination", url(place), cwd=tmp_path)
        assert done.returncode == 1
        assert str(place.name) in done.stderr
        assert "Traceback" not in done.stderr


# Questions.

MONTHS = [datetime(2026, 9, 30, 23, 30, tzinfo=timezone.utc), datetime(2026, 10, 31, 12, tzinfo=timezone.utc)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, str]]:
    """A server with a ledger of 120 messages of all kinds."""
    path = tmp_path_factory.mktemp("asked") / "usage.db"
    messages = [
        Message(
            new_id(), MONTHS[number % 2] + timedelta(minutes=7 * (number // 3)), "chat.completions",
            status=("ok", "ok", "error", "incomplete", "cancelled")[number % 5],  # type: ignore[arg-type]
            key=("a", "b", None, "=1+2", "o'c; --", "50%_")[number % 6],
            conversation_id=(None, "c1", "c2", "%")[number % 4], tags=(("t", "u"), ("t",), ())[number % 3],
            response_model=("gpt-4o-mini", "gpt-4o", "unheard-of")[number % 3],
            usage=None if number % 7 == 0 else Usage(number, number * 2, number * 3, cached_tokens=0),
        )
        for number in range(120)
    ]  # fmt: skip
    SqliteStore(path).record(messages)
    with serving(url(path)) as server:
        yield server, url(path)
        assert "Traceback" not in server.text()


FILTERS = [
    ("", []),
    ("key=a", ["--key", "a"]),
    ("no_key=true", ["--no-key"]),
    ("tag=t&tag=u", ["--tag", "t", "--tag", "u"]),
    ("model=gpt-4o&conversation=c1", ["--model", "gpt-4o", "--conversation", "c1"]),
    ("month=2026-10&zone=Asia/Kolkata", ["--month", "2026-10", "--tz", "Asia/Kolkata"]),
    ("since=2026-10-01&until=2026-10-31T14:00&zone=America/Sao_Paulo",
     ["--since", "2026-10-01", "--until", "2026-10-31T14:00", "--tz", "America/Sao_Paulo"]),
]  # fmt: skip


@pytest.mark.parametrize("by", GROUPS)
def test_usage_is_what_the_command_says(asked: tuple[Serving, str], tmp_path: Path, by: str) -> None:
    """GET /usage and `spryng usage` give the same, in JSON and CSV, for every filter."""
    server, destination = asked
    for query, options in FILTERS[:: 1 if by == "key" else 3]:
        said = spryng("usage", "--by", by, *options, "--json", "--destination", destination, cwd=tmp_path)
        answer = server.get(f"/usage?by={by}&{query}")
        assert answer.json() == json.loads(said.stdout)
        assert answer.json()["rows"]
    said = spryng("usage", "--by", by, "--format", "csv", "--destination", destination, cwd=tmp_path)
    answer = server.get(f"/usage?by={by}&format=csv")
    assert answer.body.decode() == said.stdout
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert len([*csv.reader(io.StringIO(said.stdout))]) > 1


def test_usage_of_more_conversations_than_one_asks_for(tmp_path: Path) -> None:
    """By conversation, the 1,000 that cost the most, and that there are more; CSV has all."""
    path = tmp_path / "usage.db"
    SqliteStore(path).record(
        [
            Message(new_id(), MONTHS[0], "custom", key=f"k{n % 4}" if n % 4 else None, conversation_id=f"c{n}")
            for n in range(1010)
        ]
    )
    with serving(url(path)) as server:
        answer = server.get("/usage?by=conversation").json()
        assert (len(answer["rows"]), answer["more"], answer["total"]["messages"]) == (1000, True, 1010)
        answer = server.get("/usage?by=conversation&limit=1010").json()
        assert (len(answer["rows"]), answer["more"]) == (1010, False)
        assert len(server.get("/usage?by=conversation&limit=5&format=csv").body.splitlines()) == 6
        whole = server.get("/usage?by=conversation&format=csv").body
        assert server.get("/dashboard/usage.csv?by=conversation&preset=all").body == whole
        assert len(whole.splitlines()) == 1011
        answer = server.get("/usage?by=key&limit=0")
        assert (answer.status, answer.json()["error"]["field"]) == (400, "limit")


@pytest.mark.parametrize("path", ["messages", "conversations"])
def test_pages_visit_each_once(asked: tuple[Serving, str], path: str) -> None:
    """Page by page, of any size, each is there once and in order, whatever is asked for."""
    server, _ = asked
    for query in ("", "&key=a", "&tag=t&zone=Asia/Kolkata"):
        whole = server.get(f"/{path}?limit=1000{query}").json()
        assert whole["next"] is None
        assert len(whole[path]) == len({json.dumps(each, sort_keys=True) for each in whole[path]}) > 0
        for limit in (1, 7, 60):
            rows, after = [], ""
            while after is not None:
                page = server.get(f"/{path}?limit={limit}{query}{after and f'&after={after}'}").json()
                assert len(page[path]) == limit or page["next"] is None
                rows += page[path]
                after = page["next"]
            assert rows == whole[path]


def test_a_page_of_long_messages_ends_early(tmp_path: Path) -> None:
    """A page has no more bytes than a request may have, or a few messages; `next` goes on from there."""
    path = tmp_path / "usage.db"
    store = SqliteStore(path)
    ids = [new_id() for _ in range(300)]
    store.record([Message(id, MONTHS[0], "custom", key="a", query="x" * 100_000) for id in ids])
    with serving(url(path)) as server:
        seen: list[str] = []
        after = ""
        while after is not None:
            page = server.get(f"/messages?limit=1000{after and f'&after={after}'}")
            assert len(page.body) < 2 * MAX_BYTES + 10_000
            seen += [each["id"] for each in page.json()["messages"]]
            after = page.json()["next"]
    assert seen == ids[::-1]


@pytest.mark.parametrize(
    ("query", "field", "value"),
    [
        ("by=customer", "by", "'customer'"), ("by=", "by", "one of"), ("by=key&by=tag", "by", "2 times"),
        ("nonsense=1", "nonsense", "'1'"), ("=1", "query", "'1'"), ("format=xml", "format", "'xml'"),
        ("zone=Mars/Base", "zone", "Mars/Base"), ("zone=../../etc/passwd", "zone", "unknown"),
        ("zone=%00", "zone", "NUL"), ("zone=America", "zone", "America"),
        ("since=soon", "since", "'soon'"), ("since=2026-02-30", "since", "2026-02-30"), ("since=", "since", "''"),
        ("since=9999-12-31&zone=America/New_York", "since", "9999-12-31"),
        ("until=0001-01-01&zone=Asia/Tokyo", "until", "0001-01-01"),
        ("since=999999w", "since", "999999w"), ("month=2026-13", "month", "2026-13"),
        ("month=9999-12", "month", "9999-12"),
        ("month=2026-10&since=today", "month", "since"), ("since=2026-10-02&until=2026-10-01", "since", "2026-10-01"),
        ("key=a&no_key=true", "key", "'a'"), ("no_key=yes", "no_key", "'yes'"), ("key=a%00b", "key", "NUL"),
        ("&".join(f"tag={each}" for each in range(2000)), "tag", "2000"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_questions_that_cannot_be(asked: tuple[Serving, str], query: str, field: str, value: str) -> None:
    """400, with the parameter, its value, and what is allowed."""
    answer = asked[0].get(f"/usage?{query}")
    assert answer.status == 400, answer
    assert answer.json()["error"]["field"] == field
    assert value in answer.error


@pytest.mark.parametrize("path", ["messages", "conversations"])
def test_pages_that_cannot_be(asked: tuple[Serving, str], path: str) -> None:
    """A limit or a mark that is none is said so."""
    for limit in ("0", "-1", "1001", "ten", "1e2", "%EF%BC%91", "000000000100000000", "9" * 30, "1.0", " 1"):
        answer = asked[0].get(f"/{path}?limit={limit.replace(' ', '%20')}")
        assert (answer.status, answer.json()["error"]["field"]) == (400, "limit"), limit
    for mark in ("x", "1_", "_1", "99999999999999999999_x", "%00", "WzFd", "1_%00", "WzEsMSwieCIsInkiXQ", "W10="):
        answer = asked[0].get(f"/{path}?after={mark}")
        assert (answer.status, answer.json()["error"]["field"]) == (400, "after"), (mark, answer)


NASTY = ("'", '"', "' OR '1'='1", "a'; DROP TABLE messages; --", "%", "_", "a%", "[a]", "*", "\\", "?", ":1", "{}",
         "🦊",
         "a\n", "..", "1) OR (1=1", "x" * 3000)  # fmt: skip


def test_no_sql_from_input(asked: tuple[Serving, str]) -> None:
    """Whatever is asked for is compared, never run, and never a pattern: there is just no match."""
    from urllib.parse import quote

    server, _ = asked
    for text in NASTY:
        for name in ("key", "tag", "model", "conversation"):
            if (name, text) == ("conversation", "%"):
                continue  # there is one of that name
            answer = server.get(f"/usage?by=month&{name}={quote(text)}")
            assert (answer.status, answer.json()["rows"]) == (200, []), (name, text)
            assert server.get(f"/messages?{name}={quote(text)}").json() == {"messages": [], "next": None}
        for name in ("by", "zone", "since", "until", "month", "format", "no_key", "limit", "after", text):
            answer = server.get(f"/messages?{quote(name)}={quote(text)}")
            assert answer.status == 400, (name, text)
            assert answer.error
    assert {row["conversation"] for row in server.get("/conversations?conversation=%25").json()["conversations"]} == {
        "%"
    }
    assert {row["key"] for row in server.get("/usage?key=o%27c%3B%20--").json()["rows"]} == {"o'c; --"}
    assert server.get("/usage").json()["total"]["messages"] > 50


# Operations.


def test_a_locked_ledger(tmp_path: Path) -> None:
    """Not ready, and "later" for messages, while another process holds the ledger; questions are answered; then on."""
    path = tmp_path / "usage.db"
    with serving(url(path), LIMITS="committer.TIMEOUT_S=0.3 app.READY_S=0.0") as server:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            answer = server.get("/readyz")
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert answer.error.startswith("ledger: ")
            assert str(tmp_path) not in answer.error
            assert server.get("/healthz").json()["status"] == "ok"
            assert server.get("/usage").status == 200
            for sent, where in ((body(messageId="m1"), "/trackUsage"), ({"messages": [body()]}, "/trackUsage/batch")):
                answer = server.post(sent, where)
                assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            db.execute("ROLLBACK")
        assert server.get("/readyz").status == 200
        assert server.post(body(messageId="m1")).json()["status"] == "recorded"
        assert str(path) in server.text()
    assert [message.id for message in ledger_of(path)] == ["m1"]


def test_more_than_can_wait(tmp_path: Path) -> None:
    """What comes while enough waits is answered "later" at once; what was accepted is recorded."""
    path = tmp_path / "usage.db"
    with serving(url(path), LIMITS="committer.WAITING=30 committer.TOGETHER=10 committer.TIMEOUT_S=20.0") as server:  # noqa: SIM117
        with closing(sqlite3.connect(path, isolation_level=None)) as db, ThreadPoolExecutor(50) as pool:
            db.execute("BEGIN IMMEDIATE")
            sent = [pool.submit(server.post, body()) for _ in range(50)]
            until = time.monotonic() + 60
            while sum(each.done() for each in sent) < 10 and time.monotonic() < until:
                time.sleep(0.02)
            early = [each.result() for each in sent if each.done()]
            assert {answer.status for answer in early} == {503}
            assert {answer.headers["retry-after"] for answer in early} == {"2"}
            db.execute("ROLLBACK")
            statuses = Counter(each.result().status for each in sent)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= 30
    assert len(ledger_of(path)) == statuses[200]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_finishes_what_was_accepted(tmp_path: Path, workers: str) -> None:
    """Requests in flight are recorded and answered; then it ends with 0. No new ones are taken meanwhile."""
    path = tmp_path / "usage.db"
    with serving(url(path), "--workers", workers) as server, ThreadPoolExecutor(8) as pool:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            sent = [pool.submit(server.post, body(messageId=f"m{number}")) for number in range(8)]
            time.sleep(2.0)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            assert server.process.poll() is None
            db.execute("ROLLBACK")
        assert {each.result().json()["status"] for each in sent} == {"recorded"}
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.text()
        with pytest.raises(ConnectionError):
            server.get("/healthz")
    assert len(ledger_of(path)) == 8


def test_sigint_ends_it_too(tmp_path: Path) -> None:
    """Ctrl-C: no traceback."""
    with serving(url(tmp_path / "usage.db")) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) in (0, 130)
        assert "Traceback" not in server.text()


def test_a_client_that_does_not_wait(tmp_path: Path) -> None:
    """Whoever leaves before the answer is recorded once, and finds a duplicate when it asks again."""
    path = tmp_path / "usage.db"
    with serving(url(path)) as server:
        content = json.dumps(body(messageId="left")).encode()
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.sendall(head(f"Content-Length: {len(content)}") + content)
                time.sleep(0.3)
            db.execute("ROLLBACK")
        assert server.post(body(messageId="left")).json()["status"] in ("duplicate", "recorded")
        assert (
            server.raw(head(f"Content-Length: {len(content)}") + content[:-5], half_close=True, timeout_s=30)
            is not None
        )
        assert "Traceback" not in server.text()
    assert [message.id for message in ledger_of(path)] == ["left"]


def test_metrics_of_all_workers(tmp_path: Path) -> None:
    """Counts are those of all workers, wherever they are asked for; nothing in them names a customer."""
    with serving(url(tmp_path / "usage.db"), "--workers", "2") as server:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda number: server.post(body(key="secret-customer", messageId=f"m{number % 20}")), range(40)
                )
            )
        server.post({"messages": [body(messageId="m1", query="other"), body()]}, "/trackUsage/batch")
        for _ in range(6):
            assert server.metric("spryng_messages_total", outcome="recorded") == 21
            assert server.metric("spryng_messages_total", outcome="duplicate") == 20
            assert server.metric("spryng_messages_total", outcome="conflict") == 1
            assert server.metric("spryng_request_seconds_count", path="/trackUsage", status="200") == 40
            assert server.metric("spryng_waiting_messages") == 0
        assert b"secret-customer" not in server.get("/metrics").body
        assert server.stop() == 0


def test_a_worker_dies(tmp_path: Path) -> None:
    """The others go on, and it is replaced; every acknowledged message is there."""
    path = tmp_path / "usage.db"
    with serving(url(path), "--workers", "2") as server:
        first = server.workers()
        assert len(first) == 2
        acknowledged = []
        for number in range(60):
            if number == 10:
                os.kill(first[0], signal.SIGKILL)
            with suppress(OSError, HTTPException):
                acknowledged.append(server.post(body(messageId=f"m{number}")).json()["id"])
        until = time.monotonic() + 90
        while len(server.workers()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert first[0] not in server.workers()
        assert len(server.workers()) == 2
        assert {server.metric("spryng_waiting_messages") for _ in range(4)} == {0}
        assert server.stop() == 0
    assert len(acknowledged) >= 58
    assert set(acknowledged) <= {message.id for message in ledger_of(path)}


def test_questions_do_not_keep_messages_waiting(tmp_path: Path) -> None:
    """Dozens of readers who take nothing of what they asked for do not stop a message from being recorded."""
    path = tmp_path / "usage.db"
    SqliteStore(path).record([Message(new_id(), MONTHS[0], "custom", key="a", query="x" * 50_000) for _ in range(100)])
    with serving(url(path), LIMITS="serve.ANSWER_S=3.0") as server:
        readers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        try:
            for reader in readers:
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                reader.sendall(head(method="GET", path="/messages?limit=1000"))
            assert server.post(body()).status == 200
            until = time.monotonic() + 90
            while (status := server.get("/usage").status) == 503 and time.monotonic() < until:
                time.sleep(0.1)  # questions may be told "later" while the readers' are answered; messages never are
            assert status == 200
            while time.monotonic() < until:  # and they do not stay
                if len(os.listdir(f"/proc/{server.pid}/fd")) < 40:
                    break
                time.sleep(0.1)
            assert time.monotonic() < until
        finally:
            for reader in readers:
                reader.close()


def test_too_many_connections(tmp_path: Path) -> None:
    """More connections than a worker takes are told "later", in JSON; those there are, go on."""
    with serving(url(tmp_path / "usage.db"), LIMITS="serve.CONNECTIONS=5") as server:
        held = [server.connect() for _ in range(5)]
        try:
            for each in held:
                each.request("GET", "/healthz")
                assert each.getresponse().read()
            answer = server.post(body())
            assert (answer.status, answer.headers["retry-after"]) == (503, "2")
            assert answer.error.startswith("server: ")
        finally:
            for each in held:
                each.close()
