"""The other end of an HTTP destination: a real server on loopback that does what it is told, request by request."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    """One that came, its body unpacked."""

    path: str
    headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    """What is answered. Lost: nothing, the connection is cut. Half: cut in the middle of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012
    lost: bool = False
    half: bool = False
    drip: bool = False


class ScriptedServer:
    """Answers each request by `answer`, in a thread of its own. `requests` are those that came."""

    def __init__(self, answer: Callable[[Request], Reply], port: int = 0) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.connections = 0
        ours = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                ours.connections += 1
                super().setup()

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                with ours._lock:
                    ours.requests.append(request)
                    reply = ours.answer(request)
                with suppress(OSError):
                    self.reply(reply)

            def reply(self, reply: Reply) -> None:
                self.close_connection = reply.lost or reply.half or reply.drip
                if reply.lost:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                head = f"HTTP/1.1 {reply.status} X\r\ncontent-length: {len(reply.body)}\r\n"
                head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
                raw = head.encode() + b"\r\n" + reply.body
                if reply.drip:
                    for byte in raw:
                        self.connection.sendall(bytes([byte]))
                        time.sleep(0.02)
                self.wfile.write(raw[: -len(reply.body) // 2 or None] if reply.half else raw)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *args: Any) -> None:
                pass

        self._lock = threading.Lock()
        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TrackUsageServer:
    """What a Track Usage API keeps, with its endpoints; `script` is what goes wrong with the next requests.

    Args:
        batches: whether it has the batch endpoint.
    """

    def __init__(self, *, batches: bool = True) -> None:
        self.kept: dict[str, Any] = {}
        self.times: Counter[str] = Counter()
        """How often each message was sent and taken, duplicates too."""
        self.script: list[str] = []
        self.refuses: set[str] = set()
        self.takes = 10**9
        """Messages a request, above which it answers 413."""
        self.batches = batches

    def __call__(self, request: Request) -> Reply:
        one = request.path == "/trackUsage"
        if not one and (request.path != "/trackUsage/batch" or not self.batches):
            return _json(404, {"detail": "Not Found"})
        action = self.script.pop(0) if self.script else "ok"
        if action.isdigit():
            headers = {"retry-after": "0"} if action in ("429", "503") else {}
            return _json(int(action), {"error": {"field": "x", "message": f"scripted {action}"}}, headers)
        if action == "page":
            return Reply(200, b"<html>Sign in</html>", {"content-type": "text/html; charset=utf-8"})
        if action == "moved":
            return Reply(302, b"", {"location": "http://127.0.0.1:9/login?next=secret"})
        if action == "nothing":
            return Reply(lost=True)
        sent = [json.loads(request.body)] if one else json.loads(request.body)["messages"]
        if len(sent) > self.takes:
            return _json(413, {"error": {"field": "messages", "message": "too many"}})
        results = [self.take(each) for each in sent]
        if one:
            pass  # any body acknowledges what was taken, and nothing else is answered with 200
        elif action == "few":
            results = results[:-1]
        elif action == "others":
            results = results[::-1] if len(results) > 1 else [{**results[0], "id": "another"}]
        elif action == "unknown":
            results = [{**each, "status": "queued"} for each in results]
        reply = _json(200, results[0] if one else {"results": results})
        if one and results[0]["status"] in ("conflict", "refused"):
            status = {"conflict": 409, "refused": 400}[results[0]["status"]]
            reply = _json(status, {"error": {"field": "key", "message": results[0].get("error", "another body")}})
        return reply._replace(lost=action == "lost", half=action == "half", drip=action == "drip")

    def take(self, sent: Any) -> dict[str, Any]:
        name = sent["messageId"]
        if name in self.refuses:
            return {"id": name, "status": "refused", "error": "key='x' is odd"}
        if name in self.kept and self.kept[name] != sent:
            return {"id": name, "status": "conflict"}
        self.times[name] += 1
        known = name in self.kept
        self.kept[name] = sent
        return {"id": name, "status": "duplicate" if known else "recorded"}


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})
