"""Alerts of budgets: at 50, 80 and 100 % of each limit, once a period, in the log and by a signed webhook.

Invariant: an alert is a document of the ledger before anybody hears of it. Of all processes, whoever appended it tells
of it. What no receiver has acknowledged is posted again by whoever looks next, which is a document, too: so a receiver
gets it at least once, with an id that stays the same. (ClickHouse has no unique keys: there, two that append at the
same moment both tell of it.) No alert waits for another one that the receiver refuses.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from math import inf
from typing import Any, NamedTuple, Protocol

import msgspec

from spryng_instrument.budgets import Budgets, BudgetState, used_text
from spryng_instrument.errors import SettingsError, StoreError
from spryng_instrument.store.base import Record
from spryng_instrument.store.transport import HttpEnd

log = logging.getLogger("spryng_instrument")

PERCENTS = (50, 80, 100)
TRIES_S = (0.0, 1.0, 4.0)
"""Seconds before each try of a post, of whoever appended the alert."""
AGAIN_AFTER_S = 60.0
"""After which somebody posts again what nobody has acknowledged; it doubles from time to time."""
LONGEST_AGAIN_S = 3600.0
LOOK_EVERY_S = 15.0
"""Seconds between two looks at what is due again."""
SECRET_VARIABLE = "SPRYNG_WEBHOOK_SECRET"
POST_S = 5.0
"""Seconds that a receiver has to answer."""
ROUND_S = 10.0
"""Seconds after which `post` begins no other one: whoever calls it has more to do."""
LATER = (408, 429)
"""Statuses of 4xx that say nothing against the alert."""


class Documents(Protocol):
    """The part of a Store that alerts are kept in."""

    def append(self, records: Sequence[Record]) -> bool: ...

    def records(self, kind: str, *, key: str | None = None, subject: str | None = None) -> list[Record]: ...


class _Due(NamedTuple):
    """An alert that is to be posted again."""

    since: datetime
    record: Record
    times: int
    """How often somebody was about to post it."""


class Alerts:
    """Tells of budgets that are reached.

    Args:
        store: where it is kept who was told.

    Raises:
        SettingsError: there is a webhook, and no secret to sign with.
    """

    def __init__(self, store: Documents, budgets: Budgets) -> None:
        self._store = store
        self._budgets = budgets
        self._webhook = None if budgets.webhook is None else Webhook(budgets.webhook, secret_of(os.environ))
        self._known: dict[str, set[str]] = {}
        """Ids of the alerts there are, by subject."""
        self._said = False
        self.after_fork()

    def after_fork(self) -> None:
        """In the child: what the parent appended is the parent's to post."""
        self._new: list[Record] = []
        self._looked_at = -LOOK_EVERY_S
        self._posting = threading.Lock()
        self._stop = threading.Event()

    def look(self, states: Sequence[BudgetState], now: datetime, *, within_s: float = inf) -> None:
        """Append the alerts that *states* call for and nobody has, and log each.

        Args:
            within_s: after so many seconds, the rest is left for the next time.

        Raises:
            StoreError: not now.
        """
        until = time.monotonic() + within_s
        subjects = {_subject(state.name, state.start) for state in states}
        self._known = {name: known for name, known in self._known.items() if name in subjects}
        for state in states:
            if time.monotonic() >= until:
                return
            for percent in PERCENTS:
                if state.percent >= percent:
                    self._alert(state, percent, now)

    @property
    def wants_to_post(self) -> bool:
        """Whether it is time to call `post`."""
        if self._webhook is None:
            return False
        return bool(self._new) or time.monotonic() - self._looked_at >= LOOK_EVERY_S

    def post(self, now: datetime | None = None) -> None:
        """Post what was appended, and what is due to be posted again. This waits for the receiver.

        It is over with the first that the receiver does not answer, or would have later, and ROUND_S after it began:
        the others are due later on, as that one is.

        Raises:
            StoreError: the ledger does not answer.
        """
        if self._webhook is None or not self._posting.acquire(blocking=False):
            return
        try:
            until = time.monotonic() + ROUND_S
            new, self._new = self._new, []
            for record in new:
                if not self._answered(record, TRIES_S, until):
                    return
            self._looked_at = time.monotonic()
            now = now or datetime.now(timezone.utc)
            for due in sorted(self._due(now), key=lambda due: due.since):
                if time.monotonic() >= until:
                    return
                # Just before it is posted: who claims more than it posts keeps the others from posting them.
                if self._claimed(due, now) and not self._answered(due.record, TRIES_S[:1], inf):
                    return
        finally:
            self._posting.release()

    def close(self) -> None:
        """Try no more, and let go of connections."""
        self._stop.set()
        if self._webhook is not None:
            self._webhook.close()

    def _alert(self, state: BudgetState, percent: int, now: datetime) -> None:
        subject = _subject(state.name, state.start)
        known = self._known.get(subject)
        if known is None:
            known = self._known[subject] = {record.id for record in self._store.records("alert", subject=subject)}
        # With the limit: who raises it wants to know how the new one is used.
        made_of = [state.name, state.key, state.unit, str(state.limit), state.start.isoformat(), percent]
        id = f"alert:{hashlib.sha256(msgspec.json.encode(made_of)).hexdigest()[:32]}"
        if id in known:
            return
        record = Record(id, "alert", now, _body(state, percent, now), state.key, subject)
        if self._store.append([record]):
            whose = "" if state.key is None else f" of {state.key!r}"
            log.warning(
                "budget %r%s has reached %d %%: %s%s; it begins anew at %s UTC", state.name, whose, percent,
                "at least " if state.at_least else "", used_text(state.used, state.limit, state.unit),
                f"{state.stop:%Y-%m-%d %H:%M}",
            )  # fmt: skip
            self._new.append(record)
        known.add(id)

    def _due(self, now: datetime) -> list[_Due]:
        """Alerts of this period and the one before that are to be posted again."""
        due: list[_Due] = []
        for budget in self._budgets.budgets:
            start, _ = budget.period_of(now)
            before, _ = budget.period_of(start - timedelta(microseconds=1))
            due += [*self._due_of(_subject(budget.name, before), now), *self._due_of(_subject(budget.name, start), now)]
        return due

    def _due_of(self, subject: str, now: datetime) -> list[_Due]:
        waiting = {record.id: record for record in self._store.records("alert", subject=subject)}
        if not waiting:
            return []
        for sent in self._store.records("alert.sent", subject=subject):
            waiting.pop(sent.body["alert"], None)
        tries: dict[str, list[datetime]] = {id: [record.created] for id, record in waiting.items()}
        for again in self._store.records("alert.again", subject=subject):
            if again.body["alert"] in tries:
                tries[again.body["alert"]].append(again.created)
        due = []
        for id, times in tries.items():
            pause_s = min(AGAIN_AFTER_S * 2 ** (len(times) - 1), LONGEST_AGAIN_S)
            since = times[-1] + timedelta(seconds=pause_s)
            if now >= since:
                due.append(_Due(since, waiting[id], len(times)))
        return due

    def _claimed(self, due: _Due, now: datetime) -> bool:
        """Whether it is ours to post now, and nobody else's."""
        id = due.record.id
        return self._store.append(
            [Record(f"{id}:again:{due.times}", "alert.again", now, {"alert": id}, subject=due.record.subject)]
        )

    def _answered(self, record: Record, tries_s: Sequence[float], until: float) -> bool:
        """Post one. Returns whether the receiver takes alerts, or refuses this one, and so is to be sent others."""
        assert self._webhook is not None
        for wait_s in tries_s:
            if time.monotonic() + wait_s >= until or self._stop.wait(wait_s):
                return False
            try:
                refusal = self._webhook.post(record)
            except StoreError as exc:
                self._say(exc)
                continue
            if refusal is not None:
                self._say(refusal)
                return True
            self._said = False
            now = datetime.now(timezone.utc)
            sent = Record(f"{record.id}:sent", "alert.sent", now, {"alert": record.id}, subject=record.subject)
            self._store.append([sent])
            return True
        return False

    def _say(self, why: object) -> None:
        if not self._said and not self._stop.is_set():
            log.error("an alert could not be posted, and is tried again: %s", why)
        self._said = True


