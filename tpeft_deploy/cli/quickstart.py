"""`quickstart`: train, export and serve on a small data set."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpeft_deploy.cli.console import emit, json_option, provider_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command

if TYPE_CHECKING:
    from tpeft_deploy.quickstart import Results

__all__ = ["quickstart"]


@click.command(cls=Command)
@click.option(
    "--out",
    default="quickstart",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Directory for the bundle, the adapters and the report.",
)
@provider_option
@json_option
def quickstart(out: Path, provider: str, as_json: bool) -> None:
    """Train a base and five adapters on handwritten digits, export them, run mixed batches, and write a report."""
    from tpeft_deploy.quickstart import run_quickstart

    with stages() as begin:
        results = run_quickstart(out, provider=provider, on_stage=begin)
    if as_json:
        emit(results.to_json(), key="tasks", columns=[], as_json=True)
        return
    copy = results.base.bytes
    rows = [
        {
            "task": task.task,
            "base": f"{task.base:.1%}",
            "torch": f"{task.torch:.1%}",
            "folded": f"{task.folded:.1%}",
            "factored": f"{task.factored:.1%}",
            "banked, mixed rows": f"{task.banked:.1%}",
            "worst logit error": f"{max(task.errors.values()):.1e}",
            "bytes": f"{task.adapter_bytes:,}",
            "of a full copy": f"{task.adapter_bytes / copy:.0%}",
        }
        for task in results.tasks
    ]
    emit({"tasks": rows}, key="tasks", columns=list(rows[0]), as_json=False)
    for line in _remarks(out, results):
        click.echo(line)


def _remarks(out: Path, results: Results) -> list[str]:
    cost, seconds = results.switching, results.seconds
    tool = _tool()
    bundle, sample = shlex.quote(str(out / "bundle")), shlex.quote(str(out / "sample.npz"))
    adapter, answers = shlex.quote(str(out / "adapters" / "upright")), shlex.quote(str(out / "answers.npz"))
    return [
        "",
        (
            f"accuracy on {results.test_digits} held-out digits; every banked batch of {results.rows_per_batch} rows "
            f"mixes all tasks and the base ({results.base.banked:.1%} on upright digits)"
        ),
        (
            f"switching tasks costs {cost.switch_us:+.0f} us on a run of {cost.repeat_us:.0f} us; "
            f"opening a separate session costs {cost.session_us:,.0f} us"
        ),
        (
            f"{seconds['total']:.0f} s in total on {results.provider}: {seconds['train']:.0f} s training, "
            f"{seconds['export']:.0f} s exporting, {seconds['measure']:.0f} s measuring"
        ),
        f"report: {out / 'report.html'}",
        "",
        "next steps with this bundle:",
        f"  {tool} adapter list {bundle}",
        f"  {tool} inspect {adapter}",
        f"  {tool} run {bundle} --input {sample} --output {answers} --tasks {','.join(results.sample.tasks)}",
    ]


def _tool() -> str:
    """Command with which the user can call this tool: its name if it is on the path, else its path."""
    found = shutil.which("tpeft-deploy")
    here = Path(sys.argv[0])
    if found is not None and here.exists() and Path(found).resolve() == here.resolve():
        return "tpeft-deploy"
    return shlex.quote(os.path.relpath(here)) if here.name == "tpeft-deploy" else "tpeft-deploy"
