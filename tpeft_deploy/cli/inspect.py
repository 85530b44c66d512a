"""`inspect`: what an adapter changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.console import Command, emit, json_option

if TYPE_CHECKING:
    from tpeft_deploy.adapter import Adapter

__all__ = ["inspect"]


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--base", help="package.module:factory; checks the adapter against it and compares norms.")
@json_option
def inspect(adapter: Path, base: str | None, as_json: bool) -> None:
    """Print what ADAPTER changes: shapes, ranks, parameters, size of the change."""
    from tpeft_deploy.formats import load_adapter

    loaded = load_adapter(adapter)
    norms = _base_norms(loaded, base) if base is not None else {}
    document = {
        "source": loaded.source,
        "parameters": loaded.parameters,
        "bytes": loaded.nbytes,
        "weights": _weights(loaded, norms),
    }
    columns = ["weight", "change", "shape", "ranks", "parameters", "norm", *(["share"] if norms else [])]
    emit(document, key="weights", columns=columns, as_json=as_json)
    if not as_json:
        click.echo(f"{loaded.parameters} parameters, {loaded.nbytes} bytes")


def _weights(adapter: Adapter, norms: dict[str, float]) -> list[dict[str, Any]]:
    import numpy as np

    deltas = [
        {
            "weight": name,
            "change": "delta",
            "shape": list(delta.shape),
            "ranks": list(delta.ranks),
            "scale": delta.scale,
            "parameters": delta.parameters,
            "norm": delta.norm(),
            "share": delta.norm() / norms[name] if norms.get(name) else None,
        }
        for name, delta in adapter.deltas.items()
    ]
    overrides = [
        {
            "weight": name,
            "change": "override",
            "shape": list(array.shape),
            "ranks": None,
            "scale": None,
            "parameters": array.size,
            "norm": float(np.linalg.norm(array.astype(np.float64))),
            "share": None,
        }
        for name, array in adapter.overrides.items()
    ]
    return deltas + overrides


def _base_norms(adapter: Adapter, base: str) -> dict[str, float]:
    import numpy as np

    from tpeft_deploy.exporters.bases import load_base

    loaded = load_base(base)
    loaded.check(adapter)
    return {name: float(np.linalg.norm(loaded.weights[name].astype(np.float64))) for name in adapter.deltas}
