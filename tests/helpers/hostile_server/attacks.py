"""What a tenant with an ordinary key may send to stop the others, each attack over 8 connections until told to end.

    python -m tests.helpers.hostile_server.attacks NAME HTTP_PORT GRPC_PORT KEY

The process ends when its standard input does, and prints the statuses that it was answered with, as JSON.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

CONNECTIONS = 8
PIXELS = (1, 12, 14)
ATTACKS: dict[str, Callable[[Target], None]] = {}
_ROW = int(np.prod(PIXELS)) * 4


@dataclass
class Target:
    """The server, and what it answered.

    Attributes:
        port: of HTTP.
        grpc_port: of gRPC.
        key: the attacking tenant's, with role deploy.
        stop: set when the attack is to end.
        answers: statuses of HTTP, or names of gRPC's, and how often each came; "cut" for a closed connection.
    """

    port: int
    grpc_port: int
    key: str
    stop: threading.Event = field(default_factory=threading.Event)
    answers: Counter[str] = field(default_factory=Counter)

    @property
    def authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """One request on a connection of its own, counted; b"" where the connection was cut."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, self.authorization | (headers or {}))
            answer = connection.getresponse()
            self.answers[str(answer.status)] += 1
            return answer.read()
        except (OSError, http.client.HTTPException):
            self.answers["cut"] += 1
            return b""
        finally:
            connection.close()

    def endless(self, one: Callable[[], None]) -> None:
        """Do something until told to end."""
        while not self.stop.is_set():
            one()


def attack(run: Callable[[Target], None]) -> Callable[[Target], None]:
    """An attack that each connection runs."""
    ATTACKS[run.__name__] = run
    return run


def infer_json(rows: int, size: int | None = None) -> bytes:
    """The JSON before `rows` rows of raw pixels."""
    size = rows * _ROW if size is None else size
    tensor = {"name": "pixels", "shape": [rows, *PIXELS], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()


def binary(rows: int) -> tuple[bytes, dict[str, str]]:
    """A request for so many rows, and its headers."""
    head = infer_json(rows)
    return head + bytes(rows * _ROW), {"Inference-Header-Content-Length": str(len(head))}


@attack
def gzip_bombs(target: Target) -> None:
    """64 kB that are 64 MB of zeros."""
    body = gzip.compress(bytes(64 << 20), 9)
    headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": "100"}
    target.endless(lambda: void(target.ask("POST", "/v2/models/mood/infer", body, headers)))


@attack
def json_bodies(target: Target) -> None:
    """60 MB of numbers in JSON."""
    body = b'{"inputs":[{"name":"pixels","shape":[1,1,12,14],"datatype":"FP32","data":[' + b"0," * (30 << 20) + b"0]}]}"
    target.endless(lambda: void(target.ask("POST", "/v2/models/mood/infer", body)))


@attack
def unfinished_bodies(target: Target) -> None:
    """Bodies of 60 MB that never end."""
    size = 60 << 20
    while not target.stop.is_set():
        with opened(target) as connection:
            head = f"POST /v2/models/mood/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n"
            with suppress(OSError):
                connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
                for _ in range(size >> 20):
                    connection.sendall(bytes(1 << 20 if _ else (1 << 20) - 1))
                    if answered(target, connection, 0.0):
                        break
                else:
                    answered(target, connection, 5.0)
        target.stop.wait(0.01)


@attack
def load_calls(target: Target) -> None:
    """The repository's load call with 60 MB of base64."""
    body = json.dumps({"parameters": {"file:a.safetensors": base64.b64encode(bytes(45 << 20)).decode()}}).encode()
    target.endless(lambda: void(target.ask("POST", "/v2/repository/models/bomb/load", body)))


@attack
def many_rows(target: Target) -> None:
    """60,000 rows at once."""
    body, headers = binary(60_000)
    target.endless(lambda: void(target.ask("POST", "/v2/models/mood/infer", body, headers)))


@attack
def some_rows(target: Target) -> None:
    """As many rows as a tenant may have waiting, again and again."""
    body, headers = binary(400)
    target.endless(lambda: void(target.ask("POST", "/v2/models/mood/infer", body, headers)))


@attack
def pins(target: Target) -> None:
    """Every task that it has is registered, pinned and pinned as a session, again and again."""
    body = mood(target)
    number = threading.get_ident() % 1000
    for task in range(8):
        void(target.ask("POST", f"/v2/registry/tasks/t{number}-{task}/versions", body))

    def one() -> None:
        for task in range(8):
            folded = json.dumps({"folded": task % 2 == 0}).encode()
            void(target.ask("PUT", f"/v2/registry/tasks/t{number}-{task}/pin", folded))

    target.endless(one)


@attack
def silent_sockets(target: Target) -> None:
    """Connections that say nothing, as many as there may be."""
    held: list[socket.socket] = []
    while not target.stop.is_set():
        try:
            if len(held) < 200:
                held.append(socket.create_connection(("127.0.0.1", target.port), timeout=1))
                continue
            gone = held.pop(0)
            target.answers["cut" if answered_nothing(gone) else "open"] += 1
            gone.close()
        except OSError:
            target.answers["refused"] += 1
        time.sleep(0.02)


@attack
def slow_uploads(target: Target) -> None:
    """Uploads that send a byte now and then."""
    while not target.stop.is_set():
        with opened(target) as connection, suppress(OSError):
            head = (
                f"POST /v2/registry/tasks/slow/versions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n"
            )
            connection.sendall(f"{head}Content-Length: 100000000\r\n\r\n".encode())
            while not target.stop.is_set():
                connection.sendall(b"0")
                if answered(target, connection, 0.2):
                    break


@attack
def hostile_uploads(target: Target) -> None:
    """Adapters whose patterns do not end and whose ranks are larger than memory."""
    patterns = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["stem"]}
    patterns["alpha_pattern"] = {"(.*.*)*x" + "(a+)+$" * 3: 2}
    name = "base_model.model." + "a" * 30 + ".stem"
    lora = tensors({f"{name}.lora_A.weight": [2, 1, 2, 2], f"{name}.lora_B.weight": [2, 2, 1, 1]})
    empty = tensors(
        {"base_model.model.up.lora_A.weight": [35_000, 0], "base_model.model.up.lora_B.weight": [0, 35_000]}
    )
    config = json.dumps(patterns).encode()
    while not target.stop.is_set():
        for weights in (lora, empty):
            body, headers = form(weights=weights, config=config)
            void(target.ask("POST", "/v2/registry/tasks/hostile/versions", body, headers))


