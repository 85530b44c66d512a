"""What grows with known adapters, rank, rows and tenants."""

from __future__ import annotations

import asyncio
import gc
import itertools
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.crowd import Crowd
from benchmarks.runtime import TASKS, cached, texts, turns
from benchmarks.server import ROW, serving, through
from benchmarks.tables.forms import Config, bundle_of
from benchmarks.tables.table import Figure, Row, Settings, Table
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.adapters.version import Source
from tpeft_deploy.runtime.bench.measure import Case, interleave, resident_bytes, spread
from tpeft_deploy.runtime.server.operations.service import Service
from tpeft_deploy.runtime.server.tenancy.access import Principal, Role
from tpeft_deploy.tucker import Array

__all__ = ["measure"]

KNOWN = (1, 100, 10_000, 100_000)
RANKS = (4, 8, 32)
ROWS = (1, 8, 32)
TENANTS = (1, 10, 100)
ASKING, FLOOD, COLD = 32, 200, 40  # clients, clients of the flood, adapters that are loaded
EVERY, CHANGES = 0.1, 0.1  # seconds between requests of a quiet tenant, and between changes
COLUMNS = ("ratio", "a row, ms", "p99, ms", "requests/s", "another adapter, ratio", "first request, ms", "memory, MB")
TEXT = f"""An encoder of 6 layers of 384 with LoRA on every linear, texts of 8 tokens, in one process.

*Known* adapters are registered with the runtime: eight are resident and asked in turn, the others are on disk.
"another adapter" is the time of a row whose adapter is not that of the row before, over that of a row with the same
adapter. "first request" is a row with an adapter that is not in memory, so that it is read, its digest checked, fitted
and copied first. "memory" is what the process grew by. *Rank* and *rows* have eight adapters in a mixed batch;
"a row" is the time of the batch over its rows.

*Tenants* ask through the server's operations, without a socket: {ASKING} clients that each ask again when they have an
answer, spread over the tenants; "p99" and "a row" are those of one further tenant that asks every
{1000 * EVERY:.0f} ms. A flood is {FLOOD} clients of one tenant; where adapters churn, one is registered and one deleted
every {CHANGES:g} s, with all checks of an upload.

"ratio" compares "a row" with that of the first row of the same kind: 1 means that nothing is lost by growing. Answers
of known and registered adapters were compared with those of the bundle's before."""


def measure(settings: Settings) -> Table:
    """Measure the four kinds.

    Raises:
        SystemExit: an adapter answers differently once it is registered.
    """
    bundle = cached(settings.cache, "encoder", TASKS)
    rows = [*_known(bundle, settings), *_ranks(settings), *_rows(bundle, settings), *_tenants(bundle, settings)]
    return Table("growth", "Growth", TEXT, COLUMNS, tuple(rows))


def _lines(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Figure]]:
    """Name -> time of a row, and its ratio to the first name's in the same round.

    Args:
        times: name -> seconds for a row in each round.
    """
    first = next(iter(times.values()))
    return {
        name: {
            "ratio": spread([one / other for one, other in zip(own, first, strict=True)]),
            "a row, ms": spread([1e3 * one for one in own]),
        }
        for name, own in times.items()
    }


def _known(bundle: Bundle, settings: Settings) -> list[Row]:
    expected = _expected(bundle)
    figures: dict[str, dict[str, Figure]] = {}
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        for count in KNOWN:
            name = f"{count:,} known adapter{'s' * (count > 1)}"
            gc.collect()
            before = resident_bytes() or 0
            runtime = stack.enter_context(Runtime(bundle.path, provider="cpu", threads=settings.threads, preload=False))
            runtime.register(_sources(bundle, count))
            asked = [f"own-{n}" for n in range(min(count, len(TASKS)))]
            _check(runtime, asked, expected)
            figures[name] = {"memory, MB": round(((resident_bytes() or 0) - before) / 1e6)}
            cases |= {name: turns(runtime, asked[:1], ROW), f"{name}, switched": turns(runtime, asked, ROW)}
            if count > COLD + len(TASKS):
                firsts = [_first(runtime, f"own-{number}") for number in range(count - COLD, count)]
                figures[name] |= {"first request, ms": spread([1e3 * each for each in firsts])}
        times = interleave(cases, settings.seconds)
    lines = _lines({name: times[name] for name in figures})
    for name, own in figures.items():
        more = [b / a for a, b in zip(times[name], times[f"{name}, switched"], strict=True)]
        own |= {**lines[name], "another adapter, ratio": spread(more)}
    return [Row(name, own) for name, own in figures.items()]


def _sources(bundle: Bundle, count: int) -> dict[str, Source]:
    """So many adapters with a content of their own as far as the runtime knows, read from the bundle's files."""

    digests = {task: bundle.digest(task) for task in TASKS}

    def source(task: str, number: int) -> Source:
        return Source(f"{number:064x}", lambda: bundle.version(task, digests[task], native=False))

    return {f"own-{number}": source(TASKS[number % len(TASKS)], number) for number in range(count)}


