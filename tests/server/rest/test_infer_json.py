"""The JSON of inference requests, read once for all that are alike."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tpeft_deploy.errors import ProtocolError, TooLarge
from tpeft_deploy.runtime.server.rest.infer_codec import HEADER, InferenceHeaderCache, decode
from tpeft_deploy.runtime.server.v2.limits import RestLimits


def head(size: int = 8, **fields: Any) -> bytes:
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor]} | fields).encode()


def test_what_comes_again_is_read_once_and_elements_are_each_requests_own() -> None:
    heads = InferenceHeaderCache(RestLimits())
    text = head()
    found = []
    for value in (1.0, 2.0):
        body = text + np.full(2, value, np.float32).tobytes()
        framed = decode("m", "", {HEADER: b"%d" % len(text)}, body, heads)
        found.append(framed)
        assert framed.request.inputs["x"].tolist() == [value, value]
        assert not framed.request.inputs["x"].flags.writeable
    assert found[0].head is found[1].head
    assert len(heads) == 1


def test_what_is_one_request_only_is_not_remembered() -> None:
    heads = InferenceHeaderCache(RestLimits())
    heads.read("m", head(id="mine"))
    heads.read("m", json.dumps({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}).encode())
    heads.read("m", head(parameters={"note": "x" * 5000}))
    for wrong in (head(7), head(-8), head(parameters={"timeout": -1}), b"{", b""):
        with pytest.raises(ProtocolError):
            heads.read("m", wrong)
    assert not len(heads)


def test_a_head_is_remembered_for_all_models_and_still_not_taken_for_another() -> None:
    heads = InferenceHeaderCache(RestLimits())
    text = head(model_name="one")
    body, headers = text + bytes(8), {HEADER: b"%d" % len(text)}
    assert decode("one", "", headers, body, heads).request.model == "one"
    with pytest.raises(ProtocolError, match="model_name"):
        decode("other", "", headers, body, heads)
    assert decode("one", "", headers, body, heads).request.model == "one"


def test_bytes_are_counted_for_each_request() -> None:
    heads = InferenceHeaderCache(RestLimits())
    text = head()
    headers = {HEADER: b"%d" % len(text)}
    decode("m", "", headers, text + bytes(8), heads)
    for rest in (b"", bytes(7), bytes(9)):
        with pytest.raises(ProtocolError, match="bytes"):
            decode("m", "", headers, text + rest, heads)


def test_nobody_fills_the_memory_with_heads() -> None:
    heads = InferenceHeaderCache(RestLimits())
    for number in range(3000):
        heads.read("m", head(parameters={"note": number}))
    assert len(heads) <= 1024
    with pytest.raises(TooLarge):
        InferenceHeaderCache(RestLimits(elements=1)).read("m", head())
