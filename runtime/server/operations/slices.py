"""Long lists in slices: other requests run between slices, and a tenant builds one list at a time."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import orjson

__all__ = ["Turns", "encoded", "in_slices"]

T = TypeVar("T")

SLICE = 32
"""Entries created or encoded in one step of the event loop, which takes less than a millisecond."""


class Turns:
    """Locks that serialise the long lists of each tenant."""

    def __init__(self) -> None:
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Hold the tenant's lock until the block ends."""
        own = self._turns.get(tenant)
        if own is None:
            own = self._turns[tenant] = asyncio.Lock()
        async with own:
            yield


async def in_slices(items: Iterable[T], use: Callable[[T], object]) -> None:
    """Call `use` with each item, and yield to the event loop after each slice."""
    for count, item in enumerate(items, 1):
        use(item)
        if not count % SLICE:
            await asyncio.sleep(0)


async def encoded(document: object) -> Sequence[bytes]:
    """Encode a document as JSON, in parts if it is or contains a long list."""
    if isinstance(document, list) and len(document) > SLICE:
        return await _elements(document)
    if isinstance(document, dict):
        for name, value in document.items():
            if isinstance(value, list) and len(value) > SLICE:
                others = orjson.dumps({other: found for other, found in document.items() if other != name})
                begin = others[:-1] + b"," * (len(document) > 1) + orjson.dumps(name) + b":"
                return [begin, *await _elements(value), b"}"]
    return [orjson.dumps(document)]


async def _elements(values: list[object]) -> list[bytes]:
    parts = [b"["]
    for at in range(0, len(values), SLICE):
        parts.append(b"," * (at > 0) + orjson.dumps(values[at : at + SLICE])[1:-1])
        await asyncio.sleep(0)
    return [b"".join([*parts, b"]"])]
