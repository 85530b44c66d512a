"""Who may do what: the roles of keys, and every thing that a request can ask for.

| action | infer | deploy | admin |
|---|---|---|---|
| INFER, READ | yes | yes | yes |
| DEPLOY: register, swap, pin and delete the tenant's own tasks | | yes | yes |
| ADMIN: keys, tenants and their quotas, shared tasks, the audit log, metrics | | | yes |

Every route and every rpc names its action; what names none is refused.  Health is the only thing without a key.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from tpeft_deploy.errors import Forbidden

__all__ = ["Action", "LOCAL", "Principal", "Role", "SHARED", "allow"]

SHARED = ""
"""The tenant that owns what all tenants may call: the bundle's own tasks, and those that an admin publishes."""


class Role(enum.StrEnum):
    """What a key is for; each includes those before it."""

    INFER = "infer"
    DEPLOY = "deploy"
    ADMIN = "admin"


class Action(enum.Enum):
    """What a request asks for."""

    HEALTH = "health"
    READ = "read"
    INFER = "infer"
    DEPLOY = "deploy"
    ADMIN = "admin"


# In tuples, which are searched by identity: the hash of a member of an enumeration is computed in Python.
_ALLOWED = {
    Role.INFER: (Action.INFER, Action.HEALTH, Action.READ),
    Role.DEPLOY: (Action.INFER, Action.HEALTH, Action.READ, Action.DEPLOY),
    Role.ADMIN: (Action.INFER, Action.HEALTH, Action.READ, Action.DEPLOY, Action.ADMIN),
}


@dataclass(frozen=True)
class Principal:
    """Whoever sent a request, once its key was found.

    Attributes:
        tenant: whose tasks and quotas these are.
        role: of the key.
        key: its public id, for logs and the audit.
    """

    tenant: str
    role: Role
    key: str

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """What the role allows."""
        return _ALLOWED[self.role]


LOCAL = Principal(tenant="local", role=Role.ADMIN, key="no-auth")
"""Everybody, on a server without keys, which listens on the loopback only."""


def allow(principal: Principal, action: Action) -> None:
    """Refuse what the principal's role does not include.

    Raises:
        Forbidden: naming the role that would be needed.
    """
    if action not in principal.actions:
        needed = next(role for role in Role if action in _ALLOWED[role])
        raise Forbidden(
            f"{action.value} as tenant {principal.tenant!r}",
            expected=f"a key with role {needed.value!r}",
            got=f"one with role {principal.role.value!r}",
            fix="Ask an administrator for such a key.",
        )
