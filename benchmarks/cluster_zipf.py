"""Where rows find their adapters in a cluster of Ray Serve: real replicas, many adapters, Zipf's demand.

    python -m benchmarks.cluster_zipf [--adapters N] [--rows N] [--replicas N] [--requests N] [--zipf S ...]

Replicas in processes apart, each with a bank of `--rows` rows, are asked for one row at a time by 32 askers, with the
runtime that the ingress has: once with the replicas chosen at random, once by this toolkit's placement. Adapters follow
Zipf's law with each of the exponents. The first half of the requests warms the banks. Each answer is compared with the
model of its adapter.

| column | what |
|---|---|
| hit rate | share of rows that brought no adapter to the device |
| best | that of Belady's eviction, which knows the future, in each replica on the rows that it got |
| most popular | share of the rows that ask for one of the `replicas` x `rows` adapters in most demand |
| imbalance | most rows of a replica over their mean |
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster import free_port
from benchmarks.scale_simulation import belady
from benchmarks.server_echo import HIDDEN, PIXELS, show, small
from tpeft_deploy import Adapter, Bundle, Runtime, TuckerDelta
from tpeft_deploy.runtime import Source
from tpeft_deploy.runtime.cluster import affinity
from tpeft_deploy.runtime.cluster.placement import RowsPart
from tpeft_deploy.runtime.cluster.wire import CallRoute
from tpeft_deploy.runtime.server.registry.files.disk_cache import DiskCache
from tpeft_deploy.runtime.server.registry.files.objects import ObjectStore
from tpeft_deploy.runtime.server.registry.files.stored_objects import open_objects
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.tucker import Array

ASKERS = 32


class Recorded(affinity.ReplicaTable):
    """This toolkit's choice, recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, list[str]] = {}

    @contextmanager
    def running(self, replica: str | None, digests: Sequence[str], rows: int) -> Iterator[None]:
        if replica is not None and rows:
            self.asked.setdefault(replica, []).extend(digests)
        with super().running(replica, digests, rows):
            yield


class AtRandom(Recorded):
    """Replicas chosen at random."""

    def __init__(self) -> None:
        super().__init__()
        self._draw = random.Random(0)

    def choose(self, digest: str, rows: int, avoid: str | None = None) -> str | None:
        return self._draw.choice([name for name in self.replicas if name != avoid])

    def split(self, digests: Sequence[str]) -> list[RowsPart]:
        return [RowsPart(self._draw.choice(self.replicas), tuple(range(len(digests))))]


def adapter(seed: int) -> Adapter:
    """A rank 2 change of both layers of `small`."""
    draw = np.random.default_rng(seed)
    deltas = {}
    for name, shape in (("0.weight", (HIDDEN, PIXELS)), ("2.weight", (10, HIDDEN))):
        factors = tuple(draw.standard_normal((size, 2)).astype(np.float32) for size in shape)
        delta = TuckerDelta(draw.standard_normal((2, 2)).astype(np.float32), factors)
        deltas[name] = TuckerDelta(delta.core, factors, 3.0 / delta.norm())
    return Adapter(deltas, source=f"adapter {seed}")


