from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import uvloop

from tests.helpers.counting import operations
from tests.helpers.server.fake_rpc_core import FakeCore
from tests.helpers.server.rpc_serving import infer, key_of, run, serving, talking
from tpeft_deploy.errors import Conflict, ProtocolError, TooLarge
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.runtime.server.rpc.field_limit import parse
from tpeft_deploy.runtime.server.rpc.methods import SERVICE
from tpeft_deploy.runtime.server.rpc.server import RpcServer, Tls
from tpeft_deploy.runtime.server.rpc.servicer import Servicer
from tpeft_deploy.runtime.server.v2.limits import RpcLimits

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tls(certificate: Path) -> Tls:
    return Tls((certificate / "cert.pem").read_bytes(), (certificate / "key.pem").read_bytes())


def test_tls(tls: Tls) -> None:
    with serving(tls=tls) as server:
        address = server.address.replace("127.0.0.1", "localhost")
        trusted = grpc.ssl_channel_credentials(tls.certificate)
        path = f"/{SERVICE}/ServerMetadata"
        with grpc.secure_channel(address, trusted) as channel:
            answer = channel.unary_unary(path)(b"", metadata=key_of("acme-infer"), timeout=100)
            assert pb.ServerMetadataResponse.FromString(answer).name == "tpeft-deploy"
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", metadata=key_of("acme-infer"), timeout=100)
        assert caught.value.code().name == "UNAVAILABLE"


def test_an_unusable_certificate_and_a_taken_port_are_told(tls: Tls) -> None:
    async def test() -> None:
        servicer = Servicer(FakeCore(), RpcLimits())
        with pytest.raises(Conflict, match="certificate"):
            RpcServer(servicer, RpcLimits(), host="127.0.0.1", port=0, tls=Tls(tls.certificate, b"no key"))
        async with talking() as server:
            with pytest.raises(Conflict, match=f"127.0.0.1:{server.server.port}: cannot listen"):
                RpcServer(servicer, RpcLimits(), host="127.0.0.1", port=server.server.port)

    run(test())


def test_messages_beyond_the_limit_and_bombs() -> None:
    async def test() -> None:
        async with talking(RpcLimits(message_bytes=1 << 20)) as server:
            large = pb.ModelInferRequest(raw_input_contents=[bytes(2 << 20)])
            assert await server.status("ModelInfer", large) == "RESOURCE_EXHAUSTED"
            # Without a key it is not even received.
            assert await server.status("ModelInfer", large, None) == "UNAUTHENTICATED"
            bomb = server.channel.unary_unary(f"/{SERVICE}/ModelInfer")(
                bytes(64 << 20), metadata=key_of("acme-infer"), compression=grpc.Compression.Gzip, timeout=100
            )
            assert (await bomb.code()).name == "RESOURCE_EXHAUSTED"
            fields = pb.ModelInferRequest(inputs=[{}] * 5000)
            assert await server.status("ModelInfer", fields) == "RESOURCE_EXHAUSTED"
            stream = server.stream()
            await stream.write(large.SerializeToString())
            assert (await stream.code()).name == "RESOURCE_EXHAUSTED"
            assert await server.status("ModelInfer", infer()) == "OK"
            assert not server.core.running

    run(test())


def test_fields_are_counted_before_a_message_is_parsed() -> None:
    limits = RpcLimits(fields=10)
    whole = infer()
    assert parse(pb.ModelInferRequest, whole.SerializeToString(), limits) == whole
    assert len(whole.SerializeToString()) > 20
    for many in (b"\x2a\x00" * 11, b"\x2a\x14" + b"\x22\x00" * 10, b"\x0a\x01a" * 11, b"\x38\x01" * 11):
        with pytest.raises(TooLarge, match="at most 10 fields"):
            parse(pb.ModelInferRequest, many, limits)

    def refuse(fields: int) -> None:
        with pytest.raises(TooLarge):
            parse(pb.ModelInferRequest, b"\x2a\x00" * fields, RpcLimits())

    refuse(1 << 20)  # whatever is made once only
    assert operations(lambda: refuse(32 << 20)) == operations(lambda: refuse(1 << 20))
    long = b"\x0a\x14" + b"a" * 20
    for wrong in (b"\x0a\x05abc", b"\xff" * 11, b"\x0a", b"\x08", b"\x2d\x00", b"\x0a\x01\xff"):
        for data in (wrong, long + wrong):
            with pytest.raises(ProtocolError, match="message"):
                parse(pb.ModelInferRequest, data, limits)
    with pytest.raises(ProtocolError, match="groups"):
        parse(pb.ModelInferRequest, long + b"\x0b\x0c", limits)


def test_a_stop_lets_running_calls_finish_and_takes_no_new_ones() -> None:
    async def test() -> None:
        async with talking() as server:
            finishes = server.begin("ModelInfer", infer("slow"))
            while not server.core.running:
                await asyncio.sleep(0.01)
            stopping = asyncio.create_task(server.server.stop(1000.0))
            while await server.status("ServerLive") != "UNAVAILABLE":
                await asyncio.sleep(0.01)
            assert server.core.running == 1
            server.core.go.set()
            assert (await finishes.code()).name == "OK"
            await stopping

    run(test())


def test_a_stop_ends_calls_that_outlast_its_time() -> None:
    async def test() -> None:
        async with talking() as server:
            hangs = server.begin("ModelInfer", infer("slow"))
            while not server.core.running:
                await asyncio.sleep(0.01)
            await server.server.stop(0.1)
            assert (await hangs.code()).name in ("UNAVAILABLE", "CANCELLED")
            while server.core.running:
                await asyncio.sleep(0.01)

    run(test())


def test_it_runs_on_uvloop() -> None:
    async def test() -> None:
        async with talking() as server:
            for _ in range(20):
                assert await server.status("ModelInfer", infer()) == "OK"
            stream = server.stream()
            await stream.write(infer().SerializeToString())
            assert not pb.ModelStreamInferResponse.FromString(await stream.read()).error_message

    uvloop.run(test())


def test_importing_the_server_imports_neither_torch_nor_a_client() -> None:
    code = "import sys, tpeft_deploy.runtime.server.rpc.server; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert not set(done.stdout.split()) & {"torch", "onnx", "tritonclient", "kserve"}
