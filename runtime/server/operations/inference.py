"""Inference: resolve targets, spend quota, run, build the response."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tpeft_deploy.bundle.directory import Bundle
from tpeft_deploy.bundle.manifest import Manifest
from tpeft_deploy.errors import InputError, NotFound, Unavailable, UnknownTask
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.server.operations.components import Components
from tpeft_deploy.runtime.server.operations.models import Lookup, resolve
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.tenancy.access import Action, Principal, allow
from tpeft_deploy.runtime.server.v2.messages import InferRequest, InferResponse, ServedVersion
from tpeft_deploy.runtime.server.v2.metadata import ADAPTER_INPUT, datatype
from tpeft_deploy.tucker import Array

__all__ = ["Inference"]

Spend = Callable[[str, int, float], None]


class _Ports:
    """Inputs and outputs of a component.

    Attributes:
        component: name of the component; None for the only one.
        datatypes: output -> V2 datatype.
    """

    def __init__(self, manifest: Manifest, component: str | None) -> None:
        self.component = component
        self.datatypes = {port.name: datatype(port) for port in manifest.outputs}
        self._scalars = [port.name for port in manifest.inputs if not port.shape]
        self._first = next((p.name for p in manifest.inputs if p.shape and p.shape[0] == manifest.batch_axis), None)

    def rows(self, inputs: Mapping[str, Array]) -> int:
        """Return the number of rows to spend, at least 1; the inputs are not validated yet."""
        array = inputs.get(self._first) if self._first is not None else None
        return array.shape[0] or 1 if array is not None and array.ndim else 1

    def scalars_of(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Reshape inputs of shape [1] to scalars if the model takes scalars."""
        wide = [name for name in self._scalars if name in inputs and inputs[name].shape == (1,)]
        return {**inputs, **{name: inputs[name].reshape(()) for name in wide}} if wide else inputs

    def check_outputs(self, request: InferRequest) -> None:
        """Refuse requests for outputs that the component does not have."""
        for name in request.outputs:
            if name not in self.datatypes:
                raise InputError(
                    f"run model {request.model!r}",
                    expected=f"outputs among {', '.join(self.datatypes)}",
                    got=f"a request for {name!r}",
                )


class Inference:
    """Runs inference requests on a runtime.

    Args:
        runtime: the runtime.
        bundle: the served bundle.
        find: resolves a model name for a tenant.
        spend: spends rows of a tenant's quota, or raises QuotaExceeded.
        publish: called with the event of each inference; on the event loop, so it must not block.

    Attributes:
        accepting: whether requests are accepted.
    """

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        find: Lookup,
        spend: Spend,
        publish: Callable[[InferenceEvent], None],
    ) -> None:
        self._runtime = runtime
        self._bundle = bundle.manifest.name
        self._components = Components(bundle)
        alone = len(bundle.components) == 1
        self._ports = {name: _Ports(part.manifest, None if alone else name) for name, part in bundle.components.items()}
        self._find = find
        self._spend = spend
        self.accepting = True
        self._publish = publish

    async def infer(self, principal: Principal, request: InferRequest) -> InferResponse:
        """Run a request; cancelling removes it from the queue, or stops its run.

        Raises:
            Forbidden, NotFound, ProtocolError, InputError, QuotaExceeded, QueueFull, DeadlineExceeded, Unavailable.
        """
        allow(principal, Action.INFER)
        if not self.accepting:
            raise Unavailable("run a request", problem="the server is starting or draining", fix="Try again shortly.")
        model, component = self._components.split(request.model, request.component)
        targets, per_row = resolve(self._find, self._bundle, principal.tenant, request, model)
        ports = self._ports[self._components.one(model, component)]
        inputs = request.inputs
        if model == self._bundle and ADAPTER_INPUT in inputs:
            inputs = {name: array for name, array in inputs.items() if name != ADAPTER_INPUT}
        inputs = ports.scalars_of(inputs)
        ports.check_outputs(request)
        rows = ports.rows(inputs)
        timing = Timing(time.monotonic())
        self._spend(principal.tenant, rows, timing.arrived)
        try:
            outputs: Mapping[str, Array | list[Array]]
            if per_row:
                outputs = await self._runtime.infer(
                    inputs,
                    tasks=[target.key for target in targets],
                    outputs=request.outputs or None,
                    timeout=request.timeout,
                    tenant=principal.tenant,
                    priority=request.priority,
                    timing=timing,
                    component=ports.component,
                )
            else:
                outputs = await self._runtime.infer(
                    inputs,
                    targets[0].key,
                    outputs=request.outputs or None,
                    timeout=request.timeout,
                    tenant=principal.tenant,
                    priority=request.priority,
                    timing=timing,
                    component=ports.component,
                )
        except Exception as error:
            self._over(principal, request, model, ports, targets, rows, timing, failed=True)
            if isinstance(error, UnknownTask):
                # The runtime's message may name other tenants' tasks.
                raise NotFound(f"run model {request.model!r}", problem="a task of it was deleted meanwhile") from None
            raise
        self._over(principal, request, model, ports, targets, rows, timing, failed=False)
        return _answer(request, ports.datatypes, targets, per_row, outputs)

    def _over(
        self,
        principal: Principal,
        request: InferRequest,
        model: str,
        ports: _Ports,
        targets: Sequence[ServedVersion],
        rows: int,
        timing: Timing,
        *,
        failed: bool,
    ) -> None:
        took = time.monotonic() - timing.arrived
        self._publish(
            InferenceEvent(
                *(principal.tenant, model, targets, rows, timing, took, failed),
                *(request.traceparent, ports.component or ""),
            )
        )


def _answer(
    request: InferRequest,
    known: Mapping[str, str],
    targets: Sequence[ServedVersion],
    per_row: bool,
    outputs: Mapping[str, Array | list[Array]],
) -> InferResponse:
    found: dict[str, Array] = {}
    datatypes: list[str] = []
    for name in request.outputs or known:
        output = outputs[name]
        if isinstance(output, np.ndarray):
            found[name] = output
            datatypes.append(known[name])
            continue
        rows = _named(name, output)
        found |= rows
        datatypes += [known[name]] * len(rows)
    version = "" if per_row else targets[0].version
    digest = ",".join([target.digest for target in targets]) if per_row else targets[0].digest
    return InferResponse(request.model, version, request.id, found, datatypes, {"adapter_digest": digest})


def _named(name: str, rows: Sequence[Array]) -> dict[str, Array]:
    """Stack the rows of an output, or name one output per row if their shapes differ."""
    if len({array.shape for array in rows}) == 1:
        return {name: np.stack(rows)}
    return {f"{name}.{row}": array for row, array in enumerate(rows)}
