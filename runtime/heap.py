"""Garbage collection of a process that serves."""

from __future__ import annotations

import gc

__all__ = ["settle_heap"]

_COLLECTED = 20_000  # new objects until the youngest are collected


def settle_heap() -> None:
    """Leave what is there out of later collections, and collect less often; call it when the process is ready."""
    # A full collection goes through all that was imported, and stops every request for 60 ms: what is there stays.
    # Requests in flight outlive collections that are as frequent as Python's, which lead to a full one each second.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED, 20, 20)
