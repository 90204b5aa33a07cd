"""A practice OpenAI server: what the SDK would hear from OpenAI, on this machine, without a key and for nothing.

    with PracticeServer() as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="practice")
        client.chat.completions.create(model="gpt-4o-mini", messages=[{"role": "user", "content": "Hello"}])
        assert server.exchanges[0].usage["total_tokens"] > 0

Invariant: an answer and its usage follow from the server's seed and what was asked, whether it is plain or streamed, in
whatever order and from however many threads; only ids and times differ.
It must not know the rest of this package: it is the yardstick that the package is measured with.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from spryng_instrument.testing.answers import POSTS, Answer, Call, Json, Refusal, models, sse, unique
from spryng_instrument.testing.organization import organization

__all__ = ["Exchange", "PracticeServer"]

MAX_BODY_BYTES = 32 * 1024 * 1024
_ROUTE = re.compile(r"(?:/v1|(?P<azure>/openai)(?:/v1|/deployments/(?P<deployment>[^/]+))?)/(?P<rest>.+?)/?")
_GETS = re.compile(r"models|organization/.+")
_FAULT = re.compile(r"[45]\d\d|disconnect|stream-disconnect|stream-error|")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and what it was answered: the truth to compare a meter's records with."""

    method: str
    path: str
    """As requested, with the query."""
    endpoint: str
    """chat.completions, completions, embeddings, responses, models or other."""
    request: Any
    """The parsed JSON body. None: there was none, or it was no JSON."""
    headers: dict[str, str]
    """The request's headers, names in lower case."""
    status: int
    """The HTTP status. 0: closed without an answer, as x-practice-error asked."""
    stream: bool
    """Whether the request asked for a stream."""
    usage: Json | None
    """As reported, or as a stream that was cut or not asked for it would have reported it. None: nothing to report."""
    response_id: str | None
    request_id: str
    usage_sent: bool
    """Whether the usage was handed to the network; a client that left early may not have read it."""
    model: str | None = None
    """The model that answered."""
    time: int = 0
    """When the request came, in seconds since 1970."""


