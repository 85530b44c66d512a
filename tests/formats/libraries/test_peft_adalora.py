from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel

from tests.helpers.formats.pefts import (
    adapted,
    change_config,
    config_of,
    distance,
    error_of,
    peft_model,
    refusal,
    run,
    save,
    text,
    vision,
)
from tpeft_deploy.formats import load_adapter

LIMITS = [pytest.param(torch.float32, 2e-5, id="float32"), pytest.param(torch.float64, 1e-9, id="float64")]


def adalora(*modules: str, **options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=6, target_r=2, lora_alpha=7, total_step=10, target_modules=list(modules), **options)


def pruned(model: Any, module: str, kept: list[bool]) -> Any:
    """What training leaves behind: values that are zero, and a mask in the configuration, by which PEFT saves less."""
    with torch.no_grad():
        model.base_model.model.get_submodule(module).lora_E["default"][[not keep for keep in kept]] = 0
    masks = model.peft_config["default"].rank_pattern or {}
    model.peft_config["default"].rank_pattern = masks | {f"{module}.lora_E.default": kept}
    return model


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
class TestAgainstPeft:
    @pytest.mark.parametrize("layer", ["stem", "fc", "square"])
    def test_a_layer(self, tmp_path: Path, dtype: torch.dtype, limit: float, layer: str) -> None:
        base, x = vision(dtype)
        assert error_of(base, x, adalora(layer), tmp_path)[0] < limit

    def test_transposed_layers(self, tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
        base, ids = text(dtype)
        assert error_of(base, ids, adalora("same", "wide", "query"), tmp_path)[0] < limit

    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
    def test_fault_of_peft_the_scale_has_the_rank_of_before_pruning(
        self, tmp_path: Path, dtype: torch.dtype, limit: float
    ) -> None:
        base, x = vision(dtype)
        model = peft_model(base, adalora("stem", "fc"))
        pruned(model, "stem", [True, False, True, False, False, True])
        pruned(model, "fc", [False, True, False, False, False, False])
        expected = run(model, x)
        adapter = load_adapter(save(model, tmp_path), base=base)
        assert {name: delta.ranks[0] for name, delta in adapter.deltas.items()} == {"stem.weight": 3, "fc.weight": 1}
        assert {delta.scale for delta in adapter.deltas.values()} == {7 / (6 + 1e-5)}
        assert distance(run(adapted(base, adapter), x), expected) < limit
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False).eval()
        assert distance(run(adapted(base, adapter), x), run(again.to(dtype), x)) < limit


def test_a_module_without_any_rank_left(tmp_path: Path) -> None:
    base, x = vision(torch.float64)
    model = pruned(peft_model(base, adalora("stem", "fc")), "fc", [False] * 6)
    expected = run(model, x)
    adapter = load_adapter(save(model, tmp_path), base=base)
    assert set(adapter.deltas) == {"stem.weight"}
    assert "pruned" in adapter.notes["fc.weight"]
    assert distance(run(adapted(base, adapter), x), expected) < 1e-9


@pytest.mark.parametrize("field", ["init_r", "lora_alpha"])
def test_refused_without_what_the_scale_needs(tmp_path: Path, field: str) -> None:
    base, _ = vision()
    save(peft_model(base, adalora("fc")), tmp_path)
    assert config_of(tmp_path)[field]
    assert f"a finite number as {field}" in refusal(change_config(tmp_path, **{field: None}), base)


def test_values_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, _ = vision()
    file = save(peft_model(base, adalora("fc")), tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.fc.lora_E": torch.ones(5, 1)}, file)
    assert "lora_E of shape (6, 1)" in refusal(tmp_path, base)
