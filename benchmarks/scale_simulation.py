"""Placement of very many adapters on many replicas, simulated with the router's own policy.

    python -m benchmarks.scale_simulation [--adapters N] [--replicas N] [--requests N] [--out DIRECTORY]
        [--plots FILE.svg]

Requests of one row arrive at random; their adapters follow Zipf's law (exponent 1). Of the thousand adapters most in
demand, some change with others every few seconds, and replicas go and come with empty banks. A replica computes one row
at a time, a row of an adapter that is not resident takes as long as `MISS` more, and the bank evicts as the runtime's
does. The first half of the requests only warms the banks.

| column | what |
|---|---|
| hit rate | share of rows with their adapter resident |
| best | that of Belady's eviction, which knows the future, in each replica on the requests that it got |
| imbalance | most rows of a replica that was there all the time over their mean |
| wait | rows before one in its replica's queue: mean, 99th percentile |
| loads | adapters that a replica loads in a second, and megabytes (2.6 each, as of rank 8 on all linears of ViT-base) |
| over time | hit rate of each twelfth of all requests, those that warm the banks too |

Policies: this toolkit's (`runtime.cluster.placement`), random, round robin, least loaded, and that of Ray Serve 2.60's
multiplexing (replicas that have the adapter, else those with the fewest; of two at random, the less loaded).
Everything is seeded: the same arguments give the same figures.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import scale_plots
from tpeft_deploy.runtime.adapters.eviction import UseHistory
from tpeft_deploy.runtime.cluster.placement import AffinePlacement

ROW = 0.01  # seconds of a row
MISS = 0.5  # rows that a load takes
BUSY = 0.7  # share of the replicas' time that rows would take without loads
MEGABYTES = 2.6  # of an adapter
HOT, MOVED, EVERY = 1000, 20, 5.0  # adapters in demand, those that change places with others, and seconds between
COMES = 20.0  # seconds between a replica that goes and its successor's coming
PARTS = 12  # of all requests, for the hit rate over time


@dataclass
class Result:
    """Figures of one policy."""

    hit_rate: float
    best: float
    imbalance: float
    mean_wait: float
    wait_99: float
    loads_per_replica_s: float
    megabytes_per_replica_s: float
    over_time: list[tuple[float, float]]  # seconds at which a part ends, and its hit rate


@dataclass
class Known:
    """An adapter that a replica was asked for."""

    digest: str
    heat: float = 0.0
    epoch: int = 0


class Replica:
    """Bank with the runtime's eviction, and a queue."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.bank: OrderedDict[str, Known] = OrderedDict()
        self.known: dict[str, Known] = {}
        self.uses = UseHistory()
        self.free_at = 0.0
        self.computed = 0
        self.asked: list[str] = []
        self.counted_from = 0

    def take(self, digest: str) -> tuple[bool, str | None]:
        """Compute a row; return whether its adapter was resident, and the one that made room."""
        self.asked.append(digest)
        hit, gone = digest in self.bank, None
        own = self.known.setdefault(digest, Known(digest))
        self.uses.add(own, len(self.bank))
        if not hit and len(self.bank) >= self.rows:
            victim = self.uses.victim(self.bank.values())
            assert victim is not None
            gone = victim.digest
            del self.bank[gone]
        self.bank[digest] = own
        self.bank.move_to_end(digest)
        return hit, gone


Policy = Callable[[str, float, dict[str, float], dict[str, Replica], dict[str, set[str]]], str]


def affine() -> Policy:
    """Return this toolkit's policy."""
    placement = AffinePlacement()
    known: set[str] = set()

    def choose(
        digest: str, now: float, load: dict[str, float], replicas: dict[str, Replica], _: dict[str, set[str]]
    ) -> str:
        if not known or not known <= replicas.keys():  # one that comes takes the place of one that goes
            known.clear()
            known.update(replicas)
            placement.update(dict.fromkeys(replicas, 1.0))
        name = placement.choose(digest, load, lambda name, own: own in replicas[name].bank)
        placement.record(digest, name, 1, now)
        return name

    return choose


