"""The table of servers that answer the same requests."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables.peer_cases import Batch, check, oracle
from benchmarks.tables.peer_losses import server_losses
from benchmarks.tables.peer_models import Size, Work
from benchmarks.tables.server_load import Load, Request, ask, load
from benchmarks.tables.server_process import Failed, Server, free_port, started
from benchmarks.tables.table import Figure, Row, Settings, Table
from tpeft_deploy.runtime.bench.measure import spread
from tpeft_deploy.tucker import Array

__all__ = ["CONNECTIONS", "OURS", "measure", "v2_binary", "v2_json"]

ROOT = Path(__file__).parents[2]
OURS = "this toolkit, JSON"
CONNECTIONS, ROUNDS, TASKS = 32, 5, 4
COLUMNS = ("ratio", "requests/s", "p50, ms", "p99, ms", "processor, us a request", "memory, MB", "client busy")
TEXT = """\
A classifier of 64 features, 32 hidden and 32 classes with 4 LoRA adapters of rank 8, asked for rows one at a time by a
client on the second core with 32 connections; requests name the adapters in turn.  Each server has the first core and
ONNX Runtime with one thread.  This toolkit holds one base and the adapters; KServe's SDK and MLServer serve a merged
model for each adapter under its name, LitServe chooses among the merged models by a field of the request, and Ray Serve
loads them by `serve.multiplexed`.  All run as their documentation starts them, on one worker, this toolkit without
keys, which the others have not.  It batches requests by default, the others do not.  Ray's replica takes 32 requests
at once rather than 5.
Requests and answers are JSON, by the open inference protocol where the server has it; "binary" is its tensor extension.

"ratio" is the requests a second of the row divided by those of this toolkit with JSON in the same round: below 1 the
row is slower.  Latencies are those that the client sees, with 32 requests under way; "processor" is the time of all
processes of the server, "memory" theirs after the load with shared pages counted once.  "client busy" is the share of
the time that the client had its core: near 1 the client, not the server, is the limit.  While one is measured the
others are stopped.  Before anything is timed, each server's answers for every adapter are compared with PEFT's.
"""


@dataclass(frozen=True)
class Peer:
    """A server, and how it is asked.

    Args:
        command: function that takes a port and gives the command line.
        request: the request for a row with a task.
        answer: the row in an answer.
        missing: how to install it, where it is not installed.
        environment: variables.
    """

    command: Callable[[int], Sequence[str]]
    request: Callable[[str, Array], Request]
    answer: Callable[[bytes], Array]
    missing: str = ""
    environment: Mapping[str, str] | None = None


def measure(settings: Settings) -> Table:
    """Compare the servers that are installed.

    Raises:
        Difference: a server's answer is not PEFT's.
        Failed: a server did not start or refused a request.
    """
    work = Work(settings.cache, "classifier", Size(tasks=TASKS))
    with tempfile.TemporaryDirectory() as place:
        peers = _peers(work, settings, Path(place))
        figures = _compare(work, peers, settings, Path(place))
    rows = tuple(Row(name, figures.get(name) or {COLUMNS[0]: peer.missing}) for name, peer in peers.items())
    return Table("servers", "Servers on the same model", TEXT, COLUMNS, rows, server_losses(rows))


def _compare(work: Work, peers: Mapping[str, Peer], settings: Settings, place: Path) -> dict[str, dict[str, Figure]]:
    batch = Batch.of(work, 0, TASKS)
    expected = oracle(work, batch)
    rows = [(task, batch.inputs["input"][row : row + 1]) for row, task in enumerate(batch.tasks)]
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name, peer in peers.items():
            if not peer.missing:
                servers[name] = stack.enter_context(_checked(name, peer, rows, expected, place))
        turns = {name: [peers[name].request(*row) for row in rows] for name in servers}
        found = _rounds(servers, turns, settings.seconds / ROUNDS)
    rates = {name: [len(one.latencies) / one.seconds for one, _, _ in own] for name, own in found.items()}
    return {name: _figures(own, rates[name], rates[OURS]) for name, own in found.items()}


@contextmanager
def _checked(
    name: str, peer: Peer, rows: Sequence[tuple[str, Array]], expected: Array, place: Path
) -> Iterator[Server]:
    """A server whose answers are PEFT's, stopped until its turn."""
    port = free_port()
    log = place / f"{name}.log"
    with started(peer.command(port), port, log, {"PYTHONPATH": str(ROOT), **(peer.environment or {})}) as server:
        requests = [peer.request(*row) for row in rows]
        _until_ready(port, requests, log)
        check(name, lambda: np.concatenate([peer.answer(ask(port, each)) for each in requests]), expected)
        server.signal(signal.SIGSTOP)
        yield server


