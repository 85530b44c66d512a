"""What is PostgreSQL's own: several machines, connections that break, and URLs."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.server.postgres import Postgres, running
from tests.helpers.server.processes import command, server
from tests.helpers.server.registry_subjects import adapter, add
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter, Bundle, Client
from tpeft_deploy.errors import MissingExtra, ServerError, Unavailable
from tpeft_deploy.runtime.server.registry import open_keys, open_state


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.empty()


def test_a_server_by_url_with_keys_made_beside_it_and_a_restart(
    conv_bundle: Bundle, tmp_path: Path, others: list[Adapter], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPEFT_DATABASE_URL", url)
    state = tmp_path / "state"
    made = command("keys", "create", "--state", state, "--tenant", "acme", "--role", "deploy", "--json")
    key = json.loads(made.stdout)["key"]
    file = tmp_path / "mood.safetensors"
    file.write_bytes(others[0].to_bytes())
    options = [conv_bundle.path, "--state", state, "--port", 0, "--threads", 1, "--no-access-log"]
    answers = []
    for start in range(2):
        with server(*options) as (process, address), Client(address, key) as client:
            if start == 0:
                client.register("mood", file)
            answers.append(client.infer({"pixels": PIXELS}, "mood")["logits"].tolist())
            process.kill()
    assert answers[0] == answers[1]
    assert not (state / "state.db").exists()


def test_one_server_at_a_time_wherever_its_directory_is(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpeft_deploy.runtime.server.registry.state._PATIENCE", 0.3)
    with open_state(tmp_path / "one", url) as state:
        with pytest.raises(ServerError, match="a directory that no other server uses"):
            open_state(tmp_path / "one", url)
        with pytest.raises(ServerError, match="one that no other server uses"):
            open_state(tmp_path / "two", url)
        add(state)
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        with pytest.raises(ServerError, match="one that no other server uses"):
            open_state(tmp_path / "copy", url)
        keys, beside = open_keys(tmp_path / "two", url)  # keys may be made beside it, from anywhere
        keys.create("acme", "infer", by="a test")
        beside.close()
    with pytest.raises(ServerError, match="the database that its adapters are registered in"):
        open_state(tmp_path / "two", url)
    with open_state(tmp_path / "copy", url) as state:
        assert state.tasks.read(state.tasks.snapshot().find("acme", "mood")).to_bytes() == adapter(0).to_bytes()


def test_a_server_waits_for_one_that_goes(url: str, tmp_path: Path) -> None:
    first = open_state(tmp_path / "one", url)
    with ThreadPoolExecutor() as pool:
        second = pool.submit(open_state, tmp_path / "two", url)
        time.sleep(0.5)
        assert not second.done()
        first.close()
        second.result(100).close()


def test_tables_are_made_once_and_tenants_too_whoever_comes_at_the_same_time(url: str, tmp_path: Path) -> None:
    def make(number: int) -> str:
        keys, own = open_keys(tmp_path / str(number), url)
        try:
            return keys.create("acme", "infer", by="a test")[0].id
        finally:
            own.close()

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    with open_state(tmp_path / "state", url) as state:
        assert {record.id for record in state.keys.list()} == set(made)
        assert [record.name for record in state.tenants.list()] == ["acme"]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: state.keys.create(f"tenant-{number % 3}", "infer", by="a test"), range(24)))
        assert len(state.keys.list()) == 32
        assert len(state.tenants.list()) == 4


def test_a_reader_sees_one_moment_and_waits_for_no_writer(url: str, tmp_path: Path) -> None:
    with open_state(tmp_path / "state", url) as state:
        own = state._database
        with own.reading() as before:
            changes = own.changes(before)
            state.keys.create("acme", "infer", by="a test")
            assert own.changes(before) == changes
            assert state.keys.read(before) == {}
        with own.writing() as writer, own.reading() as beside:
            own.changed(writer)
            assert own.changes(beside) > changes


def test_a_connection_that_broke_is_made_anew(url: str, postgres: Postgres, tmp_path: Path) -> None:
    with open_state(tmp_path / "state", url) as state:
        add(state)
        with pytest.raises(Unavailable) as caught, state._database.writing() as connection:
            state._database.changed(connection)
            cut_all(postgres)
            state._database.changed(connection)
        assert "\n" not in str(caught.value)
        add(state, seed=1)
        cut_all(postgres)
        state.refresh()
        assert state.tasks.point("acme", "mood", "current", "1", by="a test").aliases == {"current": 1}
        assert [entry.action for entry in state.audit.list()] == ["point", "register", "register"]


def test_a_server_whose_connection_broke_is_the_only_one_again(
    url: str, postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_state(tmp_path / "one", url) as state:
        cut_all(postgres)
        state._database.hold(5)
        monkeypatch.setattr("tpeft_deploy.runtime.server.registry.state._PATIENCE", 0.3)
        with pytest.raises(ServerError, match="one that no other server uses"):
            open_state(tmp_path / "two", url)


def test_without_its_database_a_server_answers_as_before_and_refuses_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running() as own:
        state = open_state(tmp_path / "state", own.url)
        key = state.keys.create("acme", "deploy", by="a test")[1]
        record = add(state)
    try:
        assert state.keys.authenticate(key).tenant == "acme"
        assert state.tasks.read(state.tasks.snapshot().find("acme", "mood")).to_bytes() == adapter(0).to_bytes()
        for change in (
            lambda: add(state, seed=1),
            lambda: state.tasks.remove("acme", "mood", by="a test"),
            lambda: state.keys.create("acme", "infer", by="a test"),
            state.audit.list,
        ):
            with pytest.raises(Unavailable, match="does not answer") as caught:
                change()
            assert "127.0.0.1" not in str(caught.value)
        assert "127.0.0.1" in caplog.text
        assert state.tasks.snapshot().find("acme", "mood") == record
    finally:
        state.close()


def cut_all(postgres: Postgres) -> None:
    with postgres.connect() as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "password": (lambda url: url.replace("tpeft:", "tpeft:wrong"), "password authentication failed"),
    "port": (lambda url: re.sub(r":[0-9]+/", ":1/", url), "refused"),
    "database": (lambda url: url.replace("/postgres?", "/nothing?"), "does not exist"),
    "kind": (lambda _: "mysql://me:hidden@127.0.0.1/db", "sqlite or postgresql"),
    "no URL": (lambda _: "hidden", "URL"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_database_that_cannot_be_had_is_told_in_one_line_without_its_password(
    url: str, postgres: Postgres, tmp_path: Path, name: str
) -> None:
    spoil, message = WRONG[name]
    with pytest.raises(ServerError, match=message) as caught:
        open_state(tmp_path / "state", spoil(url))
    assert "\n" not in str(caught.value)
    for secret in (postgres.password, "hidden"):
        assert secret not in str(caught.value)


def test_a_missing_driver_is_named_with_what_brings_it(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"tpeft-deploy\[postgres\]"):
        open_state(tmp_path / "state", "postgresql+pg8000://me@127.0.0.1/db")


def test_a_url_without_driver_takes_the_one_that_the_extra_brings(url: str, tmp_path: Path) -> None:
    with open_state(tmp_path / "state", url.replace("+psycopg", "")) as state:
        add(state)
