"""`verify`: the numeric gate again, on a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

from tpeft_deploy.cli.console import Command, emit, json_option, note, stages

__all__ = ["verify"]


@click.command(cls=Command)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--task", help="The only task to check; all of them when left out.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="An HTML page to write, for people.")
@click.option(
    "--base",
    metavar="BASE",
    help="What BUNDLE was exported from: compare with that instead of base.onnx with merged weights.",
)
@click.option(
    "--against-source",
    type=click.Path(path_type=Path),
    metavar="ADAPTER",
    help="What TASK was read from: compare its forms with the forward of the library that trained it, too. Needs a "
    "BASE with a torch module.",
)
@json_option
def verify(
    bundle: Path, task: str | None, report: Path | None, base: str | None, against_source: Path | None, as_json: bool
) -> None:
    """Check BUNDLE's digests, then every form of every task, and rows of different tasks, against merged weights.

    Nothing in BUNDLE is changed. A bundle with an altered file is not run and has no report; one whose answers differ
    has a report that shows where.
    """
    from tpeft_deploy.exporters import verify_bundle

    with stages() as begin:
        found = verify_bundle(
            bundle, task=task, base=base, against_source=against_source, report=report, progress=begin
        )
    document = found.to_json()
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
    if document["tolerance"] is not None:
        note(f"tolerance: {document['tolerance']:g}, accepted when the bundle was exported")
    if report is not None:
        note(f"report: {report}")
