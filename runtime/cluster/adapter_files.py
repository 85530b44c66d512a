"""Adapters of a replica: read by digest from the registry's files, and known to the runtime while they are used."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from functools import partial

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.errors import UnknownTask
from tpeft_deploy.formats import canonical
from tpeft_deploy.runtime import Runtime, Source
from tpeft_deploy.runtime.cluster.wire import TaskRef, digest_of

__all__ = ["AdapterNames"]


class AdapterNames:
    """Registers adapters with a runtime when they are first named; thread-safe.

    Args:
        runtime: the runtime.
        read: returns the file of a digest, checked; takes the digest and `of`, a description for messages.
        most: number of adapters that the runtime knows at once; those named longest ago are forgotten.
    """

    def __init__(self, runtime: Runtime, read: Callable[..., bytes], most: int = 100_000) -> None:
        self._runtime = runtime
        self._read = read
        self._most = most
        self._known: OrderedDict[str, str] = OrderedDict()  # name -> digest, the last used last
        self._lock = threading.Lock()

    def know(self, names: Iterable[str]) -> None:
        """Register what is new among names; tasks of the bundle are known already."""
        wanted = [*names]
        with self._lock:
            for name in wanted:
                digest = digest_of(name)
                if digest is None:
                    continue
                if name not in self._known:
                    self._runtime.register({name: Source(digest, partial(self._adapter, digest))})
                self._known[name] = digest
                self._known.move_to_end(name)
            if len(self._known) > self._most:
                self._forget_oldest({*wanted})

    def know_task(self, task: TaskRef | None) -> None:
        """Register what is new of a task or weighted set."""
        if task is not None:
            self.know([task] if isinstance(task, str) else task)

    def last(self, most: int) -> list[tuple[str, str]]:
        """Return the names used last, each with its digest."""
        with self._lock:
            return list(self._known.items())[-most:]

    def _forget_oldest(self, wanted: Set[str]) -> None:
        kept = wanted | self._runtime.pins().keys()
        oldest = next((name for name in self._known if name not in kept), None)
        if oldest is not None:
            del self._known[oldest]
            with suppress(UnknownTask):
                self._runtime.forget([oldest])

    def _adapter(self, digest: str) -> Adapter:
        source = f"adapter {digest[:12]}"
        return canonical.from_bytes(self._read(digest, of=source), source=source)
