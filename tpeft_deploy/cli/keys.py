"""`keys`: create, list and revoke the keys of a server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.console import emit, json_option, server_packages
from tpeft_deploy.cli.tool import Command, Group, note

if TYPE_CHECKING:
    from tpeft_deploy.runtime.server.registry import KeyRecord, Keys

__all__ = ["keys"]

_DURATION = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_COLUMNS = ["id", "tenant", "role", "created", "expires", "revoked"]


class Duration(click.ParamType[float]):
    """Duration such as 30d, 12h or 45m, in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a duration; return seconds."""
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration such as 30d, 12h or 45m", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


_state = click.option(
    "--state", type=click.Path(path_type=Path), default=Path("tpeft-state"), show_default=True, envvar="TPEFT_STATE",
    help="State directory of the server, which may be running.",
)  # fmt: skip
_database = click.option("--database-url", envvar="TPEFT_DATABASE_URL", help="Database, if outside the directory.")


@click.group(cls=Group)
def keys() -> None:
    """Manage the keys of a server's tenants."""


@keys.command(cls=Command)
@_state
@_database
@click.option("--tenant", required=True, help="Tenant of the key; created if it does not exist.")
@click.option("--role", required=True, type=click.Choice(["infer", "deploy", "admin"]), help="Role of the key.")
@click.option("--expires", type=Duration(), help="Lifetime, such as 30d, 12h or 45m; unlimited by default.")
@json_option
def create(state: Path, database_url: str | None, tenant: str, role: str, expires: float | None, as_json: bool) -> None:
    """Create a key and print it; it cannot be shown again.  A running server then knows it."""
    with _keys(state, database_url) as store:
        until = None if expires is None else time.time() + expires
        record, key = store.create(tenant, role, by="command line", expires=until)
        _wait_for_servers()
    document = {"id": record.id, "tenant": record.tenant, "role": record.role.value, "key": key}
    if as_json:
        emit(document, key="", columns=[], as_json=True)
        return
    note(f"key {record.id} of tenant {tenant}, role {role}; it is not stored, so save it now:")
    click.echo(key)


@keys.command(name="list", cls=Command)
@_state
@_database
@click.option("--tenant", help="List the keys of this tenant only.")
@json_option
def list_(state: Path, database_url: str | None, tenant: str | None, as_json: bool) -> None:
    """List keys, without their secrets."""
    with _keys(state, database_url) as store:
        found = [_shown(record) for record in store.list(tenant)]
    emit({"keys": found}, key="keys", columns=_COLUMNS, as_json=as_json)


@keys.command(cls=Command)
@_state
@_database
@click.argument("id_", metavar="ID")
@json_option
def revoke(state: Path, database_url: str | None, id_: str, as_json: bool) -> None:
    """Revoke a key; a running server refuses it within a second."""
    with _keys(state, database_url) as store:
        record = store.revoke(id_, by="command line")
    emit({"keys": [_shown(record)]}, key="keys", columns=_COLUMNS, as_json=as_json)


def _wait_for_servers() -> None:
    from tpeft_deploy.runtime.server.registry import POLL_SECONDS

    time.sleep(POLL_SECONDS + 0.2)  # they look for new keys so often, and a request may follow at once


@contextmanager
def _keys(state: Path, url: str | None) -> Iterator[Keys]:
    with server_packages("open the server's keys"):
        from tpeft_deploy.runtime.server.registry import open_keys
    found, database = open_keys(state, url)
    try:
        yield found
    finally:
        database.close()


def _shown(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "role": record.role.value,
        "created": _time(record.created),
        "expires": _time(record.expires),
        "revoked": _time(record.revoked),
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
