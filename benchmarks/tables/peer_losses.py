"""Where a peer is ahead, and why."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.tables.table import Row
from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["losses", "server_losses"]

UNKNOWN = "not explained yet"
# Part of a row's name -> why it can be ahead; the first that fits.
REASONS: dict[str, str] = {
    "conv net": "beside a branch ONNX Runtime does not fuse a convolution with its batch normalisation, and 8 further "
    "channels beside 64 take about a third of its time; a fold takes as long as they do",
    "onnxruntime-genai": "with one adapter its fused operators and its loop in C++ are ahead; it has one adapter a run",
}


def losses(rows: Sequence[Row]) -> dict[str, str]:
    """Name of each peer that was faster in some column, by more than its quartiles, -> the reason."""
    ahead = [row for row in rows if "this toolkit" not in row.name and any(map(_faster, row.figures.items()))]
    return {row.name: next((why for part, why in REASONS.items() if part in row.name), UNKNOWN) for row in ahead}


def _faster(figure: tuple[str, object]) -> bool:
    column, value = figure
    return column.endswith("ratio") and isinstance(value, Spread) and value.high < 1


# Start of a row's name -> why that server can be ahead.
SERVERS: dict[str, str] = {}


def server_losses(rows: Sequence[Row]) -> dict[str, str]:
    """Name of each server that answered more requests a second, by more than its quartiles, -> the reason."""
    ratios = {row.name: row.figures["ratio"] for row in rows if not row.name.startswith("this toolkit")}
    ahead = [name for name, ratio in ratios.items() if isinstance(ratio, Spread) and ratio.low > 1]
    return {name: SERVERS.get(name, UNKNOWN) for name in ahead}
