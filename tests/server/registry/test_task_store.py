"""Tasks, versions and aliases: who owns a name, what never changes, and what is counted."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from tests.helpers.server.registry_subjects import adapter, add, unchecked
from tests.helpers.waiting import wait_until
from tpeft_deploy import Adapter
from tpeft_deploy.errors import Conflict, IntegrityError, NotFound, ProtocolError, QuotaExceeded, TpeftError
from tpeft_deploy.runtime.server.registry import State, TaskRecord, VersionRecord, open_state
from tpeft_deploy.runtime.server.tenancy.access import SHARED
from tpeft_deploy.runtime.server.tenancy.quotas import Quota


@pytest.fixture
def state(tmp_path: Path, url: str | None) -> Iterator[State]:
    with open_state(tmp_path / "state", url) as own:
        yield own


def aliases(state: State, name: str = "mood") -> dict[str, int]:
    return dict(state.tasks.snapshot().task("acme", name).aliases)


def blobs(state: State) -> set[str]:
    return {place.stem for place in state.tasks._blobs._files()}  # type: ignore[attr-defined]


def announced(_task: TaskRecord) -> None:
    """The runtime's part."""


def test_versions_count_from_one_and_are_what_was_registered(state: State) -> None:
    records = [add(state, seed=seed) for seed in range(3)]
    assert [record.number for record in records] == [1, 2, 3]
    assert [record.key for record in records] == [f"acme/mood@{number}" for number in (1, 2, 3)]
    for seed, record in enumerate(records):
        data = adapter(seed).to_bytes()
        assert record.digest == hashlib.sha256(data).hexdigest()
        assert record.bytes == len(data)
        assert state.tasks.read(record).to_bytes() == data
        assert state.tasks.snapshot().find("acme", "mood", str(seed + 1)) == record
    assert state.tasks.snapshot().find("acme", "mood") == records[2]
    assert state.tasks.snapshot().find("acme", "mood", "current") == records[2]
    assert add(state, name="other").number == 1
    assert state.tasks.usage("acme") == (4, sum(r.bytes for r in records) + records[0].bytes)


def test_the_same_content_is_kept_once(state: State) -> None:
    assert len({add(state, tenant, "mood").digest for tenant in ("acme", "other", "third")}) == 1
    assert len(blobs(state)) == 1
    state.tasks.remove("acme", "mood", by="a key")
    state.tasks.sweep(grace=0)
    assert state.tasks.read(state.tasks.snapshot().find("other", "mood")).to_bytes() == adapter(0).to_bytes()


def test_a_restart_changes_nothing(tmp_path: Path, url: str | None) -> None:
    with open_state(tmp_path, url) as state:
        for seed in range(3):
            add(state, seed=seed)
        add(state, "other", "mood", seed=3, alias="canary")
        add(state, SHARED, "common")
        state.tasks.point("acme", "mood", "canary", "1", by="a key")
        state.tasks.rollback("acme", "mood", "current", by="a key")
        before = state.tasks.snapshot().visible(None)
    with open_state(tmp_path, url) as state:
        assert state.tasks.snapshot().visible(None) == before
        assert aliases(state) == {"canary": 1, "current": 2}
        assert state.tasks.rollback("acme", "mood", "current", by="a key").aliases["current"] == 3


def test_names_belong_to_tenants(state: State) -> None:
    ours, theirs = add(state, "acme", "mood", 0), add(state, "other", "mood", 1)
    catalog = state.tasks.snapshot()
    assert catalog.find("acme", "mood") == ours
    assert catalog.find("other", "mood") == theirs
    for name in ("mood", "nothing"):
        with pytest.raises(NotFound) as caught:
            catalog.find("third", name)
        assert str(caught.value) == (
            f"find model {name!r}: there is none of that name. GET /v2/registry/tasks lists them."
        ), "another tenant's task looks like none"
    assert [task.name for task in catalog.visible("third")] == []
    assert [(task.tenant, task.name) for task in catalog.visible(None)] == [("acme", "mood"), ("other", "mood")]
    for change in (
        lambda: state.tasks.point("third", "mood", "canary", "1", by="a key"),
        lambda: state.tasks.rollback("third", "mood", "current", by="a key"),
        lambda: state.tasks.remove("third", "mood", by="a key"),
        lambda: state.tasks.remove_version("third", "mood", 1, by="a key"),
        lambda: state.tasks.publish("third", "mood", announced, by="a key"),
    ):
        with pytest.raises(NotFound):
            change()
    assert state.tasks.snapshot() is catalog


