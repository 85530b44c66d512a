"""Every form of every model against torch: the whole outputs, not just that something ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from tests.helpers import nets
from tests.helpers.nets import Tagger
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle, export_folded
from tpeft_deploy.exporters.bases.load import load_base

LIMIT = 1e-5


def merged(module: nn.Module, adapter: Adapter | None, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """An independent oracle: the module itself with dense float64 sums in place of its weights."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    changed = {}
    if adapter is not None:
        for name, delta in adapter.deltas.items():
            total = weights[name].detach().double() + torch.from_numpy(delta.dense())
            changed[name] = total.to(weights[name].dtype)
        changed |= {name: torch.from_numpy(array) for name, array in adapter.overrides.items()}
    with torch.no_grad():
        (output,) = tree_leaves(functional_call(module, changed, (), inputs, tie_weights=False))
    result: np.ndarray = output.numpy()
    return result


def error(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def pixels(rows: int, height: int = 12, width: int = 14) -> dict[str, torch.Tensor]:
    return {"pixels": torch.randn(rows, 1, height, width, generator=torch.Generator().manual_seed(rows))}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_folded_equals_the_merged_model(conv_bundle: Bundle, conv_adapters: dict[str, Adapter], rows: int) -> None:
    module, _ = nets.conv_net()
    inputs = pixels(rows)
    for task, adapter in conv_adapters.items():
        (got,) = session(conv_bundle.path / "folded" / f"{task}.onnx").run(None, arrays(inputs))
        assert error(got, merged(module, adapter, inputs)) <= LIMIT


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_factored_equals_the_merged_model(conv_bundle: Bundle, conv_adapters: dict[str, Adapter], rows: int) -> None:
    module, _ = nets.conv_net()
    inputs = pixels(rows)
    factored = session(conv_bundle.path / "factored.onnx")
    (nothing_fed,) = factored.run(None, arrays(inputs))
    assert error(nothing_fed, merged(module, None, inputs)) <= 1e-6
    for task, adapter in conv_adapters.items():
        (got,) = factored.run(None, arrays(inputs) | conv_bundle.factors(task))
        assert error(got, merged(module, adapter, inputs)) <= LIMIT


def test_the_native_adapter_file_gives_the_same_answer(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    module, _ = nets.conv_net()
    inputs = pixels(3)
    factored = session(conv_bundle.path / "factored.onnx")
    for task, digest in conv_bundle.tasks.items():
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(conv_bundle.path / "adapters" / task / digest / "adapter.onnx_adapter"))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(adapter)
        (got,) = factored.run(None, arrays(inputs), options)
        assert error(got, merged(module, conv_adapters[task], inputs)) <= LIMIT


def test_a_mixed_batch_equals_each_rows_own_model(conv_bundle: Bundle, conv_adapters: dict[str, Adapter]) -> None:
    module, _ = nets.conv_net()
    assert conv_bundle.manifest.rows == "each"
    runtime = Runtime(conv_bundle.path, provider="cpu")
    tasks = ["wide", "base", "two", "plain", "partial", "two", "base", "wide", "plain"]
    inputs = pixels(len(tasks))
    logits = runtime.run(arrays(inputs), tasks=tasks)["logits"]
    for row, task in enumerate(tasks):
        expected = merged(module, conv_adapters.get(task), {"pixels": inputs["pixels"][row : row + 1]})[0]
        assert error(logits[row], expected) <= LIMIT, task


def test_the_base_through_the_banked_graph_equals_the_plain_export(conv_bundle: Bundle) -> None:
    runtime = Runtime(conv_bundle.path, provider="cpu")
    inputs = arrays(pixels(6))
    (plain,) = session(conv_bundle.path / "base.onnx").run(None, inputs)
    assert error(runtime.run(inputs)["logits"], plain) <= 1e-6
    mixed = runtime.run(inputs, tasks=["base", "two", "base", "wide", "base", "base"])["logits"]
    for row in (0, 2, 4, 5):
        assert error(mixed[row], plain[row]) <= 1e-6


def test_graphs_share_their_weights_and_keep_their_names(conv_bundle: Bundle) -> None:
    path = conv_bundle.path
    module, _ = nets.conv_net()
    names = {name for name, _ in module.named_parameters()}
    for form in ("base", "factored", "banked"):
        model = onnx.load(path / f"{form}.onnx", load_external_data=False)
        outside = {t.name for t in model.graph.initializer if t.external_data}
        assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {
            "weights.data"
        }
        if form == "base":
            assert names <= outside
        assert (path / f"{form}.onnx").stat().st_size < 60_000
    for name in names:
        value = conv_bundle.base_value(name)
        np.testing.assert_array_equal(value, module.get_parameter(name).detach().numpy())


def test_the_factored_graph_shows_named_tucker_nodes(conv_bundle: Bundle) -> None:
    model = onnx.load(conv_bundle.path / "factored.onnx", load_external_data=False)
    kinds = sorted(node.op_type for node in model.graph.node if node.domain == "tpeft")
    changes = ["TuckerChange", "TuckerChange", "TuckerInputs"]  # of the two weights; one has an input factor
    assert kinds == sorted([*changes, "TuckerConvUp", "TuckerLinear", "TuckerWeight", "TuckerWeight"])
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    assert inputs["stem.weight.tpeft.core"] == ["stem.weight.R_o", 1, 4, 4]
    assert inputs["head.weight.tpeft.value"] == ["head.weight.C", 16]
    defaults = {t.name: t for t in model.graph.initializer}
    assert not onnx.numpy_helper.to_array(defaults["stem.weight.tpeft.core"]).any()


def test_batch_norm_behind_an_adapted_conv_stays_exact(tmp_path: Path) -> None:
    # An optimised export folds the norm into the conv under the conv's own name: dW added there is wrong by its scale.
    module, inputs = nets.conv_net()
    adapter = nets.adapter_for(module, {"grouped.weight": (8, 2, 3, 3)}, seed=3)
    export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs)
    model = onnx.load(tmp_path / "m.onnx")
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    (got,) = session(tmp_path / "m.onnx").run(None, arrays(inputs))
    assert error(got, merged(module, adapter, inputs)) <= LIMIT


