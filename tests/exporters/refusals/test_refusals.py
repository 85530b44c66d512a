"""What the exporters refuse, and that nothing is left behind when they do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import Adapter, Runtime, export_bundle, export_folded
from tpeft_deploy.errors import (
    BaseMismatch,
    BundleError,
    NotEquivalent,
    UnknownTarget,
    UnsupportedBase,
    UnsupportedTarget,
)
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.bases.torch_module import TorchBase
from tpeft_deploy.exporters.graph.resolve import resolve
from tpeft_deploy.exporters.graph.weights_and_shapes import optimize


@pytest.fixture
def adapter() -> Adapter:
    return nets.conv_adapters(nets.conv_net()[0])["plain"]


def test_another_base_of_the_same_architecture_is_refused(tmp_path: Path, adapter: Adapter) -> None:
    torch.manual_seed(99)
    other, (_, inputs) = nets.ConvNet(), nets.conv_net()
    for export in (
        lambda: export_folded(other, adapter, tmp_path / "m.onnx", example_inputs=inputs),
        lambda: export_bundle(other, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs),
    ):
        with pytest.raises(BaseMismatch, match=r"weight '\w+.weight': the adapter was trained on another base"):
            export()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_gate_writes_nothing(tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = nets.conv_net()
    honest = TorchBase.reference
    monkeypatch.setattr(
        TorchBase, "reference", lambda *args: {name: array * 1.001 for name, array in honest(*args).items()}
    )
    with pytest.raises(NotEquivalent, match=r"expected relative error <= 1e-05 .*, got 9\.99e-04"):
        export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs)
    with pytest.raises(NotEquivalent):
        export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    assert list(tmp_path.iterdir()) == []


def test_a_fused_conv_under_its_old_name_is_refused() -> None:
    module, inputs = nets.conv_net()
    base = load_base(module, example_inputs=inputs)
    model = base.graph()
    assert "grouped.weight" in resolve(model.graph, base.weights, base.aliases)
    optimize(model, inline=True)
    assert "grouped.weight" in model.graph.initializers
    with pytest.raises(UnsupportedTarget, match=r"'grouped.weight'.*other values under the same name"):
        resolve(model.graph, base.weights, base.aliases)


def test_the_base_is_left_as_it_was(tmp_path: Path, adapter: Adapter) -> None:
    module, inputs = nets.conv_net()
    module.train()
    module.get_submodule("norm").eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    assert module.training
    assert not module.get_submodule("norm").training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x)
        return out


def test_a_weight_that_the_forward_pass_does_not_use_is_refused(tmp_path: Path) -> None:
    module, inputs = Unused(), {"x": torch.randn(2, 4)}
    adapter = nets.adapter_for(module, {"used.weight": (1, 1), "unused.weight": (1, 1)}, seed=0)
    for export in (
        lambda: export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs),
        lambda: export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs),
    ):
        with pytest.raises(UnknownTarget, match=r"'unused.weight'.*not in the exported graph"):
            export()
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


@pytest.mark.parametrize(
    ("base", "inputs", "message"),
    [
        (nn.Linear(2, 2), None, "example_inputs.*got none"),
        (nn.Linear(2, 2), {"input": [1.0]}, "input 'input'.*torch.Tensor with values, got a list"),
        ("not a module", None, "package.module:factory"),
        ("os.path:nothing", None, "callable 'nothing'"),
        ("no_such_module:base", None, "No module named"),
        ("os:getcwd", None, "factory to return"),
    ],
)
def test_bases_that_cannot_be_exported(
    tmp_path: Path, adapter: Adapter, base: object, inputs: object, message: str
) -> None:
    with pytest.raises(UnsupportedBase, match=message) as caught:
        export_folded(base, adapter, tmp_path / "m.onnx", example_inputs=inputs)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBase, match=r"chooses by the values of a tensor at test_refusals\.py") as caught:
        export_bundle(Branching(), {}, tmp_path / "bundle", example_inputs={"x": torch.randn(2, 4)})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_peft_model_is_not_a_base(adapter: Adapter, tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    module.peft_config = {}  # type: ignore[assignment]
    with pytest.raises(UnsupportedBase, match="PEFT has wrapped"):
        export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs)


def test_a_directory_with_content_is_not_written_into(tmp_path: Path, adapter: Adapter) -> None:
    module, inputs = nets.conv_net()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("kept")
    with pytest.raises(BundleError, match="new or empty directory"):
        export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    assert (tmp_path / "bundle" / "mine").read_text() == "kept"


def test_a_factory_in_the_working_directory(tmp_path: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_base.py").write_text("from tests.helpers.nets import conv_net as base\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    checks = export_folded("my_base:base", adapter, "m.onnx")
    assert [check.sizes for check in checks] == [{"batch": 2}, {"batch": 5}]
    assert all(check.error <= check.limit for check in checks)
    sys.modules.pop("my_base")


def test_one_example_row_is_enough(tmp_path: Path, adapter: Adapter) -> None:
    module, inputs = nets.conv_net()
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    checks = export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=one)
    assert [check.sizes for check in checks] == [{"batch": 2}, {"batch": 5}]
    assert np.isfinite([check.error for check in checks]).all()


class Biased(nn.Module):
    """A second input without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) + shift
        return out


def test_inputs_without_a_batch_axis_and_fixed_batches(tmp_path: Path) -> None:
    module, inputs = Biased(), {"x": torch.randn(3, 4), "shift": torch.randn(3)}
    adapter = nets.adapter_for(module, {"linear.weight": (2, 2)}, seed=0)
    shapes = {"x": {0: "batch"}, "shift": None}
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    runtime = Runtime(bundle.path, provider="cpu")
    arrays = {
        "x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32),
        "shift": inputs["shift"].numpy(),
    }
    mixed = runtime.run(arrays, tasks=["a", "base", "a", "a", "base"])["output"]
    np.testing.assert_allclose(mixed[0], runtime.run(arrays, task="a")["output"][0], rtol=1e-5)
    np.testing.assert_allclose(mixed[4], runtime.run(arrays)["output"][4], rtol=1e-5)

    fixed: dict[str, None] = {"x": None, "shift": None}
    checks = export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs, dynamic_shapes=fixed)
    assert [check.sizes for check in checks] == [{}]
    with pytest.raises(UnsupportedBase, match="a dynamic first axis"):
        export_bundle(module, {"a": adapter}, tmp_path / "other", example_inputs=inputs, dynamic_shapes=fixed)


def test_inputs_and_outputs_take_other_names(tmp_path: Path, adapter: Adapter) -> None:
    module, inputs = nets.conv_net()
    names = {"pixels": "image", "logits": "scores"}
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs, rename=names)
    assert [port.name for port in bundle.manifest.inputs] == ["image"]
    runtime = Runtime(bundle.path, provider="cpu")
    plain = export_bundle(module, {"a": adapter}, tmp_path / "plain", example_inputs=inputs)
    pixels = inputs["pixels"].numpy()
    expected = Runtime(plain.path, provider="cpu").run({"pixels": pixels}, tasks=["a", "base"])["logits"]
    np.testing.assert_array_equal(runtime.run({"image": pixels}, tasks=["a", "base"])["scores"], expected)
    for wrong, message in (({"logit": "x"}, "one of pixels, logits, got 'logit'"), ({"logits": "pixels"}, "'pixels'")):
        with pytest.raises(UnsupportedBase, match=message):
            export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs, rename=wrong)
