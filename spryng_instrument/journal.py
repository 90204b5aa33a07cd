"""The journal: what is returned to the caller is already written here.

Invariant: a message whose `append` returned is in a file of the journal's folder (or, while the disk takes none, in a
bounded buffer whose overflow is counted), until a destination has acknowledged it.

Each process appends lines of JSON to a segment of its own, which it holds locked (flock) while it lives. To seal a
segment is to sync, close and so unlock it. A segment that nobody holds is anybody's to claim: sealed ones, and those of
processes that died. This module knows nothing of messages, the SDK or of any store: a line is bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import NoReturn

from spryng_instrument.errors import SettingsError

SUFFIX = ".jsonl"
"""Of the files of messages. A version that gives a message what this one cannot read takes another one: processes that
were not updated yet leave its files alone then, for those that were."""
ASIDE = "set-aside"
"""The folder, within the journal's, of lines that could not be delivered: corrupt ones and conflicts."""

_open_fds: set[int] = set()
"""Every locked segment of this process: a forked child must close its copies, or they would stay locked."""
_HIGH_FD = 1000
"""Segments get numbers from here on. If somebody closes all files, as daemons do, the numbers of those opened next are
low, so that no line of ours is written into a file of theirs."""
_fds_lock = threading.RLock()
os.register_at_fork(
    before=_fds_lock.acquire, after_in_parent=_fds_lock.release, after_in_child=_fds_lock.release
)  # no fork between opening a segment and listing it


class Segment:
    """A segment that nobody writes any more, claimed by this process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def lines(self) -> Iterator[bytes]:
        """Its lines, without their line feeds. A last line that was cut off counts as a line."""
        rest = b""
        offset = 0
        while block := os.pread(self._fd, 1 << 20, offset):
            offset += len(block)
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
        if rest:
            yield rest

    def delete(self) -> None:
        """Remove it: all its lines are delivered or set aside."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def release(self) -> None:
        """Let go of it; whoever comes next may claim it."""
        _close(self._fd)


