"""Adapter: all changes that one task makes to a base, independent of the training method.

An adapter has a canonical file, one safetensors file with all other fields in its header; its SHA-256 identifies the
content.  Tensors are `delta/<target>/core`, `delta/<target>/factor.<mode>`, `override/<name>` and `gain/<target>`.
Notes and origin describe the import and are not in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tpeft_deploy.errors import BaseMismatch, FormatError, ShapeError, UnknownTarget
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.tucker import Array, TuckerDelta, is_finite

__all__ = ["Adapter", "Origin", "gain_mode", "weight_digest", "without"]

_COUNTER = "num_batches_tracked"
_CHECK_BASE = "Check that the base is what the adapter was trained on."
_CHECK_NAMES = f"{_CHECK_BASE[:-1]}; if it is a part of that, give the part's prefix (--part)."


def without(adapter: Adapter, names: Collection[str]) -> Adapter:
    """Drop an adapter's changes of some weights; one that changes none of them is returned as it is."""
    if not any(name in adapter.deltas or name in adapter.gains or name in adapter.overrides for name in names):
        return adapter
    return replace(
        adapter,
        deltas={name: delta for name, delta in adapter.deltas.items() if name not in names},
        gains={name: gain for name, gain in adapter.gains.items() if name not in names},
        overrides={name: array for name, array in adapter.overrides.items() if name not in names},
        base_digests={name: digest for name, digest in adapter.base_digests.items() if name not in names},
        notes={name: note for name, note in adapter.notes.items() if name not in names},
    )


