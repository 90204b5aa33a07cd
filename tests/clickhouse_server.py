"""A ClickHouse server of the tests' own: the real engine (chdb) in its own process, behind ClickHouse's HTTP.

    python -m tests.clickhouse_server FOLDER PORT

prints its port (0: any) and serves until its standard input ends. What it passes on: the query in the body, in the URL
or in a form; settings and param_* parameters; inserts in FORMAT Native, compressed or not; the engine's errors with
their codes. POST /lose?answers=N has it carry out the next N inserts and break the connection instead of answering.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.message import Message
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import urlopen

TRANSPORT = {"client_protocol_version", "compress", "decompress", "enable_http_compression", "query_id", "quota_key",
             "role", "session_check", "session_id", "session_timeout", "wait_end_of_query",
             "send_progress_in_http_headers", "http_headers_progress_interval_ms", "buffer_size"}  # fmt: skip
"""What a server's HTTP takes for itself; all else is a setting."""
INSERT = re.compile(rb"\s*(INSERT INTO [^\n]*?) FORMAT (\w+)\n", re.IGNORECASE)


class ClickHouse:
    """Such a server, for the tests of this process, until it ends."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.port = 0
        self.start()
        self._numbers = count()
        atexit.register(self.stop)

    def start(self) -> None:
        """Again on the same port, if there was one."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.folder.name, str(self.port)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """With -9."""
        self._process.kill()
        self._process.communicate()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """It takes connections, and does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def ask(self, query: str, database: str = "default") -> str:
        """What the server answers, without our client."""
        with urlopen(f"http://127.0.0.1:{self.port}/?{urlencode({'database': database})}", query.encode()) as answer:
            return str(answer.read().decode())

    def lose(self, answers: int) -> None:
        """Carry out the next inserts and do not answer them."""
        urlopen(f"http://127.0.0.1:{self.port}/lose?answers={answers}", b"").close()

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a database of its own."""
        name = f"test_{next(self._numbers)}"
        self.ask(f"CREATE DATABASE {name}")
        try:
            yield f"clickhouse://tester:secret@127.0.0.1:{self.port}/{name}"
        finally:
            self.ask(f"DROP DATABASE {name}")

    def stop(self) -> None:
        """Called again by the interpreter's exit."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.communicate(timeout=30)
        self.folder.cleanup()


@cache
def clickhouse() -> ClickHouse:
    """The server of this process's tests, started by the first that wants one."""
    from spryng_instrument.store.clickhouse import ClickHouseStore

    from .messages import message

    server = ClickHouse()
    with server.database() as url, closing(ClickHouseStore(url)) as store:  # what is first takes seconds
        store.record([message()], timeout_s=100)
        store.total()
    return server


class Engine:
    """chdb with one connection for each set of settings; one query at a time."""

    def __init__(self, folder: str) -> None:
        import chdb

        self._connect = chdb.connect
        self._folder = folder
        self._connections: dict[tuple[tuple[str, str], ...], Any] = {}
        self._lock = threading.Lock()
        self.lose = 0

    def run(self, query: bytes, settings: dict[str, str], params: dict[str, str]) -> Any:
        with self._lock:
            if (insert := INSERT.match(query)) is not None:
                with tempfile.NamedTemporaryFile() as data:
                    data.write(query[insert.end() :])
                    data.flush()
                    into, form = insert[1].decode(), insert[2].decode()
                    return self._connection(settings).query(f"{into} FROM INFILE '{data.name}' FORMAT {form}")
            return self._connection(settings).query(query.decode(), "TabSeparated", params=params)

    def _connection(self, settings: dict[str, str]) -> Any:
        key = tuple(sorted(settings.items()))
        if key not in self._connections:
            connection = self._connect(self._folder)
            for name, value in key:
                quoted = value.replace("\\", "\\\\").replace("'", "\\'")
                connection.query(f"USE `{value}`" if name == "database" else f"SET {name} = '{quoted}'")
            self._connections[key] = connection
        return self._connections[key]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: in two, the second would wait 40 ms for the first one's acknowledgement
    engine: Engine

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        fields = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        if url.path == "/lose":
            self.engine.lose = int(fields["answers"])
            return self._answer(200, b"")
        form = self.headers.get("Content-Type", "")
        if form.startswith("multipart/form-data"):
            parts = _parts(form, body)
            body = parts.pop("query", b"")
            fields.update({name: value.decode() for name, value in parts.items()})
        if "query" in fields:
            body = fields.pop("query").encode() + b"\n" + body
        params = {name[6:]: value for name, value in fields.items() if name.startswith("param_")}
        settings = {
            name: value for name, value in fields.items() if not name.startswith("param_") and name not in TRANSPORT
        }
        try:
            result = self.engine.run(body, settings, params)
        except Exception as exc:
            text = str(exc)
            text = text[max(text.find("Code: "), 0) :]
            code = re.search(r"Code: (\d+)", text)
            headers = {"X-ClickHouse-Exception-Code": code[1]} if code else {}
            return self._answer(404 if code and code[1] in ("60", "81") else 500, text.encode(), headers)
        if self.engine.lose and body.lstrip()[:6].upper() == b"INSERT":
            self.engine.lose -= 1
            self.close_connection = True
            return None
        named = re.search(rb"FORMAT (\w+)\s*$", body)
        answer = bytes(result.bytes() or b"")
        headers = {"X-ClickHouse-Format": named[1].decode() if named else "TabSeparated"} if answer or named else {}
        return self._answer(200, answer, headers)

    do_GET = do_POST

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        encoding = self.headers.get("Content-Encoding")
        if encoding == "lz4":
            import lz4.frame

            return bytes(lz4.frame.decompress(body))
        assert encoding in (None, "identity"), encoding
        return body

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        summary = {"X-ClickHouse-Summary": json.dumps({}), "X-ClickHouse-Timezone": "UTC"}
        for name, value in {**summary, **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a test that fails says enough."""


def _parts(content_type: str, body: bytes) -> dict[str, bytes]:
    header = Message()
    header["Content-Type"] = content_type
    boundary = b"--" + str(header.get_param("boundary")).encode()
    parts = {}
    for part in body.split(boundary)[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        [name] = re.findall(rb'name="([^"]*)"', head)
        parts[name.decode()] = value[:-2]
    return parts


if __name__ == "__main__":
    Handler.engine = Engine(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)
