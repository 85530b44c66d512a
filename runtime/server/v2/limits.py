"""What a request over HTTP may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from tpeft_deploy.runtime.server.v2.tensors import Bounds

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits(Bounds):
    """What one request over HTTP may ask for, checked before memory is taken for it.

    Attributes:
        body_bytes: of a request, after decompression.
        json_bytes: of the JSON of a request, after decompression; tensors behind it are not counted.
        upload_bytes: of an upload.
        json_upload_bytes: of an upload in JSON, by the repository's load call.
        document_bytes: of the JSON of other requests.
        tensors: inputs and outputs that a request may name.
    """

    body_bytes: int = 64 << 20
    json_bytes: int = 16 << 20
    upload_bytes: int = 1 << 30
    json_upload_bytes: int = 64 << 20
    document_bytes: int = 1 << 20
    tensors: int = 256
