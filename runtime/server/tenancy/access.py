"""Access control: roles of keys, and the actions that each role allows.

| action | infer | deploy | admin |
|---|---|---|---|
| INFER, READ | yes | yes | yes |
| DEPLOY: register, swap, pin and delete tasks of the tenant | | yes | yes |
| ADMIN: keys, tenants and their quotas, shared tasks, the audit log, metrics | | | yes |

Every route and every rpc declares its action; one without an action is refused.  Only health needs no key.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from tpeft_deploy.errors import Forbidden

__all__ = ["Action", "LOCAL", "Principal", "Role", "SHARED", "allow"]

SHARED = ""
"""Tenant that owns the shared tasks: those of the bundle, and those published by an admin."""


class Role(enum.StrEnum):
    """Role of a key; each includes the previous ones."""

    INFER = "infer"
    DEPLOY = "deploy"
    ADMIN = "admin"


class Action(enum.Enum):
    """Action of a request."""

    HEALTH = "health"
    READ = "read"
    INFER = "infer"
    DEPLOY = "deploy"
    ADMIN = "admin"


# Tuples, as they are searched by identity; hashing an enum member runs Python code.
_ALLOWED = {
    Role.INFER: (Action.INFER, Action.HEALTH, Action.READ),
    Role.DEPLOY: (Action.INFER, Action.HEALTH, Action.READ, Action.DEPLOY),
    Role.ADMIN: (Action.INFER, Action.HEALTH, Action.READ, Action.DEPLOY, Action.ADMIN),
}


@dataclass(frozen=True)
class Principal:
    """Authenticated sender of a request.

    Attributes:
        tenant: tenant of the key.
        role: role of the key.
        key: public id of the key, for the logs and the audit log.
    """

    tenant: str
    role: Role
    key: str

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """Actions that the role allows."""
        return _ALLOWED[self.role]


LOCAL = Principal(tenant="local", role=Role.ADMIN, key="no-auth")
"""Principal of every request on a server without keys, which listens on the loopback only."""


def allow(principal: Principal, action: Action) -> None:
    """Check that the principal's role allows an action.

    Raises:
        Forbidden: the role does not allow it; the error names the required role.
    """
    if action not in principal.actions:
        needed = next(role for role in Role if action in _ALLOWED[role])
        raise Forbidden(
            f"{action.value} as tenant {principal.tenant!r}",
            expected=f"a key with role {needed.value!r}",
            got=f"one with role {principal.role.value!r}",
            fix="Ask an administrator for such a key.",
        )
