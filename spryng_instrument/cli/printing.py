"""What the commands show people: usage, messages, and what is missing in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import tzinfo
from typing import Any

from spryng_instrument.cli.tables import Column, decimals_for, many, money, note, print_csv, print_table, printable
from spryng_instrument.message import Message, Usage
from spryng_instrument.reports import UsageReport, label
from spryng_instrument.store.base import ApiKey, StoredMessage, zone_of


def print_usage(report: UsageReport) -> None:
    """The table for people."""
    period_zone = f" ({report.zone})" if report.by in ("day", "month") else ""
    columns = [
        *([Column(f"{report.window} ({report.zone})")] if report.window else []),
        *([Column("key", fold=True)] if report.by == "conversation" else []),
        Column(f"{report.by}{period_zone}", fold=True),
        Column("messages", True, 1),
        Column("conversations", True, 6),
        Column("errors", True, 5),
        Column("input", True, 3),
        Column("cached", True, 4),
        Column("output", True, 2),
        Column("cost USD", True),
    ]
    names = ("messages", "conversations", "errors", "input_tokens", "cached_tokens", "output_tokens")
    decimals = decimals_for(report.total.cost_usd)
    lines = [
        [
            *report.windows[index : index + 1],
            *([label("key", row.key)] if report.by == "conversation" else []),
            label(report.by, row.group),
            *(f"{getattr(row, name):,}" for name in names),
            money(row.cost_usd, row.unpriced, decimals),
        ]
        for index, row in enumerate([*report.rows, report.total])
    ]
    labels = len(columns) - len(names) - 1
    lines[-1][: labels - bool(report.window)] = ["total", *[""] * (labels - 1)]
    print_table(columns, lines[:-1], lines[-1])


def say_gaps(report: UsageReport) -> None:
    """Say, on stderr, what the figures of a report leave out."""
    total = report.total
    if report.by == "tag" and sum(row.messages for row in report.rows) > total.messages:
        note("A message with several tags is in several rows; the total counts it once.")
    if total.unpriced:
        because = f" ({report.rated.reason})" if report.rated.reason else ""
        note(
            f"The cost of {many(total.unpriced, 'message')} is unknown{because}: "
            f"no price for {', '.join(report.unpriced_models)}."
        )
    if total.unreported:
        note(f"{many(total.unreported, 'message')} came without usage: counted, but with no tokens and no cost.")
    if report.by == "key" and any(row.group is None for row in report.rows):
        note("Calls outside any usage_context have no key; `spryng doctor` names their lines of code.")


def print_messages(rows: Sequence[StoredMessage], zone: str) -> None:
    """The table for people."""
    columns = [
        Column(f"time ({zone})"),
        Column("key", fold=True),
        Column("conversation", leave_out=6),
        Column("tags", leave_out=7),
        Column("model", leave_out=3),
        Column("operation", leave_out=8),
        Column("status"),
        Column("input", True, 2),
        Column("output", True, 1),
        Column("ms", True, 9),
        Column("cost USD", True, 4),
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


def print_messages_csv(records: Sequence[dict[str, Any]]) -> None:
    """CSV of `reports.message_record`s: tags and properties as JSON, a column for each count."""
    plain = [name for name in (*Message.__struct_fields__, "cost_usd", "price_version") if name != "usage"]
    counts = Usage.__struct_fields__
    print_csv(
        [*plain, *counts],
        (
            [
                *(
                    json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
                    for value in (record[name] for name in plain)
                ),
                *((record["usage"] or {}).get(name) for name in counts),
            ]
            for record in records
        ),
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