class Expected:
    """Answers of the merged models to one input, by NumPy alone."""

    def __init__(self, bundle: Bundle, inputs: Array) -> None:
        weights = bundle.base_view.weights
        self._weights = {name: np.asarray(weights[name]) for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
        self._inputs = inputs

    def of(self, own: Adapter) -> Array:
        merged = {name: array + own.deltas[name].dense() if name in own.deltas else array
                  for name, array in self._weights.items()}  # fmt: skip
        hidden = np.maximum(self._inputs @ merged["0.weight"].T + merged["0.bias"], 0)
        answer: Array = hidden @ merged["2.weight"].T + merged["2.bias"]
        return answer


def row_bytes(bundle: Bundle, own: Adapter) -> int:
    """Bytes of a row of the bank."""
    # Without those of the bundle, which have larger ranks and so wider rows.
    with Runtime(bundle.path, provider="cpu", threads=1, preload=False) as runtime:
        runtime.load("own", own)
        runtime.prefetch(["own"]).result()
        usage = runtime.usage()
        return usage["device_bytes"] // (usage["rows"] + 1)


async def play(
    table: Recorded, remote: Any, keys: Sequence[str], inputs: Array, expected: Sequence[Array], demand: Sequence[int]
) -> dict[str, float]:
    """Ask for all rows, and return the figures of the second half."""
    wrong = 0

    async def ask(numbers: Sequence[int]) -> None:
        nonlocal wrong
        for number in numbers:
            answer = await remote.infer({"input": inputs}, keys[number])
            wrong += not np.allclose(next(iter(answer.values())), expected[number], rtol=1e-3, atol=1e-4)

    async def written() -> int:
        reports = [await remote._calls.call("report", CallRoute(replica=name)) for name in table.replicas]
        return sum(own.usage["rows_written"] for own in reports)

    half = len(demand) // 2
    await asyncio.gather(*(ask(demand[first:half:ASKERS]) for first in range(ASKERS)))
    before, begin = await written(), {name: len(own) for name, own in table.asked.items()}
    await asyncio.gather(*(ask(demand[half + first :: ASKERS]) for first in range(ASKERS)))
    loads = await written() - before
    rows = {name: len(own) - begin.get(name, 0) for name, own in table.asked.items()}
    assert wrong == 0, f"{wrong} wrong answers"
    bank = int(os.environ["BENCHMARK_ROWS"])
    best = sum(belady(own, bank, begin.get(name, 0)) for name, own in table.asked.items())
    return {
        "hit rate": 1 - loads / (len(demand) - half),
        "best": best / sum(rows.values()),
        "imbalance": max(rows.values()) / (sum(rows.values()) / len(rows)),
    }


def zipf(adapters: int, exponent: float, requests: int) -> tuple[list[int], float]:
    """Return the adapters that are asked for, and the share of those in most demand that all banks hold."""
    weights = np.arange(1, adapters + 1) ** -exponent
    weights /= weights.sum()
    draw = np.random.default_rng(0)
    of_rank = draw.permutation(adapters)
    held = int(os.environ["BENCHMARK_ROWS"]) * int(os.environ["BENCHMARK_REPLICAS"])
    return of_rank[draw.choice(adapters, requests, p=weights)].tolist(), float(weights[:held].sum())


def measure(place: Path, adapters: int, rows: int, replicas: int, requests: int, exponents: Sequence[float]) -> Any:
    from ray import serve

    from tpeft_deploy.runtime.cluster.cluster_settings import ClusterSettings
    from tpeft_deploy.runtime.cluster.config import NAME
    from tpeft_deploy.runtime.cluster.ray_calls import RayCalls
    from tpeft_deploy.runtime.cluster.remote.remote_runtime import RemoteRuntime
    from tpeft_deploy.runtime.cluster.up import start, stop

    os.environ |= {"BENCHMARK_ROWS": str(rows), "BENCHMARK_REPLICAS": str(replicas)}
    bundle = small(place / "small")
    inputs = np.random.default_rng(0).standard_normal((1, PIXELS)).astype(np.float32)
    answers = Expected(bundle, inputs)
    known = [adapter(seed) for seed in range(adapters)]
    digests: list[str] = []
    expected = [answers.of(own) for own in known]
    keys = [f"adapter-{number}" for number in range(adapters)]
    server: dict[str, Any] = {
        "state": str(place / "cluster"),
        "no_auth": True,
        "access_log": False,
        "port": free_port(),
        "store_url": f"file://{place / 'store'}",
    }
    server |= {"provider": "cpu", "threads": 1, "device_bytes": (rows + 1) * row_bytes(bundle, known[0])}
    figures: dict[str, float] = {}

    async def compare(exponent: float) -> None:
        demand, popular = zipf(adapters, exponent, requests)
        figures[f"zipf {exponent}: most popular"] = popular
        for name, table in (("random", AtRandom()), ("this toolkit", Recorded())):
            deployment = serve.get_deployment_handle("replica", NAME)
            key = str(deployment.deployment_id)
            table.update(dict.fromkeys(affinity.table_of(key).replicas))  # the router tells changes only
            affinity._tables[key] = table
            remote = RemoteRuntime(bundle, RayCalls(deployment), table, lambda _: Quota(), asyncio.get_running_loop())
            await remote.open()
            remote.register({key: Source(digest, lambda: known[0]) for key, digest in zip(keys, digests, strict=True)})
            for own, value in (await play(table, remote, keys, inputs, expected, demand)).items():
                figures[f"zipf {exponent}, {name}: {own}"] = value

    try:
        start(ClusterSettings(str(bundle.path), server, replicas=replicas, cpus=0.1))
        store = ObjectStore(open_objects(server["store_url"], 10.0), DiskCache(place / "cache", 1 << 30))
        digests += [
            store.write(own.to_bytes()) for own in known
        ]  # not before: a new registry takes an empty store only
        for exponent in exponents:
            asyncio.run(compare(exponent))
    finally:
        stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=300, help="rows of a replica's bank")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--zipf", type=float, nargs="+", default=[1.0, 1.3])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = options.adapters, options.rows, options.replicas, options.requests, options.zipf
    with tempfile.TemporaryDirectory() as place:
        show(measure(Path(place), *sizes), as_json=options.json)


if __name__ == "__main__":
    main()