def test_a_shared_name_is_nobody_else_s(state: State) -> None:
    common = add(state, SHARED, "common")
    assert common.key == "/common@1"
    assert state.tasks.snapshot().find("acme", "common") == common
    assert [task.name for task in state.tasks.snapshot().visible("acme")] == ["common"]
    with pytest.raises(Conflict):
        add(state, "acme", "common")
    add(state, "acme", "mood")
    with pytest.raises(Conflict):
        add(state, SHARED, "mood")
    with pytest.raises(NotFound):
        state.tasks.remove("acme", "common", by="a key")
    state.refresh()
    assert [record.name for record in state.tenants.list()] == ["acme"], "everybody is no tenant"


def test_a_published_task_is_everybody_s(state: State) -> None:
    records = [add(state, seed=seed) for seed in range(2)]
    seen: list[TaskRecord] = []
    published = state.tasks.publish("acme", "mood", seen.append, by="a key")
    assert seen == [published]
    assert [v.digest for v in published.versions.values()] == [record.digest for record in records]
    assert state.tasks.snapshot().find("other", "mood", "1").key == "/mood@1"
    assert state.tasks.snapshot().own("acme", "mood") is None
    with pytest.raises(Conflict):
        add(state, "acme", "mood")
    add(state, "acme", "own")
    add(state, "other", "own")
    with pytest.raises(Conflict):
        state.tasks.publish("acme", "own", announced, by="a key")


@pytest.mark.parametrize("name", ["", ".x", "-x", "a b", "a/b", "a@1", "a" * 129, "é", "a\0", "a\n"])
def test_names_that_are_not_allowed(state: State, name: str) -> None:
    add(state)
    for refused, what in (
        (lambda: add(state, "acme", name), "task"),
        (lambda: add(state, alias=name), "alias"),
        (lambda: state.tasks.point("acme", "mood", name, "1", by="a key"), "alias"),
    ):
        with pytest.raises(ProtocolError, match=f"name a {what}"):
            refused()
    if name:
        with pytest.raises(ProtocolError, match="name a tenant"):
            add(state, name)
        with pytest.raises(NotFound):
            state.tasks.point("acme", "mood", "canary", name, by="a key")
    with pytest.raises(ProtocolError, match="not a number"):
        add(state, alias="12")
    assert aliases(state) == {"current": 1}


def test_aliases_are_swapped_and_rolled_back(state: State) -> None:
    for seed in range(3):
        add(state, seed=seed)
    assert aliases(state) == {"current": 3}
    state.tasks.point("acme", "mood", "current", "1", by="a key")
    assert aliases(state) == {"current": 1}
    assert state.tasks.rollback("acme", "mood", "current", by="a key").aliases == {"current": 3}
    assert state.tasks.rollback("acme", "mood", "current", by="a key").aliases == {"current": 1}
    state.tasks.point("acme", "mood", "canary", "current", by="a key")
    state.tasks.point("acme", "mood", "current", "2", by="a key")
    assert aliases(state) == {"canary": 1, "current": 2}
    for wrong in ("canary", "nothing", "../current"):
        with pytest.raises(Conflict, match="a version that it stood for before"):
            state.tasks.rollback("acme", "mood", wrong, by="a key")
    for wrong in ("4", "0", "-1", "nothing", "9" * 30):
        with pytest.raises(NotFound):
            state.tasks.point("acme", "mood", "current", wrong, by="a key")
    assert aliases(state) == {"canary": 1, "current": 2}


