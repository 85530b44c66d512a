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
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from tpeft_deploy.runtime.batching.policy import Request
from tpeft_deploy.runtime.server.tenancy.token_counters import LATER, Counted, Counters

__all__ = ["Fair"]

Form = TypeVar("Form")

# How many later requests of its lane may overtake a request for each step of priority: more than a queue usually
# holds, so that priorities decide, and a bound, so that the least urgent is served too.
_PATIENCE = 1024


class _Lane(Counted, Generic[Form]):
    """Requests on one task, in the order in which they are served."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request[Form]] = []
        self._places: list[tuple[int, int]] = []  # of those, and when they came
        self._arrivals = 0

    def add(self, request: Request[Form]) -> tuple[int, int]:
        self._arrivals += 1
        place = (self._arrivals + request.priority * _PATIENCE, self._arrivals)
        index = bisect.bisect(self._places, place)
        self._places.insert(index, place)
        self.requests.insert(index, request)
        return place

    def take(self, place: tuple[int, int]) -> None:
        index = bisect.bisect_left(self._places, place)
        del self._places[index], self.requests[index]


class _Tenant(Counted, Generic[Form]):
    """What one tenant has waiting."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight  # as it was when the tenant came, or was served last
        self.rows = self.size = 0
        self.lanes: Counters[Hashable, _Lane[Form]] = Counters()

    def __iter__(self) -> Iterator[Request[Form]]:
        """Its requests, as they would be served if all were its own."""
        lanes = self.lanes.waiting.values()
        turns = [(lane.served, lane.turn, 1.0, iter(lane.requests)) for lane in lanes]
        yield from _merged(turns) if len(turns) > 1 else turns[0][3]


def _merged(turns: list[tuple[float, int, float, Iterator[Request[Form]]]]) -> Iterator[Request[Form]]:
    """One request after the other of whoever has the smallest counter; of equals, see `Counted.turn`.

    Args:
        turns: for each: its counter, its turn, which no other has, its weight, and its requests.
    """
    heapq.heapify(turns)
    later = itertools.count(LATER)
    while turns:
        served, _, weight, own = turns[0]
        request = next(own, None)
        if request is None:
            heapq.heappop(turns)
            continue
        yield request
        heapq.heapreplace(turns, (served + request.cost / weight, next(later), weight, own))


class Fair(Generic[Form]):
    """An order for `batching.Queue` that is fair to tenants, and to the tasks of a tenant.

    While two tenants have requests waiting that may share a batch, what they are served differs from the ratio of
    their weights by less than the cost of one batch.  What is served because it fits into a batch that nobody else
    can fill is charged like all else, and the others catch up later.  Every request is served: what waits keeps its
    counter, and the others' grow.

    Args:
        weight: a tenant's weight, above 0.
        admit: told before each request its tenant, what that tenant has waiting and what would be added, in rows as
            they count in the queue; raises what refuses it.  Called under the queue's lock: it must be quick and call
            neither queue nor order.
    """

    def __init__(self, weight: Callable[[str], float], admit: Callable[[str, int, int], None] | None = None) -> None:
        self._weight = weight
        self._admit = admit
        self._tenants: Counters[str, _Tenant[Form]] = Counters()
        self._places: dict[int, tuple[_Tenant[Form], _Lane[Form], tuple[int, int]]] = {}

    def add(self, request: Request[Form]) -> None:
        """Let a request wait.

        Raises:
            TpeftError: what `admit` raised; nothing has changed then.
        """
        tenant = self._tenants.waiting.get(request.tenant)
        if self._admit is not None and request.asked:
            self._admit(request.tenant, 0 if tenant is None else tenant.size, request.asked)
        if tenant is None:
            tenant = self._tenants.enter(request.tenant, _Tenant(self._weight(request.tenant)))
        lane = tenant.lanes.waiting.get(request.lane)
        if lane is None:
            lane = tenant.lanes.enter(request.lane, _Lane())
        self._places[request.id] = (tenant, lane, lane.add(request))
        tenant.rows += request.rows
        tenant.size += request.size

    def drop(self, request: Request[Form]) -> None:
        """Forget a request that will not run; nobody is charged."""
        self._take([request], charge=False)

    def serve(self, requests: Sequence[Request[Form]]) -> None:
        """Charge tenants and lanes for requests that run now."""
        for name in {request.tenant for request in requests}:
            self._tenants.waiting[name].weight = self._weight(name)
        self._take(requests, charge=True)

    def waiting_rows(self, tenant: str) -> int:
        """Rows of a tenant that wait; may be asked from any thread."""
        own = self._tenants.waiting.get(tenant)
        return 0 if own is None else own.rows

    def __iter__(self) -> Iterator[Request[Form]]:
        """All waiting requests, the next to serve first; each step as if those before it had been served."""
        tenants = self._tenants.waiting.values()
        return _merged([(own.served, own.turn, own.weight, iter(own)) for own in tenants])

    def __len__(self) -> int:
        """How many wait."""
        return len(self._places)

    def _take(self, requests: Sequence[Request[Form]], *, charge: bool) -> None:
        touched: dict[str, _Tenant[Form]] = {}
        for request in requests:
            tenant, lane, place = self._places.pop(request.id)
            touched[request.tenant] = tenant
            lane.take(place)
            tenant.rows -= request.rows
            tenant.size -= request.size
            if charge:
                self._tenants.charge(tenant, request.cost / tenant.weight)
                tenant.lanes.charge(lane, request.cost)
            if not lane.requests:
                tenant.lanes.leave(request.lane)
        for name, tenant in touched.items():
            if not tenant.lanes.waiting:
                self._tenants.leave(name)
            elif charge:  # who is dropped may be one of many that are, and moves no counter
                tenant.lanes.settle()
        if charge or not self._tenants.waiting:
            self._tenants.settle()
