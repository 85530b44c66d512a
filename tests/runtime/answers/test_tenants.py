"""Requests with a task per row, and those of many tenants: joined, refused, and brought to the device in turn."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers.runtime.gate import MANIFEST, Gate, entered, rows, waiting
from tests.helpers.runtime.named_batcher import Counts, NamedBatcher, version
from tests.helpers.waiting import wait_until
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import DeadlineExceeded, QueueFull, QuotaExceeded
from tpeft_deploy.runtime.adapters.held import Held
from tpeft_deploy.runtime.adapters.loader import AdapterLoader
from tpeft_deploy.runtime.adapters.version import Version
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.batching.policy import FirstCome, Limits, Request

ALL = ["partial", "plain", "two", "wide", "base"]


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).standard_normal((count, 1, 12, 14)).astype(np.float32)}


async def joined(own: NamedBatcher, gate: Gate, *requests: Sequence[str]) -> list[Any]:
    """The answers of requests that all wait while one is running: a task, or one per row."""
    first = asyncio.create_task(own.infer(rows(1), "first"))
    await entered(gate)
    asked = [
        own.infer(rows(2, n), tasks) if isinstance(tasks, str) else own.infer(rows(len(tasks), n), tasks=tasks)
        for n, tasks in enumerate(requests)
    ]
    running = [asyncio.create_task(one) for one in asked]
    await waiting(own, len(requests))
    gate.open.set()
    return (await asyncio.gather(first, *running))[1:]


def test_rows_of_different_tasks_are_joined_with_requests_on_one() -> None:
    gate = Gate(is_open=False)
    own = NamedBatcher(MANIFEST, gate, Limits())
    answers = asyncio.run(joined(own, gate, ["aa", "b"], "cccc", ["d"], ["ee", "ee"]))
    own.close()
    assert gate.runs == [["first"], ["aa", "b", "cccc", "cccc", "d", "ee", "ee"]]
    wanted = [[[2.0], [1.0]], [[5.0], [5.0]], [[3.0]], [[5.0], [5.0]]]
    for answer, own_rows in zip(answers, wanted, strict=True):
        np.testing.assert_array_equal(answer["y"], np.repeat(np.array(own_rows, "f4"), 3, axis=1))


def test_a_model_that_runs_one_adapter_at_a_time_is_joined_by_task() -> None:
    gate = Gate(is_open=False)
    own = NamedBatcher(replace(MANIFEST, rows="group"), gate, Limits())
    asyncio.run(joined(own, gate, ["a", "b"], "a", ["a", "a"], "b", ["a", "b"]))
    own.close()
    assert sorted(gate.runs[1:]) == [["a", "a", "a", "a"], ["a", "b", "a", "b"], ["b", "b"]]


class Strict(FirstCome[Form]):
    """First come, first served; nothing of one tenant."""

    def add(self, request: Request[Form]) -> None:
        if request.tenant == "unwanted":
            raise QuotaExceeded("queue", retry_after=1.0)
        super().add(request)


def test_what_an_order_refuses_never_waits() -> None:
    own = NamedBatcher(MANIFEST, Gate(), Limits(), order=Strict())

    async def ask() -> None:
        for _ in range(3):
            with pytest.raises(QuotaExceeded):
                await own.infer(rows(1), "a", tenant="unwanted")
        await own.infer(rows(1), "a", tenant="other")

    asyncio.run(ask())
    figures = own.figures()
    own.close()
    assert (figures.refused, figures.waiting_rows, figures.cancelled, figures.rows) == (3, 0, 0, 1)


class Slow:
    """Residency where nothing is resident and reading waits for `open`."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)
        self.begun: list[str] = []
        self.taken: list[str] = []
        self.released: list[str] = []

    def acquire(self, versions: Sequence[Version], *, new: bool) -> Held:
        self.begun += [version.name for version in versions]
        assert self.open.acquire(timeout=100)
        self.taken += [version.name for version in versions]
        return Held(versions, Counts().rows, self.release)

    def release(self, versions: Iterable[Version]) -> None:
        self.released += [version.name for version in versions]


def test_many_cold_tasks_of_one_tenant_do_not_hold_up_those_of_another() -> None:
    residency = Slow()
    own = AdapterLoader(residency)  # type: ignore[arg-type]

    async def main() -> None:
        flood = [asyncio.create_task(own.acquire([version(f"flood {n}")], None, "flood")) for n in range(20)]
        await asyncio.to_thread(wait_until, lambda: len(residency.begun) == 2)
        other = [asyncio.create_task(own.acquire([version(f"other {n}")], None, "other")) for n in range(2)]
        await asyncio.sleep(0)
        for _ in range(22):
            residency.open.release()
        await asyncio.gather(*flood, *other)

    asyncio.run(main())
    own.close()
    # Two of the flood were being read already; then the tenants take turns.
    assert max(residency.taken.index(f"other {n}") for n in range(2)) <= 6
    assert len(residency.taken) == 22


