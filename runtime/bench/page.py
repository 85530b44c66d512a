"""A benchmark as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tpeft_deploy.html import plots
from tpeft_deploy.html.page import FORM_COLOURS, document, tiles
from tpeft_deploy.html.plots import Interval
from tpeft_deploy.runtime.bench.cases import CASES
from tpeft_deploy.runtime.bench.generating import GENERATED
from tpeft_deploy.runtime.bench.results import Benchmark, CaseCost, Spread

__all__ = ["render"]

_COLOURS = {
    "base": FORM_COLOURS["base"],
    "folded": FORM_COLOURS["folded"],
    "factored": FORM_COLOURS["factored"],
    "banked": FORM_COLOURS["banked"],
    "switched": "#7c3aed",
    "mixed": FORM_COLOURS["mixed rows"],
    "singles": "#db2777",
}
_STYLE = """
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 22px; margin: 12px 0 0; font-size: 15px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
td.left, th.left { text-align: left; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
"""


def render(found: Benchmark) -> str:
    """The page as text."""
    body = f"""<h1>{escape(found.bundle)}</h1>
<p class="soft">What serving it costs on {escape(found.provider)} beside plain ONNX Runtime. All cases took turns in one
process; a ratio is the median of the ratios within each round.</p>
{_tiles(found)}
<section><h2>A batch, over a plain run of the base</h2><p class="soft small">Medians and quartiles on a logarithmic
axis; less is faster, the dashed line is base.onnx in a bare session.</p>
<div class="wide">{_ratios(found)}</div>{_legend(found)}</section>
{_generation(found)}
{_switching(found)}
{_cases(found)}
{_about(found)}
<footer>Written by tpeft-deploy bench. Times are this machine's, at that moment; ratios carry further.</footer>"""
    return document(f"{found.bundle}: measured", body, style=plots.STYLE + _STYLE)


def _tiles(found: Benchmark) -> str:
    most = max(cost.rows for cost in found.cases)
    first = found.cases[0].component
    largest = {cost.case: cost for cost in found.cases if (cost.component, cost.rows) == (first, most)}
    shown = {}
    if "banked" in largest:
        shown[f"{largest['banked'].ratio.median:.2f}"] = f"times a plain run, one task for {most} rows"
    if "mixed" in largest:
        mixed, singles = largest["mixed"], largest["singles"]
        shown[f"{mixed.ratio.median:.2f} "] = f"times a plain run, {len(found.tasks)} tasks in {most} rows"
        shown[f"{singles.ms.median / mixed.ms.median:.1f}"] = "times slower, each of those rows alone"
    if found.switching:
        last = found.switching[-1]
        shown[f"{max(last.microseconds.median, 0.0):.0f} µs"] = f"to switch, with {last.adapters} known"
    if found.cold is not None:
        shown[f"{found.cold.load_ms.median:.1f} ms"] = "to load an adapter from disk"
    return tiles(shown)


def _ratios(found: Benchmark) -> str:
    groups = []
    for component, rows in dict.fromkeys((cost.component, cost.rows) for cost in found.cases):
        batch = [cost for cost in found.cases if (cost.component, cost.rows) == (component, rows)]
        own = [cost for cost in batch if cost.case != "plain"]
        items = [
            Interval(cost.case, *_three(cost.ratio), _COLOURS[cost.case], f"{cost.ratio.median:.3f}") for cost in own
        ]
        named = "1 row" if rows == 1 else f"{rows} rows"
        groups.append((f"{component}, {named}" if component else named, items))
    return plots.intervals(groups, mark=1.0)


def _legend(found: Benchmark) -> str:
    shown = dict.fromkeys(cost.case for cost in found.cases if cost.case != "plain")
    return plots.legend([(f"{case}: {CASES[case]}", _COLOURS[case]) for case in shown])


def _generation(found: Benchmark) -> str:
    if not found.generation:
        return ""
    rows = "".join(
        f'<tr><th>{cost.rows}</th><td class="left">{GENERATED[cost.case]}</td><td>{cost.tokens_per_s.median:.0f}</td>'
        f"<td>{cost.tokens_per_s.low:.0f} to {cost.tokens_per_s.high:.0f}</td><td>{cost.repeats}</td></tr>"
        for cost in found.generation
    )
    heads = ["rows", "case", "tokens/s", "quartiles", "rounds"]
    return f"<section><h2>Generation</h2>{_table(heads, rows)}</section>"


def _switching(found: Benchmark) -> str:
    if not found.switching:
        return ""
    colour = _COLOURS["switched"]
    points = [
        (
            float(own.adapters),
            Interval(f"{own.adapters}", *_three(own.microseconds), colour, f"{own.microseconds.median:.1f} µs"),
        )
        for own in found.switching
    ]
    drawn = plots.curve(points, "microseconds more than a run of the same task again")
    return f"""<section><h2>Switching, by the number of adapters known</h2><p class="soft small">Another task every run
against the same task again, the two taking turns: medians and quartiles of the difference.</p>
<div class="wide">{drawn}</div></section>"""


def _cases(found: Benchmark) -> str:
    rows = "".join(
        f'<tr><th>{_batch(cost)}</th><td class="left">{cost.case}</td><td>{cost.ms.median:.3g}</td>'
        f"<td>{cost.ms.low:.3g} to {cost.ms.high:.3g}</td><td>{cost.ratio.median:.3f}</td>"
        f"<td>{cost.ratio.low:.3f} to {cost.ratio.high:.3f}</td><td>{cost.repeats}</td></tr>"
        for cost in found.cases
    )
    heads = ["rows", "case", "ms", "quartiles", "ratio", "quartiles", "rounds"]
    return f"<section><h2>All figures</h2>{_table(heads, rows)}</section>"


def _batch(cost: CaseCost) -> str:
    return f"{escape(cost.component)} {cost.rows}" if cost.component else f"{cost.rows}"


def _about(found: Benchmark) -> str:
    entries = {
        "digest": f"<code>{found.digest}</code>",
        "provider": escape(f"{found.provider} ({found.provider_reason})"),
        "threads": "one per core" if found.threads is None else str(found.threads),
        "ONNX Runtime": escape(found.onnxruntime),
        "tasks": escape(", ".join(found.tasks)),
    }
    if found.cold is not None:
        cold = found.cold
        entries["loaded from disk"] = escape(
            f"the {cold.bytes:,} bytes of {cold.task} in {_ms(cold.load_ms)}; its first run took "
            f"{_ms(cold.first_run_ms)}; {cold.repeats} times"
        )
    entries["memory"] = "<br>".join(
        escape(f"{own.at}: {'not told by this system' if own.bytes is None else f'{own.bytes / 1e6:,.0f} MB'}")
        for own in found.memory
    )
    entries["the runtime's account"] = escape(
        ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in found.usage.items())
    )
    entries["not measured"] = "<br>".join(escape(f"{own.what}: {own.reason}") for own in found.left_out) or "nothing"
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
    return f"<section><h2>How it was measured</h2><dl>{items}</dl></section>"


def _ms(own: Spread) -> str:
    return f"{own.median:.3g} ms ({own.low:.3g} to {own.high:.3g})"


def _three(own: Spread) -> tuple[float, float, float]:
    return own.low, own.median, own.high


def _table(heads: Sequence[str], rows: str) -> str:
    cells = "".join(f"<th{' class=left' if head == 'case' else ''}>{head}</th>" for head in heads)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>'
