"""What clients of Ray's proxy get when the ingress dies with their requests."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tpeft_deploy.runtime.cluster.proxy_answers import middlewares


def _responding(status: int, headers: list[tuple[bytes, bytes]]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"a body"})

    return app


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """As Ray's proxy for a request of which the ingress died."""


def _answer(app: ASGIApp) -> httpx.Response:
    (own,) = middlewares()

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(own.cls(app, *own.args, **own.kwargs))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/")

    return asyncio.run(ask())


def test_a_request_without_a_response_may_be_sent_again() -> None:
    answer = _answer(_nothing)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "may have been done" in answer.json()["error"]


@pytest.mark.parametrize(
    ("status", "headers", "after"),
    [(200, [], None), (503, [], "1"), (503, [(b"Retry-After", b"7")], "7"), (500, [], None)],
)
def test_responses_stay_as_they_are_but_for_retry_after(
    status: int, headers: list[tuple[bytes, bytes]], after: str | None
) -> None:
    answer = _answer(_responding(status, headers))
    assert (answer.status_code, answer.text) == (status, "a body")
    assert answer.headers.get("retry-after") == after
