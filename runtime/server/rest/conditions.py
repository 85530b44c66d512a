"""Conditions of changes, in the headers If-Match and If-None-Match (RFC 9110, section 13.1)."""

from __future__ import annotations

import re

from tpeft_deploy.errors import ProtocolError
from tpeft_deploy.runtime.server.registry import Condition
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.v2.tensors import quoted

__all__ = ["condition_of"]

_BLANK = " \t"
# A tag may have commas, so that a list cannot be split at them; empty elements are allowed.
_ELEMENT = re.compile(r'[ \t]*((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")?[ \t]*(?:,|$)')


def condition_of(context: HttpContext) -> Condition:
    """Return the condition of a change; without these headers, one that is always true.

    Raises:
        ProtocolError: a header is malformed, or has a weak tag, which no strong tag equals.
    """
    given, absent = _joined(context, b"if-match"), _joined(context, b"if-none-match")
    if absent is not None and absent != "*":
        raise ProtocolError(
            "read the header If-None-Match", expected="*, for a task that must not exist", got=quoted(absent)
        )
    if given == "*":
        return Condition(exists=absent is None) if absent is None else Condition(frozenset(), exists=False)
    tags = None if given is None else _tags(given)
    return Condition(tags, exists=None if absent is None else False)


def _joined(context: HttpContext, name: bytes) -> str | None:
    """Return a header, several of one name as one list; None without one."""
    found = [value.decode("latin-1") for own, value in context.scope["headers"] if own == name]
    return ", ".join(found).strip(_BLANK) if found else None


def _tags(given: str) -> frozenset[str]:
    tags, at = set[str](), 0
    while at < len(given):
        match = _ELEMENT.match(given, at)
        if match is None:
            raise _malformed(given)
        tag = match[1]
        if tag is not None and tag.startswith("W/"):
            raise ProtocolError(
                "read the header If-Match",
                expected="strong entity tags",
                got=f"the weak one {quoted(tag)}",
                fix="Send the tag as the server gave it; a proxy may have weakened it.",
            )
        if tag is not None:
            tags.add(tag)
        at = match.end()
    if not tags:
        raise _malformed(given)
    return frozenset(tags)


def _malformed(given: str) -> ProtocolError:
    return ProtocolError(
        "read the header If-Match", expected='* or entity tags in double quotes, as in "7", "8"', got=quoted(given)
    )
