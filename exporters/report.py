"""A verification as one HTML page without other files, the same for the same bundle and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TypeVar

import numpy as np

from tpeft_deploy.bundle.directory import MANIFEST
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.exporters.proof import per_target
from tpeft_deploy.exporters.proof.per_target import TargetCheck
from tpeft_deploy.exporters.verification import Verification
from tpeft_deploy.files import digest_file
from tpeft_deploy.html import plots
from tpeft_deploy.html.page import FORM_COLOURS, document, scientific, tiles
from tpeft_deploy.html.plots import Bar, Cell, Dot

__all__ = ["render"]

T = TypeVar("T")

_FORMS = tuple(FORM_COLOURS)
_TASK_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#ca8a04", "#64748b")
_MOST_ROWS = 72  # of a plot
_MOST_TASKS = 12  # columns of the ranks
_FIRST = 5  # failures that are shown at once
_STYLE = """
.verdict { font-size: 18px; font-weight: 600; margin: 0 0 20px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 22px; margin: 12px 0 0; font-size: 15px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); font-size: 14px; }
td.left, th.left { text-align: left; }
li { margin: 4px 0; overflow-wrap: anywhere; } ul { margin: 12px 0 0; padding-left: 20px; }
.scroll { max-height: 420px; overflow: auto; margin-top: 8px; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
"""


def render(found: Verification) -> str:
    """The page as text."""
    manifest = found.bundle.manifest
    body = f"""<h1>{escape(manifest.name)}</h1>
{_verdict(found)}
{_tiles(found)}
{_about(found)}
{_failures(found)}
<section><h2>Error per task and form</h2><p class="soft small">Relative error of the outputs against
{escape(found.reference)}; one dot a comparison, the worst over its outputs, on a logarithmic axis.</p>
{_forms(found.checks)}</section>
<section><h2>Error per output</h2><p class="soft small">The same comparisons, output by output.</p>
{_outputs(found.checks)}</section>
{_targets(found)}
{_sizes(found)}
{_ranks(found)}
<footer>Written by {escape(manifest.producer)}. The figures are ONNX Runtime's on the CPU, on the example inputs stored
in the bundle.</footer>"""
    return document(f"{manifest.name}: verified", body, style=plots.STYLE + _STYLE)


def _verdict(found: Verification) -> str:
    total, failed = len(found.checks) + len(found.targets), len(found.failed)
    if failed:
        return f'<p class="verdict bad">{failed} of {total} comparisons failed: this bundle must not be served.</p>'
    return f'<p class="verdict good">All digests are right and all {total} comparisons are within their limits.</p>'


def _tiles(found: Verification) -> str:
    share = max((adapter.nbytes for adapter in found.tasks.values()), default=0) / max(_base_bytes(found), 1)
    mixed = found.bundle.manifest.rows == "each"
    shown = {
        _number(max((check.error for check in found.checks), key=_badness)): "largest relative error",
        str(len(found.tasks)): "task beside the base" if len(found.tasks) == 1 else "tasks beside the base",
        _percent(share): "of a full copy stored per task, at most",
        **({"each row": "takes its own adapter"} if mixed else {"each run": "takes one adapter for all rows"}),
    }
    return tiles(shown)


def _about(found: Verification) -> str:
    bundle, manifest = found.bundle, found.bundle.manifest
    folded = [task for task in found.tasks if (bundle.path / "folded" / f"{task}.onnx").is_file()]
    forms = [name.removesuffix(".onnx") for name in manifest.files if name.endswith(".onnx")]
    forms += [f"folded ({', '.join(folded)})"] if folded else []
    entries = {
        "digest": f"<code>{digest_file(bundle.path / MANIFEST)}</code>",
        "base digest": f"<code>{escape(manifest.base_digest)}</code>",
        "forms": escape(", ".join(forms)),
        "reference": escape(found.reference),
        "rows": escape(manifest.rows + (f": {manifest.rows_reason}" if manifest.rows_reason else "")),
        "largest rank": escape("any" if manifest.max_rank is None else str(manifest.max_rank)),
        "files": escape(", ".join(f"{name} {_bytes(record.bytes)}" for name, record in manifest.files.items())),
        "not checked": "<br>".join(escape(f"{what}: {reason}") for what, reason in found.left_out) or "nothing",
        "exported by": escape(manifest.producer),
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries.items())
    return f"<section><h2>The bundle</h2><dl>{items}</dl>{_tasks(found)}</section>"


def _tasks(found: Verification) -> str:
    rows = "".join(
        f'<tr><th>{escape(task)}</th><td class="left"><code>{found.bundle.digest(task)[:16]}</code></td>'
        f"<td>{adapter.parameters:,}</td><td>{_bytes(adapter.nbytes)}</td>"
        f"<td>{_percent(adapter.nbytes / max(_base_bytes(found), 1))}</td>"
        f"<td>{len(adapter.deltas)}</td><td>{len(adapter.gains)}</td><td>{len(adapter.overrides)}</td></tr>"
        for task, adapter in found.tasks.items()
    )
    heads = ["task", "digest", "parameters", "bytes", "of a full copy", "deltas", "gains", "overrides"]
    return f'<div class="wide">{_table(heads, rows)}</div>' if rows else ""


def _failures(found: Verification) -> str:
    if not found.failed:
        return ""
    lines = [_line(check) for check in found.checks if check.failure is not None]
    alone = [target for target in found.targets if target.check.failure is not None]
    lines += [f"{_name(target)} alone: {_line(target.check)}" for target in alone]
    items = [f"<li>{escape(line)}</li>" for line in lines[:_MOST_ROWS]]
    rest = "".join(items[_FIRST:])
    more = f"<details><summary>{len(lines) - _FIRST} more</summary><ul>{rest}</ul></details>" if rest else ""
    return f'<section><h2 class="bad">What failed</h2><ul>{"".join(items[:_FIRST])}</ul>{more}</section>'


def _line(check: Check) -> str:
    """A failure without its advice, which is the same for all."""
    failure = check.failure
    return str(failure).removesuffix(f". {failure.fix}") if failure is not None else ""


def _forms(checks: Sequence[Check]) -> str:
    rows: dict[str, list[Dot]] = {}
    for check in checks:
        rows.setdefault(check.task, []).append(_dot(check.form, check, check.error))
    body = "".join(
        f'<tr><th>{escape(check.form)}</th><td class="left">{escape(check.task)}</td>'
        f'<td class="left">{escape(_at(check))}</td><td{"" if check.failure is None else _BAD}>{_number(check.error)}'
        f"</td><td>{check.limit:g}</td></tr>"
        for check in checks
    )
    table = _table(["form", "task", "sizes", "error", "limit"], body)
    more = f'<details><summary>all {len(checks)} comparisons</summary><div class="scroll">{table}</div></details>'
    return _legend(checks) + _dots(rows, checks) + more


def _outputs(checks: Sequence[Check]) -> str:
    rows: dict[str, list[Dot]] = {}
    for check in checks:
        for output, error in check.outputs.items():
            rows.setdefault(f"{output}, {check.form}", []).append(_dot(check.form, check, error))
    rows = {label: rows[label] for label in sorted(rows)}
    return _legend(checks) + _dots(rows, checks)


def _targets(found: Verification) -> str:
    if not found.targets:
        return ""
    colours = _colours(found.tasks)
    rows: dict[str, list[Dot]] = {}
    for target in found.targets:
        rows.setdefault(_name(target), []).append(_target_dot(target, colours[target.task]))
    counts = [len(per_target.parts_of(found.bundle, adapter)) for adapter in found.tasks.values()]
    of_all = f" Of tasks with more than {per_target.MOST}, that many were run, spread evenly over the model."
    text = f"""<p class="soft small">The factored graph fed one weight's change alone, against the reference with that
change alone: which branch an error comes from.{of_all if max(counts) > per_target.MOST else ""}</p>"""
    legend = plots.legend([(task, colours[task]) for task in found.tasks]) if len(found.tasks) <= _MOST_TASKS else ""
    plot = _dots(rows, [target.check for target in found.targets])
    return f"<section><h2>Error per target</h2>{text}{legend}{plot}</section>"


def _sizes(found: Verification) -> str:
    base = _base_bytes(found)
    items = [Bar("full copy", base, _bytes(base), FORM_COLOURS["base"])]
    for task, adapter in list(found.tasks.items())[:_MOST_ROWS]:
        text = f"{_bytes(adapter.nbytes)}, {_percent(adapter.nbytes / max(base, 1))}"
        items.append(Bar(task, adapter.nbytes, text, FORM_COLOURS["folded"]))
    return f"""<section><h2>Bytes per task</h2><p class="soft small">What one more task stores, against one more copy of
the base.{_rest(len(found.tasks))}</p><div class="wide">{plots.bars(items)}</div></section>"""


def _ranks(found: Verification) -> str:
    tasks = list(found.tasks)[:_MOST_TASKS]
    if not tasks:
        return ""
    ranks = {task: per_target.ranks_of(found.bundle, found.tasks[task]) for task in tasks}
    targets = [t for t in found.bundle.manifest.targets if any(t.key in own for own in ranks.values())]
    rows = [
        (f"{target.name} ({target.kind})", [_cell(target, ranks[task].get(target.key), task) for task in tasks])
        for target in _spread(targets)
    ]
    left = len(found.tasks) - len(tasks)
    text = f" The first {_MOST_TASKS} of {len(found.tasks)} tasks." if left else ""
    return f"""<section><h2>Ranks per target</h2><p class="soft small">What each task feeds to each branch: ranks, or
the first size of a replaced tensor; the stronger, the nearer to full rank.{text}{_rest(len(targets))}</p>
<div class="wide">{plots.grid(tasks, rows, FORM_COLOURS["banked"])}</div></section>"""


def _cell(target: Target, ranks: Mapping[str, int] | None, task: str) -> Cell | None:
    if ranks is None:
        return None
    if target.part != "delta":
        size = ranks.get("C")
        text = "gain" if target.part != "override" else f"{size} rows" if size is not None else "replaced"
        return Cell(text, 0.0, f"{task}, {target.name}: {text}")
    full = min(target.shape[0], math.prod(target.shape[1:]))
    ordered = sorted(ranks.items(), reverse=True)  # R_o before R_i, as in the weight's shape
    named = ", ".join(f"{letter} {rank}" for letter, rank in ordered)
    text = " x ".join(str(rank) for _, rank in ordered)
    return Cell(text, max(ranks.values()) / max(full, 1), f"{task}, {target.name} {list(target.shape)}: {named}")


def _dots(rows: Mapping[str, Sequence[Dot]], checks: Iterable[Check]) -> str:
    limits = sorted({check.limit for check in checks})
    chosen = _spread(list(rows.items()))
    rest = f'<p class="soft small">{_rest(len(rows)).strip()}</p>' if len(chosen) < len(rows) else ""
    return f'{rest}<div class="wide">{plots.dots(chosen, limits)}</div>'


def _spread(items: list[T]) -> list[T]:
    places = np.unique(np.linspace(0, len(items) - 1, min(_MOST_ROWS, len(items))).round().astype(int))
    return [items[place] for place in places]


def _rest(count: int) -> str:
    return f" {_MOST_ROWS} of {count} are shown, spread evenly." if count > _MOST_ROWS else ""


def _dot(form: str, check: Check, error: float) -> Dot:
    text = f"{check.form}, {check.task}, {_at(check)}: {_plain(error)}"
    return Dot(error, FORM_COLOURS[form], text, good=error <= check.limit)


def _target_dot(target: TargetCheck, colour: str) -> Dot:
    text = f"{target.task}, {', '.join(target.weights)} ({', '.join(target.kinds)}): {_plain(target.check.error)}"
    return Dot(target.check.error, colour, text, good=target.check.failure is None)


def _name(target: TargetCheck) -> str:
    return " + ".join(target.weights)


def _legend(checks: Iterable[Check]) -> str:
    used = {check.form for check in checks}
    return plots.legend([(form, FORM_COLOURS[form]) for form in _FORMS if form in used])


def _colours(tasks: Iterable[str]) -> dict[str, str]:
    return {task: _TASK_COLOURS[place % len(_TASK_COLOURS)] for place, task in enumerate(tasks)}


def _at(check: Check) -> str:
    return ", ".join(f"{name} {size}" for name, size in check.sizes.items())


def _badness(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _number(error: float) -> str:
    if not math.isfinite(error):
        return "∞"
    return scientific(error) if error else "0"


def _plain(error: float) -> str:
    return f"{error:.2e}" if math.isfinite(error) else "nothing to compare"


def _base_bytes(found: Verification) -> int:
    return found.bundle.manifest.weight_bytes


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.001 else f"{share:.3%}"


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th{_LEFT if name in _WORDS else ''}>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


_BAD = ' class="bad"'
_LEFT = ' class="left"'
_WORDS = ("digest", "task", "sizes")
