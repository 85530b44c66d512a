"""`convert`: convert an adapter from any format to the canonical one, or to one that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tpeft_deploy.cli.bases import base_option, format_option, open_base, scale_option
from tpeft_deploy.cli.console import emit, json_option
from tpeft_deploy.cli.progress_display import stages
from tpeft_deploy.cli.tool import Command, note

if TYPE_CHECKING:
    from tpeft_deploy.adapter import Adapter
    from tpeft_deploy.formats.read.module import BaseView

__all__ = ["convert"]

_GRAPHS = ["factored.onnx", "factored.cuda.onnx"]
_TO = ["tpeft", "peft-lora", "locon", "onnx-adapter"]


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=click.Choice(_TO), help="Format to write.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle with the factored.onnx, for onnx-adapter.")
@click.option("--graph", type=click.Choice(_GRAPHS), default=_GRAPHS[0], help="Graph of --bundle that takes the file.")
@base_option
@scale_option
@format_option
@json_option
def convert(
    adapter: Path,
    out: Path,
    target: str,
    bundle: Path | None,
    graph: str,
    base: str | None,
    scale: float | None,
    format: str | None,
    as_json: bool,
) -> None:
    """Convert ADAPTER to another format, exactly, and write it to OUT.

    \b
    tpeft         the canonical format: OUT is a .safetensors file, or else a directory
    peft-lora     a directory that PEFT loads as plain LoRA, convolutions included
    locon         a .safetensors file that LyCORIS and kohya's tools load
    onnx-adapter  a file for the factored.onnx of --bundle, or for another --graph of it

    Only this command reads pickled adapters (.bin, .pt, .ckpt), with torch.load(weights_only=True).
    """  # noqa: D301 - click's mark against rewrapping
    from tpeft_deploy.formats import load_pickled
    from tpeft_deploy.formats.read.base_view import view

    if (target == "onnx-adapter") != (bundle is not None):
        raise click.UsageError("--to onnx-adapter needs --bundle; other formats do not take it.")
    if target == "locon" and out.suffix != ".safetensors":
        raise click.UsageError("--to locon needs an OUT that ends in .safetensors.")
    _check_free(out)
    with stages() as begin:
        begin("load the base" if base is not None else "read the adapter")
        opened = open_base(base)
        found = None if opened is None else view(opened)
        begin("read the adapter")
        loaded = load_pickled(adapter, format=format, scale=scale, base=found)
        begin("write it")
        _write(loaded, out, target, bundle, graph, found)
    for weight, text in loaded.notes.items():
        note(f"{'adapter' if weight == '*' else weight}: {text}")
    files = sorted(out.rglob("*")) if out.is_dir() else [out]
    document = {
        "source": loaded.source,
        "to": target,
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in files if file.is_file()],
    }
    emit(document, key="files", columns=["path", "bytes"], as_json=as_json)


def _check_free(out: Path) -> None:
    from tpeft_deploy.errors import FormatError

    filled = any(out.iterdir()) if out.is_dir() else out.exists() and out.stat().st_size > 0
    if filled:
        raise FormatError(
            f"convert to {out}",
            expected="a new file, or a new or empty directory",
            got="one with content",
            fix="Remove it or choose another.",
        )


def _write(adapter: Adapter, out: Path, target: str, bundle: Path | None, graph: str, base: BaseView | None) -> None:
    from tpeft_deploy.files import new_directory, new_file
    from tpeft_deploy.formats import canonical
    from tpeft_deploy.formats.write import locon as to_locon
    from tpeft_deploy.formats.write import onnx_adapter
    from tpeft_deploy.formats.write import peft_lora as to_peft_lora

    if target == "peft-lora":
        to_peft_lora.write(adapter, out, base=base)
    elif target == "locon":
        to_locon.write(adapter, out, base=base)
    elif bundle is not None:
        from tpeft_deploy.bundle.directory import Bundle
        from tpeft_deploy.errors import BundleError

        opened = Bundle.open(bundle)
        if all(graph not in part.manifest.files for part in [*opened.parts.values()] or [opened]):
            raise BundleError(
                f"convert to {out}",
                expected=f"a bundle with a {graph}",
                got=f"none in {bundle}",
                fix="Leave out --graph: factored.onnx runs on every device.",
            )
        tensors = opened.feeds(adapter, graph)
        if not opened.parts:
            with new_file(out) as temporary:
                onnx_adapter.write(temporary, tensors)
            return
        with new_directory(out) as new:
            for name, part in opened.parts.items():
                onnx_adapter.write(new / f"{name}.onnx_adapter", part.feeds(adapter, graph))
    elif out.suffix == ".safetensors" and not out.is_dir():
        with new_file(out) as temporary:
            temporary.write_bytes(adapter.to_bytes())
    else:
        with new_directory(out) as new:
            (new / canonical.FILE).write_bytes(adapter.to_bytes())
