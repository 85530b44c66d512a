"""`formats`: list the adapter formats that are read, and those that are refused."""

from __future__ import annotations

import click

from tpeft_deploy.cli.console import emit, json_option
from tpeft_deploy.cli.tool import Command

__all__ = ["formats"]


@click.command(cls=Command)
@click.option("--markdown", is_flag=True, help="Print the page docs/formats.md.")
@json_option
def formats(markdown: bool, as_json: bool) -> None:
    """List the adapter formats that are read, and those that are refused, with the reason."""
    from tpeft_deploy.formats import catalogue

    if markdown:
        click.echo(catalogue.markdown(), nl=False)
        return
    found = catalogue.document()
    emit(found, key="read", columns=catalogue.READ_COLUMNS, as_json=as_json)
    if not as_json:
        click.echo("\nrefused")
        emit(found, key="refused", columns=catalogue.REFUSED_COLUMNS, as_json=False)
