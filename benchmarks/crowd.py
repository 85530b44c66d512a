"""Clients of a server's operations, for some seconds."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tpeft_deploy.errors import QuotaExceeded

__all__ = ["Ask", "Crowd", "drawn"]

Ask = Callable[[str, str], Awaitable[object]]
_AGAIN = 0.05  # seconds until a client that was refused asks again


def drawn(tasks: Sequence[str], seed: int) -> Iterator[str]:
    """Yield tasks at random, the same for the same seed."""
    choice = random.Random(seed)
    return (choice.choice(tasks) for _ in itertools.count())


@dataclass
class Crowd:
    """Clients that ask until the same moment.

    Args:
        ask: asks for a row, by a tenant and a task.
        seconds: how long they ask.

    Attributes:
        answered: answers of the clients that are counted.
        latencies: milliseconds of each request of the quiet tenant.
    """

    ask: Ask
    seconds: float
    answered: int = 0
    latencies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.until = self.began + self.seconds

    async def client(self, tenant: str, tasks: Iterator[str], *, counted: bool = True) -> None:
        """Ask again whenever there is an answer."""
        while time.perf_counter() < self.until:
            try:
                await self.ask(tenant, next(tasks))
            except QuotaExceeded:
                await asyncio.sleep(_AGAIN)
            else:
                self.answered += counted

    async def quiet(self, task: str, every: float) -> None:
        """Ask as the tenant "quiet" at fixed times, whether the earlier ones are answered or not.

        Args:
            task: task that it asks for.
            every: seconds between requests.
        """

        async def once() -> None:
            began = time.perf_counter()
            await self.ask("quiet", task)
            self.latencies.append(1e3 * (time.perf_counter() - began))

        async with asyncio.TaskGroup() as group:
            while time.perf_counter() < self.until:
                group.create_task(once())
                await asyncio.sleep(every)
