from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpeft_deploy.errors import QueueFull, RunError
from tpeft_deploy.runtime.batching.policy import Limits, Queue, Request

Key = Request[str]


def same(batch: str, key: str) -> str | None:
    return batch if batch == key else None


def queue(**bounds: Any) -> Queue[str]:
    return Queue(Limits(**bounds), same)


def ids(found: list[Key] | float) -> list[int]:
    assert isinstance(found, list), f"nothing until {found}"
    return [request.id for request in found]


@pytest.mark.parametrize("pause", [0.0, 0.0005])
def test_a_single_client_never_waits_for_company(pause: float) -> None:
    own, now = queue(), 0.0
    for id in range(20):
        own.add(Request(id, 1, "a"), now)
        assert ids(own.next(now)) == [id]
        now += 0.0005
        own.ended(now)
        if pause:  # else the client is back before the worker looks again
            assert own.next(now) == math.inf
        now += pause


def test_what_comes_during_a_run_is_the_next_batch_with_those_who_send_again() -> None:
    own = queue()
    own.add(Request(0, 1, "a"), 0.0)
    assert ids(own.next(0.0)) == [0]
    for id in range(1, 6):
        own.add(Request(id, 1, "a"), 0.005)
    own.ended(0.01)
    assert own.next(0.01) == 0.012  # the one that has its answer now may send again
    own.add(Request(6, 1, "a"), 0.011)
    assert ids(own.next(0.011)) == [1, 2, 3, 4, 5, 6]


def test_no_wait_is_longer_than_the_last_run() -> None:
    own = queue(max_delay=0.002)
    own.add(Request(0, 1, "a"), 0.0)
    assert ids(own.next(0.0)) == [0]
    own.add(Request(1, 1, "a"), 0.0004)
    own.ended(0.0005)
    assert own.next(0.0005) == 0.001
    assert ids(own.next(0.001)) == [1]


def test_clients_that_send_again_after_their_answers_wait_for_one_another() -> None:
    own = queue(max_delay=0.002)
    own.add(Request(0, 4, "a"), 0.0)
    own.add(Request(1, 4, "a"), 0.0)
    assert ids(own.next(0.0)) == [0, 1]
    own.ended(0.010)  # both clients were around
    assert own.next(0.010) == math.inf
    own.add(Request(2, 4, "a"), 0.0105)
    assert own.next(0.0105) == pytest.approx(0.0125)
    own.add(Request(3, 4, "a"), 0.0110)
    assert ids(own.next(0.0110)) == [2, 3]  # both are here again: no need to wait on
    own.ended(0.020)
    own.add(Request(4, 4, "a"), 0.0205)
    due = own.next(0.0205)
    assert isinstance(due, float)
    assert ids(own.next(due)) == [4]  # the other did not come: max_delay, and no more
    own.ended(0.030)
    own.add(Request(5, 4, "a"), 0.0305)
    assert ids(own.next(0.0305)) == [5]  # one client is left


def together(own: Queue[str]) -> None:
    """A batch of three requests that ran from 0 to 1 s."""
    for id in (100, 101, 102):
        own.add(Request(id, 1, "a"), 0.0)
    assert ids(own.next(0.0)) == [100, 101, 102]
    own.ended(1.0)


def test_a_request_does_not_wait_when_waiting_cannot_help() -> None:
    full, alone, other, pause, deadline = (queue(max_rows=8) for _ in range(5))
    for own in (full, alone, other, pause, deadline):
        together(own)
    full.add(Request(0, 8, "a"), 1.0)
    assert ids(full.next(1.0)) == [0]
    alone.add(Request(0, 1, None), 1.0)
    assert ids(alone.next(1.0)) == [0]
    other.add(Request(0, 1, "a"), 1.0)
    assert other.next(1.0) == pytest.approx(1.002)
    other.add(Request(1, 1, "b"), 1.001)
    assert ids(other.next(1.001)) == [0]  # the other key would wait too
    pause.add(Request(0, 1, "a"), 1.5)
    assert ids(pause.next(1.5)) == [0]
    deadline.add(Request(0, 1, "a", deadline=1.0015), 1.0)
    assert ids(deadline.next(1.0)) == [0]


def test_a_large_request_runs_alone_and_small_ones_may_pass_what_does_not_fit() -> None:
    own = queue(max_rows=8)
    for id, rows in enumerate([5, 4, 3, 9, 1]):
        own.add(Request(id, rows, "a"), 0.0)
    assert ids(own.next(0.0)) == [0, 2]
    own.ended(0.1)
    assert ids(own.next(0.1)) == [1, 4]
    own.ended(0.2)
    assert ids(own.next(0.2)) == [3]


def test_a_stream_of_one_key_does_not_hold_up_another() -> None:
    own, now = queue(max_rows=2), 0.0
    own.add(Request(0, 1, "a"), now)
    own.add(Request(1, 1, "b"), now)
    served = []
    for id in range(2, 40):
        own.add(Request(id, 1, "a"), now)
        found = own.next(now)
        if isinstance(found, float):
            found = own.next(found)
        served.append(ids(found))
        now += 0.01
        own.ended(now)
    assert [1] in served[:2]


