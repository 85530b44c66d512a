"""A replica: one runtime, which calls reach with adapters named by digest."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.errors import CapacityError, RunError, TpeftError
from tpeft_deploy.runtime import Limits, Runtime
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.cluster.adapter_files import AdapterNames
from tpeft_deploy.runtime.cluster.affinity import short_digest
from tpeft_deploy.runtime.cluster.wire import (
    CallRoute,
    Computed,
    Figures,
    GenerateCall,
    InferCall,
    Refused,
    SequenceStep,
    joined,
)
from tpeft_deploy.runtime.generation.handle import GenerationRequest, Handle
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair, Orders
from tpeft_deploy.runtime.server.tenancy.quotas import Quota, queue_shares
from tpeft_deploy.runtime.text.model_text import ModelText

__all__ = ["ReplicaRuntime", "ToldQuotas"]

_log = logging.getLogger("tpeft_deploy.cluster")
_TENANTS = 10_000
_PAUSE = 0.02  # seconds; Ray takes two milliseconds for what a call yields, be it one token or twenty
_REPORTED = 8192  # adapters of which residency is reported
_CONTROL = frozenset({"probe", "pin", "unpin", "labels", "prefetch", "open_generation"})


class ToldQuotas:
    """Quotas of tenants as the last call of each told them."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Quota] = OrderedDict()

    def tell(self, tenant: str, quota: Quota) -> None:
        """Take over a quota."""
        self._known[tenant] = quota
        self._known.move_to_end(tenant)
        if len(self._known) > _TENANTS:
            self._known.popitem(last=False)

    def __call__(self, tenant: str) -> Quota:
        """Return a tenant's quota."""
        return self._known.get(tenant) or Quota()

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight."""
        return self(tenant).weight

    def orders(self, limits: Limits) -> Orders:
        """Return orders of queues by these quotas."""
        return Orders(lambda: Fair(self.weight, queue_shares(self, limits.max_queue_rows)))


class ReplicaRuntime:
    """Answers the calls of `RemoteRuntime`; knows nothing of the cluster's software.

    Errors for callers are returned as `Refused`.

    Args:
        bundle: the bundle.
        runtime: runtime of it, with the orders of `quotas`.
        quotas: quotas of tenants.
        read: returns the file of an adapter by digest, as `AdapterNames` takes it.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, quotas: ToldQuotas, read: Callable[..., bytes]) -> None:
        self._bundle = bundle
        self.runtime = runtime
        self._quotas = quotas
        self._names = AdapterNames(runtime, read)
        self._text: ModelText | None = None
        self._running = 0

    async def infer(self, route: CallRoute, call: InferCall) -> Computed | Refused:
        """Run a request."""
        timing = Timing(time.monotonic())
        self._quotas.tell(call.tenant, call.quota)
        self._running += route.rows
        chosen = {"tasks": call.tasks} if call.tasks is not None else {"task": call.task}
        try:
            self._names.know(call.tasks or ())
            self._names.know_task(call.task)
            infer: Any = self.runtime.infer
            outputs = await infer(
                call.inputs,
                **chosen,
                outputs=call.outputs,
                timeout=call.timeout,
                tenant=call.tenant,
                priority=call.priority,
                timing=timing,
                component=call.component,
            )
        except TpeftError as error:
            return Refused(error)
        finally:
            self._running -= route.rows
        return Computed(outputs, timing.ran, time.monotonic() - timing.ended, timing.rows)

    async def generate(self, route: CallRoute, call: GenerateCall) -> AsyncGenerator[SequenceStep]:
        """Run sequences: first `SequenceStep(-1)`, then the tokens of each as they come; closing it cancels them."""
        self._quotas.tell(call.tenant, call.quota)
        handles: list[Handle] = []
        self._running += route.rows
        try:
            try:
                self._names.know_task(call.task)
                request = await asyncio.to_thread(self._request, call)
                task: Any = call.task
                handles = await self.runtime.start(request, task)
            except TpeftError as error:
                yield SequenceStep(-1, error=error)
                return
            yield SequenceStep(-1)
            async with aclosing(_merged(handles)) as steps:
                async for step in steps:
                    yield step
        finally:
            self._running -= route.rows
            for handle in handles:
                handle.cancel()

    async def control(self, route: CallRoute, method: str, names: list[str], options: dict[str, Any]) -> Any:
        """Call a method of the runtime in a thread.

        Args:
            route: route of the call.
            method: name of the method.
            names: adapters that it takes as one argument, if any.
            options: keyword arguments.
        """
        if method not in _CONTROL:
            return Refused(RunError(f"call {method[:50]!r} on a replica", problem="it is none of the calls"))
        try:
            return await asyncio.to_thread(self._control, method, names, options)
        except TpeftError as error:
            return Refused(error)

    async def report(self, route: CallRoute) -> Figures:
        """Return `figures`, for an ingress that starts."""
        return self.figures()

    async def hottest(self, route: CallRoute) -> list[str]:
        """Return the names of adapters that were asked for, the last first, for a replica that starts."""
        return [name for name, _ in reversed(self._names.last(_REPORTED))]

    def warm(self, names: list[str]) -> None:
        """Bring adapters to the device; what cannot be brought is left to the first request for it.  Blocks."""
        for name in names:
            try:
                self._names.know([name])
                self.runtime.prefetch([name]).result()
            except TpeftError as error:
                _log.warning("cannot bring an adapter before the replica is ready: %s", error)
                if isinstance(error, CapacityError):
                    return

    @property
    def rows(self) -> int:
        """Rows that wait or run."""
        return max(self._running, self.runtime.batching().waiting_rows)

    def figures(self) -> Figures:
        """Return the state that routers choose by."""
        known = dict(self._names.last(_REPORTED))
        tiers = self.runtime.residency(known)
        here = [digest for name, digest in known.items() if tiers.get(name) in {"device", "folded"}]
        bundled = [name for name, tier in self.runtime.residency(self._bundle.tasks).items() if tier != "disk"]
        here += [self._bundle.tasks[name] for name in bundled[:_REPORTED]]
        return Figures(
            self.rows,
            frozenset(map(short_digest, here)),
            self.runtime.usage(),
            self.runtime.batching(),
            self.runtime.generation(),
            {
                "provider": self.runtime.provider,
                "provider_reason": self.runtime.provider_reason,
                "most_tokens": self.runtime.most_tokens,
            },
        )

    def _control(self, method: str, names: list[str], options: dict[str, Any]) -> Any:
        self._names.know(names)
        if method == "open_generation":
            return self.runtime.open_generation()
        if method == "prefetch":
            return self.runtime.prefetch(names).result()
        return getattr(self.runtime, method)(*names, **options)

    def _request(self, call: GenerateCall) -> GenerationRequest:
        if self._text is None and (call.before is not None or call.schema is not None):
            parts = self._bundle.components.values()
            spoken = next((part for part in parts if part.manifest.text and part.manifest.decoder), self._bundle)
            self._text = ModelText.open(spoken if self._bundle.parts else self._bundle)
        text = self._text
        return GenerationRequest(
            call.prompt,
            call.max_new_tokens,
            call.sampling,
            tenant=call.tenant,
            public=call.public,
            priority=call.priority,
            deadline=call.deadline,
            text=None if text is None or call.before is None else text.detokeniser(call.before, shown=call.shown),
            scored=call.scored,
            inputs=call.inputs,
            constraint=None if text is None or call.schema is None else text.constraint(call.schema),
        )