def test_half_precision(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    adapters = nets.conv_adapters(module)  # trained on the float32 base
    module = module.half()
    halves = {name: tensor.half() for name, tensor in inputs.items()}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=halves, folded=True)
    assert bundle.manifest.rows == "each"
    runtime = Runtime(bundle.path, provider="cpu")
    tasks = ["two", "base", "wide", "plain"]
    batch = {name: tensor.half() for name, tensor in pixels(len(tasks)).items()}
    logits = runtime.run(arrays(batch), tasks=tasks)["logits"]
    exact = nets.conv_net()[0]
    for row, task in enumerate(tasks):
        expected = merged(exact, adapters.get(task), {"pixels": batch["pixels"][row : row + 1].float()})[0]
        assert logits[row].dtype == np.float16
        assert error(np.asarray(logits[row], np.float32), expected) <= 2e-3


CASES: list[tuple[Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]], dict[str, tuple[int, ...]], str]] = [
    # Two consumers of one linear; every use gets the branch.
    (nets.text_net, {"mix.weight": (2, 3)}, "each"),
    # Tied to the output: one table, a lookup and a product.
    (nets.text_net, {"embedding.weight": (4, 2), "mix.weight": (2, 2)}, "each"),
    # Named by its other alias.
    (nets.text_net, {"out.weight": (4, 2)}, "each"),
    # Sequence-major rows inside.
    (nets.attention_net, {"attention.in_proj_weight": (3, 2), "head.weight": (2, 2)}, "each"),
    (nets.attention_net, {"head.weight": (2, 2)}, "each"),
]


