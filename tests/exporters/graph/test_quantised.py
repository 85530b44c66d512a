"""Bases whose linear layers were quantised to 8 or 4 bits: branches beside them, and no fold into them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import QuantFormat
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.quantised import TARGETS, Net, quantise
from tpeft_deploy import Adapter, Runtime, export_bundle, export_folded
from tpeft_deploy.errors import BaseMismatch, UnsupportedTarget
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.verify import verify_bundle

# Accuracy level 1 computes in float32; ONNX Runtime's default for 8 bits rounds the activations to 8 bits too.
FORMS = {
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "4 bits, DequantizeLinear": {"bits": 4, "quant_format": QuantFormat.QDQ},
}


def adapters(module: nn.Module) -> dict[str, Adapter]:
    return {task: nets.adapter_for(module, TARGETS, seed=seed) for seed, task in enumerate(("a", "b"))}


@pytest.mark.parametrize("form", FORMS)
def test_branches_stand_beside_quantised_weights(tmp_path: Path, form: str) -> None:
    file = tmp_path / "quantised.onnx"
    module, inputs = quantise(file, **FORMS[form])
    made = adapters(module)
    base = load_base(file, example_inputs=inputs, weights=module)
    held = {quantised.name_of(node): node for node in quantised.products(base.graph().graph)}
    assert set(held) == {"first.weight", "second.weight"}

    bundle = export_bundle(base, made, tmp_path / "bundle")
    assert bundle.manifest.rows == "each"
    assert (bundle.path / "weights.data").stat().st_size < 20_000  # not the 49 kB of the two weights
    # The oracle: the module with what the few bits stand for in place of its own weights, and dW on top.
    rough = {name: torch.from_numpy(quantised.dequantise(node)) for name, node in held.items() if name}
    runtime = Runtime(bundle.path, provider="cpu")
    batch = torch.randn(4, 3, 64)
    tasks = ["b", "base", "a", "b"]
    mixed = runtime.run({"x": batch.numpy()}, tasks=tasks)
    (answers,) = mixed.values()
    for row, task in enumerate(tasks):
        weights = {**dict(module.named_parameters()), **rough}
        for name, delta in made[task].deltas.items() if task in made else ():
            weights[name] = (weights[name].double() + torch.from_numpy(delta.dense())).float()
        with torch.no_grad():
            expected = torch.func.functional_call(module, weights, (batch[row : row + 1],))[0].numpy()
        assert np.linalg.norm(np.asarray(answers[row]) - expected) <= 1e-5 * np.linalg.norm(expected), task
    assert all(check.error <= check.limit for check in verify_bundle(bundle.path).checks)


def test_folding_into_few_bits_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "quantised.onnx"
    module, inputs = quantise(file, bits=4)
    with pytest.raises(
        UnsupportedTarget, match=r"'first.weight': expected a weight in floating point.*Export a bundle"
    ):
        export_folded(file, adapters(module)["a"], tmp_path / "m.onnx", example_inputs=inputs, weights=module)
    assert not (tmp_path / "m.onnx").exists()
    head = nets.adapter_for(module, {"head.weight": (2, 2)}, seed=0)
    export_folded(file, head, tmp_path / "m.onnx", example_inputs=inputs, weights=module)


def test_other_weights_than_those_that_were_quantised_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "quantised.onnx"
    _, inputs = quantise(file, bits=4)
    torch.manual_seed(9)
    other = Net()
    adapter = nets.adapter_for(other, {"first.weight": (2, 2)}, seed=0)
    for weights in (other, None):
        with pytest.raises((UnsupportedTarget, BaseMismatch), match=r"'first\.weight'"):
            export_bundle(file, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs, weights=weights)
    assert not (tmp_path / "bundle").exists()
