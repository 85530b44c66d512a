"""Fit an adapter to a bundle's graphs: compute its slots, or raise the reason why it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tpeft_deploy.adapter import Adapter, gain_mode
from tpeft_deploy.algebra import is_dense, of_rank
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.packing import Packed, pack
from tpeft_deploy.bundle.slots import Part, Target
from tpeft_deploy.errors import AdapterError, ShapeError, UnknownTarget
from tpeft_deploy.ties import settle
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["Filled", "fill", "named", "sizes"]

Filled = Mapping[str, Mapping[str, Array]]


def fill(
    manifest: Manifest, adapter: Adapter, *, bundle: str, base_value: Callable[[str], Array]
) -> dict[str, dict[str, Array]]:
    """Compute an adapter's slots.

    Args:
        manifest: manifest of the bundle.
        adapter: adapter to fit.
        bundle: path of the bundle, for messages.
        base_value: function that reads a base weight by its canonical name; called only for a gain that must be
            multiplied out.

    Returns:
        Target key -> slot name -> array with the adapter's ranks.

    Raises:
        UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit.
        AdapterError: a rank is above the bundle's limit, or a value above what the base's dtype holds.
    """
    doing = f"fit {adapter.source} to bundle {bundle}"
    adapter = _settled(manifest, adapter, bundle=bundle)
    targets = {target.key: target for target in manifest.targets}
    filled: dict[str, dict[str, Array]] = {}
    for name, part, change in _changes(manifest, adapter, targets, base_value, doing):
        target = targets.get(f"{name}:{part}")
        if target is None:
            raise UnknownTarget(
                f"{doing}, weight {name!r}",
                expected=f"a branch for its {part.partition('_')[0]} in the bundle's graphs",
                got=f"none; they take {_describe_targets(manifest)}",
                fix="Export the bundle again with this adapter among its adapters.",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                change = _within_limit(change, target, manifest.max_rank)  # noqa: PLW2901 - the same change
                filled[target.key] = slots.fill(target, change)
            except ValueError as error:  # products of core and factors that overflow float64
                raise _too_large(doing, name, target.dtype, f"larger ones ({error})") from error
        _check_slots(target, filled[target.key], doing)
        _check_rank(manifest, target, change, slots.ranks_of(target, filled[target.key]), doing)
    return filled


def _changes(
    manifest: Manifest, adapter: Adapter, targets: Mapping[str, Target], base_value: Callable[[str], Array], doing: str
) -> Iterator[tuple[str, Part, TuckerDelta | Array]]:
    """Yield weight, part and change; a gain without a branch is multiplied out if the graph computes W + dW."""
    for name in dict.fromkeys([*adapter.deltas, *adapter.gains]):
        gain, delta = adapter.gains.get(name), adapter.deltas.get(name)
        mode = gain_mode(gain) if gain is not None else None
        whole = targets.get(f"{name}:delta")
        if gain is not None and f"{name}:gain_{mode}" not in targets and whole is not None and whole.kind == "weight":
            yield name, "delta", _multiplied_out(adapter, name, base_value(name), doing)
            continue
        if delta is not None:
            yield name, "delta", delta
        if gain is not None:
            if mode is None:
                raise ShapeError(
                    f"{doing}, gain {name!r}",
                    expected="one factor for each output or each input, which is what the bundle's graphs take",
                    got=gain.shape,
                    fix="Merge it into the base, or export the bundle again with this adapter among its adapters.",
                )
            size = manifest.weights[name].shape[mode]
            yield name, "gain_1" if mode == 1 else "gain_0", np.broadcast_to(gain.reshape(-1), (size,))
    for name, array in adapter.served_overrides.items():
        yield name, "override", array


def _multiplied_out(adapter: Adapter, name: str, weight: Array, doing: str) -> TuckerDelta:
    with np.errstate(over="ignore", invalid="ignore"):
        change = adapter.merged(name, weight) - weight.astype(np.float64)
    if not np.isfinite(change).all():
        raise _too_large(doing, name, "float64", "larger ones once its gain is multiplied out")
    return TuckerDelta(change, (None,) * change.ndim)


def named(manifest: Manifest, filled: Filled, packing: Sequence[Packed] = ()) -> dict[str, Array]:
    """Map filled slots to the names of factored.onnx's optional inputs, or to inputs that stand in their place."""
    targets = {target.key: target for target in manifest.targets}

    def names(slots_of: Filled) -> dict[str, Array]:
        return {
            slots.input_name(targets[key], slot): array
            for key, tensors in slots_of.items()
            for slot, array in tensors.items()
        }

    linear = [target for target in targets.values() if packing and target.kind in ("linear", "matmul")]
    return pack(packing, names(filled), names({target.key: slots.neutral(target) for target in linear}))