def test_a_full_queue_says_so_and_takes_again_what_has_left() -> None:
    own = queue(max_queue_rows=10)
    own.add(Request(0, 11, "a"), 0.0)  # an empty queue takes any size
    with pytest.raises(QueueFull, match=r"of 1 rows: expected at most 10 rows waiting, got 11 rows in 1 requests"):
        own.add(Request(1, 1, "a"), 0.0)
    assert own.cancel(0)
    assert not own.cancel(0)
    assert (len(own), own.rows) == (0, 0)
    own.add(Request(2, 10, "a"), 0.0)
    assert own.rows == 10


def test_deadlines() -> None:
    own = queue()
    for id, deadline in enumerate([3.0, 1.0, math.inf, 1.5]):
        own.add(Request(id, 1, "a", deadline=deadline), 0.0)
    assert own.expire(0.9) == []
    assert ids(own.expire(1.5)) == [1, 3]
    assert own.expire(1.6) == []
    assert ids(own.expire(3.0)) == [0]
    assert ids(own.next(3.0)) == [2]


@pytest.mark.parametrize("bounds", [{"max_rows": 0}, {"max_delay": -1.0}, {"max_waste": 1.0}, {"max_queue_rows": 0}])
def test_bounds_that_make_no_sense(bounds: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=f"got {next(iter(bounds))} = "):
        Limits(**bounds)


class LightestTenant:
    """Another order: the tenant that has had the fewest rows is first."""

    def __init__(self) -> None:
        self.waiting: list[Key] = []
        self.had: dict[str, int] = {}

    def add(self, request: Key) -> None:
        self.waiting.append(request)

    def drop(self, request: Key) -> None:
        self.waiting.remove(request)

    def serve(self, requests: Sequence[Key]) -> None:
        for request in requests:
            self.waiting.remove(request)
            self.had[request.tenant] = self.had.get(request.tenant, 0) + request.rows

    def __iter__(self) -> Iterator[Key]:
        return iter(sorted(self.waiting, key=lambda request: (self.had.get(request.tenant, 0), request.id)))

    def __len__(self) -> int:
        return len(self.waiting)


def test_another_order_shares_between_tenants() -> None:
    own: Queue[str] = Queue(Limits(max_rows=1), same, LightestTenant())
    for id in range(6):
        own.add(Request(id, 1, "a", tenant="greedy"), 0.0)
    for id in range(6, 9):
        own.add(Request(id, 1, "a", tenant="modest"), 0.0)
    served = []
    for turn in range(9):
        served += ids(own.next(float(turn)))
        own.ended(turn + 0.5)
    assert served == [0, 6, 1, 7, 2, 8, 3, 4, 5]


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 12),
            st.sampled_from(["a", "b", "c", None]),
            st.sampled_from([math.inf, math.inf, 0.001, 0.05]),
        ),
        st.tuples(st.just("cancel"), st.integers(0, 60)),
        st.tuples(st.just("turn"), st.floats(0, 0.01)),
    ),
    max_size=120,
)


class Watched:
    """A queue beside a plain list of what waits, which it is compared with after every step."""

    def __init__(self) -> None:
        self.limits = Limits(max_rows=8, max_delay=0.002, max_queue_rows=40)
        self.queue: Queue[str] = Queue(self.limits, same)
        self.now = 0.0
        self.known = 0
        self.waiting: dict[int, Key] = {}
        self.patience: dict[int, int] = {}  # batches after which a request has left: those before it, and itself
        self.left: list[int] = []

    def add(self, rows: int, form: str | None, time: float) -> None:
        request = Request(self.known, rows, form, self.now + time)
        try:
            self.queue.add(request, self.now)
        except QueueFull:
            assert self.queue.rows + rows > 40
            return
        self.waiting[self.known] = request
        self.patience[self.known] = len(self.waiting)
        self.known += 1

    def cancel(self, id: int) -> None:
        assert self.queue.cancel(id) == (id in self.waiting)
        if self.waiting.pop(id, None) is not None:
            self.left.append(id)

    def turn(self, time: float) -> None:
        self.now += time
        for request in self.queue.expire(self.now):
            assert request.deadline <= self.now
            self.left.append(self.waiting.pop(request.id).id)
        assert all(request.deadline > self.now for request in self.waiting.values())
        oldest = next(iter(self.waiting), None)
        found = self.queue.next(self.now)
        if isinstance(found, float):
            assert found == math.inf if oldest is None else self.now < found <= self.now + self.limits.max_delay
            return
        assert found[0].id == oldest
        assert len({request.form for request in found}) == 1
        assert len(found) == 1 or (sum(request.rows for request in found) <= 8 and found[0].form is not None)
        self.left.extend(self.waiting.pop(request.id).id for request in found)
        for id in self.waiting:
            self.patience[id] -= 1
            assert self.patience[id] > 0
        self.now += 0.0005
        self.queue.ended(self.now)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_every_request_leaves_exactly_once_in_bounded_batches_and_none_is_overtaken_for_long(
    script: list[tuple[Any, ...]],
) -> None:
    watched = Watched()
    for name, *arguments in script:
        getattr(watched, name)(*arguments)
        assert watched.queue.rows == sum(request.rows for request in watched.waiting.values())
        assert len(watched.queue) == len(watched.waiting)
        assert watched.queue.rows <= 40 or len(watched.queue) == 1
    for _ in range(2 * len(watched.waiting)):
        watched.turn(watched.limits.max_delay)
    assert sorted(watched.left) == list(range(watched.known))


