"""FLoRA as its authors' package writes it (SJTU-DeepVisionLab/FLoRA): linear, Conv2d and Conv3d weights.

    dW = s G x_0 U_0 x_1 U_1 ...    param_G (R_i, R_o, R_k1, ...)
                                    param_0 (I, R_i), param_1 (O, R_o), param_2 (K1, R_k1), ...

The package puts inputs before outputs, which is swapped here.  The file does not record s, which must be given.  The
file is the state dict of the whole model, base included.
"""

from __future__ import annotations

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "flora-sjtu"
ABOUT = About(
    "FLoRA (SJTU-DeepVisionLab)",
    "FLoRA",
    "linear, conv 2d and 3d",
    "no",
    "low-rank",
    "the scale must be given; the file holds the whole model",
)
_CORE = "flora_layer.param_G"
_FACTORS = tuple(f"flora_layer.param_{axis}" for axis in range(5))
SUFFIXES = frozenset({_CORE, *_FACTORS})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has a FLoRA core or one of its factors."""
    return not SUFFIXES.isdisjoint(module.tensors)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's core and factors as a Tucker delta in torch order.

    Raises:
        FormatError: no scale was given; a factor is missing or does not fit the core.
    """
    core = take(module, checkpoint, _CORE)
    if checkpoint.scale is None:
        raise FormatError(
            doing(module, checkpoint),
            problem="FLoRA's files do not record the scale that dW is multiplied by",
            fix="Give scale=, FLoRALayer's scale in training: 1.0 unless it was set, 4.0 in the authors' example.",
        )
    with reporting(module, checkpoint):
        inputs, outputs, *kernel = [take(module, checkpoint, name) for name in _FACTORS[: core.ndim]]
        delta = TuckerDelta(core.swapaxes(0, 1), (outputs, inputs, *kernel), checkpoint.scale)
    return Change(deltas={f"{module.name}.weight": delta})