@attack
def lists(target: Target) -> None:
    """Every list that there is."""
    paths = ["/v2/models/stats", "/v2/registry/tasks", "/v1/models"]

    def one() -> None:
        for path in paths:
            void(target.ask("GET", path))
        void(target.ask("POST", "/v2/repository/index"))

    target.endless(one)


@attack
def changes(target: Target) -> None:
    """Registering, pointing and deleting, as fast as it goes."""
    body = mood(target)
    name = f"c{threading.get_ident() % 1000}"

    def one() -> None:
        void(target.ask("POST", f"/v2/registry/tasks/{name}/versions", body))
        void(target.ask("PUT", f"/v2/registry/tasks/{name}/aliases/other", b'{"version": "current"}'))
        void(target.ask("DELETE", f"/v2/registry/tasks/{name}"))

    target.endless(one)


@attack
def slow_readers(target: Target) -> None:
    """Large answers that nobody reads."""
    body, headers = binary(400)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v2/models/mood/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {target.key}\r\n{lines}"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    while not target.stop.is_set():
        with opened(target) as connection, suppress(OSError):
            for _ in range(20):  # one after the other on a connection, none of them read
                connection.settimeout(1)
                connection.sendall(whole)
            target.stop.wait(1)
            answered(target, connection, 0.1)


@attack
def grpc_contents(target: Target) -> None:
    """Typed contents of 13 MB, and of 4 MB, which is as much as is received."""
    from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb

    head = pb.ModelInferRequest(model_name="mood").SerializeToString()
    messages = []
    for rows in (20_000, 6_000):
        tensor = pb.ModelInferRequest.InferInputTensor(name="pixels", datatype="FP32", shape=[rows, *PIXELS])
        packed = _field(1 + 5, bytes(rows * _ROW))  # fp32_contents
        own = tensor.SerializeToString() + _field(5, packed)  # contents
        messages.append(head + _field(5, own))  # inputs
    _rpc(target, "ModelInfer", *messages)