def at_random(draw: random.Random) -> Policy:
    return lambda digest, now, load, replicas, where: draw.choice(list(replicas))


def round_robin() -> Policy:
    count = [0]

    def choose(
        digest: str, now: float, load: dict[str, float], replicas: dict[str, Replica], _: dict[str, set[str]]
    ) -> str:
        count[0] += 1
        return list(replicas)[count[0] % len(replicas)]

    return choose


def least_loaded() -> Policy:
    return lambda digest, now, load, replicas, where: min(replicas, key=lambda name: load[name])


def multiplexing(draw: random.Random) -> Policy:
    """Return the policy of Ray Serve's multiplexing, told at once what is resident."""

    def choose(
        digest: str, now: float, load: dict[str, float], replicas: dict[str, Replica], where: dict[str, set[str]]
    ) -> str:
        candidates = sorted(where.get(digest, ()))
        if not candidates:
            fewest = min(len(own.bank) for own in replicas.values())
            candidates = [name for name, own in replicas.items() if len(own.bank) == fewest]
        two = draw.sample(candidates, min(2, len(candidates)))
        return min(two, key=lambda name: load[name])

    return choose


def demand(adapters: int, requests: int, replicas: int) -> tuple[list[str], list[float]]:
    """Return the digest and the time of each request."""
    draw = np.random.default_rng(0)
    gaps = draw.exponential(ROW / (BUSY * replicas), requests)
    times = np.cumsum(gaps)
    weights = np.cumsum(1.0 / np.arange(1, adapters + 1))
    ranks = np.searchsorted(weights, draw.uniform(0, weights[-1], requests))
    of_rank = draw.permutation(adapters)
    digests = np.empty(requests, np.int64)
    moments = np.searchsorted(times, np.arange(0.0, times[-1] + EVERY, EVERY))
    for first, last in zip(moments, [*moments[1:], requests], strict=True):
        digests[first:last] = of_rank[ranks[first:last]]
        hot, others = draw.integers(min(HOT, adapters), size=MOVED), draw.integers(adapters, size=MOVED)
        of_rank[hot], of_rank[others] = of_rank[others], of_rank[hot]
    return [f"{own:x}" for own in digests.tolist()], times.tolist()


class Cluster:
    """Replicas, what runs on them, and where adapters are resident."""

    def __init__(self, replicas: int, rows: int) -> None:
        self.rows = rows
        self.present = {f"replica-{index}": Replica(rows) for index in range(replicas)}
        self.lasting = set(self.present)
        self.gone: list[Replica] = []
        self.load = dict.fromkeys(self.present, 0.0)
        self.where: dict[str, set[str]] = {}  # adapter -> replicas
        self._made = replicas
        self._finishes: list[tuple[float, str]] = []

    def finish(self, now: float) -> None:
        """Take the rows from their queues that are computed by now."""
        while self._finishes and self._finishes[0][0] <= now:
            name = heapq.heappop(self._finishes)[1]
            if name in self.load:
                self.load[name] -= 1

    def replace(self) -> None:
        """Let one replica go, and another come."""
        name = sorted(self.present)[self._made % len(self.present)]
        self.gone.append(self.present.pop(name))
        self.load.pop(name)
        self.lasting.discard(name)
        for own in self.gone[-1].bank:
            self.where[own].discard(name)
        fresh = f"replica-{self._made}"
        self.present[fresh], self.load[fresh] = Replica(self.rows), 0.0
        self._made += 1

    def count_from_here(self) -> None:
        """Forget what was computed, but not what is resident."""
        for own in self.present.values():
            own.computed, own.counted_from = 0, len(own.asked)

    def compute(self, name: str, digest: str, now: float) -> bool:
        """Let a replica compute a row; return whether its adapter was resident."""
        replica = self.present[name]
        hit, out = replica.take(digest)
        if not hit:
            self.where.setdefault(digest, set()).add(name)
        if out is not None:
            self.where[out].discard(name)
        self.load[name] += 1
        replica.computed += 1
        replica.free_at = max(now, replica.free_at) + ROW * (1 if hit else 1 + MISS)
        heapq.heappush(self._finishes, (replica.free_at, name))
        return hit


