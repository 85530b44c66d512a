"""Timing things that take turns, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tpeft_deploy.runtime.bench.results import Spread

__all__ = ["Case", "interleave", "resident_bytes", "spread"]

Case = Callable[[], object]

_FEWEST, _MOST = 5, 2000  # rounds
_WARM, _COUNTED = 5, 3  # runs of a turn
_LONG = 0.05  # seconds; runs that take longer than this together are warm, and steady enough


def interleave(cases: Mapping[str, Case], seconds: float) -> dict[str, list[float]]:
    """Time cases in rounds that take every case once, each in another order.

    In its turn a case runs until its weights are in the processor's cache again, which takes five runs or so,
    and then the median of three counts.  Else the session with the most cases would find its weights there more
    often than the others, which made it a quarter faster.

    Args:
        cases: name -> what to time.
        seconds: for all rounds together; five rounds are run however long they take.

    Returns:
        Name -> seconds of each round.
    """
    shuffled = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in cases}
    with _no_collections():
        for case in cases.values():  # what happens once only: buffers, kernels, pages
            case()
        end = time.perf_counter() + seconds
        for done in range(_MOST):
            if done >= _FEWEST and time.perf_counter() > end:
                break
            for name in shuffled.sample(sorted(cases), len(cases)):
                times[name].append(_turn(cases[name]))
    return times


def _turn(case: Case) -> float:
    _runs(case, _WARM)
    return statistics.median(_runs(case, _COUNTED))


def _runs(case: Case, most: int) -> list[float]:
    """Seconds of up to so many runs, of fewer where they are long."""
    times: list[float] = []
    while len(times) < most and sum(times) < _LONG:
        start = time.perf_counter()
        case()
        times.append(time.perf_counter() - start)
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
