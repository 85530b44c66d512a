from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig
from torch import nn

from tests.helpers.formats.pefts import (
    adapted,
    change_config,
    distance,
    error_of,
    peft_model,
    refusal,
    run,
    save,
    vision,
)
from tpeft_deploy.formats import load_adapter

# PEFT's LoHa multiplies by a float32 scalar, also where everything else is float64: for alpha / r = 1/3, 1e-8 off.
LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-6, id="float64")]
LAYERS = ["stem", "point", "grouped", "depthwise", "line", "fc", "square"]
# PEFT cannot run a Tucker Conv1d of rank 1: TestFaultsOfPeft reads it.
SETTINGS = sorted(set(itertools.product(LAYERS, [False, True], [1, 2, 20])) - {("line", True, 1)})


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("effective", [False, True], ids=["plain", "tucker"])
@pytest.mark.parametrize("rank", [1, 3])
class TestLoha:
    def test_against_peft(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str, effective: bool, rank: int
    ) -> None:
        base, x = vision(dtype)
        config = LoHaConfig(r=rank, alpha=4 / 3, use_effective_conv2d=effective, target_modules=[layer])
        error, adapter = error_of(base, x, config, tmp_path, scale=1.0)
        assert error < limit
        if rank == 1:
            assert adapter.deltas[f"{layer}.weight"].shape == tuple(base.get_parameter(f"{layer}.weight").shape)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
class TestLokr:
    @pytest.mark.parametrize(("layer", "effective", "rank"), SETTINGS)
    @pytest.mark.parametrize("both", [False, True], ids=["first full", "both factored"])
    def test_against_peft(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str, effective: bool, both: bool, rank: int
    ) -> None:
        base, x = vision(dtype)
        config = LoKrConfig(
            r=rank, alpha=3, use_effective_conv2d=effective, decompose_both=both, target_modules=[layer]
        )
        assert error_of(base, x, config, tmp_path, scale=1.0)[0] < limit

    def test_patterns(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = LoKrConfig(
            r=2,
            alpha=3,
            target_modules=["fc", "square", "stem"],
            rank_pattern={"square": 20},
            alpha_pattern={"square": 9, "stem": 1},
        )
        assert error_of(base, x, config, tmp_path, scale=1.0)[0] < limit


class TestFaultsOfPeft:
    def test_two_full_halves_are_scaled_by_alpha_over_the_rank_of_the_configuration(self, tmp_path: Path) -> None:
        # LyCORIS takes 1.
        base, _ = vision()
        save(peft_model(base, LoKrConfig(r=20, alpha=5, target_modules=["fc"])), tmp_path)
        assert load_adapter(tmp_path, base=base).deltas["fc.weight"].scale == 5 / 20

    def test_the_kronecker_product_of_a_conv1d_is_scrambled(self, tmp_path: Path) -> None:
        base, _ = vision(torch.float64)
        model = peft_model(base, LoKrConfig(r=20, alpha=20, target_modules=["line"]))
        adapter = load_adapter(save(model, tmp_path), base=base)
        layer = model.base_model.model.line
        w1, w2 = (half["default"].detach().numpy() for half in (layer.lokr_w1, layer.lokr_w2))
        straight, scrambled = np.kron(w1[:, :, None], w2), np.kron(w1[None], w2).reshape(12, 24, 3)
        np.testing.assert_allclose(adapter.deltas["line.weight"].dense(), scrambled, atol=1e-12)
        assert np.abs(straight - scrambled).max() > 0.1
        assert "leaves out the kernel's axis" in adapter.notes["line.weight"]

    def test_a_conv1d_core_of_rank_1_crashes_in_torch_kron(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, x = vision(torch.float64)
        model = peft_model(base, LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=["line"]), scale=1)
        adapter = load_adapter(save(model, tmp_path), base=base)
        with pytest.raises(RuntimeError, match="view size"):
            run(model, x)
        monkeypatch.setattr(
            torch, "kron", lambda a, b: torch.from_numpy(np.kron(a.numpy(force=True), b.numpy(force=True)))
        )
        assert distance(run(adapted(base, adapter), x), run(model, x)) < 1e-9

    def test_a_conv1d_core_has_one_axis_more_than_its_kernel(self, tmp_path: Path) -> None:
        base, _ = vision(torch.float64)
        config = LoHaConfig(r=2, alpha=2, use_effective_conv2d=True, target_modules=["line"])
        model = peft_model(base, config)
        assert model.base_model.model.line.hada_t1["default"].shape == (2, 2, 3, 1)
        assert load_adapter(save(model, tmp_path), base=base).deltas["line.weight"].ranks == (4, 4, 3)


class TestReading:
    @pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
    def test_matrices_without_a_base(self, tmp_path: Path, kind: Any) -> None:
        base, _ = vision()
        save(peft_model(base, kind(r=1, alpha=3, target_modules=["fc", "square"])), tmp_path)
        with_base, without = load_adapter(tmp_path, base=base), load_adapter(tmp_path)
        for name, delta in with_base.deltas.items():
            np.testing.assert_allclose(delta.dense(), without.deltas[name].dense(), atol=1e-7)

    def test_a_change_that_has_more_numbers_than_the_weight_is_dense(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, LoHaConfig(r=8, alpha=8, target_modules=["fc"])), tmp_path)
        adapter = load_adapter(tmp_path, base=base)
        assert adapter.deltas["fc.weight"].factors == (None, None)
        assert "kept dense" in adapter.notes["fc.weight"]

    @pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
    def test_refusals(self, tmp_path: Path, kind: Any) -> None:
        base, _ = vision()
        save(peft_model(base, kind(r=1, alpha=3, target_modules=["fc"])), tmp_path)
        other, _ = vision()
        other.fc = nn.Linear(10, 14)
        assert "do not fit each other or the weight" in refusal(tmp_path, other)
        change_config(tmp_path, r=2)
        assert "as in adapter_config.json" in refusal(tmp_path, base)
        assert "a finite number as alpha" in refusal(change_config(tmp_path, alpha=None), base)
