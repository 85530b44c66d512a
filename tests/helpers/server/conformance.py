"""Independent clients against a running server: each check makes a client's whole call list and compares whole outputs.

Every check takes the server's address, a key with role deploy of the tenant that `facts` speak of, and the facts.  It
blocks, and is not for the thread that the server's event loop runs on.  `url` is "host:port" for tritonclient and
gRPC, "http://host:port" for kserve over REST.
"""

from __future__ import annotations

import asyncio
import pickle
import queue
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.helpers.server.conformance_facts import Facts
from tests.helpers.server.conformance_triton import CHECKS, Tested, words

ROOT = Path(__file__).parents[3]


def check_triton_http(url: str, key: str, facts: Facts) -> None:
    """tritonclient.http: binary tensors and JSON ones."""
    with tritonclient.http.InferenceServerClient(url, concurrency=4) as client:
        tested = Tested(client, tritonclient.http, facts, {"Authorization": f"Bearer {key}"}, grpc=False)
        asyncio.run(_all(tested))
        asyncio.run(_all(replace(tested, binary=False)))
        inputs = tested.inputs(facts.inputs)
        sent = [client.async_infer(task, inputs, headers=dict(tested.headers)) for task in facts.versions]
        for task, one in zip(facts.versions, sent, strict=True):
            facts.compare(tested.read(one.get_result()), facts.newest(task)[1])


def check_triton_http_aio(url: str, key: str, facts: Facts) -> None:
    """tritonclient.http.aio: the same, and many at a time."""

    async def run() -> None:
        async with tritonclient.http.aio.InferenceServerClient(url) as client:
            tested = Tested(client, tritonclient.http.aio, facts, {"Authorization": f"Bearer {key}"}, grpc=False)
            await _all(tested)
            await _all(replace(tested, binary=False))
            await _at_once(tested)

    asyncio.run(run())


def check_triton_grpc(url: str, key: str, facts: Facts) -> None:
    """tritonclient.grpc: with answers by callback, and a stream."""
    with tritonclient.grpc.InferenceServerClient(url) as client:
        tested = Tested(client, tritonclient.grpc, facts, {"authorization": f"Bearer {key}"}, grpc=True)
        asyncio.run(_all(tested))
        _check_callbacks(tested)
        _check_stream(tested)


def check_triton_grpc_aio(url: str, key: str, facts: Facts) -> None:
    """tritonclient.grpc.aio: many at a time, and a stream."""

    async def run() -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(url) as client:
            tested = Tested(client, tritonclient.grpc.aio, facts, {"authorization": f"Bearer {key}"}, grpc=True)
            await _all(tested)
            await _at_once(tested)
            await _check_aio_stream(tested)

    asyncio.run(run())


def check_kserve_rest(url: str, key: str, facts: Facts) -> None:
    """kserve's InferenceRESTClient, in a process of its own."""
    _apart("rest", url, key, facts)


def check_kserve_grpc(url: str, key: str, facts: Facts) -> None:
    """kserve's InferenceGRPCClient, in a process of its own."""
    _apart("grpc", url, key, facts)


def _apart(protocol: str, url: str, key: str, facts: Facts) -> None:
    # kserve registers the same messages as tritonclient, so that one process cannot hold both.
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "facts"
        told.write_bytes(pickle.dumps(facts))
        command = [sys.executable, "-m", "tests.helpers.server.conformance_kserve", protocol, url, key, str(told)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def _all(tested: Tested) -> None:
    for check in CHECKS:
        await check(tested)


async def _at_once(tested: Tested) -> None:
    facts = tested.facts
    tasks = list(facts.versions) * 8
    found = await asyncio.gather(*(tested.infer(task, facts.inputs) for task in tasks))
    for task, outputs in zip(tasks, found, strict=True):
        facts.compare(outputs, facts.newest(task)[1])


def _check_callbacks(tested: Tested) -> None:
    facts = tested.facts
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    headers = dict(tested.headers)
    for task, (_, expected) in ((task, facts.newest(task)) for task in facts.versions):
        tested.client.async_infer(
            task, tested.inputs(facts.inputs), lambda result, error: answers.put((result, error)), headers=headers
        )
        result, error = answers.get(timeout=100)
        assert error is None
        facts.compare(tested.read(result), expected)


def _stream_of(tested: Tested) -> list[tuple[str, dict[str, Any]]]:
    """Requests of a stream, wrong ones among them, and the tasks that answer: "" for an error."""
    facts = tested.facts
    inputs = tested.inputs(facts.inputs)
    tasks, _ = facts.mixed()
    requests = [(task, {"model_name": task, "inputs": inputs}) for task in facts.versions]
    requests.append(("", {"model_name": "no-such-model", "inputs": inputs}))
    mixed = tested.inputs({**facts.inputs, "adapter": words(tasks)})
    requests.append(("mixed", {"model_name": facts.bundle, "inputs": mixed}))
    requests.append(("", {"model_name": facts.own, "inputs": inputs, "model_version": "77"}))
    requests = requests * 4
    return [(task, {**one, "request_id": f"n{number}"}) for number, (task, one) in enumerate(requests)]


def _check_answer(tested: Tested, number: int, task: str, result: Any, error: Any) -> None:
    if not task:
        assert isinstance(error, InferenceServerException)
        assert error.message()
        return
    assert error is None
    assert result.get_response().id == f"n{number}"
    facts = tested.facts
    facts.compare(tested.read(result), facts.mixed()[1] if task == "mixed" else facts.newest(task)[1])


def _check_stream(tested: Tested) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    requests = _stream_of(tested)
    tested.client.start_stream(lambda result, error: answers.put((result, error)), headers=dict(tested.headers))
    for _, request in requests:
        tested.client.async_stream_infer(**request, enable_empty_final_response=True)
    for number, (task, _) in enumerate(requests):
        result, error = answers.get(timeout=100)
        _check_answer(tested, number, task, result, error)
        if result is not None:
            assert result.get_response().parameters["triton_final_response"].bool_param
    tested.client.stop_stream()
    # Without a key the stream ends before the first request.
    tested.client.start_stream(lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=100)
    assert result is None
    assert error.status() == "StatusCode.UNAUTHENTICATED"
    tested.client.stop_stream(cancel_requests=True)


async def _check_aio_stream(tested: Tested) -> None:
    requests = _stream_of(tested)

    async def sent() -> AsyncIterator[dict[str, Any]]:
        for _, request in requests:
            yield dict(request)

    number = 0
    async for result, error in tested.client.stream_infer(sent(), headers=dict(tested.headers)):
        _check_answer(tested, number, requests[number][0], result, error)
        number += 1
    assert number == len(requests)

    async def nothing() -> AsyncIterator[dict[str, Any]]:
        # Without a key the stream ends at once; grpc.aio's client calls a write after that an error of its own.
        return
        yield

    with pytest.raises(grpc.RpcError) as caught:
        async for _ in tested.client.stream_infer(nothing()):
            pass
    assert caught.value.code().name == "UNAUTHENTICATED"
