"""Request limits of both protocols, checked before memory is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from tpeft_deploy.runtime.server.v2.tensors import Bounds

__all__ = ["RestLimits", "RpcLimits"]


@dataclass(frozen=True)
class RestLimits(Bounds):
    """Limits of one HTTP request.

    Attributes:
        body_bytes: maximum body size after decompression.
        json_bytes: maximum size of a request's JSON after decompression, without the raw tensors that follow it.
        upload_bytes: maximum size of an upload.
        json_upload_bytes: maximum size of an upload in JSON, by the repository's load call.
        document_bytes: maximum size of the JSON of other requests.
        tensors: maximum number of inputs, and of outputs, in a request.
    """

    body_bytes: int = 64 << 20
    json_bytes: int = 16 << 20
    upload_bytes: int = 1 << 30
    json_upload_bytes: int = 64 << 20
    document_bytes: int = 1 << 20
    tensors: int = 256


@dataclass(frozen=True)
class RpcLimits(Bounds):
    """Limits of gRPC messages, calls and connections.

    Attributes:
        message_bytes: maximum message size after decompression.
        fields: maximum number of fields in a message and its tensors, counted in the encoded bytes: an empty one takes
            two bytes there and some hundred in memory.
        typed_elements: maximum number of elements in typed contents, each of which becomes an object while it is
            parsed; one of bytes counts as sixteen.
        read_seconds: timeout for reading the message of a call.
        in_flight: maximum number of in-flight requests of one stream.
        connections: maximum number of open connections.
        calls: maximum number of concurrent calls per connection; the client waits beyond it.
        handshake_seconds: timeout until a new connection speaks HTTP/2.
        idle_seconds: time after which a connection without calls is closed.
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
