from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from tests.helpers.runtime.decoders import FakeHeld
from tpeft_deploy.errors import QueueFull, RunError
from tpeft_deploy.runtime.batching.policy import FirstCome, Order, Request
from tpeft_deploy.runtime.generation import sequence as sequences
from tpeft_deploy.runtime.generation.orders import ByPriority
from tpeft_deploy.runtime.generation.scheduler import Scheduler
from tpeft_deploy.runtime.generation.sequence import Move, Piece, Step
from tpeft_deploy.runtime.server.tenancy.fair_order import Fair


def sequence(id: int, prompt: int = 3, new: int = 2, **settings: object) -> sequences.Sequence:
    tokens = tuple(1000 * id + index for index in range(prompt))
    return sequences.Sequence(id, tokens, new, FakeHeld("base"), **settings)  # type: ignore[arg-type]


class Watched:
    """An order that checks that what is served is its first."""

    def __init__(self, order: Order[None]) -> None:
        self.order = order
        self.first_come = not isinstance(order, Fair)  # otherwise the first of its tenant
        self.served: list[Request[None]] = []
        self.charged: dict[str, float] = {}

    def add(self, request: Request[None]) -> None:
        self.order.add(request)

    def drop(self, request: Request[None]) -> None:
        self.order.drop(request)

    def serve(self, requests: Sequence[Request[None]]) -> None:
        (request,) = requests
        if request.rows:
            assert request is next(own for own in self.order if self.first_come or own.tenant == request.tenant)
            self.served.append(request)
        self.charged[request.tenant] = self.charged.get(request.tenant, 0) + request.cost
        self.order.serve(requests)

    def __iter__(self) -> Iterator[Request[None]]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


@dataclass
class Simulation:
    """Runs a scheduler's steps on caches that hold tokens, and checks each."""

    scheduler: Scheduler
    caches: list[list[int]] = field(default_factory=list)
    done: list[sequences.Sequence] = field(default_factory=list)
    alone: list[sequences.Sequence] = field(default_factory=list)  # those that had a step without the decodes of others
    last_alone: bool = False

    def __post_init__(self) -> None:
        self.caches = [[] for _ in range(self.scheduler.slots)]

    def run(self, step: Step) -> None:
        self.prepare(step)
        for piece in (*step.decodes, *step.pieces):
            self.compute(piece)

    def prepare(self, step: Step) -> None:
        self._check(step)
        for move in step.moves:
            assert len(self.caches[move.source]) == move.length
            self.caches[move.target], self.caches[move.source] = self.caches[move.source], []
        for each in step.admitted:
            assert each.slot is not None
            self.caches[each.slot] = each.span(0, each.cached)

    def _check(self, step: Step) -> None:
        slots = [each.slot for each in self.scheduler.running]
        assert len(slots) == len(set(slots)) <= self.scheduler.slots
        assert [piece.slot for piece in step.decodes] == list(range(len(step.decodes)))
        decoding = [each for each in self.scheduler.running if each.phase == "decoding"]
        alone = bool(decoding) and not step.decodes
        assert alone or {piece.sequence.id for piece in step.decodes} == {each.id for each in decoding}
        assert len(step.decodes) + sum(piece.length for piece in step.pieces) <= self.scheduler.budget
        assert all(1 <= piece.length <= self.scheduler.chunk for piece in step.pieces)
        ended = [piece.slot for piece in step.pieces if piece.last]
        assert ended == list(range(len(decoding), len(decoding) + len(ended)))
        if alone:
            self._check_alone(step, decoding)
        elif self.scheduler.waiting and len(slots) < self.scheduler.slots:
            assert len(step.decodes) + sum(piece.length for piece in step.pieces) == self.scheduler.budget
        self.last_alone = alone

    def _check_alone(self, step: Step, decoding: list[sequences.Sequence]) -> None:
        assert not self.last_alone
        (piece,) = step.pieces
        own = piece.sequence
        assert piece.last
        assert own.tenant not in {each.tenant for each in self.scheduler.running if each is not own}
        assert own.priority <= min(each.priority for each in decoding)
        self.alone.append(own)

    def compute(self, piece: Piece) -> None:
        own, cache = piece.sequence, self.caches[piece.slot]
        assert own.slot == piece.slot
        assert len(cache) == piece.past == own.cached  # each position is written once, in order
        cache += own.span(piece.past, piece.past + piece.length)
        assert cache == own.span(0, len(cache))
        self.scheduler.computed(own, piece.length)
        assert piece.last == (own.cached == len(own))
        if piece.last:
            self.scheduler.append(own, -1000 * own.id - len(own.tokens))
            if own.ending():
                self.scheduler.finish(own, "length")
                self.done.append(own)

    def steps(self, number: int) -> list[Step]:
        found = []
        for _ in range(number):
            found.append(self.scheduler.step())
            self.run(found[-1])
        return found


