from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message

from tests.helpers.server.fake_rpc_core import BUNDLE, KEYS, X, answers
from tests.helpers.server.rpc_serving import NOT_OURS, Talking, infer, key_of, run, scores, talking
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.methods import METHODS, SERVICE
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, Role
from tpeft_deploy.runtime.server.v2.limits import RpcLimits


def message_for(rpc: str) -> bytes:
    """A request that the caller's tenant acme may make."""
    message: Message = pb.ServerLiveRequest()
    if "Infer" in rpc:
        message = infer()
    elif rpc.startswith("RepositoryModel"):
        message = pb.RepositoryModelLoadRequest(model_name="alpha")
    elif rpc.startswith("Model"):
        message = pb.ModelReadyRequest(name="alpha")
    return bytes(message.SerializeToString())


async def ended(server: Talking, rpc: str, message: bytes, key: str | None) -> str:
    """Status of a call, also of a stream's of one message."""
    if rpc not in METHODS or not METHODS[rpc].stream:
        return await server.status(rpc, message, key)
    call = server.stream(key)
    try:
        await call.write(message)
        await call.done_writing()
        async for _ in call:
            pass
    except (grpc.RpcError, asyncio.InvalidStateError):
        pass  # the status says why
    return str((await call.code()).name)


ALLOWED = {
    Role.INFER: {Action.HEALTH, Action.READ, Action.INFER},
    Role.DEPLOY: {Action.HEALTH, Action.READ, Action.INFER, Action.DEPLOY},
    Role.ADMIN: set(Action),
}


def test_every_call_with_each_role_and_without_a_key() -> None:
    async def test() -> None:
        async with talking() as server:
            for rpc in [*METHODS, *NOT_OURS]:
                ours = METHODS.get(rpc)
                health = ours is not None and ours.action is Action.HEALTH
                for key in (None, "", "nobody-admin", "acme-deploy "):
                    found = await ended(server, rpc, message_for(rpc) if ours else b"\xff", key)
                    # grpc.aio's client calls a write after the end of a call INTERNAL, whatever the server said.
                    assert found in (["OK"] if health else ["UNAUTHENTICATED", "INTERNAL"]), (rpc, key)
                    assert health or found == "UNAUTHENTICATED" or (ours is not None and ours.stream)
                for name, principal in KEYS.items():
                    if principal.tenant == "acme":
                        expected = "OK" if ours else "UNIMPLEMENTED"
                        if ours and ours.action not in ALLOWED[principal.role]:
                            expected = "PERMISSION_DENIED"
                        assert await ended(server, rpc, message_for(rpc), name) == expected, (rpc, name)
            assert {one.status for one in server.exchanges if one.key} == {200, 403, 501}
            assert {one.status for one in server.exchanges if not one.key} == {200, 401}
            # Nobody without a key got as far as the model.
            assert len(server.core.requests) == 6

    run(test())


def test_another_tenants_tasks_are_not_there_for_any_call() -> None:
    async def test() -> None:
        async with talking() as server:
            for rpc, method in METHODS.items():
                if method.action is Action.HEALTH or rpc in ("ServerMetadata", "RepositoryIndex", "ModelStreamInfer"):
                    continue
                texts = []
                for name in ("gamma", "omega"):
                    call = server.begin(rpc, message_for(rpc).replace(b"alpha", name.encode()))
                    assert (await call.code()).name == "NOT_FOUND", rpc
                    texts.append((await call.details()).replace(name, "NAME"))
                assert texts[0] == texts[1]
            for rpc in ("RepositoryIndex", "ModelStatistics"):
                assert b"gamma" not in await server.begin(rpc, b"")
                assert b"gamma" in await server.begin(rpc, b"", "globex-infer")

    run(test())


def test_authorization_that_is_not_one_text() -> None:
    async def test() -> None:
        async with talking() as server:
            twice = key_of("acme-deploy")
            assert await server.status("ServerMetadata", b"", "acme-deploy", twice) == "UNAUTHENTICATED"
            for text in ("acme-deploy", "Basic acme-deploy", "bearer acme-deploy", "Bearer", "Bearer  acme-deploy"):
                metadata = (("authorization", text),)
                assert await server.status("ServerMetadata", b"", None, metadata) == "UNAUTHENTICATED", text
            for path in ("/inference.Other/ServerLive", "/x", f"/{SERVICE}/serverlive", f"//{SERVICE}/ServerLive"):
                assert await server.status(path, b"", None) == "UNAUTHENTICATED"
                assert await server.status(path) == "UNIMPLEMENTED"
            assert {one.route for one in server.exchanges if one.status == 501} == {"unknown"}

    run(test())


