"""Budgets and threads shared by all protocols."""

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
    """Budgets and threads of a server.

    Attributes:
        memory: memory budget for bodies, tensors and responses.
        staging: disk budget for unfinished uploads.
        offload: threads for decompressing, decoding and encoding.
        requests: limit of concurrent requests per key.
        streams: limit of open gRPC streams per key.
        refused: delay of tenants that send large refused messages.
    """

    memory: ByteBudget = field(default_factory=lambda: ByteBudget(_GIB))
    staging: ByteBudget = field(default_factory=lambda: ByteBudget(4 * _GIB, what="bytes of unfinished uploads"))
    offload: Offload = field(default_factory=Offload)
    requests: Concurrency = field(default_factory=Concurrency)
    streams: Concurrency = field(default_factory=lambda: Concurrency(64, "streams"))
    refused: RefusedBytes = field(default_factory=RefusedBytes)
