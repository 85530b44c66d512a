"""Known weights of a base beside its ONNX file: names, shapes, and values or digests."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tpeft_deploy.adapter import Adapter, weight_digest
from tpeft_deploy.errors import FormatError, UnsupportedBase
from tpeft_deploy.formats.read.base_view import Lazy, holders, view
from tpeft_deploy.formats.read.safetensors_file import parse_json, read_bytes, read_tensors
from tpeft_deploy.tucker import Array

__all__ = ["Known", "of_adapters", "read_weights"]

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Known:
    """Weights of the base, from its original checkpoint or from what adapters recorded about it.

    Args:
        shapes: weight -> shape.
        arrays: weight -> values; None when only digests are at hand.
        digests: weight -> `weight_digest`.
        first: every name of a weight -> the first name of the same parameter of the same module.
        kinds: module path -> class name of the layer, where it is known.
    """

    shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, Array] | None
    digests: Mapping[str, str]
    first: Mapping[str, str]
    kinds: Mapping[str, str] = field(default_factory=dict)

    def with_names(self, names: Mapping[str, str]) -> Known:
        """These weights, and tied ones that were left out: name -> the weight that it is tied to."""
        if not names or self.arrays is None:
            return self
        arrays = self.arrays
        every = {name: name for name in arrays} | dict(names)
        return replace(
            self,
            shapes={**self.shapes, **{name: self.shapes[own] for name, own in names.items()}},
            arrays=Lazy(every, lambda name: arrays[every[name]]),
            digests={**self.digests, **{n: self.digests[own] for n, own in names.items() if own in self.digests}},
            first={**self.first, **{name: name for name in names}},
        )

    @cached_property
    def by_shape(self) -> Mapping[tuple[int, ...], list[str]]:
        """Shape -> the weights that have it."""
        found: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, shape in self.shapes.items():
            found[shape].append(name)
        return found

    @cached_property
    def modules(self) -> frozenset[str]:
        """The path of every module that holds a weight, and of those around it."""
        return frozenset(name[:dot] for name in self.shapes for dot, letter in enumerate(name) if letter == ".")


def of_adapters(adapters: Iterable[Adapter]) -> Known:
    """Known weights from the digests that adapters recorded."""
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    for adapter in adapters:
        for name, delta in adapter.deltas.items():
            shapes[name] = delta.shape
            if name in adapter.base_digests:
                digests.setdefault(name, adapter.base_digests[name])
    return Known(shapes, None, digests, {name: name for name in shapes})


def read_weights(source: object) -> Known:
    """The original weights of a base.

    Args:
        source: a .safetensors file, a Hugging Face model directory, a torch module, or a mapping name -> array or
            tensor (a module's state_dict).

    Raises:
        UnsupportedBase: it is none of these.
        FormatError: a file is damaged.
    """
    if isinstance(source, str | os.PathLike):
        return _of_files(Path(source))
    if isinstance(source, nn.Module):
        seen = view(source)
        return _known(seen.weights, holders(source), seen.kinds)
    if isinstance(source, Mapping) and source:
        arrays = {str(name): _array(str(name), value) for name, value in source.items()}
        return _known(arrays, {}, {})
    raise UnsupportedBase(
        "read the weights of a base",
        expected="a .safetensors file, a model directory, a torch module, or a mapping of names to arrays",
        got=type(source).__name__ if source else "an empty mapping",
    )


def _of_files(path: Path) -> Known:
    arrays: dict[str, Array] = {}
    ties: dict[str, str] = {}
    for file in _files(path):
        tensors, metadata = read_tensors(read_bytes(file), source=str(file))
        arrays |= tensors
        ties |= metadata
    # safetensors.torch.save_model writes one of the names of a tied weight, and the others into the header.
    aliases = {name: kept for name, kept in ties.items() if kept in arrays and name not in arrays}
    named = arrays | {name: arrays[kept] for name, kept in aliases.items()}
    return _known(named, {}, {})


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    if (path / _FILE).is_file():
        return [path / _FILE]
    if (path / _INDEX).is_file():
        try:
            parts = sorted(set(parse_json(read_bytes(path / _INDEX))["weight_map"].values()))
            if all(isinstance(part, str) and Path(part).name == part for part in parts):
                return [path / part for part in parts]
        except (ValueError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FormatError(f"read weights {path / _INDEX}", problem=f"it is damaged ({error})") from error
        raise FormatError(f"read weights {path / _INDEX}", expected="names of files beside it", got="paths")
    raise UnsupportedBase(
        f"read weights {path}",
        expected=f"a .safetensors file, or a directory with {_FILE}",
        got="another file" if path.is_file() else "a directory without it" if path.is_dir() else "nothing there",
        fix="Save the original model with save_pretrained, or its state_dict with safetensors.torch.save_file.",
    )


def _known(arrays: Mapping[str, Array], identities: Mapping[str, object], kinds: Mapping[str, str]) -> Known:
    first: dict[object, str] = {}
    aliases = {name: first.setdefault(identities.get(name, name), name) for name in arrays}
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    for name in arrays:
        array = arrays[name]
        shapes[name] = array.shape
        if aliases[name] != name:
            digests[name] = digests[aliases[name]]
        elif array.dtype.kind == "f":
            digests[name] = weight_digest(array)
    return Known(shapes, Lazy(arrays, lambda name: arrays[name]), digests, aliases, kinds)


def _array(name: str, value: Any) -> Array:
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "detach"):
        raise UnsupportedBase(
            f"read the weights of a base, weight {name!r}", expected="an array or a tensor", got=type(value).__name__
        )
    tensor = value.detach().cpu()
    array: Array = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
    return array