def test_numbers_are_never_given_again(tmp_path: Path, url: str | None) -> None:
    with open_state(tmp_path, url) as state:
        for seed in range(3):
            add(state, seed=seed)
        with pytest.raises(Conflict, match="what current stands for"):
            state.tasks.remove_version("acme", "mood", 3, by="a key")
        state.tasks.point("acme", "mood", "current", "1", by="a key")
        assert state.tasks.remove_version("acme", "mood", 3, by="a key")[0].number == 3
        with pytest.raises(Conflict, match="version 3, which was deleted"):
            state.tasks.rollback("acme", "mood", "current", by="a key")
        assert add(state, seed=3).number == 4
        assert [record.number for record in state.tasks.remove("acme", "mood", by="a key")] == [1, 2, 4]
        with pytest.raises(NotFound):
            state.tasks.snapshot().find("acme", "mood")
    with open_state(tmp_path, url) as state:
        assert state.tasks.snapshot().visible(None) == []
        assert add(state).number == 5
        assert aliases(state) == {"current": 5}, "nothing of the deleted task comes back"
        with pytest.raises(Conflict):
            state.tasks.rollback("acme", "mood", "current", by="a key")


def test_what_does_not_pass_its_check_is_not_there(state: State) -> None:
    add(state)
    before = state.tasks.snapshot()

    def refuse(record: VersionRecord, given: Adapter) -> None:
        assert record.key == "acme/mood@2"
        assert state.tasks.read(record).to_bytes() == given.to_bytes(), "its file is there when it is checked"
        raise TpeftError("no")

    with pytest.raises(TpeftError, match="no"):
        state.tasks.add("acme", "mood", adapter(1), refuse, by="a key")
    assert state.tasks.snapshot() is before
    assert len(state.audit.list()) == 1
    assert len(blobs(state)) == 1, "its file has no grace: nobody ever saw it"
    assert add(state, seed=1).number == 2


def test_what_is_refused_takes_nobody_else_s_file(state: State) -> None:
    def refuse(_record: VersionRecord, _adapter: Adapter) -> None:
        raise TpeftError("no")

    kept, freed = add(state, seed=0), add(state, name="freed", seed=1)
    state.tasks.remove("acme", "freed", by="a key")
    for seed in range(3):
        with pytest.raises(TpeftError, match="no"):
            state.tasks.add("other", "mood", adapter(seed), refuse, by="a key")
    assert blobs(state) == {kept.digest, freed.digest}
    assert state.tasks.read(freed).to_bytes() == adapter(1).to_bytes()


def test_a_probe_that_takes_long_holds_up_no_other_task_nor_loses_its_file(state: State) -> None:
    add(state, name="other")
    began, go = threading.Event(), threading.Event()

    def wait(_record: VersionRecord, _adapter: Adapter) -> None:
        began.set()
        assert go.wait(100)

    with ThreadPoolExecutor() as pool:
        slow = pool.submit(state.tasks.add, "acme", "mood", adapter(1), wait, by="a key")
        assert began.wait(100)
        state.tasks.point("acme", "other", "canary", "1", by="a key")
        add(state, "third", "mood", seed=2)
        state.tasks.sweep(grace=0)
        assert state.tasks.snapshot().own("acme", "mood") is None
        go.set()
        record = slow.result(100)
    assert state.tasks.read(record).to_bytes() == adapter(1).to_bytes()


def test_a_name_that_is_shared_while_it_is_probed_is_refused(state: State) -> None:
    def meanwhile(_record: VersionRecord, _adapter: Adapter) -> None:
        add(state, SHARED, "mood", seed=1)

    with pytest.raises(Conflict):
        state.tasks.add("acme", "mood", adapter(0), meanwhile, by="a key")
    assert state.tasks.snapshot().own("acme", "mood") is None


