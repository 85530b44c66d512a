"""OSF as PEFT saves it: the small singular values of the weight, and their vectors, are replaced (arXiv 2504.07097).

W' = W + U S V - U_0 S_0 V_0        osf_svd_params.U_low (O, r), .S_low (r,), .V_low (r, I)

U_0 S_0 V_0 is the part of the base weight's singular value decomposition that belongs to its r smallest values; PEFT
does not save it, and computes it from the base in float32.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.base.products import base_weight, change_of_base
from tpeft_deploy.formats.peft.config import matrix_delta, of_type
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import reporting, take

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "peft-osf"
ABOUT = About("PEFT", "OSF", "linear", "yes", "low-rank", types=("OSF",))
_U, _S, _V = (f"osf_svd_params.{part}_low" for part in "USV")
SUFFIXES = frozenset({_U, _S, _V})
_APART = 1e-4  # relative to the largest value; float32 may order closer ones differently
matches = of_type("OSF", _S)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The module's change, of rank 2 r.

    Raises:
        FormatError: no base was given, a tensor is missing or does not fit it, or the base's singular values are too
            close to determine the replaced vectors.
    """
    weight = base_weight(module, checkpoint, "OSF")
    left, values, right = (take(module, checkpoint, name) for name in (_U, _S, _V))
    with reporting(module, checkpoint):
        kept = min(weight.shape) - values.size
        shapes = (left.shape, values.shape, right.shape)
        if kept < 0 or shapes != ((len(weight), values.size), (values.size,), (values.size, *weight.shape[1:])):
            raise ValueError(f"singular vectors and values of shapes {shapes} for a weight of shape {weight.shape}")
        before, sizes, after = np.linalg.svd(weight, full_matrices=False)
        if 0 < kept < len(sizes) and sizes[kept - 1] - sizes[kept] < _APART * sizes[0]:
            raise ValueError(
                f"the base's singular values {kept} and {kept + 1} are too close to determine which were replaced"
            )
        up = np.hstack([left.astype(np.float64) * values, -before[:, kept:] * sizes[kept:]])
        down = np.vstack([right.astype(np.float64), after[kept:]])
        dtype = np.promote_types(left.dtype, np.float32)
        return change_of_base(module, checkpoint, matrix_delta(up.astype(dtype), down.astype(dtype), 1.0))
