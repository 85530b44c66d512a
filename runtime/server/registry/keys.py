"""API keys: only digests are stored, and compared in constant time."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from tpeft_deploy.errors import InsufficientStorage, NotFound, ProtocolError, Unauthenticated, Unavailable
from tpeft_deploy.runtime.server.registry import audit, schema
from tpeft_deploy.runtime.server.registry.cached import Latest
from tpeft_deploy.runtime.server.registry.database import Database
from tpeft_deploy.runtime.server.registry.files.disk import Reserve
from tpeft_deploy.runtime.server.registry.names import check_tenant
from tpeft_deploy.runtime.server.registry.tenants import Tenants, ensure
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role

__all__ = ["KeyRecord", "Keys"]

_ID = re.compile(r"[0-9a-f]{12}")
_LAST = 253_402_300_800.0  # end of the year 9999, the last that dates can express
_NOBODY = hashlib.sha256(b"no key has this digest").hexdigest()


@dataclass(frozen=True)
class KeyRecord:
    """A key without its secret; times are seconds since 1970."""

    id: str
    digest: str
    tenant: str
    role: Role
    created: float
    expires: float | None = None
    revoked: float | None = None


_Known = dict[str, tuple[KeyRecord, Principal]]


class Keys:
    """Keys by id, read from a cache that `update_cache` refreshes.

    Args:
        database: database of the registry.
        tenants: tenants, created with their first key.
        reserve: disk space reserved for revocations; None: none is reserved.
    """

    def __init__(self, database: Database, tenants: Tenants, reserve: Reserve | None = None) -> None:
        self._reserve = reserve
        self._refused: dict[str, str] = {}  # id of a revoked key not yet in the database -> id of the revoking key
        self._database = database
        self._tenants = tenants
        self._latest: Latest[_Known] = Latest({})

    def create(self, tenant: str, role: str, *, by: str, expires: float | None = None) -> tuple[KeyRecord, str]:
        """Create a key.

        Args:
            tenant: tenant of the key; created when it does not exist.
            role: "infer", "deploy" or "admin".
            by: id of the key that creates it, or "command line".
            expires: seconds since 1970; None: never.

        Returns:
            The record, and the key itself, which is not stored.

        Raises:
            ProtocolError: the tenant's name or the role is invalid, or `expires` is past or out of range.
        """
        check_tenant(tenant)
        if role not in set(Role):
            raise ProtocolError(
                f"create a key for tenant {tenant!r}", expected=f"a role among {', '.join(Role)}", got=repr(role)
            )
        now = time.time()
        if expires is not None and not now < expires < _LAST:
            problem = "it would expire after the year 9999" if expires >= _LAST else "it would have expired already"
            raise ProtocolError(f"create a key for tenant {tenant!r}", problem=problem)
        own = secrets.token_hex(6)
        key = f"tpk_{own}_{secrets.token_urlsafe(32)}"
        record = KeyRecord(own, _digest(key), tenant, Role(role), now, expires)
        with self._database.writing() as connection:
            ensure(self._database, connection, tenant)
            connection.execute(
                insert(schema.keys).values(
                    id=own, digest=record.digest, tenant=tenant, role=role, created=now, expires=expires
                )
            )
            audit.write(connection, by, tenant, "create key", own, role=role, expires=expires)
            changes = self._database.changed(connection)
            tenants, known = self._tenants.read(connection), self.read(connection)
        self._tenants.update_cache(changes, tenants)
        self.update_cache(changes, known)
        return record, key

    def list(self, tenant: str | None = None) -> list[KeyRecord]:
        """List keys of one tenant or all, revoked ones included, oldest first."""
        found = [record for record, _ in self._latest.value.values() if tenant is None or record.tenant == tenant]
        return sorted(found, key=lambda record: (record.created, record.id))

    def revoke(self, id: str, *, by: str) -> KeyRecord:
        """Revoke a key.

        When the revocation cannot be written, this server refuses the key anyway and retries the write.

        Raises:
            NotFound: no key has this id.
            InsufficientStorage, Unavailable: the revocation could not be written.
        """
        try:
            try:
                return self._revoke(id, by)
            except InsufficientStorage:
                if self._reserve is None or not self._reserve.release():
                    raise
                return self._revoke(id, by)
        except (InsufficientStorage, Unavailable) as error:
            if id not in self._latest.value:
                raise
            self._refused[id] = by
            raise type(error)(
                f"revoke key {id!r}",
                problem=f"this server refuses it from now on, but could not write that: {error.problem}",
                fix="Do not restart the server before it is written: it tries again, and so may you.",
            ) from error

    def write_refused(self) -> None:
        """Write pending revocations.

        Raises:
            ServerError: they still cannot be written.
        """
        for own, by in list(self._refused.items()):
            with contextlib.suppress(NotFound):  # without its row, the key is invalid anyway
                self._revoke(own, by)
            self._refused.pop(own, None)

    def _revoke(self, id: str, by: str) -> KeyRecord:
        if not _ID.fullmatch(id):
            raise NotFound(f"revoke key {id[:100]!r}", expected="the id of a key", got="another text")
        own = schema.keys.c.id == id
        with self._database.writing() as connection:
            row = connection.execute(select(schema.keys.c.tenant, schema.keys.c.revoked).where(own)).one_or_none()
            if row is None:
                raise NotFound(f"revoke key {id!r}", expected="the id of a key", got="one that no key has")
            if row.revoked is None:
                connection.execute(update(schema.keys).where(own).values(revoked=time.time()))
                audit.write(connection, by, row.tenant, "revoke key", id)
                self._database.changed(connection)
            changes, known = self._database.changes(connection), self.read(connection)
        self.update_cache(changes, known)
        return known[id][0]

    def authenticate(self, key: str) -> Principal:
        """Return the principal of a key.

        Raises:
            Unauthenticated: the key is malformed, unknown, expired or revoked; only a holder of the whole key learns
                that it expired or was revoked.
        """
        # The id only finds the record; the digest of the whole text decides.
        record, principal = self._latest.value.get(key[4:16], (None, None))
        same = hmac.compare_digest(_digest(key), record.digest if record is not None else _NOBODY)
        if not same or record is None or principal is None:
            raise Unauthenticated("authenticate", expected="a key of this server", got="another")
        if record.revoked is not None or record.id in self._refused:
            raise Unauthenticated("authenticate", problem=f"key {record.id} was revoked")
        if record.expires is not None and record.expires <= time.time():
            raise Unauthenticated("authenticate", problem=f"key {record.id} has expired")
        return principal

    def read(self, connection: Connection) -> _Known:
        """Read all keys, as part of a transaction."""
        found = {}
        for row in connection.execute(select(schema.keys)).mappings():
            record = KeyRecord(**{**row, "role": Role(row["role"])})
            found[record.id] = (record, Principal(record.tenant, record.role, record.id))
        return found

    def update_cache(self, changes: int, known: _Known) -> None:
        """Update the cache with keys that were read when the database had a change counter."""
        self._latest.put(changes, known)


def _digest(key: str) -> str:
    # Keys are 256 random bits: a slow hash would add no protection.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
