"""PEFT's methods that are no plain pair of factors, all in one bundle and one batch, against PEFT's forward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.formats.pefts import peft_model, run, save
from tpeft_deploy import Runtime, export_bundle, load_adapter

TARGETS: dict[str, Any] = {"target_modules": ["up", "head"]}
CONFIGS: Mapping[str, peft.PeftConfig] = {
    "randlora": peft.RandLoraConfig(r=4, randlora_alpha=4, **TARGETS),
    "c3a": peft.C3AConfig(block_size=8, **TARGETS),
    "fourierft": peft.FourierFTConfig(n_frequency=30, **TARGETS),
    "fourierft-low": peft.FourierFTConfig(n_frequency=2, **TARGETS),
    "waveft": peft.WaveFTConfig(n_frequency=30, **TARGETS),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, **TARGETS),
    "unilora": peft.UniLoraConfig(r=2, theta_d_length=20, save_indices=True, **TARGETS),
    "shira": peft.ShiraConfig(r=1, **TARGETS),
    "supertuning": peft.SupertuningConfig(r=1, sparsity=0.9, **TARGETS),
    "gralora": peft.GraloraConfig(r=2, gralora_k=2, hybrid_r=1, alpha=3, **TARGETS),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm"]),
    "beft": peft.BeftConfig(**TARGETS),
    "tokens": peft.TrainableTokensConfig(token_indices=[3, 0, 19], target_modules=["embed"]),
    "tokens-beside-lora": peft.LoraConfig(r=2, trainable_token_indices={"embed": [7]}, **TARGETS),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 8)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(torch.tanh(self.up(self.embed(ids))))).mean(1)
        return y


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.filterwarnings("ignore")
def test_every_method_in_every_form(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, ids = Net().eval(), torch.arange(40).reshape(2, 20) % 20
    expected, adapters = {}, {}
    for number, (task, config) in enumerate(CONFIGS.items()):
        model = peft_model(base, config, seed=number, scale=2.0 if task == "c3a" else 0.4)
        expected[task] = run(model, ids).numpy()
        adapters[task] = load_adapter(save(model, tmp_path / task), base=base)
        assert error(expected[task], run(base, ids).numpy()) > 1e-3
    bundle = export_bundle(base, adapters, tmp_path / "bundle", example_inputs={"ids": ids}, folded=True)
    feed = {"ids": ids.numpy()}
    factored = onnxruntime.InferenceSession(bundle.path / "factored.onnx", providers=["CPUExecutionProvider"])
    for task, answers in expected.items():
        assert error(factored.run(None, feed | bundle.factors(task))[0], answers) < 2e-5, task
        folded = bundle.path / "folded" / f"{task}.onnx"
        session = onnxruntime.InferenceSession(folded, providers=["CPUExecutionProvider"])
        assert error(session.run(None, feed)[0], answers) < 2e-5, task
    tasks = list(CONFIGS)
    (mixed,) = Runtime(bundle.path, provider="cpu").run({"ids": ids.numpy()[[0] * len(tasks)]}, tasks=tasks).values()
    for row, task in enumerate(tasks):
        assert error(mixed[row], expected[task][0]) < 2e-5, task


@pytest.mark.filterwarnings("ignore")
def test_against_the_weights_of_a_bundle(tmp_path: Path) -> None:
    """The reader gets all that it needs of the base from the bundle: sizes, biases and rows, without torch."""
    torch.manual_seed(0)
    base, ids = Net().eval(), torch.arange(40).reshape(2, 20) % 20
    bundle = export_bundle(base, {}, tmp_path / "bundle", example_inputs={"ids": ids})
    for task in ("randlora", "fourierft", "shira", "beft", "tokens", "gralora"):
        save(peft_model(base, CONFIGS[task]), tmp_path / task)
        ours = load_adapter(tmp_path / task, base=base)
        assert load_adapter(tmp_path / task, base=bundle.base_view).to_bytes() == ours.to_bytes()
