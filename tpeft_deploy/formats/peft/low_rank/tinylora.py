"""TinyLoRA as PEFT saves it: LoRA-XS with a small core that is a random projection of a few trained numbers.

    dW = B R A        R = sum_i v[i] P[i]

tinylora_A (r, I), tinylora_B (O, r) and tinylora_P (u, r, r) are the module's; base_model.tinylora_v.<group> (u,) is
shared by the modules of a group, which are consecutive in the model's order.  The file does not record a module's
group: with several groups it follows from the base's order of the targeted modules.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import matrix_delta, number, of_type, stored_transposed
from tpeft_deploy.formats.peft.dense import no_projection
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, needs_base, no_scale, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SHARED", "SUFFIXES", "matches", "read"]

NAME = "peft-tinylora"
ABOUT = About(
    "PEFT",
    "TinyLoRA",
    "linear, Conv1D, embedding",
    "for more than one group of layers",
    "low-rank",
    "the file must hold its projections",
    types=("TINYLORA",),
)
_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"
SUFFIXES = frozenset({_A, _B, _P})
_VECTOR = "base_model.tinylora_v."
SHARED = frozenset(f"{_VECTOR}{group}" for group in range(10_000))  # at most one per module
_ORDER = f"{NAME} order"  # memo key: order of the targeted modules
_KINDS = {"Linear", "NonDynamicallyQuantizableLinear", "Conv1D", "Embedding"}
matches = of_type("TINYLORA", _A)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, with R as the core.

    Raises:
        FormatError: the file has no projections P or no vector for the module; a tensor is missing or does not fit; or
            the group is ambiguous.
    """
    no_scale(module, checkpoint)
    down, up = take(module, checkpoint, _A), take(module, checkpoint, _B)
    if _P not in module.tensors:
        raise no_projection(module, checkpoint, f"the projections {_P}")
    projections, vector = take(module, checkpoint, _P), _vector(module, checkpoint)
    with reporting(module, checkpoint):
        core = np.einsum("i,ijk->jk", vector, projections)
        transposed = stored_transposed(module, checkpoint, up.shape[0], down.shape[1])
        delta = matrix_delta(up, down, 1.0, transposed=transposed, core=core)
    return Change(deltas={f"{module.name}.weight": delta})


def _vector(module: Module, checkpoint: Checkpoint) -> Array:
    if NAME not in checkpoint.memo:
        checkpoint.memo[NAME] = sum(key.startswith(_VECTOR) for key in checkpoint.shared)
    groups: int = checkpoint.memo[NAME]
    group = 0 if groups == 1 else _group(module, checkpoint, groups)
    vector = checkpoint.shared.get(f"{_VECTOR}{group}")
    if vector is None:
        raise FormatError(
            doing(module, checkpoint), expected=f"a shared tensor {_VECTOR}{group}", got=f"{groups} shared tensors"
        )
    return vector


def _group(module: Module, checkpoint: Checkpoint, groups: int) -> int:
    """Group of the module, counted as in TinyLoraModel._create_and_replace."""
    if checkpoint.base is None:
        raise needs_base(module, checkpoint, "which trained numbers a module has depends on the order of modules")
    if _ORDER not in checkpoint.memo:
        known = [name for name, kind in checkpoint.base.kinds.items() if kind in _KINDS and _targets(checkpoint, name)]
        checkpoint.memo[_ORDER] = {name: place for place, name in enumerate(known)}
    targeted: dict[str, int] = checkpoint.memo[_ORDER]
    expected = max(1, round(len(targeted) * (1 - number(checkpoint.config, "weight_tying", checkpoint.source))))
    if module.name not in targeted or expected != groups or checkpoint.part:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"{expected} groups for the {len(targeted)} modules of {checkpoint.base.name} that are targeted",
            got=f"{groups} shared tensors, so that the module's group is ambiguous",
            fix="Give base= as a torch module and whole, without part=, or train with weight_tying=1.",
        )
    return min(targeted[module.name] // max(1, len(targeted) // groups), groups - 1)


def _targets(checkpoint: Checkpoint, name: str) -> bool:
    targets = checkpoint.config.get("target_modules") or ()
    if isinstance(targets, str):
        return checkpoint.matcher("target_modules", whole=True).first(name) is not None
    return checkpoint.endings("target_modules").end_module(name)
