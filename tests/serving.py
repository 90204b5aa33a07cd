"""`spryng serve` as users start it: a process of its own on a free port of loopback, and a way to talk to it."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import spryng_instrument

ROOT = Path(spryng_instrument.__file__).parent.parent


@dataclass(slots=True)
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """Field and message of an error, which every answer but 200 is."""
        assert self.status != 200, self.body
        assert self.headers["content-type"] == "application/json", self
        error = self.json()["error"]
        assert set(error) == {"field", "message"}
        assert error["field"]
        assert error["message"]
        return f"{error['field']}: {error['message']}"


@dataclass
class Serving:
    """A server that was started. It may be killed, and started again at the same address."""

    command: list[str]
    port: int
    environ: dict[str, str]
    log: Path
    key: str | None = None
    """API key that `get` and `post` send."""
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, *, ready_s: float = 120.0) -> None:
        """Start it, and wait until it is ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environ, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + ready_s
        while True:
            with suppress(OSError):
                if self.get("/readyz").status == 200:
                    return
            assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.text()}"
            assert time.monotonic() < until, f"it is not ready: {self.text()}"
            time.sleep(0.02)

    def stop(self, timeout_s: float = 90.0) -> int:
        """SIGTERM, as systemd sends it. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, its workers included."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of its workers, where it has several."""
        found = subprocess.run(
            ["ps", "-ww", "--no-headers", "-o", "pid,args", "--ppid", str(self.pid)], capture_output=True, text=True
        ).stdout
        return [int(line.split()[0]) for line in found.splitlines() if "spawn_main" in line]

    def connect(self, timeout_s: float = 60.0) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, None, headers)

    def post(self, body: Any, path: str = "/trackUsage", *, zipped: bool = False, **headers: str) -> Answer:
        """Send JSON: bytes as they are, anything else encoded."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if zipped:
            headers, body = {"Content-Encoding": "gzip", **headers}, gzip.compress(body)
        return self.send("POST", path, body, {"Content-Type": "application/json", **headers})

    def send(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Answer:
        connection = self.connect()
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            if self.key is not None and "Authorization" not in given:
                given["Authorization"] = self.key
            connection.request(method, path, body, given)
            reply = connection.getresponse()
            return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def raw(self, sent: bytes, *, timeout_s: float = 60.0, half_close: bool = False) -> bytes:
        """Send bytes, and read until the server hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout_s) as sock:
            with suppress(ConnectionError):
                sock.sendall(sent)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
            received = b""
            with suppress(ConnectionError):
                while part := sock.recv(65536):
                    received += part
            return received

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where there is none."""
        wanted = ",".join(f'{label}="{value}"' for label, value in labels.items())
        pattern = rf"^{name}{{{re.escape(wanted)}}} (\S+)$" if labels else rf"^{name} (\S+)$"
        match = re.search(pattern, self.get("/metrics").body.decode(), re.M)
        return float(match[1]) if match else 0.0


@contextmanager
def serving(destination: str, *options: str, start: bool = True, **environ: str) -> Iterator[Serving]:
    """`spryng serve` of a ledger, which is gone afterwards.

    Args:
        destination: URL of the ledger.
        options: of the command, as in "--workers", "2".
        start: whether it is started, or that is left to the test.
        environ: what its environment has besides that of the test. LIMITS is for limits that a test lowers:
            "serve.HEADERS_S=0.5 keys.FRESH_S=0.1".
    """
    given = {name: value for name, value in os.environ.items() if not name.startswith("SPRYNG_")}
    with socket.socket() as held, tempfile.TemporaryDirectory() as folder:
        # Bound until the server is gone, but not listening: the server can have the port, and no other test gets it.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        python_path = [str(ROOT)]
        if limits := environ.pop("LIMITS", ""):
            # In the server's own processes, workers included, as their interpreters start.
            Path(folder, "sitecustomize.py").write_text(_LOWER + f"lower({limits!r})\n")
            python_path.insert(0, folder)
        server = Serving(
            [sys.executable, "-m", "spryng_instrument", "serve", "--port", str(port), "--destination", destination,
             *options],
            port, {**given, "PYTHONPATH": os.pathsep.join(python_path), **environ}, Path(folder, "server.log"),
        )  # fmt: skip
        if start:
            server.start()
        try:
            yield server
        finally:
            if hasattr(server, "process"):
                server.kill()


_LOWER = '''
import importlib.abc, sys

class Lower(importlib.abc.MetaPathFinder):
    """Sets limits of a module once it is loaded."""

    def __init__(self, limits):
        self.limits = limits

    def find_spec(self, name, path, target=None):
        mine = {each: value for (module, each), value in self.limits.items() if name == module}
        if not mine:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for each, value in mine.items():
                assert hasattr(module, each), each
                setattr(module, each, value)

        spec.loader.exec_module = exec_module
        return spec

def lower(text):
    import importlib.util
    limits = {}
    for each in text.split():
        name, _, value = each.partition("=")
        module, _, constant = name.rpartition(".")
        limits["spryng_instrument.server." + module, constant] = float(value) if "." in value else int(value)
    sys.meta_path.insert(0, Lower(limits))
'''


def spryng(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A command of `spryng`."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("SPRYNG_")}
    return subprocess.run(
        [sys.executable, "-m", "spryng_instrument", *arguments],
        cwd=cwd, env={**given, "PYTHONPATH": str(ROOT), **environ}, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
