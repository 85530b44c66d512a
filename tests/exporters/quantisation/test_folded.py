"""Adapters that are folded into a base, and the result quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.helpers import nets
from tests.helpers.exporters.dequantised import dequantised_module
from tests.helpers.exporters.quantised import TARGETS, Net
from tpeft_deploy import export_folded
from tpeft_deploy.bundle.quantised import Quantised


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_fold_comes_first(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Net().eval(), torch.randn(2, 3, 64)
    adapter = nets.adapter_for(module, TARGETS, seed=0)
    file = tmp_path / "model.onnx"
    checks = export_folded(module, adapter, file, example_inputs={"x": x}, quantise=form, activations="float")
    assert all(check.error <= check.limit for check in checks)
    merged = Net().eval()
    merged.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name, delta in adapter.deltas.items():
            merged.get_parameter(name).add_(torch.from_numpy(delta.dense()).float())
        rough = dequantised_module(merged, file)
        expected, exact = rough(x).numpy(), merged(x).numpy()
        for name in TARGETS:
            size = merged.get_parameter(name).norm()
            assert (rough.get_parameter(name) - merged.get_parameter(name)).norm() <= 0.15 * size
    (got,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    properties = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    record = msgspec.json.decode(properties["tpeft.quantised"], type=Quantised)
    (deviation,) = record.outputs.values()
    assert deviation.error >= 0.999 * np.linalg.norm(got - exact) / np.linalg.norm(exact)
