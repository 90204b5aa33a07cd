"""The pump: whatever happens to ledger, disk or process, each message arrives once, and what is wrong is said.

The world is spoiled for real: files are corrupted, locked, deleted, replaced. Only crashes in the middle of a step are
simulated, since hypothesis could not replay those of a real process (tests/test_processes.py kills those).
SPRYNG_TEST_FULL=1 looks for interleavings ten times as long.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import spryng_instrument
from spryng_instrument import journal as journals
from spryng_instrument import pump as pumps
from spryng_instrument import recorder as recording
from spryng_instrument.errors import StoreError
from spryng_instrument.journal import SUFFIX, Journal, aside_lines, count_lines
from spryng_instrument.message import Message, Usage, decode, encode, new_id
from spryng_instrument.pump import Begun, Pump, deliver_orphans
from spryng_instrument.recorder import Recorder
from spryng_instrument.store.base import START, Receipt
from spryng_instrument.store.sql import Ask
from spryng_instrument.store.sqlite import SqliteStore

from .test_journal import FakedOs, file_size_limit

FULL = os.environ.get("SPRYNG_TEST_FULL") == "1"


class Metered:
    """A process that meters, with its ledger and journal in folders of their own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger" / "usage.db"
        self.journal = folder / "journal"

    def begin(self, **settings: Any) -> None:
        spryng_instrument.instrument(
            **{"destination": f"sqlite:///{self.path}", "journal": str(self.journal), "beat_s": 0.01,
               "exit_timeout_s": 0.3, **settings}
        )  # fmt: skip

    def call(self, count: int = 1) -> list[str]:
        """As many messages, by the public way: their ids."""
        return [
            spryng_instrument.track_usage(key="k", usage={"prompt_tokens": 1, "completion_tokens": 1})
            for _ in range(count)
        ]

    def ids(self) -> list[str]:
        """What is in the ledger, oldest first."""
        return [row.message.id for row in SqliteStore(self.path, create=False).messages(limit=10**9).rows][::-1]

    def arrived(self, timeout_s: float = 60.0) -> bool:
        """Whether all that was recorded is delivered by itself, without a flush."""
        return until(lambda: not spryng_instrument.stats().waiting, timeout_s)

    @property
    def recorder(self) -> Recorder:
        assert recording.active is not None
        return recording.active


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def metered(tmp_path: Path) -> Metered:
    return Metered(tmp_path)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def message(number: int = 0, **fields: Any) -> Message:
    fields = {"id": new_id(), "operation": "custom", "usage": Usage(input_tokens=number), **fields}
    return Message(timestamp=datetime.now(timezone.utc), **fields)


# --- a world that is not as it should be: the ledger


