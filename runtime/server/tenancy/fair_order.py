"""Weighted fair queueing of requests over tenants, and fair queueing over the tasks of a tenant.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588),
with the elements of a request, or the tokens of a sequence, as its cost: each tenant has a counter of the cost served,
divided by its weight, and the waiting tenant with the smallest counter is next.  The counter of a tenant that returns
after a pause is lifted to the smallest counter of the waiting tenants, so that idle time earns no credit.  Within a
tenant the same applies to lanes (the target of a request); within a lane requests are ordered by priority, smaller
values first, then by arrival.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from tpeft_deploy.runtime.batching.policy import Request

__all__ = ["Fair", "Orders"]

Form = TypeVar("Form")
Key = TypeVar("Key", bound=Hashable)

# Number of later requests in the lane that may overtake a request per step of priority: more than a queue usually
# holds, so that priorities decide, but bounded, so that the lowest priority does not starve.
_PATIENCE = 1024
_LATER = 2**62  # offset that puts a turn after all others
_KEPT = 64  # departed members kept, in addition to two per waiting member


class _Counted:
    """A waiting member.

    Attributes:
        served: virtual token counter.
        is_new: whether the member has no known counter, as a newcomer.
        turn: tie-breaker, the smaller is next: members not served since they entered, then the least recently served.
    """

    def __init__(self) -> None:
        self.served = 0.0
        self.is_new = True
        self.turn = 0


Member = TypeVar("Member", bound=_Counted)


class _Counters(Generic[Key, Member]):
    """Virtual token counters of the waiting members.

    Attributes:
        waiting: key -> member, the longest waiting first.
    """

    def __init__(self) -> None:
        self.waiting: dict[Key, Member] = {}
        self._away: dict[Key, float] = {}
        self._turns = 0
        self._least = 0.0  # smallest counter of the waiting members
        self._entry = 0.0  # initial counter of newcomers

    def enter(self, key: Key, member: Member) -> Member:
        """Add a waiting member with its known counter, lifted to the smallest counter of the waiting members."""
        known = self._away.pop(key, None)
        self._turns += 1
        member.turn = self._turns - _LATER
        member.is_new = known is None
        member.served = max(self._least, self._entry if known is None else known)
        self.waiting[key] = member
        return member

    def charge(self, member: Member, cost: float) -> None:
        """Add the cost of a service to the counter of a waiting member."""
        self._turns += 1
        member.turn = self._turns
        if member.is_new:
            # An endless sequence of newcomers that all start at the smallest counter would starve the others.  So the
            # initial counter grows by the cost served to newcomers, divided by the number of waiting members.
            member.is_new = False
            self._entry = max(self._entry, self._least) + cost / len(self.waiting)
        member.served += cost

    def leave(self, key: Key) -> None:
        """Remove a waiting member; its counter is kept for its return, unless nothing was charged."""
        member = self.waiting.pop(key)
        if not member.is_new:
            self._away[key] = member.served

    def settle(self) -> None:
        """Update the smallest counter; call it after members were charged or left, before another enters."""
        if not self.waiting:
            # Without contention no member is owed anything: all restart as equals.
            self._away.clear()
            self._least = self._entry = 0.0
            return
        self._least = max(self._least, min(member.served for member in self.waiting.values()))
        if len(self._away) > 2 * len(self.waiting) + _KEPT:
            # Smaller counters would be lifted to the smallest on return, so they need not be kept.
            self._away = {key: served for key, served in self._away.items() if served > self._least}

    @property
    def remembered(self) -> int:
        """Number of kept counters of departed members."""
        return len(self._away)


class _Lane(_Counted, Generic[Form]):
    """Requests of one task, in the order of service."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request[Form]] = []
        self._places: list[tuple[int, int]] = []  # sort keys of `requests`
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


