from __future__ import annotations

from dataclasses import dataclass

from tpeft_deploy.runtime.server.v2.tensors import Bounds

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits(Bounds):
    """What one message over gRPC may ask for, checked before memory is taken for it.

    Attributes:
        message_bytes: size of a message, after decompression.
        fields: of a message and its tensors, counted on the wire: an empty one takes two bytes there and some hundred
            in memory.
        typed_elements: elements of a message's typed contents, each of which becomes an object on its way; one of
            bytes counts as sixteen.
        read_seconds: time that reading the message of a call may take.
        in_flight: requests of one stream that are read but not yet answered.
        connections: open at once.
        calls: open at once on one connection; the client waits when there are more.
        handshake_seconds: time that a new connection may take until it speaks HTTP/2.
        idle_seconds: time that a connection without calls stays open.
    """

    message_bytes: int = 64 << 20
    fields: int = 4096
    typed_elements: int = 1 << 20
    read_seconds: float = 60.0
    in_flight: int = 32
    connections: int = 1000
    calls: int = 256
    handshake_seconds: float = 10.0
    idle_seconds: float = 60.0
