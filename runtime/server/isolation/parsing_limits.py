"""Limits of isolated parsing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ParsingLimits"]


@dataclass(frozen=True)
class ParsingLimits:
    """Limits of a pool of readers, and of each upload.

    Attributes:
        readers: number of child processes, each for one upload at a time.
        waiting: maximum number of uploads that wait for a reader.
        tenant_waiting: maximum number of waiting uploads per tenant.
        cpu_seconds: maximum CPU time of one upload.
        wall_seconds: maximum time of one upload, from its dispatch to a reader.
        memory_bytes: maximum address space of one upload, beyond that of an idle reader.
        result_bytes: maximum size of the canonical file.
    """

    readers: int = 2
    waiting: int = 32
    tenant_waiting: int = 8
    cpu_seconds: int = 20
    wall_seconds: float = 60.0
    memory_bytes: int = 2 << 30
    result_bytes: int = 2 << 30
