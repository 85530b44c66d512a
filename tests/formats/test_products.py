"""LoHa and LoKr as arrays: the Tucker form equals the dense formula, for any number of kernel axes."""

from __future__ import annotations

import numpy as np
import pytest

from tpeft_deploy.algebra import dense_is_smaller, is_dense
from tpeft_deploy.errors import ShapeError
from tpeft_deploy.formats.products.hadamard import loha, loha_tucker
from tpeft_deploy.formats.products.kronecker import Half, full, lokr, product, tucker
from tpeft_deploy.tucker import Array

SHAPES = [(40, 30), (40, 30, 3), (40, 30, 3, 5), (40, 30, 2, 3, 3), (6, 4, 3, 3), (40, 1, 3, 3)]
SPLITS = [(2, 5), (5, 2), (4, 15)]  # of the outputs and inputs of the first shapes


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def tuckered(core: Array, left: Array, right: Array) -> Array:
    whole: Array = np.einsum("ij...,ip,jq->pq...", core, left, right)
    return whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
class TestHadamard:
    def test_plain(self, shape: tuple[int, ...], rank: int) -> None:
        inputs = int(np.prod(shape[1:]))
        a, b, c, d = random(shape[0], rank), random(rank, inputs), random(shape[0], rank + 1), random(rank + 1, inputs)
        delta = loha(a, b, c, d, scale=0.5, shape=shape)
        np.testing.assert_allclose(delta.dense(), (0.5 * (a @ b) * (c @ d)).reshape(shape), atol=1e-9)
        assert is_dense(delta) or delta.parameters < 2 * np.prod(shape)

    def test_tucker(self, shape: tuple[int, ...], rank: int) -> None:
        t1, t2 = random(rank, rank, *shape[2:]), random(rank, rank, *shape[2:]) + 1
        a, b, c, d = random(rank, shape[0]), random(rank, shape[1]), random(rank, shape[0]) - 1, random(rank, shape[1])
        delta = loha_tucker(t1, a, b, t2, c, d, scale=0.5, shape=shape)
        np.testing.assert_allclose(delta.dense(), 0.5 * tuckered(t1, a, b) * tuckered(t2, c, d), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rank", [1, 3])
def test_kronecker(shape: tuple[int, ...], split: tuple[int, int], rank: int) -> None:
    (a, c), kernel = split, shape[2:]
    b, d = shape[0] // a, shape[1] // c
    left, right, core = random(b, rank), random(rank, d * int(np.prod(kernel))), random(rank, rank, *kernel)
    thin, wide = random(rank, b), random(rank, d)
    firsts: list[tuple[Half, Array]] = [
        (full(random(a, c)), random(a, c)),
        (product(random(a, rank), random(rank, c)), random(a, rank) @ random(rank, c)),
    ]
    seconds: list[tuple[Half, Array]] = [
        (full(random(b, d, *kernel)), random(b, d, *kernel)),
        (product(left, right, kernel), (left @ right).reshape(b, d, *kernel)),
        (tucker(core, thin, wide, kernel), tuckered(core, thin, wide)),
    ]
    for first, w1 in firsts:
        np.testing.assert_allclose(first.dense(), w1, atol=1e-12)
        for second, w2 in seconds:
            np.testing.assert_allclose(second.dense(), w2, atol=1e-12)
            expected = 0.3 * np.kron(w1.reshape(a, c, *[1] * len(kernel)), w2)
            np.testing.assert_allclose(lokr(first, second, scale=0.3, shape=shape).dense(), expected, atol=1e-9)


class TestForm:
    def test_low_rank_where_it_is_smaller(self) -> None:
        a, b = random(64, 2), random(2, 64)
        assert loha(a, b, a, b, scale=1, shape=(64, 64)).ranks == (4, 4)
        assert is_dense(loha(*[random(64, 8), random(8, 64)] * 2, scale=1, shape=(64, 64)))

    def test_a_factor_that_is_no_narrower_than_its_mode_is_absorbed(self) -> None:
        delta = loha_tucker(*[random(2, 2, 3, 3), random(2, 64), random(2, 3)] * 2, scale=1, shape=(64, 3, 3, 3))
        assert delta.ranks == (4, 3, 3, 3)
        assert delta.factors[1] is None

    def test_float16_tensors_do_not_round_to_float16(self) -> None:
        halves = [random(64, 2).astype(np.float16), random(2, 64).astype(np.float16)]
        delta = loha(*halves, *halves, scale=1, shape=(64, 64))
        exact = (halves[0].astype(np.float64) @ halves[1]) ** 2
        np.testing.assert_allclose(delta.dense(), exact, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("ranks", "shape", "smaller"),
        [
            ((4, 4), (64, 64), False),
            ((32, 32), (64, 64), True),
            ((4, 4, 3), (64, 64, 3), False),
            ((9, 9), (4, 400), True),
        ],
    )
    def test_which_form_is_smaller(self, ranks: tuple[int, ...], shape: tuple[int, ...], smaller: bool) -> None:
        assert dense_is_smaller(ranks, shape) is smaller


class TestShapes:
    def test_loha(self) -> None:
        a, b = random(6, 2), random(2, 5)
        for wrong in ((a, b, a, random(3, 5)), (a, b, random(7, 2), b), (a, b, a, random(2, 5, 1))):
            with pytest.raises(ShapeError, match="build a LoHa change"):
                loha(*wrong, scale=1, shape=(6, 5))
        with pytest.raises(ShapeError, match=r"shape \(60, 50\)"):
            loha(random(61, 2), random(2, 50), random(61, 2), random(2, 50), scale=1, shape=(60, 50))

    def test_loha_tucker(self) -> None:
        core, a, b = random(2, 2, 3), random(2, 64), random(2, 50)
        with pytest.raises(ShapeError):
            loha_tucker(core, a, b, random(2, 2, 5), a, b, scale=1, shape=(64, 50, 3))

    def test_lokr(self) -> None:
        with pytest.raises(ShapeError, match="weight's shape"):
            lokr(full(random(2, 2)), full(random(3, 3)), scale=1, shape=(6, 7))
        with pytest.raises(ShapeError, match="2 axes"):
            lokr(full(random(2, 2)), full(random(3, 3, 3)), scale=1, shape=(6, 6))
        with pytest.raises(ShapeError, match="times kernel"):
            product(random(3, 2), random(2, 7), (3,))
        with pytest.raises(ShapeError, match="with the kernel"):
            tucker(random(2, 2, 5), random(2, 3), random(2, 3), (3,))
