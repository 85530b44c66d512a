from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tpeft_deploy.bundle.text_files import Pooling
from tpeft_deploy.runtime.text.pooling import cut, pool

STATES = np.array([[[3, 4], [1, 0], [2, 2]], [[0, 0], [0, 0], [0, 0]]], np.float16)


@pytest.mark.parametrize(
    ("mode", "wanted"), [("cls", [[3, 4], [0, 0]]), ("mean", [[2, 2], [0, 0]]), ("last", [[2, 2], [0, 0]])]
)
def test_embeddings_are_pooled_and_have_length_1_if_asked(mode: Any, wanted: Any) -> None:
    plain = pool(STATES, Pooling(mode, normalize=False))
    assert plain.dtype == np.float32
    np.testing.assert_allclose(plain, wanted, atol=1e-6)
    lengths = np.linalg.norm(pool(STATES, Pooling(mode)), axis=-1)
    np.testing.assert_allclose(lengths, [1, 0], atol=1e-6)


def test_an_embedding_that_is_cut_has_length_1_again() -> None:
    embedding = np.array([3, 4, 5], np.float32)
    np.testing.assert_allclose(cut(embedding, 2, Pooling("mean")), [0.6, 0.8])
    np.testing.assert_allclose(cut(embedding, 2, Pooling("mean", normalize=False)), [3, 4])