def weight_digest(weight: Array) -> str:
    """Compute the SHA-256 (hex) of a weight's shape and its values rounded to float16, little-endian, row-major.

    The values are rounded so that a base has the same digest in float32 and float16: an adapter trained on one may be
    served on the other.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(weight, dtype="<f2")
    return hashlib.sha256(f"{weight.shape}".encode() + values.tobytes()).hexdigest()


def gain_mode(gain: Array) -> int | None:
    """Mode of the weight along which a gain varies; 0 if it is one number, None if it varies along several modes."""
    modes = [mode for mode, size in enumerate(gain.shape) if size > 1]
    if len(modes) > 1:
        return None
    return modes[0] if modes else 0


@dataclass(frozen=True)
class Origin:
    """Source of an adapter, from which an export lets the training library read it again for comparison.

    Args:
        path: a PEFT directory, or a .safetensors file.
        family: "peft" for the directory, "safetensors" for the file, which LyCORIS or kohya may have written.
        part: prefix of the part of the trained model that was read; empty for all of it.
    """

    path: Path
    family: Literal["peft", "safetensors"]
    part: str = ""


@dataclass(frozen=True, eq=False)
class Adapter:
    """All changes that one task makes to a base.

    Args:
        deltas: target weight (its `named_parameters()` name) -> low-rank change.
        overrides: parameter or buffer name -> tensor that replaces it; the shape may differ from the base's (a head
            with another number of classes).
        base_digests: target weight -> `weight_digest` of the base weight that the change was trained on; empty if the
            training library did not record it.
        source: file or directory that it was read from, for messages.
        gains: target weight -> factors of its channels, of a shape that broadcasts against the weight: (O, 1, ...)
            or (1, I, 1, ...).  The adapted weight is gain * (W + dW); a gain needs no delta.
        notes: weight -> remark about the import, for example that the change was kept dense because that is smaller;
            "*" is the adapter as a whole.
        origin: the training library's file, with which an export is compared; None for an adapter made in memory and
            for the canonical file.  Set it to None when the adapter is changed after it was read.
        left_out: tensor of the file that the adapter leaves out at the caller's request -> reason: tensors of other
            parts (`load_adapter(part=)`), changes of weights that no output depends on (`unused="skip"`).
        labels: classes of the task's head; None where the training side recorded none.

    Raises:
        FormatError: there are no tensors, an override or a gain is not finite, or a weight has both an override and a
            delta or gain.
    """

    deltas: Mapping[str, TuckerDelta]
    overrides: Mapping[str, Array] = field(default_factory=dict)
    base_digests: Mapping[str, str] = field(default_factory=dict)
    source: str = "an adapter made in memory"
    gains: Mapping[str, Array] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    origin: Origin | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    labels: HeadLabels | None = None

    def __post_init__(self) -> None:
        if not self.deltas and not self.overrides and not self.gains:
            raise FormatError(f"read {self.source}", expected="deltas or overrides", got="no tensors at all")
        both = sorted((set(self.deltas) | set(self.gains)) & set(self.overrides))
        if both:
            raise FormatError(
                f"read {self.source}, weight {both[0]!r}",
                expected=f"a {'delta' if both[0] in self.deltas else 'gain'} or an override",
                got="both",
                fix="Leave the module out of target_modules or out of modules_to_save.",
            )
        for what, arrays in (("override", self.overrides), ("gain", self.gains)):
            for name, array in arrays.items():
                if array.dtype.kind == "f" and not is_finite(array):
                    raise FormatError(
                        f"read {self.source}, {what} {name!r}",
                        expected="finite values",
                        got="NaN or infinity",
                        fix="Save the adapter again from a training run that did not diverge.",
                    )
        for name, gain in self.gains.items():
            if gain.dtype.kind != "f":
                raise FormatError(
                    f"read {self.source}, gain {name!r}", expected="a floating point array", got=gain.dtype
                )

    @property
    def rank(self) -> int:
        """Largest rank of the changes; 0 if there are gains and overrides only."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    @property
    def parameters(self) -> int:
        """Number of elements of the adapter's tensors."""
        return sum(d.parameters for d in self.deltas.values()) + sum(array.size for array in self._wholes())

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's tensors."""
        return sum(d.nbytes for d in self.deltas.values()) + sum(array.nbytes for array in self._wholes())

    def _wholes(self) -> list[Array]:
        return [*self.overrides.values(), *self.gains.values()]

    def merged(self, name: str, weight: Array) -> Array:
        """Compute a target's adapted weight, gain * (W + dW), in float64.

        Args:
            name: target with a delta, a gain or both.
            weight: W, the base's weight, (O, I, K1, ...).
        """
        total: Array = self.deltas[name].dense() if name in self.deltas else np.zeros(weight.shape)
        total += weight
        if name in self.gains:
            total *= self.gains[name]
        return total

    @property
    def served_overrides(self) -> dict[str, Array]:
        """Overrides that inference reads: all but BatchNorm's batch counters, which only training uses."""
        return {name: array for name, array in self.overrides.items() if not name.endswith(_COUNTER)}

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], *, base: str) -> None:
        """Check that every target, override and gain exists in a base and has a fitting shape.

        Args:
            shapes: name -> shape of every weight of the base.
            base: name of the base, for messages.

        Raises:
            UnknownTarget: a target, an override or a gain is not in the base.
            ShapeError: the shape of a delta differs from its weight's, an override differs beyond its first axis, or a
                gain does not broadcast against its weight.
        """
        for name, delta in self.deltas.items():
            if name not in shapes:
                raise _unknown(self.source, "target", name, base, shapes)
            if delta.shape != shapes[name]:
                raise ShapeError(
                    f"fit {self.source} to {base}, weight {name!r}",
                    expected=f"a change of shape {shapes[name]}",
                    got=delta.shape,
                    fix=_other_rows(delta.shape, shapes[name]),
                )
        for name, array in self.served_overrides.items():
            if name not in shapes:
                raise _unknown(self.source, "override", name, base, shapes)
            if array.ndim != len(shapes[name]) or array.shape[1:] != shapes[name][1:]:
                raise ShapeError(
                    f"fit {self.source} to {base}, override {name!r}",
                    expected=f"shape {shapes[name]}, where only the first size may differ",
                    got=array.shape,
                    fix=_CHECK_BASE,
                )
        for name, gain in self.gains.items():
            if name not in shapes:
                raise _unknown(self.source, "gain", name, base, shapes)
            sizes = zip(gain.shape, shapes[name], strict=False)
            if gain.ndim != len(shapes[name]) or any(length not in (1, size) for length, size in sizes):
                raise ShapeError(
                    f"fit {self.source} to {base}, gain {name!r}",
                    expected=f"a shape that broadcasts against {shapes[name]}",
                    got=gain.shape,
                    fix=_CHECK_BASE,
                )

    def check_digests(self, digests: Mapping[str, str], *, base: str) -> None:
        """Check the recorded digests of base weights against a base.

        Args:
            digests: name -> `weight_digest` of the base's weights; names without a recorded digest are ignored.
            base: name of the base, for messages.

        Raises:
            BaseMismatch: a digest differs: the change of that weight was trained on other values.
        """
        for name, expected in self.base_digests.items():
            if digests.get(name, expected) != expected:
                raise BaseMismatch(
                    f"fit {self.source} to {base}, weight {name!r}",
                    problem="the adapter was trained on another base",
                    expected=f"base weight {expected[:12]}...",
                    got=f"{digests[name][:12]}...",
                    fix="Use the base it was trained on, or train it again on this one.",
                )

    def to_bytes(self) -> bytes:
        """Serialise to the canonical file: safetensors with all other fields in the header."""
        from safetensors.numpy import save

        tensors: dict[str, Array] = {}
        for name, delta in self.deltas.items():
            tensors[f"delta/{name}/core"] = delta.core
            for mode, factor in enumerate(delta.factors):
                if factor is not None:
                    tensors[f"delta/{name}/factor.{mode}"] = factor
        for name, array in self.overrides.items():
            tensors[f"override/{name}"] = array
        for name, array in self.gains.items():
            tensors[f"gain/{name}"] = array
        header: dict[str, Any] = {
            "schema": 1,
            "scales": {name: delta.scale for name, delta in self.deltas.items()},
            "base_digests": dict(self.base_digests),
        }
        if self.labels is not None:
            header["labels"] = asdict(self.labels)
        # Not ascontiguousarray, which gives a scalar an axis.
        ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
        return save(ordered, metadata={"tpeft": json.dumps(header, sort_keys=True)})


def _other_rows(got: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Fix for a change of another shape; an embedding may differ from the base in the number of tokens alone."""
    if len(got) == 2 and got[1:] == expected[1:]:
        return (
            f"{_CHECK_BASE[:-1]}; if its vocabulary was resized first, resize the "
            f"base's in the same way (resize_token_embeddings({got[0]})) and save that as the base."
        )
    return _CHECK_BASE


def _unknown(source: str, what: str, name: str, base: str, shapes: Mapping[str, object]) -> UnknownTarget:
    from difflib import get_close_matches

    near = get_close_matches(name, shapes, n=1)
    inside = " If the base is a part of what was trained, give the part's prefix (--part)."
    inside = inside if near and name.endswith(f".{near[0]}") else ""
    return UnknownTarget(
        f"fit {source} to {base}, {what} {name!r}",
        expected="a weight of the base",
        got="no weight of that name",
        fix=f"Did you mean {near[0]!r}?{inside}" if near else _CHECK_NAMES,
    )