def _expected(bundle: Bundle) -> list[Array]:
    with Runtime(bundle.path, provider="cpu", threads=1) as runtime:
        return [next(iter(runtime.run(ROW, task).values())) for task in TASKS]


def _check(runtime: Runtime, names: Sequence[str], expected: Sequence[Array]) -> None:
    for name, wanted in zip(names, expected, strict=False):
        got = next(iter(runtime.run(ROW, name).values()))
        if not np.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max())):
            raise SystemExit(f"compare {name} with the bundle's adapter: expected its answer, got another")


def _first(runtime: Runtime, task: str) -> float:
    began = time.perf_counter()
    runtime.run(ROW, task)
    return time.perf_counter() - began


def _ranks(settings: Settings) -> list[Row]:
    with ExitStack() as stack:
        cases = {}
        for rank in RANKS:
            config = Config("encoder 6 x 384", "linears", rank, ROWS)
            own, _ = stack.enter_context(bundle_of(config, settings.cache))
            runtime = stack.enter_context(Runtime(own.path, provider="cpu", threads=settings.threads))
            cases[f"rank {rank}"] = _mixed(runtime, list(own.tasks), 8)
        times = interleave(cases, settings.seconds / 2)
    return [Row(name, own) for name, own in _lines({name: [t / 8 for t in own] for name, own in times.items()}).items()]


def _rows(bundle: Bundle, settings: Settings) -> list[Row]:
    sizes = {f"{count} row{'s' * (count > 1)}, mixed": count for count in ROWS}
    with Runtime(bundle.path, provider="cpu", threads=settings.threads) as runtime:
        times = interleave({name: _mixed(runtime, TASKS, n) for name, n in sizes.items()}, settings.seconds / 2)
    lines = _lines({name: [t / n for t in times[name]] for name, n in sizes.items()})
    return [Row(name, own) for name, own in lines.items()]


def _mixed(runtime: Runtime, tasks: Sequence[str], count: int) -> Callable[[], object]:
    inputs, chosen = texts(count), list(itertools.islice(itertools.cycle(tasks), count))
    return lambda: runtime.run(inputs, tasks=chosen)


async def _churn(service: Service, crowd: Crowd, data: bytes) -> None:
    who = Principal("changing", Role.DEPLOY, "a benchmark")
    for number in itertools.count():
        if time.perf_counter() > crowd.until:
            return
        name = f"new-{number % 10}"
        if number >= 10:
            await service.delete(who, name)
        await service.register(who, name, _upload(data))
        await asyncio.sleep(CHANGES)


async def _upload(data: bytes) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
    async def pieces() -> AsyncIterator[bytes]:
        yield data

    yield "weights", pieces()


async def _ask(service: Service, seconds: float, tenants: int, *, flood: bool, changing: bytes | None) -> Crowd:
    names = [f"tenant-{n}" for n in range(tenants)]
    crowd = Crowd(through(service, names), seconds)
    work: list[Coroutine[Any, Any, None]] = [crowd.quiet(TASKS[0], EVERY)]
    work += [crowd.client(names[n % tenants], itertools.repeat(TASKS[n % len(TASKS)])) for n in range(ASKING)]
    if flood:
        work += [crowd.client("flood", itertools.repeat(TASKS[n % len(TASKS)]), counted=False) for n in range(FLOOD)]
    if changing is not None:
        work.append(_churn(service, crowd, changing))
    await asyncio.gather(*work)
    return crowd


def _tenants(bundle: Bundle, settings: Settings) -> list[Row]:
    cases = [(f"{n} tenant{'s' * (n > 1)}", n, False, False) for n in TENANTS]
    cases += [(f"{TENANTS[1]} tenants, a flood", TENANTS[1], True, False)]
    cases += [(f"{TENANTS[1]} tenants, a flood, adapters churn", TENANTS[1], True, True)]
    data = bundle.adapter(TASKS[0]).to_bytes()
    rows: list[Row] = []
    first = None
    seconds = max(1.0, settings.seconds / 2)
    for name, tenants, flood, changing in cases:
        with tempfile.TemporaryDirectory() as place, serving(bundle, Path(place), settings.threads) as service:
            asyncio.run(_ask(service, 0.5, tenants, flood=flood, changing=None))
            crowd = asyncio.run(_ask(service, seconds, tenants, flood=flood, changing=data if changing else None))
        latency = spread(crowd.latencies)
        first = first or latency.median
        figures: dict[str, Figure] = {
            "ratio": latency.median / first,
            "a row, ms": latency,
            "p99, ms": float(np.quantile(crowd.latencies, 0.99)),
            "requests/s": crowd.answered / crowd.seconds,
        }
        rows.append(Row(name, figures))
    return rows
