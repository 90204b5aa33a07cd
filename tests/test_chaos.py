"""Writers, servers, the database and the network between them fail at random: what returned is counted exactly once.

Real processes and real signals: 8 writers call the SDK, deliver over a bad network to servers of the Track Usage API,
which keep one ledger. SPRYNG_TEST_FULL=1 lets each test go on for a minute instead of 15 s;
nox sets it in one session. SPRYNG_CHAOS has any number of seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import pytest

from spryng_instrument.journal import SUFFIX, aside_lines
from spryng_instrument.message import Message
from spryng_instrument.store import open_store
from spryng_instrument.store.base import START, Store

from . import workers
from .proxy import Mode, Proxy, free_port, proxied
from .servers import Postgres
from .test_processes import FULL, ROOT, assert_exactly_once

SECONDS = float(os.environ.get("SPRYNG_CHAOS") or (60 if FULL else 15))
WRITERS = 8
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


class Program:
    """A process that is killed and started again."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.command, self._log = name, command, log
        self.kills = 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=ENVIRON, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        return self.process

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self.process.poll() is None, f"{self.name} ended by itself: {self._log.read_text()[-2000:]}"
        self.process.kill()
        self.process.wait()
        self.kills += 1


def server(folder: Path, number: int, port: int, destination: str) -> Program:
    command = [sys.executable, "-m", "spryng_instrument", "serve", "--port", str(port), "--destination", destination]
    return Program(f"server {number}", command, folder / f"server-{number}.log")


def writer(folder: Path, number: int, port: int) -> Program:
    arguments = {
        "kind": number,
        "pause_s": 0.01,
        "journal": str(journal(folder, number)),
        "destination": f"http://127.0.0.1:{port}",
    }
    command = [sys.executable, workers.__file__, "calls_for_ever", str(folder), json.dumps(arguments)]
    return Program(f"writer {number}", command, folder / f"writer-{number}.log")


def journal(folder: Path, number: int) -> Path:
    """Writers are on two machines, and have a journal there."""
    return folder / f"journal-{number % 2}"


def ready(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, "the server does not get ready"
            time.sleep(0.1)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pushed(folder: Path, number: int, port: int) -> None:
    """All that dead writers left in a journal is delivered, by hand."""
    command = [sys.executable, "-m", "spryng_instrument", "push", "--journal", str(journal(folder, number))]
    command += ["--destination", f"http://127.0.0.1:{port}", "--timeout", "60"]
    done = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(journal(folder, number).glob(f"*{SUFFIX}")), done.stderr


def everything(store: Store) -> list[Message]:
    messages: list[Message] = []
    page = store.arrivals(START)
    while page.rows:
        messages += [row.message for row in page.rows]
        page = store.arrivals(page.next)
    return messages


def chaos(folder: Path, destination: str, *, servers: int, break_database: Callable[[], None] | None) -> Counter[str]:
    """Run all of it for SECONDS, break something every now and then, mend it, and deliver what is left."""
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    print(f"seed {seed}")
    done: Counter[str] = Counter()
    modes: Iterator[Mode] = cycle(("lose answers", "delay", "cut", "pass"))
    with ExitStack() as stack:
        ports = [free_port() for _ in range(servers)]
        proxies: list[Proxy] = [stack.enter_context(proxied(port)) for port in ports]
        running = [server(folder, number, port, destination) for number, port in enumerate(ports)]
        for program in running:
            stack.callback(lambda program=program: program.process.kill())
        for port in ports:
            ready(port)
        writers = [writer(folder, number, proxies[number % servers].port) for number in range(WRITERS)]
        for program in writers:
            stack.callback(lambda program=program: program.process.kill())
        wait_for(lambda: len(list((folder / "returned").glob("*"))) >= WRITERS)  # all of them call
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            time.sleep(dice.random() * 0.4)
            what = dice.choices(["writer", "server", "network", "database"], [3, 2, 5, 1])[0]
            if what == "writer":
                victim = dice.choice(writers)
                victim.kill()
                victim.start()
            elif what == "server":
                victim = dice.choice(running)
                victim.kill()
                time.sleep(dice.random())
                victim.start()
            elif what == "network":
                proxy = dice.choice(proxies)
                proxy.mode = next(modes)
                if proxy.mode == "cut":
                    proxy.cut()
            elif break_database is not None:
                break_database()
            else:
                continue
            done[what] += 1
        if break_database is not None and not done["database"]:  # chance may have left it out, and this as well
            break_database()
            done["database"] += 1
        for number, proxy in enumerate(proxies):
            proxy.mode = "lose answers"
            writers[number].kill()
            writers[number].start()
            wait_for(lambda proxy=proxy: proxy.lost)
        for proxy in proxies:
            proxy.mode = "pass"
            proxy.cut()
        for program in writers:
            program.kill()
        for port in ports:
            ready(port)
        for number in range(2):
            pushed(folder, number, proxies[number % servers].port)
        done["answers lost"] = sum(proxy.lost for proxy in proxies)
        done["kills of writers"] = sum(program.kills for program in writers)
        done["kills of servers"] = sum(program.kills for program in running)
        for program in running:
            program.process.terminate()
            assert program.process.wait(120) == 0
    return done


def judged(folder: Path, destination: str, done: Counter[str]) -> None:
    messages = everything(open_store(destination, create=False))
    kills = done["kills of writers"]
    # A kill may come within a write: that line is of a call that had not returned.
    aside = Counter(name.rsplit(".", 2)[-2] for number in range(2) for name in aside_lines(journal(folder, number)))
    assert set(aside) <= {"corrupt"}, aside
    assert aside["corrupt"] <= kills
    returned = assert_exactly_once(folder, messages, in_flight=kills)
    print(f"{returned} calls returned, {len(messages)} messages; {dict(done)}")
    assert returned > 200
    assert done["answers lost"] > 0
    for log in folder.glob("server-*.log"):
        assert "a bug of the server" not in log.read_text()
    for log in folder.glob("writer-*.log"):
        assert "metering failed" not in log.read_text()


@pytest.mark.timeout(400 + SECONDS)
def test_servers_of_one_sqlite_ledger(tmp_path: Path) -> None:
    """8 writers, a server on SQLite, and a network that cuts, delays and loses answers; all but the disk is killed."""
    destination = f"sqlite:///{tmp_path}/usage.db"
    done = chaos(tmp_path, destination, servers=1, break_database=None)
    judged(tmp_path, destination, done)


@pytest.mark.timeout(400 + SECONDS)
def test_two_servers_of_one_postgresql(tmp_path: Path) -> None:
    """8 writers, two servers, a PostgreSQL that is killed as well: the ledger has each call that returned, once."""
    with Postgres() as database, database.ledger() as destination:

        def crash() -> None:
            database.kill()
            database.start()

        done = chaos(tmp_path, destination, servers=2, break_database=crash)
        judged(tmp_path, destination, done)
        assert done["database"] > 0
