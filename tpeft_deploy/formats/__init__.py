"""Read adapters of all training libraries.

Three kinds of files are distinguished by their content:

    tpeft           the canonical file (`canonical`)
    peft-tucker     a directory that PEFT saved for `tpeft_deploy.training` (`peft_tucker`)
    anything else   tensors `<module>.<suffix>` of a PEFT directory or a .safetensors file, each module read by the
                    first of `readers.READERS` that matches
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from tpeft_deploy.adapter import Adapter, Origin, without
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import canonical, checkpoint
from tpeft_deploy.formats.peft import tucker as peft_tucker
from tpeft_deploy.formats.read.base_view import Lazy, view
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.read.parts import cut_adapter
from tpeft_deploy.formats.read.saved import diffusers_file, peft_directory, peft_type, read_labels, read_saved
from tpeft_deploy.formats.readers import READERS

__all__ = ["FORMATS", "load_adapter", "load_pickled", "methods_of", "origin_of"]

FORMATS = (canonical.NAME, peft_tucker.NAME, *(reader.name for reader in READERS))


def load_adapter(
    path: str | os.PathLike[str],
    format: str | None = None,
    scale: float | None = None,
    base: object = None,
    part: str | None = None,
) -> Adapter:
    """Read an adapter from where it was trained.

    Args:
        path: directory or file that the training side saved.
        format: one of `FORMATS`; default: detected from the files, module by module.
        scale: for formats that do not record their scale; refused by those that do.
        base: model that the adapter was trained on, to resolve names against and to check it with: a torch module, a
            Hugging Face model directory, "package.module:factory", an open bundle, or the path of an ONNX file with the
            parameters' names as initializers.  Some formats cannot be read without.
        part: prefix of the names of one part of the trained model, which `base` is: "model.language_model",
            "lora_unet".  Names without it are left out, and listed in the adapter's `left_out`.

    Returns:
        The canonical adapter.

    Raises:
        FormatError: nothing there, an unknown, damaged or refused format, a tensor that nothing understands, a
            `scale` or `base` that is missing, a `scale` that the format records itself, or no name of that `part`.
        UnsupportedBase: a directory or a factory gives no model.
        UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit `base`.
    """
    return _load(Path(path), format, scale, base, part, pickles=False)


def load_pickled(
    path: str | os.PathLike[str],
    format: str | None = None,
    scale: float | None = None,
    base: object = None,
) -> Adapter:
    """`load_adapter` that reads pickles too (.bin, .pt, .ckpt), with torch's reader that knows tensors alone.

    Only for the command line's `convert`, where the user names the file.

    Raises:
        MissingExtra: a pickle, and torch is not installed.
    """
    return _load(Path(path), format, scale, base, None, pickles=True)


def _load(
    path: Path, format: str | None, scale: float | None, base: object, part: str | None, *, pickles: bool
) -> Adapter:
    if not path.exists():
        raise _nothing(path)
    if format is not None and format not in FORMATS:
        raise FormatError(f"read adapter {path}", expected=f"a format of {', '.join(FORMATS)}", got=repr(format))
    if scale is not None and not -float("inf") < scale < float("inf"):
        raise FormatError(f"read adapter {path}", expected="a finite scale", got=scale)
    found = None if base is None else view(base)
    # What overflows becomes infinite, and every delta, override and gain is refused then, by name.
    with np.errstate(over="ignore", invalid="ignore"):
        adapter = _read(path, format, scale, found, part, pickles=pickles)
    place = peft_directory(path)
    if place is not None and adapter.labels is None:
        adapter = replace(adapter, labels=read_labels(place))
    if found is not None:
        _check_base(adapter, found)
    return adapter


def origin_of(path: Path) -> Origin | None:
    """Path that a training library would read; None for a directory or file that none of them writes.

    Raises:
        FormatError: nothing there.
    """
    if not path.exists():
        raise _nothing(path)
    place = peft_directory(path)
    if place is not None:
        return Origin(place.absolute(), "peft")
    path = diffusers_file(path) or path
    return Origin(path.absolute(), "safetensors") if path.is_file() and path.suffix == ".safetensors" else None


def methods_of(path: Path, base: BaseView | None = None, format: str | None = None) -> dict[str, int]:
    """Format -> number of modules of an adapter that it reads; empty if the files do not show it.

    Raises:
        FormatError: a file is damaged.
    """
    whole = _whole_format(path, format)
    if whole is not None:
        adapter = whole.read(path)
        count = len({*adapter.deltas, *adapter.gains})
        return {whole.NAME: count} if count else {}
    if not path.exists() or (path.is_dir() and peft_directory(path) is None):
        return {}
    return checkpoint.methods(read_saved(path, pickles=False), base=base, format=format)


def _read(
    path: Path, format: str | None, scale: float | None, base: BaseView | None, part: str | None, *, pickles: bool
) -> Adapter:
    whole = _whole_format(path, format)
    if whole is not None:
        adapter = _whole(whole.read(path), scale, part, base)
        return adapter if whole is canonical else replace(adapter, origin=_origin(path, part))
    path = diffusers_file(path) or path
    if path.is_dir() and peft_directory(path) is None:
        raise FormatError(
            f"read adapter {path}",
            expected=f"a directory with {canonical.FILE}, or with adapter_config.json as PEFT saves it",
            got=f"one with {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'no files'}",
            fix="Give the .safetensors file itself.",
        )
    saved = read_saved(path, pickles=pickles)
    if format is None and canonical.HEADER in saved.metadata:
        own = canonical.from_tensors(saved.tensors, saved.metadata, source=saved.source)
        return _whole(own, scale, part, base)
    adapter = checkpoint.read(saved, scale=scale, base=base, format=format, part=part)
    return adapter if pickles else replace(adapter, origin=_origin(path, part))


def _whole_format(path: Path, format: str | None) -> ModuleType | None:
    """Reader of the whole adapter, for a format that is not read module by module."""
    if format == canonical.NAME or (format is None and (path / canonical.FILE).is_file()):
        return canonical
    if format == peft_tucker.NAME or (format is None and peft_type(path) == peft_tucker.TYPE):
        return peft_tucker
    return None


def _origin(path: Path, part: str | None) -> Origin | None:
    origin = origin_of(path)
    return origin if origin is None else replace(origin, part=part or "")


def _nothing(path: Path) -> FormatError:
    return FormatError(
        f"read adapter {path}", expected="a file or directory", got="nothing there", fix="Check the path."
    )


def _whole(adapter: Adapter, scale: float | None, part: str | None, base: BaseView | None) -> Adapter:
    """An adapter that is read as a whole, cut to a part."""
    if scale is not None:
        raise FormatError(
            f"read {adapter.source}",
            expected="no scale, as this format records it",
            got=f"scale={scale}",
            fix="Leave scale out.",
        )
    return adapter if part is None else cut_adapter(adapter, part, base)


def _check_base(adapter: Adapter, base: BaseView) -> None:
    adapter = without(adapter, base.unread)
    adapter.check_shapes(Lazy(base.weights, base.shape), base=base.name)
    digests = {name: base.digest(name) for name in adapter.base_digests if name in base.weights}
    adapter.check_digests(digests, base=base.name)
