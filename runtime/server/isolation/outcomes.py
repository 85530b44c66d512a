"""Result of an upload after its process has ended: the adapter, or an error.

Output of the process is untrusted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import stat
from pathlib import Path
from typing import NamedTuple, NoReturn

from tpeft_deploy import errors
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import AdapterError, ProtocolError, Unavailable, brief
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime.server.isolation import reader
from tpeft_deploy.runtime.server.isolation.parsing_limits import ParsingLimits
from tpeft_deploy.runtime.server.isolation.process import Outcome

__all__ = ["Upload", "closing", "collect", "crashed", "header_bytes", "no_process"]

_log = logging.getLogger("tpeft_deploy.server")
_REFUSAL_BYTES = 1 << 16
# Header bytes of a canonical file: per byte of a weight's name, per weight (a few tensors with offsets, a scale, a
# digest), and for the file.
_HEAD_TIMES, _HEAD_MORE, _HEAD_LEAST = 8, 1024, 1 << 16


class Upload(NamedTuple):
    """A parsed upload.

    Attributes:
        adapter: parsed adapter.
        data: content of its canonical file.
    """

    adapter: Adapter
    data: bytes


def collect(directory: Path, of: str, outcome: Outcome, limits: ParsingLimits, header: int) -> Upload:
    """Return the upload that a process has parsed.

    Args:
        directory: directory of the upload's files.
        of: name of the upload in messages.
        outcome: outcome of the process.
        limits: limits of the process.
        header: maximum size of the canonical file's header (`header_bytes`).

    Raises:
        ProtocolError, AdapterError: the upload is invalid.
        Unavailable: no process could be forked.
        OSError: the disk is full.
    """
    _check(of, outcome, limits)
    _raise_refusal(directory, of)
    data = _bounded(directory / reader.RESULT, limits.result_bytes)
    if data is None:
        raise crashed(of, "its process left no result")
    length = int.from_bytes(data[:8], "little")
    if length > header:  # parsing it here would block the server
        raise AdapterError(f"read {of}", expected=f"names and digests of at most {header:,} bytes", got=f"{length:,}")
    return Upload(canonical.from_bytes(data, source=of), data)


def header_bytes(manifest: Manifest) -> int:
    """Return the maximum size of the header of a bundle's adapters."""
    return _HEAD_LEAST + sum(_HEAD_TIMES * len(name.encode()) + _HEAD_MORE for name in manifest.stored)


def _bounded(place: Path, limit: int) -> bytes | None:
    """Return the bytes of a file; None if it is missing, longer than `limit` or not a regular file."""
    try:
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb", buffering=0) as file:  # a buffer would be copied while holding the GIL
        about = os.fstat(handle)
        return file.readall() if stat.S_ISREG(about.st_mode) and about.st_size <= limit else None


def _raise_refusal(directory: Path, of: str) -> None:
    """Raise the error in REFUSAL; only classes for invalid files, and one line of bounded length, are accepted."""
    place = directory / reader.REFUSAL
    if not place.exists() and not place.is_symlink():
        return
    try:
        found = json.loads(_bounded(place, _REFUSAL_BYTES) or b"")
        name, text, trace = (str(found.get(key, "")) for key in ("kind", "text", "trace"))
    except (ValueError, AttributeError, RecursionError):
        raise crashed(of, "its process left no result") from None
    if name == "OSError":
        _raise_system(of, text)
    kind = getattr(errors, name, AdapterError) if name in errors.__all__ else AdapterError
    if not (isinstance(kind, type) and issubclass(kind, AdapterError | ProtocolError)):
        kind = AdapterError
    if not text:
        _log.error("a reader of uploads failed: %s", brief(trace, 4000))
        raise AdapterError(f"read {of}", problem=f"it is damaged, or of a kind that no reader knows ({name[:40]})")
    raise kind(brief(text, 2000))


def _raise_system(of: str, name: str) -> NoReturn:
    if name == "EFBIG":
        raise _over(of, "a canonical file within the limit")
    number = getattr(errno, name, errno.EIO) if name in {"ENOSPC", "EDQUOT"} else errno.EIO
    if number == errno.EIO:
        raise AdapterError(f"read {of}", problem=f"its files cannot be read ({name[:40]})")
    raise OSError(number, os.strerror(number))


def _over(of: str, expected: str) -> AdapterError:
    return AdapterError(
        f"read {of}",
        expected=expected,
        got="an adapter that takes more",
        fix="Check what saved it; the operator sets the server's limits (upload_...).",
    )


def crashed(of: str, problem: str) -> AdapterError:
    """Return the error for an upload after an abnormal end of its process."""
    return AdapterError(f"read {of}", problem=problem, fix="Check what saved it, or send it again.")


def no_process(of: str) -> Unavailable:
    """Return the error for an upload without a process, as the fork failed."""
    return Unavailable(f"read {of}", problem="the server cannot start a process for it now", fix="Send it again later.")


def closing(of: str) -> Unavailable:
    """Return the error for an upload during shutdown."""
    return Unavailable(f"read {of}", problem="the server is stopping")


def _check(of: str, outcome: Outcome, limits: ParsingLimits) -> None:
    status = outcome.status
    if status == 0:
        return
    if outcome.late:
        raise _over(of, f"at most {limits.wall_seconds:g} s to read it")
    if status == -signal.SIGXCPU or outcome.cpu >= limits.cpu_seconds:
        raise _over(of, f"at most {limits.cpu_seconds} s of processor time to read it")
    if status == reader.NO_MEMORY:
        raise _over(of, f"at most {limits.memory_bytes:,} bytes of memory to read it")
    if status == reader.NO_FORK:
        raise no_process(of)
    raise crashed(of, f"its process ended with {'signal' if status < 0 else 'status'} {abs(status)}")
