"""The calls that all four of tritonclient's clients have, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.helpers.server.conformance_facts import Facts, first_rows
from tpeft_deploy.tucker import Array


@dataclass(frozen=True)
class Tested:
    """A client and how to speak to it.

    Attributes:
        client: of tritonclient.
        module: that it is from, with InferInput and InferRequestedOutput.
        facts: about the server.
        headers: with the key.
        grpc: whether answers are messages, and errors gRPC's.
        binary: whether tensors are binary; gRPC's always are.
    """

    client: Any
    module: Any
    facts: Facts
    headers: Mapping[str, str]
    grpc: bool
    binary: bool = True

    async def call(self, name: str, *args: object, **options: object) -> Any:
        """What a method answers, with the key; awaited if the client is asynchronous."""
        answer = getattr(self.client, name)(*args, headers=dict(self.headers), **options)
        return await answer if inspect.isawaitable(answer) else answer

    async def document(self, name: str, *args: object) -> Any:
        """The same for a document, as plain values; gRPC's whole numbers of 64 bits are strings in them."""
        return await (self.call(name, *args, as_json=True) if self.grpc else self.call(name, *args))

    def inputs(self, arrays: Mapping[str, Array]) -> list[Any]:
        made = []
        for name, array in arrays.items():
            tensor = self.module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array, *([] if self.grpc else [self.binary]))
            made.append(tensor)
        return made

    def outputs(self, names: list[str]) -> list[Any]:
        options = {} if self.grpc else {"binary_data": self.binary}
        return [self.module.InferRequestedOutput(name, **options) for name in names]

    async def infer(self, model: str, arrays: Mapping[str, Array], **options: Any) -> dict[str, Array | None]:
        if not self.grpc and not self.binary and "outputs" not in options:
            options["outputs"] = self.outputs(list(self.facts.newest("base")[1]))
        return self.read(await self.call("infer", model, self.inputs(arrays), **options))

    def read(self, result: Any) -> dict[str, Array | None]:
        response = result.get_response()
        names = [one.name for one in response.outputs] if self.grpc else [one["name"] for one in response["outputs"]]
        return {name: result.as_numpy(name) for name in names}

    async def refused(self, http: str, grpc: str, name: str, *args: object, **options: object) -> str:
        """The text of an error that has to come, with the status that it has to have."""
        with pytest.raises(InferenceServerException) as caught:
            await self.call(name, *args, **options)
        assert caught.value.status() == (f"StatusCode.{grpc}" if self.grpc else http), caught.value
        text = str(caught.value.message())
        assert text
        assert "decoding the response" not in text
        return text


def words(names: list[str]) -> Array:
    return np.array([name.encode() for name in names], object)


async def check_health_and_metadata(tested: Tested) -> None:
    facts = tested.facts
    assert await tested.call("is_server_live") is True
    assert await tested.call("is_server_ready") is True
    server = await tested.document("get_server_metadata")
    assert server["name"]
    assert server["version"]
    assert set(facts.extensions) <= set(server["extensions"])
    for model in [*facts.versions, facts.bundle]:
        versions = list(facts.versions.get(model, ()))
        assert await tested.call("is_model_ready", model) is True
        for version in versions:
            assert await tested.call("is_model_ready", model, version) is True
        _check_metadata(facts, await tested.document("get_model_metadata", model), model, versions)
        config = await tested.document("get_model_config", model)
        config = config.get("config", config)
        assert config["name"] == model
        assert config["platform"] == facts.platform
        named = {one["name"] for one in config["input"]} - {"adapter"}
        assert named == set(facts.inputs)
        assert {one["name"] for one in config["output"]} == set(facts.newest("base")[1])


def _check_metadata(facts: Facts, document: Any, model: str, versions: list[str]) -> None:
    assert document["name"] == model
    assert document["platform"] == facts.platform
    if versions:
        assert document["versions"] == versions
    inputs = {one["name"]: one for one in document["inputs"]}
    assert inputs.keys() - {"adapter"} == facts.inputs.keys()
    assert ("adapter" in inputs) == (model == facts.bundle)
    for name, array in facts.inputs.items():
        _check_tensor(inputs[name], array)
    expected = facts.newest("base")[1]
    assert [one["name"] for one in document["outputs"]] == list(expected)
    for one in document["outputs"]:
        _check_tensor(one, expected[one["name"]])


def _check_tensor(document: Any, array: Array) -> None:
    assert document["datatype"] == np_to_triton_dtype(array.dtype)
    shape = [int(size) for size in document["shape"]]
    assert len(shape) == array.ndim
    assert shape[0] == -1
    assert all(size in (-1, real) for size, real in zip(shape, array.shape, strict=True))


