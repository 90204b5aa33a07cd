"""Processes are forked, spawned, killed and end in every way there is: nothing that returned is lost, nothing doubled.

Real processes, real signals, real files. SPRYNG_TEST_FULL=1 holds the ledger locked for 30 s instead of 6 in the kill
test; nox sets it in one session.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import spryng_instrument
from spryng_instrument import pump
from spryng_instrument.journal import SUFFIX, aside_lines, count_lines
from spryng_instrument.message import Message
from spryng_instrument.pump import deliver_orphans
from spryng_instrument.store.sqlite import SqliteStore

from . import workers

FULL = os.environ.get("SPRYNG_TEST_FULL") == "1"
LOCK_S = 30.0 if FULL else 6.0
ROOT = Path(spryng_instrument.__file__).parent.parent


@contextmanager
def started(name: str, folder: Path, **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """A program of workers.py, which is gone afterwards."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, workers.__file__, name, str(folder), json.dumps(arguments)],
        env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(name: str, folder: Path, *, status: int = 0, timeout_s: float = 150, **arguments: Any) -> dict[str, Any]:
    """What a program of workers.py said, once it has ended as it should."""
    with started(name, folder, **arguments) as process:
        out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == status, err
    assert "a child failed" not in err, err
    assert "metering failed" not in err, err
    return json.loads(out.splitlines()[-1]) if out else {}


def ledger(folder: Path) -> list[Message]:
    """What is in the ledger, with nothing delivered for the occasion."""
    store = SqliteStore(workers.ledger_of(folder), create=False)
    return [row.message for row in store.messages(limit=10**9).rows]


def drained(folder: Path, *, kills: int = 0) -> list[Message]:
    """What is in the ledger once a new process has delivered what dead ones left.

    A kill may come within a write: the kernel ends it between two pages. The line that it cuts off belongs to a call
    that did not return; it is set aside, at most one a kill.
    """
    deliver_orphans(folder / "journal", SqliteStore(workers.ledger_of(folder)), timeout_s=30)
    assert not list((folder / "journal").glob(f"*{SUFFIX}")), "segments of dead processes are left"
    aside = aside_lines(folder / "journal")
    assert sum(aside.values()) <= kills, aside
    for name in aside:
        assert name.endswith(f".corrupt{SUFFIX}")
    return ledger(folder)


def holes(folder: Path) -> int:
    store = SqliteStore(workers.ledger_of(folder), create=False)
    return sum(given - here for _, given, here in store.health().gaps)


def assert_exactly_once(folder: Path, messages: list[Message], *, in_flight: int = 0) -> int:
    """Each call that returned is there once; beyond them at most the calls in flight. Returns how many returned."""
    returned = list(workers.lines_of(folder))
    assert len(set(returned)) == len(returned)
    recorded = Counter(message.response_id for message in messages)
    lost = [response_id for response_id in returned if not recorded[response_id]]
    assert not lost, f"{len(lost)} of {len(returned)} lost"
    assert [each for each in recorded.items() if each[1] > 1] == []
    assert len({message.id for message in messages}) == len(messages)
    assert len({(message.writer, message.sequence) for message in messages}) == len(messages)
    assert len(messages) - len(returned) <= in_flight
    return len(returned)


@pytest.mark.parametrize(
    ("drainers", "lock_s"), [(0, 0.0), (2, 0.0), (0, LOCK_S)], ids=["alone", "two drain at once", "locked"]
)
def test_killed_at_random_moments(tmp_path: Path, drainers: int, lock_s: float, record_property: Any) -> None:
    """Four processes call and are killed with SIGKILL 20 times each: what returned is in the ledger exactly once.

    Alone; with two processes draining, and killed, at the same time; and with the ledger locked for 6 s by a third
    (30 s with SPRYNG_TEST_FULL=1). Numbers have no holes: one thread calls, so only the
    last number of a killed process can be missing, and that one leaves none.
    """
    told = run("kill", tmp_path, rounds=20, workers=4, drainers=drainers, lock_s=lock_s)

    messages = drained(tmp_path, kills=told["kills"])
    returned = assert_exactly_once(tmp_path, messages, in_flight=told["kills"])
    assert told["kills"] >= 84
    assert returned >= told["waited"] > 10
    assert holes(tmp_path) == 0
    record_property("kill test", f"{told['kills']} kills, {returned} calls returned, {len(messages)} messages")
    print(f"{told['kills']} kills, {returned} calls returned, {len(messages)} messages")


def test_fork_while_threads_call(tmp_path: Path) -> None:
    """However often a process forks while its threads call and its pump delivers, parent and children lose nothing.

    Each child delivers its own at once, as it would not if it had inherited a lock or half a SQLite connection.
    """
    told = run("fork_in_threads", tmp_path, children=12)

    assert all(told["ended"]), told
    assert_exactly_once(tmp_path, drained(tmp_path))
    assert holes(tmp_path) == 0


