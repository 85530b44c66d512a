"""The page that answers whether an adapter can be served, from the readers of formats and the cases of the test matrix."""

from __future__ import annotations

from collections.abc import Iterator

from docs.generate.markdown import code, generated, table
from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import changes
from tpeft_deploy.formats import catalogue

__all__ = ["LABELS", "LAYERS", "page"]

# Layer kind of the finder -> cases of the matrix that prove it; none for kinds that other tests prove.
LAYERS: dict[str, tuple[str, ...]] = {
    "linear": (
        "linear, 2-D",
        "linear, one output",
        "linear, 3-D",
        "linear, NHWC",
        "fused qkv",
        "a table that rows share",
    ),
    "Conv1D of transformers": ("transformers Conv1D",),
    "conv 1d": ("conv1d",),
    "conv 2d": (
        *("conv2d, strided", "conv2d, dilated, replicate", "conv2d, reflect", "conv2d, same", "conv2d, 1x1"),
        *("conv2d, grouped", "conv2d, depthwise", "depthwise, blocked", "conv with BatchNorm"),
    ),
    "conv 3d": ("conv3d",),
    "transposed conv": ("transposed 1-D", "transposed 2-D, dilated", "transposed 3-D", "transposed, grouped"),
    "embedding": ("embedding", "tied embedding", "positions that rows share"),
    "MultiheadAttention": ("attention",),
    "LayerNorm, RMSNorm, BatchNorm": ("norms", "conv with BatchNorm"),
    "GroupNorm": ("group norm",),
    "bias": ("linear, 2-D", "conv2d, strided"),
    "stacked experts": (),
    "tensor in a product": ("bare product",),
    "tensor in a sum, or used both ways round": ("bare sum", "a product both ways round"),
}
_NORMS = ("LayerNorm, RMSNorm, BatchNorm", "GroupNorm")
_REPLACED = (*_NORMS, "bias")  # their cases change other tensors too
_CONVS = ("conv 1d", "conv 2d", "conv 3d")
_TENSORS = ("tensor in a product", "tensor in a sum, or used both ways round")
# Layers as readers name them -> layer kinds of the finder.
LABELS: dict[str, tuple[str, ...]] = {
    "all": tuple(LAYERS),
    "linear": ("linear",),
    "Conv1D": ("Conv1D of transformers",),
    "conv": _CONVS,
    "conv 1d to 3d": _CONVS,
    "conv 1d and 2d": _CONVS[:2],
    "conv 2d": _CONVS[1:2],
    "conv 2d and 3d": _CONVS[1:],
    "conv with a kernel of 1": _CONVS[1:2],
    "transposed conv": ("transposed conv",),
    "embedding": ("embedding",),
    "MultiheadAttention": ("MultiheadAttention",),
    "norms": _NORMS,
    "biases of linear layers": ("bias",),
    "stacked experts": ("stacked experts",),
    "other parameters": _TENSORS,
}
_CHANGES = {"low-rank": "delta", "dense": "delta", "gain": "gain", "override": "override"}
_TEXT = """
Choose the method with which the adapter was trained and the layers that it changes. The table has the forms that serve it;
each is exact. `tpeft-deploy inspect ADAPTER --base BASE` answers for one file and one model.

<div class="finder" data-columns="0,2"></div>

{table}

- **Mixed rows**: one run serves rows of different adapters. **One adapter per run**: a bundle serves the adapter, and
  batches of several tasks run once per task. Gains are DoRA's magnitudes and IA3's vectors; replaced are heads, biases,
  norms and other whole tensors.
- **Base needed**: `load_adapter(..., base=)` or `--base` is needed to read the file.
- **Stored**: low-rank changes take kilobytes. Dense ones take as much memory as the weights that they change, in the
  adapter's file and in the bank.
- **Bundles** serve an adapter in the factored and the banked form if they were exported with its targets: with an adapter
  that changes the same weights, or without adapters, for all linear layers and convolutions. Gains and replaced tensors
  need an adapter that has them among those of the export.
- **Providers** other than the CPU and CUDA serve fewer banks ([Execution providers](../providers.md)).

## Refused

These change more than weights, or their files do not determine the change.

{refused}

## Layers

Rows that share a run in the banked form, by what an adapter changes. Each entry is proved by a case of
`tests/exporters/forms/test_matrix.py`, at two shapes, and stacked experts by `tests/exporters/forms/test_mixed_rows.py`. A use of a weight that no layer kind covers
is exported as `W + dW` in the graph.

{layers}
"""


def rows_of(layer: str, change: str) -> str | None:
    """Return how rows of different adapters share a run of the banked form; None if no case has the change."""
    if layer in _REPLACED and change != "override":
        return None
    cases = [CASES[name] for name in LAYERS[layer]]
    if not cases and change == "delta":
        return "mixed rows"  # stacked experts: tests/exporters/forms/test_mixed_rows.py
    named = [(name, case) for case in cases for name in changes(case) if name.startswith(change)]
    if not named:
        return None
    return "one adapter per run" if any(name in case.group for name, case in named) else "mixed rows"


def page() -> str:
    """Return docs/reference/finder.md."""
    rows = list(_rows())
    columns = ("method", "library", "layer", "folded", "factored", "banked", "stored", "base needed", "notes")
    refused = [(row["what"], row["library"], row["reason"], row["instead"]) for row in catalogue.document()["refused"]]
    layers = [(layer, *(rows_of(layer, change) or "" for change in ("delta", "gain", "override"))) for layer in LAYERS]
    text = _TEXT.format(
        table=table(columns, rows),
        refused=table(("what", "library", "reason", "instead"), refused),
        layers=table(("layer", "low-rank and dense changes", "gains", "replaced tensors"), layers),
    )
    return generated("Can I serve this adapter?", "tpeft_deploy/formats/", text)


def _rows() -> Iterator[tuple[str, ...]]:
    for name, about in catalogue.abouts():
        for label in about.layers.split(", "):
            for layer in LABELS[label]:
                banked = _banked(layer, about.stored.split(", "))
                if banked:
                    method = f"{about.method} ({code(name)})"
                    yield method, about.library, layer, "yes", "yes", banked, about.stored, about.base, about.notes


def _banked(layer: str, stored: list[str]) -> str:
    """Return how rows share a run, by change where they differ; empty if the format changes no such layer."""
    found = {change: rows_of(layer, change) for change in dict.fromkeys(_CHANGES[kind] for kind in stored)}
    known = {change: rows for change, rows in found.items() if rows is not None}
    if len(set(known.values())) <= 1:
        return next(iter(known.values()), "")
    names = {"delta": "", "gain": "gains: ", "override": "replaced: "}
    return "; ".join(f"{names[change]}{rows}" for change, rows in known.items())
