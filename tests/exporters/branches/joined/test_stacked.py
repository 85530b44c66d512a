"""The factored graph for a GPU: layers that read the same activation are one layer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.helpers.commands import succeed
from tests.helpers.exporters.architectures import bert
from tests.helpers.exporters.matrix import error
from tests.helpers.nets import adapter_for
from tpeft_deploy import Bundle, export_bundle
from tpeft_deploy.bundle.directory import FACTORED_CUDA
from tpeft_deploy.formats.write import onnx_adapter
from tpeft_deploy.html.page import FORM_COLOURS
from tpeft_deploy.tucker import Array

LAYER = "bert.encoder.layer.{}.attention.self.{}.weight"
NAMES = [LAYER.format(layer, name) for layer in range(2) for name in ("query", "key", "value")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tasks of different ranks and targets."""
    module, inputs, sizes = bert()
    adapters = {
        "ranks": adapter_for(module, {name: (1 + i % 5, 6) for i, name in enumerate(NAMES)}, seed=2),
        "query": adapter_for(module, {NAMES[0]: (9, 9)}, seed=3),
    }
    place = tmp_path_factory.mktemp("stacked") / "bundle"
    return export_bundle(module, adapters, place, example_inputs=inputs, dynamic_shapes=sizes)


def answer(bundle: Bundle, file: str, feeds: dict[str, Array], adapter: Path | None = None) -> Array:
    session = onnxruntime.InferenceSession(bundle.path / file, providers=["CPUExecutionProvider"])
    options = onnxruntime.RunOptions()
    if adapter is not None:
        native = onnxruntime.LoraAdapter()
        native.Load(str(adapter))
        options.add_active_adapter(native)
    return np.asarray(session.run(None, bundle.example() | feeds, options)[0])


def nodes(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def test_queries_keys_and_values_are_one_layer(bundle: Bundle) -> None:
    found = nodes(bundle.path / FACTORED_CUDA)
    assert (found["StackedLinear"], found["TuckerLinear"]) == (2, 0)
    downs = {packed.members[0] for packed in bundle.manifest.stacking if packed.turned}
    assert downs == {tuple(f"{name}.tpeft.down" for name in NAMES[i : i + 3]) for i in (0, 3)}


def test_the_exporter_proves_it(bundle: Bundle) -> None:
    found = {check["form"]: check["error"] for check in bundle.manifest.gate}
    assert found["factored.cuda"] <= 1e-5
    assert set(found) <= set(FORM_COLOURS)  # in which the report shows them


@pytest.mark.parametrize("task", ["ranks", "query"])
def test_a_task_as_in_the_portable_graph(bundle: Bundle, tmp_path: Path, task: str) -> None:
    """Fed as arrays and from a file; nothing fed, the base."""
    expected = answer(bundle, "factored.onnx", bundle.factors(task))
    assert error(answer(bundle, FACTORED_CUDA, bundle.factors(task, FACTORED_CUDA)), expected) <= 1e-6
    source, native = tmp_path / "a.safetensors", tmp_path / "a.onnx_adapter"
    source.write_bytes(bundle.adapter(task).to_bytes())
    arguments = ("--to", "onnx-adapter", "--bundle", bundle.path, "--graph", FACTORED_CUDA)
    succeed("convert", source, native, *arguments)
    assert set(onnx_adapter.read(native)) == set(bundle.factors(task, FACTORED_CUDA))
    assert error(answer(bundle, FACTORED_CUDA, {}, native), expected) <= 1e-6
    base = answer(bundle, "base.onnx", {})
    assert error(answer(bundle, FACTORED_CUDA, {}), base) <= 1e-6
    assert error(base, expected) > 1e-3


def test_fusions_and_the_bytes_of_weights_stay(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime fuses as in the base, and keeps the joined weights in place of those that they were made of."""
    found, sizes = {}, {}
    for file in ("base.onnx", FACTORED_CUDA):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / file)
        onnxruntime.InferenceSession(bundle.path / file, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / file, load_external_data=False).graph
        operators = Counter(node.op_type for node in graph.node)
        found[file] = {name: operators[name] for name in ("SkipLayerNormalization", "BiasGelu", "LayerNormalization")}
        weights = [tensor for tensor in graph.initializer if not tensor.name.startswith("tpeft.stacked")]
        sizes[file] = sum(int(np.prod(tensor.dims)) for tensor in weights if len(tensor.dims) == 2)
    assert found[FACTORED_CUDA] == found["base.onnx"]
    assert found["base.onnx"]["SkipLayerNormalization"] == 4
    assert sizes[FACTORED_CUDA] == sizes["base.onnx"]


class Layers(nn.Module):
    """Layers that read the same activation, with and without biases, stored either way, and of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.turned = nn.ParameterList(nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.mixed = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4, bias=False)])
        self.other, self.below = nn.Linear(6, 5), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, second = (layer(input) for layer in self.plain)
        third, fourth = (first @ matrix for matrix in self.turned)
        mixed = [layer(input) for layer in self.mixed]
        return torch.cat(
            [second, third.tanh() * fourth, *mixed, self.other(input), *(f(fourth) for f in self.below)], -1
        )


def test_layers_of_every_kind(tmp_path: Path) -> None:
    """A stack reads the result of another; the export proves every answer."""
    torch.manual_seed(0)
    made = export_bundle(Layers().eval(), {}, tmp_path / "b", example_inputs={"input": torch.randn(3, 2, 6)})
    found = nodes(made.path / FACTORED_CUDA)
    assert found["StackedLinear"] == 4
    assert found["TuckerLinear"] == 1
    assert {check["form"] for check in made.manifest.gate} >= {"factored", "factored.cuda"}
