"""Plots as inline SVG in the page's colours, without a plotting library.

They are not drawn by matplotlib: the text must stay text (long labels show in full on hover), the colours must follow
the page's light and dark theme, and `verify` and `bench` run where matplotlib is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Cell", "Dot", "Interval", "STYLE", "bars", "curve", "dots", "grid", "intervals", "legend"]

WIDTH = 1000  # user units; the page scales the drawing
_LINE = 26
_LETTER = 7.4  # approximate width of a character
_MOST_LETTERS = 54
_ZERO = 34  # width reserved for zeros beside a logarithmic axis


# CSS rules that the plots need.
STYLE = """
svg text { font-size: 13px; fill: currentColor; } svg .faint { fill: var(--soft); }
svg .rule { stroke: var(--line); stroke-width: 1; } svg .limit { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .cross { stroke: var(--bad); stroke-width: 3; fill: none; stroke-linecap: round; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; font-size: 14px; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
"""


@dataclass(frozen=True)
class Dot:
    """One measured error, at least 0; infinite or NaN if there was no comparison."""

    value: float
    colour: str
    text: str
    good: bool = True


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart, with the text beside it."""

    label: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True)
class Cell:
    """A field of a heat map: its text, its intensity from 0 to 1, and its tooltip."""

    text: str
    share: float
    title: str


@dataclass(frozen=True)
class Interval:
    """A median with its quartiles."""

    label: str
    low: float
    median: float
    high: float
    colour: str
    text: str


def dots(rows: Sequence[tuple[str, Sequence[Dot]]], limits: Sequence[float]) -> str:
    """Plot errors on a logarithmic axis, one row per label, with limits as dashed lines.

    Zeros are drawn left of the axis; infinite and NaN values at the right edge.  Failed values are crosses.  Colours
    are offset vertically, so that equal values of several forms are visible.
    """
    zeros = _ZERO if any(dot.value == 0 for _, row in rows for dot in row) else 0
    left = _margin([label for label, _ in rows]) + zeros
    right = WIDTH - 34
    finite = [dot.value for _, row in rows for dot in row if 0 < dot.value < math.inf]
    low = math.floor(math.log10(min([*finite, min(limits)]))) - (0 if finite else 1)
    high = math.ceil(math.log10(max([*finite, max(limits)])) + 0.3)
    height = _LINE * len(rows)

    def place(value: float) -> float:
        if not value < math.inf:
            return right + 18
        return left + (math.log10(value) - low) / (high - low) * (right - left) if value > 0 else left - zeros + 8

    parts = [f'<svg viewBox="0 0 {WIDTH} {height + 34}" role="img">']
    if zeros:
        parts.append(_text(place(0.0), height + 20, "0", "middle", soft=True))
    for exponent in range(low, high + 1):
        x = place(10.0**exponent)
        parts += [_line(x, 0, x, height), _text(x, height + 20, f"1e{exponent}", "middle", soft=True)]
    for number, (label, row) in enumerate(rows):
        y = _LINE * number + _LINE / 2
        parts += [_line(left - zeros, y, right, y), _label(label, left - zeros - 14, y + 4)]
        order = list(dict.fromkeys(dot.colour for dot in row))
        lanes = {colour: y + 3.2 * (lane - (len(order) - 1) / 2) for lane, colour in enumerate(order)}
        parts += [_mark(place(dot.value), lanes[dot.colour], dot) for dot in row]
    for limit in limits:
        x = place(limit)
        parts.append(f'<line class="limit" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height + 6}"/>')
        parts.append(_text(x + 5, 11, f"limit {limit:g}", "start", soft=True))
    return "".join([*parts, "</svg>"])


def bars(items: Sequence[Bar]) -> str:
    """Plot bars, one row per label."""
    left = _margin([bar.label for bar in items])
    room = WIDTH - left - _LETTER * max(len(bar.text) for bar in items) - 12
    most = max(bar.value for bar in items) or 1
    parts = [f'<svg viewBox="0 0 {WIDTH} {_LINE * len(items)}" role="img">']
    for number, bar in enumerate(items):
        y, length = _LINE * number, max(bar.value / most * room, 1.5)
        parts += [
            _label(bar.label, left - 14, y + _LINE / 2 + 4),
            f'<rect x="{left:.1f}" y="{y + 4}" width="{length:.1f}" height="{_LINE - 8}" rx="3" fill="{bar.colour}"/>',
            _text(left + length + 8, y + _LINE / 2 + 4, bar.text, "start"),
        ]
    return "".join([*parts, "</svg>"])


def intervals(items: Sequence[tuple[str, Sequence[Interval]]], *, mark: float) -> str:
    """Plot positive medians with quartiles on a logarithmic axis, in groups with a heading; dashed line at `mark`."""
    every = [item for _, group in items for item in group]
    words = _LETTER * max(len(item.text) for item in every) + 16
    left, right = _margin([item.label for item in every]), WIDTH - words
    low = math.log(min(mark, *(item.low for item in every)) / 1.04)
    high = math.log(max(mark, *(item.high for item in every)) * 1.04)
    height = _LINE * (len(every) + len(items))

    def place(value: float) -> float:
        return left + (math.log(value) - low) / (high - low) * (right - left)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height + 30}" role="img">']
    for tick in _ticks(math.exp(low), math.exp(high)):
        x = place(tick)
        parts += [_line(x, 0, x, height), _text(x, height + 20, f"{tick:g}", "middle", soft=True)]
    parts.append(f'<line class="limit" x1="{place(mark):.1f}" y1="0" x2="{place(mark):.1f}" y2="{height + 4}"/>')
    y = 0.0
    for heading, group in items:
        parts.append(_text(0, y + _LINE / 2 + 6, heading, "start", soft=True))
        y += _LINE
        for item in group:
            middle = y + _LINE / 2
            ends = f'x1="{place(item.low):.1f}" y1="{middle}" x2="{place(item.high):.1f}" y2="{middle}"'
            parts += [
                _label(item.label, left - 14, middle + 4),
                f'<line {ends} stroke="{item.colour}" stroke-width="5" stroke-opacity="0.35" stroke-linecap="round"/>',
                _mark(place(item.median), middle, Dot(item.median, item.colour, item.text)),
                _text(right + 16, middle + 4, item.text, "start"),
            ]
            y += _LINE
    return "".join([*parts, "</svg>"])


