"""Inference of encoders on texts: rows of all lengths go to the batcher, and each comes back reduced."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tpeft_deploy.bundle.directory import BASE_TASK, Bundle
from tpeft_deploy.bundle.manifest import Port
from tpeft_deploy.errors import InputError, NotFound, UnknownTask
from tpeft_deploy.labels import HeadLabels
from tpeft_deploy.runtime import Runtime
from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.server.operations.pools import Pools
from tpeft_deploy.runtime.server.operations.texts import GenerationTarget, Texts
from tpeft_deploy.runtime.server.telemetry.inference_events import InferenceEvent
from tpeft_deploy.runtime.server.tenancy.access import Principal
from tpeft_deploy.runtime.server.tenancy.meter import Meter
from tpeft_deploy.runtime.text.model_text import Encoding
from tpeft_deploy.tucker import Array

__all__ = ["TextInference"]

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ROWS, _TOKENS = 8, 2048  # of one request to the batcher, which joins it with others
_AT_ONCE = 8  # requests of one client that wait or run at the same time
_INLINE = 1 << 20  # elements that are reduced on the event loop
_KNOWN = 4096  # tasks with remembered labels


class TextInference:
    """Runs texts through an encoder for the clients of all protocols; belongs to the event loop.

    Args:
        runtime: the runtime.
        bundle: the served bundle.
        component: component that reads texts; None if the bundle has one graph.
        texts: text of that component.
        meter: quotas of the tenants; each text is a row, and spends its tokens.
        publish: called with the event of each request; on the event loop, so it must not block.
        pools: threads that read adapters.

    Attributes:
        texts: text of the component.
    """

    def __init__(
        self,
        runtime: Runtime,
        bundle: Bundle,
        component: str | None,
        texts: Texts,
        meter: Meter,
        publish: Callable[[InferenceEvent], None],
        pools: Pools,
    ) -> None:
        self._runtime = runtime
        self._name, self._component = bundle.manifest.name, component
        self._manifest = bundle.manifest if component is None else bundle.components[component].manifest
        self.texts = texts
        self._meter = meter
        self._publish = publish
        self._pools = pools
        self._labels: OrderedDict[object, HeadLabels | None] = OrderedDict()

    def output(self, name: str, axes: int, doing: str) -> Port:
        """Return an output of the bundle's encoder.

        Args:
            name: name of the output.
            axes: number of its axes.
            doing: purpose, for messages.

        Raises:
            InputError: the bundle has no such output, or takes other inputs than texts give.
        """
        doing = f"{doing} with bundle {self._name!r}"
        found = next((port for port in self._manifest.outputs if port.name == name and len(port.shape) == axes), None)
        if found is None or (isinstance(found.shape[-1], str) and found.varies is None):
            others = ", ".join(port.name for port in self._manifest.outputs) or "none"
            raise InputError(
                doing, expected=f"a bundle with an output {name!r} of {axes} axes, the last of known size", got=others
            )
        inputs = [port.name for port in self._manifest.inputs]
        if inputs[:1] != ["input_ids"] or not set(inputs) <= set(_INPUTS):
            raise InputError(doing, expected=f"inputs among {', '.join(_INPUTS)}", got=", ".join(inputs))
        return found

    async def labels(self, principal: Principal, target: GenerationTarget) -> HeadLabels | None:
        """Return the classes of a target's head; None where none are known.

        Raises:
            NotFound: the task was deleted meanwhile.
            AdapterError: the adapter cannot be read.
        """
        task = BASE_TASK if target.task is None else target.task
        key = (str(task), *(version.digest for version in target.versions))
        if key not in self._labels:
            try:
                found = await self._pools.control.run_for(principal.tenant, self._runtime.labels, task)
            except UnknownTask:
                raise _deleted(target) from None
            self._labels[key] = found
            while len(self._labels) > _KNOWN:
                self._labels.popitem(last=False)
            return found
        self._labels.move_to_end(key)
        return self._labels[key]

    async def run(
        self,
        principal: Principal,
        target: GenerationTarget,
        texts: Sequence[Encoding],
        port: Port,
        reduce: Callable[[Array], Array],
        traceparent: str = "",
    ) -> list[Array]:
        """Run texts, and return for each what `reduce` makes of the rows of an output.

        Args:
            principal: the caller.
            target: versions to run them on.
            texts: texts of at least one token.
            port: output, as `output` returns it.
            reduce: returns an array with the same first axis, the texts of one length.
            traceparent: W3C trace context of the caller.

        Raises:
            TpeftError: as `Runtime.infer`, and for a quota that is used up.
        """
        timing = Timing(time.monotonic())
        tokens = sum(len(text.ids) for text in texts)
        self._meter.spend_work(principal.tenant, len(texts), tokens, timing.arrived)
        found: dict[int, Array] = {}
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one(rows: Sequence[int]) -> None:
            async with slots:
                outputs: Any = await self._runtime.infer(
                    self._inputs([texts[row] for row in rows]),
                    BASE_TASK if target.task is None else target.task,
                    outputs=[port.name],
                    tenant=principal.tenant,
                    timing=timing,
                    component=self._component,
                )
                states = outputs[port.name]
                if states.size <= _INLINE:
                    reduced = reduce(states)
                else:
                    reduced = await self._pools.control.run_for(principal.tenant, reduce, states)
                found.update(zip(rows, reduced, strict=True))

        failed = True
        tasks = [asyncio.create_task(one(rows)) for rows in _parts(texts)]
        try:
            await asyncio.gather(*tasks)
            failed = False
        except UnknownTask:  # the runtime's message may name other tenants' tasks
            raise _deleted(target) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            took = time.monotonic() - timing.arrived
            known = (principal.tenant, target.name, target.versions, len(texts), timing, took, failed)
            self._publish(InferenceEvent(*known, traceparent=traceparent))
        return [found[row] for row in range(len(texts))]

    def _inputs(self, texts: Sequence[Encoding]) -> dict[str, Array]:
        ids = [text.ids for text in texts]
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": [t.type_ids for t in texts]}
        return {port.name: np.asarray(values[port.name], port.dtype) for port in self._manifest.inputs}


def _deleted(target: GenerationTarget) -> NotFound:
    return NotFound(f"run model {target.name!r}", problem="a task of it was deleted meanwhile")


def _parts(texts: Sequence[Encoding]) -> Iterator[list[int]]:
    """Yield the places of texts of one length, as many as fit into one request, the longest first."""
    lengths: dict[int, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        lengths[len(text.ids)].append(row)
    for length in sorted(lengths, reverse=True):
        rows = lengths[length]
        size = max(1, min(_ROWS, _TOKENS // length))
        yield from (rows[start : start + size] for start in range(0, len(rows), size))
