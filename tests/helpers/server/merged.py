"""Expected logits of the served conv net with an adapter, from torch."""

from __future__ import annotations

import numpy as np
import torch

from tests.helpers import nets
from tests.server.conftest import PIXELS
from tpeft_deploy import Adapter


def merged(adapter: Adapter) -> np.ndarray:
    """The answer of the torch model with the adapter merged into it."""
    module = nets.conv_net()[0]
    weights = module.state_dict()
    changed = {n: (weights[n].double() + torch.from_numpy(d.dense())).float() for n, d in adapter.deltas.items()}
    with torch.no_grad():
        logits = torch.func.functional_call(module, changed, (torch.from_numpy(PIXELS),))["logits"]
    return np.asarray(logits)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    assert float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) <= 1e-5
