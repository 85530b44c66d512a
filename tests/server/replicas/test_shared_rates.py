"""Services on one registry hold a tenant's rate together, and ask no database on a request's path."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from tests.helpers.server.postgres import Postgres
from tests.server.conftest import PIXELS, Served, serve
from tpeft_deploy import Bundle
from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import InferRequest

RATE = 20.0


@pytest.fixture
def pair(conv_bundle: Bundle, tmp_path: Path, postgres: Postgres) -> Iterator[list[Served]]:
    url, store, quota = postgres.empty(), f"file:{tmp_path / 'store'}", Quota(requests_per_s=RATE, rows_per_s=1e6)
    with ExitStack() as stack:
        found = []
        for name in ("one", "two"):
            state = stack.enter_context(open_state(tmp_path / name, url, store=store, default=quota))
            found.append(serve(conv_bundle, tmp_path, state=state))
            stack.callback(found[-1].runtime.close)
        yield found


def admitted(own: Served) -> bool:
    try:
        own.service.admit(own.who())
    except QuotaExceeded:
        return False
    return True


def test_services_allow_a_tenant_its_rate_together(pair: list[Served]) -> None:
    granted = [0, 0]

    async def load() -> float:
        renewals = [asyncio.create_task(own.service.renew_lease()) for own in pair]
        began = time.monotonic()
        while min(granted) < RATE / 2 or sum(granted) < 3 * RATE:
            for index, own in enumerate(pair):
                granted[index] += admitted(own)
            await asyncio.sleep(0.002)
        passed = time.monotonic() - began
        for task in renewals:
            task.cancel()
        return passed

    passed = asyncio.run(load())
    assert sum(granted) <= 1.1 * RATE * (passed + 1)
    lease = pair[0].service.lease()
    assert lease is not None
    assert lease.servers == 2
    assert 0 < lease.shares["requests", "acme"] < 1
    metrics = Metrics(10, dict, dict, lambda: 0)
    metrics.lease = pair[0].service.lease
    text = metrics.render().decode()
    assert 'tpeft_rate_share{rate="requests",tenant="acme"} 0.' in text
    assert "tpeft_lease_servers 2.0" in text
    assert "tpeft_lease_age_seconds " in text


def test_no_request_asks_the_database(pair: list[Served]) -> None:
    threads: set[str] = set()

    def executed(*_: Any) -> None:
        threads.add(threading.current_thread().name)

    for own in pair:
        event.listen(own.state._database._engine, "before_cursor_execute", executed)
    request = InferRequest("base", inputs={"pixels": PIXELS})

    async def infer() -> int:
        served = 0
        for _ in range(50):
            for own in pair:
                served += admitted(own)
                if own is pair[0]:  # the other one has no share yet
                    await own.service.infer(own.who(), request)
                own.service.generations.rates(own.who())
        return served

    assert asyncio.run(infer()) >= 1
    # The registry follows changes of other servers meanwhile.
    assert threads <= {"tpeft-keys"}
