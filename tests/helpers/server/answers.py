"""Requests that are sent by many at once, and what is kept of their answers."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
import torch

from tests.helpers import nets
from tests.helpers.server.audited import Audited, infer_message
from tests.helpers.server.v2_bodies import framed
from tests.helpers.waiting import wait_until
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.tucker import Array

T = TypeVar("T")


def alike(count: int) -> list[Adapter]:
    """Adapters of the same ranks, so that they take the same room."""
    module = nets.conv_net()[0]
    ranks = {"up.weight": (2, 2), "stem.weight": (2, 1, 2, 2)}
    return [nets.adapter_for(module, ranks, seed=300 + number) for number in range(count)]


def base_logits() -> Array:
    with torch.no_grad():
        return np.asarray(nets.conv_net()[0](torch.from_numpy(PIXELS))["logits"])


@dataclass(frozen=True)
class Answer:
    """What came of one request, and when it was under way."""

    sent: float
    received: float
    status: int
    digest: str = ""
    version: str = ""
    logits: Array | None = None


def document(rows: Array, names: Sequence[str] = ()) -> dict[str, Any]:
    size = {"binary_data_size": rows.nbytes}
    inputs: list[dict[str, Any]] = [
        {"name": "pixels", "shape": list(rows.shape), "datatype": "FP32", "parameters": size}
    ]
    if names:
        inputs.append({"name": "adapter", "shape": [len(names)], "datatype": "BYTES", "data": list(names)})
    return {"id": "the same", "inputs": inputs, "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}


def client_of(server: Audited, tenant: str) -> httpx.Client:
    """A client of its own, whose refusals are looked at like all others."""

    def look(answer: httpx.Response) -> None:
        if answer.is_error:
            answer.read()
            server.check_refusal(answer)

    own = server.headers(tenant, "infer")
    return httpx.Client(base_url=server.url, headers=own, verify=False, timeout=120, event_hooks={"response": [look]})


def post(client: httpx.Client, model: str, rows: Array, names: Sequence[str] = ()) -> Answer:
    sent = time.monotonic()
    own = framed(document(rows, names), rows.tobytes())
    answer = client.post(f"/v2/models/{model}/infer", content=own["content"], headers=own["headers"])
    received = time.monotonic()
    if answer.is_error:
        return Answer(sent, received, answer.status_code)
    size = int(answer.headers["inference-header-content-length"])
    told = json.loads(answer.content[:size])
    (output,) = told["outputs"]
    assert (output["name"], output["shape"], told["id"]) == ("logits", [len(rows), 10], "the same")
    logits = np.frombuffer(answer.content[size:], np.float32).reshape(output["shape"])
    return Answer(sent, received, 200, told["parameters"]["adapter_digest"], told.get("model_version", ""), logits)


def over_grpc(server: Audited, tenant: str, model: str) -> Answer:
    sent = time.monotonic()
    call = server.call("ModelInfer", infer_message(model), tenant, "infer")
    received = time.monotonic()
    if call.status != "OK":
        return Answer(sent, received, {"NOT_FOUND": 404}[call.status])
    told = pb.ModelInferResponse.FromString(call.answers[0])
    digest = told.parameters["adapter_digest"].string_param
    logits = np.frombuffer(told.raw_output_contents[0], np.float32).reshape(told.outputs[0].shape)
    return Answer(sent, received, 200, digest, told.model_version, logits)


class Tally:
    """Answers of many clients, counted by status, so that what comes next waits for them and not for a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[int] = Counter()

    def add(self, answer: Answer) -> Answer:
        with self._lock:
            self._counts[answer.status] += 1
        return answer

    def wait(self, more: int, status: int = 200) -> None:
        """Return once so many more answers of a status have come."""
        goal = self._counts[status] + more
        wait_until(lambda: self._counts[status] >= goal, f"{more} more answers of status {status}")


@contextmanager
def meanwhile(over: threading.Event, jobs: Sequence[Callable[[], T]]) -> Iterator[list[Future[T]]]:
    """Jobs that go on until it is over, at the end of the block at the latest; they have ended then."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        try:
            yield [pool.submit(job) for job in jobs]
        finally:
            over.set()
