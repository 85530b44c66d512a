"""One inference as REST and gRPC translate it, both ways, on a service in this process: no ports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.server.conftest import Served
from tpeft_deploy.runtime.server.rest import infer_codec
from tpeft_deploy.runtime.server.rest.infer_codec import InferenceHeaderCache
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.messages import request_of, response_of
from tpeft_deploy.runtime.server.v2.limits import RestLimits, RpcLimits
from tpeft_deploy.runtime.server.v2.tensors import DTYPES
from tpeft_deploy.tucker import Array

__all__ = ["over_grpc", "over_rest"]

_NAMES = {"int64": "INT64", "float32": "FP32"}


def over_rest(
    own: Served, model: str, inputs: Mapping[str, Array], tasks: Sequence[str] = (), outputs: Sequence[str] = ()
) -> dict[str, Array]:
    """The outputs of a request whose tensors are in JSON."""
    tensors: list[dict[str, Any]] = [
        {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype.name], "data": array.tolist()}
        for name, array in inputs.items()
    ]
    if tasks:
        tensors.append({"name": "adapter", "shape": [len(tasks)], "datatype": "BYTES", "data": list(tasks)})
    body = json.dumps({"inputs": tensors, "outputs": [{"name": name} for name in outputs]}).encode()
    framed = infer_codec.decode(model, "", {}, body, InferenceHeaderCache(RestLimits()))
    response = asyncio.run(own.service.infer(own.who("acme", "infer"), framed.request))
    answer = json.loads(infer_codec.encode(response, framed)[1])
    return {
        output["name"]: np.array(output["data"], DTYPES[output["datatype"]]).reshape(output["shape"])
        for output in answer["outputs"]
    }


def over_grpc(
    own: Served, model: str, inputs: Mapping[str, Array], tasks: Sequence[str] = (), outputs: Sequence[str] = ()
) -> dict[str, Array]:
    """The outputs of a request whose tensors are raw bytes."""
    message = pb.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=_NAMES[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    if tasks:
        message.inputs.add(name="adapter", datatype="BYTES", shape=[len(tasks)])
        message.raw_input_contents.append(b"".join(len(t).to_bytes(4, "little") + t.encode() for t in tasks))
    for name in outputs:
        message.outputs.add(name=name)
    request = request_of(pb.ModelInferRequest.FromString(message.SerializeToString()), RpcLimits())
    response = asyncio.run(own.service.infer(own.who("acme", "infer"), request))
    answer = response_of(response, raw=True)
    return {
        output.name: np.frombuffer(raw, DTYPES[output.datatype]).reshape(tuple(output.shape))
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
