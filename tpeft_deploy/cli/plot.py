"""Heat map of an adapter: one row per layer, one column per weight of the layer, the norm of the change as colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpeft_deploy.errors import requires

__all__ = ["draw", "grid"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def grid(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Arrange entries of `inspect` as rows (path up to the layer's number), columns (rest of the path) and values.

    A value is the share of the base's norm if all entries have one, else the norm of the change.
    """
    drawn = [entry for entry in entries if entry["change"] != "override" and entry["norm"] is not None]
    field = "share" if drawn and all(entry["share"] is not None for entry in drawn) else "norm"
    values: dict[tuple[str, str], float] = {}
    for entry in drawn:
        name = str(entry["weight"]).removesuffix(".weight")
        number = _NUMBER.search(name)
        row, column = (name[: number.end()], name[number.end() + 1 :]) if number else ("", name)
        values[row, column] = float(entry[field])
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = list(dict.fromkeys(column for _, column in values))
    return rows, columns, values


def draw(entries: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write the heat map as a PNG file.

    Args:
        entries: entries of `inspect`.
        path: file to write.
        title: title of the plot.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with requires("matplotlib", "examples", f"draw {path}"):
        from matplotlib.figure import Figure
    from tpeft_deploy.files import new_file

    rows, columns, values = grid(entries)
    table = [[values.get((row, column), float("nan")) for column in columns] for row in rows]
    figure = Figure(figsize=(3 + 0.6 * max(len(columns), 1), 2.5 + 0.3 * max(len(rows), 1)), layout="constrained")
    axes = figure.add_subplot()
    if table:
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        shares = all(entry["share"] is not None for entry in entries if entry["change"] != "override")
        figure.colorbar(image, label="|dW| / |W|" if shares else "|dW|")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [row or "model" for row in rows])
    axes.set_title(title, fontsize="small", wrap=True)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
