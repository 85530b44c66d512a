"""What a cluster of Ray Serve costs beyond one server: time of a request, and of each hop of it.

    python -m benchmarks.cluster [--requests N] [--rounds N] [--json]

| case | what |
|---|---|
| server | a request over HTTP to `tpeft-deploy serve` |
| cluster | the same request to `tpeft-deploy cluster up` with two replicas: proxy, ingress, router, replica |
| hop | an empty call of a replica by a handle: what Ray takes from one process to another and back |
| infer by handle | an inference by a handle of the replicas, without proxy and ingress |
| runtime | the same inference on a runtime in this process |

One client, one request at a time, on a model that takes next to no time; cases take turns, figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from benchmarks.server_echo import PIXELS, infer_request, show, small, started
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.tucker import Array

TASK = "task-1"
CODE = "from tpeft_deploy.cli import main; main()"


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def over_http(port: int, requests: int) -> list[float]:
    """Seconds of each request on one connection."""
    body, length = infer_request()
    headers = {"inference-header-content-length": length, "content-type": "application/octet-stream"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    took = []
    for _ in range(requests):
        began = time.perf_counter()
        connection.request("POST", f"/v2/models/{TASK}/infer", body, headers)
        answer = connection.getresponse()
        answer.read()
        took.append(time.perf_counter() - began)
        assert answer.status == 200, answer.status
    connection.close()
    return took


async def timed(requests: int, call: Callable[[], Awaitable[object]]) -> list[float]:
    """Seconds of each call."""
    took = []
    for _ in range(requests):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
    return took


async def by_handle(runtime: Runtime, inputs: dict[str, Array], requests: int) -> dict[str, list[float]]:
    from ray import serve

    from tpeft_deploy.runtime.cluster.affinity import table_of
    from tpeft_deploy.runtime.cluster.config import NAME
    from tpeft_deploy.runtime.cluster.ray_calls import RayCalls
    from tpeft_deploy.runtime.cluster.remote.remote_runtime import RemoteRuntime
    from tpeft_deploy.runtime.cluster.wire import CallRoute
    from tpeft_deploy.runtime.server.tenancy.quotas import Quota

    handle = serve.get_deployment_handle("replica", NAME)
    calls, table = RayCalls(handle), table_of(str(handle.deployment_id))
    bundle = Bundle.open(Path(os.environ["BENCHMARK_BUNDLE"]))
    remote = RemoteRuntime(bundle, calls, table, lambda _: Quota(), asyncio.get_running_loop())
    await remote.open()
    return {
        "hop": await timed(requests, lambda: calls.call("hottest", CallRoute())),
        "infer by handle": await timed(requests, lambda: remote.infer(inputs, TASK)),
        "runtime": await timed(requests, lambda: runtime.infer(inputs, TASK)),
    }


def measure(place: Path, requests: int, rounds: int) -> dict[str, float]:
    from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
    from tpeft_deploy.runtime.cluster.up import start, stop

    bundle = small(place / "small")
    os.environ["BENCHMARK_BUNDLE"] = str(bundle.path)
    inputs = {"input": np.random.default_rng(0).standard_normal((1, PIXELS)).astype(np.float32)}
    port = free_port()
    server = {"state": str(place / "cluster"), "no_auth": True, "access_log": False, "port": port}
    server |= {"provider": "cpu", "threads": 1}
    took: dict[str, list[float]] = {}
    line = ["-c", CODE, "serve", str(bundle.path), "--state", str(place / "server"), "--no-auth", "--port", "0"]
    line += ["--provider", "cpu", "--threads", "1", "--no-access-log"]
    with (
        Runtime(bundle.path, provider="cpu", threads=1) as runtime,
        started(line, r"serving on http://\S+:(\d+)") as (_, direct),
    ):
        try:
            start(ClusterSettings(str(bundle.path), server, replicas=2, cpus=0.1))
            for round_ in range(rounds + 1):
                found = {"server": over_http(direct, requests), "cluster": over_http(port, requests)}
                found |= asyncio.run(by_handle(runtime, inputs, requests))
                if round_:  # the first opens connections and routers
                    for name, own in found.items():
                        took.setdefault(name, []).extend(own)
        finally:
            stop()
    figures = {f"{name}, ms": 1000 * statistics.median(own) for name, own in took.items()}
    figures |= {f"{name}, 99th percentile, ms": 1000 * float(np.quantile(own, 0.99)) for name, own in took.items()}
    figures["cluster / server"] = figures["cluster, ms"] / figures["server, ms"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        show(measure(Path(place), options.requests, options.rounds), as_json=options.json)


if __name__ == "__main__":
    main()