@pytest.mark.parametrize(("factory", "targets", "rows"), CASES)
def test_other_uses_of_weights_are_exact_in_every_form(
    tmp_path: Path,
    factory: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]],
    targets: dict[str, tuple[int, ...]],
    rows: str,
) -> None:
    module, inputs = factory()
    adapters = {"a": nets.adapter_for(module, targets, seed=1), "b": nets.adapter_for(module, targets, seed=2)}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    assert bundle.manifest.rows == rows
    assert bool(bundle.manifest.rows_reason) == (rows == "group")
    runtime = Runtime(bundle.path, provider="cpu")
    tasks = ["a", "base", "b", "a", "b"]
    batch = {n: torch.cat([t, t.flip(-1), t.roll(1, -1)])[: len(tasks)] for n, t in inputs.items()}
    mixed = runtime.run(arrays(batch), tasks=tasks)["output"]
    for row, task in enumerate(tasks):
        expected = merged(module, adapters.get(task), {n: t[row : row + 1] for n, t in batch.items()})[0]
        assert error(mixed[row], expected) <= LIMIT
    for task, adapter in adapters.items():
        expected = merged(module, adapter, batch)
        assert error(runtime.run(arrays(batch), task=task)["output"], expected) <= LIMIT
        (folded,) = session(bundle.path / "folded" / f"{task}.onnx").run(None, arrays(batch))
        assert error(folded, expected) <= LIMIT
        feeds = arrays(batch) | bundle.factors(task)
        (factored,) = session(bundle.path / "factored.onnx").run(None, feeds)
        assert error(factored, expected) <= LIMIT


def test_a_bundle_without_adapters_takes_them_later(tmp_path: Path) -> None:
    module, inputs = nets.conv_net()
    bundle = export_bundle(module, {}, tmp_path / "bundle", example_inputs=inputs)
    runtime = Runtime(bundle.path, provider="cpu")
    adapter = nets.conv_adapters(module)["plain"]
    runtime.load("later", adapter)
    batch = pixels(3)
    mixed = runtime.run(arrays(batch), tasks=["later", "base", "later"])["logits"]
    expected = merged(module, adapter, batch), merged(module, None, batch)
    for row, own in enumerate((0, 1, 0)):
        assert error(np.asarray(mixed[row]), expected[own][row]) <= LIMIT


@pytest.mark.parametrize("name", ["norm.weight", "norm.running_mean", "stem.bias", "up.bias", "layer_norm.weight"])
def test_any_tensor_can_be_overridden(tmp_path: Path, name: str) -> None:
    module, inputs = nets.conv_net()
    shape = tuple(dict(module.state_dict())[name].shape)
    adapters = {
        task: nets.adapter_for(module, {"up.weight": (2, 2)}, seed=seed, overrides={name: shape})
        for seed, task in enumerate(("a", "b"))
    }
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    runtime = Runtime(bundle.path, provider="cpu")
    tasks = ["b", "base", "a"]
    batch = pixels(3)
    logits = runtime.run(arrays(batch), tasks=tasks)["logits"]
    for row, task in enumerate(tasks):
        expected = merged(module, adapters.get(task), {"pixels": batch["pixels"][row : row + 1]})[0]
        assert error(np.asarray(logits[row]), expected) <= LIMIT


def test_a_batch_norm_saved_by_peft_is_served_with_its_statistics(tmp_path: Path) -> None:
    from peft import get_peft_model

    from tpeft_deploy import load_adapter
    from tpeft_deploy.training import TuckerConfig

    base, inputs = nets.conv_net()
    trained, _ = nets.conv_net()
    config = TuckerConfig(ranks=3, target_modules=["stem", "depthwise"], modules_to_save=["norm"], init_weights=False)
    model = get_peft_model(trained, config)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(**pixels(8))
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.overrides["norm.num_batches_tracked"].shape == ()
    bundle = export_bundle(base, {"bn": adapter}, tmp_path / "bundle", example_inputs=inputs, folded=True)
    assert bundle.adapter("bn").to_bytes() == adapter.to_bytes()
    with torch.no_grad():
        expected = model(**pixels(3))["logits"].numpy()
    got = Runtime(bundle.path, provider="cpu").run(arrays(pixels(3)), tasks=["bn"] * 3)["logits"]
    assert error(np.stack(list(got)), expected) <= LIMIT