def weight_of(tenant: str) -> float:
    return 1.0 + int(tenant)


ORDERS: dict[str, Callable[[], Order[None]]] = {
    "first come": FirstCome,
    "priority": ByPriority,
    "fair": lambda: Fair(weight_of),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(7))
def test_random_arrivals_and_cancellations(order: str, seed: int) -> None:
    """About 500 arrivals each: no slot leaks or is used twice, no position is written twice, and all come to an end."""
    draw = random.Random(f"{order} {seed}")
    slots = draw.randint(1, 6)
    watched = Watched(ORDERS[order]())
    reuse = (lambda each: draw.randint(0, len(each) - 1)) if seed % 2 else (lambda _: 0)
    scheduler = Scheduler(
        slots,
        budget=slots + draw.randint(0, 12),
        chunk=draw.randint(1, 8),
        order=watched,
        weight=weight_of if order == "fair" else None,
        max_waiting=30,
        doubling=draw.choice([None, 1, 10]),
        reuse=reuse,
    )
    simulation, alive, refused, ids, now = Simulation(scheduler), list[sequences.Sequence](), 0, 0, 0.0
    work: dict[int, tuple[float, float]] = {}  # first come: when it came, and the time by which it is to have a slot
    while ids < 480 or alive:
        now += 1
        for _ in range(draw.choice([0, 0, 0, 0, 0, 0, 1, 3]) if ids < 480 else 0):
            ids += 1
            own = sequence(
                ids,
                draw.randint(1, 20),
                draw.randint(1, 12),
                tenant=str(draw.randint(0, 3)),
                lane=draw.randint(0, 2),
                priority=draw.choice([0, 0, 0, 1, 2]) if order != "first come" else 0,
                deadline=now + draw.randint(1, 300) if draw.random() < 0.1 else float("inf"),
            )
            ahead = sum(len(each.prompt) + each.max_new_tokens for each in alive)
            try:
                scheduler.add(own)
            except QueueFull:
                refused += 1
                continue
            alive.append(own)
            work[own.id] = (now, now + ahead + 1)
        for each in scheduler.expire(now):
            assert each.deadline <= now
            assert (each.reason, each.slot) == ("deadline", None)
        simulation.run(scheduler.step())
        for own in draw.sample(alive, min(len(alive), draw.choice([0] * 15 + [1]))):
            assert scheduler.cancel(own) != own.over or own.phase == "cancelled"
            assert own.slot is None
        alive = [each for each in alive if not each.over]
        for own in alive:
            if order == "first come" and own.phase == "waiting":
                assert now <= work[own.id][1]
    assert not scheduler.running
    assert not scheduler.waiting
    assert not len(watched)
    assert not scheduler.step()
    assert len(simulation.done) > 100, refused
    if order == "priority":
        assert scheduler.preempted
    assert bool(simulation.alone) == (order == "fair" and slots > 1)
    if order == "first come":
        assert [request.id for request in watched.served] == sorted(request.id for request in watched.served)
        assert not scheduler.preempted


def test_each_step_decodes_all_and_prefills_with_the_rest() -> None:
    simulation = Simulation(Scheduler(3, budget=5, chunk=4))
    for id, prompt in enumerate([4, 9, 2]):
        simulation.scheduler.add(sequence(id, prompt, 9))
    steps = simulation.steps(4)
    assert [[(piece.sequence.id, piece.past, piece.length) for piece in step.pieces] for step in steps] == [
        [(0, 0, 4), (1, 0, 1)],
        [(1, 1, 4)],
        [(1, 5, 4)],
        [(2, 0, 2)],
    ]
    assert [len(step.decodes) for step in steps] == [0, 1, 1, 2]
    assert not any(step.moves for step in steps)


