"""What is refused of foreign ONNX files: every way in which a change would silently land on the wrong values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters import files
from tpeft_deploy import Adapter, Bundle, export_bundle, export_folded
from tpeft_deploy.cli import main
from tpeft_deploy.errors import BaseMismatch, NotEquivalent, UnknownTarget, UnsupportedBase, UnsupportedTarget
from tpeft_deploy.exporters.bases.foreign import normalise
from tpeft_deploy.exporters.bases.load import load_base


def conv_file(place: Path, exporter: str = "optimised") -> Path:
    return files.written(nets.conv_net, place, exporter)


def fold(file: Path, adapter: Adapter, inputs: files.Inputs, weights: object = None) -> None:
    export_folded(file, adapter, file.parent / "out.onnx", example_inputs=inputs, weights=weights)


def grouped(*, digests: bool = True) -> Adapter:
    adapter = nets.adapter_for(nets.conv_net()[0], {"grouped.weight": (3, 2, 2, 3)}, seed=1)
    return adapter if digests else Adapter(adapter.deltas)


@pytest.mark.parametrize("exporter", ["optimised", "torchscript"])
def test_a_norm_folded_into_a_weight_needs_the_original_weights(tmp_path: Path, exporter: str) -> None:
    file = conv_file(tmp_path, exporter)
    module, inputs = nets.conv_net()
    with pytest.raises(BaseMismatch, match=r"'grouped.weight'.*A norm may be folded into it.*--weights"):
        fold(file, grouped(), inputs)
    assert not (tmp_path / "out.onnx").exists()
    fold(file, grouped(), inputs, module.state_dict())
    (got,) = files.session(tmp_path / "out.onnx").run(None, files.arrays(inputs))
    assert files.error([got], files.merged(module, grouped(), inputs)) <= 1e-5


def test_without_values_of_any_kind_nothing_is_changed(tmp_path: Path) -> None:
    file = conv_file(tmp_path)
    _, inputs = nets.conv_net()
    with pytest.raises(UnsupportedTarget, match=r"'grouped.weight'.*nor a digest.*--weights"):
        fold(file, grouped(digests=False), inputs)
    with pytest.raises(UnsupportedBase, match="expected the original weights, or adapters that recorded digests"):
        export_bundle(file, {}, tmp_path / "bundle", example_inputs=inputs)
    head = nets.adapter_for(nets.conv_net()[0], {"up.weight": (2, 2)}, seed=1, overrides={"head.bias": (10,)})
    with pytest.raises(UnsupportedTarget, match=r"'head.bias'.*--weights"):
        fold(file, head, inputs)


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    file = conv_file(tmp_path)
    _, inputs = nets.conv_net()
    torch.manual_seed(99)
    with pytest.raises(BaseMismatch, match=r"'grouped.weight': expected its own values, or multiples of their rows"):
        fold(file, grouped(digests=False), inputs, nets.ConvNet().state_dict())


def test_a_parameter_that_was_folded_away_is_refused(tmp_path: Path) -> None:
    file = conv_file(tmp_path)
    module, inputs = nets.conv_net()
    norm = nets.adapter_for(module, {}, seed=1, overrides={"norm.weight": (8,)})
    with pytest.raises(UnsupportedTarget, match=r"'norm.weight'.*computed it into something else.*optimize=False"):
        fold(file, norm, inputs, module.state_dict())


def test_a_target_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    file = conv_file(tmp_path)
    module, inputs = nets.conv_net()
    delta = grouped().deltas["grouped.weight"]
    with pytest.raises(UnknownTarget, match=r"Did you mean 'grouped.weight'"):
        fold(file, Adapter({"group.weight": delta}), inputs, module.state_dict())
    with pytest.raises(BaseMismatch, match=r"'group.weight'.*got none"):
        fold(file, Adapter({"group.weight": delta}, {}, {"group.weight": "0" * 64}), inputs)


@pytest.mark.parametrize("exporter", ["optimised", "torchscript"])
@pytest.mark.parametrize("target", ["a.weight", "b.weight"])
def test_equal_or_tied_cannot_be_told_from_digests(tmp_path: Path, exporter: str, target: str) -> None:
    module, inputs = files.equal_net()
    file = files.written(files.equal_net, tmp_path, exporter)
    with pytest.raises(UnsupportedTarget, match=r"tied weights, or equal ones.*--weights"):
        fold(file, nets.adapter_for(module, {target: (2, 2)}, seed=1), inputs)


@pytest.mark.parametrize("exporter", files.EXPORTERS)
@pytest.mark.parametrize("target", ["embedding.weight", "out.weight"])
def test_a_tie_cannot_be_known_from_digests(tmp_path: Path, exporter: str, target: str) -> None:
    module, inputs = nets.text_net()
    file = files.written(nets.text_net, tmp_path, exporter)
    with pytest.raises(UnsupportedTarget, match=rf"'{target}'.*--weights"):
        fold(file, nets.adapter_for(module, {target: (2, 2)}, seed=1), inputs)


@pytest.mark.parametrize("what", ["values", "names"])
@pytest.mark.parametrize("given", ["weights", "digests"])
def test_two_keys_that_disagree_are_refused(tmp_path: Path, what: str, given: str) -> None:
    """Two weights swapped under each other's names, or their consumers' metadata swapped."""
    module, inputs = files.equal_net()
    with torch.no_grad():
        module.get_parameter("b.weight").normal_()
    file = files.export(module, inputs, tmp_path / "base.onnx", "raw")
    model = onnx.load(file)
    if what == "values":
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        tensors["a.weight"].name, tensors["b.weight"].name = "b.weight", "a.weight"
    else:
        for node in model.graph.node:
            for entry in node.metadata_props:
                if entry.key == "pkg.torch.onnx.name_scopes":
                    swapped = {"'a'": "'b'", "'b'": "'a'"}
                    entry.value = ", ".join(swapped.get(part, part) for part in entry.value.split(", "))
    onnx.save(model, file)
    adapter = nets.adapter_for(module, {"a.weight": (2, 2)}, seed=1)
    # Of a weight that no adapter changes nothing is known but its name: its values are missed where a.weight should be.
    missed = (given, what) == ("digests", "values")
    message = "got other values in 'a.weight'" if missed else "is named '.*metadata says .*values are those of"
    with pytest.raises(BaseMismatch if missed else UnsupportedTarget, match=f"'a.weight'.*{message}") as caught:
        fold(file, adapter, inputs, module.state_dict() if given == "weights" else None)
    assert "\n" not in str(caught.value)


class SharedNet(nn.Module):
    """One linear used on the input and on a table; a simplifier computes the second use once and for all."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.proj(x) @ self.proj(table).T
            return result

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))
        self.block = self.Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.block(x, self.table)
        return result


