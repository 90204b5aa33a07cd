"""What is on a page, before it is HTML: figures, tables, charts and notices. Text only, which the templates escape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal

from spryng_instrument.periods import period_of
from spryng_instrument.reports import UsageReport, label
from spryng_instrument.server.dashboard import charts
from spryng_instrument.server.dashboard.question import WHOLE, Question
from spryng_instrument.store.base import Conversation, StoredMessage, UsageRow
from spryng_instrument.tables import decimals_for, many, money

COLUMNS = {
    "cost_usd": "Cost USD",
    "messages": "Messages",
    "conversations": "Conversations",
    "input_tokens": "Input",
    "cached_tokens": "Cached",
    "output_tokens": "Output",
    "errors": "Errors",
}
"""The figures of a row of usage; what matters most is seen on a telephone, too."""
SHOWN = {"cost_usd": "Cost", "messages": "Messages", "conversations": "Conversations", "tokens": "Tokens"}
"""What a chart can show."""
ROWS = 50
"""Rows of a table that goes on elsewhere."""
LONG = 28
"""Characters that have room on one line of a table."""
_WHOLE = 120
"""Bars that are shown although they are empty."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, and where it leads."""

    text: str
    href: str | None = None
    number: bool = False
    again: bool = False
    """Whether the cell before leads there, too: then the keyboard passes it by."""
    share: float | None = None
    """Percent of the whole, drawn as a bar."""

    @property
    def long(self) -> bool:
        """Whether it may be broken over lines, or shortened, to fit."""
        return len(self.text) > LONG


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column."""

    title: str
    number: bool = False
    href: str | None = None
    """Where the rows are ordered by it."""
    sorted: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows, their total, and where there is more."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] | None = None
    csv: str | None = None
    note: str | None = None
    links: Sequence[tuple[str, str]] = ()
    """To more of it: names and addresses."""
    empty: str = "Nothing here."


@dataclass(frozen=True, slots=True)
class Chart:
    """Stacked bars, and the same as a table."""

    title: str
    bars: Sequence[charts.Bar]
    lines: Sequence[charts.Mark]
    names: Sequence[charts.Mark]
    legend: Sequence[tuple[int, Cell]]
    shows: Sequence[tuple[str, str, bool]]
    """What else it can show: a name, an address, and whether it is shown."""
    table: Table
    note: str | None = None
    height: int = field(default=charts.HEIGHT)


def heads(names: Iterable[str], numbers: Iterable[str] = ()) -> list[Column]:
    """The heads of columns of text, and then of numbers."""
    return [*(Column(name) for name in names), *(Column(name, number=True) for name in numbers)]


def figures(question: Question) -> list[str]:
    """The figures that the viewer may see."""
    return [name for name in COLUMNS if name != "cost_usd" or question.costs]


def counts(row: UsageRow, question: Question, href: str | None, decimals: int) -> list[Cell]:
    """The figures of a row; each leads to its messages."""
    cells = []
    for number, name in enumerate(figures(question)):
        value = getattr(row, name)
        text = money(value, row.unpriced, decimals) if name == "cost_usd" else f"{value:,}"
        cells.append(Cell(text, href, number=True, again=number > 0))
    return cells


def value_of(row: UsageRow, name: str) -> Decimal:
    """A figure to order and draw by; tokens are input and output."""
    if name == "tokens":
        return Decimal(row.input_tokens + row.output_tokens)
    return Decimal(getattr(row, name) or 0)


def usage_rows(by: str, rows: Sequence[UsageRow], question: Question, largest: Decimal | None) -> list[list[Cell]]:
    """Rows of usage by key, tag or model: the name leads to what is behind it, figures to the messages."""
    decimals = decimals_for(largest)
    drawn = "cost_usd" if question.costs and largest else "messages"
    most = max((value_of(row, drawn) for row in rows), default=Decimal(0)) or Decimal(1)
    lines = []
    for row in rows:
        changes = changes_of(by, row.group, question)
        page = "key" if by == "key" else ""
        lines.append(
            [
                Cell(label(by, row.group), question.address(page, changes) if changes else None),
                *counts(row, question, question.address("messages", changes) if changes else None, decimals),
                Cell("", share=float(value_of(row, drawn) / most * 100)),
            ]
        )
    return lines


def changes_of(by: str, group: str | None, question: Question) -> dict[str, str | Sequence[str] | None]:
    """The changes that ask for one group. None, for those that have no name of a filter: nothing."""
    if by == "key":
        return {**question.of_key(group)}
    if group is None:
        return {}
    if by == "tag":
        return {"tag": list(dict.fromkeys([*question.where.tags, group]))}
    return {by: group}


def total_cells(total: UsageRow, question: Question, *, before: int = 1, after: int = 1) -> list[Cell]:
    """The line below a table of usage."""
    sums = counts(total, question, question.address("messages"), decimals_for(total.cost_usd))
    return [Cell("Total"), *[Cell("")] * (before - 1), *sums, *[Cell("")] * after]


def usage_heads(
    what: str, question: Question, sort: str | None = None, page: str = "", q: str | None = None
) -> list[Column]:
    """The heads of a table of usage; with *sort*, each orders the rows."""
    columns = [Column(what, href=sort and question.address(page, sort="name", q=q), sorted=sort == "name")]
    for name in figures(question):
        href = sort and question.address(page, sort=name, q=q)
        columns.append(Column(COLUMNS[name], number=True, href=href, sorted=sort == name))
    return [*columns, Column("Share")]


def stats(total: UsageRow, question: Question) -> list[tuple[str, str, str, str]]:
    """A name, a figure, what is to be said of it, and where it leads."""
    to = question.address("messages")
    cached = f"{total.cached_tokens / total.input_tokens:.0%} cached" if total.input_tokens else ""
    failed = [many(total.errors, "error")] if total.errors else []
    failed += [f"{total.cancelled:,} cancelled"] if total.cancelled else []
    found = [
        ("Messages", f"{total.messages:,}", ", ".join(failed), to),
        ("Conversations", f"{total.conversations:,}", "", question.address("conversations")),
        ("Input tokens", f"{total.input_tokens:,}", cached, to),
        ("Output tokens", f"{total.output_tokens:,}",
         f"{total.reasoning_tokens:,} reasoning" if total.reasoning_tokens else "", to),
    ]  # fmt: skip
    if question.costs:
        cost = money(total.cost_usd, 0, decimals_for(total.cost_usd)) if total.cost_usd is not None else "-"
        said = "at least: some have no price" if total.unpriced else ""
        found.insert(0, ("Cost USD", cost, said, to))
    return found


def without_price(report: UsageReport, question: Question, by: str = "") -> list[tuple[str, str, str]]:
    """What is to be said of messages without a price, and where more is known of it; nothing where all have one."""
    if not report.cost_is_at_least or not question.costs:
        return []
    models = ", ".join(report.unpriced_models[:5]) + (" and others" if len(report.unpriced_models) > 5 else "")
    text = f"{many(report.total.unpriced, 'message')} have no known price ({models}): costs are at least what is shown."
    text += f" ({report.rated.reason})" if report.rated.reason else ""
    return [
        (text, *(("Health", question.address("health")) if by == "model" else ("Models", question.address("models"))))
    ]


def conversation_table(rows: Sequence[Conversation], question: Question, *, with_key: bool, title: str) -> Table:
    """Conversations; the name leads to the whole of one, figures to the messages of the period."""
    decimals = decimals_for(max((row.usage.cost_usd or Decimal(0) for row in rows), default=None))
    lines = []
    for row in rows:
        own = {**question.of_key(row.usage.key), "conversation": row.usage.group}
        whole = question.address("conversation", own, WHOLE)
        key = [Cell(label("key", row.usage.key), question.address("key", question.of_key(row.usage.key)))]
        lines.append(
            [
                Cell(time_text(row.first, question.tz), whole),
                *(key if with_key else []),
                Cell(str(row.usage.group), whole, again=True),
                *counts(row.usage, question, question.address("messages", own), decimals),
            ]
        )
    names = ["Began", *(["Key"] if with_key else []), "Conversation"]
    numbers = [COLUMNS[name] for name in figures(question)]
    csv = question.address("usage.csv", by="conversation")
    return Table(title, heads(names, numbers), lines, csv=csv, empty="No conversations in this period.")


def message_table(rows: Sequence[StoredMessage], question: Question, *, with_key: bool, title: str) -> Table:
    """Messages; the time leads to the whole of one."""
    decimals = decimals_for(max((row.cost_usd or Decimal(0) for row in rows), default=None))
    lines = []
    for row in rows:
        message = row.message
        one = question.address("message", id=message.id)
        own = question.of_key(message.key)
        conversation = message.conversation_id and question.address(
            "conversation", own, WHOLE, conversation=message.conversation_id
        )
        lines.append(
            [
                Cell(time_text(message.timestamp, question.tz), one),
                *([Cell(label("key", message.key), question.address("key", own))] if with_key else []),
                Cell(message.conversation_id or "-", conversation or None),
                Cell(label("model", message.model), one, again=True),
                Cell(message.status),
                *(Cell(text, one, number=True, again=True) for text in numbers_of(row, question, decimals)),
            ]
        )
    names = ["Time", *(["Key"] if with_key else []), "Conversation", "Model", "Status"]
    return Table(
        title, heads(names, message_numbers(question)), lines,
        csv=question.address("messages.csv"), empty="No messages in this period.",
    )  # fmt: skip


def message_numbers(question: Question) -> list[str]:
    """The names of the figures of a message that the viewer may see."""
    return [*(["Cost USD"] if question.costs else []), "Input", "Cached", "Output", "Latency"]


def numbers_of(row: StoredMessage, question: Question, decimals: int) -> list[str]:
    """The figures of a message, "-" for what was not reported."""
    usage = row.message.usage
    found = [getattr(usage, name, None) for name in ("input_tokens", "cached_tokens", "output_tokens")]
    latency = row.message.latency_ms
    texts = ["-" if count is None else f"{count:,}" for count in found]
    texts.append("-" if latency is None else f"{latency:,.0f} ms" if latency < 10_000 else f"{latency / 1000:,.1f} s")
    unknown = usage is not None and row.cost_usd is None
    return [money(row.cost_usd, unknown, decimals), *texts] if question.costs else texts


def time_text(moment: datetime, tz: tzinfo) -> str:
    """A time in the page's zone."""
    return f"{moment.astimezone(tz):%Y-%m-%d %H:%M:%S}"


