"""State of one sequence: its tokens, its place in the decoder, and how it ended; what a step computes of several."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = ["HeldVersion", "Move", "Phase", "Piece", "Reason", "Sequence", "Step", "Versions", "release_all"]

_log = logging.getLogger("tpeft_deploy.runtime")

Phase = Literal["waiting", "prefilling", "decoding", "finished", "cancelled"]
Reason = Literal["stop", "length", "deadline", "cancelled", "error"]


class HeldVersion(Protocol):
    """An acquired adapter version, or the base; stays in memory until it is released."""

    @property
    def key(self) -> Hashable:
        """Identifies the version among all that were ever loaded, such as a digest; keeps no memory alive."""

    def release(self) -> None:
        """Give the version back; called once."""


class Versions(Protocol):
    """Adapter versions by task."""

    def acquire(self, task: Hashable) -> HeldVersion:
        """Acquire the version that a task has now, resident until its release; called on the caller's thread.

        Raises:
            TpeftError: no such task, or no room for it.
        """


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what was generated for it.

    Attributes:
        id: unique among the sequences of a scheduler.
        prompt: tokens of the prompt, at least one.
        max_new_tokens: tokens to generate at most.
        version: adapter version, acquired.
        tenant: tenant that an order charges for the tokens.
        lane: key of the task; an order may take turns between the lanes of a tenant.
        priority: smaller values first.
        deadline: time after which the result is of no use.
        stop_tokens: tokens that end it.
        inputs: inputs beside the tokens, as the decoder takes them.
        digest: identifies `inputs`; sequences share known prefixes only where it is equal.
        marks: tokens of the prompt as known prefixes compare them, where tokens alone do not tell them apart.
        features: features that the decoder computed from `inputs`, for the tokens of the prompt.
        tokens: generated tokens.
        phase: finished and cancelled sequences have no slot.
        slot: slot of the decoder while it runs.
        cached: tokens, from the first, of which the slot holds the keys and values.
        reason: why it ended.
        admitted: number of its admission; the smaller, the longer it runs.
        arrival: virtual time at which it began to wait.
        finish: virtual finish time of its prompt among those of all tenants.
        charged: generated tokens that its tenant was charged for.
    """

    id: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    version: HeldVersion
    tenant: str = ""
    lane: Hashable = None
    priority: int = 0
    deadline: float = math.inf
    stop_tokens: frozenset[int] = frozenset()
    inputs: Any = None
    digest: Hashable = None
    marks: tuple[Hashable, ...] = ()
    features: Any = None
    tokens: list[int] = field(default_factory=list)
    phase: Phase = "waiting"
    slot: int | None = None
    cached: int = 0
    reason: Reason | None = None
    admitted: int = 0
    arrival: float = 0.0
    finish: float = 0.0
    charged: int = 0

    def __len__(self) -> int:
        """Tokens of the prompt and generated ones."""
        return len(self.prompt) + len(self.tokens)

    @property
    def running(self) -> bool:
        """Whether it has a slot."""
        return self.slot is not None

    @property
    def over(self) -> bool:
        """Whether it is finished or cancelled."""
        return self.phase in {"finished", "cancelled"}

    def span(self, start: int, end: int) -> list[int]:
        """Tokens from `start` to before `end`, counted from the first of the prompt."""
        bound = len(self.prompt)
        return [*self.prompt[start:end], *self.tokens[max(start - bound, 0) : max(end - bound, 0)]]

    def known(self, end: int) -> list[Hashable]:
        """Tokens before `end` as known prefixes compare them."""
        return [*self.marks[:end], *self.span(len(self.marks), end)]

    def ending(self) -> Reason | None:
        """Why no further token is to be generated; None if one is."""
        if self.tokens and self.tokens[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None


@dataclass(frozen=True, slots=True)
class Move:
    """A copy of the first `length` tokens of a slot's cache into another slot, for the sequence that it belongs to."""

    sequence: Sequence
    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence to compute; `last` if the logits are those of its next token."""

    sequence: Sequence
    slot: int
    past: int
    length: int
    last: bool


@dataclass(slots=True)
class Step:
    """What to do, in this order.

    Attributes:
        moves: copies of caches; the source of one may be the target of a later one.
        admitted: sequences that got slots; the slot of each is to hold its first `cached` tokens.
        decodes: last tokens of the decoding sequences, in the order of their slots 0..n-1.
        pieces: prefills, in order; several may be of one sequence.
        most: tokens of several prompts in one run.
    """

    moves: list[Move] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    decodes: list[Piece] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    most: float = math.inf

    def __bool__(self) -> bool:
        return bool(self.moves or self.decodes or self.pieces)

    def prefills(self) -> Iterator[list[Piece]]:
        """Yield the pieces of sequences that are not over by then, those together that one run computes.

        These are the first pieces, of one length, of sequences in slots next to each other.
        """
        waiting = deque(self.pieces)
        while waiting:
            found = [waiting.popleft()]
            while waiting and _joins(waiting[0], found[-1]) and (len(found) + 1) * found[0].length <= self.most:
                found.append(waiting.popleft())
            if not found[0].sequence.over:
                yield found


def release_all(versions: Iterable[HeldVersion]) -> None:
    """Release versions; one that cannot be released is logged, and keeps no other."""
    for version in versions:
        try:
            version.release()
        except Exception:
            _log.exception("an adapter version could not be released")


def _joins(piece: Piece, before: Piece) -> bool:
    """Whether a run computes a piece together with the one before it."""
    first = not piece.past and not before.past and piece.slot == before.slot + 1
    return first and piece.length == before.length and not piece.sequence.over and not before.sequence.over