@pytest.mark.parametrize("what", ["adapters", "bytes"])
def test_uploads_at_the_same_time_do_not_pass_a_quota_together(state: State, what: str) -> None:
    size = len(adapter(0).to_bytes())
    state.tenants.put("acme", Quota(**{what: 3 if what == "adapters" else 3 * size + size // 2}), by="a test")
    gate = threading.Barrier(6)

    def together(_record: VersionRecord, _adapter: Adapter) -> None:
        gate.wait(100)  # all of them have passed the first look at the quota

    def one(number: int) -> VersionRecord | QuotaExceeded:
        try:
            return state.tasks.add("acme", names[number], adapter(number), together, by="a key")
        except QuotaExceeded as error:
            return error

    names = [f"task-{number}" for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(one, range(6)))
    refused = [answer for answer in done if isinstance(answer, QuotaExceeded)]
    assert len(refused) == 3
    assert {error.retry_after for error in refused} == {None}
    assert state.tasks.usage("acme")[0] == 3
    assert sum(entry.action == "register" for entry in state.audit.list()) == 3
    with pytest.raises(QuotaExceeded, match=f"at most .* {what}"):
        add(state, name="more")
    add(state, "other", "mood")
    add(state, SHARED, "common")
    state.tasks.remove("acme", next(iter(state.tasks.snapshot().owned("acme"))).name, by="a key")
    add(state, name="more")


def test_no_two_tasks_share_a_lock_and_none_is_left_over(state: State) -> None:
    keys = [(tenant, f"task-{number}") for tenant in ("acme", "other") for number in range(200)]
    turns = state.tasks._turns
    with ExitStack() as all_held:
        for count, key in enumerate(keys, 1):
            all_held.enter_context(turns.hold(key))  # in one thread: two that shared a lock would wait for ever
            assert len(turns) == count
        assert {turns.users(key) for key in keys} == {1}
    assert len(turns) == 0


def test_uploads_of_one_task_take_turns_and_leave_no_lock(state: State) -> None:
    began, go, inside = threading.Event(), threading.Event(), []

    def wait(_record: VersionRecord, _adapter: Adapter) -> None:
        inside.append(state.tasks._turns.users(("acme", "mood")))
        began.set()
        assert go.wait(100)

    def refuse(_record: VersionRecord, _adapter: Adapter) -> None:
        inside.append(state.tasks._turns.users(("acme", "mood")))
        raise Conflict("check an adapter", problem="it is refused")

    with ThreadPoolExecutor() as pool:
        first = pool.submit(state.tasks.add, "acme", "mood", adapter(0), wait, by="a key")
        assert began.wait(100)
        second = pool.submit(state.tasks.add, "acme", "mood", adapter(1), refuse, by="a key")
        wait_until(lambda: state.tasks._turns.users(("acme", "mood")) == 2)
        assert inside == [1]  # the second has not begun
        go.set()
        assert first.result(100).number == 1
        with pytest.raises(Conflict):
            second.result(100)
    assert inside[1] == 1  # the first had left when the second was inside
    assert len(state.tasks._turns) == 0


def test_versions_of_one_task_registered_at_the_same_time_get_numbers_of_their_own(state: State) -> None:
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda seed: add(state, seed=seed % 4), range(16)))
    assert sorted(record.number for record in records) == list(range(1, 17))
    assert aliases(state) == {"current": 16}
    assert len(blobs(state)) == 4


def test_readers_see_a_swap_whole(state: State) -> None:
    for seed in range(2):
        add(state, seed=seed)
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            task = state.tasks.snapshot().task("acme", "mood")
            assert task.version("").number == task.aliases["current"]
            seen.add(task.aliases["current"])

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(20):
            state.tasks.point("acme", "mood", "current", str(number % 2 + 1), by="a key")
        stop.set()
        for reader in readers:
            reader.result()
    assert seen == {1, 2}


def test_a_deleted_adapter_s_file_stays_as_long_as_requests_may_read_it(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = add(state)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10_000)  # registered long ago
    state.tasks.remove("acme", "mood", by="a key")
    assert state.tasks.sweep() == 0
    assert state.tasks.read(record).to_bytes() == adapter(0).to_bytes()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10_601)
    assert state.tasks.sweep() == 1
    with pytest.raises(IntegrityError):
        state.tasks.read(record)


