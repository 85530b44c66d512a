"""Streams and connections over gRPC: idle ones are in nobody's way, and there are so many of each."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_server.rpc_calls import MIB, Context, answered, infer
from tests.helpers.server.fake_rpc_core import FakeCore
from tests.helpers.server.rpc_serving import run, talking
from tpeft_deploy.errors import ServerError
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc import reading
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.tenancy.intake import ByteBudget, Concurrency, Hold, Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["acme", "globex", "third"]),
            st.sampled_from(["lend", "take", "keep", "close"]),
            st.integers(1, 12),
        ),
        max_size=40,
    )
)
def test_what_is_lent_never_refuses_a_request(steps: list[tuple[str, str, int]]) -> None:
    """A budget with holds that are lent refuses exactly what one without them would."""
    budget = ByteBudget(20, 12)
    lent: list[Hold] = []
    kept: list[Hold] = []
    for tenant, what, size in steps:
        if what in {"lend", "take"}:
            mine = sum(hold.size for hold in kept if hold.tenant == tenant)
            all_ = sum(hold.size for hold in kept)
            before = [*lent]
            hold = budget.hold(tenant)
            try:
                hold.take(size)
            except ServerError:
                assert mine + size > 12 or all_ + size > 20
                assert lent == before, "none ends in vain"
                continue
            assert mine + size <= 12
            assert all_ + size <= 20
            if what == "lend":
                lent.append(hold)
                hold.lend(lambda hold=hold: lent.remove(hold))  # type: ignore[misc]
            else:
                kept.append(hold)
        elif what == "keep" and lent:
            kept.append(lent.pop(size % len(lent)))
            kept[-1].keep()
        elif kept:
            kept.pop(size % len(kept)).close()
        assert budget.used == sum(hold.size for hold in lent + kept) <= 20
        for name in ("acme", "globex", "third"):
            assert budget.used_by(name) == sum(hold.size for hold in lent + kept if hold.tenant == name) <= 12


def test_the_longest_idle_goes_first_and_the_tenants_own_before_others() -> None:
    budget = ByteBudget(20, 12)
    ended: list[str] = []
    for name, tenant in (("other", "globex"), ("first", "acme"), ("second", "acme")):
        hold = budget.hold(tenant)
        hold.take(4)
        hold.lend(lambda name=name: ended.append(name))  # type: ignore[misc]
    budget.hold("acme").take(8)
    assert ended == ["first"]
    budget.hold("third").take(6)
    assert ended == ["first", "other"]


def streaming(servicer: Servicer, key: str = "acme-infer") -> tuple[Context, asyncio.Task[str]]:
    context = Context()
    return context, asyncio.create_task(answered(servicer, context, "ModelStreamInfer", key))


async def settle(tasks: int = 200) -> None:
    for _ in range(tasks):
        await asyncio.sleep(0)


def test_idle_streams_cause_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_AT_ONCE", 0.0)

    async def test() -> None:
        budgets = Intake(ByteBudget(12 * MIB, 8 * MIB))
        servicer = Servicer(FakeCore(), RpcLimits(message_bytes=2 * MIB), None, budgets)
        streams = []
        for key in ["acme-infer"] * 8 + ["globex-infer"] * 8:
            streams.append(streaming(servicer, key))
            await settle()
        assert budgets.memory.used == 12 * MIB
        message = infer().SerializeToString()
        assert await answered(servicer, Context(message)) == "OK"
        for tenant in ("acme", "globex", "third"):
            with budgets.memory.hold(tenant) as request:
                request.take(8 * MIB)
        await settle()
        ended = [task for _, task in streams if task.done()]
        assert [await task for task in ended] == ["UNAVAILABLE"] * len(ended)
        assert ended
        for context, task in streams:
            context.sent.set()
            assert await task in {"OK", "UNAVAILABLE"}
        assert budgets.memory.used == 0
        assert budgets.streams.used_by("acme-infer") == 0

    run(test())


def test_calls_without_a_key_are_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_AT_ONCE", 0.0)

    async def test() -> None:
        budgets = Intake(ByteBudget(8 * MIB, 8 * MIB))
        servicer = Servicer(FakeCore(), RpcLimits(message_bytes=2 * MIB), None, budgets)
        silent = [asyncio.create_task(answered(servicer, Context(), "ServerLive")) for _ in range(9)]
        await settle()
        with budgets.memory.hold("acme") as request:
            request.take(8 * MIB)
        await settle()
        assert [await task for task in silent] == ["UNAVAILABLE"] * 9
        assert budgets.memory.used == 0

    run(test())


def test_a_key_has_so_many_streams_and_requests() -> None:
    async def test() -> None:
        budgets = Intake(requests=Concurrency(1), streams=Concurrency(2, "streams"))
        async with talking(intake=budgets) as server:
            open_ = [server.stream() for _ in range(2)]
            for stream in open_:
                await stream.write(infer().SerializeToString())
                answer = pb.ModelStreamInferResponse.FromString(await stream.read())
                assert not answer.error_message
            third = server.stream()
            assert (await third.code()).name == "RESOURCE_EXHAUSTED"
            assert "2 streams of a key" in await third.details()
            assert await server.status("ModelInfer", infer()) == "OK"
            other = server.stream("globex-deploy")
            await other.write(infer().SerializeToString())
            assert "none of this name" in pb.ModelStreamInferResponse.FromString(await other.read()).error_message
            budgets.requests.enter("id-acme-deploy")
            assert await server.status("ModelInfer", infer()) == "RESOURCE_EXHAUSTED"
            await open_[0].write(infer().SerializeToString())
            told = pb.ModelStreamInferResponse.FromString(await open_[0].read())
            assert "1 requests of a key" in told.error_message
            budgets.requests.leave("id-acme-deploy")
            await open_[0].done_writing()
            assert (await open_[0].code()).name == "OK"
            fourth = server.stream()
            await fourth.write(infer().SerializeToString())
            assert not pb.ModelStreamInferResponse.FromString(await fourth.read()).error_message
            for stream in (open_[1], other, fourth):
                stream.cancel()

    run(test())


def test_connections_that_say_nothing_end_and_no_more_are_taken_than_may_be() -> None:
    async def test() -> None:
        async with talking(RpcLimits(connections=4, handshake_seconds=0.3)) as server:
            address = ("127.0.0.1", server.server.port)
            with contextlib.ExitStack() as stack:
                silent = [stack.enter_context(socket.create_connection(address, timeout=100)) for _ in range(8)]

                def ended(one: socket.socket) -> int:
                    size = 0
                    with contextlib.suppress(ConnectionError):
                        while data := one.recv(1000):
                            size += len(data)
                    return size

                heard = await asyncio.gather(*(asyncio.to_thread(ended, one) for one in silent))
                assert sum(size > 0 for size in heard) <= 4
            while True:  # the channel tries again by itself
                call: Any = server.channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
                with contextlib.suppress(grpc.RpcError):
                    await call(b"", timeout=100, wait_for_ready=True)
                    break

    run(test())


def test_metadata_has_its_limit() -> None:
    async def test() -> None:
        async with talking() as server:
            assert await server.status("ServerLive", metadata=(("x", "y" * 8000),)) == "OK"
            assert await server.status("ServerLive", metadata=(("x", "y" * 20_000),)) == "RESOURCE_EXHAUSTED"

    run(test())
