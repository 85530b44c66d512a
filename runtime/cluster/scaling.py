"""How many replicas the waiting rows need."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["ROWS", "WaitingRows", "wanted_replicas"]

ROWS = "rows"
"""Name of the metric that replicas report."""
_SPARE = 0.7  # share of the rows at which a replica fewer would do; below, so that the number does not swing


def wanted_replicas(rows: float, running: int, per_replica: float) -> int:
    """Return the number of replicas for rows that wait or run; the same as now where both more and fewer would do.

    Args:
        rows: rows of all replicas.
        running: number of replicas now.
        per_replica: rows above which a replica has too many.
    """
    most = math.ceil(rows / per_replica)
    if most > running:
        return most
    return min(running, max(1, math.ceil(rows / (per_replica * _SPARE))))


class WaitingRows:
    """Autoscaling policy of Ray Serve by `wanted_replicas`.

    Args:
        per_replica: rows above which a replica has too many.
    """

    def __init__(self, per_replica: float) -> None:
        self._per_replica = per_replica

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state."""
        rows = sum((context.aggregated_metrics or {}).get(ROWS, {}).values())
        running = max(1, context.current_num_replicas)
        wanted = wanted_replicas(rows, running, self._per_replica)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}
