import numpy as np
import pytest

from tpeft_deploy import TuckerDelta
from tpeft_deploy.errors import ShapeError

ONES = np.ones((2, 3), np.float32)


def test_sizes_of_a_conv_delta() -> None:
    delta = TuckerDelta(np.ones((2, 3, 5, 5), np.float32), (np.ones((8, 2)), np.ones((6, 3)), None, None), 2.0)
    assert delta.shape == (8, 6, 5, 5)
    assert (delta.ranks, delta.rank) == ((2, 3, 5, 5), 3)
    assert delta.parameters == 150 + 16 + 18
    assert delta.dense().dtype == np.float64


@pytest.mark.parametrize(
    ("core", "factors", "problem"),
    [
        (np.ones(3, np.float32), (None,), "at least 2 modes"),
        (ONES, (None,), "one factor"),
        (ONES, (np.ones((4, 3), np.float32), None), "factor of mode 0"),
        (ONES, (None, np.ones(3, np.float32)), "factor of mode 1"),
    ],
)
def test_inconsistent_shapes_are_refused(
    core: np.ndarray, factors: tuple[np.ndarray | None, ...], problem: str
) -> None:
    with pytest.raises(ShapeError, match=problem):
        TuckerDelta(core, factors)


@pytest.mark.parametrize(
    ("core", "scale", "problem"),
    [
        (np.full((2, 3), np.nan, np.float32), 1.0, "NaN"),
        (ONES, float("inf"), "scale"),
        (np.ones((2, 3), np.int64), 1.0, "floating point"),
    ],
)
def test_values_that_cannot_be_served_are_refused(core: np.ndarray, scale: float, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TuckerDelta(core, (None, None), scale)
