"""Trainable tokens as PEFT saves them: single rows of an embedding, alone or beside LoRA.

    W'[p] = trainable_tokens_delta (n, D)        p: the n rows that adapter_config.json names

Despite their name the rows are not added to the base's: they replace them.  The change has rank n, with a one-hot
column for each row, and needs the base's rows.

PEFT also changes the weights that transformers ties to the input embedding, and saves the rows once.  The adapter then
holds the change under every name.  A linear layer that PEFT wraps in this way runs without its bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tpeft_deploy.algebra import dense_is_smaller, widen
from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.peft.config import matrix_delta
from tpeft_deploy.formats.peft.dense import base_digest, indices
from tpeft_deploy.formats.read.module import BaseView, Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_tokens"]

_ALONE, _ORIGINAL, _BESIDE = (
    "trainable_tokens_delta",
    "trainable_tokens_original",
    "token_adapter.trainable_tokens_delta",
)
_NO_BIAS = "PEFT runs this layer without its bias"


def _is_tokens(module: Module) -> bool:
    """Whether a PEFT file has rows of an embedding for the module."""
    return bool(module.checkpoint.config) and (_ALONE in module.tensors or _BESIDE in module.tensors)


@reader(
    "peft-tokens",
    About("PEFT", "trainable tokens", "embedding", "yes", "low-rank, dense, override", types=("TRAINABLE_TOKENS",)),
    {_ALONE, _ORIGINAL, _BESIDE},
    matches=_is_tokens,
)
def read_tokens(module: Module) -> Change:
    """The module's change, with the number of rows as rank, under its name and the names tied to it."""
    module.no_scale()
    module.tensors.pop(_ORIGINAL, None)
    rows = module.take(_ALONE if _ALONE in module.tensors else _BESIDE)
    weight = module.base_array("weight", "the rows of trained tokens replace those of the base")
    if weight.ndim != 2 or rows.ndim != 2 or rows.shape[1] != weight.shape[1]:
        raise module.misfit(f"rows of a weight {weight.shape}", rows.shape)
    chosen = _chosen(module, len(rows), len(weight))
    delta = _delta(weight, chosen, rows)
    names = [f"{module.name}.weight", *_tied(module)]
    layers = [name.removesuffix(".weight") for name in names]
    biases = {f"{layer}.bias": _zeros(module.checkpoint, f"{layer}.bias") for layer in layers}
    overrides = {name: bias for name, bias in biases.items() if bias is not None}
    return Change(
        deltas=dict.fromkeys(names, delta),
        overrides=overrides,
        notes=dict.fromkeys(overrides, _NO_BIAS),
        digests={name: digest for name in names for name, digest in base_digest(module.checkpoint, name).items()},
    )


def _delta(weight: Array, chosen: Array, rows: Array) -> TuckerDelta:
    change = rows - weight[chosen].astype(np.float64)
    dtype = widen(rows[:0]).dtype
    if dense_is_smaller((len(chosen),) * 2, weight.shape):
        dense = np.zeros(weight.shape, dtype)
        dense[chosen] = change
        return TuckerDelta(dense, (None, None))
    ones = np.zeros((len(weight), len(chosen)), dtype)
    ones[chosen, np.arange(len(chosen))] = 1
    return matrix_delta(ones, change.astype(dtype), 1.0)


def _zeros(checkpoint: Checkpoint, bias: str) -> Array | None:
    base = checkpoint.base
    return np.zeros_like(base.weights[bias]) if base is not None and bias in base.weights else None


def _chosen(module: Module, count: int, size: int) -> Array:
    """Rows that the configuration names for the module."""
    named = _named(module)
    whole = isinstance(named, list) and all(isinstance(row, int) and not isinstance(row, bool) for row in named)
    if not whole or len(named) != count or count == 0 or len(set(named)) != count:
        expected = f"{count} distinct token indices for it in adapter_config.json, one for each row"
        raise module.misfit(expected, f"{str(named)[:80]}")
    if not all(0 <= row < size for row in named):
        raise module.misfit(f"token indices from 0 to {size - 1}", f"{min(named)} to {max(named)}")
    return indices(module, np.array(named), size)


def _named(module: Module) -> Any:
    config = module.checkpoint.config
    if config.get("peft_type") == "TRAINABLE_TOKENS":
        return config.get("token_indices")
    named = config.get("trainable_token_indices")
    if not isinstance(named, dict):
        return named
    found = [rows for layer, rows in named.items() if module.name.endswith(layer)]
    return found[0] if len(found) == 1 else None


def _tied(module: Module) -> list[str]:
    """Names tied to the module's weight that PEFT changes too, without saving their rows separately.

    Raises:
        FormatError: the weight is tied, and it is not recorded whether PEFT changed the other modules.
    """
    base, config = module.checkpoint.base, module.checkpoint.config
    others = _other_names(base, f"{module.name}.weight") if base is not None else []
    if not others or base is None or config.get("peft_type") == "TRAINABLE_TOKENS":  # saves the rows of each module
        return []
    named = config.get("trainable_token_indices")
    layers = [other.removesuffix(".weight") for other in others]
    beside = (
        [rows for layer in layers for name, rows in named.items() if layer.endswith(name)]
        if isinstance(named, dict)
        else []
    )
    if any(rows != _named(module) for rows in beside):
        return []  # each module has different rows, saved separately
    kind = base.kinds.get(module.name, "" if isinstance(named, dict) and not beside else "Embedding")
    mapping = config.get("auto_mapping")  # null if task_type was set, which only models of transformers have
    library = str(mapping.get("parent_library")) if isinstance(mapping, dict) else "transformers"
    if not kind or not library.startswith("transformers"):
        raise FormatError(
            module.doing,
            expected=f"the input embedding of a model of transformers, where PEFT changes {others[0]!r} as well",
            got=f"a tied weight of a layer of {'unknown kind' if not kind else library}",
            fix="Give base= as the torch module, or untie the weights and train again.",
        )
    return others if "Embedding" in kind else []


def _other_names(base: BaseView, name: str) -> list[str]:
    """Other weights with the same values: names of a tied weight."""
    alike = [other for other in base.weights if other != name and base.shape(other) == base.shape(name)]
    return [other for other in alike if base.digest(other) == base.digest(name)]
