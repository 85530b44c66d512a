"""Options that several commands share: the base, the adapter's format, and example inputs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import click

from tpeft_deploy.cli.console import Pair
from tpeft_deploy.errors import TpeftError, UnsupportedBase

__all__ = [
    "base_option",
    "format_option",
    "inputs_option",
    "open_base",
    "part_option",
    "read_arrays",
    "read_inputs",
    "rename_option",
    "scale_option",
    "unused_option",
    "weights_option",
]

base_option = click.option(
    "--base",
    metavar="BASE",
    help="Base that ADAPTER was trained on, to resolve and check its names: package.module:factory, a Hugging Face "
    "model directory, an .onnx file, or a bundle.",
)
scale_option = click.option("--scale", type=float, help="Factor of the change, for formats that do not record it.")
part_option = click.option(
    "--part",
    metavar="PREFIX",
    help="Prefix of BASE's names in the adapter, if BASE is a part of the trained model: model.language_model, "
    "lora_unet. Tensors of other parts are left out, and listed.",
)
unused_option = click.option(
    "--unused",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Handling of changes of weights that no output of BASE depends on.",
)
format_option = click.option("--format", help="Format of ADAPTER; detected from its files by default.")
weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Original weights of an .onnx BASE: a .safetensors file, or a Hugging Face model directory.",
)
inputs_option = click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    help="Example inputs: an .npz file with an array for every input of BASE.",
)
rename_option = click.option(
    "--rename",
    type=Pair("OLD=NEW", "output=logits"),
    multiple=True,
    help="New name for an input or output of BASE; repeatable.",
)


def read_arrays(path: Path, doing: str, error_class: type[TpeftError]) -> dict[str, Any]:
    """Read an .npz file with one array per input.

    Raises:
        TpeftError: the file is not an .npz file of arrays; of the class `error_class`.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        got = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise error_class(
            f"{doing} {path}",
            expected="an .npz file with one array per input",
            got=got[:200],
            fix="Write it with numpy.savez(path, **inputs).",
        ) from error


def read_inputs(path: Path | None, base: str) -> dict[str, Any] | None:
    """Read example inputs for a base: arrays for an ONNX file, tensors for a factory's module.

    Args:
        path: .npz file, or None.
        base: base as given on the command line.

    Raises:
        UnsupportedBase: the file is not an .npz file of arrays.
    """
    if path is None:
        return None
    arrays = read_arrays(path, "read example inputs", UnsupportedBase)
    if base.endswith(".onnx"):
        return arrays
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def open_base(base: str | None) -> object:
    """Convert --base to the `base` of `load_adapter`: open a bundle's directory, return other values unchanged.

    Raises:
        BundleError, VersionError, IntegrityError: a directory with a manifest is not a bundle of this version.
    """
    from tpeft_deploy.bundle.directory import MANIFEST, Bundle

    if base is not None and (Path(base) / MANIFEST).is_file():
        return Bundle.open(base)
    return base
