"""`run`: run one batch through a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.bases import read_arrays
from tpeft_deploy.cli.completion import task_names
from tpeft_deploy.cli.console import devices_option, emit, json_option, provider_option, tf32_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note
from tpeft_deploy.errors import InputError

if TYPE_CHECKING:
    from tpeft_deploy.tucker import Array

__all__ = ["run"]


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--input", "source", required=True, type=click.Path(path_type=Path), help="An .npz file with one array per input."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The .npz file to write.")
@click.option("--task", shell_complete=task_names, help="Task of all rows; the base by default.")
@click.option("--tasks", shell_complete=task_names, help="One task per row, separated by commas: A,B,A.")
@click.option("--component", help="Component to run; needed where the bundle has several.")
@click.option("--outputs", help="Outputs to write, separated by commas; all by default.")
@provider_option
@devices_option
@tf32_option
@json_option
def run(
    bundle: Path,
    source: Path,
    output: Path,
    task: str | None,
    tasks: str | None,
    component: str | None,
    outputs: str | None,
    provider: str,
    devices: list[int] | None,
    allow_tf32: bool,
    as_json: bool,
) -> None:
    """Run a batch of rows through BUNDLE.

    With --tasks, an output with sizes that differ between the rows is written as one array per row: NAME.0, NAME.1
    and so on.
    """
    from tpeft_deploy.files import new_file
    from tpeft_deploy.runtime import Runtime

    if task is not None and tasks is not None:
        raise click.UsageError("--task and --tasks exclude each other.")
    inputs = read_arrays(source, "read inputs", InputError)
    options: Any = {"provider": provider, "devices": devices, "allow_tf32": allow_tf32}
    selected: Any = {"outputs": outputs.split(",") if outputs is not None else None, "component": component}
    with stages() as begin:
        begin("open the bundle")
        runtime = Runtime(bundle, **options, preload=False, own_copy=False)
        if runtime.only_folded:
            for name in {*(tasks or task or "base").split(",")} - {"base"}:
                begin(f"fold {name}")
                runtime.pin(name, folded=True)
        begin("run")
        if tasks is not None:
            results = runtime.run(inputs, tasks=tasks.split(","), **selected)
        else:
            results = dict(runtime.run(inputs, task or "base", **selected))
    arrays = _flat(results)
    with new_file(output) as temporary, temporary.open("wb") as stream:
        import numpy as np

        np.savez(stream, **arrays)  # type: ignore[arg-type]
    note(f"provider: {runtime.provider} ({runtime.provider_reason})")
    document = {
        "path": str(output),
        "provider": runtime.provider,
        "outputs": [{"output": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in arrays.items()],
    }
    emit(document, key="outputs", columns=["output", "dtype", "shape"], as_json=as_json)


def _flat(results: Mapping[str, Array | list[Array]]) -> dict[str, Array]:
    import numpy as np

    arrays: dict[str, Array] = {}
    for name, value in results.items():
        if not isinstance(value, list):
            arrays[name] = value
        elif len({row.shape for row in value}) == 1:
            arrays[name] = np.stack(value)
        else:
            arrays |= {f"{name}.{i}": row for i, row in enumerate(value)}
    return arrays
