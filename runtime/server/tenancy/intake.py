"""What all protocols share to take requests in: budgets of bytes, and threads for what is large."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpeft_deploy.runtime.server.tenancy.byte_budget import ByteBudget
from tpeft_deploy.runtime.server.tenancy.concurrency import Concurrency
from tpeft_deploy.runtime.server.tenancy.refused_bytes import RefusedBytes
from tpeft_deploy.runtime.server.v2.offload import Offload

__all__ = ["Intake"]

_GIB = 1 << 30


@dataclass(frozen=True)
class Intake:
    """Budgets and threads of one server.

    Attributes:
        memory: bytes of bodies, tensors and answers in memory.
        staging: bytes of unfinished uploads on disk.
        offload: threads that decompress, decode and encode.
        requests: in progress for each key.
        streams: open over gRPC for each key.
        refused: time that tenants wait for the bytes of refused messages.
    """

    memory: ByteBudget = field(default_factory=lambda: ByteBudget(_GIB))
    staging: ByteBudget = field(default_factory=lambda: ByteBudget(4 * _GIB, what="bytes of unfinished uploads"))
    offload: Offload = field(default_factory=Offload)
    requests: Concurrency = field(default_factory=Concurrency)
    streams: Concurrency = field(default_factory=lambda: Concurrency(64, "streams"))
    refused: RefusedBytes = field(default_factory=RefusedBytes)
