"""Whoever sends large messages that are refused waits before more are received; nobody else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.tenancy.refused_bytes import RefusedBytes

MIB = 1 << 20


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8 * MIB), st.floats(0, 1)), max_size=40))
def test_each_waits_for_what_it_sent_and_for_nothing_else(steps: list[tuple[str, int, float]]) -> None:
    now = 0.0
    own = RefusedBytes(lambda: now)
    owed = dict.fromkeys("abc", 0.0)
    for tenant, size, passed in steps:
        now += passed
        owed = {name: max(0.0, left - passed) for name, left in owed.items()}
        own.charge(tenant, size)
        owed[tenant] += size / (64 * MIB)
        for name, left in owed.items():
            if left <= 5:
                assert own.wait(name) == pytest.approx(left, abs=1e-6)
                owed[name] += 0.02 if left else 0  # the next one waits for this one too
    now += 100
    assert not any(own.wait(name) for name in "abc")


def test_too_much_is_told_and_forgotten() -> None:
    now = 0.0
    own = RefusedBytes(lambda: now)
    own.charge("a", 640 * MIB)
    with pytest.raises(QuotaExceeded) as told:
        own.wait("a")
    assert told.value.retry_after == pytest.approx(10)
    now = 11.0
    for number in range(1000):
        own.charge(f"tenant {number}", 1)
        now += 1
    assert len(own._until) <= 64
