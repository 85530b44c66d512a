"""What the server costs beyond the runtime: throughput of many tenants, a flood beside others, and 10,000 tasks.

    python -m benchmarks.server --cache DIRECTORY [--threads N] [--seconds S] [--only PART] [--json]

| part | what |
|---|---|
| throughput | rows a second of 32 clients of 4 tenants through the service, against `Runtime.infer` alone |
| flood | latency of one tenant beside another that behaves, and that floods |
| known | start of the service and processor time of a request with 10 and 10,000 registered tasks |

The operations are called as REST and gRPC call them, without a socket: benchmarks/server_echo.py measures the wire.
Cases take turns in one process; ratios are medians of the ratios within a round.  Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert

from benchmarks.crowd import Ask, Crowd, drawn
from benchmarks.runtime import TASKS, cached, texts
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime import Limits
from tpeft_deploy.runtime.server.operations.options import Options, order_of
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.registry import State, open_state, schema
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.server.v2.messages import InferRequest

Figures = dict[str, float]
TENANTS = [f"tenant-{number}" for number in range(4)]
QUOTA = Quota(requests_per_s=1e6, rows_per_s=1e6, queue_share=0.5)
ROW = texts(1)


@contextmanager
def serving(bundle: Bundle, place: Path, threads: int, **limits: Any) -> Iterator[Service]:
    """A service on a runtime and a registry of its own."""
    own = Limits(**limits)
    with open_state(place, default=QUOTA) as state:
        order = order_of(state, own)
        with Runtime(bundle.path, provider="cpu", threads=threads, order=order, limits=own) as runtime:
            yield Service(runtime, bundle, state, order, Options(limits=own))


def through(service: Service, tenants: Iterable[str] = TENANTS) -> Ask:
    who = {tenant: Principal(tenant, Role.INFER, "a benchmark") for tenant in [*tenants, "quiet", "flood"]}
    return lambda tenant, task: service.infer(who[tenant], InferRequest(task, ROW))


async def crowd(ask: Ask, seconds: float, clients: int) -> float:
    """Answers a second of clients that each ask again when they are answered."""
    own = Crowd(ask, seconds)
    names = itertools.cycle(TENANTS)
    await asyncio.gather(*(own.client(next(names), drawn(TASKS, number)) for number in range(clients)))
    return own.answered / (time.perf_counter() - own.began)


def measure_throughput(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    with (
        tempfile.TemporaryDirectory() as place,
        Runtime(bundle.path, provider="cpu", threads=options.threads) as runtime,
        serving(bundle, Path(place), options.threads) as service,
    ):
        asks: dict[str, Ask] = {"runtime": lambda _, task: runtime.infer(ROW, task), "service": through(service)}
        rates: dict[str, list[float]] = {name: [] for name in asks}
        for turn in range(2 + round(options.seconds)):
            for name, ask in asks.items():
                rate = asyncio.run(crowd(ask, 0.5, 32))
                if turn >= 2:
                    rates[name].append(rate)
    ratios = [b / a for a, b in zip(rates["runtime"], rates["service"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "runtime, rows a second": statistics.median(rates["runtime"]),
        "service / runtime": statistics.median(ratios),
        "service / runtime, quartiles apart": high - low,
    }


async def beside(ask: Ask, seconds: float, others: int) -> list[float]:
    """Latencies in ms of a tenant that asks every 40 ms, beside so many clients of another."""
    own = Crowd(ask, seconds)
    flood = (own.client("flood", itertools.repeat(TASKS[number % len(TASKS)])) for number in range(others))
    await asyncio.gather(own.quiet(TASKS[0], 0.04), *flood)
    return own.latencies


def measure_flood(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    figures: Figures = {}
    cases = {"alone": 0, "beside 8 clients": 8, "beside 200 clients": 200}
    for rows in (8, 32):
        with (
            tempfile.TemporaryDirectory() as place,
            serving(bundle, Path(place), options.threads, max_rows=rows) as service,
        ):
            times: dict[str, list[float]] = {name: [] for name in cases}
            for turn, (name, others) in itertools.product(range(round(options.seconds / 3) + 1), cases.items()):
                got = asyncio.run(beside(through(service), 2.0, others))
                times[name] += got if turn else []
            for name, got in times.items():
                figures[f"runs of {rows} rows: p99 {name}, ms"] = float(np.percentile(got, 99))
                figures[f"runs of {rows} rows: median {name}, ms"] = statistics.median(got)
    return figures


def measure_known(options: argparse.Namespace) -> Figures:
    bundle = cached(options.cache, "encoder", TASKS)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as place:
        costs: dict[int, list[float]] = {10: [], 10_000: []}
        for count in costs:
            register_tasks(bundle, Path(place) / str(count), count)
        for _ in range(5):
            for count, own in costs.items():
                began = time.perf_counter()
                with open_state(Path(place) / str(count), default=QUOTA) as state:
                    opened = time.perf_counter() - began
                    order = order_of(state, Limits())
                    with Runtime(bundle.path, provider="cpu", threads=1, order=order, preload=False) as runtime:
                        began = time.perf_counter()
                        service = Service(runtime, bundle, state, order)
                        opened += time.perf_counter() - began
                        own.append(asyncio.run(_cost(service, round(20 * options.seconds))))
                key = f"{count} registered: state and service opened, s"
                figures[key] = min(figures.get(key, opened), opened)
        figures["10 registered: processor time of a request, ms"] = 1000 * statistics.median(costs[10])
        ratios = [b / a for a, b in zip(costs[10], costs[10_000], strict=True)]
        figures["10,000 registered / 10: processor time of a request"] = statistics.median(ratios)
    return figures


def register_tasks(bundle: Bundle, place: Path, count: int) -> None:
    """So many registered tasks, as `Tasks.add` leaves them, without a transaction for each."""
    with open_state(place) as state:
        digest = _blob(state, bundle)
        own = range(1, count + 1)
        with state._database.writing() as connection:
            connection.execute(insert(schema.tenants).values(name="quiet", quota={}, created=0.0))
            tasks = [
                {"id": n, "tenant": "quiet", "name": f"task-{n}-own", "next_number": 2, "deleted": False} for n in own
            ]
            connection.execute(insert(schema.tasks), tasks)
            versions = [
                {"task": n, "number": 1, "digest": digest, "bytes": 1, "created": 0.0, "by": "a benchmark"} for n in own
            ]
            connection.execute(insert(schema.versions), versions)
            connection.execute(
                insert(schema.aliases), [{"task": n, "alias": "current", "number": 1, "previous": None} for n in own]
            )


def _blob(state: State, bundle: Bundle) -> str:
    adapter = bundle.adapter(TASKS[0])
    return state.tasks._blobs.write(replace(adapter).to_bytes())


async def _cost(service: Service, count: int) -> float:
    ask = through(service)
    for number in range(1, 9):
        await ask("quiet", f"task-{number}-own")
    began = time.process_time()
    for number in range(count):
        await ask("quiet", f"task-{number % 8 + 1}-own")
    return (time.process_time() - began) / count


PARTS = {"throughput": measure_throughput, "flood": measure_flood, "known": measure_known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="Where exported bundles are kept.")
    parser.add_argument("--threads", type=int, default=1, help="Of each session.")
    parser.add_argument("--seconds", type=float, default=20.0, help="For each part, about.")
    parser.add_argument("--only", choices=sorted(PARTS), action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    document = {name: PARTS[name](options) for name in options.only or PARTS}
    if options.json:
        print(json.dumps({"threads": options.threads, **document}, indent=1))
        return
    for name, figures in document.items():
        print(name)
        for what, value in figures.items():
            print(f"  {what:60} {value:10.3f}")


if __name__ == "__main__":
    main()
