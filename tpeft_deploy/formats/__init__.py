"""Reading adapters: one file per format, each with the same verbs.

NAME            the format's name, as `load_adapter(format=...)` and `inspect` give it
matches(path)   whether a file or directory is in that format, from names and config alone
read(path)      the adapter, or an AdapterError that says what is wrong
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats import canonical, peft_tucker

__all__ = ["FORMATS", "load_adapter"]


class Format(NamedTuple):
    """The verbs of one format."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], Adapter]


FORMATS: dict[str, Format] = {
    canonical.NAME: Format(canonical.matches, canonical.read),
    peft_tucker.NAME: Format(peft_tucker.matches, peft_tucker.read),
}


def load_adapter(
    path: str | os.PathLike[str],
    format: str | None = None,
    scale: float | None = None,
    base: object = None,
) -> Adapter:
    """Read an adapter from where it was trained.

    Args:
        path: what the training side saved: a directory or a file.
        format: one of `FORMATS`; found from the files when left out.
        scale: for formats that do not record their scale; refused by those that do.
        base: a torch module to check names, shapes and the recorded base digests against.

    Returns:
        The canonical adapter.

    Raises:
        FormatError: nothing there, an unknown or damaged format, or a `scale` that the format records itself.
        UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit `base`.
    """
    path = Path(path)
    adapter = FORMATS[_format_name(path, format)].read(path)
    if scale is not None:
        raise FormatError(
            f"read {path}",
            expected="no scale, as this format records its own",
            got=f"scale={scale}",
            fix="Leave scale out.",
        )
    if base is not None:
        _check_base(adapter, base)
    return adapter


def _format_name(path: Path, asked: str | None) -> str:
    if not path.exists():
        raise FormatError(
            f"read adapter {path}", expected="a file or directory", got="nothing there", fix="Check the path."
        )
    if asked is not None:
        if asked not in FORMATS:
            raise FormatError(f"read adapter {path}", expected=f"a format of {', '.join(FORMATS)}", got=repr(asked))
        return asked
    for name, candidate in FORMATS.items():
        if candidate.matches(path):
            return name
    raise FormatError(
        f"read adapter {path}",
        expected=f"files in a format of {', '.join(FORMATS)}",
        got=_describe(path),
        fix="Save it with save_pretrained from a tpeft_deploy.training.TuckerConfig model.",
    )


def _describe(path: Path) -> str:
    if path.is_file():
        return f"a file {path.suffix or 'without a suffix'}"
    kind = peft_tucker.peft_type(path)
    if kind is not None:
        return f"a PEFT adapter of peft_type {kind!r}, which this version does not read"
    return f"a directory with {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'no files'}"


def _check_base(adapter: Adapter, base: object) -> None:
    named = getattr(base, "named_parameters", None)
    if named is None:
        raise FormatError(
            f"check {adapter.source} against its base",
            expected="a torch module as base",
            got=f"{type(base).__name__}",
        )
    weights = dict(named(remove_duplicate=False)) | dict(base.named_buffers())  # type: ignore[attr-defined]
    name = type(base).__name__
    adapter.check_shapes({n: tuple(w.shape) for n, w in weights.items()}, base=name)
    digests = {
        n: weight_digest(weights[n].detach().float().cpu().numpy()) for n in adapter.base_digests if n in weights
    }
    adapter.check_digests(digests, base=name)
