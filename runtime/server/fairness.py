"""Whose request is next: tenants share the computation by their weights, and a tenant's tasks share what it gets.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588),
with a request's elements as its cost: each tenant has a counter of what it was served, divided by its weight, and the
waiting tenant with the smallest is next.  Who comes back after a pause is lifted to the smallest counter of those who
wait, so that being away saves nothing up.  Within a tenant the same holds between lanes (what a request runs on), and
within a lane the smaller priority goes first, then who came first.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tpeft_deploy.runtime.batching import Request

__all__ = ["Fair"]

Form = TypeVar("Form")
_Entry = tuple[int, int]  # priority, and when it came


@dataclass(eq=False)
class _Lane(Generic[Form]):
    """Requests on one task, in the order in which they are served."""

    served: float = 0.0
    entries: list[_Entry] = field(default_factory=list)
    requests: dict[_Entry, Request[Form]] = field(default_factory=dict)


@dataclass(eq=False)
class _Tenant(Generic[Form]):
    """What one tenant has waiting, and what it was served."""

    served: float = 0.0
    lanes: dict[Hashable, _Lane[Form]] = field(default_factory=dict)
    floor: float = 0.0  # what the lane that was served last had: a new lane starts there

    def __iter__(self) -> Iterator[Request[Form]]:
        """Its requests, as they would be served if all were its own."""
        ties = itertools.count()
        turns = [(lane.served, next(ties), lane, 0) for lane in self.lanes.values()]
        heapq.heapify(turns)
        while turns:
            served, tie, lane, place = turns[0]
            request = lane.requests[lane.entries[place]]
            yield request
            if place + 1 < len(lane.entries):
                heapq.heapreplace(turns, (served + request.cost, tie, lane, place + 1))
            else:
                heapq.heappop(turns)


class Fair(Generic[Form]):
    """An order for `batching.Queue` that is fair to tenants, and to the tasks of a tenant.

    While two tenants have requests waiting, what they are served differs from the ratio of their weights by less than
    the cost of one batch.  Every request is served: what waits keeps its counter, and the others' grow.

    Args:
        weight: a tenant's weight, above 0.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._tenants: dict[str, _Tenant[Form]] = {}  # those with requests waiting
        self._away: dict[str, float] = {}  # what the others were served
        self._floor = 0.0  # the smallest counter when something was served last
        self._places: dict[int, tuple[str, Hashable, _Entry]] = {}
        self._arrivals = itertools.count()
        self._rows: Counter[str] = Counter()

    def add(self, request: Request[Form]) -> None:
        """Let a request wait."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            floor = min((other.served for other in self._tenants.values()), default=self._floor)
            tenant = _Tenant(max(self._away.pop(request.tenant, 0.0), floor))
            self._tenants[request.tenant] = tenant
        lane = tenant.lanes.get(request.lane)
        if lane is None:
            lane = _Lane(min((other.served for other in tenant.lanes.values()), default=tenant.floor))
            tenant.lanes[request.lane] = lane
        entry = (request.priority, next(self._arrivals))
        bisect.insort(lane.entries, entry)
        lane.requests[entry] = request
        self._places[request.id] = (request.tenant, request.lane, entry)
        self._rows[request.tenant] += request.rows

    def drop(self, request: Request[Form]) -> None:
        """Forget a request that will not run; nobody is charged."""
        self._take(request, 0.0)

    def serve(self, requests: Sequence[Request[Form]]) -> None:
        """Charge tenants and lanes for requests that run now."""
        for request in requests:
            self._take(request, request.cost)
        self._floor = max(self._floor, min((other.served for other in self._tenants.values()), default=self._floor))
        # Whoever was served less than that is lifted to it on return: nothing to remember.
        if len(self._away) > 2 * len(self._tenants) + 64:
            self._away = {name: served for name, served in self._away.items() if served > self._floor}

    def waiting_rows(self, tenant: str) -> int:
        """Rows of a tenant that wait; may be asked from any thread."""
        return self._rows.get(tenant, 0)

    def __iter__(self) -> Iterator[Request[Form]]:
        """All waiting requests, the next to serve first; each step as if those before it had been served."""
        turns = [
            (tenant.served, order, 1 / self._weight(name), tenant, iter(tenant))
            for order, (name, tenant) in enumerate(self._tenants.items())
        ]
        heapq.heapify(turns)
        while turns:
            served, order, share, tenant, own = turns[0]
            request = next(own, None)
            if request is None:
                heapq.heappop(turns)
                continue
            yield request
            heapq.heapreplace(turns, (served + request.cost * share, order, share, tenant, own))

    def __len__(self) -> int:
        """How many wait."""
        return len(self._places)

    def _take(self, request: Request[Form], cost: float) -> None:
        name, key, entry = self._places.pop(request.id)
        tenant = self._tenants[name]
        lane = tenant.lanes[key]
        del lane.requests[entry]
        del lane.entries[bisect.bisect_left(lane.entries, entry)]
        tenant.served += cost / self._weight(name)
        tenant.floor = max(tenant.floor, lane.served)
        lane.served += cost
        self._rows[name] -= request.rows
        if not lane.entries:
            del tenant.lanes[key]
        if not tenant.lanes:
            del self._tenants[name]
            del self._rows[name]
            self._away[name] = tenant.served
        if not self._tenants:
            # Nobody waits: nobody was kept from anything, and all begin again as equals.
            self._floor = max(self._floor, *self._away.values())
            self._away.clear()
