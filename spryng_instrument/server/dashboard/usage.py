"""The pages of what was used: by all, a customer, tag or model; and of what the ledger knows to be missing from it.

Each asks the ledger by the reports that everything else asks, too: a figure here is that of the API, the command line
and the bills. Of single messages, only a customer's last ones are shown here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from decimal import Decimal

from starlette.responses import Response

from spryng_instrument.errors import QueryError
from spryng_instrument.reports import CONVERSATIONS, UsageReport, label, whole_report
from spryng_instrument.server.dashboard import tables
from spryng_instrument.server.dashboard.layout import Asked
from spryng_instrument.server.dashboard.question import ALL_TIME, Params, Question, page_number
from spryng_instrument.server.dashboard.tables import ROWS, Cell, Table
from spryng_instrument.server.reading import one, priced, usage_csv
from spryng_instrument.store.base import GROUPS, Store, UsageRow
from spryng_instrument.tables import many, void_text

TOP = 10
"""Rows of a table that is a part of a page."""


def overview(asked: Asked) -> Response:
    """The figures of all, or of what is filtered by; cost per day; the customers with the most of it."""
    question = asked.question("show")
    return _summary(asked, question, "", f"Usage of {asked.link.key}" if asked.link else "Overview")


def key(asked: Asked) -> Response:
    """The same of one customer; with its last conversations and messages, and a link to be shared."""
    question = asked.question("show")
    if question.where.key is None and not question.where.no_key:
        raise QueryError("key is missing; name one, or say no_key=true")
    return _summary(asked, question, "key", label("key", question.where.key))


def _summary(asked: Asked, question: Question, page: str, title: str) -> Response:
    now = datetime.now(timezone.utc)
    window = tables.window_of(question, now)
    (rows, report), when = asked.answers.get(
        ("summary", question.where, question.zone, window),
        lambda: _used(asked.store, question, window),
        lambda it: len(it[0]) + len(it[1].rows),
    )
    total = report.total
    if not report.rows and not asked.link and not asked.store.messages(limit=1).rows:
        return asked.html(page, title, None, template="empty")
    default = "cost_usd" if question.costs and total.cost_usd is not None else "messages"
    show = one(asked.query, "show", default)
    if show not in tables.SHOWN or (show == "cost_usd" and not question.costs):
        raise QueryError(f"show={show!r} must be one of: {', '.join(tables.SHOWN)}")
    of_one = question.where.key is not None or question.where.no_key
    parts: list[Table] = []
    notices: list[tuple[str, str, str]] = []
    if of_one:
        parts += _last_of(asked, question)
    else:
        parts.append(_top(rows, question))
        notices += [_without_key(row, question) for row in rows if row.group is None]
    notices += tables.without_price(report, question)
    if report.voided.messages:
        notices.append((void_text(report.voided.messages), "Messages", question.address("messages")))
    return asked.html(
        page, title, question, stats=tables.stats(total, question), notices=notices, tables=parts,
        chart=tables.chart(report, question, page, show, now) if report.rows else None,
        when=tables.time_text(when, question.tz),
        linkable=question.where.key if page == "key" and not asked.link else None,
    )  # fmt: skip


def _used(store: Store, question: Question, window: str) -> tuple[list[UsageRow], UsageReport]:
    """Usage by key, and the report by model and day or month: by two questions at a time, not five one by one."""
    where, rated = question.where, priced(store)
    with ThreadPoolExecutor(1, "spryng-beside") as beside:
        asking = beside.submit(store.usage_and_total, "key", where)
        found, _ = store.usage_by_window("model", window, where, zone=question.zone, with_total=False)
        by_key, total = asking.result()
    unpriced = sorted({label("model", row.group) for _, row in found if row.unpriced})
    rows, windows = [row for _, row in found], tuple(name for name, _ in found)
    voided = store.voided(where)
    return by_key, UsageReport(
        "model", question.zone, where, rows, total, tuple(unpriced), rated, window, windows, voided
    )


def _top(rows: list[UsageRow], question: Question) -> Table:
    sort = "cost_usd" if any(row.cost_usd for row in rows) else "messages"
    found = _sorted(rows, sort)
    title = f"Top {TOP} of {many(len(rows), 'key')}" if len(rows) > TOP else "Keys"
    lines = tables.usage_rows("key", found[:TOP], question, found[0].cost_usd if found else None)
    table = Table(title, tables.usage_heads("Key", question), lines, csv=question.address("usage.csv", by="key"))
    return tables.with_links(table, ("All keys", question.address("keys")))


def _last_of(asked: Asked, question: Question) -> list[Table]:
    priced(asked.store)
    page = asked.store.messages(question.where, limit=TOP)
    messages = tables.message_table(page.rows, question, with_key=False, title="Last messages")
    found = asked.store.conversations(question.where, limit=TOP)
    conversations = tables.conversation_table(found.rows, question, with_key=False, title="Last conversations")
    return [
        tables.with_links(conversations, ("All conversations", question.address("conversations"))),
        tables.with_links(messages, ("All messages", question.address("messages"))),
    ]


def _without_key(row: UsageRow, question: Question) -> tuple[str, str, str]:
    calls = row.messages + row.errors + row.cancelled
    text = f"{many(calls, 'call')} in this period {'has' if calls == 1 else 'have'} no key: nobody is billed for them."
    return text, "See them", question.address("key", key=None, no_key="true")


def _sorted(rows: Sequence[UsageRow], sort: str) -> list[UsageRow]:
    """By name, or the most of something first."""
    named = sorted(rows, key=lambda row: (row.group is not None, row.group or ""))
    return named if sort == "name" else sorted(named, key=lambda row: -tables.value_of(row, sort))


def groups(by: str) -> Callable[[Asked], Response]:
    """The page of all keys, tags or models: to be searched, ordered and paged through."""

    def page(asked: Asked) -> Response:
        question = asked.question("q", "sort", "page")
        report, when = asked.report(by, question)
        default = "cost_usd" if question.costs and report.total.cost_usd is not None else "messages"
        sort, q = one(asked.query, "sort", default), one(asked.query, "q", "")
        allowed = ["name", *tables.figures(question)]
        if sort not in allowed:
            raise QueryError(f"sort={sort!r} must be one of: {', '.join(allowed)}")
        rows = _sorted(report.rows, sort)
        found = [row for row in rows if q.casefold() in label(by, row.group).casefold()]
        number = page_number(asked.query, -(-len(found) // ROWS))
        largest = max((row.cost_usd or Decimal(0) for row in rows), default=None)
        shown = found[(number - 1) * ROWS : number * ROWS]
        kept: dict[str, str | None] = {"q": q or None, "sort": sort if sort != default else None}
        table = Table(
            f"{by.title()}s",
            tables.usage_heads(by.title(), question, sort, f"{by}s", q=kept["q"]),
            tables.usage_rows(by, shown, question, largest),
            tables.total_cells(report.total, question),
            question.address("usage.csv", by=by),
            _found(len(shown), len(found), len(rows), number, by),
            empty=f"No {by} has {q!r} in its name." if q else f"No {by}s in this period.",
        )
        table = tables.with_links(
            table,
            ("Previous", question.address(f"{by}s", kept, page=str(number - 1)) if number > 1 else None),
            ("Next", question.address(f"{by}s", kept, page=str(number + 1)) if number * ROWS < len(found) else None),
        )
        return asked.html(
            f"{by}s", f"{by.title()}s", question, notices=tables.without_price(report, question, by), tables=[table],
            when=tables.time_text(when, question.tz), sort=kept["sort"],
            search=(by, q) if q or len(rows) > TOP else None,
        )  # fmt: skip

    page.__name__ = f"{by}s"
    return page


def _found(shown: int, found: int, all: int, number: int, by: str) -> str:
    start = (number - 1) * ROWS
    parts = f"{start + 1:,} to {start + shown:,} of " if shown < found else ""
    text = f"{parts}{many(found, by)}" + (f", of {all:,} in all; the total is of all" if found < all else "")
    return f"{text}. A message with two tags is in both rows, and once in the total." if by == "tag" else text


def health(asked: Asked) -> Response:
    """What the ledger knows to be missing: messages, customers, prices."""
    question = asked.question()
    priced(asked.store)
    found, when = asked.answers.get("health", asked.store.health, lambda it: 1)
    everything: Params = {**ALL_TIME, "preset": "all", "tag": None}
    without = question.address("messages", everything, key=None, model=None, no_key="true")
    lost = [
        [Cell(writer), *(Cell(f"{n:,}", number=True) for n in (given, here, given - here))]
        for writer, given, here in found.gaps
    ]
    sites = [[Cell(site, without), Cell(f"{n:,}", without, number=True, again=True)] for site, n in found.unattributed]
    models = []
    for name, n in found.unpriced:
        href = question.address("messages", everything, key=None, no_key=None, model=name)
        models.append([Cell(name, href), Cell(f"{n:,}", href, number=True, again=True)])
    parts = [
        Table(
            "Numbers that processes gave and that are not here",
            tables.heads(["Process"], ["Given", "Here", "Missing"]),
            lost,
            empty="No message is missing: every process's numbers are all here.",
        ),
        Table(
            "Lines of code that call without a key",
            tables.heads(["Line"], ["Calls"]),
            sites,
            empty="Every call has a key.",
            note="Wrap them in usage_context(key=...)." if sites else None,
        ),
        Table(
            "Models without a known price",
            tables.heads(["Model"], ["Messages"]),
            models,
            empty="Every message with usage has a cost.",
        ),
    ]
    stats = [("Messages in the ledger", f"{found.messages:,}", "", question.address("messages", everything)),
             ("Processes that recorded", f"{found.writers:,}", "", "")]  # fmt: skip
    return asked.html("health", "Health", question, stats=stats, tables=parts, when=tables.time_text(when, question.tz))


def usage_file(asked: Asked) -> tuple[Iterator[str], str]:
    """The CSV of a table of usage, a part at a time; and the name of the file."""
    question = asked.question("by", "window")
    by, window = one(asked.query, "by", "key"), one(asked.query, "window")
    if by not in GROUPS:
        raise QueryError(f"by={by!r} must be one of: {', '.join(GROUPS)}")
    report, _ = asked.report(by, question, window, CONVERSATIONS if by == "conversation" else None)
    hidden = () if question.costs else ("unpriced", "cost_usd")
    return usage_csv(whole_report(report, asked.store), hidden), f"usage-by-{by}.csv"
