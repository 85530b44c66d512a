"""Reader of the directory that PEFT's `save_pretrained` writes for a `tpeft_deploy.training.TuckerConfig` model.

adapter_config.json holds the scale and the digests of the base, adapter_model.safetensors the tensors, under
`base_model.model.`:

    <module>.tucker_core                one rank per mode of the stored weight: (R_o, R_i, R_k1, ...), for
                                        transposed convolutions and transformers' Conv1D (R_i, R_o, R_k1, ...)
    <module>.tucker_factor.<mode>       (mode size, rank); absent if the mode is an identity
    <parameter or buffer>               whole tensor of modules_to_save
    <module>.base_layer.<parameter>     copy of an adapted embedding's base, which PEFT saves unasked
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.errors import FormatError, ShapeError, brief
from tpeft_deploy.formats.peft.config import finite
from tpeft_deploy.formats.read.names import PEFT_PREFIX
from tpeft_deploy.formats.read.safetensors_file import read_bytes, read_tensors
from tpeft_deploy.formats.read.saved import CONFIG, TENSORS, read_config
from tpeft_deploy.formats.reader import About
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "TYPE", "read"]

NAME = "peft-tucker"
TYPE = "TPEFT_TUCKER"  # equals tpeft_deploy.training.PEFTTYPE, which imports torch
ABOUT = About(
    "tpeft_deploy.training with PEFT",
    "Tucker",
    "linear, Conv1D, conv 1d to 3d, transposed conv, embedding",
    "no",
    "low-rank, override",
    types=(TYPE,),
)

_CORE = re.compile(r"(?P<module>.+)\.tucker_core")
_FACTOR = re.compile(r"(?P<module>.+)\.tucker_factor\.(?P<mode>[0-9])")
_SAVE_AGAIN = "Save the adapter again with save_pretrained."


def read(path: Path) -> Adapter:
    """Read a directory that `save_pretrained` wrote.

    Raises:
        FormatError: a file is missing, truncated or holds NaN; a tensor is unknown or does not fit the others; the
            configuration lacks the scale.
    """
    source = str(path)
    config = read_config(path / CONFIG)
    if config.get("peft_type") != TYPE:
        raise FormatError(f"read {source}", expected=f"peft_type {TYPE!r}", got=repr(config.get("peft_type")))
    scale, digests = _scale(config, source), _digests(config, source)
    tensors = _tensors(path, source)
    factors: dict[str, dict[int, Array]] = {}
    for match, factor in _take(tensors, _FACTOR):
        factors.setdefault(match["module"], {})[int(match["mode"])] = factor
    deltas = {
        f"{match['module']}.weight": _delta(match["module"], core, factors.pop(match["module"], {}), scale, source)
        for match, core in _take(tensors, _CORE)
    }
    overrides = _overrides(tensors, deltas, digests, source)
    for module in sorted(factors):
        raise _incomplete(source, f"module {module!r}", "tucker_core")
    for target in sorted(digests.keys() - deltas.keys()):
        raise _incomplete(source, f"weight {target!r}, which the configuration names as adapted", "tucker_core")
    return Adapter(deltas, overrides, digests, source)


def _incomplete(source: str, what: str, tensor: str) -> FormatError:
    return FormatError(f"read {source}, {what}", expected=f"a tensor {tensor}", got="none", fix=_SAVE_AGAIN)


def _scale(config: dict[str, Any], source: str) -> float:
    scale = finite(config.get("scale"))
    if scale is None:
        got = brief(repr(config.get("scale")))
        raise FormatError(f"read {source}, {CONFIG}", expected="a finite number as scale", got=got, fix=_SAVE_AGAIN)
    return scale


def _digests(config: dict[str, Any], source: str) -> dict[str, str]:
    digests = config.get("base_digests", {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise FormatError(
            f"read {source}, {CONFIG}", expected="base_digests of text", got=brief(repr(digests)), fix=_SAVE_AGAIN
        )
    return digests


def _tensors(path: Path, source: str) -> dict[str, Array]:
    file = path / TENSORS
    if not file.is_file() and (path / "adapter_model.bin").is_file():
        raise FormatError(
            f"read {source}",
            expected=TENSORS,
            got="adapter_model.bin, a pickle, which can run code when it is read",
            fix="Save the adapter again with save_pretrained(..., safe_serialization=True).",
        )
    tensors, _ = read_tensors(read_bytes(file), source=source)
    stripped = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):
        twice = next(
            name for name in tensors if name.startswith(PEFT_PREFIX) and name.removeprefix(PEFT_PREFIX) in tensors
        )
        raise FormatError(f"read {source}, tensor {twice!r}", problem=f"it is there without {PEFT_PREFIX!r} too")
    return stripped


def _take(tensors: dict[str, Array], pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Array]]:
    found = [match for name in tensors if (match := pattern.fullmatch(name))]
    return [(match, tensors.pop(match[0])) for match in found]


def _delta(module: str, core: Array, factors: dict[int, Array], scale: float, source: str) -> TuckerDelta:
    for mode in factors:
        if mode >= core.ndim:
            raise FormatError(
                f"read {source}, module {module!r}",
                expected=f"factors of modes 0 to {core.ndim - 1}, as its core is {core.shape}",
                got=f"tucker_factor.{mode}",
                fix=_SAVE_AGAIN,
            )
    try:
        return TuckerDelta(core, tuple(factors.get(mode) for mode in range(core.ndim)), scale)
    except (ShapeError, ValueError) as error:
        raise FormatError(f"read {source}, module {module!r}", problem=str(error), fix=_SAVE_AGAIN) from error


def _overrides(
    tensors: dict[str, Array], deltas: dict[str, TuckerDelta], digests: dict[str, str], source: str
) -> dict[str, Array]:
    overrides: dict[str, Array] = {}
    for key, tensor in tensors.items():
        module, infix, rest = key.partition(".base_layer.")
        name = f"{module}.{rest}" if infix and f"{module}.weight" in deltas else key
        if ".tucker_" in f".{name}" or name in overrides:
            raise FormatError(
                f"read {source}, tensor {key!r}", problem="it belongs to no module of the adapter", fix=_SAVE_AGAIN
            )
        if name != key and name in deltas:
            _check_copy(key, tensor, digests.get(name), source)
        else:
            overrides[name] = tensor
    return overrides


def _check_copy(key: str, copy: Array, digest: str | None, source: str) -> None:
    """Drop a copy of a base weight, after checking it."""
    if weight_digest(copy) != digest:
        raise FormatError(
            f"read {source}, tensor {key!r}",
            expected="the base weight that the adapter was trained on",
            got="another one, perhaps with adapters merged into it",
            fix="Save the adapter again, unmerged, with save_pretrained(..., save_embedding_layers=False).",
        )
