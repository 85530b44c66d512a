"""Memory of a process that serves: garbage collection, and what malloc keeps."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress

__all__ = ["settle_heap"]

_COLLECTED = 20_000  # new objects until the youngest are collected
_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MAPPED = 32 << 20  # bytes, the largest that glibc takes; what is larger goes back to the system at once
_KEPT = 64 << 20  # bytes
_OWN = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


def settle_heap() -> None:
    """Leave what is there out of later collections, and collect less often; call it when the process is ready.

    Beyond that, memory of freed tensors is kept, unless the environment sets glibc's thresholds.
    """
    # A full collection goes through all that was imported, and stops every request for 60 ms: what is there stays.
    # Requests in flight outlive collections that are as frequent as Python's, which lead to a full one each second.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED, 20, 20)
    if _OWN.isdisjoint(os.environ):
        _keep_freed()


def _keep_freed() -> None:
    # Each page that malloc has given back is cleared by the system when it is next used: half of the time in which a
    # tensor of some megabytes is received.
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MAP, _MAPPED)
        mallopt(_TRIM, _KEPT)
