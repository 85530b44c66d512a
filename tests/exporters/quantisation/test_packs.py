"""Weights in few bits, and the options that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.quantised import TARGETS, Net, quantise
from tpeft_deploy import Component, export_bundle
from tpeft_deploy.errors import ExportError, TpeftError, UnsupportedBase
from tpeft_deploy.exporters.bases.bundle import BundleBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.quantisation.packs import _kernel, _matrix
from tpeft_deploy.exporters.verify import verify_bundle

X = {"x": torch.zeros(2, 3, 64)}


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
@pytest.mark.parametrize("turned", [True, False])
def test_a_matrix_is_near_and_blocks_need_not_be_full(bits: int, error: float, turned: bool) -> None:
    array = np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32)
    pack = _matrix(array, bits, "", turned=turned)
    assert pack.value.shape == array.shape
    assert pack.sizes == ((24, 40) if turned else (40, 24))
    assert 0 < np.linalg.norm(pack.value - array) <= error * np.linalg.norm(array)


def test_a_kernel_has_a_scale_for_each_channel_and_keeps_zeros() -> None:
    array = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    array[1] = 0
    array[2] *= 1000
    pack = _kernel(array, "")
    for own, value in zip(array, pack.value, strict=True):
        assert np.abs(own - value).max() <= np.abs(own).max() / 254 * 1.001


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_onnxruntime_computes_with_the_values_of_the_packs(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundle = export_bundle(Net().eval(), {}, tmp_path / "bundle", example_inputs=X, quantise=form)
    nodes = list(quantised.products(BundleBase(bundle).graph().graph))
    assert {quantised.name_of(node) for node in nodes} == set(TARGETS)
    module = Net().eval()
    for node in nodes:
        name = str(quantised.name_of(node))
        shape = dict(module.named_parameters())[name].shape
        assert quantised.dequantise(node).shape == shape == bundle.manifest.weights[name].shape
    assert bundle.manifest.quantised is not None
    assert 0 < bundle.manifest.quantised.bytes < 4 * sum(p.numel() for p in module.parameters()) / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantise": "int3"}, "expected quantise as one of int8, int4, got 'int3'"),
        ({"quantise": "int8", "activations": "int4"}, "expected activations as one of int8, float, got 'int4'"),
        ({"quantise": "int8", "folded": True}, "folds first and then quantises"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_bundle(Net(), {}, tmp_path / "bundle", example_inputs=X, **options)
    assert not (tmp_path / "bundle").exists()


class Convs(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 3, 3))


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (Convs(), {"input": torch.randn(2, 3, 9)}, "got none, .*or use int8 for convolutions"),
        (Net().half(), {"x": X["x"].half()}, "expected weights in float32, got float16.*module.float"),
        (Net().bfloat16(), {"x": X["x"].bfloat16()}, "expected weights in float32, got bfloat16"),
    ],
)
def test_bases_without_such_weights_are_refused(module: nn.Module, inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBase, match=message):
        export_bundle(module, {}, tmp_path / "bundle", example_inputs=inputs, quantise="int4")


def test_a_component_without_such_weights_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    components = {
        "text": Component(Net().eval(), X),
        "image": Component(Convs().eval(), {"input": torch.randn(2, 3, 9)}),
    }
    bundle = export_bundle(components, {}, tmp_path / "bundle", quantise="int4")
    text, image = (bundle.components[name].manifest.quantised for name in ("text", "image"))
    assert image is None
    assert text is not None
    assert set(text.weights) == set(TARGETS)
    assert all(check.error <= check.limit for check in verify_bundle(bundle.path, base=components).checks)
    with pytest.raises(UnsupportedBase, match="quantise the components of bundle 'other' to int4"):
        export_bundle({"image": components["image"]}, {}, tmp_path / "other", quantise="int4")


def test_files_are_quantised_before_they_are_given(tmp_path: Path) -> None:
    module, inputs = quantise(tmp_path / "few.onnx", bits=4)
    base = load_base(tmp_path / "few.onnx", example_inputs=inputs, weights=module)
    head = {"a": nets.adapter_for(module, {"head.weight": (2, 2)}, seed=0)}
    with pytest.raises(TpeftError, match="got a base that is quantised already"):
        export_bundle(base, head, tmp_path / "bundle", quantise="int8")
    torch.onnx.export(module, (inputs["x"],), tmp_path / "plain.onnx", optimize=False, dynamic_shapes=({0: "batch"},))
    plain = load_base(tmp_path / "plain.onnx", example_inputs=inputs, weights=module)
    with pytest.raises(TpeftError, match=r"got an ONNX file\. Quantise the file with onnxruntime"):
        export_bundle(plain, {}, tmp_path / "bundle", quantise="int8")
