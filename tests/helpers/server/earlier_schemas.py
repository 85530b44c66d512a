"""States as earlier servers left them, from the statements that they ran."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy import create_engine, inspect

from tests.helpers.server.registry_subjects import add
from tpeft_deploy.runtime.server.registry import open_state
from tpeft_deploy.runtime.server.registry.database import sqlite_url

FIRST = """
CREATE TABLE meta (name VARCHAR(128) NOT NULL PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE tenants (name VARCHAR(128) NOT NULL PRIMARY KEY, quota JSON NOT NULL, created FLOAT NOT NULL);
CREATE TABLE keys (id VARCHAR(16) NOT NULL PRIMARY KEY, digest VARCHAR(64) NOT NULL,
    tenant VARCHAR(128) NOT NULL, role VARCHAR(16) NOT NULL, created FLOAT NOT NULL, expires FLOAT, revoked FLOAT,
    UNIQUE (digest));
CREATE TABLE tasks (id {serial}, tenant VARCHAR(128) NOT NULL, name VARCHAR(128) NOT NULL, next_number INTEGER NOT NULL,
    deleted BOOLEAN NOT NULL, UNIQUE (tenant, name));
CREATE TABLE versions (task INTEGER NOT NULL REFERENCES tasks (id), number INTEGER NOT NULL,
    digest VARCHAR(64) NOT NULL, bytes BIGINT NOT NULL, created FLOAT NOT NULL, "by" VARCHAR(128) NOT NULL,
    PRIMARY KEY (task, number));
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE TABLE aliases (task INTEGER NOT NULL REFERENCES tasks (id), alias VARCHAR(128) NOT NULL, number INTEGER NOT NULL,
    previous INTEGER, PRIMARY KEY (task, alias));
CREATE TABLE audit (id {serial}, time FLOAT NOT NULL, tenant VARCHAR(128) NOT NULL, key VARCHAR(128) NOT NULL,
    action VARCHAR(32) NOT NULL, target VARCHAR(300) NOT NULL, detail JSON NOT NULL);
INSERT INTO meta VALUES ('schema', 1), ('changes', 4), ('directory', 17);
INSERT INTO tenants VALUES ('acme', '{{"requests_per_s": 5.0, "weight": 2.0}}', 1.0);
INSERT INTO keys VALUES ('0123456789ab', 'd', 'acme', 'infer', 1.0, NULL, NULL);
INSERT INTO tasks (tenant, name, next_number, deleted) VALUES ('acme', 'mood', 4, {false});
INSERT INTO versions VALUES (1, 1, '{one}', 10, 1.0, 'a key'), (1, 3, '{two}', 10, 2.0, 'a key');
INSERT INTO aliases VALUES (1, 'current', 3, 1);
INSERT INTO audit (time, tenant, key, action, target, detail) VALUES (1.0, 'acme', 'a key', 'register', 'mood', '{{}}')
"""

SECOND = """
CREATE TABLE alias_history (id {serial}, task INTEGER NOT NULL REFERENCES tasks (id), alias VARCHAR(128) NOT NULL,
    number INTEGER NOT NULL, time FLOAT, "by" VARCHAR(128));
CREATE INDEX alias_history_of ON alias_history (task, alias, id);
CREATE TABLE pins (tenant VARCHAR(128) NOT NULL, task VARCHAR(128) NOT NULL, version VARCHAR(10) NOT NULL,
    folded BOOLEAN NOT NULL, time FLOAT NOT NULL, "by" VARCHAR(128) NOT NULL, PRIMARY KEY (tenant, task, version));
CREATE TABLE unloaded (tenant VARCHAR(128) NOT NULL, task VARCHAR(128) NOT NULL, time FLOAT NOT NULL,
    "by" VARCHAR(128) NOT NULL, PRIMARY KEY (tenant, task));
INSERT INTO alias_history (task, alias, number, time, "by") VALUES (1, 'current', 3, 2.0, 'a key');
INSERT INTO pins VALUES ('acme', 'mood', '3', {false}, 2.0, 'a key')
"""


def state_of_schema(number: int, place: Path, url: str | None) -> set[str]:
    """Write a state with one task in a directory and a database; the names of its tables."""
    engine = create_engine(url or sqlite_url(place / "state.db"))
    with open_state(place / "made") as made:
        digests = [add(made, seed=seed).digest for seed in range(2)]
    shutil.copytree(place / "made" / "blobs", place / "blobs")
    (place / "identity").write_text("17")
    serial, false = ("SERIAL PRIMARY KEY", "false") if url else ("INTEGER NOT NULL PRIMARY KEY", "0")
    statements = FIRST if number == 1 else FIRST + ";" + SECOND
    with engine.begin() as connection:
        for statement in statements.format(serial=serial, false=false, one=digests[0], two=digests[1]).split(";"):
            connection.exec_driver_sql(statement)
        known = set(inspect(connection).get_table_names())
    engine.dispose()
    return known