def test_gaps_are_closed_by_the_last_decoding_sequence() -> None:
    simulation = Simulation(Scheduler(4, budget=20, chunk=20))
    all_of_them = [sequence(id, 2, 9) for id in range(4)]
    for each in all_of_them:
        simulation.scheduler.add(each)
    simulation.steps(2)
    simulation.scheduler.cancel(all_of_them[1])
    (step,) = simulation.steps(1)
    assert step.moves == [Move(all_of_them[3], 3, 1, 3)]
    assert [piece.sequence.id for piece in step.decodes] == [0, 3, 2]


def test_a_partial_prefill_moves_aside_for_a_higher_priority() -> None:
    simulation = Simulation(Scheduler(3, budget=4, chunk=4))
    low, high = sequence(1, 12, 3, priority=1), sequence(2, 3, 3)
    simulation.scheduler.add(low)
    simulation.steps(1)
    simulation.scheduler.add(high)
    (step,) = simulation.steps(1)
    assert step.moves == [Move(low, 0, 1, 4)]
    assert [(piece.sequence.id, piece.slot) for piece in step.pieces] == [(2, 0), (1, 1)]


def test_a_sequence_moves_before_its_first_token_too() -> None:
    """Else it would read the memory of an encoder that another sequence left in the slot."""
    scheduler = Scheduler(2, budget=4, chunk=4)
    late = sequence(0, priority=1)
    scheduler.add(late)
    assert scheduler.step().admitted == [late]  # and overtaken before its prompt is computed
    urgent = sequence(1, priority=0)
    scheduler.add(urgent)
    step = scheduler.step()
    assert (late.slot, urgent.slot, late.cached) == (1, 0, 0)
    assert step.moves == [Move(late, 0, 1, 0)]


def test_a_higher_priority_takes_the_slot_of_the_lowest_and_newest() -> None:
    simulation = Simulation(Scheduler(2, budget=10, chunk=10))
    old, new = sequence(1, 3, 5, priority=1), sequence(2, 3, 5, priority=1)
    for each in (old, new):
        simulation.scheduler.add(each)
    simulation.steps(2)
    before = list(new.tokens)
    high, equal = sequence(3, 3, 2), sequence(4, 3, 2, priority=1)
    for each in (equal, high):
        simulation.scheduler.add(each)
    (step,) = simulation.steps(1)
    assert (new.phase, new.slot, new.cached, new.tokens) == ("waiting", None, 0, before)
    assert step.admitted == [high]
    assert simulation.scheduler.preempted == 1
    simulation.steps(12)
    assert [each.id for each in simulation.done] == [3, 1, 2, 4]
    assert new.tokens == [-2000 - index for index in range(5)]


def test_equal_priorities_preempt_nothing() -> None:
    simulation = Simulation(Scheduler(1, budget=4, chunk=4))
    simulation.scheduler.add(sequence(1, 3, 5))
    simulation.steps(1)
    simulation.scheduler.add(sequence(2, 3, 5))
    simulation.steps(20)
    assert [each.id for each in simulation.done] == [1, 2]
    assert not simulation.scheduler.preempted


def test_a_preempted_sequence_can_be_cancelled() -> None:
    simulation = Simulation(Scheduler(1, budget=4, chunk=4))
    low = sequence(1, 3, 5, priority=1)
    simulation.scheduler.add(low)
    simulation.steps(1)
    simulation.scheduler.add(sequence(2, 3, 2))
    simulation.steps(1)
    assert simulation.scheduler.waiting == 1
    assert simulation.scheduler.cancel(low)
    assert not simulation.scheduler.cancel(low)
    assert simulation.scheduler.waiting == 0


def test_a_tenant_with_a_long_queue_does_not_starve_another() -> None:
    watched = Watched(Fair(lambda _: 1.0))
    simulation = Simulation(Scheduler(2, budget=8, chunk=8, order=watched))
    for id in range(60):
        simulation.scheduler.add(sequence(id, 6, 4, tenant="flood"))
    simulation.steps(10)
    late = sequence(100, 6, 4, tenant="late")
    simulation.scheduler.add(late)
    before = len(watched.served)
    while late.phase == "waiting":
        simulation.steps(1)
    assert len(watched.served) - before <= 2


