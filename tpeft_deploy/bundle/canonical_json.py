"""JSON documents that state a digest of themselves, as manifest.json does.

The digest is the SHA-256 of what `json.dumps(..., sort_keys=True)` writes of the other fields.  A manifest has many
floats, of which `json` takes long to write the shortest form; msgspec writes the same text in a tenth of the time, up
to the form of very small and very large floats.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

__all__ = ["decode", "digest"]

_FORM = re.compile(r"(?<!\d)(?:\d+(?:\.\d+)?e-?\d+|0\.0000\d+)")  # of floats that Python writes otherwise


def decode(text: str) -> tuple[Any, bool]:
    """Decode a document.

    Args:
        text: JSON, as `json.loads` takes it.

    Returns:
        The document, and whether `digest` may be quick: msgspec writes all of its values as `json` does.

    Raises:
        ValueError: it is not JSON.
    """
    # What json escapes, or msgspec takes otherwise, is left to json: errors and documents are json's in any case.
    if text.isascii() and "\\" not in text and "\x7f" not in text:
        try:
            return msgspec.json.decode(text), True
        except (msgspec.MsgspecError, RecursionError):
            pass
    return json.loads(text), False


def digest(document: Mapping[str, Any], *, quick: bool = False) -> str:
    """Compute the SHA-256 over all fields except `digest`.

    Args:
        document: document, which may have a field `digest` already.
        quick: try msgspec's text first, and return its SHA-256 if that is what the field `digest` states.
    """
    rest = {key: value for key, value in document.items() if key != "digest"}
    if quick and (found := _sha256(_quick_text(rest))) == document.get("digest"):
        return found
    return _sha256(json.dumps(rest, sort_keys=True))


def _quick_text(document: Mapping[str, Any]) -> str:
    """What json writes of a document without escaped letters."""
    written = msgspec.json.format(msgspec.json.encode(document, order="sorted"), indent=0).decode()
    parts = written.split('"')  # strings are every second one
    parts[::2] = _FORM.sub(lambda found: repr(float(found[0])), '"'.join(parts[::2])).split('"')
    return '"'.join(parts)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
