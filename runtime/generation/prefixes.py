"""Reuse of the cache of equal prefixes: which blocks are kept, found and evicted; the policy alone."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["Match", "PrefixCache", "Sized"]

BLOCK_TOKENS = 16


class Sized(Protocol):
    """The cache of some tokens of a sequence, as a decoder saves it."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""


Block = TypeVar("Block", bound=Sized)
Parent = tuple[str, Hashable]  # ("version", (key, inputs)) of a first block, ("block", id) of another


class _Node(Generic[Block]):
    """A block, below the one of the tokens before it."""

    __slots__ = ("block", "children", "id", "index", "kept", "key", "parent", "references", "used")

    def __init__(self, id: int, block: Block, index: tuple[Parent, str | None, tuple[Hashable, ...]]) -> None:
        self.id = id
        self.block = block
        self.index = index
        self.parent: _Node[Block] | None = None
        self.key: Hashable = None
        self.children = 0
        self.references = 0
        self.used = 0
        self.kept = True  # whether it can be found


@dataclass(eq=False)
class Match(Generic[Block]):
    """Blocks of the beginning of a sequence, kept until they are released.

    Attributes:
        blocks: blocks in the order of their tokens.
        tokens: number of tokens in them.
    """

    blocks: list[Block]
    tokens: int
    nodes: list[_Node[Block]]


class PrefixCache(Generic[Block]):
    """Blocks of the caches of sequences that ran, for sequences that begin alike.

    A block is found by its tokens and by the block before it, both compared and not only hashed, so that it stands for
    all tokens before it.  It is found for one adapter version and the same inputs beside the tokens, and by its owner
    alone unless it is public.  Where there is no room, the least recently used block is evicted that is not in use and
    has no other after it.  Not thread-safe.

    Args:
        max_bytes: bound of the sum of the blocks' sizes.
        block_tokens: tokens of a block.
    """

    def __init__(self, max_bytes: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self.max_bytes = max_bytes
        self.block_tokens = block_tokens
        self.bytes = 0
        self.hits = self.misses = 0  # blocks asked for
        self._nodes: dict[tuple[Parent, str | None, tuple[Hashable, ...]], _Node[Block]] = {}
        self._evictable: list[tuple[int, int, _Node[Block]]] = []  # a heap; what was used since is out of date
        self._ids = self._time = 0

    def __len__(self) -> int:
        """Number of blocks that can be found."""
        return len(self._nodes)

    def match(
        self, key: Hashable, owner: str | None, tokens: Sequence[Hashable], *, inputs: Hashable = None
    ) -> Match[Block]:
        """Acquire the blocks of the longest known beginning; call `release` once for each match.

        Args:
            key: identifies the adapter version.
            owner: tenant; None finds public blocks alone.
            tokens: tokens of which the cache is wanted.
            inputs: identifies the inputs beside the tokens.
        """
        nodes = self._path((key, inputs), owner, tokens)
        whole = len(tokens) // self.block_tokens
        self.hits += len(nodes)
        self.misses += whole - len(nodes)
        self._time += 1
        for node in nodes:
            node.references += 1
            node.used = self._time
        return Match([node.block for node in nodes], len(nodes) * self.block_tokens, nodes)

    def release(self, match: Match[Block]) -> None:
        """Give the blocks of a match back; a second call does nothing."""
        nodes, match.nodes = match.nodes, []
        for node in nodes:
            node.references -= 1
            if not node.kept and not node.references:
                self.bytes -= node.block.nbytes
            self._offer(node)

    def insert(
        self,
        key: Hashable,
        owner: str | None,
        tokens: Sequence[Hashable],
        save: Callable[[int, int], Block],
        *,
        inputs: Hashable = None,
    ) -> int:
        """Keep the whole blocks of some tokens, as far as there is room.

        Args:
            key: identifies the adapter version.
            owner: tenant; None lets all find them.
            tokens: tokens from the beginning of the sequence.
            save: returns the block that begins at a token (first argument) and has so many (second); called for blocks
                that are not there.
            inputs: identifies the inputs beside the tokens.

        Returns:
            Number of blocks added.
        """
        found = self.match(key, owner, tokens, inputs=inputs)
        self.hits -= len(found.nodes)
        self.misses -= len(tokens) // self.block_tokens - len(found.nodes)
        parent = found.nodes[-1] if found.nodes else None
        added: list[_Node[Block]] = []
        try:
            for start in range(found.tokens, len(tokens) - self.block_tokens + 1, self.block_tokens):
                block = save(start, self.block_tokens)
                if not self._make_room(block.nbytes):
                    break
                own = tuple(tokens[start : start + self.block_tokens])
                parent = self._add((key, inputs), owner, own, parent, block)
                parent.references += 1  # until all are in, so that none evicts another
                added.append(parent)
        finally:
            self.release(found)
            self.release(Match([], 0, added))
        return len(added)

    def drop(self, key: Hashable) -> None:
        """Forget the blocks of an adapter version; those in use keep their bytes until they are released."""
        for node in [node for node in self._nodes.values() if node.key == key]:
            self._remove(node)

    def _path(
        self, root: tuple[Hashable, Hashable], owner: str | None, tokens: Sequence[Hashable]
    ) -> list[_Node[Block]]:
        nodes: list[_Node[Block]] = []
        parent: Parent = ("version", root)
        for start in range(0, len(tokens) - self.block_tokens + 1, self.block_tokens):
            own = tuple(tokens[start : start + self.block_tokens])
            node = self._nodes.get((parent, None, own))
            if node is None and owner is not None:
                node = self._nodes.get((parent, owner, own))
            if node is None:
                break
            nodes.append(node)
            parent = ("block", node.id)
        return nodes

    def _add(
        self,
        root: tuple[Hashable, Hashable],
        owner: str | None,
        tokens: tuple[Hashable, ...],
        parent: _Node[Block] | None,
        block: Block,
    ) -> _Node[Block]:
        self._ids += 1
        place: Parent = ("version", root) if parent is None else ("block", parent.id)
        node = _Node(self._ids, block, (place, owner, tokens))
        node.key, node.used, node.parent = root[0], self._time, parent
        if parent is not None:
            parent.children += 1
        self._nodes[node.index] = node
        self.bytes += block.nbytes
        return node

    def _make_room(self, size: int) -> bool:
        while self.bytes + size > self.max_bytes and self._evictable:
            used, _, node = heapq.heappop(self._evictable)
            if used == node.used and self._free(node):
                self._remove(node)
        return self.bytes + size <= self.max_bytes

    def _free(self, node: _Node[Block]) -> bool:
        return node.kept and not node.references and not node.children

    def _offer(self, node: _Node[Block]) -> None:
        """Make a block a candidate for eviction, if nothing needs it."""
        if not self._free(node):
            return
        heapq.heappush(self._evictable, (node.used, node.id, node))
        if len(self._evictable) > 2 * len(self._nodes) + 64:
            self._evictable = [(node.used, node.id, node) for node in self._nodes.values() if self._free(node)]
            heapq.heapify(self._evictable)

    def _remove(self, node: _Node[Block]) -> None:
        del self._nodes[node.index]
        node.kept = False
        if not node.references:
            self.bytes -= node.block.nbytes
        if node.parent is not None:
            node.parent.children -= 1
            self._offer(node.parent)
