"""FRoD as PEFT saves it: the weight is decomposed in a basis that layers share, and the coefficients are trained.

W = U_0 V^T, the columns of U_0 at length 1 as U        W' = U (diag(l) + S) V^T

frod_lambda_l (I,) as l, and frod_lambda_s_values (n,): the entries of the sparse S.  All layers of a name, such as
"self_attn_q_proj" of any block, share the basis and the positions of the entries: base_model.frod_V.<name> (I, I),
.frod_s_indices.<name> (2, n), .frod_s_size.<name> (2,).  PEFT saves them with save_projection; otherwise they depend on
torch's random numbers and on signs of eigenvectors.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base, dense_change
from tpeft_deploy.formats.peft.config import of_type, stored_transposed
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import doing, reporting, take
from tpeft_deploy.tucker import Array

__all__ = ["ABOUT", "MAY_BE_EMPTY", "NAME", "SHARED_PREFIXES", "SUFFIXES", "matches", "read"]

NAME = "peft-frod"
ABOUT = About(
    "PEFT", "FRoD", "linear, Conv1D", "yes", "dense", "the file must hold its shared tensors", types=("FROD",)
)
_DIAGONAL, _ENTRIES = "frod_lambda_l", "frod_lambda_s_values"
SUFFIXES = frozenset({_DIAGONAL, _ENTRIES})
MAY_BE_EMPTY = frozenset({_ENTRIES})
_BASIS, _PLACES, _SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
_CONDITION = 1e10  # limit of the condition number for float64
SHARED_PREFIXES = (_BASIS, _PLACES, _SIZE)
matches = of_type("FROD", _DIAGONAL)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's W' - W, dense.

    Raises:
        FormatError: no base was given, the shared tensors were not saved, or a tensor is missing or does not fit.
    """
    weight = base_weight(module, checkpoint, "FRoD")
    diagonal, entries = take(module, checkpoint, _DIAGONAL), take(module, checkpoint, _ENTRIES)
    basis, places, size = (_shared(module, checkpoint, prefix) for prefix in SHARED_PREFIXES)
    with reporting(module, checkpoint):
        inputs = diagonal.size
        transposed = stored_transposed(module, checkpoint, weight.size // max(1, inputs), inputs)
        matrix = weight.T if transposed else weight
        fits = weight.ndim == 2 and basis.shape == (matrix.shape[1],) * 2 and size.tolist() == [inputs, inputs]
        fits = fits and places.dtype.kind == "i" and places.shape == (2, entries.size) and inputs == len(basis)
        if not fits or (entries.size and not 0 <= places.min() <= places.max() < inputs):
            raise ValueError(f"a basis {basis.shape} and {entries.size} entries for a weight of shape {weight.shape}")
        basis = basis.astype(np.float64)
        if not np.linalg.cond(basis) < _CONDITION:
            raise ValueError("a basis of vectors that depend on each other")
        columns = np.linalg.solve(basis, matrix.T).T
        lengths = np.linalg.norm(columns, axis=0)
        units = np.divide(columns, lengths, out=np.zeros_like(columns), where=lengths > 1e-12)
        middle = np.diag(diagonal.reshape(-1).astype(np.float64))
        np.add.at(middle, tuple(places), entries.reshape(-1))
        adapted = units @ middle @ basis.T
        delta = dense_change(adapted.T if transposed else adapted, weight, diagonal)
        return change_of_base(module, checkpoint, delta)


def _shared(module: Module, checkpoint: Checkpoint, prefix: str) -> Array:
    key = prefix + _role(module.name)
    if key not in checkpoint.shared:
        raise FormatError(
            doing(module, checkpoint),
            expected=f"a tensor {key}",
            got="none",
            fix="Save the adapter again with save_projection=True.",
        )
    checkpoint.used.add(key)
    return checkpoint.shared[key]


def _role(name: str) -> str:
    """Name that a layer shares with those of other blocks, as in PEFT's _category_from_key."""
    *above, parent, own = ["", *name.split(".")]
    if not parent or parent.isdigit():
        return own
    if (parent, own) == ("output", "dense") and above[-1:] == ["attention"]:
        return "attention_output"
    return f"{parent}_{own}"