def test_who_gives_up_before_its_turn_is_not_read_for_and_a_tenant_has_so_many_waiting() -> None:
    residency = Slow()
    own = AdapterLoader(residency, most=3)  # type: ignore[arg-type]

    async def main() -> None:
        busy = [asyncio.create_task(own.acquire([version(f"busy {n}")], None, "busy")) for n in range(2)]
        await asyncio.to_thread(wait_until, lambda: len(residency.begun) == 2)
        for number in range(10):
            with pytest.raises(DeadlineExceeded):
                await own.acquire([version(f"late {number}")], 0.001, "a")
        gone = [asyncio.create_task(own.acquire([version(f"gone {n}")], None, "a")) for n in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="wait for adapters"):
            await own.acquire([version("too many")], None, "a")
        for one in gone:
            one.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        stays = asyncio.create_task(own.acquire([version("stays")], None, "a"))
        await asyncio.sleep(0)
        busy[0].cancel()
        for _ in range(20):
            residency.open.release()
        await stays
        await busy[1]

    asyncio.run(main())
    own.close()
    assert sorted(residency.taken) == ["busy 0", "busy 1", "stays"]
    assert residency.released == ["busy 0"]


def test_a_reader_that_times_out_itself_is_not_taken_for_a_deadline() -> None:
    class Broken(Slow):
        def acquire(self, versions: Sequence[Version], *, new: bool) -> Held:
            raise TimeoutError("the disk")

    own = AdapterLoader(Broken())  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match="the disk"):
        asyncio.run(own.acquire([version("a")], None))
    own.close()


def test_hundreds_of_mixed_requests_with_little_room_all_end(conv_bundle: Bundle) -> None:
    """Every one is answered as it would be alone, or was cancelled, or is overdue; and nobody holds a row after."""
    with Runtime(conv_bundle.path, provider="cpu", threads=1) as whole:
        size = whole._residency._bank.row_bytes
        inputs = images(3)
        alone = {task: whole.run(inputs, task)["logits"] for task in ALL}
    dice = random.Random(0)
    small = Runtime(conv_bundle.path, provider="cpu", threads=1, device_bytes=3 * size, preload=False)
    ended: Counter[str] = Counter()

    async def ask(number: int) -> None:
        tasks = dice.choices(ALL, k=3)
        timeout = dice.choice([None, None, 0.02])
        request = asyncio.create_task(small.infer(inputs, tasks=tasks, timeout=timeout, tenant=str(number % 3)))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() / 50)
            request.cancel()
        try:
            logits = (await request)["logits"]
        except (asyncio.CancelledError, DeadlineExceeded) as error:
            ended[type(error).__name__] += 1
            return
        ended["answered"] += 1
        assert isinstance(logits, list)
        for row, (task, array) in enumerate(zip(tasks, logits, strict=True)):
            np.testing.assert_allclose(array, alone[task][row], rtol=1e-4, atol=1e-6)

    async def main() -> None:
        for _ in range(4):
            await asyncio.wait_for(asyncio.gather(*(ask(number) for number in range(60))), 200)

    asyncio.run(main())
    versions = [small._versions.find(task) for task in ALL[:-1]]
    wait_until(lambda: not any(version.users for version in versions))
    assert ended.total() == 240
    assert ended["answered"] > 60
    small.close()


def test_priorities_and_tenants_reach_the_order() -> None:
    seen: list[Request[Form]] = []

    class Watching(FirstCome[Form]):
        def add(self, request: Request[Form]) -> None:
            seen.append(request)
            super().add(request)

    own = NamedBatcher(MANIFEST, Gate(), Limits(), order=Watching())
    mixed = ["a", "b"]
    asyncio.run(own.infer(rows(2), "a", tenant="t", priority=3))
    asyncio.run(own.infer(rows(2), tasks=mixed, timeout=60))
    asyncio.run(own.infer(rows(2), tasks=["b", "b"]))
    own.close()
    assert [(r.tenant, r.priority, r.lane, r.cost, r.rows) for r in seen] == [
        ("t", 3, version("a"), 6.0, 2),
        ("", 0, (version("a"), version("b")), 6.0, 2),
        ("", 0, version("b"), 6.0, 2),
    ]
    assert [request.deadline < np.inf for request in seen] == [False, True, False]
