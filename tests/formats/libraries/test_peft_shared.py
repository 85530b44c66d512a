from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PveraConfig, TinyLoraConfig, VeraConfig
from torch import nn

from tests.helpers.formats.pefts import change_config, error_of, peft_model, refusal, save, text, vision

LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    @pytest.mark.parametrize("kind", [VeraConfig, PveraConfig])
    def test_projections_larger_than_the_layers(
        self, tmp_path: Path, dtype: torch.dtype, limit: float, kind: Any
    ) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, kind(r=4, target_modules=["fc", "square", "head"]), tmp_path)
        assert error < limit
        assert set(adapter.deltas) == {"fc.weight", "square.weight", "head.weight"}

    @pytest.mark.parametrize("kind", [VeraConfig, PveraConfig])
    def test_transposed_layers(self, tmp_path: Path, dtype: torch.dtype, limit: float, kind: Any) -> None:
        base, ids = text(dtype)
        assert error_of(base, ids, kind(r=4, target_modules=["same", "wide", "query"]), tmp_path)[0] < limit

    @pytest.mark.parametrize("tying", [0.0, 0.5, 1.0])
    def test_tinylora(self, tmp_path: Path, dtype: torch.dtype, limit: float, tying: float) -> None:
        base, ids = text(dtype)
        config = TinyLoraConfig(r=2, u=8, weight_tying=tying, target_modules=["same", "wide", "embed", "query", "head"])
        error, adapter = error_of(base, ids, config, tmp_path)
        assert error < limit
        assert len(adapter.deltas) == 5

    def test_tinylora_by_a_regular_expression(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = TinyLoraConfig(r=2, u=8, target_modules=".*(fc|head)")
        assert error_of(base, x, config, tmp_path)[0] < limit


class TestRefusals:
    @pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
    @pytest.mark.parametrize("kind", [VeraConfig, PveraConfig, TinyLoraConfig])
    def test_projections_that_were_not_saved(self, tmp_path: Path, kind: Any) -> None:
        base, _ = vision()
        save(peft_model(base, kind(save_projection=False, target_modules=["fc"])), tmp_path)
        assert "save_projection=True" in refusal(tmp_path, base)

    @pytest.mark.parametrize("kind", [VeraConfig, PveraConfig, TinyLoraConfig])
    def test_no_base(self, tmp_path: Path, kind: Any) -> None:
        base, _ = vision()
        save(peft_model(base, kind(target_modules=["fc", "head"])), tmp_path)
        assert "Give base=" in refusal(tmp_path)

    def test_a_layer_larger_than_the_projections(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, VeraConfig(target_modules=["fc"])), tmp_path)
        base.fc = nn.Linear(40, 16)
        assert "projections at least as large" in refusal(tmp_path, base)

    def test_groups_that_cannot_be_told(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, TinyLoraConfig(target_modules=["fc", "head"])), tmp_path)
        assert "is ambiguous" in refusal(change_config(tmp_path, target_modules=["fc", "head", "square"]), base)

    def test_changes_that_are_drawn_at_random(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, PveraConfig(target_modules=["fc"], sample_at_inference=True)), tmp_path)
        assert "samples its change" in refusal(tmp_path, base)
