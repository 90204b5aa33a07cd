"""Tables for people: whatever the width and the script, nothing is cut off and nothing is out of line."""

from __future__ import annotations

import csv
import io
from collections import Counter
from decimal import Decimal
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from spryng_instrument.tables import NARROWEST, Column, Table, bar, cells, printable, sparkline, write_csv

COLUMNS = (
    Column("key", fold=True),
    Column("messages", True, 1),
    Column("conversation", leave_out=3, fold=True),
    Column("output", True, 2),
    Column("cost USD", True),
)
names = st.text(st.sampled_from("aé日本ｱ한Я-_😀 \t\x1b"), min_size=1, max_size=60)
figures = st.integers(0, 10**15).map("{:,}".format)
tables = st.lists(st.tuples(names, figures, names, figures, figures), min_size=1, max_size=5)


@given(tables, st.integers(20, 120))
def test_nothing_is_cut_off(rows: list[tuple[str, ...]], available: int) -> None:
    """At any width every cell of a column that is shown is there in full, and columns go by their importance."""
    lines, left_out = Table(COLUMNS, rows).fitting(available)
    shown = [column for column in COLUMNS if column.title not in left_out]

    assert [column.title for column in COLUMNS if column.leave_out > 3 - len(left_out)] == left_out
    for row, line in zip(rows, lines[1:], strict=True):
        text = "".join(line)
        for column, cell in zip(COLUMNS, row, strict=True):
            if column in shown:
                assert column.fold or cell in text
                assert not Counter(printable(cell)) - Counter(text + " " * len(cell))


@given(st.lists(names, min_size=1, max_size=4), st.integers(NARROWEST, 60))
def test_a_folded_text_is_whole(keys: list[str], available: int) -> None:
    """The parts of a folded text, put together, are the text; no line is wider than the terminal."""
    lines, _ = Table([Column("key", fold=True)], [[key] for key in keys]).fitting(available)

    for key, line in zip(keys, lines[1:], strict=True):
        assert "".join(line).replace(" ", "") == printable(key).replace(" ", "")
        assert all(cells(part) <= available for part in line)


@given(tables)
def test_columns_are_in_line(rows: list[tuple[str, ...]]) -> None:
    """The last cell of every line ends in the same column of the terminal, whatever script is before it."""
    lines, _ = Table(COLUMNS, rows, ("total", "1", "", "2", "3")).fitting()

    assert len({cells(line) for [line] in lines}) == 1


@given(st.text(st.sampled_from("aé日本ｱ한Я\u0301😀-")))
def test_cells(text: str) -> None:
    """A text takes as many cells as terminals give it; rich, which knows them well, says the same."""
    assert cells(text) == cell_len(text)


def test_control_characters_are_shown() -> None:
    """Nothing in a cell can rewrite the terminal."""
    assert "\x1b" not in Table([Column("key")], [["\x1b[2J"]]).text()


class Seen(HTMLParser):
    """What a browser would see of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name in ("scope", "style")
            assert "color" not in (value or "")
            assert "background" not in (value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(st.text(st.sampled_from("<>&\"'a日/ script="), min_size=1))
def test_html_is_escaped_and_accessible(name: str) -> None:
    """A customer's key is text, whatever it looks like; headers name their column or row; no colour is fixed."""
    table = Table([Column("key"), Column("messages", True)], [[name, "1"]], ["total", "1"])

    seen = Seen(table.html(f"Usage of {name}", [name]))

    assert set(seen.tags) == {"table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "b", "p", "small"}
    assert seen.texts.count(name) == 2
    assert f"Usage of {name}" in seen.texts
    assert '<th scope="col"' in table.html("")
    assert '<th scope="row"' in table.html("")


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40))
def test_a_sparkline_shows_each_count(counts: list[int]) -> None:
    """A block each; the largest is the highest, and only nothing is blank."""
    line = sparkline(counts)

    assert len(line) == len(counts)
    for count, block in zip(counts, line, strict=True):
        assert (block == " ") is (count == 0)
        assert (block == "█") is (count > max(counts) * 7 // 8 and count > 0)
    assert [line[index] for index in sorted(range(len(counts)), key=counts.__getitem__)] == sorted(line)


@given(st.decimals(0, 100, places=6), st.decimals(0, 100, places=6), st.integers(1, 40))
def test_a_bar_is_in_proportion(one: Decimal, other: Decimal, width: int) -> None:
    """To an eighth of a cell; only nothing is blank."""
    amount, largest = sorted((one, other))
    drawn = bar(amount, largest, width)

    assert len(drawn) <= width
    assert (drawn == "") is (amount == 0)
    assert largest == 0 or bar(largest, largest, width) == "█" * width


@given(st.lists(st.lists(st.text(st.sampled_from("a,\"\r\n\t '=日")), min_size=2, max_size=3), max_size=4))
def test_csv_comes_back(lines: list[list[str]]) -> None:
    """Line ends of every kind within a cell are a part of the cell."""
    text = io.StringIO(newline="")
    write_csv(text, lines)

    assert list(csv.reader(io.StringIO(text.getvalue(), newline=""), strict=True)) == lines


@pytest.mark.parametrize("total", [None, ["total", "3"]])
def test_text(total: list[str] | None) -> None:
    """As plain lines, where there is no terminal."""
    lines = Table([Column("key"), Column("messages", True)], [["東京", "1"]], total).text().splitlines()

    assert lines[:2] == ["key   messages", "東京         1"] if total is None else lines[-1] == "total         3"
