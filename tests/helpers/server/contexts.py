"""Contexts of requests without a server."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from tests.helpers.server.fake_rpc_core import FakeCore
from tpeft_deploy.runtime.server.rest.context import HttpContext
from tpeft_deploy.runtime.server.rpc.context import RpcContext
from tpeft_deploy.runtime.server.tenancy.intake import Intake
from tpeft_deploy.runtime.server.v2.limits import RestLimits, RpcLimits


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}


def http_context(method: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> HttpContext:
    return HttpContext(FakeCore(), RestLimits(), Intake(), {"method": method, "headers": headers}, _nothing)


def rpc_context(metadata: Mapping[str, str]) -> RpcContext:
    return RpcContext(FakeCore(), RpcLimits(), Intake(), "ModelInfer", "/inference/ModelInfer", metadata)
