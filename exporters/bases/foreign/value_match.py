"""Comparing what initializers hold with what is known of weights."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from tpeft_deploy.adapter import weight_digest
from tpeft_deploy.exporters.bases.foreign.initializer_uses import Use
from tpeft_deploy.exporters.bases.foreign.known_weights import Known
from tpeft_deploy.tucker import Array

__all__ = ["Orientation", "Values", "is_plain", "shape_of", "stored"]

Orientation = Literal["own", "turned", "either"]


class Values:
    """Finds the weights that have an initializer's values; each initializer is read once."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._digests: dict[tuple[str, bool], str] = {}
        self._same: dict[tuple[str, str, bool], bool] = {}

    def of(self, use: Use) -> dict[str, Orientation]:
        """The first name of every weight that has the values of a use, and how the file holds it."""
        found: dict[str, Orientation] = {}
        for turned in (False, True) if use.turnable else (False,):
            shape = shape_of(use.value)[::-1] if turned else shape_of(use.value)
            for name in self._known.by_shape.get(shape, ()):
                first = self._known.first[name] == name
                if first and name in self._known.digests and self._is(use.value, name, turned):
                    found[name] = "either" if name in found else "turned" if turned else "own"
        return found

    def _is(self, value: ir.Value, name: str, turned: bool) -> bool:
        key = (str(value.name), name, turned)
        if key not in self._same:
            same = self._digest(value, turned) == self._known.digests[name]
            if same and self._known.arrays is not None:
                same = _equal(stored(value, turned=turned), self._known.arrays[name])
            self._same[key] = same
        return self._same[key]

    def _digest(self, value: ir.Value, turned: bool) -> str:
        key = (str(value.name), turned)
        if key not in self._digests:
            self._digests[key] = weight_digest(stored(value, turned=turned))
        return self._digests[key]


def stored(value: ir.Value, *, turned: bool = False) -> Array:
    """Values of an initializer, or their transpose."""
    if value.const_value is None:
        raise ValueError(f"initializer {value.name!r} has no value")
    array: Array = value.const_value.numpy()
    return array.T if turned else array


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """An initializer's shape."""
    return tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()


def is_plain(value: ir.Value) -> bool:
    """Whether an initializer holds one number only, again and again."""
    array = stored(value)
    return array.size == 0 or bool(np.all(array == array.flat[0]))


def _equal(held: Array, weight: Array) -> bool:
    """Whether two arrays are equal in the narrower of their types."""
    narrow = min(held.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore"):
        return np.array_equal(held.astype(narrow), weight.astype(narrow))