def test_a_zero_bias_of_the_base_can_be_overridden(tmp_path: Path) -> None:
    # The optimiser's rules drop a bias that is zero, even one that can be overridden.
    module, inputs = nets.conv_net()
    with torch.no_grad():
        for name in ("head", "stem", "up"):
            module.get_parameter(f"{name}.bias").zero_()
    shapes = {"head.weight": (3, 16), "head.bias": (3,), "stem.bias": (12,), "up.bias": (16,)}
    adapters = {task: nets.adapter_for(module, {}, seed=i, overrides=shapes) for i, task in enumerate(("a", "b"))}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs)
    tasks = ["a", "base", "b"]
    answers = Runtime(bundle.path, provider="cpu").run(arrays(pixels(3)), tasks=tasks)["logits"]
    for row, task in enumerate(tasks):
        expected = merged(module, adapters.get(task), {"pixels": pixels(3)["pixels"][row : row + 1]})[0]
        assert error(np.asarray(answers[row]), expected) <= LIMIT


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_other_dimensions(tmp_path: Path, transposed: bool) -> None:
    module, inputs = nets.volume_net()
    targets: dict[str, tuple[int, ...]] = {
        "line.weight": (3, 2, 4),
        "volume.weight": (2, 2, 1, 2, 2),
        "strided.weight": (3, 2, 3, 2, 3),
    }
    targets |= {"back.weight": (3, 2, 2)} if transposed else {}
    adapters = {"a": nets.adapter_for(module, targets, seed=1), "b": nets.adapter_for(module, targets, seed=2)}
    bundle = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs, folded=True)
    assert bundle.manifest.rows == "each"
    tasks = ["b", "base", "a", "b"]
    batch = {name: torch.cat([tensor, tensor.flip(-1)]) for name, tensor in inputs.items()}
    mixed = Runtime(bundle.path, provider="cpu").run(arrays(batch), tasks=tasks)
    for row, task in enumerate(tasks):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        adapter, base = adapters.get(task), load_base(module, example_inputs=inputs)
        changed = {name: torch.from_numpy(base.merged(adapter, name)) for name in targets} if adapter else {}
        with torch.no_grad():
            expected = functional_call(module, changed, (), own)
        for name in ("waves", "blocks"):
            assert error(np.asarray(mixed[name][row]), expected[name][0].numpy()) <= LIMIT


def test_heads_of_other_sizes_on_every_token(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, inputs = Tagger().eval(), {"ids": torch.randint(0, 20, (2, 5))}
    adapters = {
        f"c{size}": nets.adapter_for(
            module, {"mix.weight": (2, 2)}, seed=size, overrides={"head.weight": (size, 8), "head.bias": (size,)}
        )
        for size in (1, 3, 9)
    }
    shapes = {"ids": {0: "batch", 1: "sequence"}}
    bundle = export_bundle(
        module, adapters, tmp_path / "bundle", example_inputs=inputs, dynamic_shapes=shapes, folded=True
    )
    assert bundle.manifest.rows == "each"
    (port,) = bundle.manifest.outputs
    assert (port.varies.axis, port.varies.override) == (2, "head.weight") if port.varies else False
    runtime = Runtime(bundle.path, provider="cpu")
    tasks = ["c9", "base", "c1", "c3", "c9"]
    batch = {"ids": torch.randint(0, 20, (len(tasks), 7), generator=torch.Generator().manual_seed(1))}
    answers = runtime.run(arrays(batch), tasks=tasks)["output"]
    for row, task in enumerate(tasks):
        expected = merged(module, adapters.get(task), {"ids": batch["ids"][row : row + 1]})[0]
        assert error(np.asarray(answers[row]), expected) <= LIMIT, task
    for task, adapter in adapters.items():
        (folded,) = session(bundle.path / "folded" / f"{task}.onnx").run(None, arrays(batch))
        assert error(folded, merged(module, adapter, batch)) <= LIMIT


class WideOutput(nn.Module):
    """Computes in 16 bits and answers in 32, as many heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).float()  # type: ignore[no-any-return]


def test_a_half_model_with_wide_outputs(tmp_path: Path) -> None:
    torch.manual_seed(4)
    module = WideOutput().eval()
    adapter = nets.adapter_for(module, {"first.weight": (4, 4), "second.weight": (2, 2)}, seed=1)
    inputs = {"x": torch.randn(3, 64).half()}
    bundle = export_bundle(module.half(), {"a": adapter}, tmp_path / "b", example_inputs=inputs, folded=True)
    worst = {check["form"]: check["error"] for check in bundle.manifest.gate}
    assert max(worst.values()) > 1e-5
    assert bundle.manifest.rounding is not None
    limit = max(2e-3, 4 * bundle.manifest.rounding.measured["output"])
    assert {check["limit"] for check in bundle.manifest.gate} == {limit}
    assert limit < 4e-3