@attack
def grpc_ids(target: Target) -> None:
    """Ids of 5 MB, which a log might keep."""
    from tpeft_deploy.runtime.server.rpc import inference_pb2 as pb

    _rpc(target, "ModelInfer", pb.ModelInferRequest(model_name="mood", id="x" * (5 << 20)).SerializeToString())


@attack
def grpc_streams(target: Target) -> None:
    """Streams that are opened and left."""
    import grpc

    method = "/inference.GRPCInferenceService/ModelStreamInfer"
    held: list[object] = []
    with grpc.insecure_channel(f"127.0.0.1:{target.grpc_port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = channel.stream_stream(method)

        def nothing() -> Iterator[bytes]:
            target.stop.wait()
            yield from ()

        while not target.stop.is_set():
            if len(held) < 100:
                held.append(call(nothing(), metadata=[("authorization", f"Bearer {target.key}")]))
            target.stop.wait(0.05)


def _rpc(target: Target, name: str, *messages: bytes) -> None:
    import grpc

    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{target.grpc_port}", options) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
        for data in itertools.cycle(messages):
            if target.stop.is_set():
                return
            try:
                call(data, timeout=60, metadata=[("authorization", f"Bearer {target.key}")])
                target.answers["OK"] += 1
            except grpc.RpcError as error:
                target.answers[error.code().name] += 1


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes as protobuf writes it: packing millions of elements with its own library takes seconds."""
    size, left = bytearray(), len(data)
    while True:
        size.append(left & 127 | (128 if left > 127 else 0))
        left >>= 7
        if not left:
            return bytes([number << 3 | 2]) + bytes(size) + data


def mood(target: Target) -> bytes:
    """An adapter that the server takes, from a file that the arena wrote."""
    with open(os.environ["ADAPTER"], "rb") as file:
        return file.read()


def tensors(shapes: dict[str, list[int]]) -> bytes:
    """Safetensors of ones."""
    header, data = {}, b""
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += np.ones(size // 4, np.float32).tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def form(**files: bytes) -> tuple[bytes, dict[str, str]]:
    """A multipart form and its header."""
    own = "".join(f"{byte:x}" for byte in os.urandom(8))
    parts = [
        f'--{own}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files.items()
    ]
    return b"".join(parts) + f"--{own}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={own}"}


@contextmanager
def opened(target: Target) -> Iterator[socket.socket]:
    """A connection."""
    try:
        connection = socket.create_connection(("127.0.0.1", target.port), timeout=10)
    except OSError:
        target.answers["refused"] += 1
        time.sleep(0.05)
        yield socket.socket()
        return
    with connection:
        yield connection


def answered(target: Target, connection: socket.socket, seconds: float) -> bool:
    """Whether an answer, or the end, comes in so many seconds; it is counted."""
    connection.settimeout(max(seconds, 1e-3))
    try:
        data = connection.recv(1 << 16)
    except TimeoutError:
        return False
    except OSError:
        data = b""
    target.answers[data[9:12].decode("latin-1") if data[:5] == b"HTTP/" else "cut"] += 1
    return True


def answered_nothing(connection: socket.socket) -> bool:
    """Whether a connection was closed."""
    connection.settimeout(1e-3)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def void(_: object) -> None:
    """Nothing."""


def main() -> None:
    """Attack until standard input ends."""
    names, port, grpc_port, key = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    target = Target(port, grpc_port, key)
    threads = [
        threading.Thread(target=guarded, args=(ATTACKS[name], target), daemon=True)
        for name in names
        for _ in range(CONNECTIONS if len(names) == 1 else 2)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    target.stop.set()
    for thread in threads:
        thread.join(timeout=2)
    print(json.dumps(target.answers), flush=True)
    os._exit(0)


def guarded(run: Callable[[Target], None], target: Target) -> None:
    """An attack that goes on where the server cuts it off."""
    while not target.stop.is_set():
        try:
            run(target)
        except Exception as error:
            target.answers[f"attacker: {type(error).__name__}"] += 1
            time.sleep(0.1)


if __name__ == "__main__":
    main()
