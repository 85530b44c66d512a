"""Over gRPC room is taken before a message is received, and nothing of what is refused stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.hostile_server.rpc_calls import MIB, Context, answered, infer
from tests.helpers.server.fake_rpc_core import FakeCore
from tests.helpers.server.rpc_serving import talking
from tpeft_deploy.errors import ProtocolError, QuotaExceeded, TooLarge
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc import reading
from tpeft_deploy.runtime.server.rpc.field_limit import join_raw, parse, split_raw
from tpeft_deploy.runtime.server.rpc.messages import raw_response, response_of
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.tenancy.intake import ByteBudget, Intake
from tpeft_deploy.runtime.server.v2.limits import RpcLimits
from tpeft_deploy.runtime.server.v2.messages import InferResponse
from tpeft_deploy.tucker import Array


def intake() -> Intake:
    return Intake(ByteBudget(8 * MIB, 6 * MIB))


def test_what_is_refused_is_not_received() -> None:
    class Metered(FakeCore):
        def admit(self, principal: Principal) -> None:
            raise QuotaExceeded("run", problem="no more", retry_after=3.0)

    async def test() -> None:
        own, budgets = FakeCore(), intake()
        servicer = Servicer(own, RpcLimits(), None, budgets)
        message = infer().SerializeToString()
        assert await answered(servicer, Context(message)) == "OK"
        refused = Context(message)
        assert await answered(Servicer(Metered(), RpcLimits(), None, budgets), refused) == "RESOURCE_EXHAUSTED"
        assert (refused.reads, refused.trailers) == (0, (("retry-after", "3"),))
        for tenant, size, status in (("acme", 6 * MIB, "RESOURCE_EXHAUSTED"), ("globex", 6 * MIB, "UNAVAILABLE")):
            with budgets.memory.hold(tenant) as used, budgets.memory.hold("third") as rest:
                used.take(size)
                rest.take(2 * MIB)
                for rpc in ("ModelInfer", "ModelStreamInfer"):
                    context = Context(message)
                    assert await answered(servicer, context, rpc) == status
                    assert context.reads == 0
        assert budgets.memory.used == 0

    asyncio.run(test())


def test_a_message_that_does_not_come_counts_as_the_largest_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_AT_ONCE", 0.0)

    async def test() -> None:
        budgets = Intake(ByteBudget(7 * MIB, 6 * MIB))
        servicer = Servicer(FakeCore(), RpcLimits(message_bytes=4 * MIB), None, budgets)
        slow = Context()
        first = asyncio.create_task(answered(servicer, slow))
        while budgets.memory.used < 4 * MIB:
            await asyncio.sleep(0)
        silent = Context()
        assert await answered(servicer, silent) == "RESOURCE_EXHAUSTED"  # its tenant has room for one
        assert silent.trailers
        assert await answered(servicer, Context(), key="globex-infer") == "UNAVAILABLE"
        slow.message = infer().SerializeToString()
        slow.sent.set()
        assert await first == "OK"
        assert budgets.memory.used == 0
        hasty = Servicer(FakeCore(), RpcLimits(message_bytes=MIB, read_seconds=0.0), None, budgets)
        assert await answered(hasty, Context()) == "DEADLINE_EXCEEDED"
        assert await answered(servicer, Context(b"\xff")) == "INVALID_ARGUMENT"
        leaving = Context()
        leaving.sent.set()
        assert await answered(servicer, leaving) == "INVALID_ARGUMENT"  # a call without a message
        assert budgets.memory.used == 0

    asyncio.run(test())


CALLS: dict[str, bytes] = {
    "raw": infer(40_000).SerializeToString(),
    "typed": infer(20_000, raw=False).SerializeToString(),
    "small": infer().SerializeToString(),
    "echo": infer(model="echo").SerializeToString(),
    "unknown": infer(40_000, model="none").SerializeToString(),
    "too many": infer(400_000, raw=False).SerializeToString(),
    "malformed": bytes(MIB),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(CALLS)), st.booleans(), st.integers(0, 9)), min_size=1, max_size=5))
def test_budgets_are_empty_after_every_end(calls: list[tuple[str, bool, int]]) -> None:
    async def test() -> None:
        budgets = intake()
        async with talking(intake=budgets) as server:

            async def one(kind: str, cancelled: bool, steps: int) -> None:
                call = server.begin("ModelInfer", CALLS[kind])
                for _ in range(steps):
                    await asyncio.sleep(0)
                if cancelled:
                    call.cancel()
                code = await call.code()
                fits = code is grpc.StatusCode.OK or code is grpc.StatusCode.RESOURCE_EXHAUSTED  # others have the room
                assert cancelled or fits or kind in {"unknown", "malformed"}, code

            await asyncio.gather(*(one(*call) for call in calls))
            stream = server.stream()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):  # it ends where there is no room
                for kind, *_ in calls:
                    await stream.write(CALLS[kind])
            stream.cancel()
            for _ in range(1000):
                if not budgets.memory.used:
                    break
                await asyncio.sleep(0.01)
            assert budgets.memory.used == 0

    asyncio.run(test())


def test_what_was_refused_is_gone_at_once() -> None:
    async def test() -> None:
        async with talking() as server:
            await server.status("ModelInfer", b"\xff")
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                assert await server.status("ModelInfer", bytes(8 * MIB)) == "RESOURCE_EXHAUSTED"
                assert await server.status("ModelInfer", b"\x3a\xff\xff\xff\x7f" + bytes(8 * MIB)) == "INVALID_ARGUMENT"
                assert await server.status("ModelInfer", infer(400_000, raw=False)) == "RESOURCE_EXHAUSTED"
                assert await server.status("ModelInfer", infer(400_000, model="none")) == "NOT_FOUND"
                await asyncio.sleep(0.05)
                server.core.requests.clear()  # which keeps them for other tests
                assert tracemalloc.get_traced_memory()[0] - before < 2 * MIB
            finally:
                tracemalloc.stop()
                gc.enable()

    asyncio.run(test())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.lists(st.binary(max_size=300), max_size=4), st.booleans())
def test_raw_tensors_are_taken_out_and_put_in_as_protobuf_does(text: bytes, raws: list[bytes], front: bool) -> None:
    message = pb.ModelInferRequest(model_name=text.hex(), id="x")
    message.inputs.add(name="raw", shape=[1])
    rest = message.SerializeToString()
    message.raw_input_contents.extend(raws)
    left, found = split_raw(join_raw(b"", 7, raws) + rest if front else message.SerializeToString(), RpcLimits())
    assert left == rest
    assert [bytes(raw) for raw in found] == raws
    assert pb.ModelInferRequest.FromString(join_raw(rest, 7, raws)) == message
    for malformed in (b"\x3a\x7f1", b"\x3b", b"\xff" * 12):
        with pytest.raises(ProtocolError):
            split_raw(malformed, RpcLimits())
    with pytest.raises(TooLarge):
        split_raw(bytes(20_000), RpcLimits())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_large_raw_answer_is_the_message_it_would_be(streamed: bool) -> None:
    outputs: dict[str, Array] = {
        "a": np.arange(9).reshape(3, 3),
        "b": np.zeros((0, 2), np.float32),
        "c": np.ones(3)[::-1],
    }
    response = InferResponse("m", "1", "id", outputs, ["INT64", "FP32", "FP64"], {"adapter_digest": "base"})
    data = raw_response(response, final=True, streamed=streamed)
    plain = response_of(response, raw=True, final=True)
    expected = pb.ModelStreamInferResponse(infer_response=plain) if streamed else plain
    assert type(expected).FromString(data) == expected


def test_elements_of_typed_contents_are_counted_on_the_wire() -> None:
    limits = RpcLimits(typed_elements=1000)
    for field, value in (("fp32_contents", 1.5), ("int64_contents", 1 << 40), ("bool_contents", True)):
        for count, fits in ((1000, True), (1001, False)):
            message = pb.ModelInferRequest()
            for _ in range(2):
                tensor = message.inputs.add()
                getattr(tensor.contents, field).extend([value] * (count // 2))
            getattr(tensor.contents, field).extend([value] * (count % 2))
            data = join_raw(message.SerializeToString(), 7, [bytes(2 * limits.fields)])
            if fits:
                assert parse(pb.ModelInferRequest, data, limits).inputs == message.inputs
            else:
                with pytest.raises(TooLarge, match="1,000 elements"):
                    parse(pb.ModelInferRequest, data, limits)
    for count, fits in ((62, True), (63, False)):
        message = pb.ModelInferRequest()
        message.inputs.add().contents.bytes_contents.extend([b"x" * 200] * count)
        if fits:
            assert parse(pb.ModelInferRequest, message.SerializeToString(), limits) == message
        else:
            with pytest.raises(TooLarge, match="1,000 elements"):
                parse(pb.ModelInferRequest, message.SerializeToString(), limits)


@pytest.mark.parametrize("field", ["id", "model_name", "model_version"])
def test_a_text_of_megabytes_is_not_parsed(field: str) -> None:
    message = pb.ModelInferRequest()
    setattr(message, field, "x" * (5 << 20))
    with pytest.raises(TooLarge, match="names and an id"):
        split_raw(message.SerializeToString(), RpcLimits())
    setattr(message, field, "x" * 1000)
    assert split_raw(message.SerializeToString(), RpcLimits())[1] == []
