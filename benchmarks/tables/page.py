"""Measured tables as one HTML page that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import cycle

from benchmarks.tables.report import Measured, shown
from benchmarks.tables.table import Table
from tpeft_deploy.html import plots
from tpeft_deploy.html.page import FORM_COLOURS, document
from tpeft_deploy.html.plots import Bar, Interval
from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["render"]

_STYLE = ".behind { margin: 12px 0 0; padding-left: 20px; font-size: 15px; } .wide table { font-size: 14px; }"
_OTHERS = ("#7c3aed", "#d97706", "#db2777", "#2563eb", "#0891b2", "#059669")


def render(tables: Mapping[str, Measured]) -> str:
    """The page as text."""
    body = f"""<h1>Benchmarks</h1>
<p class="soft">Cases take turns in one process; a ratio is the median of the ratios within a round, between its
quartiles. Less than 1 is less time than the reference.</p>
{"".join(_section(own) for own in tables.values())}
<footer>Written by make bench.</footer>"""
    return document("Benchmarks", body, style=plots.STYLE + _STYLE)


def _section(own: Measured) -> str:
    table = own.table
    drawn = _ratios(table) or _bars(table)
    losses = "".join(f"<li><b>{escape(name)}</b>: {escape(reason)}</li>" for name, reason in table.losses.items())
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in table.text.split("\n\n"))
    about = f"{own.date} UTC, {own.options}, {own.took_s:.0f} s. {own.machine.line()}."
    return f"""<section id="{table.name}"><h2>{escape(table.title)}</h2>{text}
{f'<div class="wide">{drawn}</div>' if drawn else ""}
{_figures(table)}
{f'<p class="soft small">Behind:</p><ul class="behind">{losses}</ul>' if losses else ""}
<p class="soft small">{escape(about)}</p></section>"""


def _ratios(table: Table) -> str:
    """Spreads of the columns whose unit is a ratio, in groups of one row; empty if there are none."""
    columns = [column for column in table.columns if "ratio" in column]
    colours = {column: _colour(column, other) for column, other in zip(columns, cycle(_OTHERS), strict=False)}
    groups = []
    for row in table.rows:
        items = [
            Interval(column, own.low, own.median, own.high, colours[column], f"{own.median:.2f}")
            for column in columns
            if isinstance(own := row.figures.get(column), Spread) and own.low > 0
        ]
        if items:
            groups.append((row.name, items))
    return plots.intervals(groups, mark=1.0) if groups else ""


def _bars(table: Table) -> str:
    """Bars of the first column with numbers; empty if there is none, or if its rows have different units."""
    column = table.columns[0]
    values = [(row.name, row.figures.get(column)) for row in table.rows]
    numbers = [(name, own.median if isinstance(own, Spread) else own) for name, own in values]
    if "unit" in table.columns:
        return ""
    items = [
        Bar(name, own, shown(own), _OTHERS[0]) for name, own in numbers if isinstance(own, int | float) and own >= 0
    ]
    return plots.bars(items) if items else ""


def _colour(column: str, other: str) -> str:
    named = {"mixed": FORM_COLOURS["mixed rows"], "adapters": FORM_COLOURS["mixed rows"]} | {
        form: FORM_COLOURS[form] for form in ("folded", "factored", "banked")
    }
    return next((colour for word, colour in named.items() if word in column), other)


def _figures(table: Table) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in ("", *table.columns))
    rows = "".join(
        f"<tr><th>{escape(row.name)}</th>"
        + "".join(f"<td>{escape(shown(row.figures.get(column)))}</td>" for column in table.columns)
        + "</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
