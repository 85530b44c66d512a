"""Keys: what is stored of them, who they are for, and when they stop."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.counting import operations
from tests.helpers.waiting import wait_until
from tpeft_deploy.errors import NotFound, ProtocolError, Unauthenticated
from tpeft_deploy.runtime.server.registry import State, open_keys, open_state
from tpeft_deploy.runtime.server.registry.state import POLL_SECONDS
from tpeft_deploy.runtime.server.tenancy.access import Role
from tpeft_deploy.runtime.server.tenancy.quotas import Quota

ROOT = Path(__file__).parents[3]


@pytest.fixture
def state(tmp_path: Path, url: str | None) -> Iterator[State]:
    with open_state(tmp_path / "state", url) as own:
        yield own


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[State]:
    with open_state(tmp_path_factory.mktemp("keys") / "state") as own:
        own.keys.create("acme", "infer", by="a test")
        yield own


def test_a_key_says_whose_it_is_and_what_for(state: State) -> None:
    for role in Role:
        record, key = state.keys.create("acme", role.value, by="a test")
        assert re.fullmatch(rf"tpk_{record.id}_[A-Za-z0-9_-]{{43}}", key)
        principal = state.keys.authenticate(key)
        assert (principal.tenant, principal.role, principal.key) == ("acme", role, record.id)
    assert [record.name for record in state.tenants.list()] == ["acme"]


def test_only_the_digest_is_stored(tmp_path: Path) -> None:
    with open_state(tmp_path / "state") as state:
        record, key = state.keys.create("acme", "admin", by="a test")
    secret = key.split("_", 2)[2]  # which may hold "_" too
    for file in (tmp_path / "state").rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file.name
    with sqlite3.connect(tmp_path / "state" / "state.db") as connection:
        stored = connection.execute("SELECT digest FROM keys").fetchall()
    connection.close()
    assert stored == [(hashlib.sha256(key.encode()).hexdigest(),)] == [(record.digest,)]


def test_digests_are_compared_in_constant_time_also_for_unknown_keys(
    shared_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert hmac.compare_digest is compare
    known = shared_state.keys.list()[0]
    for wrong in (f"tpk_{known.id}_{'A' * 43}", f"tpk_{'0' * 12}_{'A' * 43}", "x", ""):
        with pytest.raises(Unauthenticated):
            shared_state.keys.authenticate(wrong)
    assert [len(one) == len(other) == 64 for one, other in compared] == [True] * 4


@given(st.text() | st.from_regex(r"tpk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", fullmatch=True))
def test_nothing_else_is_a_key(shared_state: State, text: str) -> None:
    with pytest.raises(Unauthenticated):
        shared_state.keys.authenticate(text)


def test_a_key_altered_in_one_place_is_none(state: State) -> None:
    _, key = state.keys.create("acme", "infer", by="a test")
    for place in range(len(key)):
        other = key[:place] + ("b" if key[place] != "b" else "c") + key[place + 1 :]
        with pytest.raises(Unauthenticated, match="a key of this server"):
            state.keys.authenticate(other)
    for other in (key + "\n", " " + key, key + "A", key[:-1]):
        with pytest.raises(Unauthenticated):
            state.keys.authenticate(other)


def test_a_key_expires(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    record, key = state.keys.create("acme", "infer", by="a test", expires=now + 1000)
    assert state.keys.authenticate(key).key == record.id
    monkeypatch.setattr(time, "time", lambda: now + 1001)
    with pytest.raises(Unauthenticated, match="expired"):
        state.keys.authenticate(key)
    for over in (time.time() - 1, 0.0, float("nan")):
        with pytest.raises(ProtocolError, match="expired already"):
            state.keys.create("acme", "infer", by="a test", expires=over)
    for late in (1e12, float("inf")):
        with pytest.raises(ProtocolError, match="after the year 9999"):
            state.keys.create("acme", "infer", by="a test", expires=late)


def test_a_revoked_key_is_refused_at_once_and_after_a_restart(tmp_path: Path, url: str | None) -> None:
    with open_state(tmp_path, url) as state:
        record, key = state.keys.create("acme", "infer", by="a test")
        other = state.keys.create("acme", "infer", by="a test")[1]
        state.keys.authenticate(key)
        first = state.keys.revoke(record.id, by="a test").revoked
        with pytest.raises(Unauthenticated, match="revoked"):
            state.keys.authenticate(key)
        assert state.keys.revoke(record.id, by="a test").revoked == first, "when it was revoked stays"
        assert [entry.action for entry in state.audit.list()] == ["revoke key", "create key", "create key"]
    with open_state(tmp_path, url) as state:
        with pytest.raises(Unauthenticated, match="revoked"):
            state.keys.authenticate(key)
        assert state.keys.authenticate(other).tenant == "acme"


@pytest.mark.parametrize("wrong", ["", "0" * 12, "../keys", "\0", "'; drop table keys; --"])
def test_revoking_what_is_no_key(state: State, wrong: str) -> None:
    with pytest.raises(NotFound):
        state.keys.revoke(wrong, by="a test")


@pytest.mark.parametrize("tenant", ["", "shared", "../x", "a/b", "a" * 129, "é", "a\0", "a\n"])
def test_names_of_tenants(state: State, tenant: str) -> None:
    with pytest.raises(ProtocolError, match="name a tenant"):
        state.keys.create(tenant, "infer", by="a test")
    with pytest.raises(ProtocolError, match="name a tenant"):
        state.tenants.put(tenant, Quota(), by="a test")
    assert state.tenants.list() == []
    assert state.audit.list() == []


def test_roles_that_there_are_not(state: State) -> None:
    for role in ("", "root", "ADMIN", "infer "):
        with pytest.raises(ProtocolError, match="a role among infer, deploy, admin"):
            state.keys.create("acme", role, by="a test")


def run(place: Path, url: str | None, *arguments: str) -> dict[str, object]:
    code = "from tpeft_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "keys", *arguments, "--state", str(place), "--json"]
    command += [] if url is None else ["--database-url", url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_a_running_server_sees_what_the_command_line_changes(state: State, tmp_path: Path, url: str | None) -> None:
    """Made and revoked by other processes, on the database of a server that is running."""
    made = run(tmp_path / "state", url, "create", "--tenant", "acme", "--role", "deploy")
    key = str(made["key"])
    wait_until(lambda: known(state, key))
    assert state.keys.authenticate(key).key == made["id"]
    assert state.tenants.get("acme").quota == Quota()
    run(tmp_path / "state", url, "revoke", str(made["id"]))
    wait_until(lambda: not known(state, key))
    assert POLL_SECONDS <= 0.5  # between two looks: within a second, as the documentation says


def known(state: State, key: str) -> bool:
    try:
        state.keys.authenticate(key)
    except Unauthenticated:
        return False
    return True


def test_a_read_that_began_before_a_revocation_does_not_undo_it(state: State) -> None:
    record, key = state.keys.create("acme", "infer", by="a test")
    with state._database.reading() as connection:
        late = state._database.changes(connection), state.keys.read(connection)
    state.keys.revoke(record.id, by="a test")
    state.keys.update_cache(*late)
    with pytest.raises(Unauthenticated, match="revoked"):
        state.keys.authenticate(key)


def test_a_change_that_fails_is_not_seen(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    record, key = state.keys.create("acme", "infer", by="a test")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no log")

    monkeypatch.setattr("tpeft_deploy.runtime.server.registry.audit.write", fail)
    with pytest.raises(RuntimeError):
        state.keys.revoke(record.id, by="a test")
    with pytest.raises(RuntimeError):
        state.keys.create("other", "infer", by="a test")
    monkeypatch.undo()
    assert state.keys.authenticate(key).key == record.id
    state._changes = -1
    state.refresh()
    assert state.keys.authenticate(key).key == record.id
    assert [one.name for one in state.tenants.list()] == ["acme"]
    assert len(state.audit.list()) == 1


def test_keys_are_listed_by_tenant_and_stay_after_they_are_revoked(
    state: State, tmp_path: Path, url: str | None
) -> None:
    ours = [state.keys.create("acme", "infer", by="a test")[0] for _ in range(3)]
    theirs = state.keys.create("other", "admin", by="a test")[0]
    state.keys.revoke(ours[1].id, by="a test")
    assert {record.id for record in state.keys.list("acme")} == {record.id for record in ours}
    assert state.keys.list("other") == [theirs]
    assert len(state.keys.list()) == 4
    beside, database = open_keys(tmp_path / "state", url)
    assert beside.list() == state.keys.list()
    database.close()


def test_asking_for_a_key_costs_little_however_many_there_are(state: State) -> None:
    costs = []
    for count in (1, 100):
        for number in range(count):
            _, key = state.keys.create(f"tenant-{number}", "infer", by="a test")
        costs.append(operations(partial(state.keys.authenticate, key)))
    assert costs[0] == costs[1] < 400  # some microseconds
