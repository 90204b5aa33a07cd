"""Holds the answer to a slow question for a while, so that many viewers do not cost more than one.

Invariant: a tenth of the time, at most, is spent on finding the same answer again; and a quick answer is always new, or
was being found when it was asked for. No thread waits for what another one finds.

A program that asks is not a viewer: what was recorded before it asked is to be in its answer. It gets none that was
begun to be found before; but all who came meanwhile share the next one, so that the same is found once at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, TypeVar

T = TypeVar("T")

SLOW_S = 0.1
"""What takes longer to find is held for TIMES as long, but no longer than MOST_S."""
TIMES = 10
MOST_S = 60.0
HELD = 64
"""Answers that are held; and how many rows one may have, to be."""
HELD_ROWS = 5_000


Answer = tuple[Any, datetime]


class BeingFound(Exception):
    """The answer to this question is being found for somebody else: wait for it where no thread is held."""

    def __init__(self, question: Hashable, answer: Future[Answer], begun: float) -> None:
        super().__init__(question)
        self.question, self.answer, self.begun = question, answer, begun


class Answers:
    """Answers of one ledger, which any thread may ask for. Asked for twice at a time, they are found once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, tuple[float, Answer]] = OrderedDict()
        self._finding: dict[Hashable, tuple[Future[Answer], float]] = {}

    def get(self, question: Hashable, find: Callable[[], T], rows: Callable[[T], int] | None) -> tuple[T, datetime]:
        """The answer, and of when it is.

        Args:
            rows: how many it has. None: it is for programs, and not held.

        Raises:
            BeingFound: it is awaited by another thread already.
        """
        with self._lock:
            until, held = self._held.get(question, (0.0, None))
            if held is not None and time.monotonic() < until:
                return held
            if (finding := self._finding.get(question)) is not None:
                raise BeingFound(question, *finding)
            mine: Future[Answer] = Future()
            self._finding[question] = mine, time.monotonic()
            mine.set_running_or_notify_cancel()  # nobody who waits for it can cancel it
        try:
            answer, until, count = self._find(find, rows)
        except BaseException as exc:
            with self._lock:
                del self._finding[question]
            mine.set_exception(exc)
            raise
        with self._lock:
            del self._finding[question]
            self._held.pop(question, None)
            if rows is not None and count <= HELD_ROWS and time.monotonic() < until:
                self._held[question] = until, answer
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        mine.set_result(answer)  # to those who wait, however many rows it has
        return answer

    def _find(self, find: Callable[[], T], rows: Callable[[T], int] | None) -> tuple[tuple[T, datetime], float, int]:
        """The answer, until when it may be held, and its rows."""
        started, when = time.monotonic(), datetime.now(timezone.utc)
        found = find()
        ended = time.monotonic()
        took = ended - started
        until = ended + min(took * TIMES, MOST_S) if took > SLOW_S else 0.0
        return (found, when), until, rows(found) if rows is not None else 0


class Asking:
    """The answers that one request asks for. Begun again, it has those that it waited for.

    Args:
        since: from when on of time.monotonic() they are to be found. None: it takes what others are being given.
    """

    def __init__(self, answers: Answers, since: float | None = None) -> None:
        self._answers = answers
        self._since = since
        self._given: dict[Hashable, Answer] = {}

    def get(
        self, question: Hashable, find: Callable[[], T], rows: Callable[[T], int] | None = None
    ) -> tuple[T, datetime]:
        """The answer, and of when it is.

        Raises:
            BeingFound: wait for it, and begin again.
        """
        return self._given.get(question) or self._answers.get(question, find, rows)

    async def wait_for(self, found: BeingFound) -> None:
        """Wait until an answer is there. What goes wrong with it is raised here, too, if it is ours."""
        answer = asyncio.wrap_future(found.answer)
        if self._since is None or found.begun >= self._since:
            self._given[found.question] = await answer
        else:
            with suppress(Exception):  # it is told to those whose it is
                await answer
