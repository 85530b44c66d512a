"""The sizes that an export is proved at."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.exporters.forms.test_forms import Tagger
from tests.helpers import nets
from tpeft_deploy import export_bundle
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.sizes import shapes_to_prove


def test_a_base_with_other_inputs_is_proved_at_their_sizes() -> None:
    shapes = {"ids": {0: "batch", 1: "sequence"}}
    base = load_base(Tagger(), example_inputs={"ids": torch.zeros(2, 5, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph = base.graph().graph
    assert shapes_to_prove(base, graph) == [{"batch": 2, "sequence": 5}, {"batch": 5, "sequence": 10}]
    other = base.at({"ids": base.inputs["ids"][:, :3]})
    assert shapes_to_prove(other, graph) == [{"batch": 2, "sequence": 3}, {"batch": 5, "sequence": 6}]


def test_an_example_whose_rows_are_alike_is_named_as_the_reason(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
    adapter = nets.adapter_for(module, {"0.weight": (2, 2)}, seed=0)
    shapes = {"input": {0: "batch"}}
    for name, batch, rows in (("zeros", torch.zeros(2, 4), "group"), ("other", torch.randn(2, 4), "each")):
        bundle = export_bundle(
            module, {"a": adapter}, tmp_path / name, example_inputs={"input": batch}, dynamic_shapes=shapes
        )
        assert bundle.manifest.rows == rows
        assert ("alike" in bundle.manifest.rows_reason) == (rows == "group")
