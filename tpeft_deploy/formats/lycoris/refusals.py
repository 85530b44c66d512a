"""What LyCORIS and its kin write and no reader here follows: recognised, so that the refusal tells why."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.read.module import Checkpoint, Module
from tpeft_deploy.formats.read.take import doing

__all__ = ["ABOUT", "NAME", "REFUSALS", "SUFFIXES", "Refusal", "matches", "read"]

NAME = "lycoris-refused"
ABOUT = About("LyCORIS, ComfyUI", "T-LoRA and others", "none", "no", "refused")


class Refusal(NamedTuple):
    """Why a method cannot be read, and what its user can do."""

    problem: str
    fix: str


_MERGE = "Merge it into the base with LyCORIS and export the merged model."
_OFT = Refusal(
    "no released version of LyCORIS writes this tensor, so nothing says how its rotation is computed", _MERGE
)
_T_LORA = Refusal(
    "T-LoRA subtracts matrices of the base's SVD that its file does not hold, and masks ranks by timestep",
    "Train it as LoRA, or merge it into the base with LyCORIS and export the merged model.",
)
_NEVER = Refusal(
    "no version of LyCORIS writes this tensor, so nothing says what it would mean",
    "Find the tool that wrote the file, and save the adapter from there as LoRA.",
)
_RESHAPED = Refusal(
    "ComfyUI's set_weight and reshape_weight replace a weight, which this reader does not follow",
    "Apply it in ComfyUI and export the merged model.",
)

# Tensor suffix -> refusal.  A module with any of these is refused whole.
REFUSALS: dict[str, Refusal] = {
    "lambda_layer": _T_LORA,
    "oft_diag": _OFT,
    "bm.weight": _NEVER,
    "lokr_t1": _NEVER,
    "set_weight": _RESHAPED,
    "reshape_weight": _RESHAPED,
}
# Written beside those; alone they may be layers of the base that happen to have such names.
_BESIDE = frozenset({"q_layer.weight", "p_layer.weight"})
SUFFIXES = frozenset(REFUSALS) | _BESIDE


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has a tensor of a method that is refused; ask this before any other reader."""
    return _found(module) is not None


def read(module: Module, checkpoint: Checkpoint) -> NoReturn:
    """Refuse the module.

    Raises:
        FormatError: always.
    """
    name = _found(module) or min(module.tensors)
    refusal = REFUSALS.get(name, _NEVER)
    raise FormatError(f"{doing(module, checkpoint)}, tensor {name!r}", problem=refusal.problem, fix=refusal.fix)


def _found(module: Module) -> str | None:
    # bm is GLoRA's only beside b1: a base may have a layer of that name.
    return next(
        (
            name
            for name in REFUSALS
            if name in module.tensors and (name != "bm.weight" or "b1.weight" in module.tensors)
        ),
        None,
    )
