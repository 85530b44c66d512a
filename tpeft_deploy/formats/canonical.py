"""The canonical adapter file of tpeft_deploy, as bundles store it (`Adapter.to_bytes` writes it)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import FormatError, brief
from tpeft_deploy.formats.read.safetensors_file import parse_json, read_bytes, read_tensors
from tpeft_deploy.formats.reader import About
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "FILE", "HEADER", "NAME", "from_bytes", "from_tensors", "read"]

NAME = "tpeft"
ABOUT = About("tpeft_deploy", "any", "all", "no", "low-rank, dense, gain, override")
FILE = "adapter.safetensors"
HEADER = "tpeft"  # metadata entry that identifies a canonical file, whatever its name


def read(path: Path) -> Adapter:
    """Read the canonical file at `path`, or in the directory `path`."""
    file = path / FILE if path.is_dir() else path
    return from_bytes(read_bytes(file), source=str(path))


def from_bytes(data: bytes, *, source: str) -> Adapter:
    """Read a canonical file held in memory.

    Raises:
        FormatError: the file is damaged, has another schema, or has a tensor without a target.
    """
    return from_tensors(*read_tensors(data, source=source), source=source)


def from_tensors(tensors: Mapping[str, Array], metadata: Mapping[str, str], *, source: str) -> Adapter:
    """Build an adapter from the tensors and metadata of a canonical file.

    Raises:
        FormatError: the file has another schema, or a tensor without a target.
    """
    tensors = dict(tensors)
    header = _header(metadata, source=source)
    overrides, gains = _take(tensors, "override/"), _take(tensors, "gain/")
    deltas = {target: _delta(tensors, target, scale, source) for target, scale in header.scales.items()}
    if tensors:
        raise FormatError(f"read {source}, tensor {min(tensors)!r}", problem="it belongs to no target of the header")
    return Adapter(deltas, overrides, header.base_digests, source, gains, labels=header.labels)


def _take(tensors: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


class _Header(NamedTuple):
    scales: dict[str, float]
    base_digests: dict[str, str]
    labels: HeadLabels | None


def _header(metadata: Mapping[str, str], *, source: str) -> _Header:
    try:
        header = parse_json(metadata[HEADER])
        if header["schema"] != 1:
            raise FormatError(
                f"read {source}",
                expected="adapter schema 1",
                got=header["schema"],
                fix="Read it with the version of tpeft-deploy that wrote it.",
            )
        scales = {str(target): float(scale) for target, scale in header["scales"].items()}
        digests = {str(target): str(digest) for target, digest in header["base_digests"].items()}
        labels = header.get("labels", {})
        return _Header(scales, digests, HeadLabels.checked(labels.get("names"), labels.get("problem")))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(
            f"read {source}",
            expected="a header written by tpeft-deploy",
            got=f"none that can be read ({brief(repr(error))})",
        ) from error


def _delta(tensors: dict[str, Array], target: str, scale: float, source: str) -> TuckerDelta:
    try:
        core = tensors.pop(f"delta/{target}/core")
        factors = tuple(tensors.pop(f"delta/{target}/factor.{m}", None) for m in range(core.ndim))
        return TuckerDelta(core, factors, scale)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"read {source}, weight {target!r}", problem=f"its tensors do not fit ({error})") from error
