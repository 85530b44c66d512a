"""ONNX files of other exporters as bases: every form against the torch module, whatever the file did to its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters import files
from tpeft_deploy import Adapter, export_bundle, export_folded
from tpeft_deploy.exporters.bases.load import load_base

LIMIT = 1e-5

VIT = "vit.layers.0.attention."
TARGETS: dict[files.Factory, dict[str, tuple[int, ...]]] = {
    nets.conv_net: {
        "stem.weight": (3, 3, 4, 2),
        "depthwise.weight": (4, 1, 5, 5),
        "grouped.weight": (3, 2, 2, 3),
        "up.weight": (5, 3),
        "head.weight": (2, 2),
    },
    nets.text_net: {"embedding.weight": (4, 2), "mix.weight": (2, 3)},
    nets.attention_net: {
        "attention.in_proj_weight": (3, 2),
        "attention.out_proj.weight": (2, 2),
        "head.weight": (2, 2),
    },
    files.equal_net: {"a.weight": (2, 2)},
    files.normed_net: {
        "line.weight": (2, 2, 2),
        "back.weight": (2, 2, 2),
        "flat.weight": (2, 2),
        "head.weight": (2, 2),
    },
    files.vit: {
        "vit.embeddings.patch_embeddings.projection.weight": (3, 2, 4, 4),
        f"{VIT}q_proj.weight": (3, 2),
        f"{VIT}o_proj.weight": (2, 2),
        "vit.layers.1.mlp.fc1.weight": (4, 3),
        "classifier.weight": (1, 2),
    },
}


def two(module: nn.Module, targets: dict[str, tuple[int, ...]]) -> dict[str, Adapter]:
    return {task: nets.adapter_for(module, targets, seed=seed) for seed, task in enumerate(("one", "two"))}


@pytest.mark.parametrize("exporter", files.EXPORTERS)
@pytest.mark.parametrize("factory", TARGETS, ids=lambda factory: factory.__name__)
def test_every_form_is_exact_with_the_original_weights(tmp_path: Path, factory: files.Factory, exporter: str) -> None:
    module, inputs = factory()
    file = files.written(factory, tmp_path, exporter)
    adapters = two(module, TARGETS[factory])
    base = load_base(file, example_inputs=inputs, weights=module.state_dict())
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT
    assert {target.name for target in bundle.manifest.targets} <= set(module.state_dict())
    for name in TARGETS[factory]:
        np.testing.assert_array_equal(bundle.base_value(name), module.get_parameter(name).detach().numpy())


@pytest.mark.parametrize(
    ("factory", "exporter", "targets"),
    [
        (nets.conv_net, "raw", ["stem.weight", "grouped.weight", "up.weight", "head.weight"]),
        (nets.conv_net, "optimised", ["stem.weight", "depthwise.weight", "up.weight", "head.weight"]),
        (nets.conv_net, "torchscript", ["stem.weight", "depthwise.weight", "up.weight", "head.weight"]),
        (nets.text_net, "raw", ["mix.weight"]),
        (nets.text_net, "optimised", ["mix.weight"]),
        (nets.text_net, "torchscript", ["mix.weight"]),
        (nets.attention_net, "raw", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (nets.attention_net, "optimised", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (nets.attention_net, "torchscript", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (files.equal_net, "raw", ["a.weight"]),
    ],
)
def test_the_digests_that_adapters_recorded_are_enough(
    tmp_path: Path, factory: files.Factory, exporter: str, targets: list[str]
) -> None:
    module, inputs = factory()
    file = files.written(factory, tmp_path, exporter)
    adapters = two(module, {name: TARGETS[factory][name] for name in targets})
    bundle = export_bundle(file, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


@pytest.mark.parametrize("exporter", files.EXPORTERS)
def test_either_name_of_a_tied_weight_changes_the_use_of_that_name(tmp_path: Path, exporter: str) -> None:
    module, inputs = nets.text_net()
    file = files.written(nets.text_net, tmp_path, exporter)
    one, other = ({name: (4, 2)} for name in ("embedding.weight", "out.weight"))
    adapters = {"one": nets.adapter_for(module, one, seed=1), "other": nets.adapter_for(module, other, seed=2)}
    base = load_base(file, example_inputs=inputs, weights=module)
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert {target.name for target in bundle.manifest.targets} == {"embedding.weight", "out.weight"}
    assert bundle.manifest.weights["embedding.weight"] == bundle.manifest.weights["out.weight"]
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


@pytest.mark.parametrize("exporter", files.EXPORTERS)
@pytest.mark.parametrize("kept", ["embedding.weight", "out.weight"])
def test_a_checkpoint_with_one_name_of_a_tied_weight(tmp_path: Path, exporter: str, kept: str) -> None:
    """Hugging Face leaves the other out: that the file uses its values under that name says that they are tied."""
    module, inputs = nets.text_net()
    file = files.written(nets.text_net, tmp_path, exporter)
    left_out = {"embedding.weight": "out.weight", "out.weight": "embedding.weight"}[kept]
    state = {name: tensor for name, tensor in module.state_dict().items() if name != left_out}
    save_file(state, tmp_path / "model.safetensors")
    adapter = nets.adapter_for(module, {left_out: (4, 2)}, seed=3)
    base = load_base(file, example_inputs=inputs, weights=tmp_path)
    export_folded(base, adapter, tmp_path / "folded.onnx")
    (got,) = files.session(tmp_path / "folded.onnx").run(None, files.arrays(inputs))
    assert files.error([got], files.merged(module, adapter, inputs)) <= LIMIT


@pytest.mark.parametrize("exporter", files.EXPORTERS)
def test_equal_values_that_were_merged_are_taken_apart(tmp_path: Path, exporter: str) -> None:
    module, inputs = files.equal_net()
    file = files.written(files.equal_net, tmp_path, exporter)
    adapters = {
        "a": nets.adapter_for(module, {"a.weight": (2, 2)}, seed=1, overrides={"a.bias": (8,)}),
        "b": nets.adapter_for(module, {"b.weight": (2, 2)}, seed=2, overrides={"b.bias": (8,)}),
    }
    base = load_base(file, example_inputs=inputs, weights=module.state_dict())
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


@pytest.mark.parametrize("exporter", ["optimised", "torchscript"])
def test_gains_and_heads_on_a_file_with_a_folded_norm(tmp_path: Path, exporter: str) -> None:
    module, inputs = nets.conv_net()
    file = files.written(nets.conv_net, tmp_path, exporter)
    random = np.random.default_rng(0)
    adapters = {
        task: replace(
            nets.adapter_for(module, {"grouped.weight": (3, 2, 2, 3), "up.weight": (2, 2)}, seed=seed),
            gains={
                "grouped.weight": random.uniform(0.5, 2, (8, 1, 1, 1)).astype(np.float32),
                "stem.weight": random.uniform(0.5, 2, (12, 1, 1, 1)).astype(np.float32),
            },
            overrides={
                "head.weight": random.standard_normal((10, 16)).astype(np.float32),
                "grouped.bias": random.standard_normal(8).astype(np.float32),
            },
        )
        for seed, task in enumerate(("one", "two"))
    }
    base = load_base(file, example_inputs=inputs, weights=module)
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


@pytest.mark.parametrize(
    ("exporter", "opset"),
    [("optimised", 18), ("optimised", 23), ("torchscript", 11)],
)
def test_other_opsets(tmp_path: Path, exporter: str, opset: int) -> None:
    module, inputs = nets.conv_net()
    file = files.export(module, inputs, tmp_path / "base.onnx", exporter, opset)
    adapters = two(module, TARGETS[nets.conv_net])
    base = load_base(file, example_inputs=inputs, weights=module.state_dict())
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


@pytest.mark.parametrize("exporter", ["optimised", "torchscript"])
@pytest.mark.parametrize("factory", [nets.conv_net, nets.text_net], ids=lambda factory: factory.__name__)
def test_half_precision_against_float32_weights(tmp_path: Path, factory: files.Factory, exporter: str) -> None:
    module, inputs = factory()
    exact, _ = factory()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    file = files.export(module.half(), halves, tmp_path / "base.onnx", exporter)
    adapters = two(exact, TARGETS[factory])
    base = load_base(file, example_inputs=halves, weights=exact.state_dict())
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, exact, adapters, halves) <= 2e-3


@pytest.mark.parametrize("exporter", ["optimised", "torchscript"])
def test_a_wrapper_around_the_model_is_seen_through(tmp_path: Path, exporter: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.m = inner

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.m(pixels)["logits"]
            return logits

    module, inputs = nets.conv_net()
    file = files.export(Wrapper(module).eval(), inputs, tmp_path / "base.onnx", exporter)
    adapters = two(module, TARGETS[nets.conv_net])
    save_model(module, str(tmp_path / "weights.safetensors"))
    base = load_base(file, example_inputs=inputs, weights=tmp_path / "weights.safetensors")
    bundle = export_bundle(base, adapters, tmp_path / "bundle", folded=True)
    assert files.worst_error(bundle, module, adapters, inputs) <= LIMIT


def test_a_part_of_a_larger_checkpoint(tmp_path: Path) -> None:
    module, inputs = nets.text_net()
    file = files.written(nets.text_net, tmp_path, "optimised")
    larger = {f"model.text.{name}": tensor for name, tensor in module.state_dict().items()}
    own = nets.adapter_for(module, {"mix.weight": (2, 2)}, seed=1)
    adapter = Adapter({"model.text.mix.weight": own.deltas["mix.weight"]})
    base = load_base(file, example_inputs=inputs, weights=larger)
    export_folded(base, adapter, tmp_path / "folded.onnx")
    (got,) = files.session(tmp_path / "folded.onnx").run(None, files.arrays(inputs))
    assert files.error([got], files.merged(module, own, inputs)) <= LIMIT


@pytest.mark.parametrize("factory", [nets.conv_net, nets.text_net], ids=lambda factory: factory.__name__)
def test_a_bundle_without_adapters_takes_them_later(tmp_path: Path, factory: files.Factory) -> None:
    module, inputs = factory()
    file = files.written(factory, tmp_path, "optimised")
    bundle = export_bundle(file, {}, tmp_path / "bundle", weights=module.state_dict())  # inputs made by itself
    targets = {target.name for target in bundle.manifest.targets}
    assert targets <= set(module.state_dict())
    own = {name: ranks for name, ranks in TARGETS[factory].items() if name in targets}
    adapters = two(module, own)
    for task, adapter in adapters.items():
        bundle.add(task, adapter)
    factored = files.session(bundle.path / "factored.onnx")
    for task, adapter in adapters.items():
        got = factored.run(None, files.arrays(inputs) | bundle.factors(task))
        assert files.error(got, files.merged(module, adapter, inputs)) <= LIMIT
