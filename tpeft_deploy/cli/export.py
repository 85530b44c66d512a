"""`export`: export a base and adapters to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.bases import (
    inputs_option,
    part_option,
    read_inputs,
    rename_option,
    scale_option,
    unused_option,
    weights_option,
)
from tpeft_deploy.cli.console import (
    Assigned,
    Pair,
    TaskAdapter,
    emit,
    json_option,
    number,
    quantised_outputs,
    tell_left_out,
    tell_quantised,
)
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Group
from tpeft_deploy.progress import Stage

if TYPE_CHECKING:
    from tpeft_deploy.bundle.directory import Bundle

__all__ = ["export"]

_COLUMNS = ["form", "task", "sizes", "error", "limit"]


@click.group(cls=Group)
def export() -> None:
    """Export a base with adapters to ONNX; every export is compared with the merged torch model.

    BASE is one of: package.module:factory, a callable that returns (module, example inputs) or (module, example
    inputs, dynamic shapes), or for a bundle of several graphs a dict of Component, searched in the working directory
    too; a Hugging Face model directory; an .onnx file from any exporter, with its original weights in --weights or
    their digests in ADAPTER.
    """


_OPTIONS = (
    weights_option,
    inputs_option,
    rename_option,
    part_option,
    unused_option,
    click.option(
        "--resize-embeddings",
        is_flag=True,
        help="Resize the embeddings of BASE to the number of tokens in the adapters, as resize_token_embeddings does.",
    ),
    click.option(
        "--tolerance",
        type=float,
        help="Relative error to accept in float32, 1e-5 to 1e-3; 1e-5 by default. It is recorded in the export.",
    ),
    click.option(
        "--quantise",
        type=click.Choice(["int8", "int4"]),
        help="Keep the weights of products in 8 or 4 bits, and for int8 the kernels of convolutions; branches stay in "
        "float32. The distance from the model in float32 is recorded in the export.",
    ),
    click.option(
        "--activations",
        type=click.Choice(["int8", "float"]),
        default="int8",
        help="With --quantise: whether the CPU rounds the inputs of quantised products to 8 bits, which makes them "
        "fast (the default), or computes in float32.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Print targets, ranks and bytes of the export; write and check nothing."
    ),
    json_option,
)


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@export.command()
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="ONNX file to write.")
@scale_option
@_shared_options
def folded(
    base: str,
    adapter: Path,
    out: Path | None,
    weights: Path | None,
    inputs: Path | None,
    rename: Sequence[tuple[str, str]],
    scale: float | None,
    part: str | None,
    unused: Any,
    resize_embeddings: bool,
    tolerance: float | None,
    quantise: Any,
    activations: Any,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge ADAPTER into BASE: a plain ONNX model, as fast as the base."""
    from tpeft_deploy.exporters import export_folded
    from tpeft_deploy.exporters.bases.load import load_base
    from tpeft_deploy.exporters.folded import plan_folded
    from tpeft_deploy.formats import load_adapter

    place = None if dry_run else _place(out)
    options: Any = {"resize_embeddings": resize_embeddings, "unused": unused}
    with stages() as begin:
        begin("load the base")
        opened = load_base(base, example_inputs=read_inputs(inputs, base), weights=weights, rename=dict(rename))
        begin("read the adapter")
        loaded = load_adapter(adapter, scale=scale, base=opened.view, part=part)
        if place is None:
            plan = plan_folded(opened, loaded, progress=begin, **options)
        else:
            options |= {"tolerance": tolerance, "quantise": quantise, "activations": activations}
            checks = export_folded(opened, loaded, place, task=adapter.name, progress=begin, **options)
    if place is None:
        emit(plan, key="targets", columns=["target", "change", "shape", "ranks", "bytes"], as_json=as_json)
        if not as_json:
            click.echo(f"base: {plan['base_bytes']:,} bytes of weights; folded: {plan['bytes']:,}")
        return
    gate = [check.to_json() for check in checks]
    document = {
        "path": str(out),
        "bytes": place.stat().st_size,
        "gate": gate,
        "left_out": dict(loaded.left_out),
    }
    emit(document, key="gate", columns=[*_COLUMNS, "oracle"], as_json=as_json)
    tell_left_out({} if as_json else loaded.left_out)


