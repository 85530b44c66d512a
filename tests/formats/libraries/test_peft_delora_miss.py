from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import DeloraConfig, MissConfig
from torch import nn

from tests.helpers.formats.pefts import error_of, peft_model, refusal, save, vision

LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    def test_delora(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = DeloraConfig(r=3, target_modules=["fc", "square"], rank_pattern={"square": 2})
        assert error_of(base, x, config, tmp_path)[0] < limit

    @pytest.mark.parametrize("rank", [4, 5], ids=["divides the inputs", "does not"])
    def test_miss(self, tmp_path: Path, dtype: torch.dtype, limit: float, rank: int) -> None:
        base, x = vision(dtype)
        assert error_of(base, x, MissConfig(r=rank, target_modules=["fc", "square"]), tmp_path)[0] < limit

    def test_miss_mini(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = MissConfig(r=5, mini_r=4, init_weights="mini", target_modules=["fc", "square"])
        assert error_of(base, x, config, tmp_path)[0] < limit


def test_miss_needs_a_base_that_fits(tmp_path: Path) -> None:
    base, _ = vision()
    save(peft_model(base, MissConfig(r=4, target_modules=["fc"])), tmp_path)
    assert "Give base=" in refusal(tmp_path)
    base.fc = nn.Linear(12, 20)
    assert "was trained on this base" in refusal(tmp_path, base)
