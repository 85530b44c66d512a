"""Validation of the names of tenants, tasks and aliases."""

from __future__ import annotations

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import ProtocolError

__all__ = ["check_alias", "check_task", "check_tenant"]

_FORM = "1 to 128 letters, digits, '.', '_', ':' or '-', starting with a letter or digit"
_RESERVED = "shared"  # stands for the shared tasks in an admin's requests


def check_tenant(name: str) -> None:
    """Check the name of a tenant.

    Raises:
        ProtocolError: the name is malformed or reserved.
    """
    if not is_name(name) or name == _RESERVED:
        raise _refused("tenant", f"{_FORM}, and not {_RESERVED!r}", name)


def check_task(name: str) -> None:
    """Check the name of a task.

    Raises:
        ProtocolError: the name is malformed.
    """
    if not is_name(name):
        raise _refused("task", _FORM, name)


def check_alias(name: str) -> None:
    """Check the name of an alias.

    Raises:
        ProtocolError: the name is malformed, or a number.
    """
    if not is_name(name) or name.isdigit():
        raise _refused("alias", f"{_FORM}, and not a number", name)


def _refused(what: str, expected: str, got: str) -> ProtocolError:
    return ProtocolError(f"name a {what}", expected=expected, got=repr(got[:200]))
