"""Plots as inline SVG in the page's own colours: nothing to install, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Cell", "Dot", "bars", "dots", "grid", "legend"]

WIDTH = 1000  # units of the drawing; the page scales it
_LINE = 26
_LETTER = 7.4  # units that a letter takes, about
_MOST_LETTERS = 54
_ZERO = 34  # of an axis of errors, for zeros


@dataclass(frozen=True)
class Dot:
    """One measured error: a value of 0 or more, infinite or NaN where nothing could be compared."""

    value: float
    colour: str
    text: str
    good: bool = True


@dataclass(frozen=True)
class Bar:
    """A length with the words beside it."""

    label: str
    value: float
    text: str
    colour: str


@dataclass(frozen=True)
class Cell:
    """A field of a grid: what stands in it, how dark it is from 0 to 1, and what is said on hovering."""

    text: str
    share: float
    title: str


def dots(rows: Sequence[tuple[str, Sequence[Dot]]], limits: Sequence[float]) -> str:
    """Errors on a logarithmic axis, a row a label, with the limits as dashed lines.

    Zeros have a place of their own at the left; what cannot be measured stands at the right edge, as a cross like all
    that failed.  Dots of another colour lie a little lower, so that equal values of several forms can be seen.
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
    """Lengths from zero, a row a label."""
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


def grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell | None]]], colour: str) -> str:
    """Shaded fields, a row a label."""
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
    """Names with their colours, as HTML."""
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<p class="legend">{items}</p>'


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
    """A long name loses its middle: both ends of a weight's name tell it apart."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}…{text[len(text) - (letters - 1 - head) :]}"
