"""Bodies of inference requests: tensors in JSON, and raw tensors behind a JSON header."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tests.server.conftest import PIXELS


def tensor(array: np.ndarray = PIXELS) -> dict[str, Any]:
    return {"name": "pixels", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}


def framed(document: object, raw: bytes = b"", **headers: str) -> dict[str, Any]:
    text = json.dumps(document).encode()
    return {"content": text + raw, "headers": {"Inference-Header-Content-Length": str(len(text)), **headers}}


RAW = {"name": "pixels", "shape": [1, 1, 12, 14], "datatype": "FP32", "parameters": {"binary_data_size": 672}}
