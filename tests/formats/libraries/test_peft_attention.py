from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.helpers.formats.pefts import error_of, peft_model, refusal, save, text
from tpeft_deploy.formats import load_adapter


def attention(**options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, target_modules=["attention"], **options)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("options", [{}, {"alpha_pattern": {"attention": 3}, "use_rslora": True}])
def test_against_peft(tmp_path: Path, dtype: torch.dtype, limit: float, options: dict[str, object]) -> None:
    base, ids = text(dtype)
    error, adapter = error_of(base, ids, attention(**options), tmp_path)
    assert error < limit
    assert set(adapter.deltas) == {"attention.in_proj_weight", "attention.out_proj.weight"}


def test_fault_of_peft_out_proj_is_adapted_twice(tmp_path: Path) -> None:
    # In forward and in merge alike; when PEFT mends it, test_against_peft fails and the 2 has to go.
    base, _ = text()
    save(peft_model(base, attention()), tmp_path)
    adapter = load_adapter(tmp_path, base=base)
    assert adapter.deltas["attention.in_proj_weight"].scale == pytest.approx(6 / 4)
    assert adapter.deltas["attention.out_proj.weight"].scale == pytest.approx(2 * 6 / 4)
    assert "twice" in adapter.notes["attention.out_proj.weight"]


def test_biases_are_refused(tmp_path: Path) -> None:
    base, _ = text()
    save(peft_model(base, attention(lora_bias=True)), tmp_path)
    assert "lora_bias=False" in refusal(tmp_path, base)