@export.command()
@click.argument("base")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--adapter",
    "adapters",
    type=TaskAdapter(),
    multiple=True,
    help="Name of a task, path of its adapter, and factor of its change; repeatable.",
)
@click.option("--max-rank", type=click.IntRange(min=1), help="Largest rank of an adapter, now and later.")
@click.option("--name", help="Name of the bundle; by default the directory's.")
@click.option(
    "--pad",
    "padding",
    type=Pair("NAME=VALUE", "attention_mask=0", number),
    multiple=True,
    help="Padding value of input NAME, so that requests of different lengths share a run; tested; repeatable.",
)
@click.option(
    "--exclude",
    multiple=True,
    help="Pattern (* and ?) of weights or modules that no adapter of the bundle may change; repeatable.",
)
@click.option(
    "--generation",
    is_flag=True,
    help="Export a model that generates for it: with caches of fixed size, updated in place.",
)
@click.option(
    "--pooling",
    type=click.Choice(["cls", "mean", "last"]),
    help="State of a text's tokens that its embedding is made of: the first, the mean or the last; by default as the "
    "files of sentence-transformers in BASE say.",
)
@click.option("--folded", "with_folded", is_flag=True, help="Also write folded/TASK.onnx for every adapter.")
@_shared_options
def bundle(
    base: str,
    out: Path | None,
    adapters: Sequence[Assigned],
    max_rank: int | None,
    name: str | None,
    padding: Sequence[tuple[str, int | float]],
    exclude: Sequence[str],
    generation: bool,
    pooling: Any,
    with_folded: bool,
    weights: Path | None,
    inputs: Path | None,
    rename: Sequence[tuple[str, str]],
    part: str | None,
    unused: Any,
    resize_embeddings: bool,
    tolerance: float | None,
    quantise: Any,
    activations: Any,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a bundle: plain, factored and banked graphs that share the weights of BASE, and the adapters."""
    from tpeft_deploy.composition import at_strength
    from tpeft_deploy.exporters import export_bundle
    from tpeft_deploy.exporters.bases.load import load_base
    from tpeft_deploy.exporters.components import dry_run as plan_export
    from tpeft_deploy.exporters.components import find_components
    from tpeft_deploy.exporters.quantisation.packs import choice_of
    from tpeft_deploy.formats import load_adapter
    from tpeft_deploy.formats.base.model import called

    _refuse_twice("--adapter names task", [task for task, _, _ in adapters])
    _refuse_twice("--pad names input", [name for name, _ in padding])
    options: Any = {
        "max_rank": max_rank,
        "padding": dict(padding) or None,
        "resize_embeddings": resize_embeddings,
        "unused": unused,
        "exclude": exclude,
    }
    place = None if dry_run else _place(out)
    with stages() as begin:
        begin("load the base")
        given: Any = {"example_inputs": read_inputs(inputs, base), "weights": weights, "rename": dict(rename)}
        made = called(base)
        opened: Any = find_components(made, generation, pooling)
        if opened is not None:
            options |= given
        else:
            opened = load_base(made, **given, generation=generation)
        view = getattr(opened, "view", opened)
        loaded = {}
        for position, (task, path, strength) in enumerate(adapters):
            begin(Stage(f"read {task}", position, len(adapters)))
            loaded[task] = at_strength(load_adapter(path, base=view, part=part), strength, task=task)
        if place is None:
            named = name or (out.resolve().name if out is not None else "bundle")
            options["choice"] = choice_of(quantise, activations, "plan the export")
            plan = plan_export(opened, loaded, name=named, progress=begin, **options)
        else:
            options |= {"folded": with_folded, "tolerance": tolerance, "pooling": pooling}
            options |= {"quantise": quantise, "activations": activations}
            written = export_bundle(opened, loaded, place, name=name, progress=begin, **options)
    if place is None:
        _show_plan(plan, as_json)
    else:
        _show_written(written, as_json)


def _show_written(written: Bundle, as_json: bool) -> None:
    manifests = {name: part.manifest for name, part in written.components.items()}
    tolerances = [manifest.tolerance for manifest in manifests.values() if manifest.tolerance is not None]
    left_out = {task: names for manifest in manifests.values() for task, names in manifest.left_out.items()}
    oracles = {task: written.oracle(task) for task in written.tasks}
    document: dict[str, Any] = {
        "path": str(written.path),
        "name": written.manifest.name,
        "rows": "group" if any(manifest.rows == "group" for manifest in manifests.values()) else "each",
        "tolerance": max(tolerances, default=None),
        "tasks": written.tasks,
        "gate": [
            {**check, "form": f"{name} {check['form']}" if written.parts else check["form"]}
            for name, manifest in manifests.items()
            for check in manifest.gate
        ],
        "oracles": oracles,
        "left_out": left_out,
        "quantised": quantised_outputs(written),
    }
    emit(document, key="gate", columns=_COLUMNS, as_json=as_json)
    tell_quantised([] if as_json else document["quantised"])
    for task, record in () if as_json else oracles.items():
        why = f": {record['reason']}" if record["reason"] else ""
        click.echo(f"task {task}: oracle {record['oracle']}, error {record['error']:.3g}{why}")
    for task, names in () if as_json else left_out.items():
        tell_left_out(names, task)


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise click.UsageError(f"{what} {min(repeated)!r} twice.")


def _place(out: Path | None) -> Path:
    if out is None:
        raise click.UsageError("Missing option '--out'; only --dry-run does not need it.")
    return out


def _show_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit(plan, key="targets", columns=[], as_json=True)
        return
    rows = [
        {
            **({"component": target["component"]} if "component" in target else {}),
            "target": target["target"],
            "kind": target["kind"],
            "shape": target["shape"],
            "rows": target["rows"] or "by running",
            "ranks": "; ".join(f"{task}: {_ranks(ranks)}" for task, ranks in target["ranks"].items()) or "-",
            "bytes": target["bytes"],
        }
        for target in plan["targets"]
    ]
    columns = list(rows[0]) if rows else ["target", "kind", "shape", "rows", "ranks", "bytes"]
    emit({"targets": rows}, key="targets", columns=columns, as_json=False)
    click.echo(f"base: {plan['base_bytes']:,} bytes of weights, shared by all graphs")
    for task in plan["tasks"]:
        size = f"{task['bytes']:,} bytes, {task['share']:.1%} of the base, as branches {task['slot_bytes']:,} bytes"
        click.echo(f"task {task['task']}: {task['parameters']:,} parameters, {size}")
    found = f"group ({plan['rows_reason']})" if plan["rows"] else "detected by running the graphs"
    click.echo(f"rows of different tasks in a batch: {found}")


def _ranks(ranks: dict[str, int]) -> str:
    return ", ".join(f"{letter} {size}" for letter, size in ranks.items()) or "whole"