def test_fork_while_the_ledger_is_written(tmp_path: Path) -> None:
    """A child that was forked while another thread was within a transaction can write to the ledger itself.

    SQLite keeps its locks in the memory of the process: a child that inherits an open connection's believes that they
    are its own, or waits for ever for a thread that it does not have.
    """
    told = run("fork_while_recording", tmp_path, children=20)

    assert told["ended"] == [True] * 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """Processes of multiprocessing record and number for themselves."""
    told = run("multiprocess", tmp_path, method=method)

    messages = drained(tmp_path)
    assert told["exits"] == [0, 0]
    assert assert_exactly_once(tmp_path, messages) == 15
    assert list(Counter(message.writer for message in messages).values()) == [5, 5, 5]
    assert holes(tmp_path) == 0


def test_prefork_server(tmp_path: Path) -> None:
    """Instrumented before the fork, as under gunicorn --preload: workers ended by SIGTERM have lost nothing."""
    told = run("prefork", tmp_path, workers=3)

    messages = drained(tmp_path, kills=3)
    assert told["statuses"] == [-signal.SIGTERM] * 3
    assert_exactly_once(tmp_path, messages, in_flight=3)
    assert len({message.writer for message in messages}) == 4
    assert holes(tmp_path) == 0


@pytest.mark.parametrize(
    ("how", "status"),
    [("os._exit", 0), ("SIGTERM", -signal.SIGTERM), ("SIGKILL", -signal.SIGKILL)],
)
def test_ended_without_a_word(tmp_path: Path, how: str, status: int) -> None:
    """A process that ends right after a call, without its exit handlers, leaves its messages in the journal."""
    run("end", tmp_path, how=how, status=status)

    assert count_lines(tmp_path / "journal") == 3
    assert assert_exactly_once(tmp_path, drained(tmp_path)) == 3


@pytest.mark.parametrize(("how", "status"), [("plain", 0), ("sys.exit", 3), ("exception", 1)])
def test_exit_delivers(tmp_path: Path, how: str, status: int) -> None:
    """A process that ends in order has delivered what it recorded, and leaves no segment."""
    run("end", tmp_path, how=how, status=status)

    assert assert_exactly_once(tmp_path, ledger(tmp_path)) == 3
    assert not list((tmp_path / "journal").iterdir())


def test_exit_with_an_open_stream(tmp_path: Path) -> None:
    """A stream that is open when the interpreter ends is recorded as incomplete, and delivered."""
    run("end", tmp_path, how="open stream")

    messages = ledger(tmp_path)
    assert assert_exactly_once(tmp_path, messages) == 4
    assert Counter(message.status for message in messages) == {"ok": 3, "incomplete": 1}


def test_exit_delivers_orphans(tmp_path: Path) -> None:
    """A short program delivers at its exit what killed ones left before it, too."""
    run("end", tmp_path, how="SIGKILL", status=-signal.SIGKILL)
    run("end", tmp_path, how="plain")

    assert assert_exactly_once(tmp_path, ledger(tmp_path)) == 6


def test_running_process_delivers_orphans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs on delivers what others leave behind, by itself and without a call of its own."""
    monkeypatch.setattr(pump, "ORPHANS_EVERY_S", 0.05)
    workers.instrument(tmp_path)
    run("end", tmp_path, how="SIGKILL", status=-signal.SIGKILL)

    deadline = time.monotonic() + 20
    while count_lines(tmp_path / "journal"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert assert_exactly_once(tmp_path, ledger(tmp_path)) == 3
    assert spryng_instrument.stats().recorded == spryng_instrument.stats().delivered == 0, "they are not its own"


def test_child_holds_nothing_of_a_dead_parent(tmp_path: Path) -> None:
    """A forked child that lives on, and does nothing, keeps no segment of its killed parent locked."""
    told = run("parent_dies", tmp_path, status=-signal.SIGKILL)
    try:
        assert assert_exactly_once(tmp_path, drained(tmp_path)) == 2
    finally:
        os.kill(told["child"], signal.SIGKILL)


def test_daemon_closes_all_files(tmp_path: Path) -> None:
    """Every file is closed, others get their numbers: messages are kept, and no byte of ours is in a file of theirs."""
    told = run("daemon", tmp_path)

    assert told["theirs"] == [0] * 20
    assert told["child"], "a fork closed files that are not ours"
    assert told["delivered"]
    assert told["counts"] == [2, 2, 0, 0]
    assert assert_exactly_once(tmp_path, drained(tmp_path)) == 2


def test_all_files_closed_before_delivery(tmp_path: Path) -> None:
    """flush() delivers although the journal's file was closed by somebody else."""
    told = run("close_then_flush", tmp_path)

    assert told == {"delivered": True, "waiting": 0}
    assert assert_exactly_once(tmp_path, ledger(tmp_path)) == 1