def test_a_file_that_was_deleted_and_registered_again_stays(state: State) -> None:
    add(state)
    state.tasks.remove("acme", "mood", by="a key")
    record = add(state, "other", "mood")
    assert state.tasks.sweep(grace=0) == 0
    assert state.tasks.read(record).to_bytes() == adapter(0).to_bytes()


def test_every_change_is_in_the_log_once(state: State) -> None:
    add(state)
    add(state, seed=1)
    state.tasks.point("acme", "mood", "canary", "1", by="second key")
    state.tasks.rollback("acme", "mood", "current", by="a key")
    state.tasks.remove_version("acme", "mood", 2, by="a key")
    add(state, name="other")
    state.tasks.publish("acme", "other", announced, by="a key")
    state.tasks.remove("acme", "mood", by="a key")
    state.tenants.put("acme", Quota(adapters=2), by="a key")
    log = list(reversed(state.audit.list()))
    assert [(entry.action, entry.target) for entry in log] == [
        *[("register", "mood"), ("register", "mood"), ("point", "mood"), ("roll back", "mood")],
        *[("delete version", "mood"), ("register", "other"), ("publish", "other"), ("delete", "mood")],
        ("set quota", "acme"),
    ]
    assert {entry.tenant for entry in log} == {"acme"}
    assert log[2].key == "second key"
    assert log[2].detail == {"alias": "canary", "version": 1}
    assert log[3].detail == {"alias": "current", "version": 1}
    assert log[7].detail == {"versions": [1]}
    assert [entry.id for entry in state.audit.list(3)] == [9, 8, 7]
    assert [entry.id for entry in state.audit.list(3, before=7)] == [6, 5, 4]
    assert [entry.time for entry in log] == sorted(entry.time for entry in log)


