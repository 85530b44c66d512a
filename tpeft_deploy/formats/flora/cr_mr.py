"""FLoRA for linear layers as a fork of PEFT writes it (Chongjie-Si/Subspace-Tuning, CR_MR/peft/tuners/flora.py).

    dW = s B E A        lora_B.weight (O, r), lora_E.weight (r, r), lora_A.weight (r, I), s = lora_alpha / r

Its adapter_config.json has peft_type LORA: a reader of plain LoRA would ignore E and give a wrong change.
"""

from __future__ import annotations

import math

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, no_scale, reporting, take
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "flora-cr-mr"
ABOUT = About("Subspace-Tuning's fork of PEFT", "FLoRA", "linear", "no", "low-rank")
_CORE = "lora_E.weight"
SUFFIXES = frozenset({"lora_A.weight", _CORE, "lora_B.weight"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has E as a separate layer; precedes the reader of plain LoRA."""
    return _CORE in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's E as the core and B, A as the factors, swapped if the layer stores its weight transposed.

    Raises:
        FormatError: a tensor is missing or does not fit the others; the configuration lacks lora_alpha or states
            another rank, or parts of a fused layer; or neither a configuration nor a scale was given.
    """
    down, core, up = (take(module, checkpoint, name) for name in ("lora_A.weight", _CORE, "lora_B.weight"))
    with reporting(module, checkpoint):
        scale = _scale(module, checkpoint, core.shape[0])
        factors = (down.T, up) if checkpoint.config.get("fan_in_fan_out") else (up, down.T)
        delta = TuckerDelta(core.T if factors[0] is not up else core, factors, scale)
    return Change(deltas={f"{module.name}.weight": delta})


def _scale(module: Module, checkpoint: Checkpoint, rank: int) -> float:
    config = checkpoint.config
    if not config:
        if checkpoint.scale is None:
            raise FormatError(
                doing(module, checkpoint),
                problem="this FLoRA keeps its scale in adapter_config.json, which is not there",
                fix="Give the directory that holds both files, or scale=, lora_alpha / r in training.",
            )
        return checkpoint.scale
    no_scale(module, checkpoint)
    if config.get("enable_lora"):
        raise FormatError(
            doing(module, checkpoint),
            expected="enable_lora null",
            got=config["enable_lora"],
            fix="Parts of a fused layer are not read: train with target_modules that are separate layers.",
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(
            doing(module, checkpoint), expected="a finite lora_alpha in adapter_config.json", got=repr(alpha)
        )
    if config.get("r", rank) != rank:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"r {config['r']}, as in adapter_config.json",
            got=f"rank {rank}",
            fix="Copy both files of one adapter.",
        )
    return float(alpha) / rank
