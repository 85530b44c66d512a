"""Uploads bred at random, through the real readers: none over its limits, and the event loop never waits for one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.hostile_server.apart import Observed, send_staged, staged
from tests.helpers.hostile_server.bred_uploads import breed
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.isolation.pool import Pool

LIMITS = ParsingLimits(cpu_seconds=1, wall_seconds=30, memory_bytes=256 << 20, result_bytes=8 << 20)
AT_ONCE, BATCH, TIMES = 2, 200, 3


class Stalls:
    """The longest time for which an event loop could have run and did not: others held it up."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begin, waited = loop.time(), _waited()
            await asyncio.sleep(0.005)
            lost = _waited() - waited  # the machine was busy with something else
            self.longest = max(self.longest, loop.time() - begin - 0.005 - lost)


def _waited() -> float:
    """Seconds for which this thread has waited for a processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


@pytest.mark.parametrize(
    ("count", "longest"),
    [
        (200, 1.0),  # a bound that says nothing of the machine
        pytest.param(100_000, 0.05, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_bred_uploads(conv_bundle: Bundle, count: int, longest: float) -> None:
    observed, kinds, stalled = Observed(), Counter[str](), 0.0

    async def some(pool: Pool, places: Mapping[int, Path], turn: int) -> None:
        for seed in list(places)[turn::AT_ONCE]:
            try:
                found = await send_staged(pool, places[seed], f"tenant {turn}")
            except BaseException as error:
                error.add_note(f"of breed({seed})")
                raise
            kinds[type(found).__name__] += 1

    async def batch(pool: Pool, places: Mapping[int, Path]) -> float:
        stalls = Stalls()
        watching = asyncio.create_task(stalls.watch())
        await asyncio.gather(*(some(pool, places, turn) for turn in range(AT_ONCE)))
        watching.cancel()
        return stalls.longest

    def least(pool: Pool, seeds: range) -> float:
        """The longest stall of uploads, or of them again: an upload that stalls the loop does so each time."""
        found = longest + 1
        for _ in range(TIMES):
            with contextlib.ExitStack() as stack:
                places = {seed: stack.enter_context(staged(breed(seed))) for seed in seeds}
                found = min(found, asyncio.run(batch(pool, places)))
            if found <= longest:
                break
        return found

    with contextlib.closing(Pool(conv_bundle, LIMITS, observe=observed.append)) as pool:
        wait_until(lambda: len(pool.pids()) == LIMITS.readers, "the readers start")
        readers = pool.pids()
        for first in range(0, count, BATCH):
            stalled = max(stalled, least(pool, range(first, min(first + BATCH, count))))
        assert sorted(readers) == sorted(pool.pids()), "no reader itself had to be replaced"
    print(f"{dict(kinds)}, {observed.summary()}, longest stall {1000 * stalled:.0f} ms")
    assert len(observed) == kinds.total() >= count
    assert {"Adapter", "FormatError"} <= set(kinds)
    observed.check(LIMITS)
    assert stalled <= longest
