"""Formats of LyCORIS and related tools that are not read: they are recognised, so that the error states the reason."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Module
from tpeft_deploy.formats.reader import About, reader

__all__ = ["REFUSALS", "Refusal", "read_refusals"]


class Refusal(NamedTuple):
    """Reason why a method is not read, and the remedy."""

    problem: str
    fix: str


_MERGE = "Merge it into the base with LyCORIS and export the merged model."
_OFT = Refusal(
    "no released version of LyCORIS writes this tensor, so the computation of its rotation is unknown", _MERGE
)
_T_LORA = Refusal(
    "T-LoRA subtracts matrices of the base's SVD that its file does not hold, and masks ranks by timestep",
    "Train it as LoRA, or merge it into the base with LyCORIS and export the merged model.",
)
_NEVER = Refusal(
    "no version of LyCORIS writes this tensor, so its meaning is unknown",
    "Find the tool that wrote the file, and save the adapter from there as LoRA.",
)
_RESHAPED = Refusal(
    "ComfyUI's set_weight and reshape_weight replace a weight, which this reader does not support",
    "Apply it in ComfyUI and export the merged model.",
)
# Tensor suffix -> refusal.  A module with any of these is refused.
REFUSALS: dict[str, Refusal] = {
    "lambda_layer": _T_LORA,
    "oft_diag": _OFT,
    "bm.weight": _NEVER,
    "lokr_t1": _NEVER,
    "set_weight": _RESHAPED,
    "reshape_weight": _RESHAPED,
}
# Written beside those; on their own they may be names of layers.
_BESIDE = frozenset({"q_layer.weight", "p_layer.weight"})


def _is_refusals(module: Module) -> bool:
    """Whether the module has a tensor of a refused method; precedes all other readers."""
    return _found(module) is not None


@reader(
    "lycoris-refused",
    About("LyCORIS, ComfyUI", "T-LoRA and others", "none", "no", "refused"),
    frozenset(REFUSALS) | _BESIDE,
    matches=_is_refusals,
)
def read_refusals(module: Module) -> NoReturn:
    """Refuse the module."""
    name = _found(module) or min(module.tensors)
    refusal = REFUSALS.get(name, _NEVER)
    raise FormatError(f"{module.doing}, tensor {name!r}", problem=refusal.problem, fix=refusal.fix)


def _found(module: Module) -> str | None:
    # bm belongs to GLoRA only beside b1: a base may have a layer of that name.
    return next(
        (
            name
            for name in REFUSALS
            if name in module.tensors and (name != "bm.weight" or "b1.weight" in module.tensors)
        ),
        None,
    )