def window_of(question: Question, now: datetime) -> str:
    """What a bar is: a day, where not too many are asked for."""
    since = question.where.since
    if since is None or (question.where.until or now) - since > timedelta(days=93):
        return "month"
    return "day"


def chart(report: UsageReport, question: Question, page: str, show: str, now: datetime) -> Chart:
    """A report by model and day or month, as stacked bars."""
    window = report.window or "day"
    windows = _windows(report, question, now)
    totals = {group: Decimal(0) for group in dict.fromkeys(row.group for row in report.rows)}
    for row in report.rows:
        totals[row.group] += value_of(row, show)
    series = charts.ranked({group: float(total) for group, total in totals.items()})
    largest = max(totals.values(), default=None)

    def text_of(value: Decimal, unpriced: int = 0) -> str:
        return money(value, unpriced, decimals_for(largest)) if show == "cost_usd" else f"{value:,.0f}"

    parts: dict[str, list[charts.Part]] = {name: [] for name, _, _ in windows}
    cells: dict[tuple[str, str | None], Cell] = {}
    span = {name: question.within(start, stop) for name, start, stop in windows}
    for name, row in zip(report.windows, report.rows, strict=True):
        if name not in span:
            continue
        of_model = {"model": row.group} if row.group is not None else {}
        href, value = question.address("messages", span[name], of_model), value_of(row, show)
        shown = f"{name}, {label('model', row.group)}: {text_of(value, row.unpriced)}"
        parts[name].append(charts.Part(series[row.group], float(value), href, shown))
        known = show != "cost_usd" or row.cost_usd is not None
        cells[name, row.group] = Cell(text_of(value, row.unpriced) if known else "unknown", href, number=True)
    bars, top = charts.bars(list(parts.values()), whole=show != "cost_usd")
    groups = sorted(totals, key=lambda group: (series[group], group or ""))
    rows = [
        [
            Cell(name, question.address("messages", span[name])),
            *(cells.get((name, group), Cell("-", number=True)) for group in groups),
        ]
        for name in parts
        if any((name, group) in cells for group in groups)
    ]
    lines = [
        charts.Mark(charts.HEIGHT * (1 - part), _short(top * part) if show != "cost_usd" else f"{top * part:,.6g}")
        for part in (1, 0.75, 0.5, 0.25)
    ]
    names = charts.labels([_name(name, window) for name, _, _ in windows])
    legend = [
        (
            series[group],
            Cell(
                label("model", group) + ("" if totals[group] or show != "cost_usd" else " (no cost)"),
                group and question.address(page, model=group, show=show),
            ),
        )
        for group in groups
    ]
    offered = {name: text for name, text in SHOWN.items() if name != "cost_usd" or question.costs}
    what = "Cost in USD" if show == "cost_usd" else SHOWN[show]
    both = "A conversation with two models is in both." if show == "conversations" and len(groups) > 1 else None
    return Chart(
        f"{what} per {window}, by model", bars, lines, names, legend,
        [(text, question.address(page, show=name), name == show) for name, text in offered.items()],
        Table(
            f"{what} per {window}, by model",
            heads([window.title()], [label("model", group) for group in groups]),
            rows,
            csv=question.address("usage.csv", by="model", window=window),
        ),
        both,
    )  # fmt: skip