class Journal:
    """This process's end of a journal folder. Its methods may be called from any thread; none of them waits long.

    Args:
        folder: shared by any number of processes.
        memory_limit: how many lines are held while the disk takes none.
        wake: called when there is something to deliver; must neither block nor raise.

    Raises:
        SettingsError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, memory_limit: int, wake: Callable[[], None]) -> None:
        self.folder = folder
        self.dropped = 0
        """Lines lost, because neither disk nor memory took them."""
        self.failure: OSError | None = None
        """Why the disk takes nothing, while it does not."""
        self._memory_limit = memory_limit
        self._wake = wake
        self._reset()
        try:
            self._open()
        except OSError as exc:
            raise SettingsError(
                f"journal={str(folder)!r} cannot be written: {exc.strerror or exc}. Give instrument() a journal= "
                "folder (or SPRYNG_JOURNAL) on a local disk that this process may write."
            ) from exc

    def _reset(self) -> None:
        self.writer = token_hex(8)
        self.sealed: deque[tuple[Path, int]] = deque()
        """Sealed segments of this process that are not known to be delivered, with their number of lines."""
        self.lines = 0
        """Lines in the open segment."""
        self._lock = threading.RLock()  # a signal handler or finaliser may append while its own thread appends
        self._memory: deque[bytes] = deque()
        self._late: deque[bytes] = deque()
        self._fd = -1
        self._path = self.folder
        self._inode = 0
        self._number = 0
        self._failed_at = 0, 0
        self._woken = False

    def after_fork(self) -> None:
        """In the child: begin anew. What the parent has not delivered is the parent's."""
        for fd in _open_fds:
            with suppress(OSError):
                os.close(fd)
        _open_fds.clear()
        self.dropped = 0
        self._reset()

    def append(self, line: bytes) -> bool:
        """Write one line (ending in a line feed). Returns whether it is kept; False: it had to be dropped."""
        with self._lock:
            kept = True
            try:
                # Spelled out here, and again in `_write`: this is on the way of every call.
                written = os.write(self._fd, line)
                if written != len(line):
                    self._cut_off(written)
                self.lines += 1
            except OSError as exc:
                kept = self._append_again(line, exc)
        if not self._woken:
            self._woken = True
            self._wake()
        return kept

    def append_unlocked(self, line: bytes) -> None:
        """The same for a finaliser, which may run inside anything and must wait for nothing."""
        if self._lock.acquire(blocking=False):
            try:
                self.append(line)
            finally:
                self._lock.release()
        else:
            self._late.append(line)  # the next seal takes it in

    @property
    def waiting(self) -> int:
        """Lines of this process that are not known to be delivered."""
        return self.lines + sum(count for _, count in list(self.sealed)) + len(self._memory) + len(self._late)

    @property
    def backlog_in_memory(self) -> int:
        """Lines that only memory holds."""
        return len(self._memory) + len(self._late)

    def seal(self) -> None:
        """Close the open segment, if anything is in it, so that it can be delivered; begin a new one at once."""
        self._woken = False  # first: what is appended from now on wakes again
        while self._late:
            self.append(self._late.popleft())
        with self._lock:
            if self._memory:
                self._save_memory()
            elif self.failure is not None and self.lines and (self._number, self.lines) > self._failed_at:
                self.failure = None  # the disk has taken lines since
            if self._is_empty():
                return
            fd, ours = self._fd, self._is_ours()
            lost = ours and not _is_at(fd, self._path)
            self._leave()
            if lost:
                self.sealed.pop()
            with suppress(OSError):  # or the next append opens it, and says why not
                self._open()
        if not ours:
            with _fds_lock:
                # Somebody closed our file, and its number may be another file's by now: not ours to touch.
                _open_fds.discard(fd)
            return
        if lost:
            # Somebody deleted the folder or the file while we wrote to it: its lines are still ours to read.
            for line in Segment(self.folder, fd).lines():
                self.append(line + b"\n")
        else:
            # Before it can be claimed: a power cut costs what was appended since the last beat, no more.
            with suppress(OSError):
                os.fdatasync(fd)
                _sync_folder(self.folder)
        _close(fd)

    def claim(self, path: Path) -> Segment | None:
        """Take a segment for delivery. None: another process holds it, or it is gone."""
        with _fds_lock:
            try:
                fd = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                return None
            _open_fds.add(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(fd)
            return None
        if not _is_at(fd, path):  # delivered and deleted between our two steps
            _close(fd)
            return None
        return Segment(path, fd)

    def orphans(self) -> Iterator[Path]:
        """Segments of other processes, which may be dead."""
        with suppress(FileNotFoundError):
            for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(self.writer) and entry.is_file():
                    yield Path(entry.path)

    def in_memory(self) -> list[bytes]:
        """The lines that only memory holds, to deliver them from there. `forget` them only when that is done."""
        with self._lock:
            return list(self._memory)

    def forget(self, lines: list[bytes]) -> None:
        """Lines that were in memory are delivered."""
        with self._lock:
            for line in lines:
                if self._memory and self._memory[0] is line:  # not saved to disk meanwhile
                    self._memory.popleft()

    def close(self) -> None:
        """Seal, and leave no open or empty file. A later append opens a new segment."""
        self.seal()
        with self._lock:
            if self._fd >= 0 and self._is_empty():
                with suppress(FileNotFoundError):
                    os.unlink(self._path)
                _close(self._fd)
                self._fd = -1

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = self._number = self._number + 1
        name = f"{self.writer}-{number:06d}"
        hidden, path = self.folder / f"{name}.new", self.folder / f"{name}{SUFFIX}"
        with _fds_lock:
            fd = _to_high(os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600))
            _open_fds.add(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.rename(hidden, path)  # only now can it be seen, so it is never seen unlocked
        except BaseException:
            _close(fd)
            raise
        if self._fd >= 0:  # meanwhile a signal handler or a finaliser has appended, to a segment of its own
            other = self._fd
            self._leave()
            _close(other)
        self._fd, self._path, self._inode, self.lines = fd, path, os.fstat(fd).st_ino, 0

    def _write(self, line: bytes) -> None:
        if self._fd < 0:
            self._open()
        try:
            written = os.write(self._fd, line)
        except OSError as exc:
            if exc.errno != errno.EBADF:
                raise
            with _fds_lock:
                _open_fds.discard(self._fd)
            self._leave()  # somebody closed every file, as daemons do at their start
            self._open()
            written = os.write(self._fd, line)
        if written != len(line):
            self._cut_off(written)
        self.lines += 1

    def _cut_off(self, written: int) -> NoReturn:
        """A full disk took a part of a line: remove that again, which needs no space."""
        os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _append_again(self, line: bytes, failed: OSError) -> bool:
        try:
            if failed.errno != errno.EBADF:
                raise failed
            self._write(line)
        except OSError as exc:
            self.failure = exc
            self._failed_at = self._number, self.lines
            return self._remember(line)
        return True

    def _is_empty(self) -> bool:
        # By the file, not by our count: an exception may have come between a write and the counting of it.
        return self._fd < 0 or not (os.fstat(self._fd).st_size if self._is_ours() else self.lines)

    def _is_ours(self) -> bool:
        try:
            return os.fstat(self._fd).st_ino == self._inode
        except OSError:
            return False

    def _leave(self) -> None:
        self.sealed.append((self._path, self.lines))
        self._fd, self.lines = -1, 0

    def _remember(self, line: bytes) -> bool:
        if len(self._memory) >= self._memory_limit:
            self.dropped += 1
            return False
        self._memory.append(line)
        return True

    def _save_memory(self) -> None:
        try:
            while self._memory:
                self._write(self._memory[0])
                self._memory.popleft()
        except OSError as exc:
            self.failure = exc
        else:
            self.failure = None


def _close(fd: int) -> None:
    with _fds_lock:
        _open_fds.discard(fd)
        os.close(fd)


def _to_high(fd: int) -> int:
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD)
    except OSError:
        return fd  # fewer files are allowed
    os.close(fd)
    return high


def _is_at(fd: int, path: Path) -> bool:
    try:
        there, ours = os.stat(path), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def set_aside(origin: Path, lines: Sequence[bytes], reason: str) -> Path:
    """Keep *lines*, of the segment *origin*, that cannot be delivered where a person finds them. Safe to repeat."""
    folder = origin.parent / ASIDE
    folder.mkdir(exist_ok=True)
    aside = folder / f"{origin.stem}.{reason}{SUFFIX}"
    temporary = aside.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(b"".join(line + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, aside)
    return aside


def count_lines(folder: Path) -> int:
    """Lines that wait in a journal folder, of every process."""
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                total += path.read_bytes().count(b"\n")
    return total


def aside_lines(folder: Path) -> dict[str, int]:
    """Lines that were set aside, by file."""
    return {str(path): path.read_bytes().count(b"\n") for path in sorted((folder / ASIDE).glob(f"*{SUFFIX}"))}
