"""`export`: from a base and adapters to ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tpeft_deploy.cli.bases import inputs_option, read_inputs, scale_option, weights_option
from tpeft_deploy.cli.console import Group, TaskAdapter, emit, json_option, stages

__all__ = ["export"]

_COLUMNS = ["form", "task", "sizes", "error", "limit"]


@click.group(cls=Group)
def export() -> None:
    """Export a base with adapters to ONNX; every export is checked against the merged torch model.

    BASE is package.module:factory, a callable that returns (module, example inputs) or (module, example inputs,
    dynamic shapes); the working directory is searched too.  Or it is an .onnx file that any exporter wrote: its
    weights are found by the values that --weights holds, or by the digests that ADAPTER recorded.
    """


@export.command()
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The ONNX file to write.")
@weights_option
@inputs_option
@scale_option
@json_option
def folded(
    base: str,
    adapter: Path,
    out: Path,
    weights: Path | None,
    inputs: Path | None,
    scale: float | None,
    as_json: bool,
) -> None:
    """Merge ADAPTER into BASE: a plain ONNX model, as fast as the base."""
    from tpeft_deploy.exporters import export_folded
    from tpeft_deploy.exporters.loading import load_base
    from tpeft_deploy.formats import load_adapter

    with stages() as begin:
        begin("load the base")
        opened = load_base(base, example_inputs=read_inputs(inputs, base), weights=weights)
        begin("read the adapter")
        loaded = load_adapter(adapter, scale=scale, base=opened.view)
        checks = export_folded(opened, loaded, out, task=adapter.name, progress=begin)
    gate = [check.to_json() for check in checks]
    emit({"path": str(out), "bytes": out.stat().st_size, "gate": gate}, key="gate", columns=_COLUMNS, as_json=as_json)


@export.command()
@click.argument("base")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The directory to write.")
@click.option(
    "--adapter", "adapters", type=TaskAdapter(), multiple=True, help="A task and where its adapter is; repeatable."
)
@click.option("--max-rank", type=click.IntRange(min=1), help="Refuse adapters of a larger rank, now and later.")
@click.option("--name", help="The bundle's name; by default the directory's.")
@click.option("--folded", "with_folded", is_flag=True, help="Also write folded/TASK.onnx for every adapter.")
@weights_option
@inputs_option
@json_option
def bundle(
    base: str,
    out: Path,
    adapters: Sequence[tuple[str, Path]],
    max_rank: int | None,
    name: str | None,
    with_folded: bool,
    weights: Path | None,
    inputs: Path | None,
    as_json: bool,
) -> None:
    """Write a bundle: BASE once, as plain, factored and banked graphs, and adapters beside it."""
    from tpeft_deploy.exporters import export_bundle
    from tpeft_deploy.exporters.loading import load_base
    from tpeft_deploy.formats import load_adapter

    repeated = {task for task, _ in adapters if sum(task == other for other, _ in adapters) > 1}
    if repeated:
        raise click.UsageError(f"--adapter names task {min(repeated)!r} twice.")
    with stages() as begin:
        begin("load the base")
        opened = load_base(base, example_inputs=read_inputs(inputs, base), weights=weights)
        begin("read the adapters")
        loaded = {task: load_adapter(path, base=opened.view) for task, path in adapters}
        written = export_bundle(opened, loaded, out, name=name, max_rank=max_rank, folded=with_folded, progress=begin)
    manifest = written.manifest
    document: dict[str, Any] = {
        "path": str(out),
        "name": manifest.name,
        "rows": manifest.rows,
        "tasks": written.tasks,
        "gate": list(manifest.gate),
    }
    emit(document, key="gate", columns=_COLUMNS, as_json=as_json)