def test_errors_have_their_status_and_say_nothing_of_the_server() -> None:
    async def test() -> None:
        async with talking() as server:
            broken = server.begin("ModelInfer", infer("broken"))
            assert (await broken.code()).name == "INTERNAL"
            assert "secret" not in await broken.details()
            metered = server.begin("ModelInfer", infer("metered"))
            assert (await metered.code()).name == "RESOURCE_EXHAUSTED"
            assert dict(await metered.trailing_metadata()) == {"retry-after": "3"}
            draining = server.begin("ModelInfer", infer("draining"))
            assert (await draining.code()).name == "UNAVAILABLE"
            assert dict(await draining.trailing_metadata()) == {"retry-after": "1"}
            assert await server.status("ModelInfer", b"\x0a\xff") == "INVALID_ARGUMENT"
            long = server.begin("ModelReady", pb.ModelReadyRequest(name="ü" * 100_000))
            assert (await long.code()).name == "NOT_FOUND"
            assert len(await long.details()) < 1100
            assert [one.status for one in server.exchanges] == [500, 429, 503, 400, 404]

    run(test())


def test_deadline_of_the_call_and_of_the_request() -> None:
    async def test() -> None:
        async with talking() as server:
            by_call = server.begin("ModelInfer", infer("slow"), timeout=100)
            while not server.core.running:
                await asyncio.sleep(0.01)
            by_call.cancel()
            request = infer("slow", parameters={"timeout": {"int64_param": 50_000}})
            assert await server.status("ModelInfer", request) == "DEADLINE_EXCEEDED"
            await server.begin("ModelInfer", infer(), timeout=None)
            of_call, of_request, none = (one.timeout for one in server.core.requests)
            assert of_call is not None
            assert 0 < of_call < 110  # gRPC rounds it up
            assert of_request == 0.05
            assert none is None
            assert [one.status for one in server.exchanges if one.status != 499] == [504, 200]
            assert await server.status("ModelInfer", infer("slow"), timeout=0.1) == "DEADLINE_EXCEEDED"
            while server.core.running:
                await asyncio.sleep(0.01)

    run(test())


def test_a_client_that_goes_away_cancels_the_inference() -> None:
    async def test() -> None:
        async with talking() as server:
            call = server.begin("ModelInfer", infer("slow"))
            stream = server.stream()
            for _ in range(3):
                await stream.write(infer("slow").SerializeToString())
            while server.core.running < 4:
                await asyncio.sleep(0.01)
            call.cancel()
            while server.core.running > 3:
                await asyncio.sleep(0.01)
            stream.cancel()
            while server.core.running:
                await asyncio.sleep(0.01)
            assert server.core.cancelled == 4
            assert [one.status for one in server.exchanges] == [499] * 4
            np.testing.assert_array_equal(
                scores(await server.begin("ModelInfer", infer())), answers(X, 2.0)["scores"], strict=True
            )

    run(test())


def test_a_stream_answers_in_order_bounded_and_with_its_errors() -> None:
    async def test() -> None:
        async with talking(RpcLimits(in_flight=3)) as server:
            stream = server.stream()
            slow = infer("slow", id="slow", parameters={"timeout": {"int64_param": 200_000}})
            right = [slow, infer(id="1"), infer("gamma", id="3"), infer("beta", id="4"), infer("broken")]
            asked = [bytes(one.SerializeToString()) for one in right]
            asked.insert(2, b"\x0a\xff")

            async def send() -> None:
                for message in asked * 3:
                    await stream.write(message)
                await stream.done_writing()

            sending = asyncio.create_task(send())
            got = [pb.ModelStreamInferResponse.FromString(one) async for one in stream]
            await sending
            assert [one.infer_response.id for one in got] == ["slow", "1", "", "3", "4", ""] * 3
            expected = ["time is over", "", "message", "'gamma'", "", "internal error"] * 3
            for one, text in zip(got, expected, strict=True):
                assert bool(one.error_message) == bool(text)
                assert text in one.error_message
            assert (await stream.code()).name == "OK"
            assert server.core.most_running <= 3
            assert [one.status for one in sorted(server.exchanges, key=lambda one: one.status)] == (
                [200] * 6 + [400] * 3 + [404] * 3 + [500] * 3 + [504] * 3
            )

    run(test())


