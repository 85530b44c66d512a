"""Usage figures of a generator."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

__all__ = ["GenerationStats"]


@dataclass(frozen=True)
class GenerationStats:
    """Usage of a generator.

    Attributes:
        waiting: sequences without a slot.
        running: sequences in slots.
        slots: number of slots.
        cached_prefix_bytes: bytes of the blocks of known prefixes.
        steps: steps so far.
        prefilled_tokens: tokens of prompts computed, again after each preemption.
        reused_tokens: tokens of prompts of which the cache was known.
        generated_tokens: tokens generated.
        finished: sequences that ended with a result.
        cancelled: sequences that their callers cancelled.
        overdue: sequences that did not end before their deadlines.
        failed: sequences that ended with another error.
        preempted: how often a sequence lost its slot for one of higher priority, or of another tenant.
        busy_seconds: seconds in steps.
        running_tasks: sequences in slots by task.
        waiting_tasks: sequences without a slot by task.
    """

    waiting: int
    running: int
    slots: int
    cached_prefix_bytes: int
    steps: int
    prefilled_tokens: int
    reused_tokens: int
    generated_tokens: int
    finished: int
    cancelled: int
    overdue: int
    failed: int
    preempted: int
    busy_seconds: float
    running_tasks: Mapping[Hashable, int] = field(default_factory=dict)
    waiting_tasks: Mapping[Hashable, int] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of steps."""
        return self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0
