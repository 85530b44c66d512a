"""Which sequences run in which slots, and what each step computes: the policy alone, without threads, clock or arrays.

Continuous batching (Yu et al., "Orca", OSDI 2022) with chunked prefill (Agrawal et al., "Sarathi-Serve", OSDI 2024):
each step decodes one token of every decoding sequence, and spends the rest of its token budget on pieces of prompts.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator

from tpeft_deploy.errors import QueueFull, RunError
from tpeft_deploy.runtime.batching.policy import Order, Request
from tpeft_deploy.runtime.generation.orders import ByPriority, TenantShares
from tpeft_deploy.runtime.generation.sequence import Move, Piece, Reason, Sequence, Step

__all__ = ["Scheduler"]

# Generated tokens after which a tenant is charged for them, beside the end of a sequence.
_CHARGED = 64
_LOOKED = 64  # requests of the order among which the first of each tenant is looked for
_SIZES = 4  # lengths of pieces that are neither the last of a prompt nor of a step


class Scheduler:
    """Slots, token budget, and the order of sequences.

    Decoding sequences are in slots 0..n-1, and the one that is prefilled is in slot n, so that it needs no move when
    it begins to decode.  A sequence that waits and comes first in the order takes the slot of a running one of lower
    priority where no slot is free, or of a tenant that has more than its share of the slots; that one keeps its tokens,
    and computes its cache again later, before those of its priority that wait, except those of tenants with fewer
    slots.
    Prompts of one priority are computed in weighted fair order over tenants, see `TenantShares`.  One that a single
    piece computes, of a tenant that has nothing else running, has a step without decodes; the next step decodes.

    Not thread-safe.  A sequence that ends while a step runs frees its slot for the next step at once.

    Args:
        slots: number of slots.
        budget: tokens of one step, at least `slots`.
        chunk: tokens of one piece.
        doubling: number of tokens behind which one costs twice as much as a first one.  A run of prompts then costs
            about as much as a first piece at most, as another tenant may wait for it.  None bounds the tokens alone.
        max_waiting: sequences that may wait.
        order: order of those that wait; tenants are charged for the tokens of the prompt when a sequence is admitted
            first, and then for those that it generates.
        weight: returns the weight of a tenant, above 0; None treats all as one.
        reuse: called when a sequence is admitted, returns the number of its first tokens, not all, of which the cache
            is known.
    """

    def __init__(
        self,
        slots: int,
        *,
        budget: int,
        chunk: int,
        doubling: int | None = None,
        max_waiting: int = 1024,
        order: Order[None] | None = None,
        weight: Callable[[str], float] | None = None,
        reuse: Callable[[Sequence], int] = lambda _: 0,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("budget", budget, slots), ("chunk", chunk, 1)):
            if value < least:
                raise RunError("set the limits of generation", expected=f"{name} of at least {least}", got=value)
        self.slots = slots
        self.budget = budget
        self.chunk = chunk
        self.doubling = doubling
        self.max_waiting = max_waiting
        self.preempted = 0  # how often a sequence lost its slot
        self._order: Order[None] = ByPriority() if order is None else order
        self._shares = TenantShares(weight)
        self._reuse = reuse
        self._ids = itertools.count()
        self._admissions = itertools.count(1)
        self._waiting: dict[int, tuple[Sequence, Request[None]]] = {}  # by the id of the request
        self._requests: dict[int, Request[None]] = {}  # by the id of the sequence
        self._tenants: Counter[str] = Counter()  # of those that wait
        self._paused: list[Sequence] = []  # preempted, the next to go on first
        self._slots: list[Sequence | None] = [None] * slots
        self._earliest_deadline = math.inf
        self._went_alone = False  # whether the last step left out decodes

    @property
    def waiting(self) -> int:
        """Number of sequences without a slot, preempted ones included."""
        return len(self._waiting) + len(self._paused)

    def queue(self) -> Iterator[Sequence]:
        """Yield the sequences without a slot."""
        yield from self._paused
        yield from (sequence for sequence, _ in self._waiting.values())

    @property
    def running(self) -> list[Sequence]:
        """Sequences in slots, by slot."""
        return [sequence for sequence in self._slots if sequence is not None]

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait.

        Raises:
            QueueFull: too many wait already.
            TpeftError: the order does not take it; nothing has changed.
        """
        if len(self._waiting) >= self.max_waiting:
            raise QueueFull(
                "queue a sequence",
                expected=f"at most {self.max_waiting} sequences waiting",
                got=f"{len(self._waiting)} before it",
                fix="Send it again later.",
            )
        request: Request[None] = Request(
            next(self._ids),
            1,
            None,
            deadline=sequence.deadline,
            tenant=sequence.tenant,
            cost=float(len(sequence.prompt)),
            lane=sequence.lane,
            priority=sequence.priority,
        )
        self._order.add(request)
        self._waiting[request.id] = (sequence, request)
        self._requests[sequence.id] = request
        self._shares.add(sequence)
        self._tenants[self._shares.tenant(sequence)] += 1
        self._earliest_deadline = min(self._earliest_deadline, sequence.deadline)

    def finish(self, sequence: Sequence, reason: Reason) -> bool:
        """End a sequence in any phase, and free its slot; False if it is over already."""
        if sequence.over:
            return False
        if sequence.slot is not None:
            self._slots[sequence.slot] = None
            sequence.slot = None
        elif sequence in self._paused:
            self._paused.remove(sequence)
        else:
            self._order.drop(self._leave(sequence))
        sequence.cached = 0
        sequence.phase = "cancelled" if reason == "cancelled" else "finished"
        sequence.reason = reason
        self._charge(sequence)
        return True

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence that nobody waits for; False if it is over already."""
        return self.finish(sequence, "cancelled")

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences past their deadline, and return them."""
        if now < self._earliest_deadline:
            return []
        present = [*self.queue(), *self.running]
        over = [sequence for sequence in present if sequence.deadline <= now]
        for sequence in over:
            self.finish(sequence, "deadline")
        self._earliest_deadline = min((each.deadline for each in present if not each.over), default=math.inf)
        return over

    def computed(self, sequence: Sequence, length: int) -> None:
        """Record that the cache of a sequence has grown; nothing happens if the sequence is over."""
        if sequence.slot is not None:
            sequence.cached += length
            if sequence.phase == "prefilling":
                self._shares.compute(sequence, len(sequence) - sequence.cached)

    def append(self, sequence: Sequence, token: int) -> None:
        """Record a generated token; nothing happens if the sequence is over."""
        if sequence.slot is not None:
            sequence.tokens.append(token)
            sequence.phase = "decoding"
            if len(sequence.tokens) - sequence.charged >= _CHARGED:
                self._charge(sequence)

    def step(self) -> Step:
        """Plan the next step; empty if there is nothing to do.

        Before the next call, say `computed` for each decode and piece that ran, and `append` for each token.
        """
        step = Step(most=math.inf if self.doubling is None else self.chunk)
        self._preempt()
        self._close_gaps(step)
        decoding = [sequence for sequence in self.running if sequence.phase == "decoding"]
        step.decodes = [Piece(each, slot, each.cached, 1, True) for slot, each in enumerate(decoding)]
        left = self.budget - len(step.decodes)
        ready = len(step.decodes)  # slots 0 to before this one decode in the next step
        planned: dict[int, int] = {}  # sequence -> tokens in its cache after the pieces so far
        while left and ready < self.slots:
            sequence = self._next_prefill(step, ready, planned)
            if sequence is None:
                break
            past = planned.get(sequence.id, sequence.cached)
            length = min(self._longest(past), left, len(sequence) - past)
            last = past + length == len(sequence)
            step.pieces.append(Piece(sequence, self._slots.index(sequence), past, length, last))
            planned[sequence.id] = past + length
            left -= length
            ready += last
            if self._goes_alone(step):
                step.decodes = []
                break
        self._went_alone = bool(decoding) and not step.decodes
        return step

    def overtaken(self, sequence: Sequence) -> bool:
        """Whether one that came meanwhile is to be computed before a sequence, so that the step should end early.

        Pieces that are left out are those behind the first of them.
        """
        first = self._first()
        if first is None or not self._before(first, sequence):
            return False
        return None in self._slots or self._victim(first) is not None

    def _first(self) -> Sequence | None:
        """Sequence that gets the next slot; stays where it waits."""
        running = self.running
        waiting = [*self._paused, *self._firsts()]
        return min(waiting, key=lambda each: (each.priority, self._shares.claim(each, running)), default=None)

    def _firsts(self) -> Iterator[Sequence]:
        """Yield the first of each tenant in the order."""
        seen: set[str] = set()
        for request in itertools.islice(self._order, _LOOKED):
            sequence = self._waiting[request.id][0]
            tenant = self._shares.tenant(sequence)
            if tenant not in seen:
                yield sequence
                seen.add(tenant)
            if len(seen) == len(self._tenants):
                return

    def _preempt(self) -> None:
        """Take a slot for the first that waits, if it needs it now."""
        first = self._first()
        if first is None or any(sequence is None for sequence in self._slots):
            return
        victim = self._victim(first)
        if victim is None or any(each.phase == "prefilling" and not self._before(first, each) for each in self.running):
            return
        self._slots[self._slots.index(victim)] = None
        victim.slot, victim.cached, victim.phase = None, 0, "waiting"
        bisect.insort(self._paused, victim, key=_urgency)
        self.preempted += 1

    def _victim(self, first: Sequence) -> Sequence | None:
        """Sequence that gives its slot to one that waits, where none is free."""
        running = self.running
        last = max(running, key=_urgency)
        if last.priority > first.priority:
            return last
        equals = [each for each in running if each.priority == first.priority]
        return self._shares.victim(self._shares.claim(first, running), equals)

    def _longest(self, past: int) -> int:
        """Tokens of a piece behind others, one of a few sizes."""
        if self.doubling is None:
            return self.chunk
        parts = round(_SIZES * self.doubling / (self.doubling + past))
        return min(self.chunk, max(1, parts) * math.ceil(self.chunk / _SIZES))

    def _goes_alone(self, step: Step) -> bool:
        """Whether a step has no more than its first piece, which gives a tenant the only token that it waits for."""
        if self._went_alone or not step.decodes or len(step.pieces) > 1 or not step.pieces[0].last:
            return False
        first = step.pieces[0].sequence
        urgent = first.priority <= min(piece.sequence.priority for piece in step.decodes)
        return urgent and self._shares.alone(first, self.running)

    def _close_gaps(self, step: Step) -> None:
        """Move the last decoding sequences into free slots before them."""
        decoding = [each for each in self.running if each.phase == "decoding"]
        for target in range(len(decoding)):
            if self._slots[target] is None:
                self._move(step, decoding.pop(), target)

    def _next_prefill(self, step: Step, ready: int, planned: Container[int]) -> Sequence | None:
        """Sequence to prefill, moved to slot `ready`: the first by priority, then in the order of `TenantShares`."""
        occupant = self._slots[ready]
        if occupant is not None and occupant.id in planned:
            return occupant
        best = min((each for each in self._slots[ready:] if each is not None), key=_turn, default=None)
        first = self._first()
        free = next((slot for slot in range(ready, self.slots) if self._slots[slot] is None), None)
        if first is not None and free is not None and (best is None or self._before(first, best)):
            if occupant is not None:
                self._move(step, occupant, free)
            self._admit(step, first, ready)
            return first
        if best is None or best is occupant:
            return best
        if occupant is not None:
            if free is None:
                return occupant  # its slot is not needed for anything else before the best has its turn
            self._move(step, occupant, free)
        self._move(step, best, ready)
        return best

    def _admit(self, step: Step, sequence: Sequence, slot: int) -> None:
        if sequence in self._paused:
            self._paused.remove(sequence)
        else:
            self._order.serve([self._leave(sequence)])
            sequence.admitted = next(self._admissions)
        self._slots[slot] = sequence
        sequence.slot, sequence.phase = slot, "prefilling"
        sequence.cached = self._reuse(sequence)
        self._shares.admit(sequence, len(sequence) - sequence.cached)
        step.admitted.append(sequence)

    def _leave(self, sequence: Sequence) -> Request[None]:
        tenant = self._shares.tenant(sequence)
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        request = self._requests.pop(sequence.id)
        del self._waiting[request.id]
        return request

    def _move(self, step: Step, sequence: Sequence, target: int) -> None:
        """Give a sequence that was admitted in an earlier step another slot."""
        source = self._slots.index(sequence)
        # Without a token too: what its other inputs gave is in the slot before the first.
        step.moves.append(Move(sequence, source, target, sequence.cached))
        self._slots[source], self._slots[target] = None, sequence
        sequence.slot = target

    def _before(self, first: Sequence, other: Sequence) -> bool:
        """Whether the prompt of a sequence that waits is computed before that of one with a slot."""
        finish = self._shares.finish(first, len(first))
        return (first.priority, finish) <= (other.priority, other.finish)

    def _charge(self, sequence: Sequence) -> None:
        """Charge a tenant for tokens generated since it was charged last."""
        cost = len(sequence.tokens) - sequence.charged
        if cost:
            request: Request[None] = Request(
                next(self._ids), 0, None, tenant=sequence.tenant, cost=float(cost), lane=sequence.lane
            )
            self._order.add(request)
            self._order.serve([request])
            sequence.charged += cost


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.admitted


def _turn(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.priority, sequence.finish, -sequence.admitted
