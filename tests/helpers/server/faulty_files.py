"""A file system of fsspec that fails, hangs and alters on demand."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore
from tpeft_deploy.runtime.server.registry.files.stored_objects import StoredObjects


class FaultyFiles(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no type information
    """Objects in memory.

    Attributes:
        broken: whether calls fail.
        hangs: cleared while calls hang.
        cut: bytes that a write loses.
        calls: names of the calls.
    """

    protocol = "faulty"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.broken = False
        self.hangs = threading.Event()
        self.hangs.set()
        self.cut = 0
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.hangs.wait()
        if self.broken:
            raise ConnectionError("no route to https://user:secret@store")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._called("get")
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._called("put")
        super().pipe_file(path, value[: len(value) - self.cut], mode=mode, **kwargs)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._called("info")
        return dict(super().info(path, **kwargs))

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._called("find")
        return super().find(path, *args, **kwargs)

    def flip(self, digest: str) -> None:
        """Alter a bit of an object."""
        path = f"/root/adapters/{digest[:2]}/{digest}.safetensors"
        data = bytearray(super().cat_file(path))
        data[len(data) // 2] ^= 1
        super().pipe_file(path, bytes(data))


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def store_of(
    files: Any, place: Path, *, budget: int = 2**20, clock: Clock | None = None, timeout: float = 60
) -> ObjectStore:
    """A server's store over objects that others may use too."""
    objects = StoredObjects(files, "/root", timeout, ["user:secret"])
    store = ObjectStore(objects, DiskCache(place, budget), clock=clock or Clock())
    if (number := store.identity()) is None:
        store.bind(1, new=True)
    else:
        store.bind(number, new=False)
    return store
