"""Order of the sequences of a scheduler, and the turns of tenants at slots and at the computation of prompts."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from tpeft_deploy.runtime.batching.policy import Order, Request
from tpeft_deploy.runtime.generation import sequence as sequences

__all__ = ["ByPriority", "SequenceOrder", "TenantShares"]

_KEPT = 64  # tenants remembered, in addition to those that are owed nothing


class SequenceOrder(Order[None], Protocol):
    """Order of waiting sequences, with weights of their tenants."""

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight, above 0."""


class ByPriority:
    """Order by priority, the smaller first, then by arrival; a stream of high priorities starves low ones."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._requests: dict[tuple[int, int], Request[None]] = {}
        self._of: dict[int, tuple[int, int]] = {}
        self._arrivals = itertools.count()

    def add(self, request: Request[None]) -> None:
        """Let a request wait behind those of its priority."""
        place = (request.priority, next(self._arrivals))
        bisect.insort(self._places, place)
        self._requests[place] = request
        self._of[request.id] = place

    def drop(self, request: Request[None]) -> None:
        """Forget a request that will not run."""
        place = self._of.pop(request.id)
        del self._requests[place], self._places[bisect.bisect_left(self._places, place)]

    def serve(self, requests: Sequence[Request[None]]) -> None:
        """Hand out requests that run now."""
        for request in requests:
            self.drop(request)

    def __iter__(self) -> Iterator[Request[None]]:
        """All waiting requests, the next to serve first."""
        return (self._requests[place] for place in self._places)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._places)


class TenantShares:
    """Shares of tenants in the slots, and weighted fair queueing of their prompts by tokens.

    A prompt has a virtual finish time: that of its tenant's previous prompt, or the virtual time if that is later, plus
    its tokens divided by the tenant's weight.  The prompt with the smallest is computed first, so that a tenant that
    uses less than its share waits neither for the long prompts nor for the many sequences of another.

    Args:
        weight: returns the weight of a tenant, above 0; None treats all as one.
    """

    def __init__(self, weight: Callable[[str], float] | None) -> None:
        self._weights = weight
        self._now = 0.0  # virtual time: tokens computed, by weight
        self._finish: dict[str, float] = {}  # tenant -> virtual finish time of its last prompt

    def add(self, sequence: sequences.Sequence) -> None:
        """Let a sequence wait."""
        sequence.arrival = self._now

    def finish(self, sequence: sequences.Sequence, length: int) -> float:
        """Return the virtual finish time of a sequence if it were admitted now.

        Args:
            sequence: sequence.
            length: tokens to compute for its first token.
        """
        tenant = self.tenant(sequence)
        last, own = self._finish.get(tenant, 0.0), length / self._weight(tenant)
        # Half for a tenant below its share, which would otherwise wait for as many tokens of another as it has.
        return last + own if last >= sequence.arrival else sequence.arrival + own / 2

    def admit(self, sequence: sequences.Sequence, length: int) -> None:
        """Give a sequence its virtual finish time; arguments as for `finish`."""
        tenant = self.tenant(sequence)
        sequence.finish = self.finish(sequence, length)
        begin = max(sequence.arrival, self._finish.get(tenant, 0.0))
        self._finish[tenant] = begin + length / self._weight(tenant)
        if len(self._finish) > _KEPT:
            self._finish = {tenant: finish for tenant, finish in self._finish.items() if finish > self._now}

    def compute(self, sequence: sequences.Sequence, left: int) -> None:
        """Advance the virtual time to that of a sequence with so many tokens left to compute."""
        self._now = max(self._now, sequence.finish - left / self._weight(self.tenant(sequence)))

    def claim(self, sequence: sequences.Sequence, running: Iterable[sequences.Sequence]) -> float:
        """Return the slots that a tenant has, by weight, once a waiting sequence has one too.

        Args:
            sequence: sequence without a slot.
            running: sequences in slots.
        """
        tenant = self.tenant(sequence)
        return (1 + sum(self.tenant(each) == tenant for each in running)) / self._weight(tenant)

    def victim(self, claim: float, running: Sequence[sequences.Sequence]) -> sequences.Sequence | None:
        """Return the sequence that gives its slot to one with a claim; None if no tenant has more than its share.

        It is one that decodes, so that every sequence generates at least a token for each computation of its prompt,
        and its tenant has as large a claim afterwards, so that it takes no slot back.
        """
        held = Counter(self.tenant(each) for each in running)
        left = {tenant: (number - 1) / self._weight(tenant) for tenant, number in held.items()}
        found = [each for each in running if each.phase == "decoding" and left[self.tenant(each)] >= claim]
        return max(found, key=lambda each: (left[self.tenant(each)], each.admitted), default=None)

    def alone(self, sequence: sequences.Sequence, running: Iterable[sequences.Sequence]) -> bool:
        """Whether a sequence is the only one of its tenant in slots, while tenants share them."""
        tenant = self.tenant(sequence)
        return self._weights is not None and all(each is sequence or each.tenant != tenant for each in running)

    def tenant(self, sequence: sequences.Sequence) -> str:
        """Return the tenant that counts for a sequence."""
        return "" if self._weights is None else sequence.tenant

    def _weight(self, tenant: str) -> float:
        return 1.0 if self._weights is None else self._weights(tenant)
