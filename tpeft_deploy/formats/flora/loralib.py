"""FLoRA for linear layers as a fork of loralib writes it (Chongjie-Si/Subspace-Tuning, loralib/layers_flora.py).

    dW = s B E A        lora_B (O, r), lora_E (r, r), lora_A (r, I), s = alpha / (ranknum + 1e-5)

The file does not record alpha: it is r unless a scale is given, which replaces alpha / r.  AdaLoRA uses the same names,
with an E of one column.  The file may also hold the layer's weight, which training does not change.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import BaseMismatch, FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "flora-loralib"
ABOUT = About(
    "Subspace-Tuning's fork of loralib",
    "FLoRA",
    "linear",
    "no",
    "low-rank",
    "alpha is taken for the rank unless a scale is given",
)
SUFFIXES = frozenset({"lora_A", "lora_E", "lora_B", "ranknum", "weight"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has a square E under its bare name; an E of one element needs a ranknum."""
    core = module.tensors.get("lora_E")
    if core is None or core.ndim != 2 or core.shape[0] != core.shape[1] or checkpoint.config:
        return False
    return core.shape[0] > 1 or "ranknum" in module.tensors


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's E as the core and B, A as the factors.

    Raises:
        FormatError: a tensor is missing or does not fit the others, or ranknum is not a positive number.
    """
    down, core, up = (take(module, checkpoint, name) for name in ("lora_A", "lora_E", "lora_B"))
    rank = core.shape[0]
    ranknum = module.tensors.pop("ranknum", None)  # loralib's lora_state_dict leaves it out
    divisor = float(rank if ranknum is None else ranknum.reshape(-1)[0])
    if ranknum is not None and (ranknum.size != 1 or not divisor > 0):
        raise FormatError(
            doing(module, checkpoint), expected="one positive number as ranknum", got=ranknum.reshape(-1)[:4].tolist()
        )
    given = checkpoint.scale
    scale = (1.0 if given is None else given) * rank / (divisor + 1e-5)
    with reporting(module, checkpoint):
        delta = TuckerDelta(core, (up, down.T), scale)
    target = f"{module.name}.weight"
    notes = [] if given is not None else ["no scale was given, so alpha is taken to be the rank, as loralib does"]
    notes += _leave_out_weight(module, checkpoint)
    return Change(deltas={target: delta}, notes={target: "; ".join(notes)} if notes else {})


def _leave_out_weight(module: Module, checkpoint: Checkpoint) -> list[str]:
    """Pop the layer's weight if it equals the base's; raise if it differs or there is no base."""
    copy = module.tensors.pop("weight", None)
    if copy is None:
        return []
    if checkpoint.base is None:
        return ["the file's copy of the base's weight was not compared, as no base was given"]
    name = f"{module.name}.weight"
    if name in checkpoint.base.weights and np.array_equal(copy, checkpoint.base.weights[name]):
        return []
    raise BaseMismatch(
        doing(module, checkpoint),
        expected=f"the weight {name!r} of {checkpoint.base.name}",
        got="another, perhaps with adapters merged into it",
        fix="Give the base that it was trained on, or save it unmerged (in training mode).",
    )
