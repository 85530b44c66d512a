"""Names that tenants choose: the only texts from outside that anything is kept under."""

from __future__ import annotations

from tpeft_deploy.bundle.manifest import is_name
from tpeft_deploy.errors import ProtocolError

__all__ = ["check_alias", "check_task", "check_tenant"]

_FORM = "1 to 128 letters, digits, '.', '_', ':' or '-', starting with a letter or digit"
_RESERVED = "shared"  # what an admin's requests call that which belongs to everybody


def check_tenant(name: str) -> None:
    """Refuse a name that no tenant may have.

    Raises:
        ProtocolError: it is not of the form of names, or stands for everybody.
    """
    if not is_name(name) or name == _RESERVED:
        raise _refused("tenant", f"{_FORM}, and not {_RESERVED!r}", name)


def check_task(name: str) -> None:
    """Refuse a name that no task may have.

    Raises:
        ProtocolError: it is not of the form of names.
    """
    if not is_name(name):
        raise _refused("task", _FORM, name)


def check_alias(name: str) -> None:
    """Refuse a name that no alias may have.

    Raises:
        ProtocolError: it is not of the form of names, or could be a version's number.
    """
    if not is_name(name) or name.isdigit():
        raise _refused("alias", f"{_FORM}, and not a number", name)


def _refused(what: str, expected: str, got: str) -> ProtocolError:
    return ProtocolError(f"name a {what}", expected=expected, got=repr(got[:200]))
