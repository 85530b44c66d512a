"""Where a request's processor time goes: the runtime's batching, the service around it, and HTTP's side.

    python -m benchmarks.server_layers [--rounds N] [--seconds S] [--clients N] [--json]

One process on one core, without sockets: the ASGI application is called as uvicorn calls it.  The model, the tasks and
the request are those of benchmarks/server_echo.py.  Layers take turns; medians are printed.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.server_echo import PIXELS, TASKS, TENANTS, infer_request, show, small
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.server.operations.options import Options, order_of
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.registry import State, open_state
from tpeft_deploy.runtime.server.rest.app import Application, application
from tpeft_deploy.runtime.server.telemetry.metrics import Metrics
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import InferRequest

Ask = Callable[[int], Awaitable[object]]
QUOTA = Quota(requests_per_s=1e9, rows_per_s=1e9)
PAIRS = [(task, tenant) for tenant in range(TENANTS) for task in range(TASKS)]


def through_http(app: Application, state: State, document: bytes | None = None) -> Ask:
    """Ask the application.

    Args:
        document: body in JSON; None for one in the binary extension.
    """
    body, length = (document, None) if document is not None else infer_request()
    form = [
        (b"content-type", b"application/json" if length is None else b"application/octet-stream"),
        *([] if length is None else [(b"inference-header-content-length", length.encode())]),
    ]
    keys = [state.keys.create(f"tenant-{number}", "infer", by="a benchmark")[1] for number in range(TENANTS)]
    headers = [
        [
            (b"host", b"127.0.0.1"),
            (b"authorization", f"Bearer {key}".encode()),
            *form,
            (b"content-length", b"%d" % len(body)),
        ]
        for key in keys
    ]

    async def ask(number: int) -> None:
        task, tenant = PAIRS[number % len(PAIRS)]
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            if message.get("status", 200) != 200:
                raise SystemExit(f"not answered: {message}")

        path = f"/v2/models/task-{task}/infer"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers[tenant]}
        await app(scope, receive, send)

    return ask


def through_service(service: Service, row: np.ndarray[Any, Any]) -> Ask:
    who = [Principal(f"tenant-{number}", Role.INFER, "a benchmark") for number in range(TENANTS)]

    async def ask(number: int) -> None:
        task, tenant = PAIRS[number % len(PAIRS)]
        await service.infer(who[tenant], InferRequest(f"task-{task}", {"input": row}))

    return ask


def through_runtime(runtime: Runtime, row: np.ndarray[Any, Any]) -> Ask:
    async def ask(number: int) -> None:
        task, tenant = PAIRS[number % len(PAIRS)]
        await runtime.infer({"input": row}, f"task-{task}", tenant=f"tenant-{tenant}")

    return ask


async def crowd(ask: Ask, seconds: float, clients: int) -> tuple[float, float]:
    """Processor time of a request, of the process and of the event loop's thread, in microseconds."""
    until = time.perf_counter() + seconds
    counts = [0] * clients

    async def client(own: int) -> None:
        for number in itertools.count(own):
            if time.perf_counter() > until:
                return
            await ask(number)
            counts[own] += 1

    before = time.process_time(), time.thread_time()
    await asyncio.gather(*(client(own) for own in range(clients)))
    spent = time.process_time() - before[0], time.thread_time() - before[1]
    return 1e6 * spent[0] / sum(counts), 1e6 * spent[1] / sum(counts)


@contextmanager
def in_process(bundle: Bundle, place: Path) -> Iterator[tuple[Runtime, Service, Application, State]]:
    """Open a server without sockets."""
    limits = Limits(max_rows=8)
    with open_state(place, default=QUOTA) as state:
        order = order_of(state, limits)
        with Runtime(bundle.path, provider="cpu", threads=1, order=order, limits=limits) as runtime:
            metrics = Metrics(100, runtime.residency, runtime.usage, lambda: 0)
            service = Service(runtime, bundle, state, order, Options(limits=limits, observe=metrics.inference))
            yield runtime, service, application(service, observe=metrics.request), state


def measure(options: argparse.Namespace, place: Path) -> dict[str, float]:
    row = np.random.default_rng(0).standard_normal((1, PIXELS)).astype(np.float32)
    with in_process(small(place / "bundle"), place / "state") as (runtime, service, app, state):
        layers = {
            "runtime": through_runtime(runtime, row),
            "and the service": through_service(service, row),
            "and HTTP's side": through_http(app, state),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for turn in range(options.rounds + 1):
                for name, ask in layers.items():
                    costs = runner.run(crowd(ask, options.seconds, options.clients))
                    if turn:
                        found[name].append(costs)
    figures = {}
    for name, both in found.items():
        figures[f"{name}, us of processor time"] = statistics.median(whole for whole, _ in both)
        figures[f"{name}, of it on the event loop"] = statistics.median(loop for _, loop in both)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="Of each turn.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as place:
        figures = measure(options, Path(place))
    show(figures, as_json=options.json)


if __name__ == "__main__":
    main()
