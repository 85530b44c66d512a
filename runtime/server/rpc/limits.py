from __future__ import annotations

from dataclasses import dataclass

from tpeft_deploy.runtime.server.elements import Bounds

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits(Bounds):
    """What one message over gRPC may ask for, checked before memory is taken for it.

    Attributes:
        message_bytes: size of a message, after decompression.
        fields: of a message and its tensors, counted on the wire: an empty one takes two bytes there and some hundred
            in memory.
        in_flight: requests of one stream that are read but not yet answered.
    """

    message_bytes: int = 64 << 20
    fields: int = 4096
    in_flight: int = 32
