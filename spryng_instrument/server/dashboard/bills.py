"""The pages of what customers owe and of what may be used: bills, drafts and closed ones, and budgets. None closes any.

The plans are those of the command line, `SPRYNG_PLANS` or `.spryng/plans.toml`, and the budgets those of
`SPRYNG_BUDGETS`; read for each page, so that a change of a file is seen without a restart.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from starlette.responses import HTMLResponse, Response

from spryng_instrument.billing.behind import Behind, behind
from spryng_instrument.billing.bills import Bill, BillPage, Desk, Drafts, invoice, last_invoices
from spryng_instrument.billing.plans import Plans, load, month_of, next_month
from spryng_instrument.billing.texts import (
    BEHIND,
    COLUMNS,
    amount_text,
    behind_cells,
    days,
    page,
    period_text,
    plain,
    rate_text,
    rows,
    shown,
    total_text,
)
from spryng_instrument.budgets import budget_states, read_budgets, used_text
from spryng_instrument.errors import BillError, PlanError, QueryError, SettingsError
from spryng_instrument.reports import label
from spryng_instrument.server.bodies import Refused
from spryng_instrument.server.dashboard import tables
from spryng_instrument.server.dashboard.layout import Asked
from spryng_instrument.server.dashboard.question import ALL_TIME, Params, Question, page_number, plans_file
from spryng_instrument.server.dashboard.tables import ROWS, Cell, Table, going_on, with_links
from spryng_instrument.server.reading import one, priced
from spryng_instrument.tables import many, write_csv

NAMED = 10
"""Customers with something on no bill that a page names."""


def bills(asked: Asked) -> Response:
    """The bills of a month, drafts too; and those that were closed, the last one first."""
    question = asked.question("of", "page", "after", preset="all")
    key, of = question.where.key, one(asked.query, "of")
    closed = last_invoices(asked.store, key, after=one(asked.query, "after"), limit=ROWS)
    try:
        plans = load(plans_file())
    except PlanError as exc:
        if Path(plans_file()).exists():
            raise
        return asked.html(
            "bills", "Bills", question, template="no_plans", problem=str(exc), tables=[_closed(asked, closed, question)]
        )
    month = of or _present(plans, key)
    found, when = _drafts(asked, plans, key, month)
    parts = [_of_month(asked, question, month, found.bills), _closed(asked, closed, question)]
    return asked.html(
        "bills", "Bills", question, tables=parts, notices=_not_billed(question, found),
        when=tables.time_text(when, question.tz),
    )  # fmt: skip


def _not_billed(question: Question, found: Drafts) -> list[tuple[str, str, str]]:
    """What is on nobody's bill, of so many customers as one reads."""
    notices = []
    for customer, count in found.unplanned[:NAMED]:
        text = "nobody's bill has them" if customer is None else "no plan is for them"
        notices.append((f"{label('key', customer)}: {many(count, 'message')}, and {text}.", "See them",
                        question.address("key", question.of_key(customer), ALL_TIME, of=None)))  # fmt: skip
    for customer, currency, amount in found.left_over[:NAMED]:
        text = f"{customer}: {currency} {amount_text(amount, currency)} beyond its closed bills is on no bill"
        notices.append((f"{text}: it has no plan any more.", "See its bills",
                        question.address("bills", question.of_key(customer), ALL_TIME, of=None)))  # fmt: skip
    left = sum(max(len(each) - NAMED, 0) for each in (found.unplanned, found.left_over))
    if left:
        notices.append((f"The same holds for {many(left, 'more customer')}: `spryng bill` names them all.", "Keys",
                        question.address("keys", ALL_TIME, of=None)))  # fmt: skip
    return notices