def _until_ready(port: int, requests: Sequence[Request], log: Path) -> None:
    """Some servers listen before their models are loaded."""
    until = time.monotonic() + 60
    while True:
        try:
            for request in requests:
                ask(port, request)
        except (Failed, OSError) as error:
            if time.monotonic() > until:
                raise Failed(f"{error}\n{log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.2)
        else:
            return


Turn = tuple[Load, float, float]


def _rounds(
    servers: Mapping[str, Server], requests: Mapping[str, Sequence[Request]], seconds: float
) -> dict[str, list[Turn]]:
    """Name -> load, processor seconds and bytes of each round, of which the first does not count."""
    found: dict[str, list[Turn]] = {name: [] for name in servers}
    for turn in range(ROUNDS + 1):
        for name, server in servers.items():
            server.signal(signal.SIGCONT)
            load(server.port, requests[name], CONNECTIONS, min(seconds, 0.5))
            before = server.spent()
            loaded = load(server.port, requests[name], CONNECTIONS, seconds)
            if turn:
                found[name].append((loaded, server.spent() - before, server.memory()))
            server.signal(signal.SIGSTOP)
    return found


def _figures(turns: Sequence[Turn], rates: list[float], ours: list[float]) -> dict[str, Figure]:
    loads = [one for one, _, _ in turns]
    return {
        "ratio": spread([rate / other for rate, other in zip(rates, ours, strict=True)]),
        "requests/s": spread(rates),
        "p50, ms": spread([1e3 * float(np.quantile(one.latencies, 0.5)) for one in loads]),
        "p99, ms": spread([1e3 * float(np.quantile(one.latencies, 0.99)) for one in loads]),
        "processor, us a request": spread([1e6 * spent / len(one.latencies) for one, spent, _ in turns]),
        "memory, MB": round(turns[-1][2] / 1e6),
        "client busy": spread([one.busy for one in loads]),
    }


def _peers(work: Work, settings: Settings, place: Path) -> dict[str, Peer]:
    (place / "models").mkdir()
    for path in work.folded(work.tasks):
        (place / "models" / path.name).symlink_to(path.resolve())
    models = str(place / "models")

    def app(python: Path | str, name: str) -> Callable[[int], list[str]]:
        return lambda port: [str(python), "-m", f"benchmarks.tables.server_peers.{name}_app", models, str(port)]

    def installed(name: str) -> tuple[Path, str]:
        python = settings.cache.resolve() / "servers" / name / "bin" / "python"
        command = f"benchmarks/tables/install_peers.sh {settings.cache} {name}"
        return python, "" if python.exists() else f"not installed: {command}"

    ours = [sys.executable, "-c", "from tpeft_deploy.cli import main; main()", "serve", str(work.bundle.path)]
    ours += ["--no-auth", "--threads", "1"]

    def serve(port: int) -> list[str]:
        return [*ours, "--port", str(port), "--state", str(place / f"state-{port}")]

    kserve = "" if find_spec("kserve") else "not installed: pip install kserve"
    peers = {
        OURS: Peer(serve, v2_json, _of_v2),
        "this toolkit, binary": Peer(serve, v2_binary, _of_binary),
        "KServe's SDK": Peer(app(sys.executable, "kserve"), v2_json, _of_v2, kserve),
    }
    for title, name, request in (("LitServe", "litserve", _named), ("Ray Serve, multiplexed", "ray", _multiplexed)):
        python, missing = installed(name)
        peers[title] = Peer(app(python, name), request, _of_plain, missing, {"RAY_USAGE_STATS_ENABLED": "0"})
    python, missing = installed("mlserver")
    peers["MLServer"] = Peer(app(python, "mlserver"), v2_json, _of_v2, missing)
    return peers


def v2_json(task: str, row: Array) -> Request:
    tensor = {"name": "input", "shape": list(row.shape), "datatype": "FP32", "data": row.ravel().tolist()}
    return Request(f"/v2/models/{task}/infer", json.dumps({"inputs": [tensor]}).encode())


def _of_v2(body: bytes) -> Array:
    output: dict[str, Any] = json.loads(body)["outputs"][0]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def v2_binary(task: str, row: Array) -> Request:
    sizes = {"binary_data_size": row.nbytes}
    tensor = {"name": "input", "shape": list(row.shape), "datatype": "FP32", "parameters": sizes}
    document = {"inputs": [tensor], "outputs": [{"name": "output", "parameters": {"binary_data": True}}]}
    text = json.dumps(document).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
    return Request(f"/v2/models/{task}/infer", text + row.tobytes(), headers)


def _of_binary(body: bytes) -> Array:
    output, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    return np.frombuffer(body[end:], np.float32).reshape(output["outputs"][0]["shape"])


def _named(task: str, row: Array) -> Request:
    return Request("/predict", json.dumps({"task": task, "input": row.tolist()}).encode())


def _multiplexed(task: str, row: Array) -> Request:
    return Request("/", json.dumps({"input": row.tolist()}).encode(), {"serve_multiplexed_model_id": task})


def _of_plain(body: bytes) -> Array:
    return np.array(json.loads(body)["output"], np.float32)
