"""Time to the first token of one tenant while another floods the decoder with long prompts.

    python -m benchmarks.generation_flood --cache DIRECTORY [--threads N] [--requests N] [--rounds N] [--lengths N ...]
        [--first-come] [--only first|pieces]

`first`: a tenant sends prompts one after another, each some random time after the last one's answer of 8 tokens.  It is
alone, or beside a tenant that keeps 24 prompts of 1,500 tokens and 64 new ones in flight on 8 slots: with the order and
shares of the server, or with --first-come first come, first served.  Medians and ninth deciles in milliseconds; ratios
of the medians of a round, alone and beside the flood in turns.

`pieces`: processor time of 24 such prompts alone, with pieces bounded by cost over pieces of 64 tokens, in turns.

Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.generation import SMALL, TASKS, exported
from tpeft_deploy import Bundle, Runtime
from tpeft_deploy.runtime.generation import service
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair

FLOOD, LONG, NEW = 24, 1500, 64
KV_BYTES = 8 * 2048 * 5 * 4 * 32 * 2 * 4  # slots, tokens, layers, heads, sizes, keys and values, bytes of a number
DRAW = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    found: list[int] = DRAW.integers(SMALL["vocab_size"], size=length).tolist()
    return found


async def long_prompt(runtime: Runtime) -> None:
    [handle] = await runtime.start(GenerationRequest(prompt(LONG), NEW, tenant="flood", scored=False), TASKS[0])
    try:
        await asyncio.wrap_future(handle.future)
    finally:
        handle.cancel()


async def flood(runtime: Runtime) -> None:
    while True:
        await long_prompt(runtime)


async def first_tokens(runtime: Runtime, length: int, number: int, flooded: bool) -> list[float]:
    """Seconds to each first token."""
    floods = [asyncio.create_task(flood(runtime)) for _ in range(FLOOD if flooded else 0)]
    found = []
    await asyncio.sleep(3 if flooded else 0)
    for _ in range(number):
        await asyncio.sleep(DRAW.uniform(0, 0.3))
        begun = time.monotonic()
        [handle] = await runtime.start(GenerationRequest(prompt(length), 8, tenant="other", scored=False), TASKS[1])
        await asyncio.wrap_future(handle.future)
        found.append(handle.times[0] - begun)
    for task in floods:
        task.cancel()
    await asyncio.gather(*floods, return_exceptions=True)
    return found


def opened(bundle: Bundle, threads: int, *, fair: bool = True) -> Runtime:
    settings: dict[str, Any] = {"provider": "cpu", "threads": threads, "max_tokens": 2048, "kv_bytes": KV_BYTES}
    return Runtime(bundle.path, **settings, sequence_order=Fair[None](lambda _: 1.0) if fair else None)


def first_part(bundle: Bundle, options: argparse.Namespace) -> Iterable[dict[str, object]]:
    for length in options.lengths:
        times: dict[str, list[list[float]]] = {"alone": [], "flood": []}
        for _ in range(options.rounds):
            for name, own in times.items():
                with opened(bundle, options.threads) as runtime:
                    asyncio.run(first_tokens(runtime, length, 1, False))
                    found = asyncio.run(first_tokens(runtime, length, options.requests, name == "flood"))
                    own.append([seconds * 1e3 for seconds in found])
        alone, beside = (list(map(statistics.median, own)) for own in times.values())
        row: dict[str, object] = {"tokens": length}
        for name, own in times.items():
            every = list(itertools.chain(*own))
            row[f"{name}, ms"] = [statistics.median(every), statistics.quantiles(every, n=10)[-1]]
        row["ratios"] = sorted(b / a for a, b in zip(alone, beside, strict=True))
        row["ratio"] = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        if options.first_come:
            with opened(bundle, options.threads, fair=False) as runtime:
                found = asyncio.run(first_tokens(runtime, length, max(3, options.requests // 5), True))
                row["first come, ms"] = statistics.median(found) * 1e3
        yield row


def pieces_part(bundle: Bundle, options: argparse.Namespace) -> Iterable[dict[str, object]]:
    async def all_of_them(runtime: Runtime) -> None:
        await asyncio.gather(*(long_prompt(runtime) for _ in range(FLOOD)))

    times: dict[int | None, list[float]] = {service._DOUBLING: [], None: []}
    for _ in range(options.rounds):
        for doubling, own in times.items():
            with mock.patch.object(service, "_DOUBLING", doubling), opened(bundle, options.threads) as runtime:
                asyncio.run(long_prompt(runtime))
                begun = time.process_time()
                asyncio.run(all_of_them(runtime))
                own.append(time.process_time() - begun)
    ratios = [b / a for b, a in zip(*times.values(), strict=True)]
    yield {"by cost / by tokens": statistics.median(ratios), "ratios": sorted(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 1500])
    parser.add_argument("--first-come", action="store_true")
    parser.add_argument("--only", choices=["first", "pieces"])
    options = parser.parse_args()
    bundle = exported(options.cache, SMALL)
    for name, part in (("first", first_part), ("pieces", pieces_part)):
        for row in part(bundle, options) if options.only in {None, name} else ():
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
