"""The journal: a line whose append returned is kept, whatever becomes of files, disks, processes and other threads."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spryng_instrument import journal as journals
from spryng_instrument.errors import SettingsError
from spryng_instrument.journal import SUFFIX, Journal, aside_lines, count_lines, set_aside


class Opened:
    """Makes journals in one folder, and closes what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wakes = 0
        self._all: list[Journal] = []

    def __call__(self, *, memory_limit: int = 100) -> Journal:
        journal = Journal(self.folder, memory_limit=memory_limit, wake=self._wake)
        self._all.append(journal)
        return journal

    def _wake(self) -> None:
        self.wakes += 1

    def close(self) -> None:
        for journal in self._all:
            journal.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    opened = Opened(tmp_path / "journal")
    yield opened
    opened.close()


def taken(journal: Journal) -> list[bytes]:
    """Claim and delete every sealed segment of *journal*: its lines."""
    lines: list[bytes] = []
    while journal.sealed:
        segment = journal.claim(journal.sealed.popleft()[0])
        assert segment is not None
        lines += segment.lines()
        segment.delete()
        segment.release()
    return lines


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond *size*: what is written over it is cut off, then refused (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FakedOs:
    """The os module as the journal sees it, with some functions replaced: only what no real disk can be made to do."""

    def __init__(self, **replaced: Any) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_append_is_in_the_file_when_it_returns(opened: Opened) -> None:
    """Another reader of the file finds the line at once, without any sync, seal or close."""
    journal = opened()
    for number in range(3):
        assert journal.append(b"%d\n" % number)

        [path] = opened.folder.glob(f"*{SUFFIX}")
        assert path.read_bytes() == b"".join(b"%d\n" % before for before in range(number + 1))
    assert journal.waiting == count_lines(opened.folder) == 3
    assert path.stat().st_mode & 0o777 == 0o600, "messages are for the user's eyes"


def test_wakes_once_until_sealed(opened: Opened) -> None:
    """However many lines are appended, the pump is woken once, and again after the next seal."""
    journal = opened()
    for _ in range(5):
        journal.append(b"a\n")
    assert opened.wakes == 1

    journal.seal()
    journal.append(b"a\n")
    assert opened.wakes == 2


@settings(max_examples=30, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda text: text.replace(b"\n", b"")), max_size=20), torn=st.booleans()
)
def test_lines_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], torn: bool) -> None:
    """What a segment holds is read line by line, empty ones and a last line that was cut off included."""
    journal = Journal(tmp_path_factory.mktemp("journal"), memory_limit=0, wake=lambda: None)
    path = journal.folder / f"other-000001{SUFFIX}"
    text = b"".join(line + b"\n" for line in lines)
    path.write_bytes(text + b"torn" * torn)
    segment = journal.claim(path)
    assert segment is not None
    try:
        assert list(segment.lines()) == lines + [b"torn"] * torn
    finally:
        segment.release()
        journal.close()


def test_lines_longer_than_a_read(opened: Opened) -> None:
    """Lines that lie across the borders of the blocks that are read come back whole."""
    journal = opened()
    lines = [bytes([97 + number]) * 700_000 for number in range(5)]
    for line in lines:
        journal.append(line + b"\n")
    journal.seal()

    assert taken(journal) == lines


def test_segment_of_a_living_process_is_nobodys(opened: Opened) -> None:
    """An open segment cannot be claimed; a sealed one by one process only, and not again after its end."""
    writer, other, third = opened(), opened(), opened()
    writer.append(b"a\n")
    [path] = [path for path in other.orphans() if path.name.startswith(writer.writer)]
    assert other.claim(path) is None

    writer.seal()
    segment = other.claim(path)
    assert segment is not None
    assert third.claim(path) is None

    segment.delete()
    segment.release()
    assert third.claim(path) is None


