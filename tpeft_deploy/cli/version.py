"""`--version`: versions of the package, of Python and of ONNX Runtime, with its providers."""

from __future__ import annotations

import platform

import click

from tpeft_deploy import __version__

__all__ = ["describe", "version_option"]


def describe() -> str:
    """Return one line; onnxruntime is not imported for it, so the providers are those of its build."""
    from tpeft_deploy.installed import ONNX_RUNTIMES, onnx_runtimes

    found = onnx_runtimes()
    runtimes = ", ".join(f"{name} {version} ({', '.join(ONNX_RUNTIMES[name])})" for name, version in found.items())
    if len(found) > 1:
        runtimes += ", which overwrite each other: see 'tpeft-deploy doctor'"
    python = f"{platform.python_implementation().replace('CPython', 'Python')} {platform.python_version()}"
    return f"tpeft-deploy {__version__}, {python}, {runtimes or 'without ONNX Runtime'}"


def _show(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(describe())
        context.exit()


version_option = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show,
    help="Show the versions of the package, of Python and of ONNX Runtime with its providers.",
)
