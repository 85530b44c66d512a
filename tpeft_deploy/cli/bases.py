"""What --base means where an adapter is read: the names and values it was trained on."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["base_option", "format_option", "open_base", "scale_option"]

base_option = click.option(
    "--base",
    metavar="BASE",
    help="What ADAPTER was trained on, package.module:factory or an .onnx file: resolves its names and checks it.",
)
scale_option = click.option(
    "--scale", type=float, help="What the change is multiplied by, for formats that do not record it."
)
format_option = click.option("--format", help="The format to read ADAPTER as; found from its files when left out.")


def open_base(base: str | None) -> object:
    """What `load_adapter` takes as base: None, the path of an ONNX file, or a torch module."""
    if base is None:
        return None
    if base.endswith(".onnx"):
        return Path(base)
    from tpeft_deploy.exporters.loading import load_base

    return load_base(base).view
