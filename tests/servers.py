"""Real servers for the tests: on loopback, on a free port, in a folder of their own, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg


class Postgres:
    """A PostgreSQL that runs within a `with`, or ends with the process that started it.

    Unless told to, it does not sync to the disk: what it acknowledged survives its SIGKILL, but no power cut.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        self._fsync = "on" if fsync else "off"
        self._held = socket.socket()  # bound, but not listening: no other test is given the port
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]
        self._names = count(1)
        self._folder = tempfile.mkdtemp(prefix="spryng-postgres-")
        self._as_user: list[str] = []
        if os.getuid() == 0:  # it refuses to run as root
            self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(self._folder, "postgres", "postgres")
        self._data = f"{self._folder}/data"
        self._process: subprocess.Popen[bytes] | None = None
        made = subprocess.run(
            [*self._as_user, _program("initdb"), "-D", self._data, "-U", "tester", "-A", "trust", "-E", "UTF8",
             "--locale=C.UTF-8", "--no-sync"],
            capture_output=True, text=True, cwd="/",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, again after `kill`, and wait until it answers."""
        dies_with_us = ["setpriv", "--pdeathsig", "INT"] if sys.platform == "linux" else []
        options = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": self._fsync,
            "autovacuum": "off", "max_connections": 200, "shared_buffers": "64MB", "restart_after_crash": "on",
        }  # fmt: skip
        command = [*self._as_user, *dies_with_us, _program("postgres"), "-D", self._data]
        command += [f"--{name}={value}" for name, value in options.items()]
        deadline = time.monotonic() + 60
        self._process = None
        while True:
            if self._process is None or self._process.poll() is not None:  # one that was killed is not quite gone yet
                with open(f"{self._folder}/log", "ab") as log:
                    self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")
            try:
                return psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.05)

    def log(self) -> str:
        """What the server has said."""
        return Path(self._folder, "log").read_text()

    def kill(self) -> None:
        """SIGKILL, as of the kernel out of memory: the server and all its processes, with whatever they were doing."""
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server and to all its processes: SIGSTOP, SIGCONT."""
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """As an administrator does: connections are ended, transactions rolled back."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)

    @contextmanager
    def ledger(self) -> Iterator[str]:
        """URL of an empty schema, which is gone afterwards."""
        name = f"ledger{next(self._names)}"
        self.run(f"CREATE SCHEMA {name}")
        try:
            yield f"{self.url}?options={quote(f'-csearch_path={name}')}"
        finally:
            self.run(f"DROP SCHEMA {name} CASCADE")

    def run(self, *statements: str) -> None:
        """Run statements, as the administrator."""
        with psycopg.connect(self.url, autocommit=True, options="-cclient_min_messages=warning") as db:
            for statement in statements:
                db.execute(statement.encode())

    def _pids(self) -> list[int]:
        assert self._process is not None
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = (line.split() for line in listed.splitlines())
        return [self._process.pid, *(int(pid) for pid, parent in pairs if int(parent) == self._process.pid)]

    def __enter__(self) -> Postgres:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
        self._held.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _program(name: str) -> str:
    """Where a program of PostgreSQL is: on PATH, or where Debian has it."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = shutil.which(name) or (debian and str(debian[-1]))
    assert found, f"{name} is missing: apt-get install postgresql"
    return found
