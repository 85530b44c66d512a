"""Limits of an export's relative errors, by the dtype of its weights and what its bundle states."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rounding
from tpeft_deploy.bundle.tolerances import LIMIT, LIMITS, WIDEST_TOLERANCE
from tpeft_deploy.errors import ExportError

__all__ = ["ErrorLimits", "check_tolerance", "limit_of", "limits_of"]

ErrorLimits = float | Mapping[str, float]
"""Largest relative error of all outputs, or of each by its name."""


def limit_of(graph: ir.Graph) -> float:
    """Fixed limit by the dtype of the weights: outputs may be wider than what they come from."""
    dtypes = {value.dtype.name.lower() for value in graph.initializers.values() if value.dtype is not None}
    return max(LIMITS.get(dtype, LIMIT) for dtype in dtypes | {"float"})


def limits_of(graph: ir.Graph, rounding: Rounding | None, tolerance: float | None = None) -> ErrorLimits:
    """Limits of an export's outputs.

    Args:
        graph: raw graph.
        rounding: measurement of a base in 16 bits.
        tolerance: accepted error in float32; in 16 bits the limits are wider anyway.
    """
    return max(limit_of(graph), tolerance or 0.0) if rounding is None else rounding.limits


def check_tolerance(tolerance: float | None, doing: str) -> None:
    """Refuse a tolerance that is below the limit, or so wide that it would prove nothing.

    Raises:
        ExportError: it is.
    """
    if tolerance is not None and not LIMIT <= tolerance <= WIDEST_TOLERANCE:
        raise ExportError(
            doing,
            expected=f"a tolerance from {LIMIT:g} to {WIDEST_TOLERANCE:g}",
            got=tolerance,
            fix="A wider one would accept an export without its branches.",
        )
