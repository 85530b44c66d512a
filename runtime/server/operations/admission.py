"""What an upload must prove before anybody can call it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle import fit
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import AdapterError
from tpeft_deploy.runtime import Runtime, Source
from tpeft_deploy.runtime.server.registry import VersionRecord

__all__ = ["Admission"]

_log = logging.getLogger("tpeft_deploy.server")


class Admission:
    """Checks adapters end to end on the runtime that is to serve them.

    Args:
        bundle: whose targets they have to fit.
        runtime: runs the probe, as it would any request.
        read: a version's adapter, from where it is stored.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, read: Callable[[VersionRecord], Adapter]) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._read = read

    def check(self, record: VersionRecord, adapter: Adapter) -> None:
        """Refuse an adapter that does not fit the base, or answers as the base does.

        Targets, shapes, ranks and finiteness first; then a run on the bundle's example under the runtime's own name
        for it, whose outputs have to be finite and to differ from the base's.  It stays known to the runtime when this
        returns.  Blocks; not for the event loop.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: it does not fit.
            AdapterError: it changes no output, its outputs are not finite, or its numbers cannot be computed with.
            CapacityError: it has no room.
        """
        # Named as clients know it: Bundle.fill would tell them where it lies.
        bundle = self._bundle
        with _refusing(record.task):
            fit.fill(bundle.manifest, adapter, bundle=repr(bundle.manifest.name), base_value=bundle.base_value)
        self._runtime.register({record.key: Source(record.digest, partial(self._read, record))})
        try:
            with _refusing(record.task):
                acts = self._runtime.probe(record.key)
        except BaseException:
            self._runtime.forget([record.key])
            raise
        if not acts:
            self._runtime.forget([record.key])
            raise AdapterError(
                f"register task {record.task!r}",
                expected="outputs that differ from the base's",
                got="the base's own, exactly",
                fix="Its change is zero, or not seen on the bundle's example: was it saved before training?",
            )


@contextmanager
def _refusing(task: str) -> Iterator[None]:
    """Refuse an adapter for what its content makes Python's or numpy's arithmetic raise; the log says where."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        _log.warning("an adapter for task %r cannot be computed with", task, exc_info=error)
        raise AdapterError(
            f"register task {task!r}",
            problem="its tensors cannot be computed with on this base",
            fix="Check what saved it.",
        ) from error
