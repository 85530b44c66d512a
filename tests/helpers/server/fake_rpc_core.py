"""A core with a tiny numpy model instead of a bundle: two tenants, three tasks, and a key for each role."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.helpers.server.conformance_facts import Facts
from tpeft_deploy.errors import (
    Conflict,
    DeadlineExceeded,
    InputError,
    NotFound,
    ProtocolError,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.tenancy.access import SHARED, Action, Principal, Role, allow
from tpeft_deploy.runtime.server.v2.messages import Document, InferRequest, InferResponse, LoadParameter
from tpeft_deploy.tucker import Array

BUNDLE = "digits"
KEYS = {
    f"{tenant}-{role.value}": Principal(tenant, role, f"id-{tenant}-{role.value}")
    for tenant in ("acme", "globex")
    for role in Role
}
# (tenant, task) -> version -> what its adapter does to the base's answer.
TASKS: Mapping[tuple[str, str], Mapping[str, float]] = {
    (SHARED, "base"): {"1": 0.0},
    ("acme", "alpha"): {"1": 1.0, "2": 2.0},
    ("acme", "beta"): {"1": -3.0},
    ("globex", "gamma"): {"1": 0.5},
}
X = np.arange(12, dtype=np.float32).reshape(4, 3) / 7 - 0.5
WEIGHT = np.array([[1, -2], [0.5, 3], [-1, 0.25]], np.float32)


def answers(x: Array, shift: Array | float) -> dict[str, Array]:
    """Scores of shape [B, 2] and labels of shape [B], for inputs of shape [B, 3]."""
    scores = (x @ WEIGHT + np.float32(1) * np.asarray(shift, np.float32)[..., None] * x[:, :1]).astype(np.float32)
    return {"scores": scores, "label": scores.argmax(1).astype(np.int64)}


def facts(tenant: str = "acme") -> Facts:
    """What the conformance checks are told about this model, for a tenant."""
    visible = {name: versions for (owner, name), versions in TASKS.items() if owner in (SHARED, tenant)}
    return Facts(
        bundle=BUNDLE,
        inputs={"x": X},
        versions={n: {v: answers(X, s) for v, s in versions.items()} for n, versions in visible.items()},
        foreign=next(name for owner, name in TASKS if owner not in (SHARED, tenant)),
        own=next(name for owner, name in TASKS if owner == tenant),
    )


class FakeCore(Service):
    """Only what gRPC calls; further models of no tenant: `echo`, `slow`, `broken`, `metered`, `draining`."""

    special = ("echo", "slow", "broken", "metered", "draining")

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.unloaded: set[tuple[str, str]] = set()
        self.served: dict[str, int] = {}
        self.loads: list[tuple[str, str, Mapping[str, LoadParameter]]] = []
        self.requests: list[InferRequest] = []
        self.go = asyncio.Event()  # what `slow` waits for
        self.running = 0
        self.most_running = 0
        self.cancelled = 0

    def admit(self, principal: Principal) -> None:
        allow(principal, Action.INFER)

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return True

    def authenticate(self, authorization: str | None) -> Principal:
        key = (authorization or "").removeprefix("Bearer ")
        if key in KEYS and key not in self.revoked and authorization == f"Bearer {key}":
            return KEYS[key]
        raise Unauthenticated("request", expected="Authorization: Bearer KEY", got="no such key")

    def server_metadata(self, principal: Principal) -> Document:
        allow(principal, Action.READ)
        return {"name": "tpeft-deploy", "version": "0", "extensions": ["statistics", "model_repository"]}

    def model_metadata(self, principal: Principal, name: str, version: str = "") -> Document:
        versions = self._find(principal, Action.READ, name, version)
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        if name == BUNDLE:
            inputs.append({"name": "adapter", "datatype": "BYTES", "shape": [-1]})
        outputs = [
            {"name": "scores", "datatype": "FP32", "shape": [-1, 2]},
            {"name": "label", "datatype": "INT64", "shape": [-1]},
        ]
        listed = list(versions)
        return {"name": name, "versions": listed, "platform": "onnx_onnxv1", "inputs": inputs, "outputs": outputs}

    def model_config(self, principal: Principal, name: str, version: str = "") -> Document:
        self._find(principal, Action.READ, name, version)
        return {
            "name": name,
            "platform": "onnx_onnxv1",
            "backend": "tpeft",
            "max_batch_size": 8,
            "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [3]}],
            "output": [
                {"name": "scores", "data_type": "TYPE_FP32", "dims": [2]},
                {"name": "label", "data_type": "TYPE_INT64", "dims": []},
            ],
            "dynamic_batching": {"max_queue_delay_microseconds": 2000},
            "version_policy": {"all": {}},
            "instance_group": [{"kind": "KIND_CPU", "count": 1}],
            "parameters": {"adapter_digest": {"string_value": "00"}},
        }

    def model_ready(self, principal: Principal, name: str, version: str = "") -> bool:
        self._find(principal, Action.READ, name, version)
        return not self._is_unloaded(principal, name)

    async def statistics(self, principal: Principal, name: str = "", version: str = "") -> Document:
        names = [name] if name else [*self._names(principal), BUNDLE]
        return {"model_stats": [self._statistics_of(principal, one, version) for one in names]}

    def _statistics_of(self, principal: Principal, name: str, version: str) -> Document:
        versions = list(self._find(principal, Action.READ, name, version))
        count = self.served.get(name, 0)
        spent = {"count": count, "ns": 1000 * count}
        return {
            "name": name,
            "version": version or versions[-1],
            "last_inference": 1,
            "inference_count": count,
            "execution_count": count,
            "inference_stats": dict.fromkeys(("success", "queue", "compute_infer"), spent),
            "batch_stats": [{"batch_size": 1, "compute_infer": spent}],
        }

    async def index(self, principal: Principal, *, ready: bool = False) -> list[Document]:
        allow(principal, Action.READ)
        found: list[Document] = []
        for name in [*self._names(principal), BUNDLE]:
            off = self._is_unloaded(principal, name)
            if not (ready and off):
                state = "UNAVAILABLE" if off else "READY"
                versions = self._find(principal, Action.READ, name, "")
                found += [{"name": name, "version": v, "state": state, "reason": ""} for v in versions]
        return found

    async def load(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        self._find(principal, Action.DEPLOY, name, "")
        self.loads.append((principal.tenant, name, parameters))
        self.unloaded.discard((principal.tenant, name))

    async def unload(self, principal: Principal, name: str, parameters: Mapping[str, LoadParameter]) -> None:
        self._find(principal, Action.DEPLOY, name, "")
        self.unloaded.add((principal.tenant, name))

    async def infer(self, principal: Principal, request: InferRequest) -> InferResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            allow(principal, Action.INFER)
            self.requests.append(request)
            response = await self._infer(principal, request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        self.served[request.model] = self.served.get(request.model, 0) + 1
        return response

    async def _infer(self, principal: Principal, request: InferRequest) -> InferResponse:
        if request.model in self.special:
            return await self._special(request)
        versions = self._find(principal, Action.INFER, request.model, request.version)
        if self._is_unloaded(principal, request.model):
            raise Unavailable(f"model {request.model!r}", problem="it is unloaded")
        x = request.inputs.get("x")
        if x is None or x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != 3:
            raise InputError("input 'x'", expected="FP32 of shape [B, 3]", got="something else")
        shift = list(versions.values())[-1]
        outputs = answers(x, self._shifts(principal, request, len(x)) if request.model in (BUNDLE, "base") else shift)
        names = list(request.outputs) or list(outputs)
        if set(names) - set(outputs):
            raise InputError("outputs", expected=", ".join(outputs), got="others")
        datatypes = [{"scores": "FP32", "label": "INT64"}[name] for name in names]
        version = "" if request.model == BUNDLE else request.version or list(versions)[-1]
        chosen = {name: outputs[name] for name in names}
        return InferResponse(request.model, version, request.id, chosen, datatypes, {"adapter_digest": "00"})

    def _shifts(self, principal: Principal, request: InferRequest, rows: int) -> Array:
        wanted = request.inputs.get("adapter")
        named = ["base"] if wanted is None else [one.decode(errors="replace") for one in wanted.ravel()]
        if request.adapter is not None:
            if wanted is not None and set(named) != {request.adapter}:
                raise ProtocolError("adapter", expected="one word for it", got="two that disagree")
            named = [request.adapter]
        if len(named) not in (1, rows):
            raise InputError("input 'adapter'", expected=f"1 or {rows} elements", got=len(named))
        shifts = [list(self._find(principal, Action.INFER, *_split(name)).values())[-1] for name in named]
        return np.broadcast_to(np.array(shifts, np.float32), rows)

    async def _special(self, request: InferRequest) -> InferResponse:
        if request.model == "slow":
            try:
                await asyncio.wait_for(self.go.wait(), request.timeout)
            except TimeoutError:
                raise DeadlineExceeded("request", problem="its time is over") from None
        if request.model == "broken":
            raise RuntimeError("/secret/path of another tenant")
        if request.model == "metered":
            raise QuotaExceeded("tenant", problem="too many requests", retry_after=2.2)
        if request.model == "draining":
            raise Unavailable("server", problem="it is draining")
        outputs = dict(request.inputs)
        return InferResponse(request.model, "1", request.id, outputs, [_datatype(a) for a in outputs.values()])

    def _names(self, principal: Principal) -> list[str]:
        return [name for owner, name in TASKS if owner in (SHARED, principal.tenant)]

    def _find(self, principal: Principal, action: Action, name: str, version: str) -> Mapping[str, float]:
        allow(principal, action)
        if name == BUNDLE:
            return {"1": 0.0}
        versions = TASKS.get((principal.tenant, name)) or TASKS.get((SHARED, name))
        if versions is None or version not in ("", "current", *versions):
            raise NotFound(f"model {name[:80]!r}", problem="there is none of this name and version")
        if action is Action.DEPLOY and name == "base":
            raise Conflict("model 'base'", problem="it is always there")
        return {version: versions[version]} if version in versions else versions

    def _is_unloaded(self, principal: Principal, name: str) -> bool:
        return (principal.tenant, name) in self.unloaded

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"gRPC asked the core for {name}")


def _split(name: str) -> tuple[str, str]:
    task, _, version = name.partition("@")
    return task, version


def _datatype(array: Array) -> str:
    if array.dtype == object:
        return "BYTES"
    kinds = {"b": "BOOL", "u": "UINT", "i": "INT", "f": "FP"}
    kind = kinds[array.dtype.kind]
    return kind if kind == "BOOL" else f"{kind}{8 * array.dtype.itemsize}"
