"""Comparing the answers of two forms of a task, and of a task with the base."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.bundle.tolerances import LIMIT, LIMITS, TF32_LIMIT
from tpeft_deploy.errors import AdapterError, RunError
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.tucker import Array

__all__ = ["agree", "differs", "limit_of", "prove"]


def limit_of(manifest: Manifest, *, tf32: bool = False) -> float:
    """How far two forms of one task may be apart: each is held to half of it against the merged model.

    Args:
        manifest: manifest of the bundle.
        tf32: whether float32 products may be computed in TF32.
    """
    if tf32:
        return max(2 * TF32_LIMIT, limit_of(manifest))
    if manifest.rounding is not None:
        return 2 * max(manifest.rounding.limits.values(), default=LIMIT)
    dtypes = {weight.dtype for weight in manifest.weights.values()}
    narrow = [limit for dtype, limit in LIMITS.items() if dtype in dtypes]
    return 2 * max([*narrow, manifest.tolerance or LIMIT])


def agree(answer: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The relative L2 error ||answer - expected|| / ||expected|| of the worst output.

    Infinite where an output is missing, has another shape, or holds what is no number in one answer alone.
    """
    worst = 0.0 if set(answer) == set(expected) else math.inf
    for name in set(answer) & set(expected):
        worst = max(worst, _error(answer[name], expected[name]))
    return worst


def prove(
    plain: Plain,
    manifest: Manifest,
    inputs: Mapping[str, Array],
    expected: Mapping[str, Array],
    *,
    task: str,
    tf32: bool = False,
) -> float:
    """Compare a folded session with another form's answer before it takes over.

    Args:
        plain: from `fold`.
        manifest: manifest of its bundle.
        inputs: inputs of `Bundle.example`, or others.
        expected: output name -> the task's answer to `inputs`, at the task's sizes.
        task: for the message.
        tf32: as `limit_of` takes it.

    Returns:
        The relative error.

    Raises:
        RunError: they differ by more than `limit_of` the bundle; the session must not be used.
    """
    error, limit = agree(plain.run(inputs), expected), limit_of(manifest, tf32=tf32)
    if not error <= limit:
        raise RunError(
            f"fold task {task!r}",
            expected=f"the answer of the banked graph, up to a relative error of {limit:g}",
            got=f"one with {error:.2e}",
            fix="It goes on being served from the bank; please report the model.",
        )
    return error


def differs(base: Mapping[str, Array], outputs: Mapping[str, Array], *, task: str) -> bool:
    """Whether any output differs from the base's, in size or in any element.

    Args:
        base: the base's outputs.
        outputs: the task's, on the same inputs.
        task: its name, for the message.

    Raises:
        AdapterError: an output of the task is not finite where the base's is.
    """
    for name, array in outputs.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all() and np.isfinite(base[name]).all():
            raise AdapterError(
                f"probe task {task!r} on the bundle's example, output {name!r}",
                expected="finite numbers, as the base's",
                got=f"{int((~np.isfinite(array)).sum())} that are not, of {array.size}",
                fix="The adapter overflows the base's dtype, or was damaged in training.",
            )
    return any(
        not np.array_equal(array, base[name], equal_nan=np.issubdtype(array.dtype, np.floating))
        for name, array in outputs.items()
    )


def _error(answer: Array, expected: Array) -> float:
    if answer.shape != expected.shape:
        return math.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(answer, expected) else math.inf
    # What is infinite or NaN in both, such as a mask's, must be so at the same places.
    finite = np.isfinite(expected)
    if not np.array_equal(answer[~finite], expected[~finite], equal_nan=True):
        return math.inf
    wanted = expected[finite].astype(np.float64)
    difference = float(np.linalg.norm(answer[finite].astype(np.float64) - wanted))
    size = float(np.linalg.norm(wanted))
    error = difference / size if size else difference
    return error if math.isfinite(error) else math.inf
