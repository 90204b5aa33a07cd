"""`spryng serve`: where it may listen, and how it is run by uvicorn.

Invariant: without a single key made, nobody but this machine can reach it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from asyncio import Transport
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from spryng_instrument.alerts import Alerts
from spryng_instrument.api import MAX_BYTES
from spryng_instrument.budgets import read_budgets
from spryng_instrument.errors import SchemaTooNewError, SettingsError, StoreError, StoreNotOursError
from spryng_instrument.server.app import OPEN_VARIABLE, busy, is_loopback
from spryng_instrument.server.bodies import BODY_S
from spryng_instrument.settings import Settings, env_name, without_secrets
from spryng_instrument.store import open_store

HEADERS_S = 10.0
"""Seconds for the head of a request to arrive."""
ANSWER_S = 60.0
"""Seconds for a client to take an answer."""
MAX_HEAD = 64 * 1024
"""Bytes of a request's head, about."""
MAX_SENT = 2 * MAX_BYTES
"""Bytes of a request, all told. Up to that, a body that nobody wants is let pass: a client that is cut off while it
sends does not see the answer that says why."""
SHUTDOWN_S = 30
"""Seconds that requests have to end once the server was told to."""
WORKER_S = 20
"""Seconds that a worker has to answer its parent, which kills it then: it does once it has imported everything. So long
may one that died while it was asked go unnoticed."""
CONNECTIONS = 1_000
"""Connections a worker; more are answered with 503."""


class ImpatientProtocol(HttpToolsProtocol):
    """Hangs up on a client that is slow to say what it wants or to take what it gets, or that says too much.

    Invariant: while a connection waits for its client, and not the other way round, a timer runs.
    """

    _timer: Any = None
    _sent = 0
    _in_head = False
    _in_request = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEADERS_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._sent += len(data)
        if self._in_head and self._sent > MAX_HEAD:
            self._hang_up(431, "head", f"is larger than {MAX_HEAD} bytes")
        elif self._in_request and self._sent > MAX_SENT:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._sent, self._in_head, self._in_request = 0, True, True
        self._wait(HEADERS_S)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # or it is a trailer, which nobody reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if len(self.connections) > CONNECTIONS:
            self.app = busy
        super().on_headers_complete()
        if self.pipeline:  # it is us who do not read on
            self._stop_waiting()
        else:
            self._wait(BODY_S + 5)  # where somebody reads it, that one says what went wrong

    def on_message_complete(self) -> None:
        self._in_request = False
        self._stop_waiting()
        super().on_message_complete()
        self._wait_if_idle()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_if_idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(ANSWER_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._in_request:
            self._stop_waiting()  # there is more of the answer, or the next line waits again
        self._wait_if_idle()

    def send_400_response(self, msg: str) -> None:
        self._hang_up(400, "request", "is not HTTP/1.1 that can be read")

    def _hang_up(self, status: int, field: str, message: str) -> None:
        if self.transport.is_closing():
            return
        body = msgspec.json.encode({"error": {"field": field, "message": message}})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._wait(HEADERS_S)

    def _wait_if_idle(self) -> None:
        if not self._in_request and self.cycle is not None and self.cycle.response_complete:
            self._wait(ANSWER_S if self.transport.get_write_buffer_size() else HEADERS_S)

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def check(settings: Settings, host: str) -> str:
    """What is to be said about who may use the server. The ledger is made, if it is not there.

    Raises:
        SettingsError: other machines could reach it, and no key was made; or its budgets cannot be used.
        StoreError: the ledger cannot be used.
    """
    store = open_store(settings.destination)
    if settings.budgets is not None:
        Alerts(store, read_budgets(settings.budgets))
    try:
        store.record([])
        keys = [key for key in store.api_keys() if key.revoked is None]
        made = bool(store.api_keys())
    except (SchemaTooNewError, StoreNotOursError):
        raise
    except StoreError as exc:
        if settings.destination.startswith("sqlite:"):
            raise
        return f"The ledger does not answer yet, and requests get 503 until it does: {exc}"  # it may start after us
    finally:
        store.close()
    if keys:
        return f"{len(keys)} API key(s) may use it: spryng keys list"
    if not is_loopback(host):
        raise SettingsError(
            f"host={host!r}: other machines could use the server without a key. Make one first, with "
            "`spryng keys create NAME`, or listen on 127.0.0.1"
        )
    if made:
        return "Every API key is revoked: nobody may use it. Make one: spryng keys create NAME"
    return "No API key was made: it listens on this machine only, and asks for none. Make one: spryng keys create NAME"


def serve(settings: Settings, *, host: str, port: int, workers: int) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted by then is recorded."""
    os.environ.update(_environment(settings, host))
    with ExitStack() as ending:
        if workers > 1:
            # Until uvicorn has handlers; its workers die of their own.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            folder = ending.enter_context(tempfile.TemporaryDirectory(prefix="spryng-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read as prometheus_client is imported, in each worker
        else:
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends in order, and raises it again then
                signal.signal(number, _end)
        uvicorn.run(
            "spryng_instrument.server.app:app_from_environment",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            http=ImpatientProtocol,
            ws="none",
            timeout_worker_healthcheck=WORKER_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
            server_header=False,
            access_log=False,
            log_level="error",
        )


def _end(*_: object) -> None:
    """End this process at once. Python would first wait for the threads of questions, which may take minutes."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # closed, or being written to right here
            stream.flush()
    os._exit(0)


def _environment(settings: Settings, host: str) -> Mapping[str, str]:
    return {env_name("destination"): settings.destination, OPEN_VARIABLE: "1" if is_loopback(host) else "0"}


def describe(settings: Settings, host: str, port: int) -> str:
    """Where it listens and what it keeps, for the terminal."""
    shown = f"[{host}]" if ":" in host else host
    return f"Track Usage API at http://{shown}:{port}, ledger {without_secrets(settings.destination)}"