def _locked(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    SqliteStore(path).record([])
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    return db.close


def _corrupt(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    path.write_bytes(b"SQLite format 3\0" + os.urandom(8192))
    return path.unlink


def _text(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    path.write_text("Dear diary,\n" * 500)
    return path.unlink


def _foreign(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    return path.unlink


def _directory(path: Path) -> Callable[[], None]:
    path.mkdir(parents=True)
    return path.rmdir


def _file_for_folder(path: Path) -> Callable[[], None]:
    path.parent.write_text("a file")
    return path.parent.unlink


def _newer(path: Path) -> Callable[[], None]:
    path.parent.mkdir()
    SqliteStore(path).record([])
    _set_version(path, +1)
    return lambda: _set_version(path, -1)


def _set_version(path: Path, by: int) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    [version] = db.execute("PRAGMA user_version").fetchone()
    db.execute(f"PRAGMA user_version = {version + by}")
    db.close()


def _damaged(path: Path) -> Callable[[], None]:
    """A ledger with a page of zeros in it."""
    path.parent.mkdir()
    SqliteStore(path).record([message() for _ in range(300)])
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    return lambda: path.write_bytes(whole) and None


BAD_LEDGERS: dict[str, tuple[Callable[[Path], Callable[[], None]], str]] = {
    "locked": (_locked, r"usage\.db stayed locked for \d+\.\d s by another process.*close what holds"),
    "corrupt": (_corrupt, r"no ledger of spryng_instrument, or is corrupt: .*move that file away"),
    "text": (_text, r"no ledger of spryng_instrument, or is corrupt: .*choose another destination"),
    "foreign": (_foreign, r"is a SQLite file of something else\. Choose another destination"),
    "directory": (_directory, r"usage\.db: unable to open database file.*check the disk"),
    "file for folder": (_file_for_folder, r"(File exists|Not a directory).*Messages wait"),
    "newer": (_newer, r"has schema \d+, written by a newer spryng_instrument; this one knows \d+\. Upgrade it: pip"),
    "damaged": (_damaged, r"corrupt: .*malformed.*move that file away"),
}


@pytest.mark.parametrize("what", BAD_LEDGERS)
def test_ledger_that_takes_nothing(metered: Metered, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """Messages wait, one error says what is wrong and what to do, stats() shows it, the file is left as it is; when the
    world is mended they are delivered without a restart.
    """
    spoil, said = BAD_LEDGERS[what]
    mend = spoil(metered.path)
    before = metered.path.read_bytes() if metered.path.is_file() else None
    metered.begin()
    ids = metered.call(3)

    assert not spryng_instrument.flush(0.5)
    ids += metered.call(2)
    assert until(lambda: spryng_instrument.stats().failure is not None)
    time.sleep(0.1)  # it goes on trying
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.waiting, stats.dropped) == (5, 0, 5, 0)
    assert stats.errors == 0
    [error] = errors(caplog)
    assert error.startswith(f"messages wait in the journal at {metered.journal}: ")
    assert_matches(said, error)
    assert_matches(said, stats.failure)
    assert before == (metered.path.read_bytes() if metered.path.is_file() else None)

    mend()
    assert metered.arrived()
    assert set(ids) <= set(metered.ids())
    assert len(set(metered.ids())) == len(metered.ids())
    assert until(lambda: spryng_instrument.stats().failure is None)
    assert "the destination takes messages again" in caplog.text
    assert len(errors(caplog)) == 1
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.waiting) == (5, 5, 0)


def assert_matches(pattern: str, text: str | None) -> None:
    import re

    assert text is not None
    assert re.search(pattern, text, re.DOTALL), text


def test_empty_file_becomes_the_ledger(metered: Metered) -> None:
    """An empty file, as mktemp makes one, holds nothing of anybody: it is used."""
    metered.path.parent.mkdir()
    metered.path.touch()
    metered.begin()
    ids = metered.call(2)
    assert spryng_instrument.flush()
    assert metered.ids() == ids


@pytest.mark.parametrize("folder", [False, True])
def test_ledger_deleted_while_running(metered: Metered, folder: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A ledger that is deleted is made again; what is recorded after that is in it, and nothing waits for ever."""
    metered.begin()
    metered.call(2)
    assert spryng_instrument.flush()
    if folder:
        shutil.rmtree(metered.path.parent)
    else:
        metered.path.unlink()
    ids = metered.call(3)
    assert spryng_instrument.flush()
    assert metered.ids() == ids
    assert errors(caplog) == []


def test_ledger_replaced_during_a_transaction(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that is deleted between our opening and our commit did not keep the batch: it is delivered again."""
    metered.path.parent.mkdir()
    stored, deletions = SqliteStore._stored, iter([None])

    def deletes(self: SqliteStore, *arguments: Any) -> Any:
        for _ in deletions:
            metered.path.unlink()
        return stored(self, *arguments)

    monkeypatch.setattr(SqliteStore, "_stored", deletes)
    metered.begin()
    ids = metered.call(3)
    assert metered.arrived()
    assert metered.ids() == ids


def test_log_of_a_deleted_ledger(metered: Metered) -> None:
    """The -wal and -shm of a ledger that was deleted are not replayed into the new one."""
    metered.path.parent.mkdir()
    store = SqliteStore(metered.path)
    store.record([message()])
    reader = sqlite3.connect(metered.path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM messages").fetchall()  # while it reads, the log cannot be folded in
    store.record([message() for _ in range(10)])
    log = Path(f"{metered.path}-wal")
    assert log.stat().st_size
    kept = log.read_bytes()
    metered.path.unlink()
    reader.close()
    log.write_bytes(kept)

    metered.begin()
    ids = metered.call(2)
    assert spryng_instrument.flush()
    assert metered.ids() == ids


# --- the journal's lines


def segment(folder: Path, *lines: bytes, name: str = "dead-000001") -> Path:
    """What a dead process left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{SUFFIX}"
    path.write_bytes(b"".join(lines))
    return path


GARBAGE = [
    b"{\n",
    b"\xff\xfe\x00\n",
    b"null\n",
    b'{"id": 3}\n',
    b'{"id": "x", "timestamp": "yesterday", "operation": "custom"}\n',
    b'{"id": "x", "timestamp": "2026-01-01T00:00:00Z", "operation": "custom", "u": ' + b"[" * 100_000 + b"\n",
    b'{"id": "x", "timestamp": "2026-01-01T00:00:00Z", "operation": "custom", "key": "\\ud800"}\n',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda line: repr(line[:16]))
def test_corrupt_lines(metered: Metered, caplog: pytest.LogCaptureFixture, garbage: bytes) -> None:
    """A corrupt line in the middle and a torn last one are set aside as they are, counted, named; the others arrive."""
    good = [message(number) for number in range(3)]
    lines = [encode(each) + b"\n" for each in good]
    torn = lines[0][:-20]
    path = segment(metered.journal, lines[0], garbage, b"\n", b"  \n", lines[1], lines[2], torn)

    assert deliver_orphans(metered.journal, SqliteStore(metered.path)) == 3
    assert metered.ids() == [each.id for each in good]
    assert not path.exists()
    [(aside, count)] = aside_lines(metered.journal).items()
    assert (Path(aside).read_bytes(), count) == (garbage + torn + b"\n", 2)
    [error] = errors(caplog)
    assert f"2 corrupt line(s) of the journal were set aside in {aside}" in error


def test_segment_of_garbage(metered: Metered) -> None:
    """A segment with nothing but garbage is set aside, and the next one delivered."""
    good = message()
    segment(metered.journal, os.urandom(5000).replace(b"\n", b"") + b"\n", name="a-000001")
    segment(metered.journal, encode(good) + b"\n", name="b-000001")
    segment(metered.journal, name="c-000001")

    assert deliver_orphans(metered.journal, SqliteStore(metered.path)) == 1
    assert metered.ids() == [good.id]
    assert list(aside_lines(metered.journal).values()) == [1]
    assert not list(metered.journal.glob(f"*{SUFFIX}"))


def test_corrupt_line_in_a_running_process(metered: Metered) -> None:
    """stats() tells lines set aside from those delivered, and counts each once."""
    metered.begin(beat_s=60.0)
    ids = metered.call(3)
    [path] = metered.journal.glob(f"*{SUFFIX}")
    text = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(text.index(ids[1].encode()) - 3)
        file.write(b"\x00\x00")
    assert spryng_instrument.flush()

    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.set_aside, stats.waiting) == (3, 2, 1, 0)
    assert metered.ids() == [ids[0], ids[2]]
    health = SqliteStore(metered.path).health()
    assert [gap[1:] for gap in health.gaps] == [(3, 2)]


def test_orphans_do_not_change_the_counts_of_others(metered: Metered) -> None:
    """What a process delivers, or sets aside, for a dead one is not among its own messages."""
    segment(metered.journal, b"garbage\n", encode(message()) + b"\n")
    metered.begin()
    metered.call()
    assert until(lambda: not list(metered.journal.glob(f"dead*{SUFFIX}")))
    assert spryng_instrument.flush()
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.set_aside, stats.waiting) == (1, 1, 0, 0)


def test_conflict(metered: Metered, caplog: pytest.LogCaptureFixture) -> None:
    """The same id with another body: the ledger keeps the first, the other is set aside and reported."""
    first = message(1)
    other = message(2, id=first.id)
    good = message(3)
    segment(metered.journal, encode(first) + b"\n", name="a-000001")
    segment(metered.journal, encode(first) + b"\n", encode(other) + b"\n", encode(good) + b"\n", name="b-000001")

    assert deliver_orphans(metered.journal, SqliteStore(metered.path)) == 3
    stored = {row.message.id: row.message for row in SqliteStore(metered.path).messages().rows}
    assert stored == {first.id: first, good.id: good}
    [aside] = aside_lines(metered.journal)
    assert decode(Path(aside).read_bytes()) == other
    [error] = errors(caplog)
    assert "1 conflict line(s)" in error
    assert "same id and keeps that one" in error


@pytest.mark.parametrize("fields", [{"usage": Usage(input_tokens=2**63)}, {"sequence": 2**63}], ids=["count", "number"])
def test_refused_message_holds_up_no_other(
    metered: Metered, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    """A message that the ledger cannot take is set aside with the reason in the log; the others are delivered."""
    bad = [message(**fields), message(**fields)]
    good = [message(number) for number in range(3)]
    segment(metered.journal, *[encode(each) + b"\n" for each in (good[0], bad[0], good[1], bad[1], good[2])])
    segment(metered.journal, *[encode(each) + b"\n" for each in (*bad, good[0])], name="dead-000002")

    deliver_orphans(metered.journal, SqliteStore(metered.path))
    assert set(metered.ids()) >= {each.id for each in good}
    assert not list(metered.journal.glob(f"*{SUFFIX}"))
    refused = [path for path in aside_lines(metered.journal) if ".refused" in path]
    assert refused
    assert any("the destination refuses message" in error for error in errors(caplog))


def test_delivered_again_after_a_crash_is_no_conflict(metered: Metered) -> None:
    """Whatever a message holds, delivering its line a second time finds it the same."""
    odd = [
        message(usage=Usage()),
        message(usage=None),
        message(properties={}),
        message(properties={"b": 1.5, "a": None, "c": True, "d": 2**70}),
        message(latency_ms=0.1 + 0.2, tags=("b", "a"), query="\0 \U0001f600"),
        Message(id=new_id(), timestamp=datetime(1969, 1, 1, 1, 1, 1, 7, tzinfo=timezone.utc), operation=""),
    ]
    for number in range(2):
        segment(metered.journal, *[encode(each) + b"\n" for each in odd], name=f"dead-{number}")
        assert deliver_orphans(metered.journal, SqliteStore(metered.path)) == len(odd)
    assert aside_lines(metered.journal) == {}
    assert len(metered.ids()) == len(odd)


# --- the journal's files and its disk


@pytest.mark.parametrize("what", ["folder", "file", "replaced"])
def test_journal_deleted_while_running(metered: Metered, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """The journal's folder or open file is deleted, or replaced: what was written before and after arrives."""
    metered.begin(beat_s=60.0)
    ids = metered.call(3)
    [path] = metered.journal.glob(f"*{SUFFIX}")
    if what == "folder":
        shutil.rmtree(metered.journal)
    else:
        path.unlink()
    if what == "replaced":
        path.write_bytes(b"")
    ids += metered.call(2)
    assert spryng_instrument.flush()
    ids += metered.call(2)
    assert spryng_instrument.flush()
    assert metered.ids() == ids
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.waiting, stats.dropped) == (7, 7, 0, 0)
    assert errors(caplog) == []


def test_full_disk(metered: Metered, caplog: pytest.LogCaptureFixture) -> None:
    """While no file can grow, calls go on: messages go to memory, then are dropped and counted, and it is said once.

    With space again, what memory held is delivered, and the ledger names exactly the lost numbers.
    """
    metered.begin(memory_limit=3)
    before = metered.call(2)
    assert spryng_instrument.flush()
    with file_size_limit(0):
        held = metered.call(3)
        lost = metered.call(4)
        assert not spryng_instrument.flush(0.2)
        stats = spryng_instrument.stats()
        assert (stats.recorded, stats.delivered, stats.waiting, stats.dropped) == (5, 2, 3, 4)
        assert stats.failure
    after = metered.call(2)
    assert metered.arrived()
    assert spryng_instrument.flush()

    assert metered.ids() == before + held + after
    assert not set(lost) & set(metered.ids())
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.waiting, stats.dropped) == (7, 7, 0, 4)
    assert until(lambda: spryng_instrument.stats().failure is None)
    store = SqliteStore(metered.path)
    assert store.health().gaps == ((metered.recorder.journal.writer, 11, 7),)
    assert store.missing({metered.recorder.journal.writer: 11}) == {metered.recorder.journal.writer: [range(6, 10)]}
    said = [error for error in errors(caplog) if "cannot be written" in error or "messages are being lost" in error]
    assert len(said) == 2
    assert f"the journal at {metered.journal} cannot be written: " in said[0]
    assert "Up to 3 messages are held in memory; your calls go on" in said[0]
    assert "Free the disk of the journal" in said[1]


def test_full_journal_disk_with_a_ledger_elsewhere(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the journal's disk is full, messages are delivered from memory, and all of them count."""

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    metered.begin(memory_limit=3)
    with monkeypatch.context() as patch:
        patch.setattr(journals, "os", FakedOs(write=no_space))
        ids = metered.call(2)
        assert spryng_instrument.flush()
        ids += metered.call(2)
        assert spryng_instrument.flush()
        assert metered.ids() == ids
        assert spryng_instrument.stats().failure is not None
    ids += metered.call()
    assert spryng_instrument.flush()
    stats = spryng_instrument.stats()
    assert (stats.recorded, stats.delivered, stats.waiting, stats.dropped) == (5, 5, 0, 0)
    assert stats.failure is None
    assert metered.ids() == ids


def test_conflict_in_memory_is_set_aside(tmp_path: Path) -> None:
    """What cannot be delivered from memory is kept apart like the lines of a segment."""
    journal = Journal(tmp_path / "journal", memory_limit=5, wake=lambda: None)
    pump = Pump(journal, SqliteStore(tmp_path / "usage.db"), beat_s=0)
    first = message(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "os", FakedOs(write=lambda *_: os.write(-1, b"")))
        for each in (first, message(2, id=first.id), message(3)):
            assert journal.append(encode(each) + b"\n")
        assert pump.flush(1)
    assert (pump.delivered, pump.set_aside, journal.waiting) == (2, 1, 0)
    assert list(aside_lines(journal.folder).values()) == [1]
    journal.close()


def test_flush_does_not_take_what_is_under_way_for_done(metered: Metered) -> None:
    """flush() is False while another thread still delivers what memory held."""
    metered.path.parent.mkdir()
    SqliteStore(metered.path).record([])
    db = sqlite3.connect(metered.path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    metered.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journals, "os", FakedOs(write=lambda *_: os.write(-1, b"")))
        metered.call(2)
        for _ in range(20):
            assert not spryng_instrument.flush(0.01)
            assert spryng_instrument.stats().waiting == 2
        db.close()
        assert spryng_instrument.flush()


def test_orphans_that_cannot_be_delivered_are_said_once(
    metered: Metered, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with nothing of its own to deliver says once, not at every try, that it cannot deliver another's."""
    monkeypatch.setattr(pumps, "ORPHANS_EVERY_S", 0.02)
    mend = _text(metered.path)
    path = segment(metered.journal, encode(message()) + b"\n")
    metered.begin()
    assert until(lambda: bool(errors(caplog)))
    time.sleep(0.3)
    [error] = errors(caplog)
    assert_matches(r"messages of other processes wait in the journal at .*no ledger of spryng_instrument", error)
    mend()
    assert until(lambda: not path.exists())


# --- every interleaving


class Crash(BaseException):
    """The process is no more."""


class Process:
    """What a process is to the journal: its files, and the steps until it is killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fds: set[int] = set()
        self.steps: int | None = None
        """Steps that it may still take; None: any number."""
        with self:
            self.journal = Journal(world.folder / "journal", memory_limit=3, wake=lambda: None)
            self.pump = Pump(self.journal, self.Ledger(self), beat_s=0)

    def __enter__(self) -> Process:
        self.world.before = journals.os, journals._open_fds  # type: ignore[attr-defined]
        names = ("write", "rename", "fdatasync", "fsync", "unlink", "replace", "ftruncate")
        journals.os = FakedOs(**{name: self._stepping(name) for name in names})  # type: ignore[attr-defined]
        journals._open_fds = self.fds
        return self

    def __exit__(self, *_: object) -> None:
        journals.os, journals._open_fds = self.world.before  # type: ignore[attr-defined]

    def step(self) -> None:
        if self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                self.steps = None  # what runs from here on is the clean-up of Python, not of a process
                raise Crash

    def _stepping(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def stepping(*arguments: Any) -> Any:
            self.step()
            if name == "write" and self.world.full:
                fd, line = arguments
                if len(line) % 2:
                    raise OSError(errno.ENOSPC, "full")
                return os.write(fd, line[: len(line) // 2])
            if name == "write" and self.steps == 0:  # killed half-way
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.step()
            result = real(*arguments)
            self.step()
            return result

        return stepping

    class Ledger(SqliteStore):
        """The ledger, as a process that may be killed writes it."""

        def __init__(self, process: Process) -> None:
            super().__init__(process.world.path)
            self._process = process

        def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
            self._process.step()
            receipt = super().record(messages, timeout_s=min(timeout_s, 0.01))
            self._process.step()
            return receipt

        def _stored(self, ask: Ask, ids: Sequence[str]) -> dict[str, Message]:
            self._process.step()
            return super()._stored(ask, ids)

    def die(self) -> None:
        for fd in self.fds:
            with suppress(OSError):
                os.close(fd)
        self.fds.clear()


class World(RuleBasedStateMachine):
    """Two processes share a journal's folder and a ledger. Anything may happen, at any step."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("spryng_instrument").setLevel(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "usage.db"
        self.before: Any = None
        self.full = False
        self.lock: sqlite3.Connection | None = None
        self.kept: set[str] = set()
        """Appended, and told so."""
        self.open: set[str] = set()
        """The call did not return, or the message was only in the memory of a process that died: both are right."""
        self.crashes = 0
        self.processes = [Process(self), Process(self)]

    def _does(self, number: int, act: Callable[[Process], object]) -> bool:
        process = self.processes[number]
        try:
            with process:
                act(process)
        except Crash:
            self._dies(number)
            return False
        return True

    def _dies(self, number: int) -> None:
        process = self.processes[number]
        self.crashes += 1
        lost = {decode(line).id for line in (*process.journal._memory, *process.journal._late)}
        self.kept -= lost
        self.open |= lost
        process.die()
        self.processes[number] = Process(self)

    @rule(number=st.integers(0, 1), count=st.integers(1, 4))
    def append(self, number: int, count: int) -> None:
        for _ in range(count):
            new = message(id=new_id(), query="x" * (len(self.kept) % 3))
            self.open.add(new.id)
            told: list[bool] = []
            line = encode(new) + b"\n"
            if not self._does(number, lambda process, line=line, told=told: told.append(process.journal.append(line))):
                return
            self.open.discard(new.id)
            if told == [True]:
                self.kept.add(new.id)

    @rule(number=st.integers(0, 1))
    def seal(self, number: int) -> None:
        self._does(number, lambda process: process.journal.seal())

    @rule(number=st.integers(0, 1), orphans=st.booleans())
    def drain(self, number: int, orphans: bool) -> None:
        self._does(number, lambda process: process.pump.flush(0.0, orphans=orphans))

    @rule(number=st.integers(0, 1), steps=st.integers(0, 25))
    def crash_after(self, number: int, steps: int) -> None:
        self.processes[number].steps = steps

    @rule(number=st.integers(0, 1))
    def kill(self, number: int) -> None:
        self._dies(number)

    @rule(number=st.integers(0, 1))
    def end(self, number: int) -> None:
        if self._does(number, lambda process: process.journal.close()):
            self._dies(number)

    @rule()
    def fill_or_free_the_disk(self) -> None:
        self.full = not self.full

    @rule()
    def lock_or_unlock_the_ledger(self) -> None:
        if self.lock is None:
            if not self.path.exists():
                return
            self.lock = sqlite3.connect(self.path, isolation_level=None, timeout=0)
            with suppress(sqlite3.OperationalError):
                self.lock.execute("BEGIN IMMEDIATE")
        else:
            self.lock.close()
            self.lock = None

    @invariant()
    def nothing_that_was_never_appended(self) -> None:
        assert set(self.ids()) <= self.kept | self.open

    @invariant()
    def counts_add_up(self) -> None:
        for process in self.processes:
            assert process.journal.waiting >= 0
            assert process.pump.delivered >= 0

    def ids(self) -> list[str]:
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        db = sqlite3.connect(self.path)
        try:
            return [row[0] for row in db.execute("SELECT id FROM messages")]
        except sqlite3.OperationalError:  # not made yet
            return []
        finally:
            db.close()

    def teardown(self) -> None:
        try:
            self.full = False
            if self.lock is not None:
                self.lock.close()
            for process in self.processes:
                process.steps = None
                with process:
                    assert process.pump.flush(5, orphans=True)
                    assert process.journal.waiting == 0
                    process.journal.close()
                process.die()
            deliver_orphans(self.folder / "journal", SqliteStore(self.path))
            ids = self.ids()
            assert self.kept <= set(ids) <= self.kept | self.open
            assert len(set(ids)) == len(ids)
            assert count_lines(self.folder / "journal") == 0
            aside = aside_lines(self.folder / "journal")
            assert sum(aside.values()) <= self.crashes, "only what a crash tore may be set aside"
            assert all(".corrupt" in path for path in aside)
        finally:
            shutil.rmtree(self.folder)
            logging.getLogger("spryng_instrument").setLevel(logging.NOTSET)


TestEveryInterleaving = World.TestCase
TestEveryInterleaving.settings = settings(
    max_examples=1500 if FULL else 150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_flush_waits_for_what_was_recorded_before(metered: Metered) -> None:
    """It ends though other threads record without a pause, and then what was recorded before it is in the ledger."""
    metered.begin(beat_s=30)
    [before] = metered.call()
    done = threading.Event()

    def record() -> None:
        while not done.wait(0.0005):
            metered.call()

    busy = [threading.Thread(target=record) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        for _ in range(2):
            [mine] = metered.call()
            assert spryng_instrument.flush(20)
            assert {before, mine} <= set(SqliteStore(metered.path).found([before, mine]))
    finally:
        done.set()
        for thread in busy:
            thread.join()


def test_a_thread_that_could_not_be_started(metered: Metered, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is started for the next message, which takes the ones before along."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        metered.begin()
        metered.call(2)
        assert metered.recorder.pump._thread is None
    metered.call(1)
    assert metered.arrived()
    assert len(metered.ids()) == 3


class Rationed:
    """A ledger that takes two batches, and says "later" to the next, again and again."""

    batch_size = 5

    def __init__(self, store: SqliteStore) -> None:
        self.store = store
        self.left, self.sent = 2, 0

    def record(self, messages: Sequence[Message], *, timeout_s: float = 5.0) -> Receipt:
        if not self.left:
            self.left = 2
            raise StoreError("429: not so many")
        self.left -= 1
        self.sent += len(messages)
        return self.store.record(messages)

    def close(self) -> None:
        self.store.close()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_segment_goes_on_where_it_failed(tmp_path: Path, by_hand: bool) -> None:
    """A destination that takes some and then wants a pause gets all of a long segment, each message sent once; what is
    corrupt is set aside once. By a pump, and by whoever delivers what a dead process left."""
    ledger = Rationed(SqliteStore(tmp_path / "usage.db"))
    journal = Journal(tmp_path / "journal", memory_limit=10, wake=lambda: None)
    sent = [message(number) for number in range(48)]
    for number, each in enumerate(sent):
        journal.append(encode(each) + b"\n")
        if number in (3, 40):
            journal.append(b"{ not a message\n")
    journal.seal()
    rounds, pump, begun = 0, Pump(journal, ledger, beat_s=0), dict[Path, Begun]()
    if by_hand:
        journal.close()
    while rounds < 20 and count_lines(journal.folder):
        rounds += 1
        if by_hand:
            with suppress(StoreError):
                deliver_orphans(journal.folder, ledger, begun=begun)
        else:
            pump._drain(None)

    assert (rounds, ledger.sent) == (5, 48)
    assert [row.message for row in ledger.store.arrivals(START, limit=100).rows] == sent
    assert list(aside_lines(journal.folder).values()) == [2]
    assert by_hand or (pump.delivered, pump.set_aside, pump.failure) == (48, 2, None)
