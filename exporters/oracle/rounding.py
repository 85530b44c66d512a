"""Measure the rounding of a 16-bit base; limits of its exports follow from it.

A fixed limit accepts or refuses a 16-bit model by the luck of its weights and inputs: what 16 bits cost depends on the
depth of a model and on what cancels in it.  The library's own 16-bit forward, against its 32-bit forward on the same
inputs, says how much that is; an export rounds other values, the fused weights of a convolution and a BatchNorm for
one, and may therefore be a few times as far off, and not more.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from tpeft_deploy.bundle.manifest import Rounding
from tpeft_deploy.bundle.tolerances import LIMIT, ROUNDING_MULTIPLES, WIDEST_LIMIT
from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.oracle import bfloat16, compare
from tpeft_deploy.exporters.oracle.limits import limit_of
from tpeft_deploy.exporters.oracle.subject import Subject
from tpeft_deploy.tucker import Array

__all__ = ["measure_rounding"]

_log = logging.getLogger(__name__)


def measure_rounding(subject: Subject) -> Rounding | None:
    """Compare a base in 16 bits with itself in 32 bits, at the sizes that an export is proved at.

    Args:
        subject: base with its raw graph, which tells the dtype.

    Returns:
        What was measured, or the fixed limits and why; None for a base in 32 bits or more.
    """
    fixed = limit_of(subject.graph)
    if fixed == LIMIT:
        return None
    dtype = "bfloat16" if bfloat16.holds(subject.graph) else "float16"
    measured = dict.fromkeys(subject.outputs, 0.0)
    try:
        for sizes in subject.shapes:
            narrow, wide = subject.base.in_both(subject.inputs(sizes), subject.outputs)
            for name in measured:
                measured[name] = max(measured[name], _worst_row(narrow[name], wide[name]))
    except UnsupportedBase as error:
        return _unmeasured(subject, dtype, fixed, error.problem or str(error))
    if not all(math.isfinite(error) for error in measured.values()):
        return _unmeasured(subject, dtype, fixed, "its outputs in 16 bits are not finite")
    limits = {
        name: min(max(ROUNDING_MULTIPLES[dtype] * error, fixed), WIDEST_LIMIT) for name, error in measured.items()
    }
    return Rounding(dtype, measured, limits)


def _unmeasured(subject: Subject, dtype: str, fixed: float, reason: str) -> Rounding:
    _log.warning("the rounding of %s is not known, its exports are held to %g: %s", subject.base.name, fixed, reason)
    return Rounding(dtype, {}, dict.fromkeys(subject.outputs, fixed), reason)


def _worst_row(got: Array, expected: Array) -> float:
    """Relative error of the whole, or of the row that is furthest off: some checks look at single rows."""
    rows = zip(got, expected, strict=True) if got.ndim and got.shape == expected.shape else ()
    errors = [compare.relative_error(got, expected), *(compare.relative_error(*row) for row in rows)]
    return float(np.max(errors))  # NaN stays NaN
