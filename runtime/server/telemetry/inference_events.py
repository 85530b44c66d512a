"""Inference events, and the buffer that delivers them to their observers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from tpeft_deploy.runtime.batching.timing import Timing
from tpeft_deploy.runtime.server.v2.messages import ServedVersion

__all__ = ["EventBuffer", "GenerationFigures", "InferenceEvent"]

_MOST = 256
_SECONDS = 0.1


class GenerationFigures(msgspec.Struct, frozen=True):
    """Tokens of one request for generation.

    Attributes:
        prompt_tokens: tokens of the prompts.
        arrived: time of the request, in seconds of `time.monotonic`.
        times: times of the tokens of each sequence.
    """

    prompt_tokens: int
    arrived: float
    times: Sequence[Sequence[float]]


class InferenceEvent(msgspec.Struct, frozen=True):
    """One finished inference.

    Attributes:
        tenant: tenant of the caller.
        task: requested model name; the bundle's name if the rows have different tasks.
        targets: target of all rows, or one per row.
        rows: number of rows.
        timing: times of queueing and running.
        seconds: time from arrival to response.
        failed: whether the inference raised.
        traceparent: W3C trace context of the caller; empty if there is none.
        component: component that ran; empty if the bundle has one graph.
        generation: tokens, if the request is for generation.
    """

    tenant: str
    task: str
    targets: Sequence[ServedVersion]
    rows: int
    timing: Timing
    seconds: float
    failed: bool
    traceparent: str = ""
    component: str = ""
    generation: GenerationFigures | None = None


class EventBuffer:
    """Buffers inference events and delivers them in batches; belongs to the event loop.

    Keeps observers out of the request's path; delivering events in batches also costs less than one by one.

    Args:
        observers: called with each event, in order; must not block.
    """

    def __init__(self, *observers: Callable[[InferenceEvent], None]) -> None:
        self._observers = observers
        self._buffered: list[InferenceEvent] = []
        self._timer: asyncio.TimerHandle | None = None

    def publish(self, event: InferenceEvent) -> None:
        """Buffer an event for delivery within 0.1 s."""
        self._buffered.append(event)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._due)
        elif len(self._buffered) >= _MOST:
            self.flush()

    def flush(self) -> None:
        """Deliver all buffered events; call it before statistics are read or dropped."""
        buffered, self._buffered = self._buffered, []
        for observe in self._observers:
            for event in buffered:
                observe(event)

    def _due(self) -> None:
        self._timer = None
        self.flush()
