from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tpeft_deploy import Adapter, Runtime, TuckerDelta, export_bundle, load_adapter
from tpeft_deploy.errors import AdapterError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(10, 16)
        self.wide = nn.Conv1d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.wide(torch.tanh(self.narrow(x)).mT)
        return out


def test_a_rank_limit_takes_loras_of_that_rank_that_are_kept_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 10)
    config = LoraConfig(r=8, target_modules=["narrow", "wide"], init_lora_weights=False)
    model = get_peft_model(net, config).eval()
    model.save_pretrained(str(tmp_path / "lora"))
    expected = model(x).detach().numpy()
    base = model.unload()
    adapter = load_adapter(tmp_path / "lora", base=base)
    assert all("kept dense" in note for note in adapter.notes.values())
    bundle = export_bundle(base, {"lora": adapter}, tmp_path / "bundle", example_inputs={"x": x}, max_rank=8)
    assert bundle.factors("lora")["narrow.weight.tpeft.up"].shape == (8, 16)
    with Runtime(bundle.path, provider="cpu") as runtime:
        (answer,) = runtime.run({"x": x.numpy()}, tasks=["lora", "lora"]).values()
        bundle.add("later", load_adapter(tmp_path / "lora", base=base))
    assert np.linalg.norm(answer - expected) <= 1e-5 * np.linalg.norm(expected)
    full = Adapter({"narrow.weight": TuckerDelta(np.random.default_rng(0).standard_normal((16, 10)), (None, None))})
    with pytest.raises(AdapterError, match=r"expected rank <= 8 .*got 10"):
        bundle.add("full", full)
