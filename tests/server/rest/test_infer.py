"""Work stops for clients that went away, and goes on for all others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.helpers.server.contexts import http_context
from tpeft_deploy.runtime.server.context import GONE
from tpeft_deploy.runtime.server.rest.infer import ClientLeft, Watch


def receiving(goes: asyncio.Event) -> Callable[[], Awaitable[dict[str, Any]]]:
    calls: list[str] = ["http.request"]

    async def receive() -> dict[str, Any]:
        if calls:
            return {"type": calls.pop()}
        await goes.wait()
        return {"type": "http.disconnect"}

    return receive


def test_the_work_of_who_leaves_is_cancelled_and_nobody_elses() -> None:
    async def test() -> None:
        watch, goes, stays, stopped = Watch(0.01), asyncio.Event(), asyncio.Event(), asyncio.Event()
        over = asyncio.Event()

        async def work() -> str:
            try:
                await over.wait()
            except asyncio.CancelledError:
                stopped.set()
                raise
            return "answer"

        leaving = asyncio.create_task(watch.cancel_on_disconnect(work(), receiving(goes)))
        staying = asyncio.create_task(watch.cancel_on_disconnect(work(), receiving(stays)))
        await asyncio.sleep(0.05)
        goes.set()
        with pytest.raises(ClientLeft):
            await leaving
        assert stopped.is_set()
        assert not staying.done()
        over.set()
        assert await staying == "answer"

    asyncio.run(asyncio.wait_for(test(), 100))


def test_who_is_answered_at_once_is_not_watched() -> None:
    async def test() -> None:
        watch = Watch(60)

        async def never() -> dict[str, Any]:
            raise AssertionError("nobody should look")

        async def work() -> int:
            await asyncio.sleep(0)
            return 7

        assert await watch.cancel_on_disconnect(work(), never) == 7
        with pytest.raises(ZeroDivisionError):
            await watch.cancel_on_disconnect(fail(), never)

    async def fail() -> None:
        raise ZeroDivisionError

    asyncio.run(asyncio.wait_for(test(), 100))


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def test() -> None:
        watch, goes = Watch(0.01), asyncio.Event()
        before = asyncio.all_tasks()
        task = asyncio.create_task(watch.cancel_on_disconnect(asyncio.Event().wait(), receiving(goes)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before, "a watcher is left"

    asyncio.run(asyncio.wait_for(test(), 100))


def test_an_answer_to_who_left_is_no_failure_of_the_server() -> None:
    """uvloop raises RuntimeError for a connection that is closed."""

    async def send(_: object) -> None:
        raise RuntimeError("unable to perform operation on a closed transport; the handler is closed")

    context = http_context("POST")
    asyncio.run(context.send(send, 200, [], [b"answer"]))
    assert context.status == GONE
