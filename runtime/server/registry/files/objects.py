"""Adapters in an object store, behind a disk cache."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tpeft_deploy.errors import IntegrityError, ServerError, Unavailable
from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.store import PendingDigests, Referred
from tpeft_deploy.runtime.server.registry.files.stored_objects import StoredObjects

__all__ = ["ObjectStore"]

_log = logging.getLogger("tpeft_deploy.server")
_FOLDER, _IDENTITY = "adapters", "identity"
_NAME = re.compile(rf"{_FOLDER}/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_GRACE = 3600.0  # longer than an upload may take, on any server


class ObjectStore:
    """Store of immutable objects `adapters/<2 hex>/<digest>.safetensors`, which several servers may share.

    Args:
        objects: objects of the store.
        cache: disk cache of this server.
        clock: monotonic clock.
    """

    def __init__(
        self, objects: StoredObjects, cache: DiskCache, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._objects = objects
        self._cache = cache
        self._clock = clock
        self._lock = threading.Lock()  # guards the fields below, and the removal of objects
        self._pending = PendingDigests(self._lock)
        # Unreferenced objects, with what a listing showed of them -> when this server saw that first.  The clocks of
        # the store and of other servers do not matter.
        self._unused: dict[tuple[str, str], float] = {}
        self._identity: int | None = None

    def write(self, data: bytes) -> str:
        """Store bytes and return their digest, once the store returns them again; an altered object is replaced.

        Raises:
            Unavailable: the store does not answer, or does not keep what is written.
        """
        digest = hashlib.sha256(data).hexdigest()
        name = self._name(digest)
        # The size first: most objects are new.  What is intact is not written again, as that could fail half-way.
        if self._objects.size(name) != len(data) or self._objects.get(name) != data:
            self._objects.put(name, data)
            if self._objects.get(name) != data:
                _log.error("the store of adapters does not return what was written to it, %s", name)
                raise Unavailable(
                    "store an adapter", problem="the server's store did not keep it", fix="Try again shortly."
                )
        self._cache.put(digest, data)
        return digest

    def read(self, digest: str, *, of: str) -> bytes:
        """Read the bytes of a digest, from the cache if it has them.

        Args:
            digest: digest of the bytes.
            of: description of the content, for error messages.

        Raises:
            IntegrityError: the object is missing or was altered.
            Unavailable: the store does not answer.
        """
        name = self._name(digest)

        def fetch() -> bytes:
            data = self._objects.get(name)
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise IntegrityError(
                    f"read {of}",
                    expected=f"its object, with digest {digest[:12]}...",
                    got="none" if data is None else "altered bytes",
                    fix="Register it again; another program changed the store.",
                )
            return data

        return self._cache.read(digest, fetch)

    def any(self) -> bool:
        """Whether the store has any adapters."""
        return self._objects.any(_FOLDER)

    @contextmanager
    def pending(self, data: bytes) -> Iterator[str]:
        """Store bytes that no sweep removes before the block ends; by then they are referenced, or not needed.

        Another server's sweep may have removed an old object of the same bytes before they were referenced; after the
        block, it is written again.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._pending.hold(digest):
            self.write(data)
            yield digest
            self._confirm(digest, data)

    def release(self, digests: Iterable[str]) -> None:
        """Do nothing: a sweep waits an hour after the last reference was dropped."""

    def discard(self, digest: str, referred: Referred) -> None:
        """Do nothing: another server may be registering the same bytes; a sweep removes the object."""

    def clean(self, referred: Referred) -> None:
        """Do nothing: a start neither waits for the store nor lists it."""

    def sweep(self, referred: Referred, *, grace: float) -> int:
        """Remove objects that this server has seen unreferenced and unchanged for an hour; return their number.

        Objects are removed inside of `referred`, so that no server adds a reference meanwhile.

        Args:
            referred: function that returns a context with the referenced digests.
            grace: least seconds; an hour at least.

        Raises:
            Unavailable: the store does not answer.
            ServerError: the store belongs to another database.
        """
        self._check_identity()
        listed = {
            found[2]: stamp
            for name, stamp in self._objects.listing(_FOLDER).items()
            if (found := _NAME.fullmatch(name))
        }
        with referred() as used, self._lock:
            kept = {*used, *self._pending}
            now = self._clock()
            unused = {own: now for own in listed.items() if own[0] not in kept}
            self._unused = {own: self._unused.get(own, at) for own, at in unused.items()}
            gone = [own[0] for own, since in self._unused.items() if now - since >= max(grace, _GRACE)]
            self._objects.remove([self._name(digest) for digest in gone])
            self._cache.retain(lambda digest: digest in kept or (digest in listed and digest not in gone))
        return len(gone)

    def identity(self) -> int | None:
        """Return the number of the database that the store belongs to; None for a new store."""
        data = self._objects.get(_IDENTITY)
        return None if data is None else int(data)

    def bind(self, number: int, *, new: bool) -> None:
        """Set the number that the store must have when it is swept.

        Args:
            number: number of the database.
            new: whether to write it to the store.
        """
        if new:
            self._objects.put(_IDENTITY, str(number).encode())
        self._identity = number

    def _check_identity(self) -> None:
        found = self.identity()
        if found != self._identity:
            raise ServerError(
                "clean the store of adapters",
                expected="the store of this server's database",
                got="one of another database" if found is not None else "one without an identity",
                fix="Give the store_url and the database_url that were used together before.",
            )

    def _confirm(self, digest: str, data: bytes) -> None:
        try:
            if self._objects.size(self._name(digest)) != len(data):
                self._objects.put(self._name(digest), data)
        except Unavailable:  # it was written and referenced
            _log.warning("cannot look again for the object of a registered adapter, %s", digest)

    @staticmethod
    def _name(digest: str) -> str:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a SHA-256: {digest!r}")
        return f"{_FOLDER}/{digest[:2]}/{digest}.safetensors"
