"""Several servers on one PostgreSQL and one store: what one changes, all serve, in one order."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from sqlalchemy import event, text

from tests.helpers.server.postgres import Postgres
from tests.helpers.server.registry_subjects import adapter, add, unchecked
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS, Served, serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import (
    Conflict,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    ServerError,
    TpeftError,
    Unavailable,
)
from tpeft_deploy.runtime.server.registry import Condition, State, Tasks, VersionRecord, open_state
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import InferRequest

T = TypeVar("T")
NAMES = ["mood", "tone", "topic", "style", "voice"]


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.empty()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Directory for those of servers, and of their store."""
    return tmp_path


def store(place: Path) -> str:
    return f"file:{place / 'store'}"


@pytest.fixture
def states(place: Path, url: str) -> Iterator[tuple[State, State]]:
    with (
        open_state(place / "one", url, store=store(place)) as one,
        open_state(place / "two", url, store=store(place)) as two,
    ):
        yield one, two


def wait(own: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(own)


def caught_up(state: State, number: int) -> None:
    wait_until(lambda: state.tasks._changes.known._seen >= number, "what another server changed")


def shown(state: State) -> dict[str, tuple[dict[int, str], dict[str, int], dict[str, int]]]:
    return {
        task.name: (
            {number: version.digest for number, version in task.versions.items()},
            dict(task.aliases),
            dict(task.previous),
        )
        for task in state.tasks.snapshot().visible("acme")
    }


def test_one_server_sees_what_another_changes(states: tuple[State, State]) -> None:
    one, two = states
    first, second = add(one, seed=0), add(two, seed=1)
    assert (first.number, second.number) == (1, 2)
    wait_until(lambda: shown(one) == shown(two) != {}, "both versions on both")
    assert one.tasks.snapshot().find("acme", "mood") == second
    assert one.tasks.read(second).to_bytes() == adapter(1).to_bytes()
    # Conditions hold on what is in the database, whatever this server has seen of it.
    two.tasks.point("acme", "mood", "current", "1", by="b", expected="2")
    with pytest.raises(Conflict, match="got version 1"):
        one.tasks.point("acme", "mood", "current", "1", by="a", expected="2")
    one.tasks.remove("acme", "mood", by="a")
    with pytest.raises(NotFound):
        two.tasks.rollback("acme", "mood", "current", by="b")
    wait_until(lambda: shown(two) == {}, "the deletion")
    assert add(two).number == 3


def test_two_that_register_one_task_at_once_get_different_numbers(states: tuple[State, State]) -> None:
    ready = threading.Barrier(2)

    def register(state: State, seed: int) -> list[int]:
        ready.wait()
        return [add(state, seed=seed + 2 * index).number for index in range(8)]

    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(register, states, (0, 1))
    assert sorted(one + two) == list(range(1, 17))
    states[0].refresh()
    assert set(states[0].tasks.snapshot().task("acme", "mood").versions) == set(range(1, 17))


def test_of_many_changes_with_one_tag_exactly_one_is_made(states: tuple[State, State]) -> None:
    tasks = [state.tasks for state in states]
    add(states[0])

    def changed(who: int) -> str | None:
        ready.wait()
        own = tasks[who % 2]
        condition, by = Condition(frozenset({tag})), f"key {who}"
        try:
            if who < 4:
                own.add("acme", "mood", adapter(who % 3), unchecked, by=by, condition=condition)
            else:
                own.point("acme", "mood", "canary", "1", by=by, condition=condition)
        except PreconditionFailed:
            return None
        return by

    with ThreadPoolExecutor(8) as threads:
        for _ in range(10):
            ready = threading.Barrier(8)
            states[1].refresh()
            tag, before = tasks[1].snapshot().task("acme", "mood").tag, states[0].audit.list(1)[0].id
            [made] = [who for who in threads.map(changed, range(8)) if who is not None]
            [entry] = [entry for entry in states[0].audit.list() if entry.id > before]
            assert entry.key == made
    assert _of_new_tasks(tasks) == 1


def _of_new_tasks(tasks: list[Tasks]) -> int:
    """How many of eight registrations of a task that does not exist are made."""
    ready = threading.Barrier(8)

    def made(who: int) -> bool:
        ready.wait()
        try:
            tasks[who % 2].add(
                "acme", "tone", adapter(who % 3), unchecked, by="a key", condition=Condition(exists=False)
            )
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        return sum(threads.map(made, range(8)))


def test_a_registration_that_another_server_overtakes_gives_its_number_back(states: tuple[State, State]) -> None:
    one, two = states
    add(one)
    condition = Condition(frozenset({one.tasks.snapshot().task("acme", "mood").tag}))

    def overtaken(_record: VersionRecord, _adapter: Adapter) -> None:
        two.tasks.point("acme", "mood", "canary", "1", by="b")

    with pytest.raises(PreconditionFailed):
        one.tasks.add("acme", "mood", adapter(1), overtaken, by="a", condition=condition)
    with pytest.raises(PreconditionFailed):  # on what is in the database, whatever this server has seen of it
        one.tasks.point("acme", "mood", "canary", "1", by="a", condition=condition)
    assert add(two).number == 2


def test_published_and_quotas_are_those_of_all(states: tuple[State, State]) -> None:
    one, two = states
    add(one, name="mood")
    two.tenants.put("acme", Quota(adapters=2), by="b")
    wait_until(lambda: one.tenants.quota("acme").adapters == 2, "the quota")
    add(two, name="tone")
    with pytest.raises(QuotaExceeded, match="at most 2 adapters"):
        add(one, name="topic")
    two.tasks.publish("acme", "mood", lambda _: None, by="b")
    wait_until(lambda: one.tasks.snapshot().own("", "mood"), "the published task")
    assert one.tasks.snapshot().own("acme", "mood") is None
    with pytest.raises(Conflict, match="shared task"):
        add(one, name="mood")


def operate(state: State, draw: random.Random) -> None:
    """One random change; one that has no object is none."""
    name = draw.choice(NAMES)
    known = state.tasks.snapshot().own("acme", name)
    kind = draw.choices(["add", "point", "rollback", "version", "remove"], [5, 3, 3, 2, 1])[0]
    if known is None or kind == "add":
        add(state, name=name, seed=draw.randrange(6), alias=draw.choice(["current", "canary"]))
        return
    number = draw.choice(sorted(known.versions))
    if kind == "point":
        state.tasks.point("acme", name, draw.choice(["current", "canary"]), str(number), by="a key")
    elif kind == "rollback":
        state.tasks.rollback("acme", name, draw.choice(sorted(known.aliases)), by="a key")
    elif kind == "version":
        state.tasks.remove_version("acme", name, number, by="a key")
    else:
        state.tasks.remove("acme", name, by="a key")


def replayed(state: State, count: int) -> dict[str, tuple[dict[int, str], dict[str, int], dict[str, int]]]:
    """The tasks after what the audit log says, in its order."""
    tasks: dict[str, tuple[dict[int, str], dict[str, int], dict[str, int]]] = {}
    for entry in reversed(state.audit.list(count)):
        versions, aliases, previous = tasks.setdefault(entry.target, ({}, {}, {}))
        detail = entry.detail
        if entry.action == "register":
            assert detail["version"] not in versions
            versions[detail["version"]] = detail["digest"]
        if entry.action in ("register", "point", "roll back"):
            alias, number = detail["alias"], detail["version"]
            assert number in versions
            assert entry.action != "roll back" or previous[alias] == number
            if aliases.get(alias, number) != number:
                previous[alias] = aliases[alias]
            aliases[alias] = number
        elif entry.action == "delete version":
            del versions[detail["version"]]
            assert detail["version"] not in aliases.values()
        elif entry.action == "delete":
            assert sorted(versions) == detail["versions"]
            del tasks[entry.target]
    return tasks


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_changes_of_two_servers_have_one_order(states: tuple[State, State], count: int) -> None:
    delays: list[float] = []

    def change(index: int) -> int:
        own, other = states[index], states[1 - index]
        draw, done = random.Random(index), 0
        while done < count // 2:
            try:
                operate(own, draw)
            except (NotFound, Conflict):
                continue  # the other server was first
            done += 1
            number, began = own.tasks._changes.known._seen, time.monotonic()
            caught_up(other, number)
            delays.append(time.monotonic() - began)
        return done

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(change, range(2))) == [count // 2] * 2
    for state in states:
        state.refresh()
    assert shown(states[0]) == shown(states[1]) == replayed(states[0], 10 * count)
    print(f"{count} changes: seen after {statistics.median(delays) * 1e3:.1f} ms, at most {max(delays) * 1e3:.1f} ms")
    if count == 1000:  # nothing else runs beside a soak
        assert max(delays) < 1


def test_a_change_among_many_tasks_reads_that_task_alone(states: tuple[State, State]) -> None:
    one, two = states
    with one._database.writing() as connection:
        connection.execute(
            text(
                "INSERT INTO tasks (tenant, name, next_number, deleted, changed)"
                " SELECT 'acme', 'task-' || n, 1, false, 0 FROM generate_series(1, 10000) n"
            )
        )
    caught_up(two, one.tasks._changes.known._seen)
    rows: list[int] = []

    def executed(_: Any, cursor: Any, statement: str, *__: Any) -> None:
        if "FROM tasks" in statement or "FROM versions" in statement or "FROM aliases" in statement:
            rows.append(cursor.rowcount)

    event.listen(two._database._engine, "after_cursor_execute", executed)
    record = add(one)
    wait_until(lambda: two.tasks.snapshot().own("acme", "mood"), "the registered task")
    assert two.tasks.snapshot().find("acme", "mood") == record
    assert sum(rows) <= 12


def test_a_server_alone_and_servers_that_share_exclude_each_other(place: Path, url: str, postgres: Postgres) -> None:
    with open_state(place / "one", url, store=store(place)):
        with pytest.raises(ServerError, match="expected one that no other server uses, got one in use"):
            open_alone(place / "three", url)
        with open_state(place / "two", url, store=store(place)):
            pass
    alone = pytest.raises(ServerError, match="no other server uses alone, got one in use")
    with open_state(place / "three", own := postgres.empty()), alone:
        open_alone(place / "two", own, store(place))


def open_alone(place: Path, url: str, store: str | None = None) -> None:
    from tpeft_deploy.runtime.server.registry import state

    before, state._PATIENCE = state._PATIENCE, 0.0
    try:
        open_state(place, url, store=store).close()
    finally:
        state._PATIENCE = before


def test_changes_are_followed_after_lost_connections(states: tuple[State, State], postgres: Postgres) -> None:
    one, two = states
    add(one, name="mood")
    wait_until(lambda: two.tasks.snapshot().own("acme", "mood"), "a task")
    for round in range(3):
        with postgres.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        name = f"tone-{round}"
        wait_until(lambda name=name: attempted(lambda: add(one, name=name)), "a registration")  # type: ignore[misc]
        wait_until(lambda name=name: two.tasks.snapshot().own("acme", name), "a task")  # type: ignore[misc]
    assert shown(one) == shown(two)


def attempted(act: Callable[[], object]) -> bool:
    try:
        act()
    except TpeftError:
        return False
    return True


def test_a_server_without_the_database_serves_what_it_knows(place: Path) -> None:
    from tests.helpers.server.postgres import running

    with running() as own:
        url = own.empty()
        with open_state(place / "one", url, store=store(place)) as one:
            record = add(one)
            own.stop()
            wait_until(lambda: not attempted(one.refresh), "the loss of the database")
            assert one.tasks.snapshot().find("acme", "mood") == record
            assert one.tasks.read(record).to_bytes() == adapter(0).to_bytes()
            with pytest.raises(Unavailable):
                add(one, seed=1)


@pytest.fixture
def pair(conv_bundle: Bundle, states: tuple[State, State], tmp_path: Path) -> Iterator[tuple[Served, Served]]:
    one, two = (serve(conv_bundle, tmp_path, state=state) for state in states)
    yield one, two
    for own in (one, two):
        own.runtime.close()


def test_services_serve_what_others_register(pair: tuple[Served, Served], others: list[Adapter]) -> None:
    one, two = pair
    who = one.who()
    request = InferRequest("mood", inputs={"pixels": PIXELS})

    def serves(own: Served, expected: np.ndarray[Any, Any]) -> bool:
        try:
            found = wait(own.service.infer(who, request)).outputs["logits"]
        except TpeftError:
            return False
        return bool(np.array_equal(found, expected))

    wait(one.service.register(who, "mood", upload(weights=others[0].to_bytes())))
    first = wait(one.service.infer(who, request)).outputs["logits"]
    wait_until(lambda: serves(two, first), "the first version")
    wait(two.service.register(who, "mood", upload(weights=others[1].to_bytes())))
    second = wait(two.service.infer(who, request)).outputs["logits"]
    assert not np.array_equal(first, second)
    wait_until(lambda: serves(one, second), "the second version")
    wait(two.service.rollback(who, "mood", "current"))
    wait_until(lambda: serves(one, first), "the first version again")

    wait(one.service.pin(who, "mood", folded=True))
    wait_until(lambda: two.runtime.pins().get("acme/mood@1"), "the pin")
    wait(two.service.unpin(who, "mood"))
    wait_until(lambda: not one.runtime.pins(), "the end of the pin")

    wait(one.service.unload(who, "mood", {}))
    wait_until(lambda: ("acme", "mood") in two.state.placements.now.unloaded, "the unloading")
    with pytest.raises(Unavailable, match="unloaded"):
        wait(two.service.infer(who, request))
    wait(two.service.load(who, "mood", {}))
    wait_until(lambda: serves(one, first), "the model that is loaded again")

    wait(two.service.delete(who, "mood"))
    wait_until(lambda: not one.runtime.residency().keys() & {"acme/mood@1", "acme/mood@2"}, "the end of the versions")
    with pytest.raises(NotFound):
        wait(one.service.infer(who, request))


def test_a_pin_that_another_server_removes_at_once_is_not_left(
    pair: tuple[Served, Served], others: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    who, follow = one.who(), one.state.on_change
    wait(one.service.register(who, "mood", upload(weights=others[0].to_bytes())))
    wait_until(lambda: two.state.tasks.snapshot().own("acme", "mood"), "the task")
    monkeypatch.setattr(one.state, "on_change", lambda: None)  # late
    wait(one.service.pin(who, "mood", folded=False))
    wait(two.service.unpin(who, "mood"))
    wait_until(lambda: not one.state.placements.now.pins, "the end of the pin in the registry")
    follow()
    wait_until(lambda: not one.runtime.pins(), "the end of the pin")