def _windows(report: UsageReport, question: Question, now: datetime) -> list[tuple[str, datetime, datetime]]:
    """Every day or month of the question's time, empty ones too unless they are too many."""
    by, tz = report.window or "day", question.tz
    labels = sorted(set(report.windows))
    first = question.where.since or (_start(labels[0], tz) if labels else now)
    stop = question.where.until or max(now, _start(labels[-1], tz) if labels else now)
    windows: list[tuple[str, datetime, datetime]] = []
    while first < stop and len(windows) < 5_000:
        windows.append(period_of(by, first, tz))
        first = windows[-1][2]
    if len(windows) > _WHOLE:
        windows = [each for each in windows if each[0] in set(labels)]
    return windows


def _start(name: str, tz: tzinfo) -> datetime:
    day = date.fromisoformat(name if len(name) == len("2026-11-22") else f"{name}-01")
    return datetime(day.year, day.month, day.day, tzinfo=tz).astimezone(timezone.utc)


def _name(name: str, window: str) -> str:
    return f"{date.fromisoformat(name):%-d %b}" if window == "day" else f"{date.fromisoformat(f'{name}-01'):%b %Y}"


def _short(value: float) -> str:
    """1,200 or 1.2 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= unit:
            unit = 1e3 if name == " k" else unit
            return f"{value / unit:,.4g}{name}"
    return f"{value:,.4g}"


def going_on(
    table: Table, question: Question, page: str, first: str, *, after: str | None, older: str | None, **kept: str | None
) -> Table:
    """A page of a list: it leads back to the *first* one, and to what is *older* than the last of it.

    Args:
        after: where this page starts. None: it is the first.
        kept: what else the addresses have.
    """
    return with_links(
        table,
        (first, question.address(page, **kept) if after else None),
        ("Older", question.address(page, **kept, after=older) if older else None),
    )


def with_links(table: Table, *links: tuple[str, str | None]) -> Table:
    """A table that leads to more, where there is some."""
    return replace(table, links=[(name, href) for name, href in links if href])
