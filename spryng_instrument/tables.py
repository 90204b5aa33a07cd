"""Tables: of texts for people, on terminals and in notebooks; and as CSV.

Invariant: nothing is cut off. What does not fit is left out by whole columns, or broken over lines.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from html import escape
from typing import Any, NamedTuple, TextIO

GAP = "  "
NARROWEST, FOLDED = 8, 24
"""Cells that a column keeps when its text is folded: where nothing else helps, and before another is left out."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉█"


class Column(NamedTuple):
    """A column of a table for people."""

    title: str
    number: bool = False
    """Right-aligned."""
    leave_out: int = 0
    """On a narrow terminal, the highest goes first; 0 stays."""
    fold: bool = False
    """Where that is not enough, this text is broken over lines."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table for people, of texts."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] | None = None

    @property
    def width(self) -> int:
        """Cells that a line takes with every column at its natural width."""
        return _width(self._widths(self._lines()), range(len(self.columns)))

    def fitting(self, available: int | None = None) -> tuple[list[list[str]], list[str]]:
        """The header, the rows and the total, each over as many lines as it needs; and the titles of what is left out.

        Args:
            available: cells that a line may take. None: as many as it needs.
        """
        lines = self._lines()
        widths = self._widths(lines)
        shown = list(range(len(self.columns)))
        if available is not None:
            shown = _fitting(self.columns, widths, available)
            _fold(self.columns, widths, shown, available)
        left_out = [column.title for index, column in enumerate(self.columns) if index not in shown]
        return [list(_folded(self.columns, line, widths, shown)) for line in lines], left_out

    def text(self) -> str:
        """The table as plain lines, at its natural width."""
        return "\n".join(line for lines in self.fitting()[0] for line in lines)

    def html(self, caption: str, notes: Iterable[str] = ()) -> str:
        """The table as HTML, for light and dark pages: it has no colours of its own."""
        head = "".join(f'<th scope="col"{_align(column)}>{escape(column.title)}</th>' for column in self.columns)
        body = "\n".join(f"<tr>{self._html_cells(row)}</tr>" for row in self.rows)
        foot = "" if self.total is None else f"<tfoot><tr>{self._html_cells(self.total, 'b')}</tr></tfoot>"
        below = "".join(f"<p><small>{escape(note)}</small></p>" for note in notes)
        return (
            f'<table>\n<caption style="text-align:left">{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody>\n{foot}</table>\n{below}"
        )

    def _html_cells(self, row: Sequence[str], wrap: str = "") -> str:
        cells = []
        for index, (column, text) in enumerate(zip(self.columns, row, strict=True)):
            tag, scope = ("td", "") if index else ("th", ' scope="row"')
            inner = escape(printable(text))
            cells.append(f"<{tag}{scope}{_align(column)}>{f'<{wrap}>{inner}</{wrap}>' if wrap else inner}</{tag}>")
        return "".join(cells)

    def _lines(self) -> list[list[str]]:
        rows = [[printable(cell) for cell in row] for row in self.rows]
        return [[column.title for column in self.columns], *rows, *([list(self.total)] if self.total else [])]

    def _widths(self, lines: Sequence[Sequence[str]]) -> list[int]:
        return [max(cells(line[index]) for line in lines) for index in range(len(self.columns))]


def cells(text: str) -> int:
    """How many cells of a terminal a printable text takes."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def printable(text: str) -> str:
    """Text without control characters, which could rewrite the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


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


def void_text(count: int) -> str:
    """What is said of figures that have so many void messages in them."""
    return f"{many(count, 'message')} of these {'is' if count == 1 else 'are'} void: used, and not billed."


def decimals_for(largest: Decimal | None) -> int:
    """Decimal places that suit costs up to *largest*."""
    if largest is None or largest < 1:
        return 6
    return 4 if largest < 100 else 2


def write_csv(file: TextIO, lines: Iterable[Sequence[Any]]) -> None:
    """Write CSV: a line feed ends a line, and a cell with any kind of line end in it is quoted."""
    csv.writer(_LineFeeds(file), lineterminator="\r\n").writerows(lines)


class _LineFeeds:
    """Python's csv quotes a carriage return only where lines end with one; unquoted, it would end the row."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(f"{line[:-2]}\n")


def sparkline(counts: Sequence[int]) -> str:
    """A block for each count, as high as it is beside the largest. Only nothing is blank."""
    largest = max(counts, default=0)
    return "".join(_BLOCKS[-(-count * 8 // largest) if largest else 0] for count in counts)


def bar(amount: Decimal, largest: Decimal, width: int) -> str:
    """A bar as long, of *width* cells, as *amount* is beside *largest*. Only nothing is blank."""
    if not largest:
        return ""
    full, eighths = divmod(max(int(amount * width * 8 / largest), 1 if amount else 0), 8)
    return _PARTS[8] * full + (_PARTS[eighths] if eighths else "")


def _cells_of(char: str) -> int:
    if unicodedata.east_asian_width(char) in "WF":
        return 2
    return 0 if unicodedata.category(char) in ("Mn", "Me") else 1


def _align(column: Column) -> str:
    number = "text-align:right;white-space:nowrap;padding:0 .5em;font-variant-numeric:tabular-nums"
    style = number if column.number else "text-align:left"
    return f' style="{style}"'


def _width(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[index] for index in shown) + len(GAP) * (len(shown) - 1)


def _fitting(columns: Sequence[Column], widths: Sequence[int], available: int) -> list[int]:
    """The columns that fit, the most important first; those that stay, whether they fit or not."""
    folded = [min(width, FOLDED) if column.fold else width for column, width in zip(columns, widths, strict=True)]
    shown: list[int] = []
    for index in sorted(range(len(columns)), key=lambda index: columns[index].leave_out):
        if columns[index].leave_out and _width(folded, [*shown, index]) > available:
            break
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


def _folded(
    columns: Sequence[Column], line: Sequence[str], widths: Sequence[int], shown: Sequence[int]
) -> Iterable[str]:
    """A row, over as many lines as its longest folded cell needs."""
    parts = [_chopped(line[index], widths[index]) for index in shown]
    for number in range(max(map(len, parts))):
        found = []
        for index, chopped in zip(shown, parts, strict=True):
            text = chopped[number] if number < len(chopped) else ""
            blank = " " * (widths[index] - cells(text))
            found.append(blank + text if columns[index].number else text + blank)
        yield GAP.join(found).rstrip()


def _chopped(text: str, width: int) -> list[str]:
    """Parts of a text, of *width* cells each at most."""
    if cells(text) <= width:
        return [text]
    parts, size = [""], 0
    for char in text:
        wide = _cells_of(char)
        if size + wide > width and parts[-1]:
            parts.append("")
            size = 0
        parts[-1] += char
        size += wide
    return parts
