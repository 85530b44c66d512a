"""What a request over HTTP may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from tpeft_deploy.runtime.server.elements import Bounds

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits(Bounds):
    """What one request over HTTP may ask for, checked before memory is taken for it.

    Attributes:
        body_bytes: of a request, after decompression.
        upload_bytes: of an upload.
        document_bytes: of the JSON of other requests.
        tensors: inputs and outputs that a request may name.
    """

    body_bytes: int = 64 << 20
    upload_bytes: int = 1 << 30
    document_bytes: int = 1 << 20
    tensors: int = 256
