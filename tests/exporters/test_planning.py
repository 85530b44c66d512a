"""What a plan knows of rows without running anything is what the export then finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import nets
from tpeft_deploy import export_bundle
from tpeft_deploy.bundle.manifest import base_digest
from tpeft_deploy.exporters.planning import plan_bundle


class ScaleNet(nn.Module):
    """A matrix that is no operand of a product: one W + dW for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head((x * self.table).mean(1))
        return scores


def test_a_target_that_always_takes_one_adapter_per_run_is_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = ScaleNet().eval(), {"x": torch.randn(2, 4, 6)}
    adapters = {"a": nets.adapter_for(module, {"table": (2, 2), "head.weight": (2, 2)}, seed=1)}
    plan = plan_bundle(module, adapters, name="bundle", example_inputs=inputs)
    document = plan.to_json()
    assert document["rows"] == "group"
    assert {t["target"]: t["rows"] for t in document["targets"]} == {"table": "group", "head.weight": None}
    manifest = export_bundle(module, adapters, tmp_path / "bundle", example_inputs=inputs).manifest
    assert manifest.rows == "group"
    assert manifest.rows_reason == document["rows_reason"]


@pytest.mark.parametrize("factory", [nets.text_net, nets.attention_net, nets.volume_net])
def test_a_plan_is_the_draft_of_the_manifest(factory: object, tmp_path: Path) -> None:
    assert callable(factory)
    module, inputs = factory()
    plan = plan_bundle(module, {}, name="bundle", example_inputs=inputs)
    manifest = export_bundle(module, {}, tmp_path / "bundle", example_inputs=inputs).manifest
    assert plan.draft.targets == manifest.targets
    assert plan.draft.weights == manifest.weights
    assert plan.draft.base_digest == base_digest({name: w.digest for name, w in manifest.weights.items()})
    assert plan.to_json()["rows"] is None or manifest.rows == "group"
