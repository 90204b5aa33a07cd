"""Printing: tables for people, CSV and JSON for programs. Data goes to stdout, whatever is said about it to stderr.

Invariant: nothing that is printed is cut off. What does not fit a terminal is left out by whole columns, and said.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import click

from spryng_instrument.tables import Column, Table, decimals_for, many, money, printable, write_csv

__all__ = [
    "Column",
    "Table",
    "decimals_for",
    "many",
    "money",
    "note",
    "print_csv",
    "print_json",
    "print_table",
    "printable",
    "room",
]


def note(text: str) -> None:
    """Say something about the data, on stderr."""
    click.echo(printable(text), err=True)


def room() -> int | None:
    """Cells of a line on the terminal that stdout is. None: it is none, and takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], total: Sequence[str] | None = None) -> None:
    """Print a table, with all columns at their natural width unless a terminal is narrower."""
    lines, left_out = Table(columns, list(rows), total).fitting(room())
    for number, line in enumerate(lines):
        bold = number == 0 or (total is not None and number == len(lines) - 1)
        for part in line:
            click.echo(click.style(part, bold=True) if bold and _colour() else part)
    if left_out:
        note(f"left out on this narrow terminal: {', '.join(left_out)}")


def print_csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print CSV: a header, numbers in plain digits, nothing where there is nothing."""
    write_csv(sys.stdout, chain([names], rows))


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print one JSON value."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=False))


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
