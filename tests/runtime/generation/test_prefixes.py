from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpeft_deploy.runtime.generation.prefixes import Match, PrefixCache

BLOCK = 2
SIZE = 10


@dataclass(frozen=True)
class Saved:
    """A block that knows what it stands for."""

    key: str
    owner: str | None
    before: tuple[int, ...]  # all tokens up to its end
    nbytes: int = SIZE


def saver(key: str, owner: str | None, tokens: list[int]) -> Any:
    return lambda start, length: Saved(key, owner, tuple(tokens[: start + length]))


def insert(cache: PrefixCache[Saved], key: str, owner: str | None, tokens: list[int]) -> int:
    return cache.insert(key, owner, tokens, saver(key, owner, tokens))


def known(cache: PrefixCache[Saved], key: str, owner: str | None, tokens: list[int]) -> int:
    match = cache.match(key, owner, tokens)
    cache.release(match)
    return match.tokens


KEYS = st.sampled_from(["a", "b"])
OWNERS = st.sampled_from([None, "x", "y"])
TOKENS = st.lists(st.integers(0, 1), max_size=9)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["match", "insert", "release", "drop"]), KEYS, OWNERS, TOKENS), max_size=60
)


@settings(max_examples=200)
@given(ACTIONS, st.integers(0, 8))
def test_blocks_are_exact_private_bounded_and_kept_while_used(
    actions: list[tuple[str, str, str | None, list[int]]], room: int
) -> None:
    cache: PrefixCache[Saved] = PrefixCache(room * SIZE, BLOCK)
    held: list[Match[Saved]] = []
    for action, key, owner, tokens in actions:
        if action == "insert":
            insert(cache, key, owner, tokens)
        elif action == "drop":
            cache.drop(key)
            assert known(cache, key, owner, tokens) == 0
        elif action == "release" and held:
            cache.release(held.pop(0))
        else:
            match = cache.match(key, owner, tokens)
            held.append(match)
            assert match.tokens == BLOCK * len(match.blocks)
            for index, block in enumerate(match.blocks):
                assert block.key == key
                assert block.owner in {None, owner}
                assert block.before == tuple(tokens[: (index + 1) * BLOCK])
        in_use = {id(block) for match in held for block in match.blocks}
        assert cache.bytes <= cache.max_bytes
        assert cache.bytes >= SIZE * len(in_use)
        assert SIZE * len(cache) <= cache.bytes <= SIZE * (len(cache) + len(in_use))
    for match in held:
        cache.release(match)
    assert cache.bytes == SIZE * len(cache)
    for key in ("a", "b"):
        cache.drop(key)
    assert cache.bytes == len(cache) == 0


@given(st.lists(st.tuples(KEYS, OWNERS, TOKENS), max_size=20), KEYS, OWNERS, TOKENS)
def test_with_room_for_all_what_was_inserted_is_found(
    inserted: list[tuple[str, str | None, list[int]]], key: str, owner: str | None, tokens: list[int]
) -> None:
    cache: PrefixCache[Saved] = PrefixCache(10**9, BLOCK)
    for each in inserted:
        insert(cache, *each)
    insert(cache, key, owner, tokens)
    assert known(cache, key, owner, tokens) == len(tokens) // BLOCK * BLOCK
    assert insert(cache, key, owner, tokens) == 0


def test_the_least_recently_used_leaf_leaves_first() -> None:
    cache: PrefixCache[Saved] = PrefixCache(3 * SIZE, BLOCK)
    insert(cache, "a", None, [1, 1, 2, 2])
    insert(cache, "a", None, [3, 3])
    assert known(cache, "a", None, [1, 1, 2, 2]) == 4
    insert(cache, "a", None, [4, 4])
    assert [known(cache, "a", None, tokens) for tokens in ([1, 1, 2, 2], [3, 3], [4, 4])] == [4, 0, 2]


def test_other_inputs_beside_the_tokens_have_other_blocks() -> None:
    cache: PrefixCache[Saved] = PrefixCache(100 * SIZE, BLOCK)
    cache.insert("a", None, [1, 1], saver("a", None, [1, 1]), inputs=b"image")
    found = {inputs: cache.match("a", None, [1, 1], inputs=inputs) for inputs in (None, b"image", b"other")}
    assert [match.tokens for match in found.values()] == [0, 2, 0]
    for match in found.values():
        cache.release(match)
    cache.drop("a")
    assert cache.bytes == len(cache) == 0


def test_blocks_in_use_stay_and_a_new_one_is_not_kept() -> None:
    cache: PrefixCache[Saved] = PrefixCache(SIZE, BLOCK)
    insert(cache, "a", None, [1, 1])
    match = cache.match("a", None, [1, 1])
    assert insert(cache, "a", None, [2, 2]) == 0
    cache.release(match)
    cache.release(match)
    assert insert(cache, "a", None, [2, 2]) == 1
    assert known(cache, "a", None, [1, 1]) == 0


def test_what_fails_to_be_saved_leaves_the_cache_as_it_is() -> None:
    cache: PrefixCache[Saved] = PrefixCache(100 * SIZE, BLOCK)

    def save(start: int, length: int) -> Saved:
        if start:
            raise ValueError("disk")
        return Saved("a", None, (1, 1))

    with pytest.raises(ValueError, match="disk"):
        cache.insert("a", None, [1, 1, 2, 2], save)
    assert known(cache, "a", None, [1, 1, 2, 2]) == 2
    assert insert(cache, "a", None, [1, 1, 2, 2]) == 1


def test_hits_and_misses_are_counted_in_blocks() -> None:
    cache: PrefixCache[Saved] = PrefixCache(100 * SIZE, BLOCK)
    insert(cache, "a", None, [1, 1])
    known(cache, "a", None, [1, 1, 2, 2, 3])
    assert (cache.hits, cache.misses) == (1, 1)
