"""Requests of many rows, or of long ones, from one tenant: what another tenant notices, counted in runs."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.runtime.gate import MANIFEST, rows
from tests.helpers.runtime.named_batcher import NamedBatcher
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import QueueFull, QuotaExceeded, TooLarge, TpeftError
from tpeft_deploy.runtime.batching.collate import Outputs
from tpeft_deploy.runtime.batching.policy import Limits, Queue, Request
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair
from tpeft_deploy.runtime.server.tenancy.quotas import Quota, queue_shares
from tpeft_deploy.runtime.server.v2.statuses import status_of

_ids = itertools.count()
WEIGHTS = {"hostile": 0.01}


def fair(quota: Quota, limits: Limits) -> Fair[str]:
    return Fair(lambda tenant: WEIGHTS.get(tenant, 1.0), queue_shares(lambda _: quota, limits.max_queue_rows))


def pieces(tenant: str, rows: int, limits: Limits, cost: float = 1.0) -> list[Request[str]]:
    """A request as the batcher cuts it."""
    call = next(_ids)
    found = [
        Request(next(_ids), size, "form", tenant=tenant, cost=cost * size, call=call, asked=0)
        for size in [limits.max_rows] * (rows // limits.max_rows) + [rows % limits.max_rows]
        if size
    ]
    found[0].asked = rows
    return found


class Served:
    """A queue with a clock of runs: one turn, one run."""

    def __init__(self, limits: Limits, quota: Quota) -> None:
        self.limits = limits
        self.evicted: list[Request[str]] = []
        self.order = fair(quota, limits)
        self.queue: Queue[str] = Queue(limits, lambda form, _: form, self.order, self.evicted.append)

    def ask(self, tenant: str, rows: int, cost: float = 1.0) -> list[Request[str]]:
        first, *others = own = pieces(tenant, rows, self.limits, cost)
        self.queue.add(first, 0.0, others)
        return own

    def run(self) -> list[Request[str]]:
        batch = self.queue.next(0.0)
        self.queue.ended(0.0)
        return batch if isinstance(batch, list) else []


def test_the_settings_of_a_server_bound_every_request() -> None:
    limits = Settings().batching("cpu")
    assert (limits.max_request_rows, limits.max_run_elements) == (1024, 2**23)
    assert Settings().batching("cuda", tokens=True).max_run_elements == 2**16
    assert Settings(max_request_rows=9000).batching("cpu").max_request_rows == 1024
    assert Settings(large_requests="refuse").batching("cpu").max_request_rows == 8
    assert Settings(max_run_elements=7).batching("cpu", tokens=True).max_run_elements == 7


@pytest.mark.parametrize("shares", [0.5, None])
@pytest.mark.parametrize("rows", [60_000, 20_000, 1025])
def test_what_could_never_be_served_is_refused_by_an_empty_queue(rows: int, shares: float | None) -> None:
    limits = Settings().batching("cpu")
    own = NamedBatcher(
        MANIFEST, lambda inputs, _tasks, _options: {"y": inputs["x"]}, limits, order=order(limits, shares)
    )
    with pytest.raises(TooLarge, match=r"at most (1024|512) rows") as caught:
        asyncio.run(own.infer({"x": np.zeros((rows, 3), np.float32)}, "a", tenant="hostile"))
    own.close()
    assert status_of(caught.value).http == 413
    assert own.figures().batches == 0
    assert own.figures().refused == 1


def test_no_adapter_is_brought_for_it(conv_bundle: Bundle) -> None:
    pixels = {"pixels": np.zeros((1025, 1, 12, 14), np.float32)}
    limits = Settings().batching("cpu")
    with Runtime(conv_bundle.path, provider="cpu", threads=1, limits=limits, preload=False) as runtime:
        for tasks in (["two"] * 1025, ["two", "wide", "plain", "two", "base"] * 205):
            with pytest.raises(TooLarge, match="at most 1024 rows"):
                asyncio.run(runtime.infer(pixels, tasks=tasks, tenant="hostile"))
        assert set(runtime.residency().values()) == {"disk"}


def order(limits: Limits, share: float | None = 0.5) -> Fair[Any]:
    return fair(Quota(queue_share=share), limits)


def test_a_share_bounds_one_request_and_all_together() -> None:
    own = Served(Limits(max_rows=8, max_queue_rows=100), Quota(queue_share=0.5))
    with pytest.raises(TooLarge, match="at most 50 rows, the tenant's share of the queue, got what counts as 51"):
        own.ask("hostile", 51)
    own.ask("hostile", 50)
    with pytest.raises(QuotaExceeded, match="50 waiting and 1 more"):
        own.ask("hostile", 1)
    own.run()
    own.ask("hostile", 8)
    tiny = Served(Limits(max_queue_rows=100), Quota(queue_share=0.001))
    tiny.ask("a", 1)  # a share of less than a row is one


def test_a_neighbour_waits_for_the_run_it_finds_and_no_other() -> None:
    """One request of the whole share, then the same again whenever there is room; a neighbour asks one by one."""
    own = Served(Limits(max_rows=8, max_queue_rows=1024), Quota(queue_share=0.5))
    own.ask("hostile", 512)
    for _ in range(200):
        assert {request.tenant for request in own.run()} == {"hostile"}  # one is running when the neighbour asks
        while own.order.waiting_rows("hostile") + 100 <= 512:
            own.ask("hostile", 100)
        (mine,) = own.ask("modest", 1)
        batch = own.run()
        assert mine in batch
        assert sum(request.rows for request in batch) <= 8


def test_a_giant_request_is_charged_as_it_is_served() -> None:
    """Both always wait, with equal weights: rows of one large request count as those of many small ones."""
    limits = Limits(max_rows=8, max_queue_rows=2000)
    own = Served(limits, Quota())
    own.ask("large", 800)
    for _ in range(400):
        own.ask("small", 2)
    served: Counter[str] = Counter()
    while own.order.waiting_rows("large") and own.order.waiting_rows("small"):
        for request in own.run():
            served[request.tenant] += request.rows
        if all(own.order.waiting_rows(tenant) for tenant in ("large", "small")):
            assert abs(served["large"] - served["small"]) <= 16


def test_long_rows_count_as_many() -> None:
    limits = Limits(max_rows=8, max_queue_rows=16, max_run_elements=800)
    assert [limits.size(1, elements) for elements in (1, 100, 101, 400, 800)] == [1, 1, 2, 4, 8]
    own = NamedBatcher(MANIFEST, lambda inputs, _t, _o: {"y": inputs["x"]}, limits, order=order(limits, 0.25))
    asyncio.run(own.infer({"x": np.zeros((4, 3), np.float32)}, "a", tenant="hostile"))
    own.close()
    long = Served(limits, Quota(queue_share=0.25))
    with pytest.raises(TooLarge, match="at most 4 rows"):
        long.queue.add(Request(0, 1, "form", tenant="hostile", cost=800.0, size=limits.size(1, 800)), 0.0)
    assert limits.rows_of_a_run(10, 10_000) == 1
    assert limits.rows_of_a_run(10, 2_000) == 4


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abcde"), st.integers(1, 40)),
        st.tuples(st.just("run"), st.just(""), st.just(0)),
    ),
    max_size=100,
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.sampled_from([1.0, 0.5, 0.2]))
def test_who_stays_below_an_equal_part_of_the_queue_is_never_refused_and_never_evicted(
    steps: list[tuple[str, str, int]], share: float
) -> None:
    own = Served(Limits(max_rows=4, max_queue_rows=40), Quota(queue_share=share))
    waiting: dict[int, Request[str]] = {}
    for step, tenant, count in steps:
        if step == "run":
            for request in own.run():
                del waiting[request.id]
            continue
        sizes: Counter[str] = Counter()
        for request in waiting.values():
            sizes[request.tenant] += request.rows
        tenants = {*sizes, tenant}
        try:
            waiting |= {request.id: request for request in own.ask(tenant, count)}
        except (QueueFull, QuotaExceeded, TooLarge) as error:
            assert not own.evicted  # nothing has changed
            if isinstance(error, QueueFull):
                assert sizes[tenant] + count >= 40 / len(tenants)
        for request in own.evicted:
            del waiting[request.id]
            assert request.tenant != tenant
            assert sizes[request.tenant] > 40 / len(tenants)
        left = {request.call for request in own.evicted}
        assert not left & {request.call for request in waiting.values()}  # with all its pieces
        own.evicted.clear()
        assert own.queue.rows == sum(request.rows for request in waiting.values()) <= 40
        assert len(own.queue) == len(own.order) == len(waiting)
    while waiting:
        for request in own.run():
            del waiting[request.id]
    assert not own.queue.rows
    assert not own.run()


def test_evicted_requests_are_told_and_their_pieces_go_with_them() -> None:
    """Two tenants fill the queue; a third finds room, and the newest request of the longer queue is a 503."""
    limits = Limits(max_rows=2, max_queue_rows=20, max_delay=0)
    begun, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    def engine(inputs: Mapping[str, Any], tasks: Sequence[str], options: Any) -> Outputs:
        begun.set()
        assert go_on.wait(100)
        runs.append(len(inputs["x"]))
        return {"y": inputs["x"]}

    own = NamedBatcher(MANIFEST, engine, limits, order=order(limits, None))

    async def ask(tenant: str, count: int) -> Any:
        try:
            return len((await own.infer(rows(count, count), "a", tenant=tenant))["y"])
        except TpeftError as error:
            return error

    async def main() -> list[Any]:
        asked = [asyncio.create_task(ask("a", 2))]
        assert await asyncio.to_thread(begun.wait, 100)
        for tenant, count in (("a", 3), ("a", 7), ("b", 10)):
            asked.append(asyncio.create_task(ask(tenant, count)))
            await asyncio.sleep(0)
        modest = asyncio.create_task(ask("modest", 6))
        await asyncio.sleep(0)
        assert own.figures().waiting_rows == 3 + 10 + 6
        assert isinstance(await ask("b", 2), QueueFull)  # as much as it would have, nobody else has
        go_on.set()
        return await asyncio.gather(*asked, modest)

    first, small, evicted, other, modest = asyncio.run(main())
    own.close()
    assert (first, small, other, modest) == (2, 3, 10, 6)
    assert isinstance(evicted, QueueFull)
    assert (status_of(evicted).http, status_of(evicted).retry_after) == (503, 1)
    assert "modest" not in str(evicted)
    assert sum(runs) == 21
    assert own.figures().refused == 2
