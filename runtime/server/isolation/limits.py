"""Limits of reading uploads."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of a pool of readers, and of each upload.

    Attributes:
        readers: number of child processes, each for one upload at a time.
        waiting: number of uploads that may wait for a reader.
        tenant_waiting: number of those from one tenant.
        cpu_seconds: processor time of one upload.
        wall_seconds: time of one upload from the moment a reader begins on it.
        memory_bytes: address space of one upload, beyond that of an idle reader.
        result_bytes: size of the canonical file.
    """

    readers: int = 2
    waiting: int = 32
    tenant_waiting: int = 8
    cpu_seconds: int = 20
    wall_seconds: float = 60.0
    memory_bytes: int = 2 << 30
    result_bytes: int = 2 << 30
