"""What the commands show people: usage, messages, and what is missing in them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import tzinfo
from decimal import Decimal

from spryng_instrument.cli.tables import note, print_table, room
from spryng_instrument.periods import zone_of
from spryng_instrument.reports import WINDOWS, UsageReport, label, trend
from spryng_instrument.store.base import ApiKey, Store, StoredMessage
from spryng_instrument.tables import GAP, Column, bar, money, printable, sparkline

LEAST_PICTURE, MOST_BAR = 16, 40
"""Cells of a column that draws."""
MOST_DAYS = 30
MOST_ROWS, MOST_MESSAGES = 50, 1_000_000
"""What a trend is drawn of: it asks as much again as the report itself did."""


def print_usage(report: UsageReport, store: Store | None = None) -> None:
    """The table for people; where a terminal has room, with a picture of it in the last column."""
    table = report.table()
    picture = _picture(report, store, table.width)
    if picture is None:
        print_table(table.columns, table.rows, table.total)
        return
    title, *cells = picture
    rows = [[*row, cell] for row, cell in zip([*table.rows, table.total or ()], cells, strict=True)]
    print_table([*table.columns, Column(title)], rows[:-1], rows[-1])


def _picture(report: UsageReport, store: Store | None, width: int) -> list[str] | None:
    """A column that draws each row of a report: its title, and a cell for each row and the total."""
    available = room()
    if available is None or not _can_show(sparkline([1, 2, 3, 4, 5, 6, 7, 8]) + bar(Decimal(1), Decimal(8), 1)):
        return None
    left = available - width - len(GAP)
    if report.by in WINDOWS:
        return _bars(report, min(left, MOST_BAR)) if left >= LEAST_PICTURE else None
    if store is None or report.window or len(report.rows) > MOST_ROWS or report.total.messages > MOST_MESSAGES:
        return None
    if left < LEAST_PICTURE:
        return None
    found = trend(store, report.by, report.where, report.zone, min(left, MOST_DAYS))
    if len(found.days) < 2:
        return None
    none = [0] * len(found.days)
    rows = [sparkline(found.counts.get((row.key, row.group), none)) for row in report.rows]
    return [f"{len(found.days)} days to {found.days[-1][5:]}", *rows, sparkline(found.total)]


def _bars(report: UsageReport, width: int) -> list[str]:
    """By cost, where all of it is known; else by messages."""
    by_cost = not report.cost_is_at_least
    amounts = [(row.cost_usd or Decimal(0)) if by_cost else Decimal(row.messages) for row in report.rows]
    largest = max(amounts, default=Decimal(0))
    return ["by cost" if by_cost else "by messages", *(bar(amount, largest, width) for amount in amounts), ""]


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say_gaps(report: UsageReport) -> None:
    """Say, on stderr, what the figures of a report leave out."""
    for sentence in report.notes:
        note(sentence)


def print_messages(rows: Sequence[StoredMessage], zone: str) -> None:
    """The table for people."""
    columns = [
        Column(f"time ({zone})"),
        Column("key", fold=True),
        Column("conversation", leave_out=6),
        Column("tags", leave_out=7),
        Column("model", leave_out=4),
        Column("operation", leave_out=8),
        Column("status"),
        Column("input", True, 3),
        Column("output", True, 2),
        Column("ms", True, 9),
        Column("cost USD", True, 1),
    ]
    tz = zone_of(zone)
    print_table(
        columns,
        [
            [
                f"{row.message.timestamp.astimezone(tz):%Y-%m-%d %H:%M:%S}",
                label("key", row.message.key),
                row.message.conversation_id or "-",
                ", ".join(row.message.tags) or "-",
                row.message.model or "(unknown)",
                row.message.operation,
                _status(row),
                *_tokens(row),
                "-" if row.message.latency_ms is None else f"{row.message.latency_ms:,.0f}",
                _cost(row),
            ]
            for row in rows
        ],
    )


def print_keys(keys: Sequence[ApiKey]) -> None:
    """The table for people."""
    columns = [Column("id"), Column("name", fold=True), Column("scopes"), Column("created"), Column("revoked")]
    print_table(columns, [[text or "-" for text in key_record(key).values()] for key in keys])


def key_record(key: ApiKey) -> dict[str, str | None]:
    """A key as JSON has it, in the order of the table."""
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(key.scopes),
        "created": f"{key.created:%Y-%m-%d %H:%M}",
        "revoked": None if key.revoked is None else f"{key.revoked:%Y-%m-%d %H:%M}",
    }


def message_line(row: StoredMessage, zone: tzinfo) -> str:
    """A message in one line."""
    message = row.message
    tokens = "{} in, {} out".format(*_tokens(row))
    return printable(
        f"{message.timestamp.astimezone(zone):%Y-%m-%d %H:%M:%S}  {label('key', message.key):<16}  "
        f"{message.model or '(unknown)':<24}  {_status(row):<10}  {tokens:<20}  {_cost(row)} USD"
    )


def _status(row: StoredMessage) -> str:
    message = row.message
    if message.status != "error":
        return message.status
    return f"error {message.http_status}" if message.http_status else f"error {message.error or ''}".rstrip()


def _tokens(row: StoredMessage) -> tuple[str, str]:
    usage = row.message.usage
    counts = (None, None) if usage is None else (usage.input_tokens, usage.output_tokens)
    return tuple("-" if count is None else f"{count:,}" for count in counts)  # type: ignore[return-value]


def _cost(row: StoredMessage) -> str:
    return money(row.cost_usd, row.cost_usd is None and row.message.usage is not None, 6)
