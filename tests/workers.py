"""Programs that the durability tests run in processes of their own: they call, fork, drain, hold locks, are killed.

    python tests/workers.py NAME FOLDER [JSON of keyword arguments]

Each call is one of the real SDK, on a transport that answers at once. After a call has returned, and not before, the id
of its response is written, unbuffered, to a file in FOLDER/returned: what stands there must be in the ledger.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from secrets import token_hex
from typing import Any

import openai
import openai._base_client as base

import spryng_instrument
from spryng_instrument import recorder as recording
from spryng_instrument import spending
from spryng_instrument.alerts import Alerts
from spryng_instrument.budgets import budget_states, read_budgets
from spryng_instrument.errors import BudgetExceeded, StoreError
from spryng_instrument.message import Message, Usage, new_id
from spryng_instrument.pump import deliver_orphans
from spryng_instrument.store.sqlite import SqliteStore

recording.strict = True
http: Any = vars(base).get("httpx") or vars(base)["httpx2"]
ASK: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


def answer(request: Any) -> Any:
    """A chat completion with an id of its own, streamed or not."""
    body = json.loads(request.content)
    head = {"id": f"chatcmpl-{token_hex(12)}", "created": 1, "model": "gpt-4o-mini-2024-07-18"}
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        return http.Response(200, json={**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    head["object"] = "chat.completion.chunk"
    chunks: list[dict[str, Any]] = [
        {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {**head, "choices": [], "usage": usage},
    ]
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    return http.Response(200, text=text, headers={"content-type": "text/event-stream"})


def client() -> openai.OpenAI:
    """A real client whose transport answers at once."""
    return openai.OpenAI(
        api_key="k", base_url="http://127.0.0.1:9/v1", http_client=http.Client(transport=http.MockTransport(answer))
    )


def async_client() -> openai.AsyncOpenAI:
    transport = http.MockTransport(answer)
    return openai.AsyncOpenAI(
        api_key="k", base_url="http://127.0.0.1:9/v1", http_client=http.AsyncClient(transport=transport)
    )


def ledger_of(folder: Path) -> Path:
    return folder / "usage.db"


def instrument(folder: Path, **settings: Any) -> None:
    spryng_instrument.instrument(
        **{
            "destination": f"sqlite:///{ledger_of(folder)}", "journal": str(folder / "journal"),
            "on_missing_key": "ignore", "beat_s": 0.02, **settings,
        }
    )  # fmt: skip


class Returned:
    """Where a process says which calls returned to it."""

    def __init__(self, folder: Path) -> None:
        (folder / "returned").mkdir(exist_ok=True)
        path = folder / "returned" / f"{os.getpid()}-{token_hex(4)}"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, response_id: str) -> None:
        os.write(self._fd, f"{response_id}\n".encode())


def call(sdk: openai.OpenAI, returned: Returned, *, stream: bool = False) -> None:
    """One call whose reply, or whole stream, reached the caller."""
    if stream:
        ids = [chunk.id for chunk in sdk.chat.completions.create(stream=True, **ASK)]
        returned.add(ids[-1])
    else:
        returned.add(sdk.chat.completions.create(**ASK).id)


def forked(work: Callable[[], object]) -> int:
    """Run *work* in a child that ends by os._exit: its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        logging.getLogger().exception("a child failed")
        os._exit(1)
    os._exit(0)


def ended_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# --- killed at random moments


def calls_for_ever(folder: Path, kind: int, pause_s: float = 0.0, **settings: Any) -> None:
    instrument(folder, **settings)
    returned = Returned(folder)
    if kind % 4 == 3:

        async def loop() -> None:
            sdk = async_client()
            while True:
                returned.add((await sdk.chat.completions.create(**ASK)).id)
                await asyncio.sleep(pause_s)

        asyncio.run(loop())
    sdk = client()
    for number in count():
        time.sleep(pause_s)
        call(sdk, returned, stream=kind % 2 == 1 and number % 2 == 1)


def drains_for_ever(folder: Path) -> None:
    store = SqliteStore(ledger_of(folder))
    while True:
        with suppress(StoreError):
            deliver_orphans(folder / "journal", store)
        time.sleep(0.005)