def sizes(manifest: Manifest, adapter: Adapter | None) -> dict[str, int]:
    """Output that varies per task -> size of its varying axis for an adapter; None is the base."""
    overrides = adapter.overrides if adapter is not None else {}
    shapes = {manifest.canonical(name): array.shape for name, array in overrides.items()}
    found = {}
    for port in manifest.outputs:
        if (varies := port.varies) is not None:
            rows = shapes.get(varies.override, manifest.weights[varies.override].shape)[0]
            found[port.name] = varies.times * rows + varies.plus
    return found


def _settled(manifest: Manifest, adapter: Adapter, *, bundle: str) -> Adapter:
    """Rename the adapter's changes to stored names and check that it fits the base."""
    base = f"bundle {bundle}"
    weights = {name: manifest.weights[held] for name, held in manifest.stored.items()}
    adapter = settle(adapter, manifest.stored, manifest.ties, doing=f"fit {adapter.source} to {base}")
    adapter.check_shapes({name: weight.shape for name, weight in weights.items()}, base=base)
    adapter.check_digests({name: weight.digest for name, weight in weights.items()}, base=base)
    for name, array in adapter.served_overrides.items():
        kind = "f" if weights[name].dtype == "bfloat16" else np.dtype(weights[name].dtype).kind
        if kind != array.dtype.kind:
            raise ShapeError(
                f"fit {adapter.source} to {base}, override {name!r}",
                expected=f"dtype {weights[name].dtype}",
                got=array.dtype,
            )
    _check_heads(manifest, adapter, base)
    return adapter


def _check_heads(manifest: Manifest, adapter: Adapter, base: str) -> None:
    """Raise if parameters of one head or norm disagree in size: zero-padded in a bank, they would run unnoticed."""
    firsts = {name: array.shape[:1] for name, array in adapter.served_overrides.items()}
    for name, array in adapter.served_overrides.items():
        rows = manifest.weights[name].shape[:1]
        if array.shape[:1] == (0,):
            raise ShapeError(f"fit {adapter.source} to {base}, override {name!r}", expected="a class", got=array.shape)
        if array.shape[:1] == rows:
            continue
        module = name.rpartition(".")[0]
        for other, weight in manifest.weights.items():
            if other.rpartition(".")[0] != module or weight.shape[:1] != rows:
                continue
            size = firsts.get(other, rows)
            if size != array.shape[:1]:
                raise ShapeError(
                    f"fit {adapter.source} to {base}, override {name!r}",
                    expected=f"the first size of {other!r} beside it, {size[0]}",
                    got=array.shape[0],
                    fix="Save all parameters of the module with the adapter (modules_to_save).",
                )


def _check_slots(target: Target, tensors: dict[str, Array], doing: str) -> None:
    for slot, array in tensors.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise _too_large(doing, target.name, target.dtype, f"larger ones in its {slot}")


def _too_large(doing: str, name: str, dtype: str, got: str) -> AdapterError:
    return AdapterError(
        f"{doing}, weight {name!r}",
        expected=f"values that {dtype} holds",
        got=got,
        fix="Serve it with a float32 base.",
    )


def _within_limit(change: TuckerDelta | Array, target: Target, limit: int | None) -> TuckerDelta | Array:
    """Write a change with factors again that was kept dense, if the limit takes those and not the dense one."""
    if limit is None or not isinstance(change, TuckerDelta) or target.kind == "experts" or not is_dense(change):
        return change
    if min(len(change.core), change.core.size // len(change.core)) <= limit or not np.isfinite(change.core).all():
        return change
    return of_rank(change, limit) or change


def _check_rank(
    manifest: Manifest, target: Target, change: TuckerDelta | Array, ranks: Mapping[str, int], doing: str
) -> None:
    if not isinstance(change, TuckerDelta):
        return
    rank = max(ranks.values()) if target.factors else min(ranks.values())
    # A mode without a factor is bounded by the others: R_i <= R_o K1 ...
    rank = min(rank, max((factor.shape[1] for factor in change.factors[:2] if factor is not None), default=rank))
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
