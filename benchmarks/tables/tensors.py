"""What a large tensor costs on its way to the model."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch
from torch import nn

from benchmarks.export import adapter_for
from benchmarks.tables import tensor_peers
from benchmarks.tables.server_process import free_port, started
from benchmarks.tables.table import Row, Settings, Table, race
from tpeft_deploy import Bundle, Runtime, export_bundle
from tpeft_deploy.runtime.bench.measure import Case
from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb
from tpeft_deploy.tucker import Array

__all__ = ["measure"]

SHAPE, CLASSES, TASK = (8, 3, 224, 224), 4, "task"
SOCKET, REST, RPC = "bytes through a socket", "this toolkit, REST binary", "this toolkit, gRPC"
COLUMNS = ("ratio", "ms")
TEXT = """A request with a float32 tensor of 8 x 3 x 224 x 224 (4.8 MB), by one client on the last core to a server on
the first.  "bytes through a socket" is a loop that receives them into a buffer and answers four bytes, by Python's
sockets; every other row is compared with it.  The ASGI application (uvicorn, uvloop, httptools) and the gRPC method
(grpcio's asyncio server) receive the bytes and do nothing with them: what they take above the first row is what these
libraries take, client included.  This toolkit answers from a model of a mean over the pixels and a linear layer with a
LoRA adapter, checks all values, and is asked as by default, without keys; the time of the model alone, through
`Runtime.run` in the client's process, is in the last row.  Its answers over REST and gRPC were found equal to those of
the runtime."""

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Pool(nn.Module):
    """The mean over all pixels, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SHAPE[1], CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(pixel_values.mean((2, 3)))
        return scores


def measure(settings: Settings) -> Table:
    """Compare the ways.

    Raises:
        SystemExit: the server answers otherwise than the runtime.
    """
    pixels = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = _bundle(settings.cache)
        runtime = stack.enter_context(Runtime(bundle.path, provider="cpu", threads=1))
        expected = runtime.run({"pixel_values": pixels}, TASK)["output"]
        stack.enter_context(_last_core())
        rest, rpc = stack.enter_context(_ours(bundle, pixels, expected, place))
        cases: dict[str, Case] = {
            SOCKET: stack.enter_context(_by_socket(pixels.tobytes(), place)),
            "ASGI application": stack.enter_context(_by_asgi(pixels.tobytes(), place)),
            REST: rest,
            "gRPC method": stack.enter_context(_by_grpc(pixels.tobytes(), place)),
            RPC: rpc,
            "Runtime.run, without a server": lambda: runtime.run({"pixel_values": pixels}, TASK),
        }
        found = race(cases, settings.seconds, SOCKET)
    return Table("tensors", "Large tensors", TEXT, COLUMNS, tuple(Row(name, own) for name, own in found.items()))


def _bundle(cache: Path) -> Bundle:
    path = cache / "pool"
    if not (path / "manifest.json").is_file():
        torch.manual_seed(0)
        module = Pool().eval()
        batch = {"pixel_values": torch.randn(2, *SHAPE[1:])}
        free = {"pixel_values": {0: "batch"}}
        export_bundle(module, {TASK: adapter_for(module, 0, 2)}, path, example_inputs=batch, dynamic_shapes=free)
    return Bundle.open(path)


@contextmanager
def _last_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def _server(command: list[str], port: int, place: Path) -> Iterator[None]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the server takes another core than this process
    with started([sys.executable, *command], port, place / f"{port}.log", environment):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        yield


@contextmanager
def _connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


@contextmanager
def _by_socket(data: bytes, place: Path) -> Iterator[Case]:
    port = free_port()
    message = len(data).to_bytes(8, "little") + data
    with _server(["-m", tensor_peers.__name__, "socket", str(port)], port, place), _connected(port) as connection:

        def ask() -> None:
            connection.sendall(message)
            if connection.recv(4, socket.MSG_WAITALL) != tensor_peers.ANSWER:
                raise SystemExit("send bytes through a socket: expected an answer, got none")

        yield ask


def _posted(connection: socket.socket, request: bytes) -> bytes:
    """The body of the answer to a request."""
    connection.sendall(request)
    held = b""
    while b"\r\n\r\n" not in held:
        held += connection.recv(1 << 16)
    head, _, body = held.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    if length is None or not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"post a tensor: expected an answer with status 200 and a length, got {held[:300]!r}")
    while len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return body


@contextmanager
def _by_asgi(data: bytes, place: Path) -> Iterator[Case]:
    port = free_port()
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    with _server(["-m", tensor_peers.__name__, "asgi", str(port)], port, place), _connected(port) as connection:
        yield lambda: _posted(connection, request)


@contextmanager
def _channel(port: int, method: str) -> Iterator[Callable[[bytes], bytes]]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel.unary_unary(method)


@contextmanager
def _by_grpc(data: bytes, place: Path) -> Iterator[Case]:
    port = free_port()
    with (
        _server(["-m", tensor_peers.__name__, "grpc", str(port)], port, place),
        _channel(port, tensor_peers.METHOD) as call,
    ):
        yield lambda: call(data)


@contextmanager
def _ours(bundle: Bundle, pixels: Array, expected: Array, place: Path) -> Iterator[tuple[Case, Case]]:
    """One server, asked over REST and over gRPC."""
    port, rpc_port = free_port(), free_port()
    command = ["-c", "from tpeft_deploy.cli import main; main()", "serve", str(bundle.path), "--no-auth"]
    command += ["--threads", "1", "--port", str(port), "--grpc-port", str(rpc_port), "--state", str(place / "state")]
    request, message = _rest(pixels), _rpc(pixels)
    method = "/inference.GRPCInferenceService/ModelInfer"
    with (
        _server(command, port, place),
        _connected(port) as connection,
        _channel(rpc_port, method) as call,
    ):
        body = _posted(connection, request)
        document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        answer = pb.ModelInferResponse.FromString(call(message))
        rest = np.frombuffer(body[end:], np.float32).reshape(document["outputs"][0]["shape"])
        rpc = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
        for name, found in ((REST, rest), (RPC, rpc)):
            error = float(np.abs(found - expected).max())
            if error > 1e-6:
                raise SystemExit(f"compare {name} with the runtime: expected equal answers, got {error:g} apart")
        yield lambda: _posted(connection, request), lambda: call(message)


def _rest(pixels: Array) -> bytes:
    tensor = {"name": "pixel_values", "shape": SHAPE, "datatype": "FP32"}
    document = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": pixels.nbytes}}],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(document).encode()
    head = [
        f"POST /v2/models/{TASK}/infer HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(text)}",
        f"Content-Length: {len(text) + pixels.nbytes}",
    ]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + text + pixels.tobytes()


def _rpc(pixels: Array) -> bytes:
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": SHAPE}
    message = pb.ModelInferRequest(model_name=TASK, inputs=[tensor], raw_input_contents=[pixels.tobytes()])
    data: bytes = message.SerializeToString()
    return data
