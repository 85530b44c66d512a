"""Folded sessions: W + dW in place of base.onnx's own weights, so that a hot task costs what the base costs.

Folding needs no onnx package: ONNX Runtime takes other values for external initializers when a session is made, before
it optimises the graph.  (Values given by `add_initializer` come too late: a weight behind a Transpose was folded away
by then, and the base would answer.)  Every fold starts from the bytes of weights.data, never from another fold.

One folded session holds the changed weights, and what ONNX Runtime packs of all weights: see `cost`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import AdapterError, ShapeError
from tpeft_deploy.runtime.folding.prepacked import packed_copy
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.ties import settle
from tpeft_deploy.tucker import Array

__all__ = ["cost", "fold", "to_bfloat16", "weights"]

BASE = "base.onnx"


def weights(bundle: Bundle, adapter: Adapter) -> dict[str, Array]:
    """The tensors that an adapter puts in place of the base's.

    Args:
        bundle: holds the base.
        adapter: for it; it need not be one of the bundle's.

    Returns:
        Canonical weight name -> gain * (W + dW), computed in float64 and cast to the weight's dtype, or the override;
        bfloat16 as its bits, in uint16.

    Raises:
        UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit the bundle.
        AdapterError: it changes a weight that the graphs hold quantised, or a result is more than the dtype holds.
    """
    return dict(_merged(bundle, _checked(bundle, adapter)))


def fold(bundle: Bundle, adapter: Adapter, sessions: SessionFactory, *, place: Path | None = None) -> Plain:
    """A session of the base with an adapter merged into its weights.

    Args:
        bundle: bundle with base.onnx and weights.data, with digests checked by the caller.
        adapter: for it.
        sessions: makes the session; from `SessionFactory.of` the bundle's manifest.
        place: a directory of this process for copies of the base with packed weights, which folds that change the same
            weights share on the CPU (see `packed`); without one, each session packs all weights for itself.

    Raises:
        AdapterError: as `weights`.
        ProviderUnavailable: as `Plain`.
    """
    changed = weights(bundle, adapter)
    model = bundle.path / BASE
    if place is not None and sessions.choice.execution.prepacks:
        model = packed_copy(model, changed, place, threads=sessions.threads)
    return Plain(model, sessions, initializers=changed)


def cost(bundle: Bundle, adapter: Adapter, *, shared: bool) -> int:
    """Bytes that one folded session adds to the process; for budgets.

    What the adapter changes is held as it is and packed.  Convolutions' weights are blocked by every session for
    itself, from a copy; the others are packed by every session, or with `shared` by none.  Activations are not counted,
    nor what ONNX Runtime computes in advance from weights alone, such as projections of relative positions.

    Args:
        bundle: holds the base.
        adapter: to be folded.
        shared: whether `fold` is given a place for packed copies, and the device is the CPU.
    """
    changed = {bundle.manifest.canonical(n) for n in (*adapter.deltas, *adapter.gains, *adapter.served_overrides)}
    total = sum(array.nbytes for array in adapter.served_overrides.values())
    if bundle.manifest.quantised is not None:
        total += bundle.manifest.quantised.bytes
    for name, weight in bundle.manifest.weights.items():
        blocked = len(weight.shape) > 2
        total += weight.length * (2 if blocked or name in changed else 0 if shared else 1)
    return total


def to_bfloat16(array: Array) -> Array:
    """The bits of an array rounded to bfloat16, ties to even, as uint16 of its shape."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # Rounding would carry a NaN's mantissa into its exponent.
    return np.where(np.isnan(np.asarray(array)), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _checked(bundle: Bundle, adapter: Adapter) -> Adapter:
    """The adapter by canonical names, once it fits; no weight has been read."""
    manifest, base = bundle.manifest, f"bundle {bundle.manifest.name!r}"
    stored = {name: manifest.weights[held] for name, held in manifest.stored.items()}
    doing = f"fold {adapter.source} into {base}"
    adapter = settle(adapter, manifest.stored, manifest.ties, doing=doing)
    adapter.check_shapes({name: weight.shape for name, weight in stored.items()}, base=base)
    adapter.check_digests({name: weight.digest for name, weight in stored.items()}, base=base)
    for name in (*adapter.deltas, *adapter.gains, *adapter.served_overrides):
        if not stored[name].length and 0 not in stored[name].shape:
            raise AdapterError(
                f"{doing}, weight {name!r}",
                expected="a weight in floating point",
                got="a quantised one, with too few bits for the change",
                fix="Serve the task from the bank.",
            )
    for name, array in adapter.served_overrides.items():
        own = stored[name].dtype
        if array.dtype.kind != ("f" if own == "bfloat16" else np.dtype(own).kind):
            raise ShapeError(f"{doing}, override {name!r}", expected=f"dtype {own}", got=array.dtype)
    return adapter


def _merged(bundle: Bundle, adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """One weight after another, so that no more than one is held in float64."""
    for name in dict.fromkeys([*adapter.deltas, *adapter.gains]):
        yield name, _cast(bundle, adapter, name, adapter.merged(name, bundle.base_value(name)))
    for name, array in adapter.served_overrides.items():
        yield name, _cast(bundle, adapter, name, array)


def _cast(bundle: Bundle, adapter: Adapter, name: str, value: Array) -> Array:
    dtype = bundle.manifest.weights[name].dtype
    with np.errstate(over="ignore"):
        cast = value.astype(np.float32 if dtype == "bfloat16" else dtype)
        result = to_bfloat16(cast) if dtype == "bfloat16" else np.asarray(cast, order="C")
    finite = (result & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(result)
    if not finite.all():
        raise AdapterError(
            f"fold {adapter.source} into bundle {bundle.manifest.name!r}, weight {name!r}",
            expected=f"values that {dtype} holds",
            got="larger ones, or none at all",
            fix="Serve it with a float32 base.",
        )
    return result
