"""Strategies of Hypothesis for weight changes of any shape, rank and pattern of identity factors."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from tpeft_deploy.tucker import TuckerDelta


@st.composite
def deltas(draw: st.DrawFn, min_modes: int = 2, max_modes: int = 5) -> TuckerDelta:
    modes = draw(st.integers(min_modes, max_modes))
    sizes = [draw(st.integers(1, 6)) for _ in range(modes)]
    identity = [draw(st.booleans()) for _ in range(modes)]
    ranks = [size if same else draw(st.integers(1, 4)) for size, same in zip(sizes, identity, strict=True)]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factors = tuple(
        None if same else random.standard_normal((size, rank))
        for size, rank, same in zip(sizes, ranks, identity, strict=True)
    )
    return TuckerDelta(random.standard_normal(ranks), factors, draw(st.floats(-3, 3)))


WEIGHTS = st.floats(-3, 3)


@st.composite
def changes_of_one_weight(draw: st.DrawFn, least: int = 1, most: int = 4) -> list[TuckerDelta]:
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found = []
    for _ in range(draw(st.integers(least, most))):
        identity = [draw(st.booleans()) for _ in shape]
        ranks = [size if same else draw(st.integers(1, 3)) for size, same in zip(shape, identity, strict=True)]
        factors = tuple(
            None if same else random.standard_normal((size, rank))
            for size, rank, same in zip(shape, ranks, identity, strict=True)
        )
        found.append(TuckerDelta(random.standard_normal(ranks), factors, draw(WEIGHTS)))
    return found
