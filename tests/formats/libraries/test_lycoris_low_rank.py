"""LoCon, LoHa and LoKr: what LyCORIS' forward computes, on every kind of layer, from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from tests.helpers.formats.trained import KINDS, error_of, lycoris_file, net, randomise, rows

ALGORITHMS = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-1": {"lora_dim": 1},
    "tucker": {"use_tucker": True},
    "rs_lora": {"rs_lora": True},
    "use_scalar": {"use_scalar": True},
    "dora-out": {"weight_decompose": True, "wd_on_out": True},
    "dora-in": {"weight_decompose": True, "wd_on_out": False},
    "tucker-dora-out": {"use_tucker": True, "weight_decompose": True},
    "tucker-dora-in": {"use_tucker": True, "weight_decompose": True, "wd_on_out": False},
}
LOKR_OPTIONS: dict[str, dict[str, Any]] = {
    "both": {"decompose_both": True, "lora_dim": 1, "factor": 4},
    "both-tucker": {"decompose_both": True, "lora_dim": 1, "use_tucker": True, "factor": 4},
    "factor-auto": {"factor": -1},
    "unbalanced": {"unbalanced_factorization": True, "lora_dim": 1},
    "full": {"full_matrix": True},
    "full-dora": {"full_matrix": True, "weight_decompose": True},
}
CASES = [(algorithm, name, options) for algorithm in ALGORITHMS for name, options in OPTIONS.items()]
CASES += [("lokr", name, options) for name, options in LOKR_OPTIONS.items()]


def measure(
    path: Path, algorithm: str, kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> float:
    """Relative error of whole model outputs against LyCORIS' own forward."""
    model, x = net(kind, dtype), rows(kind, dtype)
    # alpha is not the rank, so that a scale applied twice or not at all shows.  With factor 2 the second half of
    # LoKr stays factored on layers as small as these.
    arguments = {"lora_dim": 3 if algorithm == "locon" else 2, "alpha": 1.5, "factor": 2} | options
    wrappers = {
        "lycoris_block_in_layer": ALGORITHMS[algorithm]("lycoris_block_in_layer", model.block["in_layer"], **arguments),
        "lycoris_head": ALGORITHMS[algorithm]("lycoris_head", model.head, **arguments),
    }
    for seed, wrapper in enumerate(wrappers.values()):
        randomise(wrapper, seed)
        wrapper.to(dtype).eval().apply_to()
    with torch.no_grad():
        expected = model(x)
    file = lycoris_file(path / "adapter.safetensors", wrappers)
    return error_of(file, net(kind, dtype), x, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("algorithm", "name", "options"), CASES, ids=[f"{a}-{n}" for a, n, _ in CASES])
class TestForward:
    def test_float32(self, tmp_path: Path, algorithm: str, name: str, options: dict[str, Any], kind: str) -> None:
        assert measure(tmp_path, algorithm, kind, options) <= 2e-5

    def test_float64(self, tmp_path: Path, algorithm: str, name: str, options: dict[str, Any], kind: str) -> None:
        # alpha sqrt(rank) is rounded to float32 before LyCORIS saves it.
        bound = 1e-6 if name == "rs_lora" else 1e-9
        assert measure(tmp_path, algorithm, kind, options, torch.float64) <= bound
