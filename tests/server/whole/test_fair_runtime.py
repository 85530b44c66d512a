"""The fair order on a runtime that answers: a flood of one tenant leaves room and time for another."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.batching.collate import Form
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair

IMAGES = {"pixels": np.random.default_rng(0).standard_normal((1, 1, 12, 14)).astype(np.float32)}


def test_a_flood_neither_fills_the_queue_nor_delays_another_tenant(conv_bundle: Bundle) -> None:
    limits = Limits(max_rows=4, max_queue_rows=100, max_delay=0.0)

    def admit(tenant: str, waiting: int, rows: int) -> None:
        if waiting and waiting + rows > limits.max_queue_rows // 2:
            raise QuotaExceeded(f"queue a request of {tenant}", retry_after=1.0)

    order: Fair[Form] = Fair(lambda _: 1.0, admit)
    with Runtime(conv_bundle.path, provider="cpu", threads=1, limits=limits, order=order) as runtime:
        wanted = runtime.run(IMAGES, "two")["logits"]
        done: list[str] = []
        # Else a fast machine serves the flood before the others have come, and a slow one puts some in the first run.
        begun, everyone_waits = threading.Event(), threading.Event()
        run = runtime._part(None).batcher._run_batch

        def run_later(*batch: Any) -> Any:
            begun.set()
            assert everyone_waits.wait(100)
            return run(*batch)

        runtime._part(None).batcher._run_batch = run_later

        async def ask(tenant: str) -> Any:
            answer = await runtime.infer(IMAGES, tasks=["two"], tenant=tenant)
            done.append(tenant)
            return answer

        async def main() -> list[Any]:
            flood = [asyncio.create_task(ask("flood")) for _ in range(200)]
            assert await asyncio.to_thread(begun.wait, 100)
            modest = [asyncio.create_task(ask("modest")) for _ in range(4)]
            while order.waiting_rows("modest") < 4:
                await asyncio.sleep(0.001)
            everyone_waits.set()
            return await asyncio.gather(*modest, *flood, return_exceptions=True)

        answers = asyncio.run(main())
        assert runtime.batching().refused == sum(isinstance(answer, QuotaExceeded) for answer in answers)
    assert all(isinstance(answer, dict) for answer in answers[:4])
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) >= 100
    assert done.count("modest") == 4
    assert max(place for place, tenant in enumerate(done) if tenant == "modest") < 24
    assert order.waiting_rows("flood") == order.waiting_rows("modest") == len(order) == 0
    for answer in answers[:4]:
        np.testing.assert_allclose(answer["logits"][0], wanted[0], rtol=1e-4, atol=1e-6)
