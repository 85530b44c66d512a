"""Linear layers on images of a fixed size: W + dW where an image has enough positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests.helpers.exporters.matrix import error
from tests.helpers.nets import adapter_for
from tpeft_deploy import Bundle, export_bundle
from tpeft_deploy.bundle.directory import BANKED_CPU, FACTORED_CPU
from tpeft_deploy.exporters.proof.bundle_graphs import banks, feeds_of

CHANGED = {"depthwise.weight": (2, 1, 3, 3), "wide.weight": (3, 2), "narrow.weight": (2, 3), "shared.weight": (2, 2)}


class Images(nn.Module):
    """Linears on (B, H, W, C); `wide` costs more than 12 positions do, and the output of `shared` is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow = nn.Linear(16, 8)
        self.wide = nn.Linear(8, 96)
        self.wider = nn.Linear(96, 96)
        self.shared = nn.Linear(96, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(torch.tanh(self.narrow(self.depthwise(x).permute(0, 2, 3, 1))))
        y = self.shared(self.wider(x))
        result: torch.Tensor = y * torch.tanh(y)
        return result


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    module = Images().eval()
    changed = CHANGED | {"wider.weight": (2, 4)}
    adapters = {f"task{seed}": adapter_for(module, changed, seed=seed) for seed in range(3)}
    adapters["head"] = adapter_for(module, {}, seed=3, overrides={"shared.weight": (4, 96)})
    place = tmp_path_factory.mktemp("merged") / "bundle"
    return export_bundle(module, adapters, place, example_inputs={"x": torch.randn(3, 16, 3, 4)})


def test_merges_where_positions_outweigh_the_matrix(bundle: Bundle) -> None:
    """Not `wider`, of 48 rows' worth of positions; `shared` is replaced by a task, so its product stays."""
    found = {file: _nodes(bundle.path / file) for file in (FACTORED_CPU, BANKED_CPU, "factored.onnx", "banked.onnx")}
    assert found[FACTORED_CPU] == {"narrow": "MergedLinear", "wide": "MergedLinear"} | dict.fromkeys(
        ("wider", "shared"), "TuckerLinear"
    )
    assert found[BANKED_CPU]["narrow"] == found[BANKED_CPU]["wide"] == "BankedMergedLinear"
    assert found[BANKED_CPU]["wider"] == "BankedSizedLinear"
    assert set(found["factored.onnx"].values()) == {"TuckerLinear"}
    assert set(found["banked.onnx"].values()) == {"BankedLinear"}


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_answers_are_those_of_the_portable_graph(bundle: Bundle, rows: int) -> None:
    tasks = {"base": None, **{task: bundle.adapter(task) for task in bundle.tasks}}
    filled = banks(bundle, tasks)
    inputs = {"x": np.random.default_rng(rows).standard_normal((rows, 16, 3, 4)).astype(np.float32)}
    for index in ([2], [4], [n % len(tasks) for n in range(rows)]):
        got, expected = (
            _run(bundle.path / file, inputs | feeds_of(file, filled[file], np.array(index)))
            for file in (BANKED_CPU, "banked.onnx")
        )
        assert error(got, expected) <= 1e-5
    got, expected = (
        _run(bundle.path / file, inputs | dict(bundle.factors("task1", file)))
        for file in (FACTORED_CPU, "factored.onnx")
    )
    assert error(got, expected) <= 1e-5


def _run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


def _nodes(path: Path) -> dict[str, str]:
    """Layer -> operator of its branch."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.name.partition(".")[0]: node.op_type for node in nodes if node.op_type.endswith("Linear")}
