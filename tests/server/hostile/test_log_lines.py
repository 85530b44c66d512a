"""What clients write is bounded wherever the server tells of it."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest

from tests.helpers.server.contexts import http_context, rpc_context
from tpeft_deploy.runtime.server.context import RequestContext
from tpeft_deploy.runtime.server.telemetry.access_log import AccessLog
from tpeft_deploy.runtime.server.telemetry.log_lines import LogLines
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role

LONG = "x" * 5_000_000


def line(exchange: RequestContext) -> str:
    stream = io.StringIO()
    lines = LogLines(stream)
    AccessLog(lines).write(exchange)
    lines.close(60)
    return stream.getvalue()


@pytest.mark.parametrize("given", [LONG, "two\nlines", "\x1b[31m", "\udce4", "ä", "x" * 129])
def test_an_id_over_grpc_that_could_do_harm_is_replaced(given: str) -> None:
    account = rpc_context({"x-request-id": given, "traceparent": LONG})
    assert account.request_id.isascii()
    assert len(account.request_id) <= 128
    assert len(account.traceparent) <= 128
    assert account.request_id == account.request_id
    account.describe(SimpleNamespace(model_name=LONG, id=given))
    assert given not in line(account)
    assert len(line(account)) < 1000


def test_an_id_over_grpc_that_is_harmless_stays() -> None:
    account = rpc_context({"x-request-id": "outer"})
    assert account.request_id == "outer"
    account.describe(SimpleNamespace(model_name="mood", id="inner"))
    assert json.loads(line(account))["request"] == "inner"


def test_every_text_of_a_request_over_http_is_bounded() -> None:
    headers = [(b"x-request-id", LONG.encode()), (b"traceparent", LONG.encode())]
    context = http_context(LONG, headers)
    context.task = LONG
    context.caller = Principal(LONG, Role("infer"), LONG)
    assert len(context.traceparent) <= 128
    assert len(line(context)) < 2000