def curve(points: Sequence[tuple[float, Interval]], unit: str) -> str:
    """Plot medians with quartiles over a logarithmic horizontal axis; the vertical axis is linear and includes 0."""
    left, right, top, bottom = 70, WIDTH - 40, 26, 230
    low = min(0.0, *(item.low for _, item in points))
    high = max(*(item.high for _, item in points), low + 1e-9)
    first, last = math.log(points[0][0]), math.log(points[-1][0])

    def across(value: float) -> float:
        return left + 30 + (math.log(value) - first) / ((last - first) or 1.0) * (right - left - 60)

    def up(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + 36}" role="img">', _text(0, 12, unit, "start", soft=True)]
    step = _step(high - low)
    for count in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = up(count * step)
        parts += [_line(left, y, right, y), _text(left - 10, y + 4, f"{count * step:g}", "end", soft=True)]
    path = "M" + "L".join(f"{across(value):.1f} {up(item.median):.1f}" for value, item in points)
    parts.append(f'<path d="{path}" fill="none" stroke="{points[0][1].colour}" stroke-width="2"/>')
    for value, item in points:
        x = across(value)
        ends = f'x1="{x:.1f}" y1="{up(item.low):.1f}" x2="{x:.1f}" y2="{up(item.high):.1f}"'
        parts += [
            f'<line {ends} stroke="{item.colour}" stroke-width="5" stroke-opacity="0.35" stroke-linecap="round"/>',
            _mark(x, up(item.median), Dot(item.median, item.colour, item.text)),
            _text(x, bottom + 24, item.label, "middle", soft=True),
        ]
    return "".join([*parts, "</svg>"])


def grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell | None]]], colour: str) -> str:
    """Plot a heat map, one row per label."""
    left = _margin([label for label, _ in rows])
    width = min((WIDTH - left) / max(len(columns), 1), 170)
    letters = max(int(width / _LETTER) - 1, 3)
    parts = [f'<svg viewBox="0 0 {WIDTH} {_LINE * (len(rows) + 1)}" role="img">']
    for place, name in enumerate(columns):
        parts.append(_text(left + (place + 0.5) * width, 16, _cut(name, letters), "middle", soft=True, title=name))
    for number, (label, row) in enumerate(rows):
        y = _LINE * (number + 1)
        parts.append(_label(label, left - 14, y + _LINE / 2 + 4))
        for place, cell in enumerate(row):
            parts += _field(left + place * width, y, width, cell, letters, colour)
    return "".join([*parts, "</svg>"])


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Render names with their colours as HTML."""
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<p class="legend">{items}</p>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for tick labels."""
    steps = (1, 1.25, 1.5, 2, 3, 5, 7.5) if high / low < 12 else (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def _step(length: float) -> float:
    """A round number, about a fifth of a length."""
    power = 10.0 ** math.floor(math.log10(length / 5))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= length / 5)


def _field(x: float, y: float, width: float, cell: Cell | None, letters: int, colour: str) -> Iterator[str]:
    box = f'x="{x + 1.5:.1f}" y="{y + 1.5:.1f}" width="{width - 3:.1f}" height="{_LINE - 3}" rx="4"'
    if cell is None:
        yield f'<rect {box} fill="none" stroke="var(--line)"/>'
        return
    opacity = 0.12 + 0.6 * min(max(cell.share, 0.0), 1.0) ** 0.5
    yield f'<rect {box} fill="{colour}" fill-opacity="{opacity:.3f}"><title>{escape(cell.title)}</title></rect>'
    yield _text(x + width / 2, y + _LINE / 2 + 4.5, _cut(cell.text, letters), "middle", title=cell.title)


def _mark(x: float, y: float, dot: Dot) -> str:
    title = f"<title>{escape(dot.text)}</title>"
    if dot.good:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{dot.colour}" fill-opacity="0.85">{title}</circle>'
    ends = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
    return f'<path class="cross" d="{ends}">{title}</path>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(label: str, x: float, y: float) -> str:
    return _text(x, y, _cut(label, _MOST_LETTERS), "end", title=label)


def _text(x: float, y: float, text: str, anchor: str, *, soft: bool = False, title: str = "") -> str:
    style = ' class="faint"' if soft else ""
    hint = f"<title>{escape(title)}</title>" if title and title != text else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{hint}</text>'


def _margin(labels: Sequence[str]) -> float:
    return 24 + _LETTER * min(max((len(label) for label in labels), default=0), _MOST_LETTERS)


def _cut(text: str, letters: int) -> str:
    """Shorten a text in the middle: both ends of a weight's name are needed to identify it."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"