class _Tenant(_Counted, Generic[Form]):
    """Waiting requests of one tenant."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight  # as of the tenant's arrival or last service
        self.rows = self.size = 0
        self.lanes: _Counters[Hashable, _Lane[Form]] = _Counters()

    def __iter__(self) -> Iterator[Request[Form]]:
        """Iterate over its requests, in the order of service without other tenants."""
        lanes = self.lanes.waiting.values()
        turns = [(lane.served, lane.turn, 1.0, iter(lane.requests)) for lane in lanes]
        yield from _merged(turns) if len(turns) > 1 else turns[0][3]


def _merged(turns: list[tuple[float, int, float, Iterator[Request[Form]]]]) -> Iterator[Request[Form]]:
    """Merge requests by the smallest counter; for ties, see `_Counted.turn`.

    Args:
        turns: counter, unique turn, weight and requests of each member.
    """
    heapq.heapify(turns)
    later = itertools.count(_LATER)
    while turns:
        served, _, weight, own = turns[0]
        request = next(own, None)
        if request is None:
            heapq.heappop(turns)
            continue
        yield request
        heapq.heapreplace(turns, (served + request.cost / weight, next(later), weight, own))


class Fair(Generic[Form]):
    """Order for `batching.Queue`: weighted fair queueing over tenants, fair queueing over the tasks of a tenant.

    While two tenants have waiting requests that may share a batch, the cost served to them differs from the ratio of
    their weights by less than the cost of one batch.  A request that fills a batch which no other tenant can fill is
    charged as usual, and the other tenants catch up later.  No request starves: the counter of a waiting tenant stays,
    and those of served tenants grow.

    Args:
        weight: returns the weight of a tenant, above 0.
        admit: admission control, called before each request with its tenant, the tenant's waiting rows and the rows to
            add, as they count in the queue; raises to refuse the request.  It is called under the queue's lock: it must
            be quick, and must not call the queue or the order.
    """

    def __init__(self, weight: Callable[[str], float], admit: Callable[[str, int, int], None] | None = None) -> None:
        self._weight = weight
        self._admit = admit
        self._tenants: _Counters[str, _Tenant[Form]] = _Counters()
        self._places: dict[int, tuple[_Tenant[Form], _Lane[Form], tuple[int, int]]] = {}

    def weight(self, tenant: str) -> float:
        """Return the weight of a tenant."""
        return self._weight(tenant)

    def add(self, request: Request[Form]) -> None:
        """Add a waiting request.

        Raises:
            TpeftError: `admit` refused the request; nothing has changed.
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
        """Remove a request that will not run, without charging for it."""
        self._take([request], charge=False)

    def serve(self, requests: Sequence[Request[Form]]) -> None:
        """Remove requests that are dispatched, and charge their tenants and lanes."""
        for name in {request.tenant for request in requests}:
            self._tenants.waiting[name].weight = self._weight(name)
        self._take(requests, charge=True)

    def waiting_rows(self, tenant: str) -> int:
        """Return the number of waiting rows of a tenant; thread-safe."""
        own = self._tenants.waiting.get(tenant)
        return 0 if own is None else own.rows

    def __iter__(self) -> Iterator[Request[Form]]:
        """Iterate over the waiting requests in the order of service."""
        tenants = self._tenants.waiting.values()
        return _merged([(own.served, own.turn, own.weight, iter(own)) for own in tenants])

    def __len__(self) -> int:
        """Return the number of waiting requests."""
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
            elif charge:  # drops often come in bulk, and change no counter
                tenant.lanes.settle()
        if charge or not self._tenants.waiting:
            self._tenants.settle()


class Orders:
    """The orders of the queues of one runtime, which has one queue per component, and one of sequences.

    Args:
        make: creates an order.

    Attributes:
        sequences: order of the sequences that wait for slots.
    """

    def __init__(self, make: Callable[[], Fair[Any]]) -> None:
        self._make = make
        self.sequences: Fair[None] = make()
        self._made: list[Fair[Any]] = [self.sequences]

    def __call__(self, component: str) -> Fair[Any]:
        """Create the order of one more queue."""
        self._made.append(self._make())
        return self._made[-1]

    def waiting_rows(self, tenant: str) -> int:
        """Return the number of rows of a tenant that wait, in all queues."""
        return sum(order.waiting_rows(tenant) for order in self._made)