def test_a_key_revoked_while_its_stream_is_open() -> None:
    async def test() -> None:
        async with talking() as server:
            stream = server.stream()
            await stream.write(infer().SerializeToString())
            assert not pb.ModelStreamInferResponse.FromString(await stream.read()).error_message
            server.core.revoked.add("acme-deploy")
            await stream.write(infer().SerializeToString())
            assert "no such key" in pb.ModelStreamInferResponse.FromString(await stream.read()).error_message
            assert len(server.core.requests) == 1
            await stream.done_writing()
            assert (await stream.code()).name == "OK"

    run(test())


def test_what_is_told_of_a_call() -> None:
    async def test() -> None:
        async with talking() as server:
            metadata = (("traceparent", "00-1-2-01"), ("x-request-id", "outer"))
            answer = await server.begin("ModelInfer", infer("beta", id="inner"), "acme-infer", metadata)
            await server.begin("ServerLive", b"", None, metadata)
            told, live = server.exchanges
            assert (told.protocol, told.method, told.route) == ("grpc", "ModelInfer", f"/{SERVICE}/ModelInfer")
            assert (told.status, told.principal) == (200, Principal("acme", Role.INFER, "id-acme-infer"))
            assert (told.task, told.request_id, told.traceparent) == ("beta", "inner", "00-1-2-01")
            assert told.bytes_in == len(infer("beta", id="inner").SerializeToString())
            assert told.bytes_out == len(answer)
            assert told.seconds > 0
            assert (live.caller, live.tenant, live.key, live.task, live.request_id) == (None, "", "", "", "outer")

    run(test())


def test_tasks_named_by_metadata_by_parameter_and_by_row() -> None:
    async def test() -> None:
        async with talking() as server:
            for key in ("x-adapter", "serve_multiplexed_model_id", "multiplexed_model_id"):
                answer = await server.begin("ModelInfer", infer(BUNDLE), metadata=((key, "beta"),))
                np.testing.assert_array_equal(scores(answer), answers(X, -3.0)["scores"], strict=True)
            both = infer("base", parameters={"adapter": {"string_param": "alpha@1"}})
            answer = await server.begin("ModelInfer", both, metadata=(("x-adapter", "alpha@1"),))
            np.testing.assert_array_equal(scores(answer), answers(X, 1.0)["scores"], strict=True)
            other = (("x-adapter", "beta"),)
            assert await server.status("ModelInfer", both, metadata=other) == "INVALID_ARGUMENT"
            foreign = (("x-adapter", "gamma"),)
            assert await server.status("ModelInfer", infer(BUNDLE), metadata=foreign) == "NOT_FOUND"

    run(test())


def test_files_of_a_load_are_bytes_for_the_core() -> None:
    async def test() -> None:
        async with talking() as server:
            parameters: Any = {
                "config": {"string_param": "{}"},
                "file:weights": {"bytes_param": b"\0\xff"},
                "pin": {"bool_param": True},
                "level": {"int64_param": 3},
            }
            message = pb.RepositoryModelLoadRequest(model_name="alpha", parameters=parameters)
            await server.begin("RepositoryModelLoad", message)
            expected = {"config": "{}", "file:weights": b"\0\xff", "pin": True, "level": 3}
            assert server.core.loads == [("acme", "alpha", expected)]
            assert await server.status("RepositoryModelLoad", pb.RepositoryModelLoadRequest()) == "INVALID_ARGUMENT"
            empty = pb.RepositoryModelUnloadRequest(model_name="alpha")
            empty.parameters["a"].SetInParent()
            assert await server.status("RepositoryModelUnload", empty) == "INVALID_ARGUMENT"

    run(test())
