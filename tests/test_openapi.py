"""The OpenAPI document says what the server does: schemathesis asks the server, and any bytes get a clear error."""

from __future__ import annotations

import gzip
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spryng_instrument.api import FIELDS
from spryng_instrument.server.app import ROUTES

from .serving import Serving, serving, spryng

CONFIG = """
[checks]
# 413 is for more messages than maxItems, 415 for no JSON.
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422]
# Excluded, because JSON Schema cannot say it: `user` must not contradict `key`, `month` excludes `since`, `after` comes
# from the page before, a timestamp is not in the future. That what is right is taken, test_api and test_server show.
positive_data_acceptance.enabled = false

[[operations]]
include-path = "/trackUsage/batch"
# Excluded here, because a batch is never refused for one of its messages: that one is, within a 200.
checks.negative_data_rejection.enabled = false
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with a key of both scopes, which has no bug to log."""
    folder = tmp_path_factory.mktemp("openapi")
    destination = f"sqlite:///{folder / 'usage.db'}"
    with serving(destination, start=False) as server:
        made = spryng("keys", "create", "x", "--scope", "read", "--scope", "ingest", "--destination", destination,
                      cwd=folder)  # fmt: skip
        server.key = made.stdout.strip()
        server.start()
        yield server
        assert "Traceback" not in server.text()
        assert "bug" not in server.text()
        assert server.process.poll() is None


@pytest.fixture(scope="module")
def document(server: Serving) -> dict[str, Any]:
    answer: dict[str, Any] = server.get("/openapi.json").json()
    return answer


def test_it_is_openapi(document: dict[str, Any]) -> None:
    """It validates as OpenAPI 3.1, and has every route and every field that is for others."""
    import schemathesis

    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()
    there = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert there == {(method, path) for method, path, _ in ROUTES}
    assert set(document["components"]["schemas"]["TrackUsage"]["properties"]) == set(FIELDS) - {"writer", "sequence"}
    assert set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))) <= set(
        document["components"]["schemas"]
    )


@pytest.mark.timeout(500)
def test_schemathesis(server: Serving, tmp_path: Path) -> None:
    """40 examples for each operation: every check passes, but for those that CONFIG names."""
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    assert server.key is not None
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H",
         f"Authorization: {server.key}", "--max-examples", "40", "--generation-database", "none",
         "--continue-on-failure", "--no-color", "--request-timeout", "10"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, re.sub(r"(.{500}).*", r"\1...", done.stdout)[-20_000:] + done.stderr
    assert re.search(r"(\d{3,}) generated, \1 passed", done.stdout), done.stdout


PATHS = [path for _, path, _ in ROUTES]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner),
    max_leaves=12,
)
like_messages = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6).map(lambda each: {"key": "a", **each})
bodies = st.one_of(
    st.binary(max_size=200),
    (like_messages | st.lists(like_messages | json_values, max_size=3).map(lambda each: {"messages": each})).map(
        lambda each: json.dumps(each, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
)
header_values = st.sampled_from(
    ["application/json", "gzip", "identity", "chunked", "close", "keep-alive", "0", "5", "-1", "Bearer x",
     "100-continue", "h2c", "websocket", "bytes=0-1", "", "*", "\xff", "text/csv", "127.0.0.1"]
) | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20)  # fmt: skip
headers = st.lists(
    st.tuples(
        st.sampled_from(
            ["Content-Type", "Content-Encoding", "Transfer-Encoding", "Content-Length", "Connection", "Host", "Expect",
             "Upgrade", "Accept", "Range", "Cookie", "X-Forwarded-For", "X-HTTP-Method-Override", "Authorization"]
        ) | st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8),
        header_values,
    ),
    max_size=4,
)  # fmt: skip
queries = st.lists(
    st.tuples(
        st.sampled_from(["by", "key", "tag", "since", "until", "month", "zone", "after", "limit", "format", "no_key"]),
        st.text(st.characters(max_codepoint=127, exclude_characters=" #\r\n"), max_size=8)
        | st.sampled_from(["%00", "%ff", "UTC", "2026-11", "7d", "day", "tag", "csv", "9999-12-31", "0001-01-01"]),
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["POST", "POST", "GET", "PUT", "HEAD", "OPTIONS", "PATCH", "X"]),
    st.sampled_from(PATHS) | st.text(max_size=5).map(lambda text: f"/{text}"),
    queries, headers, bodies, st.sampled_from(["plain", "gzip", "chunked", "lies", "none"]), st.booleans(),
)  # fmt: skip
def test_any_bytes(
    server: Serving, method: str, path: str, query: str, given: list[tuple[str, str]], body: bytes, how: str, key: bool
) -> None:
    """Over raw sockets, whatever is sent: an answer in time, no 5xx, and an error in JSON that names something."""
    lines = [
        f"{method} {path}{'?' if query else ''}{query} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
    ]
    lines += [f"Authorization: {server.key}"] if key else []
    lines += [f"{name}: {value}" for name, value in given]
    if how == "gzip":
        lines, body = [*lines, "Content-Encoding: gzip"], gzip.compress(body)
    if how == "chunked":
        lines, body = [*lines, "Transfer-Encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    elif how != "none":
        lines.append(f"Content-Length: {len(body) + (how == 'lies')}")
    sent = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        while part := sock.recv(65536):
            received += part
    for status, answer in answers(received, method == "HEAD"):
        assert status < 500, (sent, answer)
        if status >= 400 and method != "HEAD":
            error = json.loads(answer)["error"]
            assert error["field"], (sent, answer)
            assert error["message"], (sent, answer)


def answers(received: bytes, no_body: bool) -> Iterator[tuple[int, bytes]]:
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 100:
            continue
        length = 0 if no_body else int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        yield status, received[:length]
        received = b"" if no_body else received[length:]
