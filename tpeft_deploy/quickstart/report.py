"""Report of the quickstart: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.html.page import document, scientific, tiles
from tpeft_deploy.quickstart import figures
from tpeft_deploy.quickstart.data import DIGITS, TASKS, Digits
from tpeft_deploy.quickstart.evaluate import FORMS, Answers
from tpeft_deploy.quickstart.results import Results

__all__ = ["render", "write_report"]

_STYLE = """
.gallery td { text-align: center; padding: 8px 5px; font-size: 14px; }
.gallery img { display: block; width: 64px; height: 64px; margin: 0 auto 3px; border-radius: 6px;
  image-rendering: pixelated; }
.gallery th small { display: block; font-weight: 400; color: var(--soft); }
"""


def write_report(file: Path, results: Results, answers: Mapping[str, Answers], tests: Mapping[str, Digits]) -> None:
    """Write the report.

    Args:
        file: HTML file to write.
        results: measurements.
        answers: task, or `base` -> logits.
        tests: task, or `base` -> held-out images.
    """
    file.write_text(render(results, answers, tests), encoding="utf-8")


def render(results: Results, answers: Mapping[str, Answers], tests: Mapping[str, Digits]) -> str:
    """Render the report as HTML."""
    body = f"""<h1>One base, {len(results.tasks)} tasks, any mixture of them in a batch</h1>
<p class="soft">A {results.base.parameters:,}-weight ConvNeXt reads scanned digits with {results.base.torch:.1%}
accuracy. Each task below is a low-rank tensor adapter for its convolutions and linears, trained with PEFT and served
with ONNX Runtime ({escape(results.provider)}). All figures are from {results.test_digits} held-out digits.</p>
{_tiles(results)}
<section><h2>Accuracy</h2><p class="soft small">torch is the PEFT model; folded, factored and banked are its three
exports. banked ran every task in the same batches of {results.rows_per_batch} rows, tasks alternating row by row.</p>
<div class="wide">{figures.accuracy_plot(results)}</div><div class="wide">{_table(results)}</div></section>
<section><h2>The same digits in each task</h2><p class="soft small">Below each image: the prediction of the base, then
the prediction with the task's adapter, from the mixed batch.</p>
<div class="wide">{_gallery(answers, tests)}</div></section>
<div class="thirds">
<section><h2>Exact</h2><p class="soft small">Relative error of the logits against the merged torch model; one dot per
task.</p>{figures.error_plot(results)}</section>
<section><h2>Small</h2><p class="soft small">Storage of one more task, against a full copy of the base.</p>
{figures.size_plot(results)}</section>
<section><h2>Switched in microseconds</h2><p class="soft small">A batch of one row; medians of
{results.switching.runs} interleaved runs.</p>{figures.switching_plot(results)}</section></div>
{_try_it(results)}
<footer>Trained in {results.seconds["train"]:.0f} s, exported and checked in {results.seconds["export"]:.0f} s, measured
in {results.seconds["measure"]:.0f} s; seed {results.seed}. {_versions(results)}.</footer>"""
    return document("tpeft-deploy quickstart", body, style=_STYLE)


def _tiles(results: Results) -> str:
    tasks, cost = results.tasks, results.switching
    least = min(task.banked - task.base for task in tasks)
    share = max(task.adapter_bytes for task in tasks) / results.base.bytes
    worst = max(max(task.errors.values()) for task in tasks)
    shown = {
        f"+{100 * least:.0f} points": "least gain of an adapter over the base",
        scientific(worst): "largest error of an export against torch",
        f"{share:.0%}": "of a full copy stored per task",
        f"{cost.switch_us:+.0f} µs": f"to change the task of a {cost.repeat_us:.0f} µs run",
    }
    return tiles(shown)


def _table(results: Results) -> str:
    heads = ["task", "base", "torch", *FORMS, "largest error", "adapter", "trained in"]
    rows = [
        f"<tr><th>{task.task}</th>"
        + "".join(f"<td>{getattr(task, form):.1%}</td>" for form in ("base", "torch", *FORMS))
        + f"<td>{scientific(max(task.errors.values()))}</td><td>{task.adapter_bytes / 1000:.0f} kB</td>"
        + f"<td>{task.train_seconds:.0f} s</td></tr>"
        for task in results.tasks
    ]
    base = results.base
    rows.append(
        f"<tr><th>base, on upright digits</th><td>{base.torch:.1%}</td><td></td><td></td><td></td>"
        f"<td>{base.banked:.1%}</td><td>{scientific(base.error)}</td><td>{base.bytes / 1000:.0f} kB</td>"
        f"<td>{base.train_seconds:.0f} s</td></tr>"
    )
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _gallery(answers: Mapping[str, Answers], tests: Mapping[str, Digits]) -> str:
    # The first held-out image of every digit, the same for all tasks.
    _, columns = np.unique(tests[BASE_TASK].labels, return_index=True)
    shown = [(BASE_TASK, "as scanned, no adapter", DIGITS), *((task.name, task.about, task.answers) for task in TASKS)]
    rows = []
    for name, about, meanings in shown:
        cells = "".join(_cell(name, meanings, answers[name], tests[name], row) for row in columns)
        rows.append(f"<tr><th>{name}<small>{about}</small></th>{cells}</tr>")
    return f'<table class="gallery"><tbody>{"".join(rows)}</tbody></table>'


def _cell(name: str, meanings: tuple[str, ...], answers: Answers, test: Digits, row: int) -> str:
    truth, prediction = int(test.labels[row]), int(answers.forms["banked"][row].argmax())
    # The base has no prediction for a task with other classes.
    before = f"{DIGITS[int(answers.base[row].argmax())]} → " if meanings == DIGITS and name != BASE_TASK else ""
    verdict = "good" if prediction == truth else "bad"
    return (
        f'<td><img alt="{meanings[truth]}" src="{figures.picture(test.pixels[row, 0])}">'
        f'<span class="soft">{before}</span><b class="{verdict}">{meanings[prediction]}</b></td>'
    )


def _try_it(results: Results) -> str:
    mixture = ",".join(results.sample.tasks)
    commands = f"""cd {results.out}
tpeft-deploy run bundle --input sample.npz --output answers.npz --tasks {mixture}
tpeft-deploy export folded digits_base:base adapters/rotated --out rotated.onnx"""
    return f"<section><h2>Try it</h2><pre>{escape(commands)}</pre></section>"


def _versions(results: Results) -> str:
    return escape(", ".join(f"{name} {number}" for name, number in results.versions.items()))
