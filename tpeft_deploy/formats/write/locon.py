"""Write an adapter as a LoCon file, which LyCORIS, kohya and related tools load.

    matrix          lora_up (O, r), lora_down (r, I)
    convolution     lora_up (O, r, 1, ..), lora_mid (r, r, K1, ..), lora_down (r, I, 1, ..), zero-padded to
                    r = max(R_o, R_i), since LyCORIS' mid is square; or, if that is smaller, lora_up and
                    lora_down (r, I, K1, ..)

with alpha = r, so that alpha / r is 1; s and the kernel's factors are absorbed in lora_mid or lora_down.  Whole tensors
are written as differences to the base's: diff and diff_b, w_norm and b_norm.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.algebra import low_rank_pair, pad_ranks
from tpeft_deploy.errors import FormatError
from tpeft_deploy.files import new_file
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.write.peft_lora import refuse_gains
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["NAME", "write"]

NAME = "locon"
_PREFIX = "lycoris"  # prefix of LyCORIS for a wrapped whole model
_SUFFIXES = {"weight": "diff", "bias": "diff_b"}
_NORM_SUFFIXES = {"weight": "w_norm", "bias": "b_norm"}


def write(adapter: Adapter, path: Path, *, base: BaseView | None = None) -> None:
    """Write one safetensors file.

    Args:
        adapter: adapter without gains; every target is a module's `weight`.
        path: file to write.
        base: base of the adapter, needed if the adapter replaces whole tensors.

    Raises:
        FormatError: the format cannot express the adapter; nothing was written.
    """
    from safetensors.numpy import save_file

    refuse_gains(adapter, NAME)
    tensors: dict[str, Array] = {}
    owners: dict[str, str] = {}
    for name, delta in adapter.deltas.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not module:
            raise _refusal(adapter, name, "a parameter that is no module's weight")
        key = _key(module, owners, adapter)
        tensors |= {f"{key}.{suffix}": array for suffix, array in _tensors(delta).items()}
    for name, array in adapter.overrides.items():
        module, _, leaf = name.rpartition(".")
        key = _key(module, owners, adapter)
        suffix, difference = _difference(adapter, name, array, base)
        tensors[f"{key}.{suffix}"] = difference
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    with new_file(path) as temporary:
        save_file(ordered, temporary, metadata={"ss_network_module": "lycoris.kohya"})


def _key(module: str, owners: dict[str, str], adapter: Adapter) -> str:
    key = f"{_PREFIX}_{module.replace('.', '_')}"
    other = owners.setdefault(key, module)
    if other != module:
        raise FormatError(
            f"write {adapter.source} as {NAME}, module {module!r}",
            expected="a name that is unique with underscores for dots",
            got=f"that of {other!r} as well",
            fix="Convert it to peft-lora, which keeps the dots.",
        )
    return key


def _tensors(delta: TuckerDelta) -> dict[str, Array]:
    dtype = np.promote_types(delta.core.dtype, np.float32)
    a, b = low_rank_pair(delta)
    ones = (1,) * (a.ndim - 2)
    found = {"lora_down.weight": a, "lora_up.weight": b.reshape(*b.shape, *ones)}
    if a.ndim > 2:
        tucker = _square(delta)
        if sum(part.size for part in tucker.values()) < a.size + b.size:
            found = tucker
    rank = found["lora_down.weight"].shape[0]
    return {name: part.astype(dtype) for name, part in found.items()} | {"alpha": np.array(rank, dtype)}


def _square(delta: TuckerDelta) -> dict[str, Array]:
    """Write the change as up, mid and down, with the same rank for both channel modes."""
    inner = delta.absorb(range(2, delta.core.ndim))
    rank = max(inner.ranks[:2])
    padded = pad_ranks(inner, (rank, rank, *inner.ranks[2:]))
    up, down = (np.eye(rank) if factor is None else factor for factor in padded.factors[:2])
    ones = (1,) * (inner.core.ndim - 2)
    return {
        "lora_up.weight": up.reshape(*up.shape, *ones),
        "lora_mid.weight": padded.scale * padded.core,
        "lora_down.weight": down.T.reshape(*down.T.shape, *ones),
    }


def _difference(adapter: Adapter, name: str, array: Array, base: BaseView | None) -> tuple[str, Array]:
    if base is None:
        raise _refusal(adapter, name, "a whole tensor and no base to take the difference to", "Give --base.")
    module, _, leaf = name.rpartition(".")
    value = base.weights.get(name)
    if value is None or value.shape != array.shape or leaf not in _SUFFIXES or array.dtype.kind != "f":
        raise _refusal(adapter, name, "a buffer, or a tensor of another shape than the base's")
    weight = base.weights.get(f"{module}.weight")
    suffixes = _NORM_SUFFIXES if weight is not None and weight.ndim == 1 else _SUFFIXES
    dtype = np.promote_types(array.dtype, np.float32)
    return suffixes[leaf], (array.astype(np.float64) - value).astype(dtype)


def _refusal(adapter: Adapter, name: str, got: str, fix: str = "Convert it to tpeft or peft-lora.") -> FormatError:
    return FormatError(
        f"write {adapter.source} as {NAME}, {name!r}",
        expected="a change of a module's weight, or a parameter with the base's shape",
        got=got,
        fix=fix,
    )
