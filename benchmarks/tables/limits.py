"""What the machine can do: memory bandwidth, rate of float32 products, requests through the smallest ASGI server."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from benchmarks.server_echo import CLIENTS, echoing, infer_request
from benchmarks.tables.table import Row, Settings, Table
from tpeft_deploy.runtime.bench.measure import Case, interleave, spread
from tpeft_deploy.runtime.bench.results import Spread
from tpeft_deploy.tucker import Array

__all__ = ["bandwidth_case", "gemm_case", "measure"]

FLOATS = 1 << 24  # 64 MiB an array: larger than the processor's cache
SIDE = 1024
CONNECTIONS, TURNS = 32, 5
TEXT = f"""What bounds the results above. The triad is a += s * b by NumPy on arrays of 64 MiB, in as many threads as
the sessions have; it reads or writes five arrays. A product is that of two float32 matrices of {SIDE} x {SIDE}, by a
session of ONNX Runtime with a constant right side, and by NumPy; both were found to give the same. The echo is an
ASGI application of one line under uvicorn (uvloop, httptools) that returns a binary V2 request of one row: the server
on one core, a client with {CONNECTIONS} connections on the other ({{client}}).

A product with one vector reads each weight for two operations, so that the bandwidth bounds it. The table of forms
has the share of these bounds that each of its runs reaches."""


def bandwidth_case(threads: int) -> tuple[Case, float]:
    """A triad, and the bytes that it moves."""
    total = np.zeros(FLOATS, np.float32)
    other, scaled = np.ones(FLOATS, np.float32), np.zeros(FLOATS, np.float32)
    parts = [slice(FLOATS * n // threads, FLOATS * (n + 1) // threads) for n in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def part(own: slice) -> None:
        np.multiply(other[own], np.float32(0.5), out=scaled[own])
        np.add(total[own], scaled[own], out=total[own])

    return lambda: list(pool.map(part, parts)), 5.0 * total.nbytes


def gemm_case(threads: int) -> tuple[Callable[[], Array], Callable[[], Array], float]:
    """A product by ONNX Runtime, the same by NumPy, and its floating-point operations."""
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((SIDE, SIDE)).astype(np.float32) for _ in range(2))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in ("x", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [SIDE, SIDE], right.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", ports[:1], ports[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def by_session() -> Array:
        product: Array = session.run(None, {"x": left})[0]
        return product

    return by_session, lambda: left @ right, 2.0 * SIDE**3


def measure(settings: Settings) -> Table:
    """Measure the machine.

    Raises:
        SystemExit: the two products differ.
    """
    triad, moved = bandwidth_case(settings.threads)
    session, numpy, operations = gemm_case(settings.threads)
    if not np.allclose(session(), numpy(), rtol=1e-3, atol=1e-2):
        raise SystemExit("compare products of ONNX Runtime and NumPy: expected equal ones, got others")
    times = interleave({"triad": triad, "session": session, "numpy": numpy}, settings.seconds)
    gemm = [operations / each / 1e9 for each in times["session"]]
    numpys = [operations / each / 1e9 for each in times["numpy"]]
    bandwidth = [moved / each / 1e9 for each in times["triad"]]
    vector = statistics.median(bandwidth) / 4 * 2
    rows = [
        Row("memory bandwidth, triad", {"rate": spread(bandwidth), "unit": "GB/s"}),
        Row("product, ONNX Runtime", {"rate": spread(gemm), "unit": "GFLOP/s", "share of ONNX Runtime's": 1.0}),
        Row(
            "product, NumPy",
            {
                "rate": spread(numpys),
                "unit": "GFLOP/s",
                "share of ONNX Runtime's": spread([b / a for a, b in zip(gemm, numpys, strict=True)]),
            },
        ),
        Row(
            "product with one vector, by memory bandwidth",
            {"rate": vector, "unit": "GFLOP/s", "share of ONNX Runtime's": vector / statistics.median(gemm)},
        ),
    ]
    client, echoed = echo_rates(settings.seconds)
    rows += echoed
    return Table("limits", "Limits of the machine", TEXT.format(client=client), COLUMNS, tuple(rows))


COLUMNS = ("rate", "unit", "share of ONNX Runtime's")


def echo_rates(seconds: float) -> tuple[str, list[Row]]:
    """Requests in a second, and processor time of one; no rows where a client and a server cannot have a core each."""
    if len(os.sched_getaffinity(0)) < 2 or shutil.which("taskset") is None:
        return "nothing (it needs two cores and taskset)", []
    client = "wrk" if shutil.which("wrk") else "asyncio"
    body, length = infer_request()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": length}
    rates, costs = [], []
    with tempfile.TemporaryDirectory() as place, echoing([("/", headers, body)]) as target:
        for turn in range(TURNS + 1):
            spent, began = target.spent(), time.perf_counter()
            answered = CLIENTS[client](target, max(1.0, seconds / TURNS), CONNECTIONS, Path(place))
            if turn:  # the first warms up
                rates.append(answered / (time.perf_counter() - began))
                costs.append(1e6 * (target.spent() - spent) / answered)
    return client, [_echo("requests/s", rates), _echo("us of processor time a request", costs)]


def _echo(unit: str, values: list[float]) -> Row:
    found: Spread = spread(values)
    return Row(f"ASGI echo, {unit}", {"rate": found, "unit": unit})