async def check_inference(tested: Tested) -> None:
    """Every task, every version, one row, some outputs, and rows with tasks of their own."""
    facts = tested.facts
    for task, versions in facts.versions.items():
        newest = facts.newest(task)[1]
        facts.compare(await tested.infer(task, facts.inputs), newest)
        facts.compare(await tested.infer(task, first_rows(facts.inputs, 1)), first_rows(newest, 1))
        for version, expected in versions.items():
            facts.compare(await tested.infer(task, facts.inputs, model_version=version), expected)
        names = list(newest)[::-1]
        some = await tested.infer(task, facts.inputs, outputs=tested.outputs(names))
        facts.compare(some, {name: newest[name] for name in names})
        one = await tested.infer(task, facts.inputs, outputs=tested.outputs(names[:1]))
        facts.compare(one, {name: newest[name] for name in names[:1]})
        for model in ("base", facts.bundle):
            chosen = await tested.infer(model, facts.inputs, parameters={"adapter": task})
            facts.compare(chosen, newest)
        whole = {**facts.inputs, "adapter": words([task])}
        facts.compare(await tested.infer(facts.bundle, whole), newest)
    tasks, expected = facts.mixed()
    facts.compare(await tested.infer(facts.bundle, {**facts.inputs, "adapter": words(tasks)}), expected)
    shapes = await tested.call("infer", facts.own, tested.inputs(facts.inputs), request_id="r-7", timeout=30_000_000)
    response = shapes.get_response()
    assert (response.id if tested.grpc else response["id"]) == "r-7"
    assert (response.model_name if tested.grpc else response["model_name"]) == facts.own
    assert (response.model_version if tested.grpc else response["model_version"]) == facts.newest(facts.own)[0]
    for algorithm in ("gzip", "deflate"):
        key = "compression_algorithm" if tested.grpc else "request_compression_algorithm"
        options = {key: algorithm} if tested.grpc else {key: algorithm, "response_compression_algorithm": algorithm}
        facts.compare(await tested.infer(facts.own, facts.inputs, **options), facts.newest(facts.own)[1])


async def check_repository(tested: Tested) -> None:
    """Index, statistics, unload and load."""
    facts = tested.facts
    before = await _counted(tested, facts.own)
    await tested.infer(facts.own, facts.inputs)
    assert await _counted(tested, facts.own) > before
    everything = (await tested.document("get_inference_statistics"))["model_stats"]
    assert facts.own in {one["name"] for one in everything}
    assert facts.foreign not in {one["name"] for one in everything}
    index = await _indexed(tested)
    assert set(facts.versions) <= set(index)
    assert facts.foreign not in index
    assert index[facts.own] == {"READY"}
    await tested.call("unload_model", facts.own)
    assert (await _indexed(tested))[facts.own] == {"UNAVAILABLE"}
    assert await tested.call("is_model_ready", facts.own) is False
    await tested.refused("503", "UNAVAILABLE", "infer", facts.own, tested.inputs(facts.inputs))
    await tested.call("load_model", facts.own)
    assert (await _indexed(tested))[facts.own] == {"READY"}
    facts.compare(await tested.infer(facts.own, facts.inputs), facts.newest(facts.own)[1])


async def _indexed(tested: Tested) -> dict[str, set[str]]:
    document = await tested.document("get_model_repository_index")
    found: dict[str, set[str]] = {}
    for one in document["models"] if tested.grpc else document:
        found.setdefault(one["name"], set()).add(one["state"])
    return found


async def _counted(tested: Tested, model: str) -> int:
    stats = (await tested.document("get_inference_statistics", model))["model_stats"]
    assert {one["name"] for one in stats} == {model}
    return sum(int(one.get("inference_count", 0)) for one in stats)


async def check_refusals(tested: Tested) -> None:
    """Wrong requests, other tenants' models, and what this server has not."""
    facts = tested.facts
    inputs = tested.inputs(facts.inputs)
    absent = await tested.refused("404", "NOT_FOUND", "infer", "no-such-model", inputs)
    foreign = await tested.refused("404", "NOT_FOUND", "infer", facts.foreign, inputs)
    assert foreign.replace(facts.foreign, "no-such-model") == absent
    for name in ("get_model_metadata", "get_model_config", "get_inference_statistics", "load_model", "unload_model"):
        await tested.refused("404", "NOT_FOUND", name, facts.foreign)
    await tested.refused("404", "NOT_FOUND", "infer", facts.own, inputs, model_version="77")
    await tested.refused("400", "INVALID_ARGUMENT", "infer", facts.own, inputs[:-1])
    wrong = {name: array.astype(np.float64) for name, array in facts.inputs.items()}
    await tested.refused("400", "INVALID_ARGUMENT", "infer", facts.own, tested.inputs(wrong))
    mixed = tested.inputs({**facts.inputs, "adapter": words([facts.own])})
    await tested.refused("400", "INVALID_ARGUMENT", "infer", facts.bundle, mixed, parameters={"adapter": "base"})
    for name, args in unsupported():
        await tested.refused("404", "UNIMPLEMENTED", name, *args)
    stranger = Tested(tested.client, tested.module, facts, {}, tested.grpc, tested.binary)
    await stranger.refused("401", "UNAUTHENTICATED", "infer", facts.own, inputs)
    await stranger.refused("401", "UNAUTHENTICATED", "get_model_metadata", facts.own)


def unsupported() -> Iterator[tuple[str, tuple[object, ...]]]:
    """Calls of tritonclient that this server does not have, with arguments."""
    yield "get_system_shared_memory_status", ()
    yield "register_system_shared_memory", ("region", "/key", 8)
    yield "unregister_system_shared_memory", ("region",)
    yield "get_cuda_shared_memory_status", ()
    yield "register_cuda_shared_memory", ("region", b"aGFuZGxl", 0, 8)
    yield "unregister_cuda_shared_memory", ("region",)
    yield "get_trace_settings", ()
    yield "update_trace_settings", (None, {"trace_level": "OFF"})
    yield "get_log_settings", ()
    yield "update_log_settings", ({"log_info": True},)


CHECKS: tuple[Callable[[Tested], Any], ...] = (
    check_health_and_metadata,
    check_inference,
    check_repository,
    check_refusals,
)
