"""Features of images in the pieces of a prompt, and what a run binds of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tpeft_deploy.runtime.generation.sequence import Sequence
from tpeft_deploy.runtime.generation.sources.features import FeatureInput, Features, stacked

ROWS = np.arange(1.0, 9.0, dtype=np.float32).reshape(4, 2)


class Binding:
    """Counts bindings, and reads what is bound at an address."""

    def __init__(self) -> None:
        self.bound: list[tuple[int, ...]] = []

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        assert (name, device, number, kind) == ("features", "cpu", 0, np.float32)
        assert address
        self.bound.append(tuple(shape))


@pytest.mark.parametrize(("start", "end"), [(0, 1), (3, 5), (7, 9)])
def test_a_piece_without_placeholders_has_no_features(start: int, end: int) -> None:
    assert Features(np.array([1, 2, 5, 6]), ROWS).between(start, end) is None


def test_a_piece_has_the_features_of_its_own_placeholders() -> None:
    found = Features(np.array([1, 2, 5, 6]), ROWS).between(2, 6)
    assert found is not None
    np.testing.assert_array_equal(found, [ROWS[1], [0, 0], [0, 0], ROWS[2]])


def test_prompts_without_placeholders_have_zeros_beside_one_with() -> None:
    one = Features(np.array([1, 2, 5, 6]), ROWS)
    found = stacked([None, one, one], 1, 3)
    assert found is not None
    np.testing.assert_array_equal(found, [np.zeros((2, 2)), ROWS[:2], ROWS[:2]])
    assert stacked([None, one], 3, 5) is None
    assert stacked([], 0, 2) is None


def test_zeros_are_bound_once_for_tokens_without_features() -> None:
    binding: Any = Binding()
    memory = FeatureInput("features", "float32", 1, 2)
    for chunk, features in [(1, None), (1, None), (2, ROWS[:2]), (1, None), (1, ROWS[:1]), (1, None), (1, None)]:
        memory.bind(binding, chunk, features)
        expected = np.zeros((1, chunk, 2)) if features is None else features[None]
        np.testing.assert_array_equal(memory._array, expected)
    assert binding.bound == [(1, 1, 2), (1, 2, 2), (1, 1, 2), (1, 1, 2), (1, 1, 2)]


def test_known_prefixes_compare_images_in_the_place_of_placeholders() -> None:
    version: Any = None
    sequence = Sequence(0, (4, 9, 9, 5), 8, version, marks=(4, b"image", b"image", 5), tokens=[6, 9])
    assert sequence.known(2) == [4, b"image"]
    assert sequence.known(6) == [4, b"image", b"image", 5, 6, 9]
    assert Sequence(0, (4, 5), 8, version, tokens=[6]).known(3) == [4, 5, 6]
