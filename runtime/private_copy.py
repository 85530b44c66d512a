"""A private copy of a bundle's graphs and weights.

ONNX Runtime maps weights.data into memory: truncating the file kills the process, and overwriting it
changes answers.  A copy on disk, checked while it is made, costs the file's size there and nothing in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import IntegrityError, RunError

__all__ = ["PrivateCopy"]

_PREFIX, _LOCK = "tpeft-deploy-", "lock"
_CHUNK = 2**20


class PrivateCopy:
    """Some files of a bundle in a directory of this process alone.

    It is locked as long as this object is open; those that a killed process left behind are removed first.

    Args:
        bundle: to copy from.
        names: names of files in the manifest; with none the directory is for others to use.

    Raises:
        IntegrityError: a file differs from its digest.
        RunError: it cannot be written.
    """

    def __init__(self, bundle: Bundle, names: Iterable[str]) -> None:
        _remove_abandoned()
        wanted = list(names)
        self._owner = os.getpid()
        try:
            self.path, self._lock = _new_directory()
        except OSError as error:
            raise self._unwritable(bundle, wanted, error) from error
        try:
            for name in wanted:
                _copy(bundle, name, self.path / name)
        except OSError as error:
            self.close()
            raise self._unwritable(bundle, wanted, error) from error
        except BaseException:
            self.close()
            raise
        self.bundle = replace(bundle, path=self.path)

    def close(self) -> None:
        """Remove the copy; sessions that have it open keep what they mapped.

        A forked process only forgets it: the process that made it goes on reading it.
        """
        if os.getpid() == self._owner:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _unwritable(self, bundle: Bundle, names: list[str], error: OSError) -> RunError:
        size = sum(bundle.manifest.files[name].bytes for name in names)
        return RunError(
            f"copy the weights of bundle {bundle.path}",
            expected=f"room for {size:,} bytes in {tempfile.gettempdir()}",
            got=error.strerror or str(error),
            fix="Set TMPDIR to a disk with room, or open the bundle with own_copy=False where nothing writes to it.",
        )


def _copy(bundle: Bundle, name: str, to: Path) -> None:
    record = bundle.manifest.files[name]
    digest = hashlib.sha256()
    with (bundle.path / name).open("rb") as source, to.open("wb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != record.sha256:
        raise IntegrityError(
            f"open bundle {bundle.path}, file {name!r}",
            expected=f"digest {record.sha256[:12]}...",
            got=f"{digest.hexdigest()[:12]}...",
            fix="The file was altered or damaged: export the bundle again.",
        )


def _new_directory() -> tuple[Path, IO[bytes]]:
    # Locked before it has the name that others look for.
    path = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    lock = (path / _LOCK).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return path.rename(path.with_name(path.name[1:])), lock


def _remove_abandoned() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (path / _LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # in use, or another user's
