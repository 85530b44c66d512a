"""A finished bundle is proved again, and whatever was done to it is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters.bundles import Change, edit, flip, flip_weights, minus, record, write
from tpeft_deploy import Adapter, Bundle, export_bundle, verify_bundle
from tpeft_deploy.bundle.directory import EXAMPLE, MANIFEST
from tpeft_deploy.errors import BaseMismatch, IntegrityError, NotEquivalent, TpeftError, UnknownTask
from tpeft_deploy.exporters.bases.bundle import BundleBase
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.files import digest_file
from tpeft_deploy.formats.write import onnx_adapter

TASKS = ["partial", "plain", "two", "wide"]


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): digest_file(file) for file in sorted(path.rglob("*")) if file.is_file()}


def test_every_form_of_every_task_is_checked_and_nothing_is_changed(own_bundle: Bundle) -> None:
    before = contents(own_bundle.path)
    found = verify_bundle(own_bundle.path)
    assert contents(own_bundle.path) == before
    assert {check.task for check in found.checks if check.form == "mixed rows"} == {
        *("base", *TASKS, "probe 0", "probe 1")
    }
    for form in ("factored", "banked", "folded"):
        checked = [(check.task, check.sizes["batch"]) for check in found.checks if check.form == form]
        tasks = TASKS if form == "folded" else ["base", *TASKS]
        assert checked == [(task, rows) for task in tasks for rows in (2, 5)]
    assert all(check.error <= check.limit == 1e-5 for check in found.checks)
    assert found.to_json() == json.loads(json.dumps(found.to_json()))
    assert found.left_out == (("training library", f"no source was given of {', '.join(TASKS)}"),)


def test_the_bundles_own_reference_is_the_merged_torch_model(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    module, inputs = nets.conv_net()
    torch_base = load_base(module, example_inputs=inputs)
    own = BundleBase(conv_bundle)
    np.testing.assert_array_equal(own.inputs["pixels"], inputs["pixels"].numpy())
    pixels = {"pixels": np.random.default_rng(3).standard_normal((3, 1, 12, 14)).astype(np.float32)}
    for adapter in (None, *conv_adapters.values()):
        expected = torch_base.reference(adapter, pixels, ["logits"])["logits"]
        got = own.reference(adapter, pixels, ["logits"])["logits"]
        assert got.shape == expected.shape
        assert compare.relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_precision_and_the_graphs_for_the_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(2), nn.Linear(36, 5))
    adapter = nets.adapter_for(module, {"0.weight": (2, 2, 2, 2), "1.weight": (2, 1, 3, 3), "3.weight": (2, 2)}, seed=1)
    plain = Adapter(adapter.deltas)
    inputs = {"input": torch.randn(2, 3, 10, 10).to(dtype)}
    bundle = export_bundle(module.eval().to(dtype), {"a": plain}, tmp_path / "b", example_inputs=inputs, folded=True)
    graphs = {name.removesuffix(".onnx") for name in bundle.manifest.files if name.endswith(".onnx")}
    assert ({"factored.cpu", "banked.cpu"} <= graphs) or dtype != torch.float32
    for base in (None, load_base(module, example_inputs=inputs)):
        found = verify_bundle(bundle.path, base=base, report=tmp_path / "page.html")
        forms = {check.form for check in found.checks}
        assert forms == graphs | {"mixed rows", "folded"}
        assert len(found.targets) == 3


def test_one_task_alone(conv_bundle: Bundle) -> None:
    found = verify_bundle(conv_bundle.path, task="two")
    assert {check.task for check in found.checks} == {"base", "two", "probe 0", "probe 1"}
    with pytest.raises(UnknownTask, match="nope"):
        verify_bundle(conv_bundle.path, task="nope")


def test_against_the_base_it_was_exported_from(conv_bundle: Bundle) -> None:
    found = verify_bundle(conv_bundle.path, base="tests.helpers.nets:conv_net")
    assert found.reference.startswith("conv_net")
    assert len(found.checks) == len(verify_bundle(conv_bundle.path).checks)
    with pytest.raises(BaseMismatch, match="no weight of that name"):
        verify_bundle(conv_bundle.path, base="tests.helpers.nets:text_net")
    other, inputs = nets.conv_net()
    other.get_parameter("up.bias").data += 1
    with pytest.raises(BaseMismatch, match=r"up\.bias"):
        verify_bundle(conv_bundle.path, base=load_base(other, example_inputs=inputs))


def test_rows_of_a_bundle_that_groups_them_are_left_out(own_bundle: Bundle) -> None:
    write(own_bundle, replace(own_bundle.manifest, rows="group", rows_reason="for a test"))
    found = verify_bundle(own_bundle.path)
    assert "mixed rows" not in {check.form for check in found.checks}
    assert found.left_out[-1] == ("mixed rows", "one adapter per run: for a test")


def test_progress_knows_how_far_it_is(conv_bundle: Bundle) -> None:
    heard: list[str] = []
    verify_bundle(conv_bundle.path, progress=heard.append)
    told = [(str(stage), getattr(stage, "done", None), getattr(stage, "total", None)) for stage in heard]
    assert ("check two, one adapter per run", 3, 5) in told
    assert ("check folded wide", 3, 4) in told


def flip_recorded_weights(bundle: Bundle) -> None:
    flip_weights(bundle)
    record(bundle, "weights.data")


def place_of(bundle: Bundle, task: str = "two") -> Path:
    return bundle.path / "adapters" / task / bundle.tasks[task]


def flip_adapter(bundle: Bundle) -> None:
    flip(place_of(bundle) / "adapter.safetensors", -3)


def other_native(bundle: Bundle) -> None:
    tensors = bundle.factors("two")
    tensors["up.weight.tpeft.up"] = tensors["up.weight.tpeft.up"] * np.float32(1.001)
    rewrite_native(bundle, tensors)


def missing_native(bundle: Bundle) -> None:
    tensors = bundle.factors("two")
    del tensors["stem.weight.tpeft.core"]
    rewrite_native(bundle, tensors)


def rewrite_native(bundle: Bundle, tensors: dict[str, np.ndarray]) -> None:
    place = place_of(bundle)
    onnx_adapter.write(place / onnx_adapter.FILE, tensors)
    text = json.loads((place / "adapter.json").read_text())
    text["files"][onnx_adapter.FILE] = digest_file(place / onnx_adapter.FILE)
    (place / "adapter.json").write_text(json.dumps(text))


def broken_native(bundle: Bundle) -> None:
    place = place_of(bundle)
    (place / onnx_adapter.FILE).write_bytes(b"no flatbuffer")
    text = json.loads((place / "adapter.json").read_text())
    text["files"][onnx_adapter.FILE] = digest_file(place / onnx_adapter.FILE)
    (place / "adapter.json").write_text(json.dumps(text))


def manifest_digest(bundle: Bundle) -> None:
    file = bundle.path / MANIFEST
    file.write_text(file.read_text().replace(bundle.manifest.files["base.onnx"].sha256, "0" * 64))


def epsilon(model: onnx.ModelProto) -> None:
    (norm,) = (node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in norm.attribute if a.name == "epsilon").f = 0.5


def cut_rows(model: onnx.ModelProto) -> None:
    """An answer of one row, whatever the batch."""
    output = model.graph.output[0].name
    node = next(node for node in model.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "whole"
    first = onnx.numpy_helper.from_array(np.array([0]), "first.row")
    model.graph.initializer.append(first)
    model.graph.node.append(onnx.helper.make_node("Gather", ["whole", "first.row"], [output], axis=0))


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def rename_output(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    node.output[0] = model.graph.output[0].name = "answers"


def swap_folded(bundle: Bundle) -> None:
    place = bundle.path / "folded"
    (place / "plain.onnx").write_bytes((place / "partial.onnx").read_bytes())


def other_example(bundle: Bundle) -> None:
    np.savez(bundle.path / EXAMPLE, other=np.zeros(3))
    record(bundle, EXAMPLE)


ALTERED: dict[str, tuple[Change, type[TpeftError], str]] = {
    "weights": (flip_weights, IntegrityError, "weights.data"),
    "weights, recorded": (flip_recorded_weights, IntegrityError, "weight 'up.weight'"),
    "adapter": (flip_adapter, IntegrityError, "adapter.safetensors"),
    "native adapter": (other_native, IntegrityError, "'up.weight.tpeft.up' of adapter.onnx_adapter"),
    "native adapter without a tensor": (missing_native, IntegrityError, "stem.weight.tpeft.core.*got none"),
    "no native adapter": (broken_native, IntegrityError, "an .onnx_adapter file"),
    "manifest": (manifest_digest, IntegrityError, "the manifest's digest"),
    "example": (other_example, IntegrityError, "one array for each of pixels"),
    "outputs": (
        lambda b: edit(b, "banked.onnx", rename_output),
        IntegrityError,
        "outputs of banked.onnx, 'answers in float32'",
    ),
    "factored": (lambda b: edit(b, "factored.onnx", minus("TuckerLinear")), NotEquivalent, "factored export of task"),
    "banked": (
        lambda b: edit(b, "banked.onnx", minus("BankedConvUpPatches")),
        NotEquivalent,
        "banked export of task 'plain'",
    ),
    "base": (lambda b: edit(b, "base.onnx", epsilon), NotEquivalent, "factored export of task 'base'"),
    "rows": (lambda b: edit(b, "banked.onnx", cut_rows), NotEquivalent, r"expected shape \(2, 10\), got \(1, 10\)"),
    "operator": (lambda b: edit(b, "factored.onnx", unknown_operator), NotEquivalent, "refuses the graph"),
    "folded": (swap_folded, NotEquivalent, "folded export of task 'plain'"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_what_was_altered_is_found(own_bundle: Bundle, name: str) -> None:
    change, error, text = ALTERED[name]
    change(own_bundle)
    with pytest.raises(error, match=text):
        verify_bundle(own_bundle.path)
