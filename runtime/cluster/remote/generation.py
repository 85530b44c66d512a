"""Generation on replicas: handles in this process that follow sequences in others."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import fields
from typing import Any

from tpeft_deploy.bundle.directory import BASE_TASK
from tpeft_deploy.errors import RunError, TpeftError, Unavailable
from tpeft_deploy.runtime.adapters.task_versions import Task
from tpeft_deploy.runtime.cluster.affinity import ReplicaTable
from tpeft_deploy.runtime.cluster.calls import ReplicaCalls, ReplicaLost
from tpeft_deploy.runtime.cluster.remote.tasks import RemoteTasks
from tpeft_deploy.runtime.cluster.wire import CallRoute, GenerateCall, SequenceStep, TaskRef
from tpeft_deploy.runtime.generation.handle import Generated, GenerationRequest, Handle
from tpeft_deploy.runtime.generation.stats import GenerationStats
from tpeft_deploy.runtime.server.tenancy.quotas import Quota
from tpeft_deploy.runtime.text.model_text import schema_of, shown_by, tokens_before

__all__ = ["RemoteGeneration"]


class RemoteGeneration:
    """Begins sequences on replicas; belongs to one event loop.

    Args:
        tasks: tasks of the ingress.
        calls: calls of the replicas.
        table: figures of the replicas.
        quota: returns the current quota of a tenant.
    """

    def __init__(
        self, tasks: RemoteTasks, calls: ReplicaCalls, table: ReplicaTable, quota: Callable[[str], Quota]
    ) -> None:
        self._tasks = tasks
        self._calls = calls
        self._table = table
        self._quota = quota
        self._following: set[asyncio.Task[None]] = set()  # the loop refers to tasks weakly

    async def start(self, request: GenerationRequest, task: Task | None = None) -> list[Handle]:
        """Begin the sequences of a request on one replica, or none.

        Raises:
            TpeftError: as `Runtime.start`.
            Unavailable: no replica runs, or the one that was chosen died.
        """
        own: Any = task if task is not None else request.task
        ref = self._tasks.ref(own)
        digest = self._tasks.digest(ref)
        rows = request.sampling.n
        replica = self._table.choose(digest, rows)
        if replica is None:
            raise Unavailable("generate tokens", problem="no replica is running", fix="Try again shortly.")
        steps = self._calls.stream("generate", CallRoute(digest, rows, replica), self._call(request, ref))
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        handles = [Handle(lambda: loop.call_soon_threadsafe(changed.set)) for _ in range(rows)]
        began: asyncio.Future[None] = loop.create_future()
        following = asyncio.create_task(self._follow(steps, handles, began, digest, replica))
        self._following.add(following)
        following.add_done_callback(self._following.discard)
        watching = asyncio.create_task(_cancelled(changed, handles, following))
        following.add_done_callback(lambda _: watching.cancel())
        try:
            await began
        except BaseException:
            following.cancel()
            raise
        return handles

    @staticmethod
    def total(parts: Sequence[GenerationStats]) -> GenerationStats | None:
        """Return the sums of the figures of several generators; None for none."""
        if not parts:
            return None
        sums: dict[str, Any] = {}
        for own in fields(GenerationStats):
            values = [getattr(part, own.name) for part in parts]
            if own.name in {"running_tasks", "waiting_tasks"}:
                counts: Counter[Any] = Counter()
                for value in values:
                    counts.update(value)
                sums[own.name] = dict(counts)
            else:
                sums[own.name] = sum(values)
        return GenerationStats(**sums)

    def _call(self, request: GenerationRequest, ref: TaskRef) -> GenerateCall:
        left = request.deadline
        return GenerateCall(
            request.prompt,
            request.max_new_tokens,
            request.sampling,
            None if ref == BASE_TASK else ref,
            request.tenant,
            request.public,
            request.priority,
            left if left == math.inf else max(0.0, left - time.monotonic()),
            request.scored,
            None if request.text is None else tokens_before(request.text),
            shown_by(request.text),
            None if request.constraint is None else schema_of(request.constraint),
            request.inputs,
            self._quota(request.tenant),
        )

    async def _follow(
        self,
        steps: AsyncGenerator[SequenceStep],
        handles: list[Handle],
        began: asyncio.Future[None],
        digest: str,
        replica: str,
    ) -> None:
        """Hand out what a replica yields, until all sequences have ended or nobody waits for one."""
        error: BaseException = RunError("generate tokens", problem="the replica ended the call early")
        try:
            with self._table.running(replica, [digest], len(handles)):
                async for step in steps:
                    _hand_out(step, handles, began)
        except ReplicaLost as lost:
            error = lost
        except TpeftError as refused:
            error = refused
        except asyncio.CancelledError:
            error = Unavailable("generate tokens", problem="the call was cancelled")
        finally:
            await steps.aclose()
            if not began.done():
                began.set_exception(error)
                began.exception()  # the caller may be gone
            for handle in handles:
                if not handle.future.done():
                    handle.resolve(error)


def _hand_out(step: SequenceStep, handles: list[Handle], began: asyncio.Future[None]) -> None:
    if step.choice < 0:
        if began.done():
            return
        if step.error is not None:
            began.set_exception(step.error)
        else:
            began.set_result(None)
        return
    handle = handles[step.choice]
    for token in step.tokens:
        handle.publish(token)
    if step.error is not None:
        handle.resolve(step.error)
    elif step.reason is not None:
        reason: Any = step.reason
        handle.resolve(Generated(list(handle.tokens), reason))


async def _cancelled(changed: asyncio.Event, handles: list[Handle], following: asyncio.Task[None]) -> None:
    """Cancel a call once all of its sequences are over for their callers."""
    while not all(handle.future.done() for handle in handles):
        changed.clear()
        await changed.wait()
    following.cancel()
