"""Printing: tables for people, CSV and JSON for programs. Data goes to stdout, whatever is said about it to stderr.

Invariant: nothing that is printed is cut off. What does not fit a terminal is left out by whole columns, and said.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import click
from rich.cells import cell_len, chop_cells

GAP = "  "
NARROWEST = 8
"""Cells that a column keeps when its text is folded."""


class Column(NamedTuple):
    """A column of a table for people."""

    title: str
    number: bool = False
    """Right-aligned."""
    leave_out: int = 0
    """On a narrow terminal, the highest goes first; 0 stays."""
    fold: bool = False
    """Where that is not enough, this text is broken over lines."""


def note(text: str) -> None:
    """Say something about the data, on stderr."""
    click.echo(printable(text), err=True)


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None) -> None:
    """Print a table, with all columns at their natural width unless a terminal is narrower."""
    body = [[printable(cell) for cell in row] for row in rows]
    lines = [[column.title for column in columns], *body, *([list(total)] if total else [])]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    shown = list(range(len(columns)))
    if sys.stdout.isatty():
        available = shutil.get_terminal_size().columns
        shown = _fitting(columns, widths, available)
        _fold(columns, widths, shown, available)
    for number, line in enumerate(lines):
        bold = number == 0 or (total is not None and number == len(lines) - 1)
        for part in _lines_of(columns, line, widths, shown):
            click.echo(click.style(part, bold=True) if bold and _colour() else part)
    if left_out := [columns[index].title for index in range(len(columns)) if index not in shown]:
        note(f"left out on this narrow terminal: {', '.join(left_out)}")


def print_csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print CSV: a header, numbers in plain digits, nothing where there is nothing."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def money(cost: Decimal | None, unpriced: int, decimals: int) -> str:
    """A cost for people: "at least" where a part of it is unknown."""
    if cost is None:
        return "unknown" if unpriced else "-"
    unit = Decimal(1).scaleb(-decimals)
    text = f"{cost:,.{decimals}f}" if not 0 < cost < unit else f"<{unit:f}"
    return f"at least {text}" if unpriced else text


def many(count: int, noun: str) -> str:
    """ "1 message", "1,204 messages"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def decimals_for(largest: Decimal | None) -> int:
    """Decimal places that suit costs up to *largest*."""
    if largest is None or largest < 1:
        return 6
    return 4 if largest < 100 else 2


def printable(text: str) -> str:
    """Text without control characters, which could rewrite the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _width(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[index] for index in shown) + len(GAP) * (len(shown) - 1)


def _fitting(columns: Sequence[Column], widths: Sequence[int], available: int) -> list[int]:
    """The columns that fit, the most important first; those that stay, whether they fit or not."""
    by_importance = sorted(range(len(columns)), key=lambda index: columns[index].leave_out)
    shown: list[int] = []
    for index in by_importance:
        if not columns[index].leave_out or _width(widths, [*shown, index]) <= available:
            shown.append(index)
    return sorted(shown)


def _fold(columns: Sequence[Column], widths: list[int], shown: Sequence[int], available: int) -> None:
    """Narrow the columns that may be, the widest first, until the table fits or none can be narrower."""
    texts = [index for index in shown if columns[index].fold]
    while texts and _width(widths, shown) > available:
        widest = max(texts, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1


def _lines_of(
    columns: Sequence[Column], line: Sequence[str], widths: Sequence[int], shown: Sequence[int]
) -> Iterable[str]:
    """A row, over as many lines as its longest folded cell needs."""
    parts = [chop_cells(line[index], widths[index]) or [""] for index in shown]
    for number in range(max(map(len, parts))):
        cells = []
        for index, chopped in zip(shown, parts, strict=True):
            text = chopped[number] if number < len(chopped) else ""
            blank = " " * (widths[index] - cell_len(text))
            cells.append(blank + text if columns[index].number else text + blank)
        yield GAP.join(cells).rstrip()
