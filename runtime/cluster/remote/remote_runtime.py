"""The runtime as the server's operations see it, over replicas on other machines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import DeadlineExceeded, TpeftError, Unavailable
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.runtime import Source
from tpeft_deploy.runtime import inputs as requests
from tpeft_deploy.runtime.adapters.task_versions import Task
from tpeft_deploy.runtime.adapters.version import Tier
from tpeft_deploy.runtime.batching.stats import BatchingStats
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaCalls, ReplicaLost
from tpeft_deploy.runtime.cluster.placement import RowsPart
from tpeft_deploy.runtime.cluster.remote.generation import RemoteGeneration
from tpeft_deploy.runtime.cluster.remote.pins import RemotePins
from tpeft_deploy.runtime.cluster.remote.rows import joined
from tpeft_deploy.runtime.cluster.remote.tasks import RemoteTasks
from tpeft_deploy.runtime.cluster.wire import CallRoute, Computed, InferCall, Refused
from tpeft_deploy.runtime.engine import Outputs
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.tucker import Array

__all__ = ["RemoteRuntime"]

T = TypeVar("T")
_WARMED = 256  # adapters in demand that a new replica is brought
_NO_BATCHES = BatchingStats(0, 0, 0, 0, {}, 0, 0, 0, 0)


class RemoteRuntime:
    """Has the methods of `Runtime` that the server calls, and raises what those raise; belongs to one event loop.

    Methods that block must not be called on that loop: `forget`, `labels`, `open_generation`, `pin`, `probe`, `unpin`.

    Args:
        bundle: the bundle, which every replica has too.
        calls: calls of the replicas.
        table: figures of the replicas.
        quota: returns the current quota of a tenant.
        loop: event loop of the server.

    Attributes:
        tasks: adapters that are known.
    """

    def __init__(
        self,
        bundle: Bundle,
        calls: ReplicaCalls,
        table: ReplicaTable,
        quota: Callable[[str], Quota],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._bundle = bundle
        self._calls = calls
        self._table = table
        self._quota = quota
        self._loop = loop
        self._facts: Mapping[str, Any] = {"most_tokens": 0, "provider": "", "provider_reason": "no replica has said"}
        self.tasks = RemoteTasks(bundle)
        self._pins = RemotePins(self.tasks, table, self._control)
        self._seen: set[str] = set()
        self._background: set[asyncio.Task[object]] = set()
        self._generation = RemoteGeneration(self.tasks, calls, table, quota)
        table.on_change = self._replicas_changed

    async def open(self) -> None:
        """Wait for a replica, and learn the facts that all share."""
        self._facts = (await self._calls.call("report", CallRoute())).facts

    @property
    def provider(self) -> str:
        """Execution provider of a replica."""
        return str(self._facts["provider"])

    @property
    def provider_reason(self) -> str:
        """Reason for the provider."""
        return str(self._facts["provider_reason"])

    @property
    def most_tokens(self) -> int:
        """As `Runtime.most_tokens`."""
        return int(self._facts["most_tokens"])

    async def infer(
        self,
        inputs: Mapping[str, object],
        task: Task | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        outputs: Sequence[str] | None = None,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        timing: Timing | None = None,
        component: str | None = None,
    ) -> dict[str, Array] | Outputs:
        """Run a request on the replica that has its adapter, or in parts on several; as `Runtime.infer`.

        Raises:
            Unavailable: no replica runs, or two died while they had the request.
        """
        manifest = self._manifest(component)
        arrays = requests.check_inputs(manifest, inputs)
        ports = requests.check_outputs(manifest, outputs)
        refs = None
        if tasks is not None:
            requests.check_tasks(manifest, tasks, arrays)
            refs = [self.tasks.name(own) for own in tasks]
            if len(set(refs)) > 1:
                requests.check_apart(manifest, ports)
        whole = None if refs is not None else self.tasks.ref(task)

        def call(own: Mapping[str, Array], named: Sequence[str] | None) -> InferCall:
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
            names = None if outputs is None else [*outputs]
            return InferCall(own, named, whole, names, left, tenant, priority, self._quota(tenant), component)

        began = time.monotonic()
        if refs is None:
            digest = self.tasks.digest(whole)
            rows = requests.rows(manifest, arrays) if requests.batched(manifest, manifest.inputs) else 1
            answer = await self._run(CallRoute(digest, rows), [digest], lambda: call(arrays, None), timing, timeout)
            return dict(answer.outputs)
        digests = [self.tasks.digest(name) for name in refs]
        parts = self._split(digests)

        async def run(part: RowsPart) -> Computed:
            own = arrays if len(parts) == 1 else requests.take_rows(manifest, arrays, np.array(part.rows))
            named = [refs[row] for row in part.rows]
            held = [digests[row] for row in part.rows]
            route = CallRoute(held[0], len(held), replica=part.replica)
            return await self._run(route, held, lambda: call(own, named), timing, timeout)

        answers = await _together([run(part) for part in parts])
        return joined([part.rows for part in parts], [answer.outputs for answer in answers])

    async def start(self, request: GenerationRequest, task: Task | None = None) -> list[Handle]:
        """Begin the sequences of a request; as `Runtime.start`."""
        return await self._generation.start(request, task)

    def open_generation(self) -> None:
        """Make the decoder of a replica; the others make theirs with their first sequences."""
        self._wait(self._control(BASE_TASK, None, "open_generation"))

    def generation(self) -> GenerationStats | None:
        """Figures of all replicas, as they last reported them."""
        return self._generation.total([own.generation for own in self._table.figures() if own.generation is not None])

    def batching(self, component: str | None = None) -> BatchingStats:
        """Figures of all replicas, as they last reported them."""
        known = [own.batching for own in self._table.figures()]
        return BatchingStats.total(known) if known else _NO_BATCHES

    def usage(self, device: int | None = None) -> dict[str, int]:
        """Sums over all devices of all replicas, as they last reported them."""
        total: dict[str, int] = {}
        for own in self._table.figures():
            for name, value in own.usage.items():
                total[name] = total.get(name, 0) + value
        return total

    def residency(self, tasks: Iterable[str] | None = None) -> dict[str, Tier]:
        """Return where tasks are: on the device of any replica, as far as is known, or on disk."""
        found: dict[str, Tier] = {}
        for key in self.tasks.keys() if tasks is None else tasks:
            digest = self.tasks.known(key)
            if digest is not None:
                found[key] = "device" if self._table.resident(digest) else "disk"
        return found

    def ranks(self, tasks: Iterable[str]) -> dict[str, int]:
        """Ranks are known to replicas only: none."""
        return {}

    def register(self, sources: Mapping[str, Source]) -> None:
        """Know adapters by digest; the replicas read them from the registry's files, not by `Source.read`."""
        self.tasks.register(sources)

    def forget(self, tasks: Iterable[str]) -> None:
        """Stop serving tasks, all or none; the replicas evict adapters that are not asked for."""
        gone = self.tasks.forget(tasks)
        for key, name in gone.items():
            if key in self._pins.all():
                self._later(partial(self._pins.drop, key, name))

    def probe(self, task: str) -> bool:
        """As `Runtime.probe`, on the replica that the adapter belongs to."""
        name = self.tasks.name(task)
        return bool(self._wait(self._control(name, None, "probe")))

    def labels(self, task: Task = BASE_TASK) -> HeadLabels | None:
        """As `Runtime.labels`, of the first of a weighted set."""
        first = task if isinstance(task, str) or not isinstance(task, Mapping) else next(iter(task))
        found: HeadLabels | None = self._wait(self._control(self.tasks.name(first), None, "labels"))
        return found

    def pin(self, task: str, *, folded: bool = False) -> None:
        """Pin a task on the replicas that it belongs to, two at least where there are two."""
        self._wait(self._pins.pin(task, folded=folded))

    def unpin(self, task: str) -> None:
        """Unpin a task."""
        self._wait(self._pins.drop(task, self.tasks.name(task)))

    def pins(self) -> dict[str, bool]:
        """As `Runtime.pins`."""
        return self._pins.all()

    def prefetch(self, tasks: Iterable[Task]) -> Future[None]:
        """Begin to bring tasks to the replicas that they belong to."""
        names = [self.tasks.name(task) for task in tasks]

        async def bring() -> None:
            where: dict[str, Sequence[str | None]]
            where = {name: self._table.preferred(self.tasks.digest(name)) or [None] for name in names}
            wanted = [(name, replica) for name, replicas in where.items() for replica in replicas]
            await _together([self._control(name, replica, "prefetch") for name, replica in wanted])

        return asyncio.run_coroutine_threadsafe(bring(), self._loop)

    async def _run(
        self,
        route: CallRoute,
        digests: Sequence[str],
        call: Callable[[], InferCall],
        timing: Timing | None,
        timeout: float | None,
    ) -> Computed:
        """Run on one replica and, if that dies, on another: an inference changes nothing, so it may run twice."""
        avoid = None
        for last in (False, True):
            replica = route.replica if not last else None
            replica = replica or self._table.choose(route.digest, route.rows, avoid)
            if replica is None:
                raise _none_runs("run a request")
            try:
                with self._table.running(replica, digests, route.rows):
                    answer = await self._within(
                        timeout,
                        self._calls.call("infer", CallRoute(route.digest, route.rows, replica, avoid), call()),
                    )
            except ReplicaLost:
                if last:
                    raise
                avoid = replica
                continue
            if isinstance(answer, Refused):
                raise answer.error
            if timing is not None:
                ended = time.monotonic() - answer.since
                timing.add(ended - answer.ran, ended, answer.rows)
            computed: Computed = answer
            return computed
        raise AssertionError("the second attempt raises")

    async def _within(self, timeout: float | None, call: Coroutine[Any, Any, T]) -> T:
        """Wait for a call: the replica sees to the deadline, but a call may wait for a replica."""
        try:
            async with asyncio.timeout(None if timeout is None else timeout + 1.0):
                return await call
        except TimeoutError:
            raise DeadlineExceeded("run a request", problem="no replica answered before its deadline") from None

    async def _control(self, name: str, replica: str | None, method: str, **options: Any) -> Any:
        names = [] if method == "open_generation" else [name]
        digest = self.tasks.digest(name)
        replica = replica or self._table.choose(digest, 1)
        with self._table.running(replica, [digest], 0):
            answer = await self._calls.call("control", CallRoute(digest, 1, replica), method, names, options)
        if isinstance(answer, Refused):
            raise answer.error
        return answer

    def _split(self, digests: Sequence[str]) -> list[RowsPart]:
        try:
            return self._table.split(digests)
        except LookupError:
            raise _none_runs("run a request") from None

    def _manifest(self, component: str | None) -> Manifest:
        if component is None:
            return self._bundle.manifest
        return self._bundle.components[component].manifest

    def _replicas_changed(self) -> None:
        self._later(self._settle)

    async def _settle(self) -> None:
        """Bring to replicas that came what is pinned or in demand, and belongs there."""
        here = set(self._table.replicas)
        new, self._seen = here - self._seen, here
        await self._pins.settle()
        for digest in self._table.hottest()[:_WARMED] if len(here) > len(new) else ():
            for replica in new & {*self._table.preferred(digest)}:
                with suppress(TpeftError):  # its first request says why
                    await self._control(self.tasks.stored(digest), replica, "prefetch")

    def _later(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run on the loop without waiting; a loop that stops before makes no coroutine, and errors are dropped."""

        def ended(task: asyncio.Task[object]) -> None:
            self._background.discard(task)
            if not task.cancelled():
                task.exception()

        def begin() -> None:
            task = self._loop.create_task(work())
            self._background.add(task)
            task.add_done_callback(ended)

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(begin)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all; the first error cancels the others."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(own) for own in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]


def _none_runs(doing: str) -> TpeftError:
    return Unavailable(doing, problem="no replica is running", fix="Try again shortly.")
