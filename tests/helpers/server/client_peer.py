"""A server for tests of the client: V2's binary tensors by `struct` alone: nothing is shared with the client."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

KEY = "tpk_a_b"
LETTERS = dict(
    zip(
        [
            "BOOL",
            *(f"{sign}INT{bits}" for bits in (8, 16, 32, 64) for sign in ("", "U")),
            "BF16",
            "FP16",
            "FP32",
            "FP64",
        ],
        "?bBhHiIqQHefd",
        strict=True,
    )
)
TOY = {
    "name": "toy",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "half", "datatype": "BF16", "shape": [-1]},
        {"name": "adapter", "datatype": "BYTES", "shape": [-1]},
    ],
    "outputs": [
        {"name": "logits", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "hidden.0", "datatype": "FP32", "shape": [-1]},
    ],
}
DIGITS = {
    "name": "digits",
    "versions": ["1"],
    "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 16, 16]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, -1]}],
}


@dataclass
class Peer:
    """What came in, newest last."""

    url: str = ""
    bundle: str = "toy"
    heads: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, list[Any]]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    uploads: list[dict[str, bytes]] = field(default_factory=list)
    binary: bool = True


def parse(body: bytes, length: int) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    head, at, values = json.loads(body[:length]), length, {}
    for tensor in head["inputs"]:
        if "data" in tensor:
            values[tensor["name"]] = tensor["data"]
            continue
        end = at + tensor["parameters"]["binary_data_size"]
        piece, at = body[at:end], end
        assert len(piece) == tensor["parameters"]["binary_data_size"]
        if tensor["datatype"] == "BYTES":
            found = []
            while piece:
                (size,) = struct.unpack("<I", piece[:4])
                found.append(piece[4 : 4 + size])
                piece = piece[4 + size :]
        else:
            letter = LETTERS[tensor["datatype"]]
            found = list(struct.unpack(f"<{len(piece) // struct.calcsize(letter)}{letter}", piece))
        values[tensor["name"]] = found
        count = 1
        for size in tensor["shape"]:
            count *= size
        assert len(found) == count
    assert at == len(body)
    return head, values


def pack(outputs: list[tuple[str, str, list[int], list[Any]]], *, binary: bool = True) -> Response:
    head: list[dict[str, Any]] = []
    tail = b""
    for name, datatype, shape, values in outputs:
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if not binary:
            head.append(tensor | {"data": [v.decode() if isinstance(v, bytes) else v for v in values]})
            continue
        if datatype == "BYTES":
            data = b"".join(struct.pack("<I", len(value)) + value for value in values)
        else:
            data = struct.pack(f"<{len(values)}{LETTERS[datatype]}", *values)
        head.append(tensor | {"parameters": {"binary_data_size": len(data)}})
        tail += data
    first = json.dumps({"model_name": "m", "outputs": head}).encode()
    headers = {"Inference-Header-Content-Length": str(len(first))} if binary else {}
    return Response(first + tail, headers=headers)


def rows(values: dict[str, list[Any]]) -> Response:
    # A row's logits are its x, as often as the letters of its task.
    logits = [[x] * len(task) for x, task in zip(values["x"], values["adapter"], strict=True)]
    hidden = ("hidden.0", "FP32", [len(logits)], values["x"])
    if len({len(row) for row in logits}) == 1:
        flat = [value for row in logits for value in row]
        return pack([("logits", "FP32", [len(logits), len(logits[0])], flat), hidden])
    return pack([*((f"logits.{at}", "FP32", [len(row)], row) for at, row in enumerate(logits)), hidden])


def digits(values: dict[str, list[Any]], binary: bool) -> Response:
    # The first logit of a row is the sum of its pixels, the second the length of its task's name.
    images = [values["pixels"][start : start + 256] for start in range(0, len(values["pixels"]), 256)]
    tasks = values.get("adapter", ["rotated"] * len(images))
    flat = [float(value) for image, task in zip(images, tasks, strict=True) for value in (sum(image), len(task))]
    return pack([("logits", "FP32", [len(images), 2], flat)], binary=binary)


def application(peer: Peer) -> Starlette:
    async def infer(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "infer: no key"}, 401)
        body = await request.body()
        head, values = parse(body, int(request.headers.get("inference-header-content-length", len(body))))
        peer.heads.append(head)
        peer.values.append(values)
        peer.paths.append(request.url.path)
        if request.path_params["name"] == "toy":
            return rows(values)
        if "pixels" in values:
            return digits(values, "inference-header-content-length" in request.headers)
        echoed = [(t["name"], t["datatype"], t["shape"], values[t["name"]]) for t in head["inputs"]]
        return pack(echoed, binary=peer.binary)

    async def register(request: Request) -> Response:
        async with request.form() as form:
            peer.uploads.append({name: await part.read() for name, part in form.items() if not isinstance(part, str)})
        return JSONResponse({"task": request.path_params["name"], "query": dict(request.query_params)}, 201)

    async def embed(request: Request) -> Response:
        # The embedding of a text is its length and its number of words.
        body = await request.json()
        rows = [struct.pack("<2f", len(text), len(text.split())) for text in body["input"]]
        packed = body.get("encoding_format") == "base64"
        found = [base64.b64encode(row).decode() if packed else struct.unpack("<2f", row) for row in rows]
        data = [{"object": "embedding", "index": at, "embedding": row} for at, row in enumerate(found)]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return JSONResponse({"object": "list", "model": body["model"], "data": data, "usage": usage})

    def document(content: Any) -> Any:
        async def answer(request: Request) -> Response:
            peer.paths.append(request.url.path)
            return JSONResponse(content)

        return answer

    return Starlette(
        routes=[
            Route("/v2", document({"name": "tpeft_deploy", "bundle": peer.bundle, "version": "1"})),
            Route("/v2/models/toy", document(TOY)),
            Route("/v2/models/digits", document(DIGITS)),
            Route("/v2/health/ready", document({"ready": True})),
            Route("/v2/models/{name}/infer", infer, methods=["POST"]),
            Route("/v2/models/{name}/versions/{version}/infer", infer, methods=["POST"]),
            Route("/v1/embeddings", embed, methods=["POST"]),
            Route("/v2/registry/tasks", document([{"name": "sst2"}])),
            Route("/v2/registry/tasks/{name}/aliases/{alias}", document({"version": "1"}), methods=["PUT"]),
            Route("/v2/registry/tasks/{name}/aliases/{alias}/rollback", document({"version": "1"}), methods=["POST"]),
            Route("/v2/registry/tasks/{name}/aliases/{alias}/history", document([{"version": 1}])),
            Route("/v2/registry/tasks/{name}/versions", register, methods=["POST"]),
        ]
    )


@contextmanager
def serving(peer: Peer) -> Iterator[None]:
    config = uvicorn.Config(application(peer), port=0, loop="asyncio", lifespan="off", ws="none", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        peer.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield
    finally:
        server.should_exit = True
        thread.join()