async def _merged(handles: list[Handle]) -> AsyncGenerator[SequenceStep]:
    """Yield what happens to sequences as it comes, but at most every `_PAUSE` seconds, with all that came meanwhile."""
    came: asyncio.Queue[SequenceStep] = asyncio.Queue()

    async def follow(choice: int, handle: Handle) -> None:
        try:
            async with aclosing(aiter(handle)) as tokens:
                async for token in tokens:
                    came.put_nowait(SequenceStep(choice, (token,)))
        except TpeftError as error:
            came.put_nowait(SequenceStep(choice, error=error))
        except Exception as error:  # a fault of the program ends the sequence, not the call
            came.put_nowait(SequenceStep(choice, error=RunError("generate tokens", problem=type(error).__name__)))
        else:
            came.put_nowait(SequenceStep(choice, reason=handle.result().reason))

    tasks = [asyncio.create_task(follow(choice, handle)) for choice, handle in enumerate(handles)]
    left, clock = len(tasks), asyncio.get_running_loop().time
    sent = -math.inf
    try:
        while left:
            steps = [await came.get()]
            await asyncio.sleep(max(0.0, sent + _PAUSE - clock()))
            while not came.empty():
                steps.append(came.get_nowait())
            sent = clock()
            for step in joined(steps):
                left -= step.reason is not None or step.error is not None
                yield step
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
