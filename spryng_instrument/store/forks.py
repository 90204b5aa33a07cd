"""Keeps forks away from open SQLite connections.

SQLite remembers a process's locks in its memory. A child forked while a connection is open would believe that it has
them, or wait for ever for a thread that was not forked with it: so a fork waits until no other thread has one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_FORK_WAIT_S = 10.0
_forks = threading.Condition()
_connected: dict[int, int] = {}
"""Open connections by thread."""
_forking: set[int] = set()
"""Threads that are about to fork: no connection begins meanwhile, or they would wait for ever."""


@contextmanager
def unforked() -> Iterator[None]:
    """A connection may be open in here: a fork by another thread waits, for up to 10 s; and this waits for one."""
    thread = threading.get_ident()
    with _forks:
        _forks.wait_for(lambda: not _forking - {thread} or thread in _connected, _FORK_WAIT_S)
        _connected[thread] = _connected.get(thread, 0) + 1
    try:
        yield
    finally:
        with _forks:
            if thread in _connected:  # not in a child that was forked in here
                _connected[thread] -= 1
                if not _connected[thread]:
                    del _connected[thread]
            _forks.notify_all()


def _before_fork() -> None:
    thread = threading.get_ident()
    _forks.acquire()
    _forking.add(thread)
    _forks.wait_for(lambda: not _connected.keys() - {thread}, _FORK_WAIT_S)


def _after_fork_in_parent() -> None:
    _forking.discard(threading.get_ident())
    _forks.notify_all()
    _forks.release()


def _after_fork_in_child() -> None:
    _forking.clear()
    _connected.clear()
    _forks.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
