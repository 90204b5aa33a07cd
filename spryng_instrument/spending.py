"""What is spent of each budget, and so whether a call may go out.

Used is what the ledger has, and what this process recorded that was not in it when it was asked, each message once, and
its calls in flight, which count as one message each. What other processes have not delivered, or what was delivered
since the ledger was asked, is not known: that is the staleness, REFRESH_S and their beat. Never is it less than what
this process did itself.

A background thread asks, of a process that calls; nothing else here waits, but for a call that finds no reading in
time, and only where a hard budget concerns the process: it waits for the next one, and no longer than WAIT_S.

A ledger that cannot be read is asked at growing pauses, up to LONGEST_PAUSE_S: what is used becomes unknown when the
last reading is too old, as ever, and is known again that much later than the ledger answers, at most.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from math import inf
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from spryng_instrument.alerts import Alerts
from spryng_instrument.budgets import (
    NOTHING,
    Answer,
    Budget,
    Budgets,
    BudgetState,
    Question,
    Usages,
    ask,
    question_of,
    read_budgets,
    states_of,
    used_text,
)
from spryng_instrument.errors import BudgetExceeded, Refusal, SettingsError, StoreError
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.prices import load as load_prices
from spryng_instrument.prices import rate
from spryng_instrument.settings import Settings
from spryng_instrument.store import open_store
from spryng_instrument.store.remote import RemoteLedger

log = logging.getLogger("spryng_instrument")

REFRESH_S = 2.0
"""Seconds from one reading of the ledger to the next; or ten times what a reading takes, if that is more."""
LONGEST_PAUSE_S = 60.0
"""Seconds, or somewhat more, from a reading that failed to the next one, at most: it doubles with each that fails."""
IN_TIME_S = 10.0
"""Seconds that a reading is good for; or five times from one to the next. Then what is used is unknown."""
PRICE_S = 1.0
"""Seconds that costs are set for, before a reading: what has none by then counts without until a later one."""
TELL_S = 2.0
"""Seconds that alerts are appended for, after a reading: the rest are after the next one, which is not to be late."""
WAIT_S = 1.0
"""Seconds that a call waits for a reading, at most."""
IDLE_AFTER_S = 60.0
"""Seconds without a call, after which the ledger is left alone until the next one."""
REMEMBERED = 100_000
"""Messages of this process that are remembered until they are seen in the ledger."""
_MATCHES = 10_000
_READINGS = 3
"""How often a question is asked again because messages of ours arrived meanwhile."""


@dataclass(frozen=True, slots=True)
class BudgetReached:
    """A hard budget that has no room for a call."""

    budget: str
    """Its name."""
    key: str | None
    """The customer. None: all together."""
    tag: str | None
    unit: str
    """"messages", "tokens" or "cost_usd"."""
    used: int | Decimal
    in_flight: int
    """Calls of this process that are not at their end; in messages, they take room as well."""
    limit: int | Decimal
    start: datetime
    """When its period began, UTC."""
    resets_at: datetime
    """When it begins anew, UTC."""
    unread: str | None = None
    """Why the ledger could not be read in time, where the budget is on_unknown = "closed". None: it is used up."""

    def __str__(self) -> str:
        whose = "" if self.key is None else f" of {self.key!r}"
        if self.unread is not None:
            return f"budget {self.budget!r}{whose} is unknown, and closed: {self.unread}"
        flight = f", and {self.in_flight} in flight" if self.unit == "messages" and self.in_flight else ""
        return (
            f"budget {self.budget!r}{whose} is used up: {used_text(self.used, self.limit, self.unit)}{flight}; it "
            f"begins anew at {self.resets_at:%Y-%m-%d %H:%M} UTC"
        )


class Ledger(Usages, Protocol):
    """What is read: a Store, or a server that has one."""

    def found(self, ids: Sequence[str]) -> Collection[str]: ...

    def close(self) -> None: ...


class Spent(NamedTuple):
    """What a message of this process counts, until it is seen in the ledger."""

    key: str | None
    tags: tuple[str, ...]
    timestamp: datetime
    messages: int
    tokens: int


class Tally:
    """One budget, one customer, one period: how much of it is used, as far as this process knows."""

    __slots__ = ("_most_messages", "_most_tokens", "_most_usd", "budget", "cost_usd", "hard", "in_flight", "key",
                 "messages", "question", "tokens", "warned")  # fmt: skip

    def __init__(self, budget: Budget, key: str | None, question: Question) -> None:
        self.budget = budget
        self.key = key
        self.question = question
        self.hard = budget.hard
        self.in_flight = 0
        self.warned = False
        self._most_messages = budget.messages or inf
        self._most_tokens = budget.tokens or inf
        self._most_usd = budget.cost_usd or inf

    def read(self, answer: Answer) -> None:
        """Take over what the ledger had. What it had not is added after this."""
        row = answer.get(self.key, NOTHING)
        self.messages, self.tokens = row.messages, row.input_tokens + row.output_tokens
        self.cost_usd = row.cost_usd or Decimal(0)

    def add(self, spent: Spent) -> bool:
        """Add a message that the ledger had not, if it is of this period."""
        if not self.question.since <= spent.timestamp < self.question.until:
            return False
        self.messages += spent.messages
        self.tokens += spent.tokens
        return True

    @property
    def has_room(self) -> bool:
        """Whether no limit is reached: this is on the way of every call."""
        return (
            self.messages + self.in_flight < self._most_messages
            and self.tokens < self._most_tokens
            and self.cost_usd < self._most_usd
        )

    def reached(self, unread: str | None) -> BudgetReached | None:
        """Why a call may not go out, if it may not. What is known and enough is so however old it is."""
        for unit, limit in self.budget.limits:
            if getattr(self, unit) + (self.in_flight if unit == "messages" else 0) >= limit:
                return self._why(unit, limit, None)
        if unread is not None and self.budget.on_unknown == "closed":
            return self._why(*self.budget.limits[0], unread)
        return None

    def _why(self, unit: str, limit: int | Decimal, unread: str | None) -> BudgetReached:
        return BudgetReached(
            self.budget.name, self.key, self.budget.tag, unit, getattr(self, unit), self.in_flight, limit,
            self.question.since, self.question.until, unread,
        )  # fmt: skip


class Spending:
    """Lets calls go out, and keeps count of what they spend.

    Args:
        ledger: opened for this alone; closed by `stop`.
        alerts: None where the ledger takes no documents.
        on_budget: "raise", "warn", or a function of a BudgetReached: what happens where a hard budget is reached.
        nothing_waits: whether all that this process recorded was delivered or set aside.
        bug: told what was being done when an exception of ours was caught.
        before_reading: called before each reading.
    """

    def __init__(
        self,
        budgets: Budgets,
        ledger: Ledger,
        alerts: Alerts | None,
        *,
        on_budget: str | Callable[[BudgetReached], object],
        nothing_waits: Callable[[], bool],
        bug: Callable[[str], None],
        before_reading: Callable[[], object] = lambda: None,
    ) -> None:
        self._budgets = budgets.budgets
        self._hard = any(budget.hard for budget in self._budgets)
        self._ledger = ledger
        self._alerts = alerts
        self._on_budget = on_budget
        self._nothing_waits = nothing_waits
        self._bug = bug
        self._before_reading = before_reading
        self._answers: dict[Question, Answer] = {}
        self._read_at: float | None = None
        self._interval_s = REFRESH_S
        self._begin()

    def after_fork(self) -> None:
        """In the child: what the parent did is the parent's. Its last reading is good as long as it would have been."""
        self._begin()
        if self._alerts is not None:
            self._alerts.after_fork()

    def _begin(self) -> None:
        self.refused = 0
        """Calls that were not sent."""
        self.failure: Exception | None = None
        """Why the last reading failed; None if it did not."""
        self._lock = threading.RLock()  # a signal handler may call while its own thread is about to
        self._ended: deque[tuple[Message | None, tuple[Tally, ...]]] = deque()
        self._own: dict[str, Spent] = {}
        self._tallies: dict[tuple[str, str | None], Tally] = {}
        self._matches: dict[tuple[str | None, tuple[str, ...]], tuple[Tally, ...]] = {}
        self._rolls_at = 0.0
        self._called_at = 0.0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._idle = False
        self._untold = False
        self._pause_s = self._interval_s
        """From the end of the last reading to the next one. Only `_interval_s` says for how long a reading is good."""
        self._thread: threading.Thread | None = None
        self._poster: threading.Thread | None = None

    def wait(self) -> None:
        """Wait for a reading, if there is none in time and it is going to matter."""
        until = 0.0
        while self._is_worth_waiting(until):
            until = until or self._ask_for_reading()
            time.sleep(0.002)

    async def wait_async(self) -> None:
        """The same, for a caller that must not be blocked."""
        until = 0.0
        while self._is_worth_waiting(until):
            from anyio import sleep

            until = until or self._ask_for_reading()
            await sleep(0.002)

    def admit(self, key: str | None, tags: tuple[str, ...]) -> tuple[Tally, ...]:
        """Let a call go out. What it takes room in is to be given to `ended` when it is at its end.

        Raises:
            Refusal: it may not.
        """
        tallies: tuple[Tally, ...] = ()
        reached: list[BudgetReached] = []
        try:
            self.keep_up()
            with self._lock:
                tallies, reached = self._looked_up(key, tags)
        except Exception:
            self._bug("looking a budget up")
        for why in reached:
            self._react(why, tallies)
        if reached:
            with self._lock:
                self._take(tallies)
        return tallies

    def ended(self, message: Message | None, held: tuple[Tally, ...] = ()) -> None:
        """A message was recorded, or a call is at its end, or both. Waits for nothing: a finaliser may call it."""
        self._ended.append((message, held))

    def keep_up(self) -> None:
        """Something goes on here: have the ledger read from now on."""
        self._called_at = time.monotonic()
        if self._thread is None:
            self._start()
        elif self._idle:
            self._wake.set()

    def refresh(self) -> None:
        """Read the ledger.

        Raises:
            StoreError: it cannot be read.
        """
        self._before_reading()
        started = time.monotonic()
        now = datetime.now(timezone.utc)
        ids = self._ids()
        nothing_waits = self._nothing_waits()  # of these ids: so after them, and before it is asked for them
        found = set(self._found(ids))
        done = set(ids) if nothing_waits else set(found)  # what was set aside never comes
        answers: dict[Question, Answer] = {}
        inside: dict[Question, set[str]] = {}
        for question in {question_of(budget, now) for budget in self._budgets}:
            for _ in range(_READINGS):
                inside[question] = set(found)
                answers[question] = ask(self._ledger, question)
                arrived = self._found([id for id in self._ids() if id not in found])
                found.update(arrived)
                if not arrived:
                    break  # else it is not known which of these are in the answer: they count twice, until the next
        with self._lock:
            self._settle()
            for id in done:
                self._own.pop(id, None)
            self._answers = answers
            self._read_at = started
            for tally in self._tallies.values():
                if tally.question in answers:
                    tally.read(answers[tally.question])
            for id, spent in self._own.items():
                for tally in self._of(spent.key, spent.tags):
                    if tally.question in answers and id not in inside[tally.question]:
                        tally.add(spent)
        self._interval_s = max(REFRESH_S, 10 * (time.monotonic() - started))
        if self._alerts is not None:
            self._tell(self._alerts, states_of(self._budgets, now, answers), now)

    def stop(self, timeout_s: float) -> None:
        """End the thread, and let go of the ledger."""
        self._stop.set()
        self._wake.set()
        if self._alerts is not None:
            self._alerts.close()
        for thread in (self._thread, self._poster):
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout_s)
        self._ledger.close()

    def _looked_up(self, key: str | None, tags: tuple[str, ...]) -> tuple[tuple[Tally, ...], list[BudgetReached]]:
        """The tallies of a call that have taken it up, or where it has no room."""
        self._settle()
        tallies = self._of(key, tags)
        unread = None if self._in_time() else self._unread()
        reached: list[BudgetReached] = []
        for tally in tallies:
            if tally.hard and (unread is not None or not tally.has_room):
                why = tally.reached(unread)
                reached += [why] if why is not None else []
        if not reached:
            self._take(tallies)
        return tallies, reached

    def _take(self, tallies: Sequence[Tally]) -> None:
        for tally in tallies:
            tally.in_flight += 1

    def _react(self, why: BudgetReached, tallies: Sequence[Tally]) -> None:
        try:
            if callable(self._on_budget):
                self._on_budget(why)
            elif self._on_budget == "raise":
                raise BudgetExceeded(why)
            else:
                self._warn(why, tallies)
        except Exception as exc:
            with self._lock:
                self.refused += 1
            raise Refusal(exc) from None

    def _warn(self, why: BudgetReached, tallies: Sequence[Tally]) -> None:
        for tally in tallies:
            if tally.budget.name == why.budget and not tally.warned:
                tally.warned = True
                log.warning("%s. on_budget='warn' lets calls through", why)

    def _of(self, key: str | None, tags: tuple[str, ...]) -> tuple[Tally, ...]:
        """The tallies of a call."""
        known = self._matches.get((key, tags))
        if known is None:
            if len(self._matches) >= _MATCHES:
                self._matches.clear()
            now = datetime.now(timezone.utc)
            known = self._matches[key, tags] = tuple(
                self._tally(budget, key if budget.key == "*" else budget.key, now)
                for budget in self._budgets
                if budget.concerns(key, tags)
            )
        return known

    def _tally(self, budget: Budget, key: str | None, now: datetime) -> Tally:
        tally = self._tallies.get((budget.name, key))
        if tally is None:
            tally = self._tallies[budget.name, key] = Tally(budget, key, question_of(budget, now))
            tally.read(self._answers.get(tally.question, {}))
        return tally

    def _roll(self) -> None:
        """A period is over: its tallies are, too. Calls in flight stay with the period that they began in."""
        now = datetime.now(timezone.utc)
        self._matches.clear()
        self._tallies = {name: tally for name, tally in self._tallies.items() if now < tally.question.until}
        self._rolls_at = min(question_of(budget, now).until.timestamp() for budget in self._budgets)

    def _settle(self) -> None:
        """Count all that has ended."""
        if time.time() >= self._rolls_at:
            self._roll()  # first: what began in the new period counts there
        while self._ended:
            message, held = self._ended.popleft()
            for tally in held:
                tally.in_flight -= 1
            if message is not None:
                self._spend(message)

    def _spend(self, message: Message) -> None:
        if message.id in self._own:
            return  # a turn of an agent's session that was read again
        usage = message.usage
        tokens = 0 if usage is None else (usage.input_tokens or 0) + (usage.output_tokens or 0)
        spent = Spent(message.key, message.tags, message.timestamp, int(message.status in BILLABLE), tokens)
        counts = [tally.add(spent) for tally in self._of(message.key, message.tags)]
        if any(counts):
            self._own[message.id] = spent
            if len(self._own) > REMEMBERED:
                del self._own[next(iter(self._own))]

    def _ids(self) -> list[str]:
        with self._lock:
            self._settle()
            return list(self._own)

    def _found(self, ids: list[str]) -> Collection[str]:
        return self._ledger.found(ids) if ids else ()

    def _in_time(self) -> bool:
        return self._read_at is not None and time.monotonic() - self._read_at <= max(IN_TIME_S, 5 * self._interval_s)

    def _unread(self) -> str:
        since = "yet" if self._read_at is None else f"for {time.monotonic() - self._read_at:.0f} s"
        return f"the ledger was not read {since}" + ("" if self.failure is None else f" ({self.failure})")

    def _is_worth_waiting(self, until: float) -> bool:
        if not self._hard or self._in_time() or self.failure is not None or self._stop.is_set():
            return False
        return not until or time.monotonic() < until

    def _ask_for_reading(self) -> float:
        """Until when to wait for it."""
        self.keep_up()
        self._wake.set()
        return time.monotonic() + WAIT_S

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                thread = threading.Thread(target=self._run, name="spryng-budgets", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # the interpreter ends
                self._thread = thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._attempt()
            self._idle = time.monotonic() - self._called_at > IDLE_AFTER_S
            self._wake.wait(None if self._idle else self._pause_s)
            self._idle = False
            self._wake.clear()

    def _attempt(self) -> None:
        try:
            self.refresh()
        except StoreError as exc:
            if self.failure is None and not self._stop.is_set():
                log.error("budgets cannot be looked up: %s", exc)
            self._failed(exc)
        except Exception as exc:
            self._failed(exc)
            self._bug("looking budgets up")
        else:
            if self.failure is not None:
                log.warning("budgets can be looked up again")
            self.failure = None
            self._pause_s = self._interval_s

    def _failed(self, why: Exception) -> None:
        self.failure = why
        # Each process by itself: all of them began to fail at the same moment.
        longest_s = max(LONGEST_PAUSE_S, self._interval_s)
        self._pause_s = min(2 * self._pause_s, longest_s) * random.uniform(0.8, 1.2)

    def _tell(self, alerts: Alerts, states: Sequence[BudgetState], now: datetime) -> None:
        try:
            alerts.look(states, now, within_s=TELL_S)
        except StoreError as exc:
            if not self._untold:
                log.error("alerts of budgets wait until the ledger takes them: %s", exc)
            self._untold = True
            return
        self._untold = False
        if alerts.wants_to_post and (self._poster is None or not self._poster.is_alive()):
            # In a thread of its own: a receiver may be slow.
            self._poster = threading.Thread(target=self._post_all, args=(alerts,), name="spryng-alerts", daemon=True)
            self._poster.start()

    def _post_all(self, alerts: Alerts) -> None:
        try:
            alerts.post()
        except StoreError:
            pass  # the reading says so
        except Exception:
            self._bug("posting an alert")


def open_spending(
    settings: Settings, *, nothing_waits: Callable[[], bool], bug: Callable[[str], None]
) -> Spending | None:
    """What the settings' file of budgets asks for; None if there are none in it.

    Raises:
        SettingsError: it cannot be used, or the destination cannot be asked what was used.
    """
    assert settings.budgets is not None
    budgets = read_budgets(settings.budgets)
    if not budgets.budgets:
        return None
    scheme = urlsplit(settings.destination).scheme
    if "+" in scheme:
        raise SettingsError(
            f"budgets={settings.budgets!r}: {scheme}:// takes messages, but cannot be asked what was used. Deliver to "
            "a ledger, or to spryng serve"
        )
    if scheme in ("http", "https"):
        # Its alerts are told by the server, which has the ledger.
        ledger = RemoteLedger(settings.destination, settings.api_key)
        return Spending(budgets, ledger, None, on_budget=settings.on_budget, nothing_waits=nothing_waits, bug=bug)
    store = open_store(settings.destination)
    costs = any(budget.cost_usd is not None for budget in budgets.budgets)
    if costs:
        load_prices()
    return Spending(
        budgets, store, Alerts(store, budgets), on_budget=settings.on_budget, nothing_waits=nothing_waits, bug=bug,
        before_reading=partial(rate, store, within_s=PRICE_S, again=False) if costs else lambda: None,
    )  # fmt: skip
