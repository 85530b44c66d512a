"""What once went wrong without a word, each with the check that now speaks.

Others of the kind have tests of their own: values under an old name (test_refusals), a fused BatchNorm and a zero
bias (test_forms), merged and tied weights of foreign files (test_foreign_bases).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import nets
from tests.helpers.exporters import architectures
from tpeft_deploy import Runtime, export_bundle, export_folded
from tpeft_deploy.bundle import slots
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.errors import NotEquivalent, ShapeError
from tpeft_deploy.exporters.branches import linear
from tpeft_deploy.exporters.graph import batch_axes, weight_uses
from tpeft_deploy.exporters.graph.batch_axes import AxisOrder


@pytest.fixture
def row_orders(monkeypatch: pytest.MonkeyPatch) -> Callable[[AxisOrder], None]:
    """Lets every activation claim one order of its rows."""

    def claim(order: AxisOrder) -> None:
        honest = batch_axes.find
        monkeypatch.setattr(batch_axes, "find", lambda *args: dict.fromkeys(honest(*args), order))

    return claim


def test_rows_taken_in_the_wrong_order_are_found_by_the_gate(
    tmp_path: Path, row_orders: Callable[[AxisOrder], None]
) -> None:
    """A sequence-major layer taken for batch-major was 7 % off, and nothing failed."""
    row_orders("major")
    module, inputs = nets.attention_net()
    adapter = nets.adapter_for(module, {"attention.in_proj_weight": (3, 2)}, seed=1)
    bundle = export_bundle(module, {"a": adapter}, tmp_path / "bundle", example_inputs=inputs)
    assert bundle.manifest.rows == "group"
    assert "did not keep apart: got" in bundle.manifest.rows_reason
    batch = {"x": torch.randn(4, 4, 8).numpy()}
    runtime = Runtime(bundle.path, provider="cpu")
    mixed = runtime.run(batch, tasks=["a", "base", "base", "a"])["output"]
    alone = runtime.run({"x": batch["x"][3:]}, task="a")["output"]
    np.testing.assert_allclose(mixed[3], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["folded", "bundle"])
def test_a_graph_frozen_at_its_traced_size_does_not_ship(tmp_path: Path, form: str) -> None:
    """Traced where its last stage is one pixel, ConvNeXt-V2 exports without an error and fails at other sizes."""
    module, _, shapes = architectures.convnext()
    inputs = architectures.images(2, 3, 32, 32)
    adapter = nets.adapter_for(module, {"classifier.weight": (2, 2)}, seed=0)
    with pytest.raises(NotEquivalent, match=r"(?s)fails where the model itself does not.*larger example inputs"):
        if form == "folded":
            export_folded(module, adapter, tmp_path / "m.onnx", example_inputs=inputs, dynamic_shapes=shapes)
        else:
            export_bundle(module, {"a": adapter}, tmp_path / "b", example_inputs=inputs, dynamic_shapes=shapes)
    assert list(tmp_path.iterdir()) == []


def test_two_factors_that_disagree_about_a_rank_are_refused() -> None:
    """ONNX Runtime says so from the middle of a run, naming a kernel and no weight."""
    target = Target("stem.weight", "conv", (12, 3, 4, 4), "float32")
    tensors = slots.neutral(target) | {"up": np.zeros((12, 2, 1, 1), np.float32)}
    with pytest.raises(ShapeError, match=r"weight 'stem.weight': expected up with R_o = 1, as in core, got \(12, 2,"):
        slots.ranks_of(target, tensors)
    with pytest.raises(ShapeError, match=r"expected down of shape \('R_i', 3, 1, 1\), got nothing"):
        slots.ranks_of(target, {})


class Twice(nn.Module):
    """One layer used twice, as DeBERTa shares its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(torch.tanh(self.layer(x)))
        return y


def test_a_branch_at_one_of_two_consumers_is_found_by_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = Twice(), {"x": torch.randn(2, 3, 4)}
    adapter = nets.adapter_for(module, {"layer.weight": (2, 2)}, seed=0)
    export_bundle(module, {"a": adapter}, tmp_path / "right", example_inputs=inputs)
    honest = weight_uses.linear_sites
    monkeypatch.setattr(linear, "linear_sites", lambda weight: (honest(weight) or [])[:1])
    with pytest.raises(NotEquivalent, match="check the factored export of task 'a'"):
        export_bundle(module, {"a": adapter}, tmp_path / "wrong", example_inputs=inputs)
    assert not (tmp_path / "wrong").exists()
