"""Readers of PEFT's methods that replace a part of the weight: a subspace, singular values, coefficients in a basis."""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.base.weight_changes import base_weight, change_of_base, dense_delta
from tpeft_deploy.formats.peft.config import matrix_delta, number, stored_transposed
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.reader import About, reader
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["read_deft", "read_frod", "read_osf"]

_DEFT_P, _DEFT_R = "deft_P", "deft_R"


@reader(
    "peft-deft",
    About("PEFT", "DEFT", "linear, Conv1D", "yes", "low-rank", types=("DEFT",)),
    {_DEFT_P, _DEFT_R},
    marks={_DEFT_P},
)
def read_deft(module: Module) -> Change:
    """DEFT as PEFT saves it: a subspace of the outputs is removed from the weight and replaced.

    W' = W + Q (s R - P^T W)        deft_P (O, r), deft_R (r, I); s = alpha / r, or 1 without alpha

    decomposition_method defines Q and P: deft_P and its positive part (relu), or for both the orthonormal basis of its
    QR decomposition (qr), with the signs of Householder reflections.  `para` only removes, and has no deft_R.
    """
    weight = base_weight(module, "DEFT")
    stored = module.take(_DEFT_P)
    filled = None if module.checkpoint.config.get("para") else module.take(_DEFT_R)
    with module.reporting():
        outputs, rank = stored.shape
        transposed = stored_transposed(module, outputs, weight.size // max(1, outputs))
        matrix = weight.T if transposed else weight
        shapes = [tensor.shape for tensor in (stored, filled) if tensor is not None]
        if weight.ndim != 2 or shapes != [(len(matrix), rank), (rank, matrix.shape[1])][: len(shapes)]:
            raise ValueError(f"tensors of shapes {shapes} for a weight of shape {weight.shape}")
        left, right = _deft_sides(module, stored.astype(np.float64))
        if rank > outputs and module.checkpoint.config.get("decomposition_method") == "relu":
            return change_of_base(module, _deft_dense(module.checkpoint, weight, stored, filled, transposed=transposed))
        inner = -(right.T @ matrix)
        if filled is not None:
            inner += _deft_scale(module.checkpoint, rank) * filled.astype(np.float64)
        dtype = np.promote_types(stored.dtype, np.float32)
        delta = matrix_delta(left.astype(dtype), inner.astype(dtype), 1.0, transposed=transposed)
        return change_of_base(module, delta)


def _deft_dense(
    checkpoint: Checkpoint, weight: Array, stored: Array, filled: Array | None, *, transposed: bool
) -> TuckerDelta:
    """Dense change, for relu with a rank above the number of outputs: P^T W would be larger than weight and file."""
    matrix = weight.T if transposed else weight
    basis = stored.astype(np.float64)
    change = -(basis @ np.maximum(basis, 0).T) @ matrix
    if filled is not None:
        change += _deft_scale(checkpoint, len(filled)) * (basis @ filled.astype(np.float64))
    stored_change = (change.T if transposed else change).astype(np.promote_types(stored.dtype, np.float32))
    return TuckerDelta(stored_change, (None, None))


def _deft_scale(checkpoint: Checkpoint, rank: int) -> float:
    return number(checkpoint, "alpha") / rank if checkpoint.config.get("alpha") else 1.0


def _deft_sides(module: Module, basis: Array) -> tuple[Array, Array]:
    method = module.checkpoint.config.get("decomposition_method")
    if method == "relu":
        return basis, np.maximum(basis, 0)
    if method != "qr":
        raise FormatError(
            module.doing,
            expected="relu or qr as decomposition_method in adapter_config.json",
            got=repr(method),
            fix="Save the adapter again with save_pretrained.",
        )
    orthonormal = np.asarray(np.linalg.qr(basis)[0])
    if orthonormal.shape != basis.shape:
        raise ValueError(f"deft_P of shape {basis.shape}, which has more columns than rows")
    return orthonormal, orthonormal


_DIAGONAL, _ENTRIES = "frod_lambda_l", "frod_lambda_s_values"
_BASIS, _PLACES, _SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
_CONDITION = 1e10  # limit of the condition number for float64
_FROD_SHARED_PREFIXES = (_BASIS, _PLACES, _SIZE)


@reader(
    "peft-frod",
    About("PEFT", "FRoD", "linear, Conv1D", "yes", "dense", "the file must hold its shared tensors", types=("FROD",)),
    {_DIAGONAL, _ENTRIES},
    marks={_DIAGONAL},
    may_be_empty={_ENTRIES},
    shared_prefixes=_FROD_SHARED_PREFIXES,
)
def read_frod(module: Module) -> Change:
    """FRoD as PEFT saves it: the weight is decomposed in a basis that layers share, and the coefficients are trained.

    W = U_0 V^T, the columns of U_0 at length 1 as U        W' = U (diag(l) + S) V^T

    frod_lambda_l (I,) as l, and frod_lambda_s_values (n,): the entries of the sparse S.  All layers of a name, such as
    "self_attn_q_proj" of any block, share the basis and the positions of the entries: base_model.frod_V.<name> (I, I),
    .frod_s_indices.<name> (2, n), .frod_s_size.<name> (2,).  PEFT saves them with save_projection; otherwise they
    depend on torch's random numbers and on signs of eigenvectors.
    """
    weight = base_weight(module, "FRoD")
    diagonal, entries = module.take(_DIAGONAL), module.take(_ENTRIES)
    basis, places, size = (_frod_shared(module, prefix) for prefix in _FROD_SHARED_PREFIXES)
    with module.reporting():
        inputs = diagonal.size
        transposed = stored_transposed(module, weight.size // max(1, inputs), inputs)
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
        delta = dense_delta(adapted.T if transposed else adapted, weight, diagonal)
        return change_of_base(module, delta)


def _frod_shared(module: Module, prefix: str) -> Array:
    key = prefix + _frod_role(module.name)
    if key not in module.checkpoint.shared:
        raise FormatError(
            module.doing,
            expected=f"a tensor {key}",
            got="none",
            fix="Save the adapter again with save_projection=True.",
        )
    module.checkpoint.used.add(key)
    return module.checkpoint.shared[key]


def _frod_role(name: str) -> str:
    """Name that a layer shares with those of other blocks, as in PEFT's _category_from_key."""
    *above, parent, own = ["", *name.split(".")]
    if not parent or parent.isdigit():
        return own
    if (parent, own) == ("output", "dense") and above[-1:] == ["attention"]:
        return "attention_output"
    return f"{parent}_{own}"


_U, _S, _V = (f"osf_svd_params.{part}_low" for part in "USV")
_APART = 1e-4  # relative to the largest value; float32 may order closer ones differently


@reader("peft-osf", About("PEFT", "OSF", "linear", "yes", "low-rank", types=("OSF",)), {_U, _S, _V}, marks={_S})
def read_osf(module: Module) -> Change:
    """OSF as PEFT saves it: the small singular values of the weight, and vectors are replaced (arXiv 2504.07097).

    W' = W + U S V - U_0 S_0 V_0        osf_svd_params.U_low (O, r), .S_low (r,), .V_low (r, I)

    U_0 S_0 V_0 is the part of the base weight's singular value decomposition that belongs to its r smallest values;
    PEFT does not save it, and computes it from the base in float32.
    """
    weight = base_weight(module, "OSF")
    left, values, right = (module.take(name) for name in (_U, _S, _V))
    with module.reporting():
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
        return change_of_base(module, matrix_delta(up.astype(dtype), down.astype(dtype), 1.0))
