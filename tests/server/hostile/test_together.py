"""All attacks at once, on a server that may have no more address space than its settings state."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.hostile_server.arena import arena
from tests.helpers.hostile_server.attacks import ATTACKS
from tpeft_deploy import Adapter, Bundle

MIB = 1 << 20
IN_FLIGHT, DEVICE, UPLOAD, DRAIN = 256, 64, 512, 10
SETTINGS = (
    f"TPEFT_MAX_INFLIGHT_BYTES={IN_FLIGHT}MiB",
    f"TPEFT_DEVICE_BYTES={DEVICE}MiB",
    "TPEFT_UPLOAD_CPU_SECONDS=2",
    f"TPEFT_UPLOAD_MEMORY_BYTES={UPLOAD}MiB",
    "TPEFT_MAX_STAGING_BYTES=512MiB",
    f"TPEFT_DRAIN_SECONDS={DRAIN}",
)
START = 450  # address space of a server with this bundle that nobody has asked yet, MiB
THREADS = 320  # stacks of forty threads
BUDGET = round(1.2 * (START + THREADS + IN_FLIGHT + DEVICE)) * MIB
FAILURES = {"500", "502", "INTERNAL", "UNKNOWN", "DATA_LOSS"}


@pytest.mark.parametrize(
    ("seconds", "patience"),
    [
        # 20 s for a health check, on a machine that may be busy with other tests
        pytest.param(15, 20.0, marks=pytest.mark.thorough),
        pytest.param(600, 1.0, marks=[pytest.mark.soak, pytest.mark.timeout(1200)]),
    ],
)
def test_all_attacks_together_within_a_budget(
    conv_bundle: Bundle, others: list[Adapter], tmp_path: Path, seconds: int, patience: float
) -> None:
    """The neighbour is answered, health too; the server neither fails, restarts nor grows, and ends when told to."""
    with arena(conv_bundle.path, others[0].to_bytes(), tmp_path, *SETTINGS, memory=BUDGET) as own:
        begun = own.process.pid
        thirds = [own.attacked(list(ATTACKS), seconds / 3) for _ in range(3)]
        for seen in thirds:
            print(dict(seen.statuses), seen.answers, f"{seen.memory >> 20} MiB, p99 {seen.quantile(0.99):.3f} s")
        for seen in thirds:
            assert seen.refused == 0, seen.statuses
            assert max(seen.health) < patience
            assert not FAILURES & set(seen.answers), (seen.answers, own.tail[-20:])
            assert sum(seen.answers.values()) > 50
        assert own.process.poll() is None
        assert own.process.pid == begun
        assert not [line for line in own.tail if "Traceback" in line], "".join(own.tail[-60:])
        # With the readers of uploads; the server alone is held to its budget by the kernel.
        assert max(seen.memory for seen in thirds) < 1.2 * (BUDGET + 2 * UPLOAD * MIB)
        if seconds >= 600:  # what a shorter time sees is warming up
            assert thirds[2].memory < 1.2 * thirds[1].memory
        assert own.end(DRAIN + 20) < DRAIN + 10
