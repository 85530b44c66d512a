"""`completion`: scripts for shells, and the completion of task names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tpeft_deploy.cli.tool import Command

__all__ = ["completion", "task_names"]

_MOST = 200  # names shown; more help nobody
_VARIABLE = "_TPEFT_DEPLOY_COMPLETE"  # click derives it from the program's name


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands, options and task names in SHELL.

    \b
    bash  echo 'eval "$(tpeft-deploy completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(tpeft-deploy completion zsh)"' >> ~/.zshrc
    fish  tpeft-deploy completion fish > ~/.config/fish/completions/tpeft-deploy.fish
    """  # noqa: D301 - click's mark against rewrapping
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"click completes nothing in {shell}")
    # Not `source`, which starts bash and complains if it is none that completes.
    script = found.source_template % found(ctx.find_root().command, {}, "tpeft-deploy", _VARIABLE).source_vars()
    click.echo(script)


def task_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a task of BUNDLE, or the last one of several with commas between; nothing in it is opened."""
    before, comma, begun = incomplete.rpartition(",")
    # click assigns no arguments where an option, the one that is completed, still lacks its value.
    names = _tasks(ctx.params.get("bundle") or next(iter(ctx.args), None))
    return [f"{before}{comma}{name}" for name in names if name.startswith(begun)][:_MOST]


def _tasks(bundle: Any) -> list[str]:
    if not bundle:
        return []
    try:
        return sorted(file.parent.name for file in Path(bundle).glob("adapters/[!.]*/current"))
    except OSError:  # completion has nobody to tell
        return []
