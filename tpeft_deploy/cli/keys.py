"""`keys`: who may call a server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tpeft_deploy.cli.console import Command, Group, emit, json_option, note

if TYPE_CHECKING:
    from tpeft_deploy.runtime.server.registry import KeyRecord, Keys

__all__ = ["keys"]

_DURATION = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_COLUMNS = ["id", "tenant", "role", "created", "expires", "revoked"]


class Duration(click.ParamType[float]):
    """Seconds, written as 30d, 12h, 45m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds."""
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is no duration such as 30d, 12h or 45m", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


_state = click.option(
    "--state", type=click.Path(path_type=Path), default=Path("tpeft-state"), show_default=True, envvar="TPEFT_STATE",
    help="The server's directory; it may be running.",
)  # fmt: skip
_database = click.option("--database-url", envvar="TPEFT_DATABASE_URL", help="Where the server keeps it elsewhere.")


@click.group(cls=Group)
def keys() -> None:
    """Keys of a server's tenants."""


@keys.command(cls=Command)
@_state
@_database
@click.option("--tenant", required=True, help="Whose key; the tenant is made where there is none.")
@click.option("--role", required=True, type=click.Choice(["infer", "deploy", "admin"]), help="What it is for.")
@click.option("--expires", type=Duration(), help="After 30d, 12h, 45m; never by default.")
@json_option
def create(state: Path, database_url: str | None, tenant: str, role: str, expires: float | None, as_json: bool) -> None:
    """Make a key and print it, this once."""
    with _keys(state, database_url) as own:
        until = None if expires is None else time.time() + expires
        record, key = own.create(tenant, role, by="command line", expires=until)
    document = {"id": record.id, "tenant": record.tenant, "role": record.role.value, "key": key}
    if as_json:
        emit(document, key="", columns=[], as_json=True)
        return
    note(f"key {record.id} of tenant {tenant}, role {role}; it is kept nowhere, so keep it now:")
    click.echo(key)


@keys.command(name="list", cls=Command)
@_state
@_database
@click.option("--tenant", help="Of one tenant.")
@json_option
def list_(state: Path, database_url: str | None, tenant: str | None, as_json: bool) -> None:
    """List keys, without their secrets."""
    with _keys(state, database_url) as own:
        found = [_shown(record) for record in own.list(tenant)]
    emit({"keys": found}, key="keys", columns=_COLUMNS, as_json=as_json)


@keys.command(cls=Command)
@_state
@_database
@click.argument("id_", metavar="ID")
@json_option
def revoke(state: Path, database_url: str | None, id_: str, as_json: bool) -> None:
    """Refuse a key from now on; a running server does so within a second."""
    with _keys(state, database_url) as own:
        record = own.revoke(id_, by="command line")
    emit({"keys": [_shown(record)]}, key="keys", columns=_COLUMNS, as_json=as_json)


@contextmanager
def _keys(state: Path, url: str | None) -> Iterator[Keys]:
    from tpeft_deploy.errors import MissingExtra

    try:
        from tpeft_deploy.runtime.server.registry import open_keys
    except ImportError as error:
        if (error.name or "").startswith("tpeft_deploy"):
            raise
        raise MissingExtra(
            "open the server's keys",
            expected="the server's packages",
            got=str(error),
            fix="pip install 'tpeft-deploy[server,cpu]'.",
        ) from error
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
