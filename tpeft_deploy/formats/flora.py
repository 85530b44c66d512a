"""Readers of FLoRA: as the authors write it, and as two forks in Subspace-Tuning, of PEFT and of loralib, do."""

from __future__ import annotations

import math

import numpy as np

from tpeft_deploy.errors import BaseMismatch, FormatError
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import TuckerDelta

__all__ = ["read_cr_mr", "read_loralib", "read_sjtu"]

_SJTU_CORE = "flora_layer.param_G"
_FACTORS = tuple(f"flora_layer.param_{axis}" for axis in range(5))


@reader(
    "flora-sjtu",
    About(
        "FLoRA (SJTU-DeepVisionLab)",
        "FLoRA",
        "linear, conv 2d and 3d",
        "no",
        "low-rank",
        "the scale must be given; the file holds the whole model",
    ),
    {_SJTU_CORE, *_FACTORS},
)
def read_sjtu(module: Module) -> Change:
    """FLoRA as its authors' package writes it (SJTU-DeepVisionLab/FLoRA): linear, Conv2d and Conv3d weights.

        dW = s G x_0 U_0 x_1 U_1 ...    param_G (R_i, R_o, R_k1, ...)
                                        param_0 (I, R_i), param_1 (O, R_o), param_2 (K1, R_k1), ...

    The package puts inputs before outputs, which is swapped here.  The file does not record s, which must be given.
    The file is the state dict of the whole model, base included.
    """
    core = module.take(_SJTU_CORE)
    if module.checkpoint.scale is None:
        raise FormatError(
            module.doing,
            problem="FLoRA's files do not record the scale that dW is multiplied by",
            fix="Give scale=, FLoRALayer's scale in training: 1.0 unless it was set, 4.0 in the authors' example.",
        )
    with module.reporting():
        inputs, outputs, *kernel = [module.take(name) for name in _FACTORS[: core.ndim]]
        delta = TuckerDelta(core.swapaxes(0, 1), (outputs, inputs, *kernel), module.checkpoint.scale)
    return Change(deltas={f"{module.name}.weight": delta})


_CR_MR_CORE = "lora_E.weight"


@reader(
    "flora-cr-mr",
    About("Subspace-Tuning's fork of PEFT", "FLoRA", "linear", "no", "low-rank"),
    {"lora_A.weight", _CR_MR_CORE, "lora_B.weight"},
    marks={_CR_MR_CORE},
)
def read_cr_mr(module: Module) -> Change:
    """FLoRA for linear layers as a fork of PEFT writes it (Chongjie-Si/Subspace-Tuning, CR_MR/peft/tuners/flora.py).

        dW = s B E A        lora_B.weight (O, r), lora_E.weight (r, r), lora_A.weight (r, I), s = lora_alpha / r

    Its adapter_config.json has peft_type LORA: a reader of plain LoRA would ignore E and give a wrong change.
    """
    down, core, up = (module.take(name) for name in ("lora_A.weight", _CR_MR_CORE, "lora_B.weight"))
    with module.reporting():
        scale = _cr_mr_scale(module, core.shape[0])
        factors = (down.T, up) if module.checkpoint.config.get("fan_in_fan_out") else (up, down.T)
        delta = TuckerDelta(core.T if factors[0] is not up else core, factors, scale)
    return Change(deltas={f"{module.name}.weight": delta})


def _cr_mr_scale(module: Module, rank: int) -> float:
    config = module.checkpoint.config
    if not config:
        if module.checkpoint.scale is None:
            raise FormatError(
                module.doing,
                problem="this FLoRA keeps its scale in adapter_config.json, which is not there",
                fix="Give the directory that holds both files, or scale=, lora_alpha / r in training.",
            )
        return module.checkpoint.scale
    module.no_scale()
    if config.get("enable_lora"):
        raise FormatError(
            module.doing,
            expected="enable_lora null",
            got=config["enable_lora"],
            fix="Parts of a fused layer are not read: train with target_modules that are separate layers.",
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise FormatError(module.doing, expected="a finite lora_alpha in adapter_config.json", got=repr(alpha))
    if config.get("r", rank) != rank:
        raise FormatError(
            module.doing,
            expected=f"r {config['r']}, as in adapter_config.json",
            got=f"rank {rank}",
            fix="Copy both files of one adapter.",
        )
    return float(alpha) / rank


def _is_loralib(module: Module) -> bool:
    """Whether the module has a square E under its bare name; an E of one element needs a ranknum."""
    core = module.tensors.get("lora_E")
    if core is None or core.ndim != 2 or core.shape[0] != core.shape[1] or module.checkpoint.config:
        return False
    return core.shape[0] > 1 or "ranknum" in module.tensors


@reader(
    "flora-loralib",
    About(
        "Subspace-Tuning's fork of loralib",
        "FLoRA",
        "linear",
        "no",
        "low-rank",
        "alpha is taken for the rank unless a scale is given",
    ),
    {"lora_A", "lora_E", "lora_B", "ranknum", "weight"},
    matches=_is_loralib,
)
def read_loralib(module: Module) -> Change:
    """FLoRA for linear layers as a fork of loralib writes it (Chongjie-Si/Subspace-Tuning, loralib/layers_flora.py).

        dW = s B E A        lora_B (O, r), lora_E (r, r), lora_A (r, I), s = alpha / (ranknum + 1e-5)

    The file does not record alpha: it is r unless a scale is given, which replaces alpha / r.  AdaLoRA uses the same
    names, with an E of one column.  The file may also hold the layer's weight, which training does not change.
    """
    down, core, up = (module.take(name) for name in ("lora_A", "lora_E", "lora_B"))
    rank = core.shape[0]
    ranknum = module.tensors.pop("ranknum", None)  # loralib's lora_state_dict leaves it out
    divisor = float(rank if ranknum is None else ranknum.reshape(-1)[0])
    if ranknum is not None and (ranknum.size != 1 or not divisor > 0):
        raise FormatError(module.doing, expected="one positive number as ranknum", got=ranknum.reshape(-1)[:4].tolist())
    given = module.checkpoint.scale
    scale = (1.0 if given is None else given) * rank / (divisor + 1e-5)
    with module.reporting():
        delta = TuckerDelta(core, (up, down.T), scale)
    target = f"{module.name}.weight"
    notes = [] if given is not None else ["no scale was given, so alpha is taken to be the rank, as loralib does"]
    notes += _leave_out_weight(module)
    return Change(deltas={target: delta}, notes={target: "; ".join(notes)} if notes else {})


def _leave_out_weight(module: Module) -> list[str]:
    """Pop the layer's weight if it equals the base's; raise if it differs or there is no base."""
    copy = module.tensors.pop("weight", None)
    if copy is None:
        return []
    if module.checkpoint.base is None:
        return ["the file's copy of the base's weight was not compared, as no base was given"]
    name = f"{module.name}.weight"
    if name in module.checkpoint.base.weights and np.array_equal(copy, module.checkpoint.base.weights[name]):
        return []
    raise BaseMismatch(
        module.doing,
        expected=f"the weight {name!r} of {module.checkpoint.base.name}",
        got="another, perhaps with adapters merged into it",
        fix="Give the base that it was trained on, or save it unmerged (in training mode).",
    )
