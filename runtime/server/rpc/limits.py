from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What one message over gRPC may ask for, checked before memory is taken for it.

    Attributes:
        message_bytes: size of a message, after decompression.
        elements: of a tensor.
        strings: elements of a BYTES tensor, each of which becomes an object.
        dimensions: of a tensor.
        fields: of a message and its tensors, counted on the wire: an empty one takes two bytes there and some hundred
            in memory.
        in_flight: requests of one stream that are read but not yet answered.
    """

    message_bytes: int = 64 << 20
    elements: int = 1 << 26
    strings: int = 1 << 20
    dimensions: int = 32
    fields: int = 4096
    in_flight: int = 32
