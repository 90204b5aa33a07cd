"""The ledger beside OpenAI's own figures, by day in UTC and model: what differs, and why as far as that can be told.

Invariant: a message of the API that is asked counts once, on the day in UTC on which it began.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from itertools import chain
from typing import Any

from spryng_instrument.differences import (
    CAUSES,
    COST,
    COST_CAUSES,
    MEANINGS,
    MEASURES,
    Cell,
    Day,
    Line,
    Recorded,
    name_of,
    total_of,
)
from spryng_instrument.errors import QueryError
from spryng_instrument.message import BILLABLE, Message
from spryng_instrument.organization import Charge, Counts, Organization
from spryng_instrument.store.base import Filter, Store, StoredMessage, pages_of

GROUPINGS = ("day", "model", "day-model")
MARGIN = timedelta(days=1)
"""How far calls at the edges of a month are looked at beyond it."""
USAGE_LAG = timedelta(minutes=5)
"""How long after its end a day may still grow in OpenAI's usage."""
COST_LAG = timedelta(hours=24)
"""The same in its costs."""
PAGE = 1_000
"""Messages read at a time."""


def recorded_by_day(
    messages: Iterable[StoredMessage], host: str, unread: Iterable[Message] = ()
) -> dict[tuple[date, str], Recorded]:
    """What the ledger has for one API, by day in UTC and name of the model.

    Args:
        host: whose; OpenAI's regions are one API.
        unread: calls in the background that wait for their usage.
    """
    found: defaultdict[tuple[date, str], Recorded] = defaultdict(Recorded)
    api = _api_of(host)
    for row in messages:
        message = row.message
        by_hand = message.host is None
        if (by_hand or _api_of(message.host) == api) and not message.operation.startswith("videos"):
            _count(found[_day_of(message), name_of(message.model)], row, by_hand)
    for message in unread:
        if _api_of(message.host) == api:
            known = found[_day_of(message), name_of(message.model)]
            known.beside["background"]["requests"] += 1
            known.untold.add("background")
    return dict(found)


def _count(known: Recorded, row: StoredMessage, by_hand: bool) -> None:
    message, usage = row.message, row.message.usage
    tokens = usage if usage is not None and usage.input_tokens is not None else None
    counts = (
        Counts(1)
        if tokens is None
        else Counts(1, tokens.input_tokens or 0, tokens.cached_tokens or 0, tokens.output_tokens or 0)
    )
    if message.retries and not by_hand:
        known.beside["retried"]["requests"] += message.retries
        known.untold.add("retried")
    cause = "recorded by hand" if by_hand else "cancelled" if message.status == "cancelled" else "failed"
    if by_hand or message.status not in BILLABLE:
        if message.http_status is None:  # else the server has refused it
            _add(known.beside[cause], counts)
            if tokens is None:
                known.untold.add(cause)
        return
    _add(known.counts, counts)
    known.unreported += tokens is None
    known.uncosted += row.cost_usd is None
    known.cost_usd += row.cost_usd or 0
    known.batches += message.operation == "batches"
    known.runs += message.operation in ("threads.runs", "agents.turns")
    ended = message.timestamp.astimezone(timezone.utc) + timedelta(milliseconds=message.latency_ms or 0)
    if message.operation == "batches" or ended.date() > _day_of(message):
        _add(known.crossing, counts)


def _add(sums: Counter[str], counts: Counts) -> None:
    for measure, count in zip(MEASURES, counts, strict=True):
        sums[measure] += count


def compare(
    ledger: Mapping[tuple[date, str], Recorded], organization: Organization, now: datetime
) -> tuple[list[Line], list[Line]]:
    """(every number of a model and day, the cost of every day), in their order, with what explains the differences."""
    cells = _cells(ledger, organization, now)
    for cause in CAUSES:
        for cell, explanations in [(cell, list(cause(cell))) for cell in cells.values()]:
            for name, measure, amount in explanations:
                if measure in cell.lines:
                    cell.lines[measure].explain(name, amount)
    days = _days(cells, organization, now)
    for cost_cause in COST_CAUSES:
        for day in days:
            for name, _, amount in list(cost_cause(day)):
                day.line.explain(name, amount)
    return [line for cell in cells.values() for line in cell.lines.values()], [day.line for day in days]


def _cells(
    ledger: Mapping[tuple[date, str], Recorded], organization: Organization, now: datetime
) -> dict[tuple[date, str], Cell]:
    theirs: defaultdict[tuple[date, str], Counter[str]] = defaultdict(Counter)
    batches: Counter[tuple[date, str]] = Counter()
    untold = set()
    for usage in organization.usage:
        key = usage.day, name_of(usage.model)
        _add(theirs[key], usage.counts)
        batches[key] += usage.counts.requests if usage.batch else 0
        if not usage.tells_tokens:
            untold.add(key)
    cells = {}
    for key in sorted({*ledger, *theirs}):
        day, model = key
        ours = ledger.get(key, Recorded())
        lines = {
            measure: Line(measure, Decimal(ours.counts[measure]), Decimal(theirs[key][measure]), day, model)
            for measure in (MEASURES[:1] if key in untold else MEASURES)
        }
        cells[key] = Cell(ours, batches[key], _end(day) + USAGE_LAG > now, lines)
    for (day, model), cell in cells.items():
        cell.before = cells.get((day - timedelta(days=1), model))
        cell.after = cells.get((day + timedelta(days=1), model))
    return cells


