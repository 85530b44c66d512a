"""The path of an inference: names to rows, quota, the runtime's queue, and the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np

from tpeft_deploy.errors import InputError, NotFound, TpeftError, Unavailable, UnknownTask
from tpeft_deploy.manifest import Manifest
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.server.access import Action, Principal, allow
from tpeft_deploy.runtime.server.documents import ADAPTER_INPUT, datatype
from tpeft_deploy.runtime.server.messages import InferRequest, InferResponse, Parameter
from tpeft_deploy.runtime.server.resolving import Lookup, Resolved, resolve
from tpeft_deploy.runtime.server.statistics import Statistics
from tpeft_deploy.runtime.timing import Timing
from tpeft_deploy.tucker import Array

__all__ = ["Inference", "Observed"]

Spend = Callable[[str, int], None]


class Observed(msgspec.Struct, frozen=True):
    """What one inference took, for metrics and spans.

    Attributes:
        tenant: who asked.
        task: what was asked for, by name; the bundle's where rows had tasks of their own.
        rows: of the request.
        timing: when it waited and ran.
        seconds: from its arrival to its answer.
        failed: whether it has no answer.
        traceparent: the caller's W3C trace context; empty: none.
    """

    tenant: str
    task: str
    rows: int
    timing: Timing
    seconds: float
    failed: bool
    traceparent: str = ""


class Inference:
    """Answers requests on a runtime.

    Args:
        runtime: what runs them.
        manifest: its bundle's.
        find: what a tenant means by a name.
        spend: takes rows from a tenant's quota, or raises QuotaExceeded.
        statistics: counts what was answered.
        accepting: whether requests are taken.
        observe: is told of each; on the event loop, so it must not block.
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        find: Lookup,
        spend: Spend,
        statistics: Statistics,
        accepting: Callable[[], bool],
        observe: Callable[[Observed], None],
    ) -> None:
        self._runtime = runtime
        self._manifest = manifest
        self._find = find
        self._spend = spend
        self._statistics = statistics
        self._accepting = accepting
        self._observe = observe
        self._datatypes = {port.name: datatype(port) for port in manifest.outputs}
        self._first = next((p.name for p in manifest.inputs if p.shape and p.shape[0] == manifest.batch_axis), None)

    async def infer(self, principal: Principal, request: InferRequest) -> InferResponse:
        """Answer a request; cancelling takes it out of its queue, or stops its run.

        Raises:
            Forbidden, NotFound, ProtocolError, InputError, QuotaExceeded, QueueFull, DeadlineExceeded, Unavailable.
        """
        allow(principal, Action.INFER)
        if not self._accepting():
            raise Unavailable("run a request", problem="the server is starting or draining", fix="Try again shortly.")
        resolved = resolve(self._find, self._manifest.name, principal.tenant, request)
        inputs = request.inputs
        if request.model == self._manifest.name and ADAPTER_INPUT in inputs:
            inputs = {name: array for name, array in inputs.items() if name != ADAPTER_INPUT}
        if request.outputs:
            self._check_outputs(request)
        rows = self._rows(inputs)
        self._spend(principal.tenant, rows)
        timing = Timing(time.monotonic())
        try:
            if resolved.per_row:
                keys = [target.key for target in resolved.targets]
                outputs: Mapping[str, Array | list[Array]] = await self._runtime.infer(
                    inputs, tasks=keys, timeout=request.timeout, tenant=principal.tenant, priority=request.priority,
                    timing=timing,
                )  # fmt: skip
            else:
                outputs = await self._runtime.infer(
                    inputs, resolved.only.key, timeout=request.timeout, tenant=principal.tenant,
                    priority=request.priority, timing=timing,
                )  # fmt: skip
        except UnknownTask:
            # The runtime's own message names what others have.
            self._told(principal, request, resolved, rows, timing, failed=True)
            raise NotFound(f"run model {request.model!r}", problem="a task of it was deleted meanwhile") from None
        except TpeftError:
            self._told(principal, request, resolved, rows, timing, failed=True)
            raise
        self._told(principal, request, resolved, rows, timing, failed=False)
        return self._answer(request, resolved, outputs)

    def _rows(self, inputs: Mapping[str, Array]) -> int:
        """For the quota, before the runtime checks the inputs: never 0, as nothing is free."""
        array = inputs.get(self._first) if self._first is not None else None
        return max(1, array.shape[0]) if array is not None and array.ndim else 1

    def _check_outputs(self, request: InferRequest) -> None:
        for name in request.outputs:
            if name not in self._datatypes:
                raise InputError(
                    f"run model {request.model!r}",
                    expected=f"outputs among {', '.join(self._datatypes)}",
                    got=f"a request for {name!r}",
                )

    def _answer(
        self, request: InferRequest, resolved: Resolved, outputs: Mapping[str, Array | list[Array]]
    ) -> InferResponse:
        found: dict[str, Array] = {}
        datatypes: list[str] = []
        for name in request.outputs or self._datatypes:
            for shown, array in _named(name, outputs[name]):
                found[shown] = array
                datatypes.append(self._datatypes[name])
        if resolved.per_row:
            digest, version = ",".join([target.digest for target in resolved.targets]), ""
        else:
            digest, version = resolved.only.digest, resolved.only.version
        parameters: dict[str, Parameter] = {"adapter_digest": digest}
        return InferResponse(request.model, version, request.id, found, datatypes, parameters)

    def _told(
        self,
        principal: Principal,
        request: InferRequest,
        resolved: Resolved,
        rows: int,
        timing: Timing,
        *,
        failed: bool,
    ) -> None:
        total = time.monotonic() - timing.arrived
        for target in set(resolved.targets) if resolved.per_row else resolved.targets:
            tally = self._statistics.tally(target.tenant, target.task, target.version)
            if failed:
                tally.failing_after(total)
            else:
                own = resolved.targets.count(target) if resolved.per_row else rows
                tally.succeeded(own, total=total, queue=timing.queued, run=timing.ran, batch=timing.rows)
        self._observe(Observed(principal.tenant, request.model, rows, timing, total, failed, request.traceparent))


def _named(name: str, output: Array | Sequence[Array]) -> list[tuple[str, Array]]:
    """One output, or one for each row where rows differ in size: padding would be taken for answers."""
    if isinstance(output, np.ndarray):
        return [(name, output)]
    if len({array.shape for array in output}) == 1:
        return [(name, np.stack(output))]
    return [(f"{name}.{row}", array) for row, array in enumerate(output)]