def _of_month(asked: Asked, question: Question, month: str, bills: list[Bill]) -> Table:
    """A page of the bills of a month, and the way to the others and to other months."""
    number = page_number(asked.query, -(-len(bills) // ROWS))
    lines = []
    for bill in bills[(number - 1) * ROWS : number * ROWS]:
        href = _address(question, "bill", bill)
        state = f"invoice {bill.number}" if bill.number else "draft"
        cells = [Cell(text, href, again=True) for text in (state, *days(bill), bill.plan)]
        lines.append([Cell(bill.name, href), Cell(total_text(bill), href, number=True, again=True), *cells])
    table = Table(
        f"Bills of {month}", _heads("Customer", "State", "First day", "Last day", "Plan"), lines,
        csv=question.address("bills.csv", of=month), empty="Nobody has anything to be billed in that month.",
        note=f"{(number - 1) * ROWS + 1:,} to {(number - 1) * ROWS + len(lines):,} of {many(len(bills), 'bill')}"
        if len(lines) < len(bills) else None,
    )  # fmt: skip
    months = [(each, question.address("bills", of=each)) for each in (next_month(month, -1), next_month(month))]
    previous = question.address("bills", of=month, page=str(number - 1)) if number > 1 else None
    following = question.address("bills", of=month, page=str(number + 1)) if number * ROWS < len(bills) else None
    return with_links(table, *months, ("Previous", previous), ("Next", following))


def _present(plans: Plans, key: str | None) -> str:
    account = plans.account(key)
    return month_of(datetime.now(timezone.utc), account.anchor_day, account.zone)


def _drafts(asked: Asked, plans: Plans, key: str | None, month: str) -> tuple[Drafts, datetime]:
    priced(asked.store)
    asking = ("drafts", repr(plans), key, month)
    return asked.answers.get(asking, lambda: Desk(asked.store, plans, key).drafts(month), lambda it: len(it.bills))


def _closed(asked: Asked, closed: BillPage, question: Question) -> Table:
    lines = []
    for bill in closed.rows:
        href = _address(question, "bill", bill)
        cells = [bill.name, bill.month, *days(bill), tables.time_text(bill.drawn, timezone.utc)]
        total = Cell(total_text(bill), href, number=True, again=True)
        lines.append([Cell(str(bill.number), href), total, *(Cell(text, href, again=True) for text in cells)])
    heads = _heads("Number", "Customer", "Month", "First day", "Last day", "Closed (UTC)")
    empty = "None was closed. Close a month that is over: spryng bill --month 2026-10 --close"
    table = Table("Closed bills, the last one first", heads, lines, empty=empty)
    of, after = one(asked.query, "of"), one(asked.query, "after")
    return going_on(table, question, "bills", "From the last one on", after=after, older=closed.next, of=of)


def _heads(first: str, *others: str) -> list[tables.Column]:
    """What it is, then its total: that is seen on a telephone, too."""
    return [*tables.heads([first], ["Total"]), *tables.heads(others)]


def _address(question: Question, page: str, bill: Bill) -> str:
    """Where one bill is: by its number, or as the draft that it is."""
    if bill.number:
        return question.address(page, ALL_TIME, key=None, of=None, number=bill.number)
    return question.address(page, ALL_TIME, key=bill.key, of=bill.month)


def bill(asked: Asked) -> Response:
    """One bill, with its lines; each leads to the messages of its period."""
    question, it = _bill_of(asked)
    of_period = _period(question, it)
    messages = question.address("messages", of_period)
    lines = []
    for line in shown(it):
        text = line.text if line.month == it.month else f"{line.text} (of {line.month})"
        href = messages if line.kind == "usage" and line.month == it.month else None
        texts = ["" if line.quantity is None else plain(line.quantity), plain(line.included) if line.included else ""]
        texts += [rate_text(line), amount_text(line.amount, it.currency)]
        lines.append([Cell(text, href), *(Cell(each, href, number=True, again=True) for each in texts)])
    table = Table(
        period_text(it), tables.heads(["Line"], ["Quantity", "Included", "Rate", it.currency]), lines,
        total=[Cell("Total"), Cell(""), Cell(""), Cell(""), Cell(total_text(it), number=True)],
        csv=_address(question, "bill.csv", it), note=" ".join(it.notes) or None,
        links=[("To print", _address(question, "bill.html", it)),
               ("Every message behind it (CSV)", _address(question, "bill-messages.csv", it)),
               ("Usage of the period", question.address("key", of_period))],
    )  # fmt: skip
    title = f"Invoice {it.number}" if it.number else f"Draft bill of {it.month}"
    return asked.html(
        "bill", title, question, tables=[table], owner=(it.name, question.address("key", of_period)),
        notices=[(gap, "Models", question.address("models", of_period)) for gap in it.gaps],
        when=None if it.number else tables.time_text(it.drawn, question.tz),
    )  # fmt: skip


def _period(question: Question, bill: Bill) -> Params:
    """The changes that ask for what a bill is about."""
    days = replace(question, zone=bill.zone).within(bill.start, bill.stop)
    return {**days, "key": bill.key, "zone": bill.zone}


def _bill_of(asked: Asked) -> tuple[Question, Bill]:
    question = asked.question("of", "number", preset="all")
    number, key, month = one(asked.query, "number"), question.where.key, one(asked.query, "of")
    if number is not None:
        try:
            return question, invoice(asked.store, number)
        except BillError as exc:
            raise Refused(404, "number", str(exc)) from None
    if key is None or month is None:
        raise QueryError("number is missing; name a closed bill, or for a draft key and of=2026-11")
    drafts, _ = _drafts(asked, load(plans_file()), key, month)
    for each in drafts.bills:
        if each.key == key:
            return question, each
    raise Refused(404, "key", f"{key!r} has nothing to be billed in {month}")


def bill_print(asked: Asked) -> Response:
    """A bill as a page to print, the same as `spryng bill --format html`."""
    _, it = _bill_of(asked)
    text = page([it])
    styles = " ".join(f"'sha256-{_hash(each)}'" for each in re.findall(r"<style>(.*?)</style>", text, re.S))
    policy = f"default-src 'none'; style-src {styles}; frame-ancestors 'none'; base-uri 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _hash(style: str) -> str:
    return base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()


def _csv(name: str, lines: Iterator[list[Any]], columns: Any) -> Response:
    text = io.StringIO()
    write_csv(text, [columns, *lines])
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return Response(text.getvalue(), headers=headers, media_type="text/csv; charset=utf-8")


def bill_file(asked: Asked) -> Response:
    """A bill's lines as CSV."""
    _, it = _bill_of(asked)
    return _csv(f"bill-{it.number or it.month}", rows(it), COLUMNS)


def bills_file(asked: Asked) -> Response:
    """The lines of all bills of a month."""
    question = asked.question("of", preset="all")
    plans = load(plans_file())
    month = one(asked.query, "of", _present(plans, question.where.key))
    drafts, _ = _drafts(asked, plans, question.where.key, month)
    return _csv(f"bills-{month}", (row for each in drafts.bills for row in rows(each)), COLUMNS)


def bill_messages(asked: Asked) -> tuple[Iterator[str], str]:
    """The CSV of every message behind a bill, a part at a time; and the name of the file."""
    _, it = _bill_of(asked)
    try:
        found = behind(asked.store, it)
    except BillError as exc:
        raise QueryError(str(exc)) from None
    return _lines_behind(found, it), f"bill-{it.number or it.month}-messages.csv"


def _lines_behind(found: Iterator[Behind], bill: Bill) -> Iterator[str]:
    lines: list[Sequence[Any]] = [BEHIND]
    for each in found:
        lines.append(behind_cells(bill, each))
        if len(lines) >= 500:
            yield _text(lines)
            lines = []
    yield _text(lines)


def _text(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    write_csv(text, lines)
    return text.getvalue()


def budgets(asked: Asked) -> Response:
    """How much is used of each budget, in the period that is running."""
    question = asked.question(preset="all")
    path = os.environ.get("SPRYNG_BUDGETS")
    if not path:
        return asked.html("budgets", "Budgets", question, template="no_budgets")
    try:
        found = read_budgets(path)
    except SettingsError as exc:
        raise QueryError(f"the budgets cannot be read: {exc}") from None
    priced(asked.store)
    now = datetime.now(timezone.utc)
    states, when = asked.answers.get(
        ("budgets", repr(found)), lambda: budget_states(asked.store, found.budgets, now), len
    )
    lines = []
    for state in sorted(states, key=lambda state: -state.percent):
        of_it: Params = {**question.within(state.start, state.stop), "key": state.key, "tag": state.tag}
        href = question.address("messages", of_it)
        word = "used up" if state.percent >= 100 else "ok"
        what = f"{word}, hard" if state.hard else word
        used = used_text(state.used, state.limit, state.unit)
        lines.append(
            [
                Cell(state.name, href),
                *(Cell(text, href, again=True) for text in (state.key or "(all)", state.tag or "-", what)),
                Cell(tables.time_text(state.stop, question.tz), href, again=True),
                Cell(f"at least {used}" if state.at_least else used, href, number=True, again=True),
                Cell(f"{state.percent:,}%", href, number=True, again=True),
                Cell("", share=float(min(state.percent, 100))),
            ]
        )
    heads = tables.heads(["Budget", "Key", "Tag", "State", f"Begins anew ({question.zone})"], ["Used", "%"])
    table = Table(
        "In the periods that are running",
        [*heads, tables.Column("Share")],
        lines,
        empty="Nothing is used of any budget.",
    )
    return asked.html("budgets", "Budgets", question, tables=[table], when=tables.time_text(when, question.tz))
