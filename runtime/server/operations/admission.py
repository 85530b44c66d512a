"""End-to-end check of an upload before it is served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tpeft_deploy.adapter import Adapter
from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import AdapterError
from tpeft_deploy.runtime import Runtime, Source
from tpeft_deploy.runtime.server.registry import VersionRecord

__all__ = ["Admission"]

_log = logging.getLogger("tpeft_deploy.server")


class Admission:
    """End-to-end check of adapters on the runtime that is to serve them.

    Args:
        bundle: bundle with the targets that adapters must fit.
        runtime: runtime that runs the probe like a request.
        read: reads a stored version's adapter.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, read: Callable[[VersionRecord], Adapter]) -> None:
        self._bundle = bundle
        self._runtime = runtime
        self._read = read

    def check(self, record: VersionRecord, adapter: Adapter) -> None:
        """Check that an adapter fits the base, and that its outputs differ from the base's.

        Targets, shapes, ranks and finiteness are checked first; then a run on the bundle's example, under the version's
        key in the runtime, must give finite outputs that differ from the base's.  The version then stays registered
        with the runtime.  Blocks, so it must not run on the event loop.

        Raises:
            UnknownTarget, ShapeError, BaseMismatch: the adapter does not fit the base.
            AdapterError: no output changes, outputs are not finite, or its values make arithmetic fail.
            CapacityError: the device has no room for the adapter.
        """
        with _refusing(record.task):
            self._bundle.fill(adapter, bundle=repr(self._bundle.manifest.name))
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
    """Convert arithmetic errors of Python or NumPy to an AdapterError; the traceback is logged."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        _log.warning("an adapter for task %r cannot be computed with", task, exc_info=error)
        raise AdapterError(
            f"register task {task!r}",
            problem="its tensors cannot be computed with on this base",
            fix="Check what saved it.",
        ) from error
