"""Which waiting requests run together, and when: the policy alone, without threads, a clock or arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from tpeft_deploy.errors import QueueFull
from tpeft_deploy.runtime.limits import Limits

__all__ = ["FirstCome", "Limits", "Order", "Queue", "Request"]

Form = TypeVar("Form")

# Requests in a row that did not fit into a batch, after which no other is looked for: looking at a thousand takes
# longer than many a run.
_MOST_PASSED = 256


@dataclass(slots=True, eq=False)  # not frozen, which would make each cost more
class Request(Generic[Form]):
    """A request as the policy sees it; only its batcher changes it.

    Attributes:
        id: unique among those that wait.
        rows: its size along the batch.
        form: requests of equal form can share a run; None if it runs alone.
        deadline: time after which the answer is of no use.
        tenant: tenant that an order charges for the rows.
        cost: amount that an order may charge: the elements of its inputs, padding not counted.
        priority: among the requests of a tenant and lane, the smaller first.
        lane: key of the task; an order may take turns between the lanes of a tenant.
        size: rows that it counts as while it waits; its rows unless given.
        call: requests of the same call are pieces of one, and leave the queue together when one is refused.
        asked: size of all pieces of the call, for the one that is added first, and 0 for the others; its size
            unless given.  An order that refuses requests looks at this.
        places: workers that can run it.
    """

    id: int
    rows: int
    form: Form | None
    deadline: float = math.inf
    tenant: str = ""
    cost: float = 1.0
    lane: Hashable = None
    priority: int = 0
    size: int = 0
    call: int | None = None
    asked: int = -1
    places: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if not self.size:
            self.size = self.rows
        if self.asked < 0:
            self.asked = self.size


class Order(Protocol[Form]):
    """Waiting requests in the order in which they are to be served.

    The first that a worker can run is in that worker's next batch, always; the others join it, in order, where they
    fit.  An order that puts every request first after a bounded number of batches therefore starves none.
    """

    def add(self, request: Request[Form]) -> None:
        """Let a request wait.

        Raises:
            TpeftError: it may not; nothing has changed then.
        """

    def drop(self, request: Request[Form]) -> None:
        """Forget a request that will not run: cancelled or past its deadline."""

    def serve(self, requests: Sequence[Request[Form]]) -> None:
        """Hand out requests that run now, in one batch; an order that charges tenants does so here."""

    def __iter__(self) -> Iterator[Request[Form]]:
        """All waiting requests, the next to serve first."""

    def __len__(self) -> int:
        """How many wait."""


class FirstCome(Generic[Form]):
    """First come, first served."""

    def __init__(self) -> None:
        self._waiting: dict[int, Request[Form]] = {}

    def add(self, request: Request[Form]) -> None:
        """Let a request wait behind all others."""
        self._waiting[request.id] = request

    def drop(self, request: Request[Form]) -> None:
        """Forget a request that will not run."""
        del self._waiting[request.id]

    def serve(self, requests: Sequence[Request[Form]]) -> None:
        """Hand out requests that run now."""
        for request in requests:
            del self._waiting[request.id]

    def __iter__(self) -> Iterator[Request[Form]]:
        """All waiting requests, the oldest first."""
        return iter(self._waiting.values())

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)


class _Waiting(Generic[Form]):
    """What one tenant has in the queue, the oldest first."""

    __slots__ = ("requests", "size")

    def __init__(self) -> None:
        self.requests: dict[int, Request[Form]] = {}
        self.size = 0


@dataclass(slots=True, eq=False)
class _Worker(Generic[Form]):
    """What the rule of `Queue._worth_waiting` remembers, and learns, of one worker."""

    waiting: int = 0  # requests that it can run
    running: int = 0  # those of the last batch, when that began and ended, and what was there then
    began: float = 0.0
    free_since: float = -math.inf
    around: int = 0
    held: bool = False  # whether it was told to wait,
    doubt: int = 0  # how often in vain,
    skip: int = 0  # and for how many batches not to try again
    holding: tuple[Form, float] | None = None  # the batch that it was told to wait with, and until when


class Queue(Generic[Form]):
    """Requests that wait for workers, each of which runs a batch at a time.

    Times are seconds of any clock that does not run backwards; every call says what time it is.  Not safe to call
    from several threads at once.

    Args:
        limits: bounds.
        join: the form of a batch (first) with one more request (second), or None if that does not fit; a batch starts
            as the form of its first request.
        order: scheduling order; first come, first served by default.
        evicted: is told of each waiting request that has to leave for one of another tenant; `add` calls it.
        workers: number of workers.
    """

    def __init__(
        self,
        limits: Limits,
        join: Callable[[Form, Form], Form | None],
        order: Order[Form] | None = None,
        evicted: Callable[[Request[Form]], None] = lambda _: None,
        workers: int = 1,
    ) -> None:
        self._limits = limits
        self._join = join
        self._order: Order[Form] = FirstCome() if order is None else order
        self._evicted = evicted
        self._most_elements = math.inf if limits.max_run_elements is None else limits.max_run_elements
        self._waiting: dict[int, tuple[Request[Form], float]] = {}
        self._tenants: dict[str, _Waiting[Form]] = {}  # those that have something waiting
        self._rows = 0
        self._size = 0
        self._earliest_deadline = math.inf
        self._workers: Sequence[_Worker[Form]] = [_Worker() for _ in range(workers)]

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def add(self, request: Request[Form], now: float, pieces: Iterable[Request[Form]] = ()) -> bool:
        """Let a request wait.  A queue that is empty takes a request of any number of rows.

        A queue that is full makes room as in "longest queue drop" (Suter et al., INFOCOM 1998): the tenant with the
        most waiting loses its newest request, if that is more than the tenant of the new one would have.  So a tenant
        that stays below the queue's size divided by the number of tenants in it is never refused.

        Args:
            request: new request, or its first piece.
            now: the time.
            pieces: the other pieces; all wait, or none.

        Returns:
            Whether a worker that `next` told to ask again later should ask now.

        Raises:
            QueueFull: too many rows wait already.
            TpeftError: the order does not take it.
        """
        victims: Sequence[Request[Form]] = ()
        if self._size and self._size + request.asked > self._limits.max_queue_rows:
            victims = self._victims(request)
        self._order.add(request)
        for victim in victims:
            if self.cancel(victim.id):  # else it left with another piece of its call
                self._evicted(victim)
        self._enter(request, now)
        for piece in pieces:
            self._order.add(piece)
            self._enter(piece, now)
        self._earliest_deadline = min(self._earliest_deadline, request.deadline)
        return any(self._ends_holding(self._workers[place], request) for place in request.places)

    def _enter(self, request: Request[Form], now: float) -> None:
        self._waiting[request.id] = (request, now)
        own = self._tenants.get(request.tenant)
        if own is None:
            own = self._tenants[request.tenant] = _Waiting()
        own.requests[request.id] = request
        own.size += request.size
        self._size += request.size
        self._rows += request.rows
        for place in request.places:
            self._workers[place].waiting += 1

    def _leave(self, request: Request[Form]) -> None:
        del self._waiting[request.id]
        own = self._tenants[request.tenant]
        del own.requests[request.id]
        own.size -= request.size
        if not own.requests:
            del self._tenants[request.tenant]
        self._size -= request.size
        self._rows -= request.rows
        for place in request.places:
            self._workers[place].waiting -= 1

    def _victims(self, request: Request[Form]) -> list[Request[Form]]:
        """Requests that leave so that another one has room.

        Raises:
            QueueFull: no other tenant has more waiting than the tenant of the request would have.
        """
        sizes = {tenant: waiting.size for tenant, waiting in self._tenants.items()}
        newest = {tenant: reversed(waiting.requests.values()) for tenant, waiting in self._tenants.items()}
        wanted = sizes.pop(request.tenant, 0) + request.asked
        excess = self._size + request.asked - self._limits.max_queue_rows
        found: list[Request[Form]] = []
        while excess > 0:
            longest = max(sizes, key=sizes.__getitem__, default=None)
            if longest is None or sizes[longest] <= wanted:
                raise QueueFull(
                    f"queue a request of {request.asked} rows",
                    expected=f"at most {self._limits.max_queue_rows} rows waiting",
                    got=f"{self._size} rows in {len(self._waiting)} requests before it",
                    fix="Send it again later, send less at once, or raise max_queue_rows.",
                )
            victim = next(newest[longest])
            pieces = [victim]
            if victim.call is not None:
                pieces = [own for own in self._tenants[longest].requests.values() if own.call == victim.call]
                for _ in pieces[1:]:
                    next(newest[longest])  # pieces came together, so that nothing is between them
            found += pieces
            size = sum(piece.size for piece in pieces)
            sizes[longest] -= size
            excess -= size
        return found

    def _ends_holding(self, worker: _Worker[Form], request: Request[Form]) -> bool:
        """Whether one more request may make a batch run, also one that was worth waiting for; see `_worth_waiting`."""
        if worker.holding is None:
            return True
        form, until = worker.holding
        return (
            worker.waiting >= worker.around
            or self._rows >= self._limits.max_rows
            or request.deadline <= until
            or request.form is None
            or self._join(form, request.form) is None
        )

    def cancel(self, id: int) -> bool:
        """Take a request out; False if it does not wait (any more)."""
        if id not in self._waiting:
            return False
        request, _ = self._waiting[id]
        self._leave(request)
        self._order.drop(request)
        return True

    def expire(self, now: float) -> list[Request[Form]]:
        """Take out the requests past their deadline, and return them."""
        if now < self._earliest_deadline:
            return []
        over = [request for request, _ in self._waiting.values() if request.deadline <= now]
        for request in over:
            self.cancel(request.id)
        self._earliest_deadline = min((request.deadline for request, _ in self._waiting.values()), default=math.inf)
        return over

    def next(self, now: float, place: int = 0) -> list[Request[Form]] | float:
        """What a free worker does next; call `expire` first, and this only after `ended` said that it runs nothing.

        Args:
            now: the time.
            place: index of the worker.

        Returns:
            A batch to run now, or the time to ask again if nothing is added before; infinity when nothing waits.
        """
        worker = self._workers[place]
        worker.holding = None
        if not worker.waiting:
            return math.inf
        batch, form = self._gather(place)
        until = self._worth_waiting(worker, batch)
        if now < until:
            worker.held = True
            if form is not None:
                worker.holding = form, until
            return until
        _learn(worker, in_vain=until > -math.inf)
        self._order.serve(batch)
        for request in batch:
            self._leave(request)
        worker.running = len(batch)
        worker.began = now
        return batch

    def ended(self, now: float, place: int = 0) -> None:
        """Record that the batch of a worker has run; does nothing if it was running none.

        Call it before the futures are resolved: clients that send again at once would be counted twice.
        """
        worker = self._workers[place]
        if worker.running:
            worker.free_since = now
            worker.around = worker.running + worker.waiting
            worker.running = 0

    def _gather(self, place: int) -> tuple[list[Request[Form]], Form | None]:
        """A worker's first request of the order with what can join it, up to the bounds of a run; and their form."""
        waiting = iter(self._order)
        if len(self._workers) > 1:
            waiting = (request for request in waiting if place in request.places)
        first = next(waiting)
        batch, rows, form, passed = [first], first.rows, first.form, 0
        elements = first.cost
        for request in waiting:
            if form is None or rows >= self._limits.max_rows or passed >= _MOST_PASSED:
                break
            fits = rows + request.rows <= self._limits.max_rows and elements + request.cost <= self._most_elements
            joined = self._join(form, request.form) if fits and request.form is not None else None
            if joined is None:
                passed += 1
            else:
                form, passed = joined, 0
                rows += request.rows
                elements += request.cost
                batch.append(request)
        return batch, form

    def _worth_waiting(self, worker: _Worker[Form], batch: Sequence[Request[Form]]) -> float:
        """Until when a batch should wait for company; minus infinity if not at all.

        What comes during a run waits anyway and forms the next batch: under load, batches grow by themselves (as in
        vLLM, or in Triton with its default delay of 0), and holding back a request on an idle worker would add
        latency for nothing.  One case loses without a delay: clients that all send again as soon as they have their
        answers.  They fall into two groups, one waiting while the other runs, and every run carries half of them.  So
        a batch waits while fewer requests are here than were around when the last batch ended: up to max_delay, and
        no longer than a run takes, as by then a second run would have been cheaper.  A single client, and the first
        request after a pause, never wait.
        """
        if batch[0].form is None or sum(request.rows for request in batch) >= self._limits.max_rows:
            return -math.inf
        if len(batch) < worker.waiting or len(batch) >= worker.around or worker.skip:
            # Others cannot join this batch and would wait too; or all are here again; or none came lately.
            return -math.inf
        oldest = min(self._waiting[request.id][1] for request in batch)
        if oldest - worker.free_since >= self._limits.max_delay:
            return -math.inf
        until = max(oldest, worker.free_since) + min(self._limits.max_delay, worker.free_since - worker.began)
        # A delay must not be what costs a request its deadline.
        return -math.inf if any(request.deadline <= until for request in batch) else until


def _learn(worker: _Worker[Form], *, in_vain: bool) -> None:
    """Wait more and more rarely while none comes: requests that arrive at random gain nothing from a delay."""
    if worker.skip:
        worker.skip -= 1
    elif worker.held:
        worker.doubt = min(2 * worker.doubt + 1, 15) if in_vain else 0
        worker.skip = worker.doubt
    worker.held = False
