"""Pins and folded sessions of one tenant: they end before the room of the others does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import PIXELS, Served, serve, upload
from tpeft_deploy import Adapter, Bundle, Runtime
from tpeft_deploy.errors import CapacityError, Conflict, QuotaExceeded, TpeftError
from tpeft_deploy.runtime.server.operations.pools import Workers
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.settings import Settings
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.tenancy.tenant_pins import TenantPins
from tpeft_deploy.runtime.server.v2.messages import InferRequest
from tpeft_deploy.runtime.server.v2.statuses import status_of

ROWS = 5


@pytest.fixture(scope="module")
def small(conv_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, others: list[Adapter]) -> Iterator[Served]:
    """A server with room for 5 adapters, of which pins may take 2; six tasks of one tenant and one of another."""
    with Runtime(conv_bundle.path, provider="cpu", threads=1, preload=False) as runtime:
        runtime.load("one", others[0])
        row = runtime._residency._bank.row_bytes
    place = tmp_path_factory.mktemp("pins")
    own = serve(conv_bundle, place, device_bytes=(ROWS + 1) * row, pinned_share=0.5, preload=False)
    for number in range(6):
        add(own, others[0], f"task{number}", "hostile")
    add(own, others[1], "mood", "modest")
    yield own
    own.runtime.close()
    own.state.close()


def add(own: Served, adapter: Adapter, name: str, tenant: str) -> None:
    asyncio.run(own.service.register(own.who(tenant), name, upload(weights=adapter.to_bytes())))


@pytest.fixture
def pins(small: Served) -> Iterator[Callable[..., list[str]]]:
    """Pins six tasks of the tenant at once, and returns how each was answered."""

    def pin(quota: Quota, *, folded: bool = False, load: bool = False) -> list[str]:
        small.state.tenants.put("hostile", quota, by="test")

        async def one(number: int) -> str:
            try:
                if load:
                    await small.service.load(small.who("hostile"), f"task{number}", {"pin": True})
                else:
                    await small.service.pin(small.who("hostile"), f"task{number}", folded=folded)
            except TpeftError as error:
                status = status_of(error)
                assert status.retry_after is None
                assert "modest" not in status.text
                return str(status.http)
            return "pinned"

        async def main() -> list[str]:
            return await asyncio.gather(*map(one, range(6)))

        return asyncio.run(main())

    yield pin
    for key in small.runtime.pins():
        small.runtime.unpin(key)


def answered(own: Served) -> bool:
    """Whether all tasks of the other tenant, and of the bundle, are served."""
    for task in ("mood", "two", "wide", "partial", "plain"):
        request = InferRequest(task, {"pixels": PIXELS[:1]})
        asyncio.run(own.service.infer(own.who("modest", "infer"), request))
    return True


@pytest.mark.parametrize("load", [True, False])
def test_a_tenant_pins_as_many_as_its_quota_says_however_it_asks(
    small: Served, pins: Callable[..., list[str]], load: bool
) -> None:
    assert sorted(pins(Quota(pins=1), load=load)) == [*["429"] * 5, "pinned"]
    assert answered(small)
    assert pins(Quota(pins=1)).count("pinned") == 1  # the same once more
    (record,) = [one for one in used(small) if one["name"] == "hostile"]
    assert (record["used"]["pins"], record["used"]["folded"], record["quota"]["pins"]) == (1, 0, 1)


def used(own: Served) -> Any:
    return asyncio.run(own.service.admin.tenants(own.who("root", "admin")))


def test_pins_leave_rows_for_those_that_have_none(small: Served, pins: Callable[..., list[str]]) -> None:
    """With no quota at all: what may be pinned is half of the bank."""
    assert sorted(pins(Quota())) == [*["409"] * 4, "pinned", "pinned"]
    assert small.runtime.usage()["rows"] == ROWS
    assert answered(small)
    with pytest.raises(Conflict, match=r"pin task 'mood'.*at most 2 of 5 rows pinned"):
        asyncio.run(small.service.pin(small.who("modest"), "mood", folded=False))
    (first, *_) = small.runtime.pins()
    small.runtime.unpin(first)
    asyncio.run(small.service.pin(small.who("modest"), "mood", folded=False))
    assert answered(small)


def test_folded_sessions_have_a_quota_too(small: Served, pins: Callable[..., list[str]]) -> None:
    assert sorted(pins(Quota(folded=1), folded=True)) == [*["429"] * 5, "pinned"]
    assert sum(small.runtime.pins().values()) == 1
    with pytest.raises(QuotaExceeded, match="at most 1 versions folded, got 1 already"):
        asyncio.run(small.service.pin(small.who("hostile"), other_than_folded(small), folded=True))
    asyncio.run(small.service.pin(small.who("hostile"), other_than_folded(small), folded=False))


def other_than_folded(own: Served) -> str:
    pinned = {key.partition("/")[2].partition("@")[0] for key in own.runtime.pins()}
    return next(f"task{number}" for number in range(6) if f"task{number}" not in pinned)


def test_sessions_of_all_tenants_are_bounded(small: Served) -> None:
    own = TenantPins(small.runtime, lambda _: Quota(), 0, Workers("tests", 1))
    with pytest.raises(Conflict, match="at most 0 folded versions on this server"):
        asyncio.run(own.add("modest", "mood", "modest/mood@1", folded=True))
    assert not small.runtime.pins()


def test_a_deleted_task_is_no_pin_any_more(
    small: Served, pins: Callable[..., list[str]], others: list[Adapter]
) -> None:
    add(small, others[2], "short", "brief")
    small.state.tenants.put("brief", Quota(pins=1), by="test")
    asyncio.run(small.service.pin(small.who("brief"), "short", folded=False))
    asyncio.run(small.service.delete(small.who("brief"), "short"))
    assert not small.runtime.pins()
    assert sorted(pins(Quota(pins=2))).count("pinned") == 2


def test_a_refused_pin_is_no_pin(conv_bundle: Bundle) -> None:
    with Runtime(conv_bundle.path, provider="cpu", threads=1, pinned_share=0.0) as runtime:
        with pytest.raises(CapacityError, match="at most 0 of"):
            runtime.pin("two")
        assert runtime.pins() == {}
        assert not runtime._versions.find("two").pinned


def test_quotas_that_were_stored_before_have_the_defaults(tmp_path: Path) -> None:
    default = Settings().quota
    assert (default.pins, default.folded) == (8, 2)
    with open_state(tmp_path, default=default) as state:
        old = {"requests_per_s": None, "queue_share": 0.25, "weight": 2.0}
        assert state.tenants._record("acme", old, 0.0).quota == Quota(queue_share=0.25, weight=2.0, pins=8, folded=2)
        assert state.tenants._record("acme", {**old, "pins": None, "folded": 1}, 0.0).quota.pins is None
