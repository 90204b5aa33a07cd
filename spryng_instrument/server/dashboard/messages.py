"""The pages of single messages, and of the conversations that they make up: every field, and the CSV of all of them.

Invariant: however many there are, a page shows a bounded number, and a file is read a part at a time. A customer with a
signed link sees its own messages only, without the fields that are ours.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

from starlette.responses import Response

from spryng_instrument.errors import QueryError
from spryng_instrument.exporting import COLUMNS, cells_of
from spryng_instrument.reports import label, message_record
from spryng_instrument.server.bodies import Refused
from spryng_instrument.server.dashboard import tables
from spryng_instrument.server.dashboard.layout import Asked
from spryng_instrument.server.dashboard.question import ALL_TIME, WHOLE, Params, Question
from spryng_instrument.server.dashboard.tables import ROWS, Cell, Table
from spryng_instrument.server.reading import one, priced
from spryng_instrument.store.base import Filter, Store, StoredMessage, pages_of
from spryng_instrument.tables import decimals_for, many, money, write_csv

CONVERSATION = 1_000
"""Messages of a conversation on its page."""
_OURS = ("call_site", "writer", "sequence", "host", "request_id", "properties", "price_version")
"""Fields of a message that are not for its customer."""


def conversations(asked: Asked) -> Response:
    """Conversations, the one that began last first."""
    question = asked.question("after")
    priced(asked.store)
    after = one(asked.query, "after")
    asking = ("conversations", question.where, after)
    page, _ = asked.answers.get(
        asking, lambda: asked.store.conversations(question.where, after=after, limit=ROWS), lambda page: len(page.rows)
    )
    with_key = question.where.key is None
    table = tables.conversation_table(page.rows, question, with_key=with_key, title="Conversations, the latest first")
    return _listed(asked, question, table, "conversations", "From the latest on", page.next)


def conversation(asked: Asked) -> Response:
    """The messages of one conversation, in order, with what they cost up to there."""
    question = asked.question(preset="all")
    where = question.where
    if where.conversation_id is None or (where.key is None and not where.no_key):
        raise QueryError("conversation is missing, or whose it is: name conversation, and key or no_key=true")
    priced(asked.store)
    report, _ = asked.report("model", question)
    rows = _read(asked.store, where, CONVERSATION)
    if not rows:
        raise Refused(404, "conversation", f"{where.conversation_id!r} has no messages, as far as is asked for")
    decimals = max(decimals_for(report.total.cost_usd), 4)
    running, unknown = report.total.cost_usd or Decimal(0), report.total.unpriced
    lines = []
    for row in rows:  # from the last back: what came before them may be more than is shown
        message, href = row.message, question.address("message", id=row.message.id)
        cells = [
            Cell(tables.time_text(message.timestamp, question.tz), href),
            Cell(label("model", message.model), href, again=True),
            Cell(message.status),
            Cell(message.query or "-"),
            *(Cell(text, href, number=True, again=True) for text in tables.numbers_of(row, question, decimals)),
        ]
        if question.costs:
            cells.insert(5, Cell(money(running, unknown, decimals), number=True))
        lines.append(cells)
        running -= row.cost_usd or Decimal(0)
        unknown -= row.cost_usd is None and message.usage is not None
    numbers = tables.message_numbers(question)
    if question.costs:
        numbers.insert(1, "Up to here")
    left = report.total.messages + report.total.errors + report.total.cancelled - len(rows)
    table = Table(
        "Messages, in order", tables.heads(["Time", "Model", "Status", "Query"], numbers), lines[::-1],
        csv=question.address("messages.csv"),
        note=f"{many(left, 'earlier message')} not shown; the CSV has all." if left > 0 else None,
    )  # fmt: skip
    owner = (label("key", where.key), question.address("" if asked.link else "key", ALL_TIME, conversation=None))
    return asked.html(
        "conversation", where.conversation_id, question, tables=[table],
        stats=[stat for stat in tables.stats(report.total, question) if stat[0] != "Conversations"],
        notices=tables.without_price(report, question), owner=owner,
    )  # fmt: skip


def _read(store: Store, where: Filter, most: int) -> list[StoredMessage]:
    rows: list[StoredMessage] = []
    after = None
    while len(rows) < most:
        page = store.messages(where, after=after, limit=min(most - len(rows), 500))
        rows, after = rows + page.rows, page.next
        if after is None:
            break
    return rows


def messages(asked: Asked) -> Response:
    """Messages, newest first."""
    question = asked.question("after")
    priced(asked.store)
    after = one(asked.query, "after")
    page = asked.store.messages(question.where, after=after, limit=ROWS)
    with_key = question.where.key is None
    table = tables.message_table(page.rows, question, with_key=with_key, title="Messages, newest first")
    return _listed(asked, question, table, "messages", "From the newest on", page.next)


def _listed(asked: Asked, question: Question, table: Table, page: str, first: str, older: str | None) -> Response:
    """A table that goes on: back to its beginning, and to what is *older* than the last of it."""
    table = tables.going_on(table, question, page, first, after=one(asked.query, "after"), older=older)
    return asked.html(page, page.title(), question, tables=[table])


def message(asked: Asked) -> Response:
    """Every field of one message."""
    question = asked.question("id")
    id = one(asked.query, "id", "")
    found = asked.store.found([id]).get(id) if id and "\0" not in id else None
    if found is None or (asked.link is not None and found.key != asked.link.key):
        raise Refused(404, "id", f"{id!r} is no message of this ledger")
    priced(asked.store)
    at = Filter(found.key, found.key is None, since=found.timestamp, until=found.timestamp + timedelta(microseconds=1))
    row = next((row for row in _read(asked.store, at, 10_000) if row.message.id == id), StoredMessage(found))
    record = message_record(row, question.tz)
    usage = record.pop("usage") or {}
    hidden = _hidden_from(question)
    fields = [(name.replace("_", " "), _text(value)) for name, value in record.items() if name not in hidden]
    own: Params = {**question.of_key(found.key), **WHOLE}
    to = {
        "key": question.address("" if asked.link else "key", own),
        "conversation id": found.conversation_id
        and question.address("conversation", own, conversation=found.conversation_id),
    }
    said = [
        # A reason is written for an auditor, not for the customer.
        f"Void since {tables.time_text(each.created, question.tz)}" + ("" if asked.link else f": {each.body['reason']}")
        for each in asked.store.records("void", subject=id)
    ]
    return asked.html(
        "message", f"Message {id}", question, template="message", fields=fields, to=to, said=said,
        usage=[(name.replace("_", " "), _text(value)) for name, value in usage.items()],
    )  # fmt: skip


def _hidden_from(question: Question) -> tuple[str, ...]:
    """Fields that are not for who asks."""
    if question.link is None:
        return ()
    return _OURS if question.costs else (*_OURS, "cost_usd")


def _text(value: Any) -> str | None:
    if value is None or value in ([], {}):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def message_file(asked: Asked) -> tuple[Iterator[str], str]:
    """The CSV of all messages of a question, a part at a time; and the name of the file."""
    question = asked.question()
    priced(asked.store)
    return _message_lines(asked.store, question), "messages.csv"


def _message_lines(store: Store, question: Question) -> Iterator[str]:
    hidden = _hidden_from(question)
    shown = [number for number, name in enumerate(COLUMNS) if name not in hidden]
    lines: list[Sequence[Any]] = [COLUMNS]
    for rows in pages_of(lambda after: store.messages(question.where, after=after, limit=500)):
        lines += [cells_of(row, question.tz) for row in rows]
        text = io.StringIO()
        write_csv(text, ([line[number] for number in shown] for line in lines))
        yield text.getvalue()
        lines = []
