from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from torch import nn

from tests.helpers.formats.pefts import change_config, error_of, peft_model, refusal, save, text, vision

LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]


def ia3(*modules: str, inputs: Any = ()) -> IA3Config:
    return IA3Config(target_modules=list(modules), feedforward_modules=inputs if inputs == "" else list(inputs))


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    @pytest.mark.parametrize("layer", ["stem", "point", "grouped", "depthwise", "volume", "fc", "square"])
    @pytest.mark.parametrize("on_inputs", [False, True], ids=["outputs", "inputs"])
    def test_a_layer(self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str, on_inputs: bool) -> None:
        base, x = vision(dtype)
        error, adapter = error_of(base, x, ia3(layer, inputs=[layer] if on_inputs else []), tmp_path)
        assert error < limit
        has_bias = f"{layer}.bias" in dict(base.named_parameters())
        assert set(adapter.overrides) == ({f"{layer}.bias"} if has_bias and not on_inputs else set())
        # Each group of a convolution rescales inputs of its own, which no gain of one axis can say.
        assert bool(adapter.deltas) == (on_inputs and layer == "grouped")

    @pytest.mark.parametrize("on_inputs", [False, True], ids=["outputs", "inputs"])
    def test_transposed_layers(self, tmp_path: Path, dtype: torch.dtype, limit: float, on_inputs: bool) -> None:
        base, ids = text(dtype)
        config = ia3("same", "wide", "query", inputs=["same", "query"] if on_inputs else [])
        error, adapter = error_of(base, ids, config, tmp_path)
        assert error < limit
        assert adapter.gains["wide.weight"].shape == (1, 24)
        assert adapter.gains["same.weight"].shape == ((16, 1) if on_inputs else (1, 16))

    def test_inputs_by_a_regular_expression(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, x = vision(dtype)
        config = IA3Config(target_modules=".*(fc|square|head)", feedforward_modules=".*(fc|head)")
        assert error_of(base, x, config, tmp_path)[0] < limit


class TestRefusals:
    def test_no_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, ia3("fc")), tmp_path)
        assert "Give base=" in refusal(tmp_path)

    def test_another_base(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, ia3("fc", inputs=["fc"])), tmp_path)
        base.fc = nn.Linear(13, 16)
        assert "one number for each channel" in refusal(tmp_path, base)

    def test_nothing_says_whether_inputs_are_meant(self, tmp_path: Path) -> None:
        base, _ = vision()
        save(peft_model(base, ia3("fc", inputs=["fc"])), tmp_path)
        assert "feedforward_modules" in refusal(change_config(tmp_path, feedforward_modules=None), base)