class PracticeServer:
    """Answers like api.openai.com and Azure OpenAI, on loopback, and remembers every exchange.

    The usage and costs of these are told, as OpenAI does, below /organization to keys that begin with "sk-admin-".

    A request's header x-practice-error (extra_headers in the SDK) makes it fail: a status from "400" to "599" is
    answered; "disconnect" closes without an answer; "stream-disconnect" closes after three chunks (a plain answer:
    half-way); "stream-error" sends an error event there (a plain answer: is 500). With "-once" appended, the first
    attempt of a call fails and the SDK's retry succeeds.

    The first tool is called when tool_choice requires it, or the last user message says "weather" or "tool".
    Model names of OpenAI's families are known (gpt-..., o3..., text-...); under Azure paths every deployment is.

    Args:
        port: 0 picks a free one, which is kept when the server is stopped and started again.
        seed: Another seed gives other answers.
        latency_s: Seconds before an answer begins.
        chunk_delay_s: Seconds between two chunks of a stream.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        seed: int = 0,
        latency_s: float = 0.0,
        chunk_delay_s: float = 0.0,
    ) -> None:
        self.host, self.port, self.seed, self.latency_s, self.chunk_delay_s = host, port, seed, latency_s, chunk_delay_s
        salt = secrets.token_hex(8)  # OpenAI repeats no id; two runs recorded in one ledger must not either
        self._identities = (f"{salt}/{number}" for number in count())
        self._lock = threading.Lock()
        self._listener: _Listener | None = None
        self._exchanges: dict[str, Exchange] = {}
        self._failed_once: set[tuple[str | None, str, bytes]] = set()

    @property
    def base_url(self) -> str:
        """The URL for openai.OpenAI(base_url=...), known once the server has started."""
        if not self.port:
            raise RuntimeError("The practice server has no port yet. Call start(), or use it in a with statement.")
        return f"http://{self.host}:{self.port}/v1"

    @property
    def exchanges(self) -> list[Exchange]:
        """Every exchange so far, in the order in which the answers began; a copy."""
        with self._lock:
            return list(self._exchanges.values())

    def start(self) -> PracticeServer:
        """Listen, and answer in background threads until stop(). Raises OSError when the port is taken."""
        with self._lock:
            if self._listener is None:
                self._listener = _Listener(self)
                self.port = self._listener.server_port
        return self

    def stop(self) -> None:
        """Close every connection, those with an answer under way included, and end all threads."""
        with self._lock:
            listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()

    def __enter__(self) -> PracticeServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _identity(self) -> str:
        with self._lock:
            return next(self._identities)

    def _keep(self, exchange: Exchange) -> None:
        with self._lock:
            self._exchanges[exchange.request_id] = exchange

    def _fault(self, path: str, headers: Mapping[str, str], raw: bytes) -> str:
        """What this attempt is to suffer, or nothing."""
        fault, retries = headers.get("x-practice-error", ""), headers.get("x-stainless-retry-count")
        if not fault.endswith("-once"):
            return fault
        first = retries == "0"
        if retries is None:  # older SDKs do not count: their retry is the next request with the same body
            call = (headers.get("idempotency-key"), path, raw)
            with self._lock:
                first = call not in self._failed_once
                (self._failed_once.add if first else self._failed_once.discard)(call)
        return fault.removesuffix("-once") if first else ""


class _Listener(ThreadingHTTPServer):
    """The listening socket, and a thread for each connection until stop() ends them all."""

    allow_reuse_port = False  # two servers on one port would share the calls out at random
    request_queue_size = 128

    def __init__(self, practice: PracticeServer) -> None:
        self.practice, self.stopping = practice, threading.Event()
        self.connections: dict[threading.Thread, socket.socket] = {}
        super().__init__((practice.host, practice.port), _Handler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="practice-server", daemon=True)
        self.thread.start()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for the host's name, which may take seconds
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        arguments = (request, client_address)
        thread = threading.Thread(target=self.process_request_thread, args=arguments, name="practice-call", daemon=True)
        self.connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        self.connections.pop(threading.current_thread(), None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError is a client that went away: nobody's mistake
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for thread, connection in list(self.connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(5)
        self.thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "practice", ""
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of a user's tests clean."""

    def _serve(self) -> None:
        practice, started, came = self.server.practice, time.perf_counter(), int(time.time())
        identity, headers = practice._identity(), {name.lower(): value for name, value in self.headers.items()}
        route = _ROUTE.fullmatch(urlsplit(self.path).path)
        rest = route["rest"] if route else ""
        known = rest in POSTS if self.command == "POST" else self.command == "GET" and bool(_GETS.fullmatch(rest))
        request, fault, status = None, "", 200
        try:
            raw = self._read_body(headers)
            with suppress(ValueError, RecursionError):
                request = json.loads(raw)
            fault = practice._fault(self.path, headers, raw)
            answer = self._answer(route if known else None, request, headers, fault, identity)
        except Refusal as refusal:
            status, answer = refusal.status, Answer({"error": refusal.error}, [])
        if self.server.stopping.wait(practice.latency_s):
            raise ConnectionAbortedError
        if fault == "disconnect":
            status, answer = 0, Answer({}, [])
        stream = isinstance(request, dict) and bool(request.get("stream"))
        usage, request_id = answer.body.get("usage"), "req_" + unique(identity)[:32]
        usage_sent = usage is not None and not fault and not (stream and answer.events)
        endpoint = rest.replace("/", ".") if known else "other"
        about = (self.command, self.path, endpoint, request, headers)
        ids = (answer.body.get("id"), request_id)
        exchange = Exchange(*about, status, stream, usage, *ids, usage_sent, answer.body.get("model"), came)
        practice._keep(exchange)  # before the answer: whoever has read that finds this
        if fault == "disconnect":
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("x-request-id", request_id)
        self.send_header("openai-version", "2020-10-01")
        self.send_header("openai-processing-ms", str(round((time.perf_counter() - started) * 1000)))
        if fault and status != 200:
            self.send_header("retry-after-ms", "1")
        if stream and answer.events:
            self._stream(answer, fault, exchange)
        else:
            self._plain(json.dumps(answer.body).encode(), fault)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _plain(self, body: bytes, fault: str) -> None:
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "stream-disconnect":
            self.close_connection, body = True, body[: len(body) // 2]
        self.wfile.write(body)

    def _stream(self, answer: Answer, fault: str, exchange: Exchange) -> None:
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        events = answer.events[: min(3, len(answer.events) - 2)] if fault else answer.events
        if fault == "stream-error" and exchange.endpoint == "responses":
            flat = {**Refusal(500).error, "type": "error", "sequence_number": len(events)}
            events.append(sse(flat, "error"))
        elif fault == "stream-error":
            events.append(sse({"error": Refusal(500).error}))
        for index, event in enumerate(events):
            if index and self.server.stopping.wait(self.server.practice.chunk_delay_s):
                raise ConnectionAbortedError
            if index == answer.usage_at:
                self.server.practice._keep(replace(exchange, usage_sent=True))
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        if fault == "stream-disconnect":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def _read_body(self, headers: Mapping[str, str]) -> bytes:
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdecimal():
            self.close_connection = True  # where this request ends is not known
            raise Refusal(411, "The practice server needs a Content-Length.")
        left = int(length)
        if left > MAX_BODY_BYTES:
            while left and (part := self.rfile.read(min(left, 1 << 20))):
                left -= len(part)  # an answer before the last byte could be lost in the client's broken pipe
            raise Refusal(413, f"The request has {length} bytes; at most {MAX_BODY_BYTES} are allowed.")
        raw = self.rfile.read(left)
        if len(raw) < left:
            raise ConnectionAbortedError
        return raw

    def _answer(
        self, route: re.Match[str] | None, request: Any, headers: Mapping[str, str], fault: str, identity: str
    ) -> Answer:
        if not _FAULT.fullmatch(fault):
            raise Refusal(400, f"x-practice-error is {fault!r}, not a status or {_FAULT.pattern.strip('|')}.")
        if fault.isdecimal():
            raise Refusal(int(fault))
        if not (headers.get("authorization", "").removeprefix("Bearer").strip() or headers.get("api-key")):
            raise Refusal(401, "You didn't provide an API key: put it into the Authorization or api-key header.")
        if route is None:
            raise Refusal(404, f"Unknown request URL: {self.command} {self.path}.", code="unknown_url")
        if self.command == "GET" and route["rest"] == "models":
            return models()
        if self.command == "GET":
            key = headers.get("authorization", "").removeprefix("Bearer").strip()
            asked = route["rest"].removeprefix("organization/"), urlsplit(self.path).query
            return Answer(organization(*asked, key, self.server.practice.exchanges), [])
        if not isinstance(request, dict):
            raise Refusal(400, "We could not parse the JSON body of your request.")
        if fault == "stream-error" and not request.get("stream"):
            raise Refusal(500)
        try:
            return POSTS[route["rest"]](Call(request, route, self.server.practice.seed, identity))
        except Refusal:
            raise
        except Exception as exc:  # the caller's mistake in most cases, and told in every case
            raise Refusal(400, f"The practice server cannot read this request: {exc!r}.") from exc
