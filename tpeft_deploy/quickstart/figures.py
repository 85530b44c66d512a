"""Figures of the report: SVG plots in the page's colours, and digits as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import matplotlib.image
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tpeft_deploy.html import page
from tpeft_deploy.quickstart.data import Pixels
from tpeft_deploy.quickstart.results import Results

__all__ = ["FORM_COLOURS", "accuracy_plot", "error_plot", "picture", "size_plot", "switching_plot"]

FORM_COLOURS = {"torch": "#7c3aed"} | {form: page.FORM_COLOURS[form] for form in ("folded", "factored", "banked")}
_BASE_COLOUR = page.FORM_COLOURS["base"]
_LIMIT_COLOUR = "#dc2626"
# Placeholders for the page's CSS colours, so that the plots follow the light and dark theme.
_INK, _LINE = "#010203", "#010204"
_PAGE_COLOURS = {_INK: "currentColor", _LINE: "var(--line)"}
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tpeft",
    "text.color": _INK,
    "xtick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.color": _LINE,
    "ytick.labelcolor": _INK,
}


def accuracy_plot(results: Results) -> str:
    """Plot accuracy per task: the base, torch and the three forms."""

    def draw(axes: Any) -> None:
        series = {"base": _BASE_COLOUR, **FORM_COLOURS}
        width = 0.15
        for index, (form, colour) in enumerate(series.items()):
            places = [position + (index - 2) * width for position in range(len(results.tasks))]
            heights = [getattr(task, form) for task in results.tasks]
            label = "base, no adapter" if form == "base" else form
            axes.bar(places, heights, 0.86 * width, color=colour, label=label)
        for position, task in enumerate(results.tasks):
            axes.text(position - 2 * width, task.base + 0.02, f"{task.base:.0%}", ha="center", fontsize=9)
            axes.text(position + width / 2, task.banked + 0.02, f"{task.banked:.1%}", ha="center", fontsize=9)
        axes.set_xticks(range(len(results.tasks)), [task.task for task in results.tasks])
        axes.set_ylim(0, 1.08)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        axes.legend(ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _svg((10, 3.8), draw)


def error_plot(results: Results) -> str:
    """Plot the relative error of the logits against the merged torch model, per form; one dot per task."""

    def draw(axes: Any) -> None:
        forms = list(results.tasks[0].errors)
        for place, form in enumerate(forms):
            errors = [max(task.errors[form], 1e-9) for task in results.tasks]
            offsets = [place + 0.09 * (index - (len(errors) - 1) / 2) for index in range(len(errors))]
            axes.scatter(offsets, errors, s=34, color=FORM_COLOURS[form], zorder=3)
        axes.axhline(1e-5, color=_LIMIT_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(len(forms) - 0.5, 1.2e-5, "limit 1e-5", ha="right", va="bottom", fontsize=9)
        axes.set_yscale("log")
        axes.set_ylim(1e-8, 1e-4)
        axes.set_xlim(-0.5, len(forms) - 0.5)
        axes.set_xticks(range(len(forms)), forms)
        axes.grid(axis="y")
        axes.tick_params(length=0, which="both")

    return _svg((3.7, 2.7), draw)


def size_plot(results: Results) -> str:
    """Plot kilobytes of a full copy and of every adapter."""
    labels = ["full copy", *(task.task for task in results.tasks)]
    sizes = [results.base.bytes / 1000, *(task.adapter_bytes / 1000 for task in results.tasks)]
    colours = [_BASE_COLOUR, *([FORM_COLOURS["folded"]] * len(results.tasks))]
    return _bars(labels, sizes, colours, [f"{size:.0f} kB" for size in sizes])


def switching_plot(results: Results) -> str:
    """Plot microseconds of a run with the same task, of a run with another task, and to open a session."""
    cost = results.switching
    times = [cost.repeat_us, cost.repeat_us + cost.switch_us, cost.session_us]
    labels = ["run, same task", "run, other task", "open a session"]
    colours = [_BASE_COLOUR, FORM_COLOURS["banked"], _LIMIT_COLOUR]
    return _bars(labels, times, colours, [_duration(value) for value in times])


def picture(pixels: Pixels) -> str:
    """Encode one digit (16, 16) as a data URI."""
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bars(labels: list[str], values: list[float], colours: list[str], texts: list[str]) -> str:
    def draw(axes: Any) -> None:
        places = range(len(labels))
        axes.barh(places, values, 0.62, color=colours)
        for place, value, text in zip(places, values, texts, strict=True):
            axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xlim(0, max(values) * 1.3)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)

    return _svg((3.7, 2.7), draw)


def _duration(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"


def _svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Render a plot as inline SVG without external references."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        unset = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unset)
    text = buffer.getvalue()
    # Inline SVG needs neither prolog nor namespaces; the page sets its size.
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for stand_in, colour in _PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return text
