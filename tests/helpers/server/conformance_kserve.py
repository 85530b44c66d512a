"""kserve's clients against a running server; run in a process of its own by `conformance.check_kserve_*`.

python -m tests.helpers.server.conformance_kserve rest|grpc URL KEY FACTS
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from kserve.utils.numpy_codec import from_np_dtype

from tests.helpers.server.conformance_facts import Facts
from tpeft_deploy.tucker import Array


def request_of(
    model: str, arrays: Mapping[str, Array], *, binary: bool, version: str = "", outputs: list[str] | None = None
) -> Any:
    """A request with an id of the model's name."""
    inputs = []
    for name, array in arrays.items():
        tensor = InferInput(name, list(array.shape), from_np_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    options = {"binary_data": binary}
    asked = None if outputs is None else [RequestedOutput(name, parameters=dict(options)) for name in outputs]
    parameters = {"binary_data_output": binary} if asked is None else {}
    return InferRequest(
        model, inputs, f"id-{model}", model_version=version, request_outputs=asked, parameters=parameters
    )


def read(response: Any) -> dict[str, Array | None]:
    return {output.name: output.as_numpy() for output in response.outputs}


async def check_calls(infer: Any, facts: Facts, *, binary: bool) -> None:
    """Every task and rows with tasks of their own; kserve has no versions in its paths."""
    for task in facts.versions:
        version, expected = facts.newest(task)
        response = await infer(task, request_of(task, facts.inputs, binary=binary))
        facts.compare(read(response), expected)
        assert response.model_name == task
        assert response.model_version in (version, None)  # over REST this client drops it
        assert response.id == f"id-{task}"
        names = list(expected)[::-1]
        response = await infer(task, request_of(task, facts.inputs, binary=binary, outputs=names))
        facts.compare(read(response), {name: expected[name] for name in names})
    tasks, expected = facts.mixed()
    mixed = {**facts.inputs, "adapter": np.array([name.encode() for name in tasks], object)}
    facts.compare(read(await infer(facts.bundle, request_of(facts.bundle, mixed, binary=binary))), expected)


async def check_rest(url: str, key: str, facts: Facts) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))

    async def infer(model: str, request: Any) -> Any:
        return await client.infer(url, request, model_name=model, headers=dict(headers))

    try:
        assert await client.is_server_live(url, headers=headers) is True
        assert await client.is_server_ready(url, headers=headers) is True
        for model in [*facts.versions, facts.bundle]:
            assert await client.is_model_ready(url, model, headers=headers) is True
        await check_calls(infer, facts, binary=True)
        await check_calls(infer, facts, binary=False)
        for model in ("no-such-model", facts.foreign):
            await _refused_rest(404, infer(model, request_of(model, facts.inputs, binary=True)))
        headers.clear()
        await _refused_rest(401, infer(facts.own, request_of(facts.own, facts.inputs, binary=True)))
    finally:
        await client.close()


async def _refused_rest(status: int, awaited: Any) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        await awaited
    assert caught.value.response.status_code == status
    assert caught.value.response.json()["error"]


async def check_grpc(url: str, key: str, facts: Facts) -> None:
    headers = (("authorization", f"Bearer {key}"),)
    async with InferenceGRPCClient(url, retries=0) as client:

        async def infer(model: str, request: Any) -> Any:
            return await client.infer(request, headers=headers)

        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True
        for model in [*facts.versions, facts.bundle]:
            assert await client.is_model_ready(model, headers=headers) is True
        await check_calls(infer, facts, binary=True)
        await check_calls(infer, facts, binary=False)
        for task, versions in facts.versions.items():
            for version, expected in versions.items():
                request = request_of(task, facts.inputs, binary=True, version=version)
                facts.compare(read(await client.infer(request, headers=headers)), expected)
        for model in ("no-such-model", facts.foreign):
            request = request_of(model, facts.inputs, binary=True)
            await _refused_grpc("NOT_FOUND", client.infer(request, headers=headers))
            await _refused_grpc("NOT_FOUND", client.is_model_ready(model, headers=headers))
        request = request_of(facts.own, facts.inputs, binary=True)
        await _refused_grpc("UNAUTHENTICATED", client.infer(request))


async def _refused_grpc(code: str, awaited: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await awaited
    assert caught.value.code().name == code


def main() -> None:
    protocol, url, key, told = sys.argv[1:]
    facts: Facts = pickle.loads(Path(told).read_bytes())
    asyncio.run({"rest": check_rest, "grpc": check_grpc}[protocol](url, key, facts))


if __name__ == "__main__":
    main()