def steps_to_first_token(prompt: int, flood: int, seed: int = 0) -> int:
    """Steps until a tenant's sequence has its first token, beside another tenant's flood of long prompts."""
    scheduler = Scheduler(4, budget=16, chunk=8, order=Fair(lambda _: 1.0), weight=lambda _: 1.0, max_waiting=1000)
    simulation = Simulation(scheduler)
    for id in range(flood):
        scheduler.add(sequence(id, 200, 50, tenant="flood"))
    simulation.steps(25 + seed)
    late = sequence(1000, prompt, 4, tenant="late")
    scheduler.add(late)
    number = 0
    while not late.tokens:
        number += 1
        simulation.steps(1)
    while not late.over:
        simulation.steps(1)
    return number


@pytest.mark.parametrize("prompt", [1, 40, 200, 300])
def test_a_flood_of_long_prompts_less_than_doubles_anothers_steps_to_its_first_token(prompt: int) -> None:
    alone = steps_to_first_token(prompt, 0)
    assert [steps_to_first_token(prompt, 60, seed) < 2 * alone for seed in range(0, 80, 16)] == [True] * 5


@dataclass
class Costed(Simulation):
    """Runs steps as the generator does, and adds up what the runs cost a processor, in first tokens of prompts."""

    now: float = 0.0
    longest: float = 0.0  # cost of a run
    first: dict[int, float] = field(default_factory=dict)  # sequence -> when it had its first token
    coming: list[tuple[float, sequences.Sequence]] = field(default_factory=list)  # when, and what

    def run(self, step: Step) -> None:
        self.prepare(step)
        if step.decodes:
            self._spend(sum(2.5 + piece.past / 256 for piece in step.decodes), step.decodes)
        for pieces in step.prefills():
            if self.scheduler.overtaken(pieces[0].sequence):
                break
            self._spend(sum(piece.length * (1 + piece.past / 1024) for piece in pieces), pieces)

    def _spend(self, cost: float, pieces: list[Piece]) -> None:
        self.now += cost
        self.longest = max(self.longest, cost)
        for piece in pieces:
            self.compute(piece)
            if piece.last:
                self.first.setdefault(piece.sequence.id, self.now)
        while self.coming and self.coming[0][0] <= self.now:
            self.scheduler.add(self.coming.pop()[1])


def test_a_flood_of_long_prompts_less_than_doubles_the_cost_before_a_short_ones_first_token() -> None:
    scheduler = Scheduler(
        8, budget=512, chunk=64, doubling=1024, order=Fair(lambda _: 1.0), weight=lambda _: 1.0, max_waiting=1000
    )
    simulation, draw, ids, costs = Costed(scheduler), random.Random(0), itertools.count(), list[float]()
    while len(costs) < 40:
        begin, late = simulation.now + draw.uniform(0, 3000), sequence(next(ids), 64, 8, tenant="late")
        simulation.coming.append((begin, late))
        while not late.over:
            for _ in range(24 - scheduler.waiting - len(scheduler.running)):
                scheduler.add(sequence(next(ids), 1500, 64, tenant="flood"))
            simulation.steps(1)
        costs.append(simulation.first[late.id] - begin)
    assert statistics.median(costs) < 1.6 * 64
    assert statistics.quantiles(costs, n=10)[-1] < 2 * 64
    assert simulation.longest < 1.4 * 64
    assert len(simulation.alone) > 20


def test_a_piece_costs_about_as_much_as_a_first_one_and_has_one_of_a_few_lengths() -> None:
    simulation = Simulation(Scheduler(1, budget=512, chunk=64, doubling=1024))
    simulation.scheduler.add(sequence(1, 4000))
    steps = simulation.steps(8)
    assert list(dict.fromkeys(piece.length for step in steps for piece in step.pieces[:-1])) == [64, 48, 32, 16]
    assert all(piece.length * (1 + piece.past / 1024) < 1.4 * 64 for step in steps for piece in step.pieces)
    assert [piece.last for step in steps for piece in step.pieces][-1]


