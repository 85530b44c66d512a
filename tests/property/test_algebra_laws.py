"""Laws of the exact algebra, for any shape, rank and pattern of identity factors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.property.deltas import WEIGHTS, changes_of_one_weight, deltas
from tpeft_deploy import algebra
from tpeft_deploy.errors import ShapeError
from tpeft_deploy.tucker import TuckerDelta


def close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-8)


@given(changes_of_one_weight())
def test_the_dense_of_a_sum_is_the_sum_of_the_dense(changes: list[TuckerDelta]) -> None:
    total = algebra.combine(changes)
    assert total.shape == changes[0].shape
    close(total.dense(), np.sum([delta.dense() for delta in changes], axis=0))


@given(changes_of_one_weight())
def test_a_mode_is_an_identity_where_it_can_be_and_ranks_add_up_elsewhere(changes: list[TuckerDelta]) -> None:
    total = algebra.combine(changes)
    for mode, factor in enumerate(total.factors):
        if any(delta.factors[mode] is None for delta in changes):
            assert factor is None
            assert total.ranks[mode] == total.shape[mode]
        else:
            assert total.ranks[mode] == sum(delta.ranks[mode] for delta in changes)


@given(changes_of_one_weight(), st.data())
def test_composition_is_linear_in_its_weights(changes: list[TuckerDelta], data: st.DataObject) -> None:
    one, other = (data.draw(st.lists(WEIGHTS, min_size=len(changes), max_size=len(changes))) for _ in range(2))
    t = data.draw(WEIGHTS)
    mixed = algebra.combine(changes, [a + t * b for a, b in zip(one, other, strict=True)])
    close(mixed.dense(), algebra.combine(changes, one).dense() + t * algebra.combine(changes, other).dense())


@given(changes_of_one_weight(least=2), st.data())
def test_the_order_and_grouping_of_a_sum_do_not_matter(changes: list[TuckerDelta], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(changes))
    nested = algebra.combine([algebra.combine(changes[:1]), algebra.combine(changes[1:])])
    close(algebra.combine(shuffled).dense(), algebra.combine(changes).dense())
    close(nested.dense(), algebra.combine(changes).dense())


@given(deltas())
def test_a_change_minus_itself_is_nothing(delta: TuckerDelta) -> None:
    close(algebra.combine([delta, delta], [1.0, -1.0]).dense(), np.zeros(delta.shape))


@given(deltas(), st.data())
def test_padding_ranks_changes_nothing(delta: TuckerDelta, data: st.DataObject) -> None:
    ranks = [rank + data.draw(st.integers(0, 3)) for rank in delta.ranks]
    padded = algebra.pad_ranks(delta, ranks)
    assert padded.ranks == tuple(ranks)
    close(padded.dense(), delta.dense())


@given(deltas())
def test_a_low_rank_pair_is_the_change_at_the_smaller_rank(delta: TuckerDelta) -> None:
    a, b = algebra.low_rank_pair(delta)
    close((b @ a.reshape(a.shape[0], -1)).reshape(delta.shape), delta.dense())
    assert a.shape == (b.shape[1], *delta.shape[1:])
    assert b.shape[0] == delta.shape[0]
    assert b.shape[1] <= delta.ranks[0]


@given(deltas())
def test_the_smaller_form_is_never_larger_than_either(delta: TuckerDelta) -> None:
    small = algebra.smaller(delta)
    assert small.nbytes <= min(delta.nbytes, algebra.dense_nbytes(delta))
    close(small.dense(), delta.dense())
    dense = algebra.densify(delta)
    assert algebra.is_dense(dense)
    close(dense.core, delta.dense())
    assert dense.nbytes == algebra.dense_nbytes(delta) == dense.parameters * 8


@given(st.integers(1, 700), st.integers(1, 5), st.integers(1, 600), st.booleans())
def test_large_changes_are_made_dense_block_by_block(outputs: int, inputs: int, rank: int, identity: bool) -> None:
    random = np.random.default_rng([outputs, inputs, rank])
    core = np.eye(rank) if identity else random.standard_normal((rank, rank))
    delta = TuckerDelta(core, (random.standard_normal((outputs, rank)), random.standard_normal((inputs, rank))), 0.5)
    close(algebra.densify(delta).core, delta.dense())


@given(deltas())
def test_a_change_with_a_part_of_zeros_is_zero(delta: TuckerDelta) -> None:
    assert algebra.is_zero(replace(delta, core=np.zeros_like(delta.core)))
    assert algebra.is_zero(replace(delta, scale=0.0))
    assert not algebra.is_zero(delta) or not delta.dense().any()


def test_what_does_not_fit_is_refused() -> None:
    one = TuckerDelta(np.ones((2, 3)), (None, None))
    with pytest.raises(ShapeError, match="add Tucker deltas"):
        algebra.combine([one, TuckerDelta(np.ones((3, 2)), (None, None))])
    with pytest.raises(ShapeError, match="0 changes"):
        algebra.combine([])
    with pytest.raises(ShapeError, match="1 changes"):
        algebra.combine([one], [1.0, 2.0])
    with pytest.raises(ShapeError, match="at least"):
        algebra.pad_ranks(one, (1, 3))
