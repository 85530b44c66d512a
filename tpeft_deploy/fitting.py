"""Fitting an adapter to a bundle's graphs: the slots it fills, or why it does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tpeft_deploy import slots
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import AdapterError, ShapeError, UnknownTarget
from tpeft_deploy.manifest import Manifest
from tpeft_deploy.slots import Target
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["Filled", "fill", "named", "sizes", "target_key"]

Filled = Mapping[str, Mapping[str, Array]]


def target_key(target: Target) -> str:
    """One name per target of a bundle: a weight may have both a delta's branch and an override."""
    return f"{target.name}:{'override' if target.kind == 'override' else 'delta'}"


def fill(manifest: Manifest, adapter: Adapter, *, bundle: str) -> dict[str, dict[str, Array]]:
    """An adapter's slots.

    Args:
        manifest: of the bundle.
        adapter: to be served by it.
        bundle: where the bundle is, for messages.

    Returns:
        Target key -> slot name -> array with the adapter's own ranks.

    Raises:
        UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit.
        AdapterError: a rank is above the bundle's limit, or a value above what the base's dtype holds.
    """
    doing = f"fit {adapter.source} to bundle {bundle}"
    _check_weights(manifest, adapter, bundle=bundle)
    targets = {(t.name, t.kind == "override"): t for t in manifest.targets}
    changes: list[tuple[str, TuckerDelta | Array]] = [*adapter.deltas.items(), *adapter.served_overrides.items()]
    filled: dict[str, dict[str, Array]] = {}
    for name, change in changes:
        target = targets.get((manifest.canonical(name), not isinstance(change, TuckerDelta)))
        if target is None:
            raise UnknownTarget(
                f"{doing}, weight {name!r}",
                expected="a branch for it in the bundle's graphs",
                got=f"none; they take {_describe_targets(manifest)}",
                fix="Export the bundle again with this adapter among its adapters.",
            )
        key = target_key(target)
        if key in filled:
            raise UnknownTarget(
                f"{doing}, weight {name!r}", problem=f"it is tied to {target.name!r}, which the adapter changes too"
            )
        with np.errstate(over="ignore"):
            filled[key] = slots.fill(target, change)
        _check_slots(manifest, target, filled[key], doing)
    return filled


def named(manifest: Manifest, filled: Filled) -> dict[str, Array]:
    """Filled slots by the names of factored.onnx's optional inputs."""
    targets = {target_key(target): target for target in manifest.targets}
    return {
        slots.input_name(targets[key].name, slot): array
        for key, tensors in filled.items()
        for slot, array in tensors.items()
    }


def sizes(manifest: Manifest, adapter: Adapter | None) -> dict[str, int]:
    """For every output that varies per task: the size of its varying axis for an adapter, or for the base."""
    overrides = adapter.overrides if adapter is not None else {}
    own = {manifest.canonical(name): array.shape for name, array in overrides.items()}
    varying = [(port.name, port.varies.override) for port in manifest.outputs if port.varies is not None]
    return {port: own.get(weight, manifest.weights[weight].shape)[0] for port, weight in varying}


def _check_weights(manifest: Manifest, adapter: Adapter, *, bundle: str) -> None:
    base = f"bundle {bundle}"
    for name in adapter.gains:
        raise UnknownTarget(
            f"fit {adapter.source} to {base}, weight {name!r}",
            expected="a change that a branch adds",
            got="a gain (DoRA, IA3), which multiplies the weight",
            fix="Export it folded: 'tpeft-deploy export folded'.",
        )
    weights = {name: manifest.weights[manifest.canonical(name)] for name in [*manifest.weights, *manifest.aliases]}
    adapter.check_shapes({name: weight.shape for name, weight in weights.items()}, base=base)
    adapter.check_digests({name: weight.digest for name, weight in weights.items()}, base=base)
    for name, array in adapter.served_overrides.items():
        if np.dtype(weights[name].dtype).kind != array.dtype.kind:
            raise ShapeError(
                f"fit {adapter.source} to {base}, override {name!r}",
                expected=f"dtype {weights[name].dtype}",
                got=array.dtype,
            )


def _check_slots(manifest: Manifest, target: Target, tensors: dict[str, Array], doing: str) -> None:
    for slot, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise AdapterError(
                f"{doing}, weight {target.name!r}",
                expected=f"values that {target.dtype} holds",
                got=f"larger ones in its {slot}",
                fix="Serve it with a float32 base.",
            )
    rank = max(slots.ranks_of(target, tensors).values(), default=0) if target.kind != "override" else 0
    if manifest.max_rank is not None and rank > manifest.max_rank:
        raise AdapterError(
            f"{doing}, weight {target.name!r}",
            expected=f"rank <= {manifest.max_rank} (--max-rank of the bundle)",
            got=rank,
            fix="Export the bundle again with a larger --max-rank.",
        )


def _describe_targets(manifest: Manifest) -> str:
    names = sorted({target.name for target in manifest.targets})
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "no weights"
