"""`spryng serve`: where it may listen, and how it is run by uvicorn.

Invariant: without a single key made, nobody but this machine can reach it.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from asyncio import Transport
from collections.abc import Mapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from spryng_instrument.errors import SettingsError
from spryng_instrument.server.app import LOCAL_HOSTS, OPEN_VARIABLE
from spryng_instrument.settings import Settings, env_name, without_secrets
from spryng_instrument.store import open_store

HEADERS_S = 10.0
"""Seconds for the head of a request to arrive."""
SHUTDOWN_S = 30
"""Seconds that requests have to end once the server was told to."""
CONNECTIONS = 1_000
"""Connections a worker; more are answered with 503."""


class ImpatientProtocol(HttpToolsProtocol):
    """Hangs up on a client that takes too long to say what it wants."""

    _timer: Any = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._heard()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._heard()
        self._timer = self.loop.call_later(HEADERS_S, self.transport.close)

    def _heard(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_HOSTS


def check(settings: Settings, host: str) -> str:
    """What is to be said about who may use the server. The ledger is made, if it is not there.

    Raises:
        SettingsError: other machines could reach it, and no key was made.
        StoreError: the ledger cannot be used.
    """
    store = open_store(settings.destination)
    try:
        store.record([])
        keys = [key for key in store.api_keys() if key.revoked is None]
        made = bool(store.api_keys())
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
    with tempfile.TemporaryDirectory(prefix="spryng-metrics-") as folder:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read as prometheus_client is imported, in each worker
        uvicorn.run(
            "spryng_instrument.server.app:app_from_environment",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            http=ImpatientProtocol,
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_S,
            server_header=False,
            access_log=False,
            log_level="warning",
        )


def _environment(settings: Settings, host: str) -> Mapping[str, str]:
    return {env_name("destination"): settings.destination, OPEN_VARIABLE: "1" if is_loopback(host) else "0"}


def describe(settings: Settings, host: str, port: int) -> str:
    """Where it listens and what it keeps, for the terminal."""
    shown = f"[{host}]" if ":" in host else host
    return f"Track Usage API at http://{shown}:{port}, ledger {without_secrets(settings.destination)}"
