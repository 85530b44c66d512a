"""`inspect`: show the changes of an adapter, and the forms in which it can be served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli import serving
from tpeft_deploy.cli.bases import base_option, format_option, open_base, part_option, scale_option
from tpeft_deploy.cli.console import emit, json_option, tell_left_out
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note
from tpeft_deploy.errors import AdapterError, TpeftError

if TYPE_CHECKING:
    from tpeft_deploy.adapter import Adapter
    from tpeft_deploy.formats.read.module import BaseView

__all__ = ["inspect"]


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@base_option
@scale_option
@format_option
@part_option
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Also draw the size of each weight's change, as a picture (.png)."
)
@json_option
def inspect(
    adapter: Path,
    base: str | None,
    scale: float | None,
    format: str | None,
    part: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Show the changes of ADAPTER, and the forms in which it can be served.

    `share` is the norm of the change divided by that of the base's weight; `folded` marks gains, which a bundle serves
    only if it was exported with them.  With --base the forms are found by tracing the model; without it, from names and
    shapes.  If the adapter is refused, the reason is shown and the exit code is 1.
    """
    from tpeft_deploy.formats import load_adapter
    from tpeft_deploy.formats.read.base_view import view

    found: BaseView | None = None
    try:
        with stages() as begin:
            begin("read the adapter" if base is None else "load the base")
            opened = open_base(base)
            found = None if opened is None else view(opened)
            begin("read the adapter")
            loaded = load_adapter(adapter, format=format, scale=scale, base=found, part=part)
    except AdapterError as error:
        _show_refused(adapter, error, found, as_json)
        raise
    weights = _weights(loaded, found)
    document: dict[str, Any] = {
        "source": loaded.source,
        "parameters": loaded.parameters,
        "bytes": loaded.nbytes,
        "folded_only": bool(loaded.gains),
        "notes": dict(loaded.notes),
        "left_out": dict(loaded.left_out),
        "weights": weights,
        "method": _method(adapter, found, format) | ({"override": len(loaded.overrides)} if loaded.overrides else {}),
        "forms": serving.forms(loaded, base, opened),
        "heads": serving.heads(loaded, found),
        "missing": [] if found is not None else ["--base: whether its targets are in the base is not checked"],
        "file_bytes": serving.file_bytes(adapter),
        "oracle": serving.oracle(loaded, opened),
    }
    columns = ["weight", "change", "kind", "shape", "ranks", "parameters", "norm"]
    columns += ["share"] if found is not None else []
    emit(document, key="weights", columns=[*columns, "folded"], as_json=as_json)
    if plot is not None:
        from tpeft_deploy.cli.plot import draw

        draw(weights, plot, title=loaded.source)
        note(f"picture: {plot}")
    if not as_json:
        click.echo(f"{loaded.parameters} parameters, {loaded.nbytes} bytes")
        tell_left_out(loaded.left_out)
        for name, text in loaded.notes.items():
            click.echo(f"note on {'the adapter' if name == '*' else name}: {text}")
        _show_serving(document)
    _fail_where_none(document["forms"])


def _method(path: Path, base: BaseView | None, format: str | None) -> dict[str, int]:
    from tpeft_deploy.formats import methods_of

    try:
        return methods_of(path, base, format)
    except TpeftError:  # not recorded, or damaged, which reading the adapter reports
        return {}


def _show_serving(document: dict[str, Any]) -> None:
    click.echo(f"method: {', '.join(f'{name} x {count}' for name, count in document['method'].items()) or '-'}")
    for name, (base, rows) in document["heads"].items():
        click.echo(f"head {name}: {rows} rows, {base} in the base")
    for missing in document["missing"]:
        click.echo(f"missing: {missing}")
    if document["oracle"] is not None:
        click.echo(f"task {document['oracle']['task']}: oracle {document['oracle']['oracle']}")
    click.echo(f"file: {document['file_bytes']} bytes\n")
    emit(document, key="forms", columns=serving.COLUMNS, as_json=False)


def _show_refused(path: Path, error: AdapterError, base: BaseView | None, as_json: bool) -> None:
    forms = [serving.refused(error)]
    document = {"source": str(path), "method": _method(path, base, None), "forms": forms}
    emit(document, key="forms", columns=[*serving.COLUMNS, "fix"], as_json=as_json)


def _fail_where_none(forms: list[dict[str, Any]]) -> None:
    if all(form["possible"] is False for form in forms):
        raise AdapterError("serve the adapter", problem=forms[0]["reason"], fix=forms[0]["fix"])


def _weights(adapter: Adapter, base: BaseView | None) -> list[dict[str, Any]]:
    changed = [*adapter.deltas, *(name for name in adapter.gains if name not in adapter.deltas)]
    entries = [_target(adapter, name, base) for name in changed]
    return entries + [_override(name, array, base) for name, array in adapter.overrides.items()]


def _target(adapter: Adapter, name: str, base: BaseView | None) -> dict[str, Any]:
    """Entry of one target; with a gain and a base, the norm is that of gain * (W + dW) - W."""
    import numpy as np

    delta, gain = adapter.deltas.get(name), adapter.gains.get(name)
    weight = base.weights[name].astype(np.float64) if base is not None else None
    norm = delta.norm() if delta is not None else None
    if gain is not None:
        norm = None if weight is None else float(np.linalg.norm(adapter.merged(name, weight) - weight))
    size = None if weight is None else float(np.linalg.norm(weight))
    change = " and ".join(what for what, part in (("delta", delta), ("gain", gain)) if part is not None)
    return {
        "weight": name,
        "change": change,
        "kind": _kind(name, base, delta.shape if delta is not None else None),
        "shape": list(delta.shape if delta is not None else gain.shape if gain is not None else ()),
        "ranks": list(delta.ranks) if delta is not None else None,
        "scale": delta.scale if delta is not None else None,
        "parameters": (delta.parameters if delta is not None else 0) + (gain.size if gain is not None else 0),
        "norm": norm,
        "share": norm / size if norm is not None and size else None,
        "folded": gain is not None,
        "note": adapter.notes.get(name),
    }


def _override(name: str, array: Any, base: BaseView | None) -> dict[str, Any]:
    import numpy as np

    return {
        "weight": name,
        "change": "override",
        "kind": _kind(name, base, None),
        "shape": list(array.shape),
        "ranks": None,
        "scale": None,
        "parameters": array.size,
        "norm": float(np.linalg.norm(array.astype(np.float64))),
        "share": None,
        "folded": False,
        "note": None,
    }


def _kind(name: str, base: BaseView | None, shape: tuple[int, ...] | None) -> str | None:
    """Class of the layer if the base records it, else a description by the number of axes."""
    known = base.kinds.get(name.rpartition(".")[0]) if base is not None else None
    if known is not None or shape is None:
        return known
    return "matrix" if len(shape) == 2 else f"convolution {len(shape) - 2}d"
