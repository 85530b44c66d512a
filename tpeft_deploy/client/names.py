"""Names as parts of URLs."""

from __future__ import annotations

import re
from urllib.parse import quote

from tpeft_deploy.errors import InputError

__all__ = ["model_path", "part"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def part(name: str, what: str) -> str:
    """Return a name as part of a path; names that no server has, such as "..", would lead to other paths.

    Args:
        name: name to encode.
        what: kind of name, for the error message.

    Raises:
        InputError: the name is not valid.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"ask for {what} {name!r}",
            expected="a name of at most 128 letters, digits, '.', '_', ':' and '-', the first a letter or digit",
            got=repr(name),
        )
    return quote(name, safe="")


def model_path(name: str) -> str:
    """Return the path of the model `name` or `name@version`."""
    task, at, version = name.partition("@")
    path = f"/v2/models/{part(task, 'task')}"
    return f"{path}/versions/{part(version, 'version')}" if at else path
