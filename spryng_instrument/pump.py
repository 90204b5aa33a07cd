"""The pump: one background thread that moves messages from the journal to the destination.

Invariant: a segment is deleted only after the destination has acknowledged, durably, every message in it. Delivery is
repeated until then, and the destination keeps each id once. This module knows nothing of the SDK.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from spryng_instrument.errors import StoreError
from spryng_instrument.journal import SUFFIX, Journal, Segment, set_aside
from spryng_instrument.message import Message, decode
from spryng_instrument.store.base import Destination

log = logging.getLogger("spryng_instrument")

SEGMENT_LINES = 50_000
"""While the destination is down, the open segment grows to this before a new one is begun."""
ORPHANS_EVERY_S = 10.0
HOUR_S = 3600.0
LONGEST_WAIT_S = 30.0


class Begun(NamedTuple):
    """How far a segment was delivered, to go on there when delivery failed in the middle of it."""

    lines: int = 0
    """Of its beginning: the destination has acknowledged them, or they are among these."""
    corrupt: tuple[bytes, ...] = ()
    conflict: tuple[bytes, ...] = ()
    refused: tuple[bytes, ...] = ()


class Pump:
    """Delivers one journal to one destination.

    Args:
        beat_s: how long messages are collected before they are delivered together.
        begun: what an earlier one left of segments in their middle.
        hourly: called in the thread, every hour that it lives.
    """

    def __init__(
        self,
        journal: Journal,
        destination: Destination,
        *,
        beat_s: float,
        begun: dict[Path, Begun] | None = None,
        hourly: Callable[[], None] | None = None,
    ) -> None:
        self.journal = journal
        self.destination = destination
        self.delivered = 0
        """Messages of this process that the destination has."""
        self.set_aside = 0
        """Lines that could not be delivered and lie in the folder of those set aside."""
        self.failure: Exception | None = None
        """Why the last delivery failed; None if it did not."""
        self.started = False
        self._beat_s = beat_s
        self._begun = {} if begun is None else begun
        self._hourly = hourly
        self._draining = threading.Lock()
        self._stop = threading.Event()
        self._signal = threading.Lock()  # a binary semaphore whose release, unlike an Event's set, never waits
        self._signal.acquire()
        self._thread: threading.Thread | None = None
        self._orphans_at = 0.0
        self._orphans_failure: str | None = None
        self._from_memory = 0

    def start(self) -> None:
        """Start the thread. Where none can be started now, the next message tries again; the exit delivers, too."""
        self.started = True
        thread = threading.Thread(target=self._run, name="spryng-pump", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self.started = False
        else:
            self._thread = thread

    def wake(self) -> None:
        """Something is there to deliver. Waits for nothing: a finaliser may call it."""
        with suppress(RuntimeError):
            self._signal.release()

    def flush(self, timeout_s: float, *, last: bool = False, orphans: bool = False) -> bool:
        """Deliver now, in this thread. Returns whether all that this process recorded before is at the destination.

        Args:
            last: whether what is recorded meanwhile is delivered as well.
            orphans: whether what dead processes left is.
        """
        deadline = time.monotonic() + timeout_s
        grown_s = 0.0
        while True:
            left = deadline - time.monotonic()
            done = False
            if self._draining.acquire(timeout=max(left, 0)):
                try:
                    held_back = self.failure is not None
                    self._drain(deadline)
                    # Messages that came meanwhile are not waited for: others may record without a pause.
                    done = not (last or held_back or self.failure or self.journal.sealed)
                    if orphans and self.failure is None:
                        self._drain_orphans(deadline)
                finally:
                    self._draining.release()
            if done or not self.journal.waiting:
                return True
            if time.monotonic() >= deadline:
                return False
            wait_s, grown_s = self._wait_s(grown_s, 0.02, 0.5) if self.failure else (0.02, 0.0)
            time.sleep(min(wait_s, max(deadline - time.monotonic(), 0)))

    def stop(self, timeout_s: float) -> bool:
        """Deliver what can be within the time, and end the thread. What is left stays in the journal."""
        done = self.flush(timeout_s, last=True)
        self._stop.set()
        self.wake()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return done

    def _run(self) -> None:
        wait_s = grown_s = 0.0
        hour_at = time.monotonic()
        while not self._stop.is_set():
            if not wait_s:
                self._signal.acquire(timeout=ORPHANS_EVERY_S)
            if self._stop.wait(wait_s or self._beat_s):
                return
            with self._draining:
                try:
                    self._drain(None)
                    if self.failure is None and time.monotonic() - self._orphans_at >= ORPHANS_EVERY_S:
                        self._drain_orphans(None)
                    if self._hourly is not None and time.monotonic() - hour_at >= HOUR_S:
                        hour_at = time.monotonic()
                        self._hourly()
                except Exception:
                    log.exception("delivering failed on a bug; messages wait in the journal and are tried again")
                    wait_s = LONGEST_WAIT_S
                    continue
            wait_s, grown_s = self._wait_s(grown_s, self._beat_s, LONGEST_WAIT_S) if self.failure else (0.0, 0.0)

    def _wait_s(self, grown_s: float, first_s: float, longest_s: float) -> tuple[float, float]:
        """After a failure: how long to wait, and what that grew from.

        It doubles from failure to failure. Half of it is random: many processes that failed together come back one by
        one. What the destination asks for is the least.
        """
        grown_s = min(grown_s * 2 or first_s, longest_s)
        asked_s = getattr(self.failure, "retry_after_s", None) or 0.0
        return max(random.uniform(grown_s / 2, grown_s), asked_s * random.uniform(1, 1.1)), grown_s

    def _drain(self, deadline: float | None) -> None:
        """Deliver everything of this process. What goes wrong is in `failure`, and said once."""
        if self.failure is None or not self.journal.sealed or self.journal.lines >= SEGMENT_LINES:
            self.journal.seal()
        try:
            for path, lines in list(self.journal.sealed):
                segment = self.journal.claim(path)
                apart = 0
                if segment is not None:
                    apart = self._deliver(segment, deadline)
                elif path.exists():
                    continue  # another process is delivering it
                self.journal.sealed.remove((path, lines))
                self.delivered += max(lines - apart, 0)
                self.set_aside += apart
            if self.failure is not None:
                self.journal.seal()  # it works again: what was held back follows at the next beat
                self.wake()
            self._deliver_memory(deadline)
        except (StoreError, OSError) as exc:
            if self.failure is None:
                log.error("messages wait in the journal at %s: %s", self.journal.folder, exc)
            self.failure = exc
        else:
            if self.failure is not None:
                log.warning("the destination takes messages again")
            self.failure = None

    def _drain_orphans(self, deadline: float | None) -> None:
        failure = None
        self._orphans_at = time.monotonic()
        for path in self.journal.orphans():
            try:
                segment = self.journal.claim(path)
                if segment is not None:
                    self._deliver(segment, deadline)
            except StoreError as exc:
                self._orphans_at += exc.retry_after_s or 0.0
                failure = f"messages of other processes wait in the journal at {self.journal.folder}: {exc}"
                break
            except OSError as exc:
                failure = f"{path}, left by another process, was not delivered: {exc}"
            if deadline is not None and time.monotonic() > deadline:
                break
        if failure is not None and self._orphans_failure is None:
            log.error("%s", failure)
        self._orphans_failure = failure

    def _deliver(self, segment: Segment, deadline: float | None) -> int:
        """Deliver a segment and delete it. Returns how many of its lines had to be set aside."""
        keep = partial(self._begun.__setitem__, segment.path)
        try:
            done = self._record(segment.lines(), deadline, self._begun.get(segment.path, Begun()), keep)
            apart = self._set_aside(segment.path, done)
            segment.delete()
        finally:
            segment.release()
            for path in [path for path in self._begun if not path.exists()]:  # others may have delivered it, too
                del self._begun[path]
        return apart

    def _deliver_memory(self, deadline: float | None) -> None:
        lines = self.journal.in_memory()
        if not lines:
            return
        # As if from a segment of that name: what cannot be delivered finds its place.
        origin = self.journal.folder / f"{self.journal.writer}-memory-{self._from_memory:06d}{SUFFIX}"
        apart = self._set_aside(origin, self._record(lines, deadline))
        self.journal.forget(lines)
        self._from_memory += 1
        self.delivered += len(lines) - apart
        self.set_aside += apart

    def _set_aside(self, origin: Path, done: Begun) -> int:
        for reason, what_to_do in _WHAT_TO_DO.items():
            lines: tuple[bytes, ...] = getattr(done, reason)
            if lines:
                aside = set_aside(origin, lines, reason)
                log.error("%d %s line(s) of the journal were set aside in %s; %s", len(lines), reason, aside,
                          what_to_do)  # fmt: skip
        return len(done.corrupt) + len(done.conflict) + len(done.refused)

    def _record(
        self,
        lines: Iterable[bytes],
        deadline: float | None,
        begun: Begun = Begun(),  # noqa: B008
        keep: Callable[[Begun], object] = lambda begun: None,
    ) -> Begun:
        """Record every line from where it was *begun* on; *keep* is told after each batch how far it is."""
        source = islice(lines, begun.lines, None)
        while block := [line.removesuffix(b"\n") for line in islice(source, self.destination.batch_size)]:
            batch: dict[int, Message] = {}
            corrupt, conflicts, refused = list[bytes](), list[bytes](), list[bytes]()
            for number, line in enumerate(block):
                try:
                    if line.strip():
                        batch[number] = decode(line)
                except Exception:  # of msgspec, or a RecursionError
                    corrupt.append(line)
            try:
                receipt = self.destination.record(list(batch.values()), timeout_s=self._left(deadline))
                for (number, message), outcome in zip(batch.items(), receipt.outcomes, strict=True):
                    if outcome == "conflict":
                        conflicts.append(block[number])
                    elif outcome == "refused":
                        log.error("the destination refuses message %s: %s", message.id, receipt.reasons.get(message.id))
                        refused.append(block[number])
            except StoreError:
                raise
            except Exception:
                # One message that the store cannot take must not hold up the others for ever.
                for number, message in batch.items():
                    try:
                        self.destination.record([message], timeout_s=self._left(deadline))
                    except StoreError:
                        raise
                    except Exception:
                        log.exception("the destination refuses message %s", message.id)
                        refused.append(block[number])
            begun = Begun(
                begun.lines + len(block),
                (*begun.corrupt, *corrupt),
                (*begun.conflict, *conflicts),
                (*begun.refused, *refused),
            )
            keep(begun)
        return begun

    def _left(self, deadline: float | None) -> float:
        return 5.0 if deadline is None else max(deadline - time.monotonic(), 0.01)


_WHAT_TO_DO = {
    "corrupt": "the disk or another program damaged them; what can be read of them is there",
    "conflict": "the ledger has another message with the same id and keeps that one",
    "refused": "the log above says why; please report it",
}


def deliver_orphans(
    folder: Path,
    destination: Destination,
    *,
    timeout_s: float = 5.0,
    said: Callable[[int], None] = lambda count: None,
    begun: dict[Path, Begun] | None = None,
) -> int:
    """Deliver what dead processes left in *folder*; for the command line. Returns how many messages were delivered.

    Args:
        said: told of each segment's number as soon as it is delivered.
        begun: how far segments were delivered; kept by who calls again after a failure.

    Raises:
        StoreError: the destination does not take them now.
    """
    if not folder.is_dir():
        return 0
    journal = Journal(folder, memory_limit=0, wake=lambda: None)
    pump = Pump(journal, destination, beat_s=0, begun=begun)
    deadline = time.monotonic() + timeout_s
    count = 0
    try:
        for path in journal.orphans():
            segment = journal.claim(path)
            if segment is not None:
                lines = sum(1 for line in segment.lines() if line.strip())
                lines -= pump._deliver(segment, deadline)
                count += lines
                said(lines)
    finally:
        journal.close()
    return count
