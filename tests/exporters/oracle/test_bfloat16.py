"""Bases in bfloat16.  ONNX Runtime's CPU has no kernels for it: what runs here is the gate's float32 copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import adapters_of
from tpeft_deploy import Runtime, export_bundle, load_adapter
from tpeft_deploy.bundle.tolerances import LIMITS
from tpeft_deploy.errors import NotEquivalent, ProviderUnavailable

NAMES = [
    ("linear, 3-D", "delta"),
    ("linear, 2-D", "override"),
    ("conv2d, strided", "gain 0"),
    ("conv2d, depthwise", "delta"),
    ("conv with BatchNorm", "override"),
    ("transposed 1-D", "delta"),
    ("tied embedding", "delta"),
    ("attention", "delta"),
]


@pytest.mark.parametrize(("name", "change"), NAMES)
def test_every_form_is_proved_on_a_copy_in_float32(tmp_path: Path, name: str, change: str) -> None:
    case = CASES[name]
    adapters = adapters_of(case, case.build(torch.float32)[0], change)
    module, inputs = case.build(torch.bfloat16)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    assert bundle.manifest.rows == "each", bundle.manifest.rows_reason
    worst = {check["form"]: check["error"] for check in bundle.manifest.gate}
    packed = [form for form in ("banked.cuda",) if f"{form}.onnx" in bundle.manifest.files]
    assert set(worst) == {"base", "folded", "factored", "banked", "mixed rows", *packed}
    # Constants of the graph are rounded too: the scale of attention is, in this one.
    limits = dict.fromkeys(worst, 4e-4 if name == "attention" else 1e-5) | {"folded": LIMITS["bfloat16"]}
    assert all(error <= limits[form] for form, error in worst.items()), worst
    for form in ("base", "factored", "banked", *packed, "folded/a"):
        model = onnx.load(bundle.path / f"{form}.onnx")
        onnx.checker.check_model(model)
        types = {tensor.data_type for tensor in model.graph.initializer}
        types |= {a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute}
        assert onnx.TensorProto.BFLOAT16 in types
        ports = {port.type.tensor_type.elem_type for port in [*model.graph.input, *model.graph.output]}
        assert ports <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    for target in bundle.manifest.targets:
        own = bundle.base_value(target.name)
        assert own.dtype == np.float32
        np.testing.assert_array_equal(own, module.state_dict()[target.name].float().numpy())
    with pytest.raises(ProviderUnavailable, match="bfloat16, on the CPU: expected CUDA"):
        Runtime(bundle.path, provider="cpu")


def test_a_wrong_branch_is_found_in_bfloat16_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpeft_deploy.bundle import slots

    case = CASES["linear, 3-D"]
    module, inputs = case.build(torch.bfloat16)
    adapters = adapters_of(case, case.build(torch.float32)[0], "delta")
    honest = slots.fill
    monkeypatch.setattr(slots, "fill", lambda *args: {k: 1.01 * v for k, v in honest(*args).items()})
    with pytest.raises(NotEquivalent, match="factored"):
        export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs)


def test_an_adapter_of_a_bundle_is_read_against_its_bfloat16_base(tmp_path: Path) -> None:
    case = CASES["linear, 3-D"]
    module, inputs = case.build(torch.bfloat16)
    adapters = adapters_of(case, case.build(torch.float32)[0], "delta")
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs)
    (tmp_path / "a.safetensors").write_bytes(bundle.adapter("a").to_bytes())
    again = load_adapter(tmp_path / "a.safetensors", base=bundle.base_view)
    assert again.to_bytes() == bundle.adapter("a").to_bytes()
