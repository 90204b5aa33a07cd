"""What `spryng serve` takes beside what its store takes in the same batches: messages a second, of one worker.

Store and server take turns, each with ledgers of its own on the same disk. The clients are one process that sends
what was encoded before; it shares the machine with the server, as nobody's would. Trust the ratios.
"""

from __future__ import annotations

import multiprocessing
import os
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

from spryng_instrument.api import body_of, wire_of
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.store import open_store

from ..servers import Postgres
from ..serving import serving

ROUNDS = 3
SIZES = ((1, 32, 1_000), (100, 4, 20_000), (1_000, 4, 20_000))
"""Messages a request, connections, messages a round."""


def messages(total: int) -> list[Message]:
    """As a process of ours delivers them."""
    now = datetime.now(timezone.utc)
    return [
        Message(
            new_id(), now, "chat.completions", key=f"customer{number % 50}", conversation_id=f"c{number % 1000}",
            tags=("support",), request_model="gpt-4o-mini", response_model="gpt-4o-mini-2024-07-18",
            response_id=f"chatcmpl-{number}", request_id=f"req_{number}", retries=0, service_tier="default",
            host="api.openai.com", latency_ms=812.5, usage=Usage(900, 120, 1020, 0, None, 0), writer="0123456789abcdef",
            sequence=number + 1,
        )
        for number in range(total)
    ]  # fmt: skip


def requests(sent: list[Message], batch: int) -> list[bytes]:
    path = "/trackUsage" if batch == 1 else "/trackUsage/batch"
    bodies = [body_of([wire_of(each) for each in sent[start : start + batch]]) for start in range(0, len(sent), batch)]
    if batch == 1:
        bodies = [body.removeprefix(b'{"messages":[').removesuffix(b"]}") for body in bodies]
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return [head.encode() + b"%d\r\n\r\n" % len(body) + body for body in bodies]


def send(port: int, connections: int, waiting: list[bytes], told: multiprocessing.connection.Connection) -> None:
    """Send each request, one at a time on each connection; tell how long it took, and the time of each."""
    taken: list[float] = []
    selector = selectors.DefaultSelector()
    started = time.perf_counter()
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        selector.register(sock, selectors.EVENT_READ, [time.perf_counter(), b""])
        sock.sendall(waiting.pop())
    while selector.get_map():
        for key, _ in selector.select():
            sock, state = key.fileobj, key.data
            state[1] += sock.recv(1 << 20)
            head, found, body = state[1].partition(b"\r\n\r\n")
            if not found or len(body) < int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]):
                continue
            assert head.startswith(b"HTTP/1.1 200"), state[1]
            assert body.count(b'"recorded"') >= 1
            taken.append(time.perf_counter() - state[0])
            if waiting:
                state[:] = [time.perf_counter(), b""]
                sock.sendall(waiting.pop())
            else:
                selector.unregister(sock)
                sock.close()
    told.send((time.perf_counter() - started, taken))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def sqlite() -> Iterator[Callable[[], str]]:
    with tempfile.TemporaryDirectory() as folder:
        number = count()
        yield lambda: f"sqlite:///{folder}/{next(number)}.db"


@contextmanager
def postgres() -> Iterator[Callable[[], str]]:
    with Postgres(fsync=True) as server, ExitStack() as stack:
        yield lambda: stack.enter_context(server.ledger())


def bench_server() -> None:
    for name, engine in (("SQLite", sqlite), ("PostgreSQL", postgres)):
        with engine() as fresh:
            _bench(name, fresh)


def _bench(name: str, fresh: Callable[[], str]) -> None:
    for batch, connections, total in SIZES:
        rates, bare_rates, costs, bare_costs = [], [], [], []
        times: list[float] = []
        with serving(fresh()) as server:
            store = open_store(fresh())
            store.record([])
            for _ in range(ROUNDS):
                sent = messages(total)
                started, cpu = time.perf_counter(), time.process_time()
                for start in range(0, total, batch):
                    store.record(sent[start : start + batch])
                bare_rates.append(total / (time.perf_counter() - started))
                bare_costs.append(time.process_time() - cpu)

                ours, theirs = multiprocessing.Pipe(duplex=False)
                arguments = (server.port, connections, requests(messages(total), batch), theirs)
                client = multiprocessing.get_context("fork").Process(target=send, args=arguments)
                cpu = cpu_s(server.pid)
                client.start()
                took, each = ours.recv()
                client.join()
                costs.append(cpu_s(server.pid) - cpu)
                rates.append(total / took)
                times += each
            store.close()
            memory = Path(f"/proc/{server.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        ratio = statistics.median(mine / bare for mine, bare in zip(rates, bare_rates, strict=True))
        cost = statistics.median(mine / bare for mine, bare in zip(costs, bare_costs, strict=True))
        p99 = sorted(times)[int(len(times) * 0.99)] * 1e3
        print(f"{name} server, batch {batch:5,}, {connections:2} connections: {statistics.median(rates):7,.0f} "
                  f"messages/s, bare store {statistics.median(bare_rates):7,.0f}, ratio {ratio:.2f}"
                  f"{' (goal: 0.60)' if batch == 100 else ''}; CPU {cost:.2f} x; p99 {p99:.0f} ms; "
                  f"{int(memory) // 1024} MB")  # fmt: skip
