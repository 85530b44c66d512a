"""`verify`: repeat the numeric checks of the export on a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.completion import task_names
from tpeft_deploy.cli.console import emit, json_option, quantised_outputs, tell_quantised
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note

__all__ = ["verify"]


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--task", shell_complete=task_names, help="Task to check; all by default.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="HTML report to write; where BUNDLE has several components, one for each: report.COMPONENT.html.",
)
@click.option(
    "--base",
    metavar="BASE",
    help="Base that BUNDLE was exported from: compare with it instead of with base.onnx with merged weights.",
)
@click.option(
    "--against-source",
    type=click.Path(path_type=Path),
    metavar="ADAPTER",
    help="Adapter file of TASK: also compare with the forward of the library that trained it. Needs a BASE with a "
    "torch module.",
)
@json_option
def verify(
    bundle: Path, task: str | None, report: Path | None, base: str | None, against_source: Path | None, as_json: bool
) -> None:
    """Check BUNDLE's digests, then compare every form of every task, and mixed batches, with merged weights.

    BUNDLE is not changed. If a file was altered, nothing is run and no report is written; if outputs differ, the
    report shows which.
    """
    from tpeft_deploy.exporters import verify_bundle
    from tpeft_deploy.exporters.verify import report_places

    with stages() as begin:
        found = verify_bundle(
            bundle, task=task, base=base, against_source=against_source, report=report, progress=begin
        )
    document = found.to_json() | {"quantised": quantised_outputs(found.bundle)}
    left_out = [
        {
            "form": entry["what"],
            "task": "not checked",
            "sizes": entry["reason"],
            "error": None,
            "limit": None,
            "oracle": None,
        }
        for entry in document["left_out"]
    ]
    shown = document if as_json else {"checks": document["checks"] + left_out}
    emit(shown, key="checks", columns=["form", "task", "sizes", "error", "limit", "oracle"], as_json=as_json)
    tell_quantised([] if as_json else document["quantised"])
    if document["tolerance"] is not None:
        note(f"tolerance: {document['tolerance']:g}, accepted when the bundle was exported")
    if report is not None:
        for place in report_places(found.bundle, report).values():
            note(f"report: {place}")