CHANGES: dict[str, Callable[[State], object]] = {
    "add": lambda state: add(state, seed=2),
    "add another": lambda state: add(state, name="other"),
    "point": lambda state: state.tasks.point("acme", "mood", "current", "1", by="a key"),
    "rollback": lambda state: state.tasks.rollback("acme", "mood", "current", by="a key"),
    "remove": lambda state: state.tasks.remove("acme", "mood", by="a key"),
    "remove version": lambda state: state.tasks.remove_version("acme", "mood", 1, by="a key"),
    "publish": lambda state: state.tasks.publish("acme", "mood", announced, by="a key"),
    "quota": lambda state: state.tenants.put("acme", Quota(adapters=5), by="a key"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_without_its_entry_in_the_log_is_none(
    change: str, tmp_path: Path, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_state(tmp_path, url) as state:
        for seed in range(2):
            add(state, seed=seed)
        before, quota = state.tasks.snapshot().visible(None), state.tenants.quota("acme")

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no log")

        with monkeypatch.context() as patch:
            patch.setattr("tpeft_deploy.runtime.server.registry.audit.write", fail)
            with pytest.raises(RuntimeError, match="no log"):
                CHANGES[change](state)
        assert state.tasks.snapshot().visible(None) == before
        assert state.tenants.quota("acme") == quota
    with open_state(tmp_path, url) as state:
        assert state.tasks.snapshot().visible(None) == before
        assert state.tenants.quota("acme") == quota
        assert len(state.audit.list()) == 2
        CHANGES[change](state)
        assert len(state.audit.list()) == 3


class Registry(RuleBasedStateMachine):
    """Any changes in any order, against a dictionary; and the database holds what is seen."""

    NAMES = st.sampled_from(["mood", "tone"])
    TENANTS = st.sampled_from(["acme", "other"])
    ALIASES = st.sampled_from(["current", "canary"])
    made = Bundle("made")

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.state = open_state(self.place)
        self.versions: dict[tuple[str, str], dict[int, str]] = {}
        self.aliases: dict[tuple[str, str], dict[str, list[int]]] = {}
        self.last: dict[tuple[str, str], int] = {}

    @rule(target=made, tenant=TENANTS, name=NAMES, alias=ALIASES, seed=st.integers(0, 3))
    def add(self, tenant: str, name: str, alias: str, seed: int) -> object:
        own = tenant, name
        number = self.last[own] = self.last.get(own, 0) + 1
        record = self.state.tasks.add(tenant, name, adapter(seed), unchecked, by="a key", alias=alias)
        assert record.number == number
        self.versions.setdefault(own, {})[number] = record.digest
        self._point(own, alias, number)
        return number

    @rule(tenant=TENANTS, name=NAMES, alias=ALIASES, number=made)
    def point(self, tenant: str, name: str, alias: str, number: int) -> None:
        own = tenant, name
        if number in self.versions.get(own, {}):
            self.state.tasks.point(tenant, name, alias, str(number), by="a key")
            self._point(own, alias, number)
        else:
            with pytest.raises(NotFound):
                self.state.tasks.point(tenant, name, alias, str(number), by="a key")

    @rule(tenant=TENANTS, name=NAMES, alias=ALIASES)
    def rollback(self, tenant: str, name: str, alias: str) -> None:
        own = tenant, name
        stood = self.aliases.get(own, {}).get(alias, [])
        if len(stood) == 2 and stood[1] in self.versions[own]:
            self.state.tasks.rollback(tenant, name, alias, by="a key")
            self._point(own, alias, stood[1])
        else:
            with pytest.raises((NotFound, Conflict)):
                self.state.tasks.rollback(tenant, name, alias, by="a key")

    @rule(tenant=TENANTS, name=NAMES, number=made)
    def remove_version(self, tenant: str, name: str, number: int) -> None:
        own = tenant, name
        used = {stood[0] for stood in self.aliases.get(own, {}).values()}
        if number in self.versions.get(own, {}) and number not in used:
            self.state.tasks.remove_version(tenant, name, number, by="a key")
            del self.versions[own][number]
        else:
            with pytest.raises((NotFound, Conflict)):
                self.state.tasks.remove_version(tenant, name, number, by="a key")

    @rule(tenant=TENANTS, name=NAMES)
    def remove(self, tenant: str, name: str) -> None:
        own = tenant, name
        if own in self.versions:
            self.state.tasks.remove(tenant, name, by="a key")
            del self.versions[own], self.aliases[own]
        else:
            with pytest.raises(NotFound):
                self.state.tasks.remove(tenant, name, by="a key")

    @rule()
    def restart(self) -> None:
        self.state.close()
        self.state = open_state(self.place)
        assert blobs(self.state) == {digest for own in self.versions.values() for digest in own.values()}

    @rule()
    def sweep(self) -> None:
        self.state.tasks.sweep(grace=0)
        assert blobs(self.state) == {digest for own in self.versions.values() for digest in own.values()}

    @invariant()
    def agrees(self) -> None:
        seen = {(task.tenant, task.name): task for task in self.state.tasks.snapshot().visible(None)}
        assert {own: {n: v.digest for n, v in task.versions.items()} for own, task in seen.items()} == self.versions
        expected = {own: {alias: stood[0] for alias, stood in known.items()} for own, known in self.aliases.items()}
        assert {own: dict(task.aliases) for own, task in seen.items()} == expected

    def teardown(self) -> None:
        self.state.close()
        shutil.rmtree(self.place)

    def _point(self, own: tuple[str, str], alias: str, number: int) -> None:
        stood = self.aliases.setdefault(own, {}).setdefault(alias, [])
        if not stood or stood[0] != number:
            stood[:] = [number, *stood[:1]]


TestRegistry = Registry.TestCase
TestRegistry.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
