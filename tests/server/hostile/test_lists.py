"""Reading costs what is asked for; long lists are made in slices, one of a tenant at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from tests.server.conftest import Served, serve
from tpeft_deploy import Bundle
from tpeft_deploy.runtime.server.operations.slices import SLICE, Turns, encoded, in_slices
from tpeft_deploy.runtime.server.registry import TaskRecord, VersionRecord
from tpeft_deploy.runtime.server.rest.app import application

COUNT = 10 * SLICE


@pytest.fixture(scope="module")
def many(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with many tasks of one tenant, one of them also shared."""
    own = serve(conv_bundle, tmp_path_factory.mktemp("many") / "state")
    catalog = own.state.tasks.snapshot()
    tasks: dict[str, dict[str, TaskRecord]] = {"acme": {}, "": {}}
    for tenant, name in [*(("acme", f"task-{n:04}") for n in range(COUNT)), ("", "task-0003")]:
        record = VersionRecord(tenant, name, 1, "0" * 64, 1, 0.0, "test")
        tasks[tenant][name] = TaskRecord(tenant, name, {1: record}, {"current": 1}, {})
    own.state.tasks._changes.known.snapshot = type(catalog)(tasks)
    own.service._management.announce(list(own.state.tasks.snapshot().versions()))
    yield own
    own.runtime.close()
    own.state.close()


@pytest.fixture
def asked(many: Served, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Tasks that the runtime is asked about; None for all."""
    found: list[str | None] = []
    residency = many.runtime.residency

    def counted(tasks: Iterable[str] | None = None) -> dict[str, Any]:
        names = None if tasks is None else list(tasks)
        found.extend([None] if names is None else names)
        return dict(residency(names))

    monkeypatch.setattr(many.runtime, "residency", counted)
    return found


def test_one_task_asks_for_one_residency(many: Served, asked: list[str | None]) -> None:
    assert many.service.task(many.who(), "task-0007")["versions"][0]["tier"] == "disk"
    assert asked == ["acme/task-0007@1"]


def test_readiness_of_one_model_asks_for_none(many: Served, asked: list[str | None]) -> None:
    assert many.service.model_ready(many.who(), "task-0007")
    assert asked == []


def test_a_page_asks_for_the_tasks_that_it_shows(many: Served, asked: list[str | None]) -> None:
    page = asyncio.run(many.service.tasks(many.who(), limit=5, after="task-0010"))
    assert [task["name"] for task in page] == [f"task-{n:04}" for n in range(11, 16)]
    assert asked == [f"acme/task-{n:04}@1" for n in range(11, 16)]


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_pages_together_are_the_whole_list(many: Served, limit: int) -> None:
    async def main() -> tuple[list[Any], list[Any]]:
        pages: list[Any] = []
        after = None
        while page := await many.service.tasks(many.who(), limit=limit, after=after):
            assert len(page) <= limit + 1  # a name is never cut in two
            pages += page
            after = page[-1]["name"]
        return pages, await many.service.tasks(many.who())

    pages, whole = asyncio.run(main())
    assert pages == whole
    assert len({(task["tenant"], task["name"]) for task in whole}) == len(whole) > COUNT


@pytest.mark.parametrize("path", ["/v2/registry/tasks", "/v1/models", "/v2/models/stats", "/v2/repository/index"])
def test_others_run_between_the_slices_of_a_list(many: Served, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = many.state.keys.create("acme", "infer", by="test")
    steps: list[int] = []
    dumps = orjson.dumps

    def counted(value: Any) -> bytes:
        steps.append(len(value))
        return bytes(dumps(value))

    monkeypatch.setattr("tpeft_deploy.runtime.server.operations.slices.orjson.dumps", counted)

    async def main() -> tuple[httpx.Response, int]:
        others, done = 0, False

        async def other() -> None:
            nonlocal others
            while not done:
                others += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        transport = httpx.ASGITransport(application(many.service))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"authorization": f"Bearer {key}"}
            method = "POST" if path.endswith("index") else "GET"
            answer = await client.request(method, path, headers=headers)
        done = True
        await beside
        return answer, others

    answer, others = asyncio.run(main())
    assert answer.status_code == 200, answer.text
    found = answer.json()
    entries = found if isinstance(found, list) else found.get("data") or found["model_stats"]
    assert len(entries) > COUNT
    assert others > 2 * COUNT // SLICE  # while it was made, and while it was encoded
    assert max(steps) <= SLICE


def test_a_tenant_makes_one_list_at_a_time(many: Served) -> None:
    turns = Turns()
    running: list[str] = []

    async def use(tenant: str) -> None:
        async with turns.turn(tenant):
            assert tenant not in running
            running.append(tenant)
            await asyncio.sleep(0)
            running.remove(tenant)

    async def main() -> None:
        await asyncio.gather(*(use(tenant) for tenant in "aabbab"))

    asyncio.run(main())
    assert not turns._turns


@pytest.mark.parametrize("count", [0, 1, SLICE, SLICE + 1, 3 * SLICE])
@pytest.mark.parametrize("around", [{}, {"object": "list"}, None])
def test_parts_of_a_list_are_the_same_json(count: int, around: dict[str, str] | None) -> None:
    entries = [{"name": f"n{n}", "of": [n, None, "é,]"]} for n in range(count)]
    document: Any = entries if around is None else {**around, "data": entries}
    assert json.loads(b"".join(asyncio.run(encoded(document)))) == document


def test_items_are_used_in_order() -> None:
    found: list[int] = []
    asyncio.run(in_slices(range(100), found.append))
    assert found == list(range(100))
