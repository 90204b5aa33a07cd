"""Connections to PostgreSQL: a few, each of one transaction at a time, and what goes wrong with the server in words.

Invariant: a transaction waits for nothing long after its deadline, though the server may be stopped or the network cut;
only making the tables takes as long as it takes. What was committed is on the server's disk. A connection is given out
where the tables are such as this version knows, is used again only if it is known to be sound, and belongs to the
process that made it. No error tells the password.

What is asked of the tables is not known here.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psycopg
from psycopg import errors
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.types.string import TextLoader

from spryng_instrument.errors import SchemaTooNewError, StoreBusyError, StoreError, StoreNotOursError
from spryng_instrument.settings import without_secrets

_CONNECTIONS = 10
"""Of a process to one ledger, at most."""
_KEPT = 4
"""So many of them are only for what must not wait for questions, however many these are."""
_GRACE_S = 1.0
"""How long the server may take to say that the time is over, before it is not waited for any more."""
_MIGRATING = 0x5350525901  # an advisory lock: one process at a time makes the tables
_HARMLESS = (psycopg.DataError, psycopg.IntegrityError, errors.TransactionRollback)
"""What a statement may meet on a connection that is sound."""


class TryAgain(StoreBusyError):
    """Nothing was done, and the same may work at once."""


class ReadOnlyError(StoreError):
    """This user, or this server, may only be read."""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for nothing beyond its deadline, though the server may be stopped or the network cut."""

    deadline: float | None = None
    """Of time.monotonic(). None: it takes as long as it takes."""

    def ask(self, question: str, values: Sequence[Any]) -> list[Any]:
        """Run a statement with ? for its values, and return its rows."""
        with self.cursor() as cursor:
            cursor.execute(_placeholders(question), list(values))
            return cursor.fetchall() if cursor.description else []

    def ask_each(self, question: str, many: Sequence[Sequence[Any]]) -> list[Any]:
        """Run a statement that returns rows for each of *many* values, and return the rows of all."""
        found: list[Any] = []
        if many:
            with self.cursor() as cursor:
                cursor.executemany(_placeholders(question), many, returning=True)
                more: bool | None = True
                while more:
                    found += cursor.fetchall()
                    more = cursor.nextset()
        return found

    def copy_in(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a COPY FROM STDIN of these rows."""
        with self.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                copy.write_row(row)

    def run(self, statements: str) -> None:
        """Run statements without values, in one message to the server."""
        self.execute(statements.encode())

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        """As psycopg does, which resumes the generator every 0.1 s when nothing comes."""
        return super().wait(self._within(gen), *args, **kwargs)

    def _within(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and self.deadline is not None and time.monotonic() > self.deadline:
                    raise TimeoutError("no answer from the server")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


class Connections:
    """The connections of this process to one database. Nothing is connected before the first transaction.

    Args:
        url: as libpq takes it, with its parameters.
        migrations: statements that bring the tables from each version to the next.
        create: whether tables that are not there are made, or are an error.
    """

    def __init__(self, url: str, migrations: Sequence[Sequence[str]], *, create: bool = True) -> None:
        self.place = without_secrets(url)
        """The database, as errors may name it."""
        self._url = url
        self._migrations = migrations
        self._create = create
        self._unshare()
        _pools.add(self)

    def _unshare(self) -> None:
        """Begin without connections; a forked child, too, whose locks may be held by threads that it does not have."""
        self._idle: deque[Connection] = deque()
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._shared = threading.BoundedSemaphore(_CONNECTIONS - _KEPT)

    @contextmanager
    def transaction(
        self, deadline: float, kind: str = "READ COMMITTED, READ WRITE", *, urgent: bool = False
    ) -> Iterator[Connection]:
        """A transaction on a connection of its own, committed at the end, undone if that is not reached.

        Nobody may wait for a second one within it: those who hold all of them would wait for each other.

        Args:
            deadline: by when it must be done, of time.monotonic().
            kind: how much it sees of others, and whether it writes, as BEGIN ISOLATION LEVEL takes it.
            urgent: whether it may have a connection that is kept for such. It must be short.

        Raises:
            StoreError: what went wrong with the server. What is wrong with a message is raised as psycopg says it.
        """
        with ExitStack() as taken:
            for free in [self._free] if urgent else [self._shared, self._free]:
                if not free.acquire(timeout=max(deadline - time.monotonic(), 0.01)):
                    raise StoreBusyError(f"all {_CONNECTIONS} connections to {self.place} are at work. Try again.")
                taken.callback(free.release)
            with self._said():
                db = self._begun(deadline, kind)
                try:
                    yield db
                    db.run("COMMIT")
                except BaseException as exc:
                    self._back_out(db, exc)
                    raise
                self._idle.append(db)

    def close(self) -> None:
        """Close those that nobody uses. Used again, it makes new ones."""
        with suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be about to end
            self.close()

    def _begun(self, deadline: float, kind: str) -> Connection:
        while True:
            try:
                db, used = self._idle.pop(), True
            except IndexError:
                db, used = self._connected(deadline), False
            left_ms = _left_ms(deadline)
            db.deadline = deadline + _GRACE_S
            try:
                # Settings are of this transaction only: a pooler in between may give each one another connection.
                db.run(
                    f"BEGIN ISOLATION LEVEL {kind}; SET LOCAL synchronous_commit = on; "
                    f"SET LOCAL statement_timeout = {left_ms}; SET LOCAL lock_timeout = {left_ms}; "
                    "SET LOCAL idle_in_transaction_session_timeout = 60000; SET LOCAL client_min_messages = warning"
                )
                return db
            except BaseException as exc:
                self._back_out(db, exc)
                if not used or not isinstance(exc, psycopg.OperationalError):
                    raise  # but one that lay idle while the server was started again is only replaced

    def _back_out(self, db: Connection, exc: BaseException) -> None:
        """Undo a transaction. What it met may be so for every connection: a server that is another one by now."""
        with suppress(psycopg.Error, TimeoutError):
            if not isinstance(exc, psycopg.Error) or isinstance(exc, _HARMLESS):
                db.deadline = time.monotonic() + _GRACE_S
                if db.info.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                    db.run("ROLLBACK")
                if db.info.transaction_status == TransactionStatus.IDLE:
                    self._idle.append(db)
                    return
        db.close()
        self.close()

    def _connected(self, deadline: float) -> Connection:
        try:
            conninfo = make_conninfo(
                self._url,
                client_encoding="utf8",
                connect_timeout=min(max(2, math.ceil(deadline - time.monotonic())), 10),  # libpq waits for 2 s at least
            )
        except psycopg.Error:  # its text may have the password
            raise StoreError(f"{self.place} is no URL that PostgreSQL takes; check its parameters") from None
        # Nor is a statement prepared, for the sake of such poolers.
        db = Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
        db.deadline = deadline + _GRACE_S
        _open.add(db)
        try:
            db.adapters.register_loader("json", TextLoader)
            self._prepare(db, deadline)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: Connection, deadline: float) -> None:
        """See to it that the tables are there, and are such as this version knows."""
        version = self._version(db)
        if version == len(self._migrations):
            return
        if version == 0 and not self._create:
            raise StoreError(
                f"there is no ledger at {self.place} yet. Did anything record there? Is the database the right one?"
            )
        [[encoding]] = db.ask("SHOW server_encoding", [])
        if encoding != "UTF8":
            raise StoreError(
                f"{self.place} is a database in {encoding}, which cannot keep every text. Messages wait in the "
                "journal; make one with ENCODING 'UTF8'."
            )
        while self._version(db) < len(self._migrations):
            self._migrate(db, deadline)

    def _migrate(self, db: Connection, deadline: float) -> None:
        """Bring the tables to the next version. What it locks is free again before the one after that begins."""
        db.deadline = deadline + _GRACE_S
        db.run(
            "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE; SET LOCAL client_min_messages = warning; "
            f"SET LOCAL lock_timeout = {_left_ms(deadline)}; SET LOCAL statement_timeout = 0"
        )
        db.ask("SELECT pg_advisory_xact_lock(?)", [_MIGRATING])
        db.deadline = None  # it takes as long as it takes
        try:
            db.run("CREATE TABLE IF NOT EXISTS spryng_schema (version int PRIMARY KEY, since timestamptz NOT NULL)")
            version = self._version(db)  # asked again: another process may have just done it
            if version < len(self._migrations):
                for statement in self._migrations[version]:
                    db.run(statement)
                db.ask("INSERT INTO spryng_schema VALUES (?, now())", [version + 1])
        except (errors.DuplicateTable, errors.DuplicateObject) as exc:
            raise StoreNotOursError(
                f"{self.place} has tables of something else: {exc.diag.message_primary}. Messages wait in the "
                "journal; give the ledger a database of its own, or a schema: ?options=-csearch_path%3Dspryng"
            ) from exc
        db.run("COMMIT")
        db.deadline = deadline + _GRACE_S

    def _version(self, db: Connection) -> int:
        """The schema's version, 0 where there is none; raises for one that this version must not touch."""
        if db.ask("SELECT to_regclass('spryng_schema')", []) == [(None,)]:
            return 0
        [[version]] = db.ask("SELECT coalesce(max(version), 0) FROM spryng_schema", [])
        if version > len(self._migrations):
            raise SchemaTooNewError(
                f"{self.place} has schema {version}, written by a newer spryng_instrument; this one knows "
                f"{len(self._migrations)}. Upgrade it: pip install -U spryng-instrument. Messages wait in the journal."
            )
        return int(version)

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What goes wrong in here is said as a StoreError; but not what is wrong with a message."""
        try:
            yield
        except (psycopg.DataError, psycopg.IntegrityError, errors.ProgramLimitExceeded):
            raise  # a message that cannot be stored, not a server that takes none
        except (errors.DeadlockDetected, errors.SerializationFailure) as exc:
            raise TryAgain(f"{self.place}: {_line(exc)} Try again.") from exc
        except (errors.QueryCanceled, errors.LockNotAvailable, errors.ConnectionTimeout, TimeoutError) as exc:
            raise StoreBusyError(f"{self.place} took too long: {_line(exc)} Messages wait in the journal.") from exc
        except (errors.ReadOnlySqlTransaction, errors.InsufficientPrivilege) as exc:
            raise ReadOnlyError(
                f"{self.place}: {_line(exc)} Messages wait in the journal; give the URL's user the right to write."
            ) from exc
        except psycopg.Error as exc:
            raise StoreError(f"{self.place}: {_line(exc)} Messages wait in the journal.") from exc


def _left_ms(deadline: float) -> int:
    return max(math.ceil((deadline - time.monotonic()) * 1000), 10)


def _line(exc: Exception) -> str:
    """What the server said, as one sentence."""
    said = " ".join(str(exc).split())
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _placeholders(question: str) -> bytes:
    return question.replace("%", "%%").replace("?", "%s").encode()


# --- forks

_pools: weakref.WeakSet[Connections] = weakref.WeakSet()
_open: weakref.WeakSet[Connection] = weakref.WeakSet()
_leaked: list[Connection] = []
"""Connections of the parent. They are neither used nor closed here, not even by the garbage collector."""


def _after_fork_in_child() -> None:
    """Let go of the parent's sockets without a word on them: or what the parent left open would last as long as we."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for db in list(_open):
        _leaked.append(db)
        with suppress(psycopg.Error, OSError):
            os.dup2(nothing, db.pgconn.socket, inheritable=False)
    os.close(nothing)
    _open.clear()
    for connections in list(_pools):
        connections._unshare()


os.register_at_fork(after_in_child=_after_fork_in_child)
