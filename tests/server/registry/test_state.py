"""What a state remembers: aliases' histories, pins and unloaded models, over restarts, and in databases of before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import text

from tests.helpers.server.earlier_schemas import state_of_schema
from tests.helpers.server.registry_subjects import adapter, add
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS, Served, serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import Conflict, NotFound, QuotaExceeded, RunError, Unavailable
from tpeft_deploy.runtime.server.registry import PinRecord, State, open_state, schema
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.runtime.server.tenancy.change_rate import ChangeRate
from tpeft_deploy.runtime.server.v2.messages import InferRequest

T = TypeVar("T")


@pytest.fixture
def state(tmp_path: Path, url: str | None) -> Iterator[State]:
    with open_state(tmp_path / "state", url) as own:
        yield own


def wait(own: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(own)


def numbers(state: State, alias: str = "current") -> list[int]:
    return [one.number for one in state.tasks.history("acme", "mood", alias)]


def test_an_alias_has_a_history(state: State) -> None:
    for seed in range(3):
        add(state, seed=seed)
    state.tasks.point("acme", "mood", "current", "1", by="another key")
    state.tasks.point("acme", "mood", "current", "1", by="a third, which changes nothing")
    state.tasks.rollback("acme", "mood", "current", by="a key")
    state.tasks.rollback("acme", "mood", "current", by="a key")
    found = state.tasks.history("acme", "mood", "current")
    assert [one.number for one in found] == [1, 3, 1, 3, 2, 1]
    assert [one.by for one in found] == ["a key", "a key", "another key", *["a key"] * 3]
    times = [one.time or 0 for one in found]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0
    assert state.tasks.history("acme", "mood", "current", 2) == found[:2]
    with pytest.raises(NotFound, match="none of that name"):
        state.tasks.history("acme", "mood", "canary")
    with pytest.raises(NotFound):
        state.tasks.history("rival", "mood", "current")


def test_a_history_is_bounded_and_goes_with_its_task(state: State) -> None:
    for seed in range(2):
        add(state, seed=seed)
    for _ in range(60):
        for version in ("1", "2"):
            state.tasks.point("acme", "mood", "current", version, by="a key")
    assert numbers(state) == [2, 1] * 50
    with state._database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM alias_history")).scalar_one() == 100
    state.tasks.remove("acme", "mood", by="a key")
    add(state)
    assert numbers(state) == [3]


def test_a_change_may_say_what_it_expects(state: State) -> None:
    for seed in range(3):
        add(state, seed=seed)
    with pytest.raises(Conflict, match=r"expected that it stands for version '2', got version 3"):
        state.tasks.rollback("acme", "mood", "current", by="a key", expected="2")
    with pytest.raises(Conflict, match=r"got none"):
        state.tasks.point("acme", "mood", "canary", "1", by="a key", expected="1")
    assert numbers(state) == [3, 2, 1]
    assert state.tasks.rollback("acme", "mood", "current", by="a key", expected="3").aliases == {"current": 2}
    assert state.tasks.point("acme", "mood", "current", "1", by="a key", expected="2").aliases == {"current": 1}


def test_of_two_that_saw_the_same_version_one_rolls_back(served: Served, others: list[Adapter]) -> None:
    who = served.who()
    for own in others[:2]:
        wait(served.service.register(who, "mood", upload(weights=own.to_bytes())))

    async def both() -> list[object]:
        rolls = [served.service.rollback(who, "mood", "current", expected="2") for _ in range(2)]
        return await asyncio.gather(*rolls, return_exceptions=True)

    found = wait(both())
    assert sum(isinstance(one, Conflict) for one in found) == 1
    assert served.service.task(who, "mood")["aliases"] == {"current": "1"}
    history = wait(served.service.history(who, "mood", "current"))
    assert [(one["version"], one["key"]) for one in history] == [("1", who.key), ("2", who.key), ("1", who.key)]


def test_keys_of_others_are_not_in_the_history_of_what_is_shared(served: Served, others: list[Adapter]) -> None:
    admin = served.who("operator", "admin")
    wait(served.service.register(admin, "common", upload(weights=others[0].to_bytes()), tenant="shared"))
    assert wait(served.service.history(served.who("rival", "infer"), "common", "current"))[0]["key"] is None
    assert wait(served.service.history(admin, "common", "current"))[0]["key"] == admin.key


def residency(own: Served) -> dict[str, str]:
    return {key: tier for key, tier in own.runtime.residency().items() if "/" in key}


def pins(own: Served) -> set[tuple[str, str, str, bool]]:
    return {(pin.tenant, pin.task, pin.version, pin.folded) for pin in own.state.placements.pins()}


def test_pins_and_unloaded_models_are_there_after_a_restart(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter]
) -> None:
    own = serve(conv_bundle, tmp_path)
    who, admin = own.who(), own.who("operator", "admin")
    for name, seed in (("mood", 0), ("tone", 1), ("gone", 2), ("cold", 0)):
        wait(own.service.register(who, name, upload(weights=others[seed].to_bytes())))
    wait(own.service.pin(who, "mood", folded=False))
    wait(own.service.pin(who, "tone", folded=True))
    wait(own.service.load(who, "gone", {"pin": True}))
    wait(own.service.pin(admin, "plain", folded=False, tenant="shared"))
    wait(own.service.unload(who, "cold", {}))
    wait(own.service.delete(who, "gone"))
    assert pins(own) == {("acme", "mood", "1", False), ("acme", "tone", "1", True), ("", "plain", "1", False)}
    log = [(entry.action, entry.target, entry.key) for entry in own.state.audit.list(7)]
    assert log[::-1] == [
        *[("pin", "mood", who.key), ("pin", "tone", who.key), ("load", "gone", who.key), ("pin", "gone", who.key)],
        *[("pin", "plain", admin.key), ("unload", "cold", who.key), ("delete", "gone", who.key)],
    ]
    own.runtime.close()
    own.state.close()

    again = serve(conv_bundle, tmp_path)
    assert residency(again)["acme/mood@1"] == "device"
    wait_until(lambda: residency(again)["acme/tone@1"] == "folded", "a fold")
    assert again.runtime.pins() == {"acme/mood@1": False, "acme/tone@1": True, "plain": False}
    request = InferRequest("cold", inputs={"pixels": PIXELS})
    with pytest.raises(Unavailable, match="unloaded"):
        wait(again.service.infer(who, request))
    wait(again.service.load(who, "cold", {}))
    assert wait(again.service.infer(who, request)).outputs["logits"].shape[0] == len(PIXELS)
    wait(again.service.unpin(who, "mood"))
    assert "acme/mood@1" not in again.runtime.pins()
    again.runtime.close()
    again.state.close()
    with open_state(tmp_path) as state:
        assert not state.placements.now.unloaded
        assert [pin.task for pin in state.placements.pins()] == ["tone", "plain"]


def test_a_pin_without_room_or_without_its_task_stops_no_start(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter], caplog: pytest.LogCaptureFixture
) -> None:
    with open_state(tmp_path) as state:
        state.tasks.add("acme", "mood", others[0], lambda *_: None, by="a key")
        for name in ("mood", "never"):
            state.placements.pin(PinRecord("acme", name, "1", False), by="a key")
    with pytest.MonkeyPatch.context() as patch:

        def full(self: object, task: str, *, folded: bool) -> None:
            raise RunError(f"pin {task!r}", problem="no room")

        patch.setattr("tpeft_deploy.runtime.runtime.Runtime.pin", full)
        own = serve(conv_bundle, tmp_path)
    assert "cannot pin version 1 of task 'mood' again" in caplog.text
    assert pins(own) == {("acme", "mood", "1", False)}  # the other is forgotten
    own.runtime.close()
    own.state.close()


def test_unpinning_lets_every_version_go(served: Served, others: list[Adapter]) -> None:
    who = served.who()
    for own in others[:2]:
        wait(served.service.register(who, "mood", upload(weights=own.to_bytes())))
        wait(served.service.pin(who, "mood", folded=False))
    assert set(served.runtime.pins()) == {"acme/mood@1", "acme/mood@2"}
    wait(served.service.unpin(who, "mood"))
    assert not served.runtime.pins()
    assert not pins(served)


@pytest.mark.parametrize("verb", ["pin", "unpin", "load", "unload"])
def test_a_placement_without_its_entry_in_the_log_is_none(
    verb: str, served: Served, others: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    who, service = served.who(), served.service
    wait(service.register(who, "mood", upload(weights=others[0].to_bytes())))
    if verb == "unpin":
        wait(service.pin(who, "mood", folded=False))
    if verb == "load":
        wait(service.unload(who, "mood", {}))
    before = served.runtime.pins(), served.state.placements.pins(), served.state.placements.now.unloaded

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no log")

    monkeypatch.setattr("tpeft_deploy.runtime.server.registry.audit.write", fail)
    calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "pin": lambda: service.pin(who, "mood", folded=False),
        "unpin": lambda: service.unpin(who, "mood"),
        "load": lambda: service.load(who, "mood", {}),
        "unload": lambda: service.unload(who, "mood", {}),
    }
    with pytest.raises(RuntimeError, match="no log"):
        wait(calls[verb]())
    assert (served.runtime.pins(), served.state.placements.pins(), served.state.placements.now.unloaded) == before
    assert service.model_ready(who, "mood") is (verb != "load")


def test_a_database_of_before_opens_and_works(tmp_path: Path, url: str | None) -> None:
    known = state_of_schema(1, tmp_path, url)
    with open_state(tmp_path, url) as state:
        assert {"alias_history", "pins", "unloaded"}.isdisjoint(known)
        assert state.tenants.quota("acme").weight == 2
        assert [record.id for record in state.keys.list()] == ["0123456789ab"]
        assert [(one.number, one.time, one.by) for one in state.tasks.history("acme", "mood", "current")] == [
            (3, None, None)
        ]
        task = state.tasks.rollback("acme", "mood", "current", by="a key", expected="3")
        assert task.aliases == {"current": 1}
        assert [(one.number, one.by) for one in state.tasks.history("acme", "mood", "current")] == [
            (1, "a key"),
            (3, None),
        ]
        state.placements.pin(PinRecord("acme", "mood", "3", True), by="a key")
        assert add(state).number == 4
        assert state.tasks.read(task.version("1")).to_bytes() == adapter(0).to_bytes()
        with state._database.writing() as connection:  # a server of before goes on with it
            connection.execute(schema.aliases.update().values(number=3, previous=4))
    with open_state(tmp_path, url) as state:
        assert numbers(state)[:2] == [3, 4]
        assert state.tasks.rollback("acme", "mood", "current", by="a key").aliases == {"current": 4}
        assert numbers(state)[:3] == [4, 3, 4]
        assert [pin.version for pin in state.placements.pins()] == ["3"]
        state.tasks.remove_version("acme", "mood", 3, by="a key")
        assert not state.placements.pins()


def test_the_audit_log_is_bounded(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        add(state, seed=seed)
    for version in ("1", "2") * 5:
        state.tasks.point("acme", "mood", "canary", version, by="a key")
    ids = [entry.id for entry in state.audit.list()]
    assert len(ids) == 12
    assert state.audit.sweep(days=None, rows=None) == 0
    assert state.audit.sweep(days=1, rows=12) == 0
    assert state.audit.sweep(days=None, rows=5) == 7
    assert [entry.id for entry in state.audit.list()] == ids[:5]
    later = state.audit.list()[0].time + 86400
    monkeypatch.setattr("time.time", lambda: later + 100)
    state.tasks.point("acme", "mood", "canary", "1", by="a key")
    assert state.audit.sweep(days=1, rows=100) == 5
    assert len(state.audit.list()) == 1


def test_a_key_changes_so_much_a_second() -> None:
    now = 1000.0
    rate = ChangeRate(10, lambda: now)
    for _ in range(100):
        rate.spend("a key")
    with pytest.raises(QuotaExceeded, match="at most 10 changes a second") as refused:
        rate.spend("a key")
    assert refused.value.retry_after == pytest.approx(0.1)
    rate.spend("another key")
    now += 0.1
    rate.spend("a key")
    with pytest.raises(QuotaExceeded):
        rate.spend("a key")
    now += 3600
    for _ in range(100):
        rate.spend("a key")
    for number in range(20_000):
        rate.spend(f"key {number}")
    assert len(rate._full) <= 10_000
    slow = ChangeRate(0.01, lambda: now)  # one may always come, where the bucket is full
    slow.spend("a key")
    with pytest.raises(QuotaExceeded):
        slow.spend("a key")


def test_every_change_counts_and_a_revocation_is_always_taken(
    served: Served, others: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    who, admin = served.who(), Principal("operator", Role.ADMIN, "the operator's")
    service = served.service
    wait(service.register(who, "mood", upload(weights=others[0].to_bytes())))
    record = wait(service.admin.create_key(admin, "acme", "infer"))
    spent: list[str] = []

    def spend(key: str) -> None:
        spent.append(key)
        raise QuotaExceeded("change what is registered", retry_after=1)

    monkeypatch.setattr(service._changes, "spend", spend)
    changes: list[Coroutine[Any, Any, object]] = [
        service.register(who, "tone", upload(weights=b"")),
        *(service.load(who, "mood", {}), service.unload(who, "mood", {})),
        *(service.point(who, "mood", "live", "1"), service.rollback(who, "mood", "current")),
        *(service.pin(who, "mood", folded=False), service.unpin(who, "mood"), service.delete(who, "mood")),
        *(service.publish(admin, "mood", "acme"), service.admin.create_key(admin, "acme", "infer")),
        service.admin.set_tenant(admin, "acme", {}),
    ]
    for change in changes:
        with pytest.raises(QuotaExceeded):
            wait(change)
    assert len(spent) == len(changes)
    wait(service.admin.revoke_key(admin, record["id"]))
    assert service.task(who, "mood")["aliases"] == {"current": "1"}