def _days(cells: Mapping[tuple[date, str], Cell], organization: Organization, now: datetime) -> list[Day]:
    charges: defaultdict[date, list[Charge]] = defaultdict(list)
    for charge in organization.charges:
        charges[charge.day].append(charge)
    days = []
    for day in sorted({*charges, *(day for day, _ in cells)}):
        models = {model: cell for (of, model), cell in cells.items() if of == day}
        ours = total_of(cell.recorded.cost_usd for cell in models.values())
        theirs = total_of(charge.amount for charge in charges[day] if charge.currency == "usd")
        days.append(Day(Line(COST, ours, theirs, day), models, charges[day], _end(day) + COST_LAG > now))
    return days


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """A month of the ledger beside OpenAI's."""

    month: str
    host: str
    projects: tuple[str, ...]
    lines: list[Line]
    """By day and model; those of costs, by day, come last."""
    open_days: tuple[date, ...]
    """Days that OpenAI may still add to: compared up to what is there."""

    @property
    def is_explained(self) -> bool:
        """Whether every difference has a cause."""
        return not any(line.unexplained for line in self.lines)

    def grouped(self, by: str) -> list[Line]:
        """The lines summed by one of GROUPINGS, in order, without those of nothing. Costs have no model.

        Raises:
            QueryError: it is none of them.
        """
        if by not in GROUPINGS:
            raise QueryError(f"by={by!r} must be one of: {', '.join(GROUPINGS)}")
        summed = self._summed(lambda line: (line.day if "day" in by else None, line.model if "model" in by else None))
        return [line for line in summed if (line.ours or line.theirs) and (by != "model" or line.measure != COST)]

    def total(self) -> list[Line]:
        """A line for each measure."""
        return self._summed(lambda line: (None, None))

    def by_cause(self) -> dict[str, list[tuple[str, Decimal, Decimal]]]:
        """By cause, in the order of MEANINGS: (measure, what OpenAI has more by it, what it has less)."""
        found: defaultdict[str, dict[str, list[Decimal]]] = defaultdict(dict)
        for line in self.lines:
            for cause, amount in {**line.causes, "unexplained": line.unexplained}.items():
                if amount:
                    more_less = found[cause].setdefault(line.measure, [Decimal(0), Decimal(0)])
                    more_less[amount < 0] += amount
        order = [*MEANINGS, "unexplained"]
        names = sorted(found, key=lambda cause: order.index(cause.split(" or ")[0]))
        return {name: [(measure, more, less) for measure, (more, less) in found[name].items()] for name in names}

    def as_json(self, by: str) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "month": self.month,
            "host": self.host,
            "projects": list(self.projects),
            "open_days": [day.isoformat() for day in self.open_days],
            "rows": [line.as_json() for line in self.grouped(by)],
            "total": [line.as_json() for line in self.total()],
            "explained": self.is_explained,
        }

    def _summed(self, group: Callable[[Line], tuple[date | None, str | None]]) -> list[Line]:
        sums: dict[Any, Line] = {}
        for line in self.lines:
            day, model = group(line)
            key = (day or date.min, model is None, model or "", (*MEASURES, COST).index(line.measure))
            sums.setdefault(key, Line(line.measure, Decimal(0), Decimal(0), day, model)).add(line)
        return [sums[key] for key in sorted(sums)]


def span(since: datetime, until: datetime, now: datetime) -> tuple[datetime, datetime]:
    """The days to ask OpenAI for, so that a month can be compared: with MARGIN, and none that is still to come.

    Raises:
        QueryError: the month has not begun.
    """
    if since > now:
        raise QueryError(f"month={since:%Y-%m} has not begun in UTC; give one that has")
    return since - MARGIN, min(until + MARGIN, _end(now.date()))


def reconcile(
    store: Store,
    organization: Organization,
    host: str,
    since: datetime,
    until: datetime,
    *,
    projects: Sequence[str] = (),
    unread: Iterable[Message] = (),
    now: datetime,
) -> Reconciliation:
    """Compare the messages of *store* from *since* to *until*, a month in UTC, with OpenAI's figures of its `span`.

    Args:
        host: whose figures these are.
        projects: of which projects only they are.
        unread: calls in the background that wait for their usage.
        now: which days OpenAI may have closed depends on it.

    Raises:
        StoreError: the ledger cannot be read.
    """
    start, stop = span(since, until, now)
    ledger = recorded_by_day(_messages(store, Filter(since=start, until=stop)), host, unread)
    lines, costs = compare(ledger, organization, now)
    within = [line for line in (*lines, *costs) if line.day is not None and since.date() <= line.day < until.date()]
    days = (since.date() + timedelta(days=number) for number in range((until - since).days))
    opened = tuple(day for day in days if _end(day) + USAGE_LAG > now and day <= now.date())
    return Reconciliation(f"{since:%Y-%m}", host, tuple(projects), within, opened)


def _messages(store: Store, where: Filter) -> Iterator[StoredMessage]:
    return chain.from_iterable(pages_of(lambda after: store.messages(where, after=after, limit=PAGE)))


def _api_of(host: str | None) -> str | None:
    """The API that a host belongs to: OpenAI's has one in each of its regions."""
    return "api.openai.com" if host and host.endswith(".api.openai.com") else host


def _day_of(message: Message) -> date:
    return message.timestamp.astimezone(timezone.utc).date()


def _end(day: date) -> datetime:
    return datetime.combine(day + timedelta(days=1), time(), timezone.utc)
