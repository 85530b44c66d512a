"""What one tenant is told says nothing of another: names, keys, counts, or how much of it waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import PIXELS, Served, serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import CapacityError, QueueFull, TpeftError
from tpeft_deploy.runtime.server.v2.messages import InferRequest
from tpeft_deploy.runtime.server.v2.statuses import status_of

MARK = "rivalry"


def told(own: Callable[[], object]) -> str:
    """What a client is told, of a call that succeeds or not."""
    try:
        found = own()
        if isinstance(found, Coroutine):
            found = asyncio.run(found)
    except TpeftError as error:
        return status_of(error).text
    return json.dumps(found, default=str)


def count(served: Served, tenant: str, role: str, task: str) -> int:
    (found,) = asyncio.run(served.service.statistics(served.who(tenant, role), task))["model_stats"]
    return int(found["inference_stats"]["success"]["count"])


async def ask(served: Served, tenant: str, task: str, times: int = 1) -> None:
    for _ in range(times):
        await served.service.infer(served.who(tenant, "infer"), InferRequest(task, inputs={"pixels": PIXELS}))


def test_statistics_of_what_is_shared_count_ones_own_requests(served: Served, others: list[Adapter]) -> None:
    admin = served.who("operator", "admin")
    register = served.service.register(admin, "common", upload(weights=others[0].to_bytes()), tenant="shared")
    asyncio.run(register)
    for task in ("base", "plain", "common"):
        asyncio.run(ask(served, "acme", task, 2))
        asyncio.run(ask(served, MARK, task, 3))
        assert count(served, "acme", "infer", task) == 2
        assert count(served, "acme", "deploy", task) == 2
        assert count(served, MARK, "infer", task) == 3
        assert count(served, "a third", "infer", task) == 0
        assert count(served, "operator", "admin", task) == 5
    whole = asyncio.run(served.service.statistics(served.who("a third", "infer")))["model_stats"]
    assert not any(one["inference_count"] or one["last_inference"] or one["batch_stats"] for one in whole)


def test_no_answer_names_another_tenants_things(served: Served, others: list[Adapter]) -> None:
    rival, acme = served.who(MARK), served.who("acme")
    asyncio.run(served.service.register(rival, f"{MARK}-task", upload(weights=others[0].to_bytes())))
    asyncio.run(served.service.register(rival, "same", upload(weights=others[0].to_bytes()), alias=f"{MARK}-alias"))
    asyncio.run(served.service.register(acme, "same", upload(weights=others[1].to_bytes())))
    asyncio.run(served.service.pin(rival, f"{MARK}-task", folded=False))
    asyncio.run(ask(served, MARK, f"{MARK}-task"))
    service = served.service
    reads: list[Callable[[], object]] = [
        *(lambda: service.statistics(acme), lambda: service.index(acme), lambda: service.tasks(acme)),
        *(lambda: service.server_metadata(acme), lambda: service.task(acme, "same")),
        *(lambda: service.model_metadata(acme, "same"), lambda: service.model_config(acme, "same")),
        *(lambda: service.history(acme, "same", "current"), lambda: service.task(acme, "same", MARK[:5])),
        *(lambda: service.admin.metrics(acme), lambda: service.admin.audit(acme), lambda: service.admin.tenants(acme)),
    ]
    assert not [text for text in map(told, reads) if MARK in text]
    # What exists with another is answered as what exists nowhere.
    names = (f"{MARK}-task", "nowhere".ljust(len(f"{MARK}-task"), "-"))
    calls: list[Callable[[str], object]] = [
        *(lambda name: service.task(acme, name), lambda name: service.model_metadata(acme, name)),
        *(lambda name: service.statistics(acme, name), lambda name: service.history(acme, name, "current")),
        *(lambda name: service.delete(acme, name), lambda name: service.rollback(acme, name, "current")),
        *(lambda name: service.pin(acme, name, folded=False), lambda name: service.unpin(acme, name)),
        *(lambda name: service.load(acme, name, {}), lambda name: service.unload(acme, name, {})),
        *(lambda name: service.point(acme, name, "live", "1"), lambda name: service.delete(acme, name, "1")),
        lambda name: ask(served, "acme", name),
        lambda name: ask(served, "acme", f"same@{name}"),
    ]
    for call in calls:
        one, other = (told(lambda own=call, name=name: own(name)).replace(name, "NAME") for name in names)  # type: ignore[misc]
        assert one == other
    assert f"{MARK}-alias" not in told(lambda: service.point(acme, "same", "live", "7"))


@pytest.mark.parametrize(
    "error",
    [
        QueueFull("queue a request of 3 rows", expected="at most 9 rows waiting", got=f"8 rows of {MARK} before it"),
        CapacityError(f"bring '{MARK}/task@1' to the device", expected="room for it and 7 that have to stay"),
    ],
)
def test_what_is_full_is_told_without_counts(error: TpeftError, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    status = status_of(error)
    assert (status.http, status.retry_after) == (503, 1)
    assert MARK not in status.text
    assert not any(letter.isdigit() for letter in status.text)
    assert MARK in caplog.text  # for the operator


def test_a_bank_full_of_anothers_pins_is_told_without_them(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]
) -> None:
    own = serve(conv_bundle, tmp_path, device_bytes=20_000, preload=False)
    rival, acme = own.who(MARK), own.who("acme")
    texts: list[str] = []

    def note(change: Coroutine[Any, Any, object]) -> None:
        texts.append(told(lambda: change))

    for number in range(40):
        note(own.service.register(acme, f"t{number}", upload(weights=others[number % 3].to_bytes())))
        note(own.service.register(rival, f"t{number}", upload(weights=others[number % 3].to_bytes())))
        if told(lambda number=number: own.service.pin(rival, f"t{number}", folded=False)).startswith("load"):  # type: ignore[misc]
            break
    note(own.service.pin(acme, "t0", folded=False))
    refusals = [text for text in texts if text.startswith("load a task onto the device: no memory is free")]
    assert refusals
    own.runtime.close()
    own.state.close()