def test_a_use_that_was_computed_beforehand_is_not_overlooked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = SharedNet().eval(), {"x": torch.randn(2, 3, 8)}
    adapter = nets.adapter_for(module, {"block.proj.weight": (2, 2)}, seed=1)
    for exporter in ("raw", "torchscript"):
        fold(files.export(module, inputs, tmp_path / "base.onnx", exporter), adapter, inputs, module)
        (got,) = files.session(tmp_path / "out.onnx").run(None, files.arrays(inputs))
        assert files.error([got], files.merged(module, adapter, inputs)) <= 1e-5
    file = files.export(module, inputs, tmp_path / "base.onnx", "optimised")
    for weights in (None, module):
        with pytest.raises(UnsupportedTarget, match=r"'block.proj.weight'.*may be computed from it"):
            fold(file, adapter, inputs, weights)


def test_a_row_of_zeros_has_no_factor_to_find(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    with torch.no_grad():
        module.get_parameter("grouped.weight")[2] = 0
    file = files.export(module, inputs, tmp_path / "base.onnx", "optimised")
    with pytest.raises(BaseMismatch, match=r"'grouped.weight'.*multiples of their rows"):
        fold(file, grouped(digests=False), inputs, module.state_dict())


def test_a_fold_and_a_bundle_are_no_bases(tmp_path: Path, conv_bundle: Bundle) -> None:
    module, inputs = nets.conv_net()
    with pytest.raises(UnsupportedBase, match=r"a fold of task 'two'"):
        load_base(conv_bundle.path / "folded" / "two.onnx", example_inputs=inputs, weights=module)
    with pytest.raises(UnsupportedBase, match="the factored graph of a bundle"):
        load_base(conv_bundle.path / "factored.onnx", example_inputs=inputs, weights=module)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBase, match="got nothing there"):
        load_base(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(UnsupportedBase, match="expected an ONNX model"):
        load_base(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedBase, match="expected an ONNX model"):
        load_base(tmp_path / "empty.onnx")


@pytest.mark.parametrize("location", ["../outside.data", "/etc/hostname", "gone.data"])
def test_external_data_stays_beside_the_file(tmp_path: Path, location: str) -> None:
    place = tmp_path / "model"
    place.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(1 << 16))
    model = ir.load(conv_file(tmp_path))
    ir.save(model, place / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    proto = onnx.load(place / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    onnx.save(proto, place / "m.onnx")
    with pytest.raises(UnsupportedBase, match=r"external data|no such file"):
        load_base(place / "m.onnx", example_inputs=nets.conv_net()[1])


def test_external_data_is_read(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    model = ir.load(conv_file(tmp_path))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=128)
    fold(tmp_path / "m.onnx", grouped(), inputs, module)
    (got,) = files.session(tmp_path / "out.onnx").run(None, files.arrays(inputs))
    assert files.error([got], files.merged(module, grouped(), inputs)) <= 1e-5


def test_inputs_that_are_not_the_files_own(tmp_path: Path) -> None:
    file = conv_file(tmp_path)
    with pytest.raises(UnsupportedBase, match="expected example inputs pixels, got image"):
        load_base(file, example_inputs={"image": np.zeros((2, 1, 12, 14), np.float32)})
    with pytest.raises(UnsupportedBase, match=r"'pixels': expected float32 .*, got float64"):
        load_base(file, example_inputs={"pixels": np.zeros((2, 1, 12, 14))})
    with pytest.raises(UnsupportedBase, match="no dynamic_shapes"):
        load_base(file, dynamic_shapes={"pixels": {0: "batch"}})
    with pytest.raises(UnsupportedBase, match="no weights=, as a module has its own"):
        load_base(nets.conv_net()[0], example_inputs=nets.conv_net()[1], weights={})
    wrong = {"pixels": np.zeros((2, 1, 3, 3), np.float32)}
    with pytest.raises(UnsupportedBase, match=r"run base.onnx itself on its example inputs.*--inputs"):
        load_base(file, example_inputs=wrong, weights=nets.conv_net()[0]).graph()


@pytest.mark.parametrize("weights", ["nothing.safetensors", ".", 3, {}])
def test_weights_that_are_none(tmp_path: Path, weights: object) -> None:
    file = conv_file(tmp_path)
    source = tmp_path / weights if isinstance(weights, str) else weights
    with pytest.raises(UnsupportedBase, match="read"):
        load_base(file, weights=source)


def test_a_normalisation_that_changes_something_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = conv_file(tmp_path)
    module, inputs = nets.conv_net()
    honest = normalise._shift
    monkeypatch.setattr(normalise, "_shift", lambda *args: 1.01 * honest(*args))  # type: ignore[operator]
    with pytest.raises(NotEquivalent, match=r"bring base.onnx to the form that branches need"):
        fold(file, grouped(), inputs, module)


def test_a_weight_that_is_quantised_at_one_of_its_uses_is_no_target(tmp_path: Path) -> None:
    module, inputs = nets.text_net()
    model = onnx.load(files.export(module, inputs, tmp_path / "base.onnx", "torchscript"))
    (product,) = (node for node in model.graph.node if node.name == "/out/MatMul")
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    values = onnx.numpy_helper.to_array(stored)
    scale = np.array(np.abs(values).max() / 127, np.float32)
    small = onnx.numpy_helper.from_array(np.round(values / scale).astype(np.int8), "out.weight_quantized")
    model.graph.initializer.extend([small, onnx.numpy_helper.from_array(scale, "out.scale")])
    dequantise = onnx.helper.make_node("DequantizeLinear", [small.name, "out.scale"], ["wide"], name="/out/Dequantize")
    model.graph.node.insert(0, dequantise)
    product.input[1] = "wide"
    onnx.save(model, tmp_path / "base.onnx")
    adapter = nets.adapter_for(module, {"out.weight": (2, 2)}, seed=1)
    with pytest.raises(UnsupportedTarget, match=r"'out.weight'.*DequantizeLinear '/out/Dequantize' holds quantised"):
        fold(tmp_path / "base.onnx", adapter, inputs, module.state_dict())
    mix = nets.adapter_for(module, {"mix.weight": (2, 2)}, seed=1)
    fold(tmp_path / "base.onnx", mix, inputs, module.state_dict())


def test_the_command_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module, inputs = nets.conv_net()
    file = conv_file(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(grouped().to_bytes())
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "inputs.npz", **files.arrays(inputs))  # type: ignore[arg-type]
    given = ["--weights", str(tmp_path / "weights.safetensors"), "--inputs", str(tmp_path / "inputs.npz")]
    out = tmp_path / "folded.onnx"
    folded = ["export", "folded", str(file), str(tmp_path / "adapter.safetensors"), "--out", str(out)]
    refused = CliRunner().invoke(main, folded)
    assert refused.exit_code == 1
    assert "--weights" in refused.stderr
    done = CliRunner().invoke(main, [*folded, *given])
    assert done.exit_code == 0, done.output
    (got,) = files.session(out).run(None, files.arrays(inputs))
    assert files.error([got], files.merged(module, grouped(), inputs)) <= 1e-5
    task = f"a={tmp_path / 'adapter.safetensors'}"
    bundle = ["export", "bundle", str(file), "--adapter", task, "--out", str(tmp_path / "bundle"), *given[:2]]
    done = CliRunner().invoke(main, bundle)
    assert done.exit_code == 0, done.output
    factory = ["export", "folded", "tests.helpers.nets:conv_net", *folded[3:-1], str(tmp_path / "two.onnx"), *given[2:]]
    done = CliRunner().invoke(main, factory)
    assert done.exit_code == 0, done.output
    (tmp_path / "inputs.npz").write_text("no arrays")
    assert "expected an .npz file" in CliRunner().invoke(main, [*folded, *given]).stderr
