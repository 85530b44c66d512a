"""Sequences beside adapters that are loaded, replaced and unloaded: every token against its version's reference."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.waiting import wait_until
from tpeft_deploy import Adapter, Bundle, Runtime, Sampling
from tpeft_deploy.composition import compose
from tpeft_deploy.errors import CapacityError
from tpeft_deploy.runtime.generation.handle import GenerationRequest

CONTENTS, TASKS, CALLERS = 6, ["p", "q", "r", "s"], 8
LENGTH = 60
HOWS = [Sampling(), Sampling(temperature=1.2, top_p=0.95, seed=5)]
Key = tuple[int, int, int]  # content, prompt, sampling


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Churn:
    """Callers that generate, and changes of adapters between them."""

    def __init__(self, runtime: Runtime, contents: list[Adapter], expected: Mapping[Key, list[int]], most: int) -> None:
        self.runtime, self.contents, self.expected, self.most = runtime, contents, expected, most
        self.prompts = sorted({(prompt, self.prompt(prompt)) for _, prompt, _ in expected})
        self.now: dict[str, int] = {}  # task -> content
        self.changing = asyncio.Lock()  # a request's version is the one of the moment in which it is acquired
        self.tokens = 0
        self.seen: Counter[str] = Counter()
        self.memory: list[int] = []

    @staticmethod
    def prompt(number: int) -> tuple[int, ...]:
        draw = random.Random(number)
        return (*([7, 3, 1, 4] * 5 if number % 2 else ()), *(draw.randrange(50) for _ in range(1 + number)))

    async def run(self) -> None:
        for task in TASKS[:2]:
            await self.change(task, 0)
        callers = [asyncio.create_task(self.call(random.Random(seed))) for seed in range(CALLERS)]
        draw = random.Random(99)
        while not all(caller.done() for caller in callers):
            await self.change(draw.choice(TASKS), draw.randrange(-1, CONTENTS))
            self.memory.append(resident_bytes())
            await asyncio.sleep(0.002)
        await asyncio.gather(*callers)

    async def change(self, task: str, content: int) -> None:
        async with self.changing:
            try:
                if content >= 0:
                    await asyncio.to_thread(self.runtime.load, task, self.contents[content])
                    self.seen["replaced" if task in self.now else "loaded"] += 1
                    self.now[task] = content
                elif len(self.now) > 1 and task in self.now:
                    self.runtime.unload(task)
                    self.seen["unloaded"] += 1
                    del self.now[task]
            except CapacityError:
                self.seen["full"] += 1

    async def call(self, draw: random.Random) -> None:
        while self.tokens < self.most:
            number, prompt = draw.choice(self.prompts)
            how, length = draw.randrange(2), draw.randint(1, LENGTH)
            async with self.changing:
                task = draw.choice(sorted(self.now))
                key = (self.now[task], number, how)
                try:
                    (handle,) = await self.runtime.start(GenerationRequest(prompt, length, HOWS[how], task=task))
                except CapacityError:
                    self.seen["full"] += 1
                    continue
            if draw.random() < 0.1:
                handle.cancel()
                self.seen["cancelled"] += 1
                continue
            found = [token.id async for token in handle]
            assert found == self.expected[key][:length], (task, key)
            self.tokens += length


@pytest.mark.parametrize("most", [5_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_every_token_is_that_of_the_version_that_its_sequence_began_with(
    llama_bundle: Bundle, llama_adapters: Mapping[str, Adapter], most: int
) -> None:
    a, b = llama_adapters["a"], llama_adapters["b"]
    parts = [index / (CONTENTS - 1) for index in range(CONTENTS)]
    contents = [compose({"a": (a, part), "b": (b, 1 - part)}) for part in parts]
    expected: dict[Key, list[int]] = {}
    with Runtime(llama_bundle.path, provider="cpu", threads=1, prefix_bytes=0) as alone:
        alone.load("one", contents[1])
        size = alone._residency._bank.row_bytes
        for content, adapter in enumerate(contents):
            alone.load("one", adapter)
            for number in range(8):
                for how, sampling in enumerate(HOWS):
                    (found,) = alone.generate([Churn.prompt(number)], "one", max_new_tokens=LENGTH, sampling=sampling)
                    expected[content, number, how] = found
    assert len({tuple(tokens) for tokens in expected.values()}) > len(expected) / 2
    settings: dict[str, Any] = {
        "device_bytes": 5 * size,
        "kv_bytes": 6 * 2**18,
        "max_tokens": 128,
        "prefix_bytes": 2**17,
    }
    with Runtime(llama_bundle.path, provider="cpu", threads=1, preload=False, **settings) as runtime:
        churn = Churn(runtime, contents, expected, most)
        asyncio.run(asyncio.wait_for(churn.run(), 3000))
        stats = runtime.generation()
        assert stats is not None
        assert stats.failed == stats.running == stats.waiting == 0
        assert stats.reused_tokens
        assert all(churn.seen[what] for what in ("loaded", "replaced", "unloaded", "cancelled")), churn.seen
        assert stats.cached_prefix_bytes <= 2**17
        wait_until(lambda: not any(version.users or version.occupied for version in runtime._residency._resident))
    if most > 50_000:
        early, late = churn.memory[len(churn.memory) // 5], churn.memory[-1]
        assert late - early < 32 * 2**20, f"{early:,} to {late:,} bytes"
