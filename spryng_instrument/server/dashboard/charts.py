"""Where the bars of a chart stand, and what is in them. No colours and no markup: those are the page's.

The page draws them as SVG, not Chart.js on a canvas: each bar is a link to its messages, which a keyboard and a screen
reader reach, and it is there without JavaScript.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10

HEIGHT = 200
"""Units of the highest line."""
SERIES = 6
"""Series that have a colour of their own; what is smaller is added up."""
_LABELS = 4
"""Names below the bars: so many fit on a telephone."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar, which leads to what it adds up."""

    y: float
    height: float
    series: int
    href: str
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One day or month; x and width are percent of the chart."""

    x: float
    width: float
    segments: list[Segment]


@dataclass(frozen=True, slots=True)
class Mark:
    """A name on an axis."""

    at: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True, slots=True)
class Part:
    """What a segment shows."""

    series: int
    value: float
    href: str
    text: str


def bars(columns: Sequence[Sequence[Part]], *, whole: bool = False) -> tuple[list[Bar], float]:
    """Stacked bars, one of each column's parts; and the value of the highest line, a quarter of which is whole, too."""
    top = _round_up(max((sum(part.value for part in parts) for parts in columns), default=0.0), whole)
    step = 100 / max(len(columns), 1)
    width = min(step * 0.72, 8.0)
    found = []
    for number, parts in enumerate(columns):
        y, segments = float(HEIGHT), []
        for part in sorted(parts, key=lambda part: part.series):
            height = part.value / top * HEIGHT
            if height > 0:
                height = max(height, 1.0)
                y -= height
                segments.append(Segment(round(y, 2), round(height, 2), part.series, part.href, part.text))
        found.append(Bar(round(step * number + (step - width) / 2, 3), round(width, 3), segments))
    return found, top


def labels(names: Sequence[str]) -> list[Mark]:
    """Some of the columns' names, evenly apart."""
    step = max(1, -(-len(names) // _LABELS))
    wide = 100 / max(len(names), 1)
    marks = []
    for number in range((len(names) - 1) % step if len(names) > _LABELS else 0, len(names), step):
        at = wide * (number + 0.5)
        anchor = "start" if at < 6 else "end" if at > 94 else "middle"
        marks.append(Mark(0 if anchor == "start" else 100 if anchor == "end" else round(at, 2), names[number], anchor))
    return marks


def ranked(totals: Mapping[str | None, float]) -> dict[str | None, int]:
    """The series of each group, the largest first; those that are too many share the last one."""
    order = sorted(totals, key=lambda group: (-totals[group], group or ""))
    many = len(order) > SERIES + 1
    return {group: min(number, SERIES) if many else number for number, group in enumerate(order)}


def _round_up(value: float, whole: bool) -> float:
    """A round number that is not smaller."""
    if whole:
        unit = 10.0 ** max(floor(log10(max(value, 1) / 4)), 0)
        return next(unit * each for each in range(4, 44, 4) if unit * each >= value)
    if value <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(value))
    return next(unit * each for each in (1, 2, 4, 5, 8, 10) if unit * each >= value * 0.9999)
