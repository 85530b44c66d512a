"""The number of replicas for the rows that wait."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tpeft_deploy.runtime.cluster.scaling import ROWS, WaitingRows, wanted_replicas


@pytest.mark.parametrize(
    ("rows", "running", "wanted"),
    [(0, 1, 1), (0, 5, 1), (32, 1, 1), (33, 1, 2), (320, 1, 10), (60, 3, 3), (40, 3, 2), (45, 3, 3), (20, 2, 1)],
)
def test_replicas_follow_rows_without_swinging(rows: float, running: int, wanted: int) -> None:
    assert wanted_replicas(rows, running, 32.0) == wanted
    assert wanted_replicas(rows, wanted, 32.0) == wanted


def test_the_policy_keeps_within_its_bounds() -> None:
    context = SimpleNamespace(
        aggregated_metrics={ROWS: {"a": 500.0, "b": 20.0}},
        current_num_replicas=2,
        capacity_adjusted_min_replicas=2,
        capacity_adjusted_max_replicas=4,
    )
    assert WaitingRows(32.0)(context) == (4, {})
    context.aggregated_metrics = None
    assert WaitingRows(32.0)(context) == (2, {})
