"""`adapter`: add, remove and list the tasks of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tpeft_deploy.cli.bases import part_option, scale_option
from tpeft_deploy.cli.completion import task_names
from tpeft_deploy.cli.console import Assigned, TaskAdapter, emit, json_option, tell_left_out
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Group
from tpeft_deploy.progress import Stage

__all__ = ["adapter"]

_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


@click.group(cls=Group)
def adapter() -> None:
    """Add, remove and list the tasks of a bundle; graphs and other tasks are not changed."""


@adapter.command()
@_BUNDLE
@click.argument("assignment", type=TaskAdapter(), metavar="TASK=ADAPTER[@STRENGTH]")
@scale_option
@part_option
@json_option
def add(bundle: Path, assignment: Assigned, scale: float | None, part: str | None, as_json: bool) -> None:
    """Add ADAPTER as TASK, or replace the adapter of TASK; STRENGTH multiplies its change."""
    from tpeft_deploy.bundle.directory import Bundle
    from tpeft_deploy.composition import at_strength
    from tpeft_deploy.formats import load_adapter

    task, path, strength = assignment
    with stages() as begin:
        begin("open the bundle")
        opened = Bundle.open(bundle)
        begin("read the adapter")
        loaded = load_adapter(path, scale=scale, base=opened.base_view, part=part)
        begin(f"store {task}")
        opened.add(task, at_strength(loaded, strength, task=task))
    document = {"tasks": [{**_describe(opened, task), "left_out": dict(loaded.left_out)}]}
    emit(document, key="tasks", columns=_COLUMNS, as_json=as_json)
    tell_left_out({} if as_json else loaded.left_out, task)


@adapter.command()
@_BUNDLE
@click.argument("task", shell_complete=task_names)
def remove(bundle: Path, task: str) -> None:
    """Remove TASK with all its versions."""
    from tpeft_deploy.bundle.directory import Bundle

    Bundle.open(bundle).remove(task)


@adapter.command("list")
@_BUNDLE
@json_option
def list_(bundle: Path, as_json: bool) -> None:
    """List the tasks, and check each adapter against its digest."""
    from tpeft_deploy.bundle.directory import Bundle

    opened = Bundle.open(bundle)
    manifests = [part.manifest for part in opened.components.values()]
    tolerances = [manifest.tolerance for manifest in manifests if manifest.tolerance is not None]
    described = []
    with stages() as begin:
        for position, task in enumerate(tasks := opened.tasks):
            begin(Stage(f"check {task}", position, len(tasks)))
            described.append(_describe(opened, task))
    document = {
        "bundle": opened.manifest.name,
        "tolerance": max(tolerances, default=None),
        "tasks": described,
    }
    emit(document, key="tasks", columns=_COLUMNS, as_json=as_json)


_COLUMNS = ["task", "digest", "parameters", "bytes", "deltas", "overrides", "folded", "oracle"]


def _describe(bundle: Any, task: str) -> dict[str, Any]:
    loaded = bundle.adapter(task)
    return {
        "task": task,
        "digest": bundle.digest(task),
        "parameters": loaded.parameters,
        "bytes": loaded.nbytes,
        "deltas": len(loaded.deltas),
        "overrides": len(loaded.overrides),
        "oracle": bundle.oracle(task)["oracle"],
        "folded": any((part.path / "folded" / f"{task}.onnx").is_file() for part in bundle.components.values()),
    }
