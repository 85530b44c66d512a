"""Databases of earlier schemas are migrated, whole or not at all; those of later ones are refused."""

from __future__ import annotations

import logging
import signal
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from tests.helpers.server.earlier_schemas import state_of_schema
from tests.helpers.server.postgres import Postgres
from tests.helpers.server.registry_subjects import add
from tpeft_deploy.errors import ServerError, VersionError
from tpeft_deploy.runtime.server.registry import migrations, open_keys, open_state, schema
from tpeft_deploy.runtime.server.registry.database import Database, sqlite_url

ROOT = Path(__file__).parents[3]
EARLIER = [1, 2]  # 2: by a server without migrations, which stamped nothing


def run(place: Path, url: str | None, *statements: str) -> None:
    engine = create_engine(url or sqlite_url(place / "state.db"))
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def tables(place: Path, url: str | None) -> set[str]:
    engine = create_engine(url or sqlite_url(place / "state.db"))
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def differences(connection: Connection) -> object:
    return compare_metadata(MigrationContext.configure(connection), schema.metadata)


def test_the_newest_migration_is_the_schema() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == f"{schema.SCHEMA:04}"
    assert [int(script.revision) for script in scripts.walk_revisions()] == list(range(schema.SCHEMA, 0, -1))


@pytest.mark.parametrize("number", [None, *EARLIER])
def test_every_way_leads_to_the_same_tables(number: int | None, tmp_path: Path, url: str | None) -> None:
    known = state_of_schema(number, tmp_path, url) if number else set()
    with open_state(tmp_path, url) as state, state._database.reading() as connection:
        assert differences(connection) == []
        assert migrations.stored_schema(connection) == schema.SCHEMA
        assert known <= set(inspect(connection).get_table_names())


@pytest.mark.parametrize("number", EARLIER)
def test_an_earlier_database_works_after_its_migration(number: int, tmp_path: Path, url: str | None) -> None:
    state_of_schema(number, tmp_path, url)
    for _ in range(2):
        with open_state(tmp_path, url) as state:
            assert state.tasks.snapshot().find("acme", "mood").number == 3
            assert len(state.tasks.history("acme", "mood", "current")) == 1
            assert [pin.version for pin in state.placements.pins()] == (["3"] if number == 2 else [])
            assert state.tenants.quota("acme").weight == 2
    with open_state(tmp_path, url) as state:
        assert add(state).number == 4


def test_a_copy_of_the_file_is_kept_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = state_of_schema(1, tmp_path, None)
    (tmp_path / ".state.db.before-5.abc").touch()  # of a server that was killed
    with caplog.at_level(logging.INFO), open_state(tmp_path):
        pass
    copy = tmp_path / "state.db.before-5"
    assert [record.message for record in caplog.records] == [
        f"the server's database is migrated from schema 1 to 5; {copy} is the database before"
    ]
    assert tables(tmp_path, sqlite_url(copy).render_as_string()) == known
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*state.db*")} == {0o600}
    assert not [*tmp_path.glob(".state.db*")]
    caplog.clear()
    copy.unlink()
    with open_state(tmp_path):
        assert not caplog.records
        assert not copy.exists()


def test_where_the_copy_cannot_be_written_nothing_is_migrated(tmp_path: Path) -> None:
    known = state_of_schema(1, tmp_path, None)
    (tmp_path / "state.db.before-5").mkdir()
    with pytest.raises(ServerError, match=r"copy state\.db before its migration: Is a directory") as caught:
        open_state(tmp_path)
    assert "\n" not in str(caught.value)
    assert tables(tmp_path, None) == known


def test_two_that_start_at_once_migrate_once(tmp_path: Path, url: str | None, caplog: pytest.LogCaptureFixture) -> None:
    state_of_schema(1, tmp_path, url)

    def start(_number: int) -> bool:
        keys, own = open_keys(tmp_path, url)
        own.close()
        return len(keys.list()) == 1

    with caplog.at_level(logging.INFO, "tpeft_deploy.server"), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(start, range(4)))
    assert len([record for record in caplog.records if "migrated" in record.message]) == 1
    with open_state(tmp_path, url) as state, state._database.reading() as connection:
        assert differences(connection) == []


def test_a_file_in_another_mode_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE anything (x)")
        other.execute("BEGIN IMMEDIATE")
        waits = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            other.execute("COMMIT")

        monkeypatch.setattr("tpeft_deploy.runtime.server.registry.database.time.sleep", wait)
        Database(sqlite_url(path)).close()
    assert len(waits) == 1


def test_a_migration_that_is_killed_leaves_the_earlier_database(tmp_path: Path, url: str | None) -> None:
    known = state_of_schema(1, tmp_path, url)
    code = f"""
import os, signal
from pathlib import Path
from sqlalchemy import Engine, event
from tpeft_deploy.runtime.server.registry import open_state

@event.listens_for(Engine, "after_cursor_execute")
def ran(connection, cursor, statement, *rest):
    if "CREATE TABLE pins" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

open_state(Path({str(tmp_path)!r}), {url!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert tables(tmp_path, url) == known
    with open_state(tmp_path, url) as state, state._database.reading() as connection:
        assert differences(connection) == []
        assert state.tasks.snapshot().find("acme", "mood").number == 3


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ("UPDATE alembic_version SET version_num = '0006'", "got 0006"),
        ("UPDATE alembic_version SET version_num = 'abc'", "got abc"),
        ("UPDATE meta SET value = 2 WHERE name = 'schema'", "got 0005, for servers of generation 2"),
    ],
)
def test_a_newer_database_is_refused_in_one_line_and_left(
    change: str, got: str, tmp_path: Path, url: str | None
) -> None:
    with open_state(tmp_path, url):
        pass
    run(tmp_path, url, change, "DROP TABLE pins")
    left = tables(tmp_path, url)
    for opened in (open_state, open_keys):
        with pytest.raises(VersionError, match=f"expected schema 5 or earlier, {got}. Start the version") as caught:
            opened(tmp_path, url)
        assert "\n" not in str(caught.value)
    assert tables(tmp_path, url) == left


def test_tables_of_a_running_server_are_not_migrated(
    tmp_path: Path, postgres: Postgres, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpeft_deploy.runtime.server.registry.database._STOP_SECONDS", 1)
    with open_state(tmp_path, url):
        run(tmp_path, url, "DROP TABLE alembic_version", "DROP TABLE alias_history")
        left = tables(tmp_path, url)
        with pytest.raises(ServerError, match=r"that no (other )?server uses, got one in use"):
            open_keys(tmp_path, url)
        assert tables(tmp_path, url) == left


def test_opening_a_current_database_does_not_import_alembic(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tpeft_deploy.runtime.server.registry import open_state
for _ in range(2):
    open_state(Path({str(tmp_path)!r})).close()
assert "alembic" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_copy_is_readable(tmp_path: Path) -> None:
    state_of_schema(1, tmp_path, None)
    with closing(sqlite3.connect(migrations.copy_sqlite(tmp_path / "state.db"))) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