def test_segment_is_locked_before_it_is_seen(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no moment of its making can another process claim a segment: it would be deleted while it is written to."""
    other, claims = opened(), []

    def renames(hidden: Path, path: Path) -> None:
        os.rename(hidden, path)
        segment = other.claim(path)
        claims.append(segment)
        if segment is not None:
            segment.release()

    monkeypatch.setattr(journals, "os", FakedOs(rename=renames))
    opened().append(b"a\n")
    assert claims == [None]


def test_claim_of_a_segment_that_is_just_deleted(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that another process delivers and deletes between our opening and our locking it is not ours."""
    writer, other = opened(), opened()
    writer.append(b"a\n")
    writer.seal()
    [(path, _)] = writer.sealed

    def opens(*arguments: Any) -> int:
        fd = os.open(*arguments)
        os.unlink(path)
        return fd

    monkeypatch.setattr(journals, "os", FakedOs(open=opens))
    assert other.claim(path) is None


@pytest.mark.parametrize("what", ["folder", "file", "replaced"])
def test_deleted_while_running(opened: Opened, what: str) -> None:
    """The folder or the open file is deleted, or another put in its place: what was written to it is not lost."""
    journal = opened()
    lines = [b"%d" % number for number in range(5)]
    for line in lines[:3]:
        journal.append(line + b"\n")
    [path] = opened.folder.glob(f"*{SUFFIX}")
    if what == "folder":
        shutil.rmtree(opened.folder)
    else:
        path.unlink()
    if what == "replaced":
        path.write_bytes(b"theirs\n")
    for line in lines[3:]:
        journal.append(line + b"\n")

    journal.seal()  # takes them to a file that can be found
    assert journal.waiting == 5
    journal.seal()
    assert sorted(taken(journal)) == lines
    assert journal.dropped == 0
    if what == "replaced":
        assert path.read_bytes() == b"theirs\n"


def test_short_write(opened: Opened) -> None:
    """A line of which the disk takes only a part is cut off again, held in memory, and written when there is space."""
    journal = opened()
    journal.append(b"first\n")
    with file_size_limit(9):
        assert journal.append(b"second\n")
        assert journal.append(b"third\n")
        [path] = opened.folder.glob(f"*{SUFFIX}")
        assert path.read_bytes() == b"first\n"
        assert isinstance(journal.failure, OSError)
        assert (journal.waiting, journal.backlog_in_memory, journal.dropped) == (3, 2, 0)

    journal.append(b"fourth\n")
    journal.seal()
    assert journal.failure is None
    assert sorted(taken(journal)) == [b"first", b"fourth", b"second", b"third"]


def test_memory_is_bounded(opened: Opened) -> None:
    """What neither the disk nor memory takes is counted, and append says so; nothing else is lost."""
    journal = opened(memory_limit=2)
    with file_size_limit(0):
        assert [journal.append(b"%d\n" % number) for number in range(5)] == [True, True, False, False, False]
        journal.seal()  # changes nothing
        assert (journal.dropped, journal.waiting, journal.in_memory()) == (3, 2, [b"0\n", b"1\n"])

    journal.seal()
    assert taken(journal) == [b"0", b"1"]
    assert journal.dropped == 3


def test_failure_ends_without_a_line_in_memory(opened: Opened) -> None:
    """When the disk takes lines again, no failure is left, even if memory held none meanwhile."""
    journal = opened(memory_limit=0)
    journal.append(b"before\n")
    with file_size_limit(0):
        assert not journal.append(b"lost\n")
        journal.seal()
    assert journal.failure is not None, "nothing has proven yet that it is mended"

    journal.append(b"after\n")
    journal.seal()
    assert journal.failure is None
    assert taken(journal) == [b"before", b"after"]


def test_lines_in_memory_are_forgotten_once(opened: Opened) -> None:
    """Lines in memory count as waiting until they are forgotten; others that came meanwhile stay."""
    journal = opened()
    with file_size_limit(0):
        journal.append(b"a\n")
        lines = journal.in_memory()
        journal.append(b"b\n")
        assert journal.waiting == 2
        journal.forget(lines)
        assert journal.in_memory() == [b"b\n"]
        journal.forget(lines)
        assert journal.in_memory() == [b"b\n"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount a disk; test_short_write limits the size of files instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(small_disk: Path) -> None:
    """On a disk that is really full lines go to memory, and to the disk when there is space again."""
    filler = small_disk / "filler"
    journal = Journal(small_disk / "journal", memory_limit=50, wake=lambda: None)
    line = b"x" * 999 + b"\n"
    kept = 0
    while journal.append(line):
        kept += 1
    assert isinstance(journal.failure, OSError)
    assert journal.failure.errno == errno.ENOSPC
    assert (journal.waiting, journal.dropped, journal.backlog_in_memory) == (kept, 1, 50)
    on_disk = kept - 50
    assert 60 <= on_disk <= 65

    journal.seal()
    assert len(taken(journal)) == on_disk  # which makes space
    filler.write_bytes(b"")
    journal.seal()
    assert (journal.failure, journal.backlog_in_memory) == (None, 0)
    journal.seal()
    assert taken(journal) == [line[:-1]] * 50
    journal.close()


def test_signal_handler_appends_while_its_thread_opens(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler may append at the moment when its own thread is between two segments: neither line is lost."""
    journal = opened()
    signals = iter([signal.SIGUSR1])

    def renames(*arguments: Any) -> None:
        os.rename(*arguments)
        for number in signals:
            os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGUSR1, lambda *_: journal.append(b"from the handler\n") and None)
    monkeypatch.setattr(journals, "os", FakedOs(rename=renames))
    try:
        journal.append(b"first\n")
        journal.seal()  # opens the next segment: there the signal comes
        journal.append(b"second\n")
        assert journal.waiting == 3
        journal.seal()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(taken(journal)) == [b"first", b"from the handler", b"second"]


def test_finaliser_waits_for_nothing(opened: Opened) -> None:
    """A finaliser appends while another thread is within the journal, without waiting for it; the line is kept."""
    journal = opened()
    with journal._lock:
        thread = threading.Thread(target=journal.append_unlocked, args=(b"late\n",))
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
        assert journal.waiting == 1
    journal.seal()
    journal.seal()
    assert taken(journal) == [b"late"]


def test_threads_append_while_it_is_sealed(opened: Opened) -> None:
    """Lines of many threads are all kept, whole, and each once, while another thread seals all the time."""
    journal = opened()

    def appends(name: int) -> None:
        for number in range(300):
            journal.append(b"%d-%d\n" % (name, number))

    threads = [threading.Thread(target=appends, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    lines: list[bytes] = []
    while any(thread.is_alive() for thread in threads):
        journal.seal()
        lines += taken(journal)
    journal.seal()
    lines += taken(journal)
    assert sorted(lines) == sorted(b"%d-%d" % (name, number) for name in range(4) for number in range(300))


def test_interrupted_between_write_and_count(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt right after a write leaves the line where it is delivered from."""
    journal = opened()

    def writes(*arguments: Any) -> int:
        os.write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journals, "os", FakedOs(write=writes))
        with pytest.raises(KeyboardInterrupt):
            journal.append(b"a\n")
    journal.seal()
    assert taken(journal) == [b"a"]


def test_set_aside_may_be_repeated(tmp_path: Path) -> None:
    """Lines that are set aside again, after a crash between that and the deletion, are there once."""
    origin = tmp_path / f"w-000001{SUFFIX}"
    for _ in range(2):
        path = set_aside(origin, [b"{", b"\xff"], "corrupt")
    assert aside_lines(tmp_path) == {str(path): 2}
    assert path.read_bytes() == b"{\n\xff\n"
    assert path.name == f"w-000001.corrupt{SUFFIX}"


def _file(folder: Path) -> None:
    folder.write_text("a file")


def _under_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("a file")


@pytest.mark.parametrize("spoil", [_file, _under_a_file])
def test_folder_that_cannot_be_made(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """A journal that cannot be written is said at start-up, with the folder and what to do."""
    folder = tmp_path / "some" / "journal"
    folder.parent.mkdir()
    spoil(folder)
    with pytest.raises(SettingsError, match=r"journal='.*/some/journal' cannot be written: .*SPRYNG_JOURNAL"):
        Journal(folder, memory_limit=1, wake=lambda: None)


def test_close_leaves_nothing_empty(opened: Opened) -> None:
    """close() removes the segment without a line, keeps one with lines, and a later append begins a new one."""
    journal = opened()
    journal.close()
    assert list(opened.folder.iterdir()) == []

    journal.append(b"a\n")
    journal.close()
    assert count_lines(opened.folder) == 1
    assert len(list(opened.folder.iterdir())) == 1
    journal.append(b"b\n")
    assert count_lines(opened.folder) == 2


def test_no_descriptor_is_left(opened: Opened) -> None:
    """Appending, sealing, claiming and closing leave no file open."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    before, listed = len(os.listdir("/proc/self/fd")), set(journals._open_fds)
    journal = opened()
    for _ in range(20):
        journal.append(b"a\n")
        journal.seal()
        taken(journal)
    journal.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert journals._open_fds == listed