def closed_loop(clients: int, run: float, reaction: float, batches: int) -> list[int]:
    """Sizes of batches, where every client sends again within `reaction` of its answer and a run takes `run`."""
    own = queue(max_rows=32)
    coming = [(0.0001 * client, client) for client in range(clients)]
    now, sizes = 0.0, list[int]()

    def arrive() -> None:
        while coming and coming[0][0] <= now:
            own.add(Request(coming[0][1], 1, "a"), coming.pop(0)[0])

    while len(sizes) < batches:
        arrive()
        found = own.next(now)
        if isinstance(found, float):
            now = min(found, coming[0][0] if coming else math.inf)
            continue
        now += run
        arrive()
        own.ended(now)
        sizes.append(len(found))
        again = ((now + reaction * (1 + place) / len(found), request.id) for place, request in enumerate(found))
        coming = sorted([*coming, *again])
    return sizes


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.floats(0.0002, 0.02), st.floats(0, 0.9))
def test_clients_that_send_again_at_once_end_up_in_one_batch(clients: int, run: float, part: float) -> None:
    sizes = closed_loop(clients, run, part * min(run, 0.002), 30)
    assert sizes[-4:] == [clients] * 4


def test_requests_at_random_are_held_back_ever_more_rarely() -> None:
    own, now, held = queue(), 0.0, 0
    for id in range(0, 400, 2):
        # One comes during each run and one before, so that one more seems to be around than comes back.
        own.add(Request(id, 1, "a"), now)
        found = own.next(now)
        if isinstance(found, float):
            held += 1
            now = found
            found = own.next(now)
        assert ids(found)[-1] == id
        own.add(Request(id + 1, 1, "a"), now + 0.004)
        now += 0.005
        own.ended(now)
    assert 0 < held <= 200 / 16 + 4


def test_a_worker_that_waits_for_company_is_only_woken_for_what_may_end_the_wait() -> None:
    def holding() -> Queue[str]:
        """Three clients were around when the last batch ended, and one has come again."""
        own = queue(max_rows=4, max_delay=1.0)
        for id in range(3):
            assert own.add(Request(id, 1, "a"), 0.0)  # nothing is held yet
        own.next(0.0)
        own.ended(2.0)
        own.add(Request(3, 1, "a"), 2.0)
        assert isinstance(own.next(2.0), float)
        return own

    own = holding()
    assert not own.add(Request(4, 1, "a"), 2.1)
    assert own.add(Request(5, 1, "a"), 2.2)  # all are here again
    assert isinstance(own.next(2.2), list)
    assert holding().add(Request(4, 3, "a"), 2.1)  # a full batch
    assert holding().add(Request(4, 1, "b"), 2.1)  # would wait for nothing
    assert holding().add(Request(4, 1, None), 2.1)
    assert holding().add(Request(4, 1, "a", deadline=2.5), 2.1)


def test_workers_take_what_they_can_run_in_the_order_of_one_queue() -> None:
    own: Queue[str] = Queue(Limits(max_rows=2), same, workers=2)
    for id, places in enumerate([(0,), (1,), (0, 1), (1,), (0,)]):
        own.add(Request(id, 1, "a", places=places), 0.0)
    assert ids(own.next(0.0, 1)) == [1, 2]
    assert ids(own.next(0.0, 0)) == [0, 4]
    own.ended(0.1, 0)
    assert own.next(0.1, 0) == math.inf  # what is left is for the other
    own.ended(0.1, 1)
    assert ids(own.next(0.2, 1)) == [3]
    assert not len(own)


def test_a_worker_waits_for_company_of_its_own_and_not_for_that_of_others() -> None:
    own: Queue[str] = Queue(Limits(max_rows=4, max_delay=1.0), same, workers=2)
    for id in range(3):
        own.add(Request(id, 1, "a", places=(0,)), 0.0)
    own.next(0.0, 0)
    own.ended(2.0, 0)
    own.add(Request(3, 1, "a", places=(0,)), 2.0)
    assert isinstance(own.next(2.0, 0), float)
    assert own.add(Request(4, 1, "a", places=(1,)), 2.0)  # the other worker holds nothing
    assert ids(own.next(2.0, 1)) == [4]
    assert not own.add(Request(5, 1, "a", places=(0,)), 2.1)
    assert own.add(Request(6, 1, "a", places=(0,)), 2.1)
    assert ids(own.next(2.1, 0)) == [3, 5, 6]
