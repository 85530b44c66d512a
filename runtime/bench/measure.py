"""Timing things that take turns, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["Case", "interleave", "resident_bytes", "spread"]

Case = Callable[[], object]

_FEWEST, _MOST = 5, 2000  # rounds
_WARM = 2


def interleave(cases: Mapping[str, Case], seconds: float) -> dict[str, list[float]]:
    """Time cases in rounds that run every case once, in an order of its own.

    Args:
        cases: name -> what to time.
        seconds: for all rounds together; five rounds are run however long they take.

    Returns:
        Name -> seconds of each round, after two rounds that do not count.
    """
    shuffled = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in cases}
    with _no_collections():
        for _ in range(_WARM):
            for case in cases.values():
                case()
        end = time.perf_counter() + seconds
        for done in range(_MOST):
            if done >= _FEWEST and time.perf_counter() > end:
                break
            for name in shuffled.sample(sorted(cases), len(cases)):
                start = time.perf_counter()
                cases[name]()
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> Spread:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Spread(float(low), float(median), float(high))


def resident_bytes() -> int | None:
    """The memory that this process holds now, or None where the system has no /proc to say so."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's collector, which would stop one case for the garbage of another."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
