"""Disk cache of files that are named by their digests, under a byte budget."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

from tpeft_deploy.files import new_file
from tpeft_deploy.runtime.server.registry.files.locks import KeyedLocks

__all__ = ["DiskCache"]

_log = logging.getLogger("tpeft_deploy.server")
_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


class DiskCache:
    """Files of a store on the local disk; the least recently used are evicted.

    A file is verified by its digest whenever it is read, so that an altered or truncated one is a cache miss.

    Args:
        directory: directory of the cache, used by nothing else.
        budget: bytes of all files together.
    """

    def __init__(self, directory: Path, budget: int) -> None:
        self._directory = directory
        self._budget = budget
        self._fetching = KeyedLocks()
        self._lock = threading.Lock()  # guards the fields below, and evictions
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used first
        self._reading: Counter[str] = Counter()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._load()

    @property
    def held(self) -> int:
        """Bytes of all cached files."""
        with self._lock:
            return sum(self._sizes.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def read(self, digest: str, fetch: Callable[[], bytes]) -> bytes:
        """Return the bytes of a digest.

        Args:
            digest: digest of the bytes.
            fetch: function that returns verified bytes on a cache miss; called once for concurrent readers.
        """
        data = self._get(digest)
        if data is None:
            with self._fetching.hold(digest):
                data = self._get(digest)
                if data is None:
                    data = fetch()
                    self.put(digest, data)
        return data

    def put(self, digest: str, data: bytes) -> None:
        """Cache the bytes of a digest; without room for them, they are not cached."""
        if len(data) > self._budget:
            return
        try:
            with new_file(self._place(digest), 0o600) as temporary:
                temporary.write_bytes(data)
        except OSError as error:  # a full disk: the store has the file
            _log.warning("cannot cache an adapter on the disk: %s", error.strerror or error)
            return
        with self._lock:
            self._sizes[digest] = len(data)
            self._sizes.move_to_end(digest)
            self._evict()

    def retain(self, needed: Callable[[str], bool]) -> None:
        """Remove the files of digests that are not needed any more."""
        with self._lock:
            for digest in [own for own in self._sizes if not needed(own) and not self._reading[own]]:
                self._remove(digest)

    def _get(self, digest: str) -> bytes | None:
        with self._lock:
            if digest not in self._sizes:
                return None
            self._sizes.move_to_end(digest)
            self._reading[digest] += 1
        place = self._place(digest)
        try:
            data = None if place.is_symlink() else place.read_bytes()
            if data is not None and hashlib.sha256(data).hexdigest() != digest:
                data = None
            if data is not None:
                os.utime(place)  # the order of the next start
        except OSError:
            data = None
        with self._lock:
            self._reading[digest] -= 1
            self._reading = +self._reading
            if data is None and digest in self._sizes and not self._reading[digest]:
                _log.warning("a cached adapter is gone or altered; it is read from the store again")
                self._remove(digest)
            self._evict()
        return data

    def _evict(self) -> None:
        held = sum(self._sizes.values())
        for digest in list(self._sizes):
            if held <= self._budget:
                return
            if not self._reading[digest]:
                held -= self._sizes[digest]
                self._remove(digest)

    def _remove(self, digest: str) -> None:
        del self._sizes[digest]
        try:
            self._place(digest).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot remove a cached adapter: %s", error.strerror or error)

    def _load(self) -> None:
        """Take over the files of an earlier start, and remove what was left half-written."""
        found: list[tuple[float, str, int]] = []
        for entry in list(os.scandir(self._directory)):
            name = _NAME.fullmatch(entry.name)
            if entry.is_dir(follow_symlinks=False):
                continue
            if name is None or not entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)
                continue
            about = entry.stat(follow_symlinks=False)
            found.append((about.st_mtime, name[1], about.st_size))
        self._sizes.update((digest, size) for _, digest, size in sorted(found))
        self._evict()

    def _place(self, digest: str) -> Path:
        return self._directory / f"{digest}.safetensors"
