"""Files that are removed or replaced under a running server: no change is acknowledged that would be gone."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.server.registry_subjects import add
from tests.helpers.waiting import wait_until
from tests.server.conftest import Served, serve
from tpeft_deploy import Bundle
from tpeft_deploy.errors import ServerError, Unauthenticated, Unavailable
from tpeft_deploy.runtime.server.registry import State, open_keys, open_state


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(place: Path, url: str | None) -> Iterator[State]:
    with open_state(place, url) as own:
        add(own)
        yield own


def refuses_changes(state: State) -> bool:
    with pytest.raises(Unavailable, match=r"files were removed or replaced.*operator"):
        state.tasks.point("acme", "mood", "canary", "1", by="a key")
    assert "canary" not in state.tasks.snapshot().task("acme", "mood").aliases
    return not state.intact


@pytest.mark.parametrize("name", ["lock", "blobs", "incoming", "state.db", "state.db-wal", "state.db-shm"])
def test_what_is_removed_is_noticed(
    name: str, state: State, place: Path, url: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if url is not None and name.startswith("state.db"):
        pytest.skip("there is no such file")
    state.tasks.point("acme", "mood", "live", "1", by="a key")
    (place / name).rename(place / "away")
    wait_until(lambda: not state.intact, "a look at the files")
    assert refuses_changes(state)
    assert [record.message for record in caplog.records if f"{name} was removed or replaced" in record.message]
    assert state.tasks.snapshot().find("acme", "mood").number == 1  # and what is registered is served
    (place / "away").rename(place / name)
    wait_until(lambda: state.intact, "a look at the files")
    assert state.tasks.point("acme", "mood", "canary", "1", by="a key").aliases["canary"] == 1


def test_what_is_replaced_is_noticed(state: State, place: Path) -> None:
    place.rename(place.with_name("away"))
    place.mkdir()
    assert refuses_changes(state)
    shutil.copytree(place.with_name("away"), place, dirs_exist_ok=True)
    assert refuses_changes(state)


def test_a_change_in_the_moment_of_the_removal_is_not_acknowledged(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_state(place) as state:
        add(state)
        looked = state._database.guard

        def removed_after_the_first_look() -> None:
            looked()
            (place / "state.db").unlink(missing_ok=True)

        monkeypatch.setattr(state._database, "guard", removed_after_the_first_look)
        assert refuses_changes(state)


def test_a_key_is_refused_even_so(place: Path) -> None:
    with open_state(place) as state:
        record, key = state.keys.create("acme", "infer", by="a test")
        (place / "lock").unlink()
        with pytest.raises(Unavailable, match="this server refuses it from now on, but could not write that"):
            state.keys.revoke(record.id, by="a test")
        with pytest.raises(Unauthenticated):
            state.keys.authenticate(key)


def test_no_second_server_takes_a_directory_without_its_lock(state: State, place: Path, url: str | None) -> None:
    (place / "lock").unlink()
    with pytest.raises(ServerError, match="a directory that no other server uses"):
        open_state(place, url)


def test_a_server_without_its_files_is_not_ready(conv_bundle: Bundle, place: Path) -> None:
    own: Served = serve(conv_bundle, place)
    try:
        assert own.service.ready()
        (place / "state.db").unlink()
        wait_until(lambda: not own.service.ready(), "a look at the files")
        assert own.service.live()
        assert own.service.accepting()
    finally:
        own.runtime.close()
        own.state.close()


def modes(place: Path) -> dict[str, str]:
    return {
        str(file.relative_to(place.parent)): oct(stat.S_IMODE(file.lstat().st_mode))
        for file in [place, *place.rglob("*")]
        if not file.is_symlink()
    }


def is_private(place: Path) -> bool:
    expected = {
        str(file.relative_to(place.parent)): "0o700" if file.is_dir() else "0o600"
        for file in [place, *place.rglob("*")]
        if not file.is_symlink()
    }
    assert modes(place) == expected
    return True


@pytest.fixture
def open_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.usefixtures("open_umask")
def test_only_the_server_reads_its_files_whatever_the_umask(place: Path, url: str | None) -> None:
    keys, database = open_keys(place, url)
    keys.create("acme", "infer", by="a test")
    assert is_private(place)
    with open_state(place, url) as state:
        add(state)
        database.close()
        assert is_private(place)


@pytest.mark.usefixtures("open_umask")
def test_files_of_an_older_server_are_made_private_and_others_are_left(place: Path, tmp_path: Path) -> None:
    with open_state(place) as state:
        add(state)
    own = tmp_path / "a file of the operator"
    own.touch(0o644)
    (place / "blobs" / "link").symlink_to(own)
    for file in [place, *place.rglob("*")]:
        file.chmod(0o755 if file.is_dir() else 0o644)
    with open_state(place) as state:
        assert is_private(place)
        assert state.tasks.snapshot().find("acme", "mood").number == 1
    assert stat.S_IMODE(own.stat().st_mode) == 0o644
