"""LoRA on parameters that are not a layer's weight (`target_parameters`), such as stacked experts.

    parameter (E, O, I)    dW[e] = s B_e A_e          lora_A.weight (r E, I), rows expert by expert
    parameter (E, I, O)    dW[e] = s (B_e A_e)^T      lora_B.weight (O, r E), columns rank by rank
    parameter (O, I)       dW = s B A, as one expert

The file names only the module.  Several parameters of a module are wrapped one around the other, in the module's order:
`<module>.lora_A` is the last, `<module>.base_layer.lora_A` the one before it.
"""

from __future__ import annotations

import re

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import is_type
from tpeft_deploy.formats.peft.dense import misfit
from tpeft_deploy.formats.peft.low_rank.lora import scale_of
from tpeft_deploy.formats.products.compact import DENSE, dense_is_smaller, is_dense, low_rank, widen
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.patterns import Endings
from tpeft_deploy.formats.read.take import doing, needs_base, no_scale, reporting, take
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-lora-parameter"
ABOUT = About("PEFT", "LoRA (target_parameters)", "stacked experts, other parameters", "yes", "low-rank, dense")
_A, _B = "lora_A.weight", "lora_B.weight"
SUFFIXES = frozenset({_A, _B})
_WRAPPED = re.compile(r"(?:\.base_layer)*$")


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the configuration targets a parameter of this module; precedes plain LoRA."""
    if not is_type(checkpoint, "LORA") or _A not in module.tensors:
        return False
    targets = checkpoint.config.get("target_parameters")
    if not targets:
        return False
    if checkpoint.base is None:
        if NAME not in checkpoint.memo:
            checkpoint.memo[NAME] = Endings(target.rpartition(".")[0] for target in targets)
        owners: Endings = checkpoint.memo[NAME]
        return owners.end_module(checkpoint.trained_name(module.name))
    return bool(_targeted(module, checkpoint))


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The change of the parameter that these tensors belong to, dense if that has fewer elements.

    Raises:
        FormatError: no base was given; the tensors do not fit it; or a parameter has as many inputs as outputs, so
            that its layout is ambiguous.
    """
    no_scale(module, checkpoint)
    down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
    if checkpoint.base is None:
        raise needs_base(module, checkpoint, "target_parameters are resolved by the base's parameters")
    name = _parameter(module, checkpoint)
    shape = checkpoint.base.shape(name)
    with reporting(module, checkpoint):
        experts = shape[0] if len(shape) == 3 else 1
        rank, left = divmod(down.shape[0], experts)
        fits = len(shape) in {2, 3} and not left and rank and up.shape[1:] == down.shape[:1]
        if not fits or sorted(shape[-2:]) != sorted((up.shape[0], down.shape[1])):
            raise _misfit(module, checkpoint, name, shape, down, up)
        scale = scale_of(checkpoint, name, rank)
        transposed = _transposed(module, checkpoint, name, shape, outputs=up.shape[0])
        delta = _delta(down, up, scale, shape, transposed=transposed)
    return Change(deltas={name: delta}, notes={name: DENSE} if is_dense(delta) else {})


def _parameter(module: Module, checkpoint: Checkpoint) -> str:
    """The parameter of these tensors, by the number of wrappers around it."""
    names = _targeted(module, checkpoint)
    if len(names) > 1 and checkpoint.base is not None and not checkpoint.base.kinds:
        raise FormatError(
            doing(module, checkpoint),
            expected="a torch module as base, which keeps the order of a module's parameters",
            got=f"a base without it, and {len(names)} parameters that target_parameters name",
            fix="Give base= as a torch module.",
        )
    wrapped = _WRAPPED.search(module.key)
    depth = wrapped[0].count(".base_layer") if wrapped else 0
    if depth >= len(names):
        expected = f"at least {depth + 1} parameters of this module that target_parameters name"
        raise misfit(module, checkpoint, expected, ", ".join(names))
    return names[-1 - depth]


def _own_parameters(module: Module, checkpoint: Checkpoint) -> list[str]:
    """Parameters of the module without those of submodules, in the base's order."""
    return checkpoint.parameters.get(module.name, [])


def _targeted(module: Module, checkpoint: Checkpoint) -> list[str]:
    targets = checkpoint.endings("target_parameters")
    names = _own_parameters(module, checkpoint)
    return [name for name in names if targets.end_module(checkpoint.trained_name(name))]


def _transposed(module: Module, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], *, outputs: int) -> bool:
    if len(shape) == 2:
        return False
    if shape[1] == shape[2]:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a parameter {name!r} with different numbers of inputs and outputs",
            got=f"shape {shape}, for which only the module's code defines whether outputs come first",
            fix="Merge it with PEFT's merge_and_unload and export the merged model as a separate base.",
        )
    return shape[2] == outputs


def _delta(down: Array, up: Array, scale: float, shape: tuple[int, ...], *, transposed: bool) -> TuckerDelta:
    if len(shape) == 2:
        return low_rank(up, down, scale)
    experts, columns = shape[0], up.shape[1]
    rank, inputs = columns // experts, down.shape[1]
    ranks = (experts, inputs, columns) if transposed else (experts, columns, inputs)
    if dense_is_smaller(ranks, shape):
        order = "ore,eri->eio" if transposed else "ore,eri->eoi"
        down, up = widen(down).reshape(experts, rank, inputs), widen(up).reshape(-1, rank, experts)
        return TuckerDelta(np.einsum(order, up, down), (None, None, None), scale)
    # The core is zero except where the rows of A and the columns of B belong to the same expert.
    core = np.zeros((experts, rank, experts, inputs), down.dtype)
    core[range(experts), :, range(experts)] = down.reshape(experts, rank, inputs)
    core = core.reshape(experts, columns, inputs)
    return (
        TuckerDelta(core.swapaxes(1, 2), (None, None, up), scale)
        if transposed
        else TuckerDelta(core, (None, up, None), scale)
    )


def _misfit(
    module: Module, checkpoint: Checkpoint, name: str, shape: tuple[int, ...], down: Array, up: Array
) -> FormatError:
    expected = f"tensors for the parameter {name!r} of shape {shape}"
    return misfit(module, checkpoint, expected, f"lora_A {down.shape} and lora_B {up.shape}")
