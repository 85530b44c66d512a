"""Tables of the registry's database; `migrations` brings databases of earlier schemas to them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "COMPATIBLE",
    "SCHEMA",
    "aliases",
    "audit",
    "history",
    "keys",
    "leases",
    "meta",
    "metadata",
    "pins",
    "tasks",
    "tenants",
    "unloaded",
    "versions",
]

SCHEMA = 5  # the newest migration
# What servers without migrations look for in `meta`.  A migration that makes their use of a database wrong raises it.
COMPATIBLE = 1
_NAME = String(128)

metadata = MetaData()
meta = Table("meta", metadata, Column("name", _NAME, primary_key=True), Column("value", Integer, nullable=False))
tenants = Table(
    "tenants",
    metadata,
    Column("name", _NAME, primary_key=True),
    Column("quota", JSON, nullable=False),
    Column("created", Float, nullable=False),
)
keys = Table(
    "keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("tenant", _NAME, nullable=False),
    Column("role", String(16), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)
# A deleted task keeps its row, so that no version number is reused.
tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("tenant", _NAME, nullable=False),
    Column("name", _NAME, nullable=False),
    Column("next_number", Integer, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("changed", Integer, nullable=False, server_default="0", index=True),  # counter of tasks at its last change
    UniqueConstraint("tenant", "name"),
)
versions = Table(
    "versions",
    metadata,
    Column("task", ForeignKey("tasks.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
    Column("by", _NAME, nullable=False),
)
aliases = Table(
    "aliases",
    metadata,
    Column("task", ForeignKey("tasks.id"), primary_key=True),
    Column("alias", _NAME, primary_key=True),
    Column("number", Integer, nullable=False),
    Column("previous", Integer),
)
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("tenant", _NAME, nullable=False),
    Column("key", _NAME, nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(300), nullable=False),
    Column("detail", JSON, nullable=False),
)
# Earlier versions of an alias; time and key are null for changes made before schema 2.
history = Table(
    "alias_history",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("task", ForeignKey("tasks.id"), nullable=False),
    Column("alias", _NAME, nullable=False),
    Column("number", Integer, nullable=False),
    Column("time", Float),
    Column("by", _NAME),
    Index("alias_history_of", "task", "alias", "id"),
)
# By name, because the bundle's tasks have no row; the version as clients write it.
pins = Table(
    "pins",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("task", _NAME, primary_key=True),
    Column("version", String(10), primary_key=True),
    Column("folded", Boolean, nullable=False),
    Column("time", Float, nullable=False),
    Column("by", _NAME, nullable=False),
)
unloaded = Table(
    "unloaded",
    metadata,
    Column("tenant", _NAME, primary_key=True),
    Column("task", _NAME, primary_key=True),
    Column("time", Float, nullable=False),
    Column("by", _NAME, nullable=False),
)
# Of servers that share the database; the state is JSON that `leases` reads and writes as a whole.
leases = Table(
    "leases", metadata, Column("server", String(32), primary_key=True), Column("state", Text, nullable=False)
)
