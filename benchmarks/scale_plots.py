"""Plots of `benchmarks.scale_simulation` as one SVG file, in the colours of the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

from tpeft_deploy.html import plots
from tpeft_deploy.html.page import COLOURS, FORM_COLOURS
from tpeft_deploy.html.plots import Bar, Cell, Interval

__all__ = ["GOAL", "Played", "render"]

GOAL = 1.25  # imbalance
_OURS, _OTHER, _BEST = FORM_COLOURS["folded"], FORM_COLOURS["mixed rows"], FORM_COLOURS["base"]
_EDGE, _TITLE = 24, 30  # user units around the panels, and above each
_STYLE = """
text { font-family: system-ui, sans-serif; } svg { color: var(--ink); }
svg .title { font-size: 16px; font-weight: 600; }
"""


class Played(Protocol):
    """Figures of one policy: `benchmarks.scale_simulation.Result`."""

    hit_rate: float
    best: float
    imbalance: float
    over_time: list[tuple[float, float]]


def render(results: Mapping[str, Played]) -> str:
    """Return the SVG file as text.

    Args:
        results: figures by policy.
    """
    panels = [
        ("Hit rate, and that of Belady's eviction on the same requests", _hits(results)),
        (f"Rows of the busiest replica over the mean; dashed: the goal, at most {GOAL:g}", _imbalance(results)),
        ("Hit rate over time: each part of the requests, by the second at which it ends", _over_time(results)),
    ]
    body, y = _stacked(panels)
    width, height = plots.WIDTH + 2 * _EDGE, y + _EDGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}">\n'
        "<title>Placement policies, simulated: hit rate, imbalance, hit rate over time</title>\n"
        f"<style>{COLOURS}{plots.STYLE}{_STYLE}</style>\n"
        f'<rect width="{width}" height="{height:g}" rx="10" fill="var(--card)"/>\n'
        f"{body}\n</svg>\n"
    )


def _stacked(panels: Sequence[tuple[str, str]]) -> tuple[str, float]:
    """Return panels below each other, and where the last ends."""
    parts, y = [], float(_EDGE)
    for title, panel in panels:
        height = float(panel.partition('viewBox="')[2].partition('"')[0].split()[3])
        place = f'x="{_EDGE}" y="{y + _TITLE:g}" width="{plots.WIDTH}" height="{height:g}"'
        parts.append(f'<text class="title" x="{_EDGE}" y="{y + 14:g}">{escape(title)}</text>')
        parts.append(panel.replace("<svg ", f"<svg {place} ", 1))
        y += _TITLE + height + _EDGE
    return "\n".join(parts), y - _EDGE


def _colour(number: int) -> str:
    return _OTHER if number else _OURS


def _hits(results: Mapping[str, Played]) -> str:
    items = []
    for number, (name, own) in enumerate(results.items()):
        share = f"{own.hit_rate:.3f}, {own.hit_rate / own.best:.3f} of the best" if own.best else f"{own.hit_rate:.3f}"
        items += [Bar(name, own.hit_rate, share, _colour(number)), Bar("best", own.best, f"{own.best:.3f}", _BEST)]
    return plots.bars(items)


def _imbalance(results: Mapping[str, Played]) -> str:
    items = [
        Interval(name, own.imbalance, own.imbalance, own.imbalance, _colour(number), f"{own.imbalance:.2f}")
        for number, (name, own) in enumerate(results.items())
    ]
    return plots.intervals([("", items)], mark=GOAL)


def _over_time(results: Mapping[str, Played]) -> str:
    columns = [f"{end:.0f} s" for end, _ in next(iter(results.values())).over_time]
    rows = [
        (name, [Cell(f"{rate:.2f}", rate, f"{name}, until {end:.1f} s: {rate:.3f}") for end, rate in own.over_time])
        for name, own in results.items()
    ]
    return plots.grid(columns, rows, _OURS)
