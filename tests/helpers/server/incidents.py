"""Requests and checks that the tests of several incidents share."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import numpy as np

from tests.helpers.server.audited import Audited
from tests.helpers.server.v2_bodies import tensor
from tpeft_deploy import Adapter
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.tucker import Array


def logits(answer: httpx.Response, digest: str, version: str = "1") -> Array:
    """The one output of an answer, all the rest of which is as it has to be."""
    assert answer.status_code == 200, answer.text
    document = answer.json()
    (output,) = document["outputs"]
    assert document["parameters"] == {"adapter_digest": digest}
    assert document["model_version"] == version
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [4, 10])
    return np.array(output["data"], np.float32).reshape(4, 10)


def ask(server: Audited, name: str = "mood") -> httpx.Response:
    return server.ask("POST", f"/v2/models/{name}/infer", role="infer", json={"inputs": [tensor()]})


def digest_of(adapter: Adapter) -> str:
    return hashlib.sha256(adapter.to_bytes()).hexdigest()


def message_for(rpc: str, name: str = "nothing") -> Any:
    if rpc in {"ModelInfer", "ModelStreamInfer"}:
        return pb.ModelInferRequest(model_name=name)
    if rpc.startswith("RepositoryModel"):
        return pb.RepositoryModelLoadRequest(model_name=name)
    return pb.ModelReadyRequest(name=name) if rpc.startswith("Model") else pb.ServerLiveRequest()
