"""Uploads that block hold up uploads only, and those of one tenant not even all of these."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.server.conftest import Served, upload
from tpeft_deploy import Adapter
from tpeft_deploy.errors import Unauthenticated
from tpeft_deploy.runtime.server.operations.pools import Pools, Workers
from tpeft_deploy.runtime.server.tenancy.access import Role


async def _until(done: threading.Event | asyncio.Event) -> None:
    while not done.is_set():
        await asyncio.sleep(0.002)


def test_blocked_uploads_stop_neither_revocation_nor_metrics_nor_the_end(
    served: Served, others: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)
    record, key = served.state.keys.create("acme", Role("infer"), by="test")

    def blocked(*_args: object, **_options: object) -> None:
        begun.release()
        assert go.wait(100)

    monkeypatch.setattr(served.state.tasks, "add", blocked)
    service, admin = served.service, served.who("root", "admin")

    async def main() -> None:
        data = others[0].to_bytes()
        uploads = [
            asyncio.create_task(service.register(served.who(f"t{n}"), f"task-{n}", upload(weights=data)))
            for n in range(6)
        ]
        for _ in range(4):  # as many as there are threads
            while not begun.acquire(blocking=False):
                await asyncio.sleep(0.002)
        assert service.authenticate(f"Bearer {key}").tenant == "acme"
        await service.admin.revoke_key(admin, record.id)
        with pytest.raises(Unauthenticated):
            service.authenticate(f"Bearer {key}")
        assert await service.admin.metrics(admin) == b""
        assert (await service.admin.audit(admin, 1))[0]["action"]
        for one in uploads:
            one.cancel()
        await asyncio.sleep(0)
        for one in uploads:  # a second time: their files are removed by the same threads
            one.cancel()
        await asyncio.wait(uploads)
        service._options.pools.close(0)

    try:
        asyncio.run(main())  # ends though the threads do not
    finally:
        go.set()


def test_a_tenant_never_holds_all_threads() -> None:
    own, go = Workers("tests", 3), threading.Event()
    ran: list[str] = []

    def work(tenant: str, wait: bool = False) -> None:
        ran.append(tenant)
        if wait:
            assert go.wait(100)

    async def main() -> None:
        greedy = [asyncio.create_task(own.run_for("greedy", work, "greedy", True)) for _ in range(9)]
        while len(ran) < 2:
            await asyncio.sleep(0.002)
        for _ in range(5):
            await own.run_for("modest", work, "modest")
        assert ran.count("greedy") == 2
        go.set()
        await asyncio.gather(*greedy)

    asyncio.run(main())
    assert ran.count("greedy") == 9
    own.close(60)


def test_work_that_was_cancelled_before_its_turn_is_not_done() -> None:
    own, go, begun = Workers("tests", 1), threading.Event(), threading.Event()
    ran: list[int] = []

    def first() -> None:
        begun.set()
        assert go.wait(100)

    async def main() -> None:
        busy = asyncio.create_task(own.run(first))
        await _until(begun)
        late = asyncio.create_task(own.run(ran.append, 1))
        await asyncio.sleep(0)
        late.cancel()
        await asyncio.wait([late])
        go.set()
        await busy
        await own.run(ran.append, 2)

    asyncio.run(main())
    assert ran == [2]
    own.close(60)


def test_errors_arrive_and_closed_threads_refuse() -> None:
    own = Workers("tests", 2)

    def fails() -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        asyncio.run(own.run(fails))
    own.close(60)
    with pytest.raises(RuntimeError):
        asyncio.run(own.run(fails))
    wait_until(lambda: not any(one.name.startswith("tests-") for one in threading.enumerate()), "threads end")


def test_closing_waits_for_what_runs_and_no_longer_than_told(tmp_path: Path) -> None:
    pools, go = Pools(), threading.Event()

    async def main() -> None:
        blocked = asyncio.create_task(pools.uploads.run(go.wait, 100))
        written = asyncio.create_task(pools.changes.run((tmp_path / "done").write_text, "done"))
        await asyncio.sleep(0)
        await written
        blocked.cancel()

    asyncio.run(main())
    pools.close(0.01)
    assert (tmp_path / "done").exists()
    go.set()
