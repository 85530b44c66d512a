"""Helpers for methods that multiply the base weight: rotations, and the change W' - W.

The change W' - W holds for this W alone, so its digest is recorded.  Arithmetic is in float64; a change is rounded
once, to the dtype of the adapter's tensors and at least float32.
"""

from __future__ import annotations

import numpy as np

from tpeft_deploy.errors import FormatError
from tpeft_deploy.formats.read.module import Change, Module
from tpeft_deploy.tucker import Array, TuckerDelta

__all__ = ["base_weight", "cayley", "change_of_base", "dense_delta", "rotate_inputs", "skew_of_triangle"]

_LARGEST = 1e6  # beyond it the libraries' float32 result is not a rotation


def base_weight(module: Module, method: str) -> Array:
    """The module's weight in float64, for a method that records its scale.

    Raises:
        FormatError: no base was given, it has no such weight, the caller gave a scale, or a tensor other than alpha
            holds integers.
    """
    module.no_scale()
    for name, tensor in module.tensors.items():
        if tensor.dtype.kind != "f" and name != "alpha":
            raise FormatError(f"{module.doing}, tensor {name!r}", expected="a floating point tensor", got=tensor.dtype)
    weight = module.base_array("weight", f"{method} computes its change from the base's weight")
    return weight.astype(np.float64)


def change_of_base(module: Module, delta: TuckerDelta, *, bias: Array | None = None) -> Change:
    """A change that holds for this base's weight alone, with the digest of that weight.

    Args:
        module: module of the weight.
        delta: W' - W.
        bias: bias that replaces the base's; None if the method does not change it.

    Raises:
        FormatError: no base was given.
    """
    if module.checkpoint.base is None:
        raise module.needs_base("the change belongs to one base")
    name = f"{module.name}.weight"
    overrides = {} if bias is None else {f"{module.name}.bias": bias}
    return Change(deltas={name: delta}, overrides=overrides, digests={name: module.checkpoint.base.digest(name)})


def dense_delta(adapted: Array, weight: Array, like: Array) -> TuckerDelta:
    """Compute W' - W, in the dtype of `like` and at least float32.

    Raises:
        ShapeError: the shapes differ.
        ValueError: a value is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        change = (adapted.reshape(weight.shape) - weight).astype(np.promote_types(like.dtype, np.float32))
    return TuckerDelta(change, (None,) * change.ndim)


def skew_of_triangle(values: Array, size: int) -> Array:
    """Build skew-symmetric matrices (n, size, size) from upper triangles (n, size (size - 1) / 2), row by row."""
    skew = np.zeros((len(values), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = values
    return skew - skew.swapaxes(1, 2)


def cayley(skew: Array) -> Array:
    """Compute the Cayley transform (I - Q) (I + Q)^-1 of skew-symmetric matrices Q (..., b, b).

    Raises:
        ValueError: values are so large that the result is not a rotation.
    """
    largest = np.abs(skew).max(initial=0.0)
    if not largest <= _LARGEST:  # NaN too
        raise ValueError(f"values of up to {largest:.3g}, of which float32 can compute no rotation")
    identity = np.eye(skew.shape[-1])
    right: Array = np.linalg.solve((identity + skew).swapaxes(-1, -2), (identity - skew).swapaxes(-1, -2))
    return right.swapaxes(-1, -2)


def rotate_inputs(weight: Array, blocks: Array) -> Array:
    """Compute W B^T for a block-diagonal B, which multiplies each block of a layer's inputs by a matrix.

    Args:
        weight: (O, n * b), with O a multiple of g for a layer with g groups of inputs.
        blocks: (g * n, b, b).

    Raises:
        ValueError: the blocks do not divide the weight's inputs.
    """
    outputs, inputs = weight.shape
    size = blocks.shape[-1]
    count, left = divmod(inputs, max(1, size))
    if left or count == 0 or len(blocks) % count or not len(blocks) or outputs % (len(blocks) // count):
        raise ValueError(f"{len(blocks)} blocks of size {size} for a weight of shape {weight.shape}")
    if blocks.strides[0] == 0:  # one matrix for all blocks, which a reshape would copy
        return np.asarray(weight.reshape(outputs, count, size) @ blocks[0].T).reshape(weight.shape)
    grouped = weight.reshape(len(blocks) // count, -1, count, size)
    rotated: Array = np.einsum("gonk,gnck->gonc", grouped, blocks.reshape(-1, count, size, size))
    return rotated.reshape(weight.shape)
