"""A client that leaves while a message is sent to it: no internal error, whichever notices first."""

from __future__ import annotations

import asyncio

import pytest

from tests.helpers.server.closed_context import ClosedContext, Details
from tests.helpers.server.fake_rpc_core import FakeCore
from tests.helpers.server.rpc_serving import infer
from tpeft_deploy.errors import QuotaExceeded
from tpeft_deploy.runtime.server.context import GONE, RequestContext
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.rpc.sending import abort
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.statuses import status_of


@pytest.mark.parametrize("rpc", ["ModelInfer", "ModelStreamInfer"])
def test_a_write_that_finds_the_call_ended_is_a_client_that_left(rpc: str, caplog: pytest.LogCaptureFixture) -> None:
    exchanges: list[RequestContext] = []
    servicer = Servicer(FakeCore(), RpcLimits(), exchanges.append)
    context = ClosedContext([infer().SerializeToString()])
    handler = servicer.service(Details(f"/{SERVICE}/{rpc}"))
    asyncio.run(asyncio.wait_for(handler.stream_stream(None, context), 100))
    assert not context.aborted
    assert not caplog.records
    # A message of a stream is answered before its answer is sent.
    assert [one.status for one in exchanges] == [GONE if rpc == "ModelInfer" else 200]


def test_a_status_for_a_call_that_ended_is_no_error() -> None:
    context = ClosedContext([])
    asyncio.run(abort(context, status_of(QuotaExceeded("requests", expected="10 a second", got="11"))))
    assert context.aborted