def simulate(policy: Policy, digests: Sequence[str], times: Sequence[float], replicas: int, rows: int) -> Result:
    """Play all requests through a policy; the second half counts."""
    cluster = Cluster(replicas, rows)
    warm, next_change = len(digests) // 2, COMES
    waits: list[float] = []
    found = np.zeros(len(digests), bool)
    for index, (digest, now) in enumerate(zip(digests, times, strict=True)):
        cluster.finish(now)
        if now > next_change:
            next_change += COMES
            cluster.replace()
        if index == warm:
            cluster.count_from_here()
        name = policy(digest, now, cluster.load, cluster.present, cluster.where)
        if index >= warm:
            waits.append(cluster.load[name])
        found[index] = cluster.compute(name, digest, now)
    hits = int(found[warm:].sum())
    lasting = [cluster.present[name].computed for name in sorted(cluster.lasting)]
    everyone = [*cluster.present.values(), *(own for own in cluster.gone if own.counted_from)]
    asked = sum(len(own.asked) - own.counted_from for own in everyone)
    loads = (len(waits) - hits) / (times[-1] - times[warm]) / replicas
    return Result(
        hit_rate=hits / len(waits),
        best=sum(belady(own.asked, rows, own.counted_from) for own in everyone) / asked,
        imbalance=max(lasting) / (sum(lasting) / len(lasting)),
        mean_wait=float(np.mean(waits)),
        wait_99=float(np.quantile(waits, 0.99)),
        loads_per_replica_s=loads,
        megabytes_per_replica_s=loads * MEGABYTES,
        over_time=[
            (times[part[-1]], float(found[part].mean())) for part in np.array_split(np.arange(len(times)), PARTS)
        ],
    )


def belady(asked: Sequence[str], rows: int, counted_from: int) -> int:
    """Return the hits of the eviction that knows the future (Belady, 1966), from a request on."""
    following = [0] * len(asked)
    last: dict[str, int] = {}
    for index in range(len(asked) - 1, -1, -1):
        following[index] = last.get(asked[index], len(asked) + index)
        last[asked[index]] = index
    bank: dict[str, int] = {}  # digest -> its next use
    farthest: list[tuple[int, str]] = []
    hits = 0
    for index, digest in enumerate(asked):
        if digest in bank:
            hits += index >= counted_from
        elif len(bank) >= rows:
            while True:
                use, victim = heapq.heappop(farthest)
                if bank.get(victim) == -use:
                    break
            del bank[victim]
        bank[digest] = following[index]
        heapq.heappush(farthest, (-following[index], digest))
    return hits


def policies() -> Mapping[str, Policy]:
    """Return all policies by name."""
    return {
        "this toolkit": affine(),
        "random": at_random(random.Random(0)),
        "round robin": round_robin(),
        "least loaded": least_loaded(),
        "Ray's multiplexing": multiplexing(random.Random(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10**6)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=300, help="rows of a bank")
    parser.add_argument("--requests", type=int, default=4 * 10**6)
    parser.add_argument("--only", choices=sorted(policies()))
    parser.add_argument("--out", type=Path, help="directory for scale_simulation.json")
    parser.add_argument("--plots", type=Path, help="SVG file for the figures")
    options = parser.parse_args()
    digests, times = demand(options.adapters, options.requests, options.replicas)
    found: dict[str, Result] = {}
    for name, policy in policies().items():
        if options.only in (None, name):
            found[name] = simulate(policy, digests, times, options.replicas, options.rows)
            print(name, json.dumps(asdict(found[name])), flush=True)
    if options.out is not None:
        written = {name: asdict(own) for name, own in found.items()}
        (options.out / "scale_simulation.json").write_text(json.dumps(written, indent=2) + "\n")
    if options.plots is not None:
        options.plots.write_text(scale_plots.render(found))


if __name__ == "__main__":
    main()