def kill(folder: Path, *, rounds: int, workers: int, drainers: int, lock_s: float) -> None:
    """Kill each worker once a round, at a random moment, and start it again; drainers half as often.

    Half of the workers are killed only once a call has returned to them, however busy the machine is.
    """
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)

    def start(name: tuple[str, int]) -> int:
        kind, number = name
        if kind == "worker":
            return forked(lambda: calls_for_ever(folder, number))
        return forked(lambda: drains_for_ever(folder))

    names = [("worker", number) for number in range(workers)] + [("drainer", number) for number in range(drainers)]
    client().chat.completions.create(**ASK)  # what the SDK imports at its first call, once for all
    running = {name: start(name) for name in names}
    lock = forked(lambda: hold_lock(folder, lock_s)) if lock_s else None
    kills = done = waited = 0
    while done < rounds or (lock is not None and not _ended(lock)):
        for name in dice.sample(names, len(names)):
            time.sleep(dice.random() * (0.1 if done < rounds else 1.0))
            if dice.random() < 0.5:
                if name[0] == "drainer":
                    continue
                waited += 1
                while not any(file.stat().st_size for file in (folder / "returned").glob(f"{running[name]}-*")):
                    assert os.waitpid(running[name], os.WNOHANG)[0] == 0, f"{name} ended by itself"
                    time.sleep(0.002)
            os.kill(running[name], signal.SIGKILL)
            status = os.waitpid(running[name], 0)[1]
            assert os.WIFSIGNALED(status), f"{name} ended by itself, with {status}"
            kills += 1
            running[name] = start(name)
        done += 1
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
    say(kills=kills, waited=waited, rounds=done, seed=seed)


