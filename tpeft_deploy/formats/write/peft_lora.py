"""Write an adapter as a plain LoRA that PEFT loads, convolutions and whole tensors included.

A Tucker change is exactly a LoRA of rank R_o (`algebra.low_rank_pair`): lora_B = U_0, lora_A = s G x_1 U_1 x_2 U_2 ..,
with lora_alpha = r, so that PEFT's factor is 1.  Ranks per module are in rank_pattern and alpha_pattern.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.algebra import low_rank_pair
from tpeft_deploy.errors import FormatError
from tpeft_deploy.files import new_directory
from tpeft_deploy.formats.read.module import BaseView
from tpeft_deploy.formats.read.names import PEFT_PREFIX
from tpeft_deploy.formats.read.saved import CONFIG, TENSORS
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["NAME", "refuse_gains", "write"]

NAME = "peft-lora"
_TRANSPOSED = frozenset({"Conv1D", "Embedding"})  # weight (inputs, outputs), so that dW = (B A)^T


def write(adapter: Adapter, path: Path, *, base: BaseView | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        adapter: adapter without gains; every target is a module's `weight`.
        path: directory to write; it must not exist, or be empty.
        base: base of the adapter, to distinguish embeddings and transformers' Conv1D from linear layers; without it
            every matrix is written as a linear layer's.  Also the source of the other tensors of a module that the
            adapter replaces in part: PEFT loads whole modules.

    Raises:
        FormatError: LoRA cannot express the adapter; nothing was written.
    """
    from safetensors.numpy import save_file

    refuse_gains(adapter, NAME)
    kinds = base.kinds if base is not None else {}
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for name, delta in adapter.deltas.items():
        module = _module(name, adapter, kinds)
        found = _tensors(delta, kinds.get(module, ""))
        ranks[module] = found["lora_embedding_A" if "lora_embedding_A" in found else "lora_A.weight"].shape[0]
        tensors |= {f"{PEFT_PREFIX}{module}.{suffix}": array for suffix, array in found.items()}
    beside = {name for name in adapter.overrides if name.rpartition(".")[0] in ranks}
    for name in beside:
        module, _, leaf = name.rpartition(".")
        tensors[f"{PEFT_PREFIX}{module}.base_layer.{leaf}"] = np.asarray(adapter.overrides[name], order="C")
    saved = {_saved_module(name, adapter, ranks) for name in adapter.overrides.keys() - beside}
    for name, array in _whole_modules(adapter, saved, base).items():
        tensors[PEFT_PREFIX + name] = np.asarray(array, order="C")
    config = _config(ranks, kinds, saved)
    config["bias"] = "lora_only" if beside else "none"
    with new_directory(path) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _saved_module(name: str, adapter: Adapter, ranks: Mapping[str, int]) -> str:
    module = name.rpartition(".")[0]
    if not module or any(adapted.startswith(f"{module}.") for adapted in ranks):
        raise FormatError(
            f"write {adapter.source} as {NAME}, override {name!r}",
            expected="a parameter of a module that PEFT can save whole",
            got="one of the model itself" if not module else f"one of {module!r}, inside which modules are adapted",
            fix="Convert it to tpeft.",
        )
    return module


def _whole_modules(adapter: Adapter, saved: Set[str], base: BaseView | None) -> dict[str, Array]:
    """All tensors of the saved modules: the adapter's, else the base's."""
    inside = {
        name: base.weights[name]
        for name in (base.weights if base is not None else ())
        if base is not None and any(name.startswith(f"{module}.") for module in saved)
    }
    return inside | {n: array for n, array in adapter.overrides.items() if n.rpartition(".")[0] in saved}


def refuse_gains(adapter: Adapter, format: str) -> None:
    """Raise for an adapter with gains, for formats that can only add to weights."""
    for name in adapter.gains:
        raise FormatError(
            f"write {adapter.source} as {format}, weight {name!r}",
            expected="a change that is added to the weight",
            got="a gain (DoRA, IA3), which multiplies it",
            fix="Convert it to tpeft, or export it folded.",
        )


def _module(name: str, adapter: Adapter, kinds: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    parent = module.rpartition(".")[0]
    if leaf != "weight" or not module or "MultiheadAttention" in (kinds.get(module), kinds.get(parent)):
        raise FormatError(
            f"write {adapter.source} as {NAME}, weight {name!r}",
            expected="the weight of a linear, convolution or embedding module",
            got="a parameter of another kind, or of a MultiheadAttention, for which PEFT applies LoRA differently",
            fix="Convert it to tpeft.",
        )
    return module


def _tensors(delta: TuckerDelta, kind: str) -> dict[str, Array]:
    pair = low_rank_pair(delta)
    dtype = np.promote_types(delta.core.dtype, np.float32)
    a, b = (np.ascontiguousarray(part.astype(dtype)) for part in pair)
    if kind in _TRANSPOSED:
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    if kind == "Embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b.reshape(*b.shape, *[1] * (a.ndim - 2))}


def _config(ranks: Mapping[str, int], kinds: Mapping[str, str], saved: Set[str]) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # Anchored and escaped: PEFT treats these as regular expressions that match the end of a name.
    pattern = {f"^{re.escape(module)}": value for module, value in sorted(ranks.items()) if value != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": any(kinds.get(module) == "Conv1D" for module in ranks),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
