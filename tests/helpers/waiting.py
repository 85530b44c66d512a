"""Waiting for what other threads and processes do, for as long as a loaded machine needs."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 120.0  # guards against hanging, and says nothing about speed


def wait_until(done: Callable[[], object], what: str = "it") -> None:
    """Return as soon as something is so."""
    until = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < until, f"{what} did not happen within {SECONDS:g} s"
        time.sleep(0.002)
