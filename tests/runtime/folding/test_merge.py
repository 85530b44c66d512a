"""Folded sessions against the merged torch module and against the banked graph."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tests.helpers.exporters.architectures import adapters_for
from tests.helpers.exporters.architectures import merged as merged_outputs
from tests.helpers.exporters.layers import CASES
from tests.helpers.exporters.matrix import LIMITS, adapters_of, changes, error, feeds, merged, resized
from tests.helpers.exporters.quantised import TARGETS, quantise
from tpeft_deploy import Adapter, Bundle, Runtime, TuckerDelta, export_bundle
from tpeft_deploy.errors import AdapterError, BaseMismatch, IntegrityError, RunError, ShapeError, UnknownTarget
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.runtime.folding import compare, merge
from tpeft_deploy.runtime.sessions import onnx_bytes
from tpeft_deploy.runtime.sessions.factory import SessionFactory
from tpeft_deploy.runtime.sessions.plain import Plain
from tpeft_deploy.runtime.sessions.providers import Choice

CPU = Choice("cpu", "a test")
TASKS = ("plain", "partial", "two", "wide")


def fold(bundle: Bundle, adapter: Adapter, place: Path | None = None) -> Plain:
    return merge.fold(bundle, adapter, SessionFactory.of(bundle.manifest, CPU, threads=1), place=place)


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(seed).standard_normal((rows, 1, 12, 14)).astype(np.float32)}


NAMES = (
    *("linear, 2-D", "linear, 3-D", "transformers Conv1D", "conv1d", "conv2d, strided", "depthwise, blocked"),
    *("conv with BatchNorm", "embedding", "tied embedding", "attention", "bare sum", "norms"),
)
HALF = ("linear, 3-D", "conv2d, strided", "tied embedding")
MATRIX = [(name, torch.float32) for name in NAMES] + [(name, torch.float16) for name in HALF]


@pytest.mark.parametrize(("name", "dtype"), MATRIX, ids=[f"{n}-{str(d).removeprefix('torch.')}" for n, d in MATRIX])
def test_a_folded_session_equals_the_merged_model(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    module, inputs = case.build(dtype)
    kinds = [kind for kind in changes(case) if kind != "gain 1"] if dtype == torch.float32 else ["delta"]
    adapters = {f"{kind[0]}{kind[-1]}": adapters_of(case, module, kind)["a"] for kind in kinds}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs)
    runtime = Runtime(bundle.path, provider="cpu", threads=1)
    exact, limit = module.float(), LIMITS[dtype]
    batch = resized(case, inputs, 3, 0)
    wide = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in batch.items()}
    for task, adapter in adapters.items():
        expected = merged(exact, adapter, wide)
        assert error(expected, merged(exact, None, wide)) > 10 * limit
        answer = {"output": np.asarray(runtime.run(feeds(batch), task=task)["output"])}
        for place in (None, tmp_path):
            got = fold(bundle, adapter, place).run(feeds(batch))["output"]
            assert error(got, expected) <= limit, (task, place)
            assert compare.agree({"output": got}, answer) <= compare.limit_of(bundle.manifest)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_heads_of_other_sizes(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path, task: str, *, packed: bool
) -> None:
    module, _ = nets.conv_net()
    batch = images(3)
    plain = fold(conv_bundle, conv_adapters[task], tmp_path if packed else None)
    logits = plain.run(batch)["logits"]
    weights = module.state_dict()
    changed = {n: weights[n].double() + torch.from_numpy(d.dense()) for n, d in conv_adapters[task].deltas.items()}
    changed = {name: tensor.float() for name, tensor in changed.items()}
    changed |= {name: torch.from_numpy(array) for name, array in conv_adapters[task].overrides.items()}
    with torch.no_grad():
        expected = torch.func.functional_call(module, changed, (torch.from_numpy(batch["pixels"]),))["logits"]
    assert error(logits, expected.numpy()) <= 1e-5
    banked = Runtime(conv_bundle.path, provider="cpu", threads=1)
    own = conv_bundle.example()
    answer = {name: np.asarray(array) for name, array in banked.run(own, task=task).items()}
    assert compare.prove(plain, conv_bundle.manifest, own, answer, task=task) <= 1e-6


@pytest.mark.soak  # the parts of these models are folded above; these take half a minute
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_real_architectures(tmp_path: Path, name: str) -> None:
    module, inputs, shapes = getattr(architectures, name)()
    adapters = adapters_for(module)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes)
    base = load_base(module, example_inputs=inputs, dynamic_shapes=shapes)
    for adapter, place in [(adapter, place) for adapter in adapters.values() for place in (None, tmp_path)]:
        got = fold(bundle, adapter, place).run(feeds(inputs))
        for port, expected in zip(base.graph().graph.outputs, merged_outputs(module, adapter, inputs), strict=True):
            assert error(got[str(port.name)], expected) <= 1e-5


def test_folds_that_change_the_same_weights_share_one_copy_with_heads_of_any_size(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    adapter, random = conv_adapters["two"], np.random.default_rng(0)
    for classes in (2, 10, 17):
        head = {"head.weight": random.standard_normal((classes, 16)), "head.bias": random.standard_normal(classes)}
        own = replace(adapter, overrides={name: array.astype(np.float32) for name, array in head.items()})
        packed, plain = fold(conv_bundle, own, tmp_path).run(images(3)), fold(conv_bundle, own).run(images(3))
        assert packed["logits"].shape == (3, classes)
        assert compare.agree(packed, plain) <= 1e-6
    (copy,) = tmp_path.iterdir()
    fold(conv_bundle, conv_adapters["partial"], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2

    # A session that does not bring what the copy leaves out must not open with whatever is in the file.
    whole = merge.weights(conv_bundle, adapter)
    for missing in ({}, {name: array for name, array in whole.items() if name != "up.weight"}):
        with pytest.raises(Exception, match="brought-by-each-session"):
            Plain(copy / "base.onnx", SessionFactory(CPU, threads=1), initializers=missing)


def test_threads_that_ask_for_one_copy_at_once_get_it(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    got: list[np.ndarray] = []
    adapter = conv_adapters["plain"]

    def folder() -> None:
        got.append(fold(conv_bundle, adapter, tmp_path).run(images(2))["logits"])

    folders = [threading.Thread(target=folder) for _ in range(4)]
    for thread in folders:
        thread.start()
    for thread in folders:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 1
    assert len(got) == 4
    for array in got:
        np.testing.assert_array_equal(array, got[0])


def test_a_weight_behind_a_transpose_is_folded_where_add_initializer_serves_the_base(tmp_path: Path) -> None:
    case = CASES["linear, 3-D"]
    module, inputs = case.build(torch.float32)
    adapter = adapters_of(case, module, "delta")["a"]
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    model = onnx.load(bundle.path / "base.onnx", load_external_data=False)
    (user,) = (node for node in model.graph.node if "layer.weight" in node.input)
    assert user.op_type == "Transpose"

    expected, base = merged(module, adapter, inputs), merged(module, None, inputs)
    assert error(base, expected) > 1e-2
    for place in (None, tmp_path):
        assert error(fold(bundle, adapter, place).run(feeds(inputs))["output"], expected) <= 1e-5
    value = onnxruntime.OrtValue.ortvalue_from_numpy(merge.weights(bundle, adapter)["layer.weight"])
    options = onnxruntime.SessionOptions()
    options.add_initializer("layer.weight", value)
    wrong = onnxruntime.InferenceSession(str(bundle.path / "base.onnx"), options, providers=["CPUExecutionProvider"])
    assert error(wrong.run(None, feeds(inputs))[0], base) <= 1e-5  # what it silently does instead


def test_weights_are_those_of_the_pristine_base_in_its_dtype(
    conv_bundle: Bundle, conv_adapters: dict[str, Adapter]
) -> None:
    before = (conv_bundle.path / "weights.data").read_bytes()
    adapter = conv_adapters["two"]
    first, second = merge.weights(conv_bundle, adapter), merge.weights(conv_bundle, adapter)
    assert set(first) == {*adapter.deltas, *adapter.overrides}
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert array.dtype == np.float32
    module = nets.conv_net()[0].state_dict()
    for name, delta in adapter.deltas.items():
        exact = module[name].double().numpy() + delta.dense()
        np.testing.assert_array_equal(first[name], exact.astype(np.float32))
    assert (conv_bundle.path / "weights.data").read_bytes() == before
    assert fold(conv_bundle, adapter).nbytes == sum(array.nbytes for array in first.values())


def test_bfloat16_weights_are_handed_over_as_their_bits(tmp_path: Path) -> None:
    case = CASES["linear, 3-D"]
    adapters = adapters_of(case, case.build(torch.float32)[0], "delta")
    module, inputs = case.build(torch.bfloat16)
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs)
    bits = merge.weights(bundle, adapters["a"])["layer.weight"]
    exact = module.state_dict()["layer.weight"].double() + torch.from_numpy(
        adapters["a"].deltas["layer.weight"].dense()
    )
    np.testing.assert_array_equal(bits, exact.to(torch.bfloat16).view(torch.uint16).numpy())
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    assert value.data_type() == "tensor(bfloat16)"
    assert value.shape() == list(bits.shape)
    assert compare.limit_of(bundle.manifest) == pytest.approx(3.2e-2)


def test_rounding_to_bfloat16_is_torchs() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 2**32, 100_000, np.uint64).astype(np.uint32).view(np.float32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    for array in (values[~np.isnan(values)], ties[~np.isnan(ties)]):
        expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(merge.to_bfloat16(array), expected)
    assert np.isnan((np.uint32(merge.to_bfloat16(np.array([np.nan]))[0]) << np.uint32(16)).view(np.float32))


def test_a_scalar_is_replaced_too(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.scale * self.layer(x)
            return y

    module, x = Scaled().eval(), torch.randn(2, 4)
    adapter = Adapter({}, {"scale": np.array(-3.0, np.float32)})
    bundle = export_bundle(module, {}, tmp_path / "bundle", example_inputs={"x": x})
    (got,) = fold(bundle, adapter).run({"x": x.numpy()}).values()
    with torch.no_grad():
        np.testing.assert_allclose(got, (-1.5 * module(x)).numpy(), rtol=1e-5)


def test_quantised_weights_are_refused_and_others_beside_them_folded(tmp_path: Path) -> None:
    module, inputs = quantise(tmp_path / "quantised.onnx", bits=4)
    made = nets.adapter_for(module, TARGETS, seed=0)
    base = load_base(tmp_path / "quantised.onnx", example_inputs=inputs, weights=module)
    bundle = export_bundle(base, {"a": made}, tmp_path / "bundle")
    with pytest.raises(AdapterError, match=r"weight 'first.weight': expected a weight in floating point.*the bank"):
        fold(bundle, made)
    head = nets.adapter_for(module, {"head.weight": (2, 2)}, seed=0)
    bundle.add("head", head)
    answer = Runtime(bundle.path, provider="cpu", threads=1).run(feeds(inputs), task="head")
    expected = {name: np.asarray(array) for name, array in answer.items()}
    assert compare.agree(fold(bundle, head).run(feeds(inputs)), expected) <= 1e-6


def test_adapters_that_do_not_fit_are_refused(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    plain = conv_adapters["plain"]
    with pytest.raises(ShapeError, match=r"stem\.weight"):
        fold(conv_bundle, Adapter({"stem.weight": nets.delta((12, 1, 3, 3), (1, 1, 3, 3), 0)}))
    with pytest.raises(UnknownTarget, match="steam"):
        fold(conv_bundle, Adapter({"steam.weight": plain.deltas["stem.weight"]}))
    with pytest.raises(BaseMismatch):
        fold(conv_bundle, replace(plain, base_digests={"stem.weight": "0" * 64}))
    with pytest.raises(ShapeError, match="dtype float32, got int64"):
        fold(conv_bundle, Adapter({}, {"head.bias": np.zeros(10, np.int64)}))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    case = CASES["linear, 2-D"]
    module, inputs = case.build(torch.float16)
    small = adapters_of(case, module, "delta")["a"]
    bundle = export_bundle(module, {"a": small}, tmp_path / "bundle", example_inputs=inputs)
    large = Adapter(
        {"layer.weight": TuckerDelta(np.full((5, 6), 1e5, np.float32), (None, None))}, source="the large one"
    )
    with pytest.raises(AdapterError, match=r"the large one .*'layer.weight': expected values that float16 holds"):
        merge.weights(bundle, large)


def test_two_changes_of_one_module_are_refused(tmp_path: Path) -> None:
    module, inputs = nets.twice_net()
    delta = nets.delta((4, 4), (2, 2), 0)
    adapter = Adapter({"second.weight": delta})
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    assert set(merge.weights(bundle, adapter)) == {bundle.manifest.canonical("second.weight")}
    with pytest.raises(UnknownTarget, match="it is tied to"):
        merge.weights(bundle, Adapter({"second.weight": delta, "first.weight": delta}))


def test_initializers_that_the_graph_does_not_have_are_refused(conv_bundle: Bundle) -> None:
    file = conv_bundle.path / "base.onnx"
    for arrays, message in (
        ({"other": np.zeros(3, np.float32)}, "'other': expected a weight that the graph reads from weights.data"),
        ({"stem.bias": np.zeros((12, 1), np.float32)}, "expected 1 axes"),
        ({"stem.bias": np.zeros(12, np.float16)}, "expected float32, got float16"),
    ):
        with pytest.raises(RunError, match=message):
            Plain(file, SessionFactory(CPU, threads=1), initializers=arrays)


def test_what_the_file_declares_is_what_onnx_reads(conv_bundle: Bundle) -> None:
    content = (conv_bundle.path / "base.onnx").read_bytes()
    model = onnx.load_from_string(content)
    found = onnx_bytes.declared(content)
    for tensor in model.graph.initializer:
        own = found.pop(tensor.name)
        assert (own.shape, own.data_type) == (tuple(tensor.dims), tensor.data_type)
        assert own.external == (tensor.data_location == onnx.TensorProto.EXTERNAL)
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert own.location == place.get("location", "")
        assert (own.offset, own.length) == (int(place.get("offset", 0)), int(place.get("length", 0)))
    assert found == {}
    for tensor in model.graph.initializer:
        if tensor.name == "head.weight":
            tensor.dims[0] = 300
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    assert onnx.load_from_string(onnx_bytes.resized(content, {"head.weight": (300, 16)})) == model
    with pytest.raises(ValueError, match="protobuf"):
        onnx_bytes.declared(content[:-1])


def test_the_proof_finds_what_is_wrong(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert compare.agree({"y": x}, {"y": x}) == 0
    assert compare.agree({"y": 1.01 * x}, {"y": x}) == pytest.approx(0.01, rel=1e-3)
    nan, mask = np.where(x == 1, np.nan, x), np.where(x == 1, -np.inf, x)
    for wrong in ({"y": x[:1]}, {"z": x}, {}, {"y": nan}, {"y": x, "z": x}):
        assert compare.agree(wrong, {"y": x}) == np.inf
    assert compare.agree({"y": mask}, {"y": mask}) == 0
    assert compare.agree({"y": x}, {"y": mask}) == np.inf
    other = fold(conv_bundle, conv_adapters["partial"])
    own = conv_bundle.example()
    expected = fold(conv_bundle, conv_adapters["plain"]).run(own)
    with pytest.raises(RunError, match=r"fold task 'plain': expected the answer of the banked graph"):
        compare.prove(other, conv_bundle.manifest, own, expected, task="plain")


def test_altered_examples_are_found(own_bundle: Bundle) -> None:
    file = own_bundle.path / "example.npz"
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(IntegrityError):
        own_bundle.example()


def test_threads_get_their_own_answers(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    plain = fold(conv_bundle, conv_adapters["wide"])
    expected = {rows: plain.run(images(rows, rows))["logits"] for rows in range(1, 5)}
    wrong: list[int] = []

    def caller(rows: int) -> None:
        for _ in range(50):
            if not np.array_equal(plain.run(images(rows, rows))["logits"], expected[rows]):
                wrong.append(rows)  # noqa: PERF401 - a list of what failed, mostly empty

    callers = [threading.Thread(target=caller, args=(rows,)) for rows in expected]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def test_a_run_is_stopped_by_its_options(conv_bundle: Bundle) -> None:
    plain, options = Plain(conv_bundle.path / "base.onnx", SessionFactory(CPU, threads=1)), onnxruntime.RunOptions()
    assert plain.run(images(2), options)["logits"].shape == (2, 10)
    options.terminate = True
    with pytest.raises(Exception, match="terminate"):
        plain.run(images(2), options)


def test_the_cost_of_a_session(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    weights = conv_bundle.manifest.weights
    convs = sum(weight.length for weight in weights.values() if len(weight.shape) > 2)
    whole = sum(weight.length for weight in weights.values())
    partial = conv_adapters["partial"]  # a conv alone
    assert merge.cost(conv_bundle, partial, shared=True) == 2 * convs
    assert merge.cost(conv_bundle, partial, shared=False) == whole + convs
    head = sum(weights[name].length for name in ("head.weight", "head.bias"))
    own = sum(array.nbytes for array in conv_adapters["wide"].overrides.values())
    assert merge.cost(conv_bundle, conv_adapters["wide"], shared=True) == 2 * convs + 2 * head + own
