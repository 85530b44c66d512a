"""Time to the first token of one tenant while another floods the decoder with long prompts.

    python -m benchmarks.generation_flood --cache DIRECTORY [--threads N] [--requests N]

A tenant sends prompts one after another, each some random time after the last one's answer of 8 tokens.  It is alone,
or beside a tenant that keeps 24 prompts of 1,500 tokens and 64 new ones in flight on 8 slots: with the order and shares
of the server, or first come, first served.  Medians in milliseconds; nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.generation import SMALL, TASKS, exported
from tpeft_deploy import Runtime
from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair

FLOOD, LONG, NEW = 24, 1500, 64
KV_BYTES = 8 * 2048 * 5 * 4 * 32 * 2 * 4  # slots, tokens, layers, heads, sizes, keys and values, bytes of a number
DRAW = np.random.default_rng(0)


def prompt(length: int) -> list[int]:
    found: list[int] = DRAW.integers(SMALL["vocab_size"], size=length).tolist()
    return found


async def flood(runtime: Runtime) -> None:
    while True:
        request = GenerationRequest(prompt(LONG), NEW, tenant="flood", scored=False)
        [handle] = await runtime.start(request, TASKS[0])
        try:
            await asyncio.wrap_future(handle.future)
        finally:
            handle.cancel()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20)
    options = parser.parse_args()
    bundle = exported(options.cache, SMALL)
    for length in (64, 512, 1500):
        found = {}
        for name, order, flooded in (
            ("alone", Fair[None](lambda _: 1.0), False),
            ("beside a flood", Fair[None](lambda _: 1.0), True),
            ("beside a flood, first come", None, True),
        ):
            settings = {
                "provider": "cpu",
                "threads": options.threads,
                "max_tokens": 2048,
                "kv_bytes": 8 * 2048 * 5 * 4 * 32 * 2 * 4,
            }
            with Runtime(bundle.path, **settings, sequence_order=order) as runtime:
                number = options.requests if order is not None else max(3, options.requests // 5)
                times = asyncio.run(first_tokens(runtime, length, number, flooded))
            found[name] = round(statistics.median(times) * 1e3, 1)
        found["ratio"] = round(found["beside a flood"] / found["alone"], 2)
        print(length, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
