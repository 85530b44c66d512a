"""The banked graph for a GPU: the same answers by fewer operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.helpers.exporters.architectures import bert
from tests.helpers.exporters.matrix import error
from tests.helpers.nets import adapter_for
from tpeft_deploy import Adapter, Bundle, Runtime, export_bundle
from tpeft_deploy.bundle.directory import BANKED_CUDA
from tpeft_deploy.bundle.packing import Packed, pack
from tpeft_deploy.exporters.proof.bundle_graphs import banks, feeds_of
from tpeft_deploy.runtime.sessions.served_graphs import ServedGraphs

LAYER = "bert.encoder.layer.{}"
QUERY, KEY, VALUE = (f"{LAYER}.attention.self.{name}.weight" for name in ("query", "key", "value"))
UP, DOWN = f"{LAYER}.intermediate.dense.weight", f"{LAYER}.output.dense.weight"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Tasks of different ranks and targets; one has a head of another size."""
    module, inputs, sizes = bert()
    names = [name.format(layer) for name in (QUERY, KEY, VALUE, UP, DOWN) for layer in range(2)]
    adapters: dict[str, Adapter] = {
        "all": adapter_for(module, dict.fromkeys(names, (4, 3)), seed=1),
        "ranks": adapter_for(module, {name: (1 + i % 5, 6) for i, name in enumerate(names)}, seed=2),
        "query": adapter_for(module, {QUERY.format(0): (9, 9)}, seed=3),
        "head": adapter_for(
            module,
            {VALUE.format(1): (2, 2)},
            seed=4,
            overrides={"classifier.weight": (5, 32), "classifier.bias": (5,)},
        ),
    }
    place = tmp_path_factory.mktemp("packed") / "bundle"
    return export_bundle(module, adapters, place, example_inputs=inputs, dynamic_shapes=sizes)


def test_layers_that_read_one_activation_share_a_product(bundle: Bundle) -> None:
    groups = {group for own in bundle.manifest.packing for group in own.members if own.turned}
    joined = tuple(f"{name.format(0)}.tpeft.down" for name in (QUERY, KEY, VALUE))
    assert joined in groups
    assert (f"{DOWN.format(1)}.tpeft.down",) in groups
    nodes = Counter(node.op_type for node in onnx.load(bundle.path / BANKED_CUDA).graph.node)
    assert nodes["BankedLinear"] == 0
    assert nodes["PackedDown"] == 6
    assert nodes["PackedUp"] == 6
    assert nodes["PackedSum"] == 10
    assert nodes["Gather"] <= len(bundle.manifest.packing) + 5  # and those of the embeddings


def test_the_exporter_proves_it(bundle: Bundle) -> None:
    forms = {check["form"]: check["error"] for check in bundle.manifest.gate}
    assert forms["banked.cuda"] <= 1e-5


def test_a_layer_that_reads_another_directly(tmp_path: Path) -> None:
    """Packing the first replaces the activation of the second."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4))
    made = export_bundle(net, {}, tmp_path / "b", example_inputs={"input": torch.randn(3, 6)})
    assert BANKED_CUDA in made.manifest.files


def test_a_runtime_serves_it_as_it_serves_the_portable_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which can run it too: banks that grow in rows and ranks, rows of different tasks, heads of a task."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, 40, (6, 9))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    tasks = ["query", "base", "all", "head", "ranks", "query"]
    with Runtime(bundle.path, provider="cpu", threads=1) as portable:
        expected = portable.run(inputs, tasks=tasks)["logits"]
    on_cuda = ServedGraphs.on("cuda", bundle.manifest)
    assert on_cuda.banked == BANKED_CUDA
    monkeypatch.setattr(ServedGraphs, "on", lambda *_: on_cuda)
    with Runtime(bundle.path, provider="cpu", threads=1, preload=False) as packed:
        assert packed.run(inputs, task="all")["logits"].shape == (6, 2)
        got = packed.run(inputs, tasks=tasks)["logits"]
    for row, wanted in zip(got, expected, strict=True):
        assert error(np.asarray(row), np.asarray(wanted)) <= 1e-5


def test_banked_graphs_keep_the_fusions_of_the_base(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime fuses by shapes: only those that a task's head changes are forgotten."""
    fused = {}
    for file in ("base.onnx", "factored.onnx", "banked.onnx", BANKED_CUDA):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / file)
        onnxruntime.InferenceSession(bundle.path / file, options, providers=["CPUExecutionProvider"])
        nodes = Counter(node.op_type for node in onnx.load(tmp_path / file, load_external_data=False).graph.node)
        fused[file] = {name: nodes[name] for name in ("SkipLayerNormalization", "BiasGelu", "LayerNormalization")}
    assert fused["base.onnx"]["SkipLayerNormalization"] == 4
    assert all(own == fused["base.onnx"] for own in fused.values()), fused


def test_convs_pick_a_row_of_the_banks_for_each_row_of_the_batch(conv_bundle: Bundle) -> None:
    """So that no product has a batch on one side only; the answers are those of the portable graph."""
    graph = onnx.load(conv_bundle.path / BANKED_CUDA, load_external_data=False).graph
    convs = [node for node in graph.node if node.op_type.startswith(("BankedConv", "Windowed"))]
    assert convs
    assert all("adapter_index" not in node.input for node in convs)
    tasks = {"base": None, **{task: conv_bundle.adapter(task) for task in conv_bundle.tasks}}
    filled, inputs = banks(conv_bundle, tasks), conv_bundle.example()
    for index in ([1], [0], [n % len(tasks) for n in range(len(next(iter(inputs.values()))))]):
        got, expected = (
            onnxruntime.InferenceSession(conv_bundle.path / file, providers=["CPUExecutionProvider"]).run(
                None, inputs | feeds_of(file, filled[file], np.array(index))
            )[0]
            for file in (BANKED_CUDA, "banked.onnx")
        )
        assert error(np.asarray(got), np.asarray(expected)) <= 1e-6


@given(
    ranks=st.lists(st.integers(0, 5) | st.none(), min_size=4, max_size=4),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    turned=st.booleans(),
)
def test_packing_holds_every_slot_and_zeros(ranks: list[int | None], sizes: tuple[int, int], turned: bool) -> None:
    """Whatever the ranks: a slot stands in its place, padded with zeros, and one that is left out is the default."""
    names = ["a", "b", "c", "d"]
    packing = (Packed("packed", (("a", "b"), ("c", "d")), turned),)
    rows = {
        name: np.full((rank, sizes[0]) if not turned else (sizes[0], rank), place + 1.0)
        for place, (name, rank) in enumerate(zip(names, ranks, strict=True))
        if rank is not None
    }
    default = np.full((1, sizes[0]) if not turned else (sizes[0], 1), -1.0)
    found = pack(packing, rows | {"other": np.ones(1)}, dict.fromkeys(names, default))
    assert found.pop("other").shape == (1,)
    if not rows:
        assert found == {}
        return
    packed = found["packed"].reshape(4, -1, sizes[0])
    for place, rank in enumerate(ranks):
        held = 1 if rank is None else rank  # the default is of rank 1
        assert (packed[place, :held] == (-1.0 if rank is None else place + 1.0)).all()
        assert not packed[place, held:].any()