class Webhook(HttpEnd):
    """Posts alerts, signed as https://www.standardwebhooks.com says."""

    def __init__(self, url: str, secret: bytes) -> None:
        super().__init__()
        self._url = url
        self._secret = secret

    def post(self, record: Record) -> str | None:
        """Post one. Returns what the receiver has against it; None: it has acknowledged it.

        Raises:
            StoreError: it does not answer, or takes none now.
        """
        id, seconds, body = record.id.replace(":", "_"), str(int(time.time())), msgspec.json.encode(record.body)
        signature = hmac.digest(self._secret, b".".join((id.encode(), seconds.encode(), body)), "sha256")
        headers = {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": seconds,
            "webhook-signature": f"v1,{b64encode(signature).decode()}",
        }
        self._begin(POST_S)
        answer = self._send("POST", self._url, headers, body)
        if answer.ok:
            return None
        text = f"the webhook answered {answer.status} ({self._said(answer)})"
        if 400 <= answer.status < 500 and answer.status not in LATER:
            return text
        raise StoreError(text)


def secret_of(environ: Mapping[str, str]) -> bytes:
    """What posts are signed with.

    Raises:
        SettingsError: there is none, or one that cannot be used.
    """
    text = environ.get(SECRET_VARIABLE, "")
    how = "it is whsec_ and 24 to 64 random bytes in base64, as in: echo whsec_$(openssl rand -base64 32)"
    if not text:
        raise SettingsError(f"the webhook of the budgets needs a secret to sign with. Set {SECRET_VARIABLE}: {how}")
    try:
        secret = b64decode(text.removeprefix("whsec_"), validate=True)
    except ValueError:
        secret = b""
    if not text.startswith("whsec_") or not 24 <= len(secret) <= 64:
        raise SettingsError(f"{SECRET_VARIABLE} cannot be used: {how}")
    return secret


def _subject(name: str, start: datetime) -> str:
    return f"{name} {start.isoformat()}"


def _body(state: BudgetState, percent: int, now: datetime) -> dict[str, Any]:
    """What is posted. Money is a text, so that no receiver rounds it."""

    def number(amount: Any) -> Any:
        return f"{amount:f}" if state.unit == "cost_usd" else amount

    return {
        "type": "budget.alert",
        "timestamp": now.isoformat(),
        "data": {
            "budget": state.name,
            "key": state.key,
            "tag": state.tag,
            "threshold_percent": percent,
            "unit": state.unit,
            "used": number(state.used),
            "limit": number(state.limit),
            "at_least": state.at_least,
            "hard": state.hard,
            "since": state.start.isoformat(),
            "until": state.stop.isoformat(),
        },
    }
