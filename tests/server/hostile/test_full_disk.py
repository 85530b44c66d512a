"""A full disk: changes are refused in plain words, nothing is left half-made, and keys can be revoked."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.helpers.server.registry_subjects import adapter, add
from tests.server.conftest import Served, serve, upload
from tpeft_deploy import Adapter, Bundle
from tpeft_deploy.errors import InsufficientStorage, Unauthenticated
from tpeft_deploy.runtime.server.registry import audit, open_keys, open_state
from tpeft_deploy.runtime.server.registry.files.disk import full, storing
from tpeft_deploy.runtime.server.v2.statuses import status_of

RESERVE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> Path:
    """A file that takes all the room there is."""
    file = place / "filler"
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 16, 1 << 12, 1):
            written = size
            with contextlib.suppress(OSError):
                while written == size:
                    written = stream.write(bytes(size))
    return file


@pytest.fixture
def full_database(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], bool]], None]:
    """SQLite finds no room for an entry of the audit log while a condition holds."""

    def patched(is_full: Callable[[], bool]) -> None:
        def write(connection: Connection, *arguments: Any, **detail: Any) -> None:
            if is_full():
                connection.exec_driver_sql("PRAGMA max_page_count=1")  # no more than it has
                detail["more"] = "x" * 2**20
            try:
                own(connection, *arguments, **detail)
            finally:
                connection.exec_driver_sql("PRAGMA max_page_count=1000000")

        monkeypatch.setattr(audit, "write", write)

    own = audit.write
    return patched


def refused(change: Callable[[], object]) -> InsufficientStorage:
    with pytest.raises(InsufficientStorage) as found:
        change()
    status = status_of(found.value)
    assert (status.http, status.grpc) == (507, "RESOURCE_EXHAUSTED")
    assert "disk is full" in status.text
    return found.value


def files(place: Path) -> set[str]:
    return {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}


@pytest.fixture
def crowded(small_disk: Path, conv_bundle: Bundle) -> Iterator[Served]:
    own = serve(conv_bundle, small_disk / "state")
    yield own
    own.runtime.close()
    own.state.close()


def test_a_real_full_disk_refuses_changes_and_takes_revocations(
    crowded: Served, others: list[Adapter], small_disk: Path
) -> None:
    state, who, place = crowded.state, crowded.who("acme"), small_disk / "state"
    records = [state.keys.create("acme", "deploy", by="a test") for _ in range(2)]
    asyncio.run(crowded.service.register(who, "mood", upload(weights=others[0].to_bytes())))
    assert (place / "reserve").stat().st_size == RESERVE
    filler = fill(small_disk)
    before, known = files(place), state.tasks.snapshot().visible(None)
    for _ in range(3):
        refused(lambda: asyncio.run(crowded.service.register(who, "new", upload(weights=others[1].to_bytes()))))
    assert files(place) == before
    assert not list((place / "incoming").iterdir())
    points = 0
    with pytest.raises(InsufficientStorage):
        for points in range(10_000):  # until SQLite's log has no room left
            state.tasks.point("acme", "mood", f"a{points}", "1", by="a key")
    assert f"a{points}" not in state.tasks.snapshot().task("acme", "mood").aliases
    assert state.tasks.snapshot().task("acme", "mood").versions == known[0].versions
    for record, key in records:
        assert state.keys.authenticate(key).tenant == "acme"
        state.keys.revoke(record.id, by="a test")
        with pytest.raises(Unauthenticated, match="was revoked"):
            state.keys.authenticate(key)
    # A command beside the server finds it durable.
    keys, database = open_keys(place)
    assert all(record.revoked for record in keys.list("acme"))
    database.close()
    filler.unlink()
    asyncio.run(crowded.service.register(who, "new", upload(weights=others[1].to_bytes())))
    state._reserve.keep()
    assert (place / "reserve").stat().st_size == RESERVE


def test_a_server_starts_on_a_full_disk(small_disk: Path) -> None:
    with open_state(small_disk / "state") as state:
        add(state)
    filler = fill(small_disk)
    with open_state(small_disk / "state") as state:
        assert state.tasks.snapshot().find("acme", "mood").number == 1
        fill(small_disk)
        refused(lambda: state.tasks.add("acme", "other", adapter(1), lambda *_: None, by="a key"))
    filler.unlink()


def test_a_full_database_refuses_changes(tmp_path: Path, full_database: Callable[[Callable[[], bool]], None]) -> None:
    with open_state(tmp_path) as state:
        add(state)
        before = state.tasks.snapshot().visible(None), len(state.audit.list())
        full_database(lambda: True)
        refused(lambda: state.tasks.point("acme", "mood", "canary", "1", by="a key"))
        refused(lambda: state.tasks.remove("acme", "mood", by="a key"))
        refused(lambda: state.keys.create("acme", "infer", by="a key"))
        refused(lambda: add(state, name="other", seed=1))
        assert (state.tasks.snapshot().visible(None), len(state.audit.list())) == before
        assert len(list(state.tasks._blobs._files())) == 1  # type: ignore[attr-defined]
        assert not state.keys.list()


def test_the_reserve_is_given_back_for_a_revocation(
    tmp_path: Path, full_database: Callable[[Callable[[], bool]], None]
) -> None:
    reserve = tmp_path / "reserve"
    with open_state(tmp_path) as state:
        record, key = state.keys.create("acme", "infer", by="a test")
        full_database(lambda: reserve.stat().st_size > 0)
        assert state.keys.revoke(record.id, by="a test").revoked
        assert reserve.stat().st_size == 0
        assert [entry.action for entry in state.audit.list(1)] == ["revoke key"]
        with pytest.raises(Unauthenticated, match="was revoked"):
            state.keys.authenticate(key)
    with open_state(tmp_path):
        assert reserve.stat().st_size == RESERVE  # taken again


def test_a_key_whose_revocation_cannot_be_written_is_refused_all_the_same(
    tmp_path: Path, full_database: Callable[[Callable[[], bool]], None]
) -> None:
    is_full = True
    with open_state(tmp_path) as state:
        record, key = state.keys.create("acme", "infer", by="a test")
        full_database(lambda: is_full)
        error = refused(lambda: state.keys.revoke(record.id, by="a test"))
        assert "refuses it from now on, but could not write that" in str(error)
        with pytest.raises(Unauthenticated, match="was revoked"):
            state.keys.authenticate(key)
        with pytest.raises(InsufficientStorage):
            state.keys.write_refused()
        is_full = False
        state.keys.write_refused()
        assert state.keys.list("acme")[0].revoked
        assert not state.keys._refused
    with open_state(tmp_path) as state, pytest.raises(Unauthenticated):
        state.keys.authenticate(key)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_what_the_system_says_of_a_full_disk(number: int) -> None:
    error = OSError(number, os.strerror(number), "/a/path/of/ours")
    assert full(error)
    status = status_of(error)  # whoever let it through
    assert (status.http, "path" in status.text) == (507, False)
    with pytest.raises(InsufficientStorage), storing("take an upload"):
        raise error
    with pytest.raises(PermissionError), storing("take an upload"):
        raise PermissionError(errno.EACCES, "no")


def test_what_postgres_says_of_a_full_disk() -> None:
    psycopg = pytest.importorskip("psycopg")
    assert full(psycopg.errors.DiskFull("could not extend file"))
