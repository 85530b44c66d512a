"""VeRA and PVeRA as PEFT saves them: two shared projections, and two vectors per layer (arXiv 2310.11454).

    dW = (b B[:O]) (d A[:, :I])        vera_lambda_b (O,), vera_lambda_d (r,)
                                       base_model.vera_A (r, I_max), base_model.vera_B (O_max, r)

PVeRA samples the input of B in training, with mean and variance from the halves of A and d; in evaluation it uses the
mean, that is the first half of A and d.

Without save_projection the projections are regenerated from `projection_prng_key` with torch's generator, which
according to PEFT is not accurate on all systems: such files are refused.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.peft.config import diagonal_delta, is_type, stored_transposed
from tpeft_deploy.formats.peft.dense import misfit, no_projection
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import base_array, no_scale, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "NAME", "SHARED", "SUFFIXES", "matches", "read"]

NAME = "peft-vera"
ABOUT = About(
    "PEFT", "VeRA, PVeRA", "linear, Conv1D", "yes", "low-rank", "saved with save_projection", types=("VERA", "PVERA")
)
_KINDS = {"VERA": "vera", "PVERA": "pvera"}
SUFFIXES = frozenset({f"{kind}_lambda_{vector}" for kind in _KINDS.values() for vector in "bd"})
SHARED = frozenset({f"base_model.{kind}_{letter}" for kind in _KINDS.values() for letter in "AB"})


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether a PEFT file of type VERA or PVERA has a vector for the module."""
    return any(is_type(checkpoint, kind) and f"{name}_lambda_d" in module.tensors for kind, name in _KINDS.items())


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of the rank of the projections.

    Raises:
        FormatError: the file has no projections; a tensor is missing or does not fit; or no base was given (needed for
            the number of inputs).
    """
    no_scale(module, checkpoint)
    kind = _KINDS[checkpoint.config["peft_type"]]
    outer, inner = take(module, checkpoint, f"{kind}_lambda_b"), take(module, checkpoint, f"{kind}_lambda_d")
    first, last = (_projection(module, checkpoint, f"base_model.{kind}_{letter}") for letter in "AB")
    shape = base_array(module, checkpoint, "weight", "VeRA's projections do not record a layer's inputs").shape
    with reporting(module, checkpoint):
        outputs = outer.size
        inputs = int(np.prod(shape)) // outputs
        fits = outer.ndim == 1 and first.ndim == last.ndim == 2 and len(shape) == 2 and outputs in shape
        if not fits or inputs > first.shape[1] or outputs > last.shape[0]:
            expected = f"projections at least as large as the weight {shape}, of {outputs} outputs"
            raise misfit(module, checkpoint, expected, f"{first.shape} and {last.shape}")
        if kind == "pvera":
            inner, first = inner[: len(inner) // 2], first[: len(first) // 2]
        transposed = stored_transposed(module, checkpoint, outputs, inputs)
        up, down = outer[:, None] * last[:outputs], first[:, :inputs]
        delta = diagonal_delta(up, inner, down, 1.0, transposed=transposed)
    return Change(deltas={f"{module.name}.weight": delta})


def _projection(module: Module, checkpoint: Checkpoint, key: str) -> Array:
    if key not in checkpoint.shared:
        raise no_projection(module, checkpoint, f"the shared projection {key}")
    return checkpoint.shared[key]
