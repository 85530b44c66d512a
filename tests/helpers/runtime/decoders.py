"""A decoder without a model.

Its logits are a function of the adapter version, the inputs beside the tokens and all tokens so far, as it has them.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tpeft_deploy.runtime.generation.handle import GenerationRequest
from tpeft_deploy.runtime.generation.sampling import Sampler, Token
from tpeft_deploy.runtime.generation.sequence import HeldVersion
from tpeft_deploy.runtime.generation.sequence import Sequence as State
from tpeft_deploy.runtime.generation.sources.source import digest
from tpeft_deploy.tucker import Array

VOCABULARY = 40
UNWRITTEN = -1


def logits_of(version: Hashable, tokens: Sequence[int], memory: Hashable = None) -> Array:
    seed = zlib.crc32(repr((version, [int(token) for token in tokens], memory)).encode())
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(VOCABULARY).astype(np.float32) * 3


def alone(request: GenerationRequest, choice: int = 0, version: Hashable = None) -> list[Token]:
    """The tokens of a sequence that runs alone."""
    key = request.task if version is None else version
    sampler, tokens = Sampler(request.sampling, request.prompt, choice), list(request.prompt)
    found: list[Token] = []
    while len(found) < request.max_new_tokens:
        found.append(sampler.choose(logits_of(key, tokens, digest(request.inputs))))
        tokens.append(found[-1].id)
        if tokens[-1] in request.sampling.stop_tokens:
            break
    return found


@dataclass
class SavedTokens:
    tokens: Array
    version: Hashable
    memory: Hashable

    @property
    def nbytes(self) -> int:
        return len(self.tokens) * 10


class FakeDecoder:
    """Keeps tokens in the place of keys and values, and checks that each position is written once, in order.

    Args:
        before: called with the name of a method and its slots before it does anything; may raise, or wait.
    """

    def __init__(
        self, slots: int, length: int = 128, before: Callable[[str, Sequence[int]], None] = lambda _name, _slots: None
    ) -> None:
        self.slots, self.length, self.vocabulary = slots, length, VOCABULARY
        self.cache = np.full((slots, length), UNWRITTEN)
        self.filled = [0] * slots
        self.of: list[Hashable] = [None] * slots  # version that the cache of a slot was computed with
        self.memory: list[Hashable] = [None] * slots
        self.calls: Counter[str] = Counter()
        self.before = before
        self.most_tokens = 0  # of one prefill
        self.dense = True  # whether slots to decode have to be 0..n-1

    def _called(self, name: str, *slots: int) -> None:
        self.calls[name] += 1
        self.before(name, slots)

    def _write(self, slot: int, tokens: Array, past: int, version: Hashable) -> Array:
        if past == 0:
            self._empty(slot)
            self.of[slot] = version
        assert past == self.filled[slot]
        assert self.of[slot] == version
        self.cache[slot, past : past + len(tokens)] = tokens
        self.filled[slot] += len(tokens)
        return logits_of(version, self.cache[slot, : self.filled[slot]].tolist(), self.memory[slot])

    def _empty(self, slot: int) -> None:
        self.cache[slot] = UNWRITTEN
        self.filled[slot] = 0

    def enter(self, slot: int, sequence: State) -> None:
        if sequence.inputs is not None:
            self._called("enter", slot)
        self._empty(slot)
        self.memory[slot] = sequence.digest

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Array,
        past: int,
        versions: Sequence[HeldVersion],
        features: Sequence[object] = (),
    ) -> Array:
        self._called("prefill", *slots)
        assert tokens.dtype == np.int64
        assert tokens.size
        assert len(slots) == 1 or (past == 0 and list(slots) == list(range(slots[0], slots[-1] + 1)))
        self.most_tokens = max(self.most_tokens, tokens.shape[1])
        rows = zip(slots, tokens, versions, strict=True)
        return np.stack([self._write(slot, own, past, held.key) for slot, own, held in rows])

    def decode(self, slots: Sequence[int], tokens: Array, pasts: Array, versions: Sequence[HeldVersion]) -> Array:
        self._called("decode", *slots)
        assert list(slots) == (list(range(len(slots))) if self.dense else sorted(slots))
        rows = zip(slots, tokens, pasts, versions, strict=True)
        return np.stack([self._write(slot, np.array([token]), past, held.key) for slot, token, past, held in rows])

    def move(self, source: int, target: int, length: int) -> None:
        self._called("move", source, target)
        assert length == self.filled[source]
        self._empty(target)
        self.cache[target, :length] = self.cache[source, :length]
        self.filled[target], self.of[target] = length, self.of[source]
        self.memory[target], self.memory[source] = self.memory[source], "moved away"
        self._empty(source)

    def save(self, slot: int, start: int, length: int) -> SavedTokens:
        self._called("save", slot)
        assert start + length <= self.filled[slot]
        return SavedTokens(self.cache[slot, start : start + length].copy(), self.of[slot], self.memory[slot])

    def restore(self, slot: int, start: int, block: SavedTokens) -> None:
        self._called("restore", slot)
        if start == 0:
            self._empty(slot)
            self.of[slot] = block.version
        assert start == self.filled[slot]
        assert (self.of[slot], self.memory[slot]) == (block.version, block.memory)
        self.cache[slot, start : start + len(block.tokens)] = block.tokens
        self.filled[slot] += len(block.tokens)


class FakeHeld:
    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.releases = 0

    def release(self) -> None:
        self.releases += 1


class FakeVersions:
    """Each task is a version; remembers all that were acquired."""

    def __init__(self) -> None:
        self.all: list[FakeHeld] = []

    def acquire(self, task: Hashable) -> FakeHeld:
        self.all.append(FakeHeld(task))
        return self.all[-1]

    def released_once(self) -> bool:
        return all(held.releases == 1 for held in self.all)