def _ended(pid: int) -> bool:
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def hold_lock(folder: Path, seconds: float) -> None:
    """Hold the ledger in a write transaction."""
    while not ledger_of(folder).exists() or not ledger_of(folder).stat().st_size:
        time.sleep(0.005)
    db = sqlite3.connect(ledger_of(folder), timeout=5, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    (folder / "locked").touch()
    time.sleep(seconds)
    db.execute("ROLLBACK")
    db.close()
    (folder / "locked").unlink()


# --- fork, spawn, exec, exits


def fork_in_threads(folder: Path, *, children: int) -> None:
    """Fork again and again while threads call and the pump works; every child calls, delivers, and ends."""
    instrument(folder, beat_s=0.002)
    sdk, returned, stop = client(), Returned(folder), threading.Event()
    for stream in (False, True):  # the SDK imports at its first call: a fork meanwhile would hang without us, too
        call(sdk, returned, stream=stream)

    def calling() -> None:
        while not stop.is_set():
            call(sdk, returned)

    def in_child(number: int) -> None:
        own, theirs = client(), Returned(folder)
        for turn in range(3):
            call(own, theirs, stream=turn == 1)
        assert spryng_instrument.flush(10), spryng_instrument.stats()
        stats = spryng_instrument.stats()
        assert (stats.recorded, stats.delivered, stats.waiting) == (3, 3, 0), stats
        call(own, theirs)
        if number % 2:
            sys.exit(0)

    def leave(number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            in_child(number)
        except SystemExit:
            raise  # through atexit
        except BaseException:
            logging.getLogger().exception("a child failed")
            os._exit(1)
        os._exit(0)

    threads = [threading.Thread(target=calling) for _ in range(2)]
    for thread in threads:
        thread.start()
    ended = []
    for number in range(children):
        ended.append(ended_well(leave(number)))
    stop.set()
    for thread in threads:
        thread.join()
    say(ended=ended)


def fork_while_recording(folder: Path, *, children: int) -> None:
    """Fork while another thread is within the ledger; the child then records in it."""
    store, stop = SqliteStore(ledger_of(folder)), threading.Event()

    def recording() -> None:
        while not stop.is_set():
            store.record([message() for _ in range(200)], timeout_s=30)

    thread = threading.Thread(target=recording)
    thread.start()
    time.sleep(0.1)
    dice = random.Random(0)
    pids = []
    for _ in range(children):
        time.sleep(dice.random() * 0.01)
        pids.append(forked(lambda: store.record([message()], timeout_s=8)))
    stop.set()
    thread.join()
    say(ended=[ended_well(pid) for pid in pids])


def many(folder: Path, calls: int = 5) -> None:
    """What a worker of a pool does."""
    instrument(folder)
    sdk, returned = client(), Returned(folder)
    for _ in range(calls):
        call(sdk, returned)


def multiprocess(folder: Path, *, method: str) -> None:
    """Call, then start processes by multiprocessing, which call too."""
    many(folder)
    processes = [multiprocessing.get_context(method).Process(target=many, args=(folder,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    say(exits=[process.exitcode for process in processes])


def prefork(folder: Path, *, workers: int) -> None:
    """As gunicorn does it: instrument in the master, fork the workers, later end them by SIGTERM."""
    instrument(folder)
    master = Returned(folder)
    call(client(), master)  # at import of the application, say

    def work() -> None:
        sdk, returned = client(), Returned(folder)
        while True:
            call(sdk, returned)

    pids = [forked(work) for _ in range(workers)]
    while len([file for file in (folder / "returned").iterdir() if file.stat().st_size]) < workers + 1:
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    call(client(), master)
    say(statuses=statuses)


def end(folder: Path, *, how: str) -> None:
    """Call, and end in one of the ways that processes end in."""
    instrument(folder, beat_s=60.0)  # too long for the pump: only the exit can deliver
    sdk, returned = client(), Returned(folder)
    for _ in range(3):
        call(sdk, returned)
    if how == "os._exit":
        os._exit(0)
    if how in ("SIGTERM", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(10)
    if how == "exception":
        raise RuntimeError("the application failed")
    if how == "sys.exit":
        sys.exit(3)
    if how == "open stream":
        stream = sdk.chat.completions.create(stream=True, **ASK)
        returned.add(next(iter(stream)).id)
        globals()["kept"] = stream  # alive until the interpreter has gone
    return


def parent_dies(folder: Path) -> None:
    """Fork a child that does nothing, call, and die."""
    instrument(folder, beat_s=60.0)
    sdk, returned = client(), Returned(folder)
    call(sdk, returned)

    def idle() -> None:
        os.closerange(1, 3)  # or who reads what we say would wait for the child
        time.sleep(30)

    child = forked(idle)
    call(sdk, returned)
    say(child=child)
    os.kill(os.getpid(), signal.SIGKILL)


def daemon(folder: Path) -> None:
    """Close every file after instrument(), as daemons do, then open others in their place."""
    instrument(folder, beat_s=60.0)
    sdk, returned = client(), Returned(folder)
    call(sdk, returned)
    os.closerange(3, 2000)
    kept = [os.open(folder / f"theirs-{number}", os.O_RDWR | os.O_CREAT, 0o600) for number in range(20)]
    returned = Returned(folder)
    sdk = client()
    call(sdk, returned)
    delivered = spryng_instrument.flush(5)
    stats = spryng_instrument.stats()
    child = forked(lambda: [os.fstat(fd) for fd in kept])  # a fork closes none that is not ours
    say(
        delivered=delivered,
        counts=[stats.recorded, stats.delivered, stats.waiting, stats.dropped],
        theirs=[os.fstat(fd).st_size for fd in kept],
        child=ended_well(child),
    )


def close_then_flush(folder: Path) -> None:
    """Close every file and deliver without another call between."""
    instrument(folder, beat_s=60.0)
    sdk, returned = client(), Returned(folder)
    call(sdk, returned)
    os.closerange(3, 2000)
    say(delivered=spryng_instrument.flush(5), waiting=spryng_instrument.stats().waiting)


def as_nobody(folder: Path, *, work: str) -> None:
    """Run another of these programs without root's rights."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    globals()[work](folder)


def read_only_ledger(folder: Path) -> None:
    """The ledger's folder may be read only, the journal's may be written; then the folder is made writable again."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("spryng_instrument").addHandler(handler)
    instrument(folder / "ledger", journal=str(folder / "journal"))
    sdk, returned = client(), Returned(folder)
    call(sdk, returned)
    first = spryng_instrument.flush(0.5)
    stats = spryng_instrument.stats()
    say(first=first, waiting=stats.waiting, failure=stats.failure, log=messages)
    sys.stdin.readline()  # until somebody has mended it
    deadline = time.monotonic() + 20
    while spryng_instrument.stats().waiting and time.monotonic() < deadline:
        time.sleep(0.02)
    say(waiting=spryng_instrument.stats().waiting, failure=spryng_instrument.stats().failure, log=messages)


def message(writer: str | None = None, sequence: int | None = None) -> Message:
    return Message(
        id=new_id(), timestamp=datetime.now(timezone.utc), operation="custom", usage=Usage(input_tokens=1),
        writer=writer, sequence=sequence,
    )  # fmt: skip


def record_many(folder: Path, *, processes: int, messages: int) -> None:
    """Several processes record into one new ledger, all starting at once."""
    start = time.time() + 0.3

    def work() -> None:
        store, writer = SqliteStore(ledger_of(folder)), token_hex(8)
        time.sleep(max(start - time.time(), 0))
        for first in range(1, messages, 20):
            batch = [message(writer, number) for number in range(first, min(first + 20, messages + 1))]
            receipt = store.record(batch, timeout_s=30)
            assert receipt.count("recorded") == len(batch), receipt

    say(ended=[ended_well(pid) for pid in [forked(work) for _ in range(processes)]])


def create_many(folder: Path, *, processes: int, rounds: int) -> None:
    """Again and again several processes make one new ledger at the same moment, each recording one message."""

    def work(path: Path, start: float) -> None:
        while time.time() < start:
            pass
        assert SqliteStore(path).record([message()], timeout_s=20).count("recorded") == 1

    ended = []
    for number in range(rounds):
        path, start = folder / str(number) / "usage.db", time.time() + 0.03

        def one(path: Path = path, start: float = start) -> None:
            work(path, start)

        ended += [ended_well(pid) for pid in [forked(one) for _ in range(processes)]]
    say(ended=ended)


# --- budgets


def until_refused(folder: Path, *, pause_s: float = 0.02, key: str = "acme") -> list[tuple[float, float]]:
    """Call until a budget refuses. Returns when each call had returned, and when the ledger was read before it."""
    assert recording.active is not None
    assert recording.active.budgets is not None
    sdk, calls = client(), []
    with spryng_instrument.usage_context(key), suppress(BudgetExceeded):
        while True:
            read_at = recording.active.budgets._read_at or time.monotonic()
            read = time.time() - (time.monotonic() - read_at)
            sdk.chat.completions.create(**ASK)
            calls.append((time.time(), read))
            time.sleep(pause_s)
    return calls


def budget_fork(folder: Path) -> None:
    """A process that has used 2 of 10, and goes on calling for another customer, forks; children call until refused."""
    spending.REFRESH_S = 0.05
    instrument(folder, budgets=str(folder / "budgets.toml"))
    sdk = client()
    with spryng_instrument.usage_context("acme"):
        for _ in range(2):
            sdk.chat.completions.create(**ASK)
    stop = threading.Event()

    def calling() -> None:
        with spryng_instrument.usage_context("other"):
            while not stop.wait(0.001):
                sdk.chat.completions.create(**ASK)

    def read(messages: int) -> bool:
        ours = recording.active.budgets if recording.active is not None else None
        assert ours is not None
        return any(row.messages == messages for answer in list(ours._answers.values()) for row in answer.values())

    thread = threading.Thread(target=calling)
    thread.start()
    ended = []
    for number in range(3):
        while not read(10 if number else 2):  # of this process, or the child would begin with an older reading
            time.sleep(0.02)

        def child(number: int = number) -> None:
            calls = until_refused(folder)
            (folder / f"child{number}").write_text(str(len(calls)))
            assert "spryng-budgets" in [each.name for each in threading.enumerate()]
            assert spryng_instrument.flush(20)

        ended.append(ended_well(forked(child)))
    stop.set()
    thread.join()
    say(ended=ended, sent=[int((folder / f"child{number}").read_text()) for number in range(3)])


def budget_share(folder: Path, *, processes: int) -> None:
    """Processes share a budget, each calling until it is refused."""
    spending.REFRESH_S = 0.2

    def work(number: int) -> None:
        instrument(folder, budgets=str(folder / "budgets.toml"), beat_s=0.05)
        (folder / f"calls{number}").write_text(json.dumps(until_refused(folder, pause_s=0.03)))
        assert spryng_instrument.flush(20)

    def one(number: int) -> int:
        return forked(lambda: work(number))

    ended = [ended_well(pid) for pid in [one(number) for number in range(processes)]]
    say(ended=ended, calls=[json.loads((folder / f"calls{number}").read_text()) for number in range(processes)])


def budget_alerts(folder: Path, *, processes: int, calls: int) -> None:
    """Processes reach the thresholds of a budget at the same moment, and go on until each alert was told."""
    spending.REFRESH_S = 0.05

    def work() -> None:
        instrument(folder, budgets=str(folder / "budgets.toml"))
        sdk = client()
        with spryng_instrument.usage_context("acme"):
            for _ in range(calls):
                sdk.chat.completions.create(**ASK)
            store = SqliteStore(ledger_of(folder))
            while len(store.records("alert.sent")) < 3:
                time.sleep(0.02)
        assert spryng_instrument.flush(20)
        spryng_instrument.uninstrument()

    say(ended=[ended_well(pid) for pid in [forked(work) for _ in range(processes)]])


def budget_die(folder: Path) -> None:
    """Append the alerts of a budget that is reached, and end before any is posted."""
    budgets = read_budgets(str(folder / "budgets.toml"))
    store = SqliteStore(ledger_of(folder))
    now = datetime.now(timezone.utc)
    store.record([Message(new_id(), now, "custom", key="acme")])
    Alerts(store, budgets).look(budget_states(store, budgets.budgets, now), now)
    os.kill(os.getpid(), signal.SIGKILL)


def lines_of(folder: Path) -> Iterator[str]:
    """The ids of the responses that returned to a caller, of every process."""
    for path in (folder / "returned").iterdir():
        yield from path.read_text().split()


if __name__ == "__main__":
    name, where, *arguments = sys.argv[1:]
    globals()[name](Path(where), **json.loads(arguments[0] if arguments else "{}"))
