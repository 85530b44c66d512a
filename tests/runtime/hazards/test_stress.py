"""No wrong answer and no growing memory, whatever goes on at the same time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runtime.stress import Stress


def test_rows_of_many_threads_get_their_own_adapters(tmp_path: Path) -> None:
    report = Stress(tmp_path / "bundle", adapters=40, resident=20).run(20_000)
    assert report.errors == []
    assert report.wrong == []
    assert report.rows >= 20_000
    assert set(report.changes) == {"replace", "come and go", "fold", "pin", "prefetch", "set"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_rows_over_a_thousand_adapters(tmp_path: Path) -> None:
    report = Stress(tmp_path / "bundle", adapters=1000, resident=300).run(1_000_000)
    third, fourth = (np.median(report.memory[start : start + 25]) for start in (50, 75))
    print(
        f"{report.rows} rows, {report.changes}, {len(report.wrong)} wrong, "
        f"memory {third / 2**20:.1f} -> {fourth / 2**20:.1f} MiB over the last half"
    )
    assert report.errors == []
    assert report.wrong == []
    assert fourth <= 1.02 * third