@pytest.mark.parametrize(("doubling", "together"), [(1024, [2, 2, 1]), (None, [5])])
def test_short_prompts_in_one_run_cost_as_much_as_a_piece(doubling: int | None, together: list[int]) -> None:
    scheduler = Scheduler(8, budget=512, chunk=64, doubling=doubling)
    for id in range(5):
        scheduler.add(sequence(id, 30))
    assert [len(pieces) for pieces in scheduler.step().prefills()] == together


def test_tenants_that_keep_coming_leave_others_every_second_step() -> None:
    scheduler = Scheduler(4, budget=16, chunk=8, order=Fair(lambda _: 1.0), weight=lambda _: 1.0)
    simulation, one = Simulation(scheduler), sequence(0, 4, 40, tenant="one")
    scheduler.add(one)
    simulation.steps(1)
    for id in range(1, 60):
        scheduler.add(sequence(id, 4, 1, tenant=str(id)))
        simulation.steps(1)
    assert len(one.tokens) == 30
    assert len(simulation.alone) == 30
    assert scheduler.waiting == 0


def test_a_tenant_with_more_to_run_or_of_lower_priority_lets_others_decode() -> None:
    scheduler = Scheduler(4, budget=16, chunk=8, order=Fair(lambda _: 1.0), weight=lambda _: 1.0)
    simulation = Simulation(scheduler)
    for id, (tenant, priority) in enumerate([("one", 0), ("one", 0), ("two", 1)]):
        scheduler.add(sequence(id, 4, 40, tenant=tenant, priority=priority))
        simulation.steps(2)
    assert not simulation.alone


def test_short_prompts_that_keep_coming_cost_a_flood_no_more_than_half() -> None:
    scheduler = Scheduler(4, budget=16, chunk=8, order=Fair(lambda _: 1.0), weight=lambda _: 1.0, max_waiting=1000)
    simulation = Simulation(scheduler)
    for id in range(400):
        scheduler.add(sequence(id, 60, 4, tenant="flood"))
        scheduler.add(sequence(1000 + id, 6, 4, tenant="short"))
    simulation.steps(400)
    done = [len(own.prompt) + len(own.tokens) for own in simulation.done if own.tenant == "flood"]
    assert 0.3 < sum(done) / sum(len(own.prompt) + len(own.tokens) for own in simulation.done) < 0.7
    assert all(len(own.tokens) == 4 for own in simulation.done)


def test_a_slot_given_to_another_tenant_is_not_taken_back_by_turns() -> None:
    scheduler = Scheduler(3, budget=16, chunk=8, order=Fair(lambda _: 1.0), weight=lambda _: 1.0)
    simulation = Simulation(scheduler)
    for id in range(9):
        scheduler.add(sequence(id, 4, 90, tenant="one" if id < 6 else "two"))
        simulation.steps(1)
    held = sorted(own.tenant for own in scheduler.running)
    assert held == ["one", "one", "two"]
    assert scheduler.preempted == 1
    simulation.steps(20)
    assert scheduler.preempted == 1


def test_tenants_are_charged_for_prompts_and_generated_tokens() -> None:
    watched = Watched(FirstCome())
    simulation = Simulation(Scheduler(2, budget=8, chunk=8, order=watched))
    simulation.scheduler.add(sequence(1, 6, 150, tenant="a"))
    simulation.scheduler.add(sequence(2, 5, 150, tenant="b"))
    cut = sequence(3, 7, 4, tenant="b")
    simulation.scheduler.add(cut)
    simulation.scheduler.cancel(cut)
    simulation.steps(100)
    assert watched.charged == {"a": 6 + 64, "b": 5 + 64}
    simulation.steps(60)
    assert watched.charged == {"a": 156, "b": 155}


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler(1, budget=1, chunk=1, max_waiting=1)
    scheduler.add(sequence(1))
    with pytest.raises(QueueFull, match="at most 1 sequences waiting"):
        scheduler.add(sequence(2))
    scheduler.step()
    scheduler.add(sequence(3))


@pytest.mark.parametrize("limits", [(0, 1, 1), (4, 3, 1), (1, 1, 0)])
def test_limits_that_cannot_work_are_refused(limits: tuple[int, int, int]) -> None:
    slots, budget, chunk = limits
    with pytest.raises(RunError, match="at least"):
        Scheduler(slots, budget=budget, chunk=chunk)
