"""The sizes that an export is proved at."""

from __future__ import annotations

import torch

from tests.exporters.test_forms import Tagger
from tpeft_deploy.exporters.loading import load_base
from tpeft_deploy.exporters.samples import shapes_to_prove


def test_a_base_with_other_inputs_is_proved_at_their_sizes() -> None:
    shapes = {"ids": {0: "batch", 1: "sequence"}}
    base = load_base(Tagger(), example_inputs={"ids": torch.zeros(2, 5, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph = base.graph().graph
    assert shapes_to_prove(base, graph) == [{"batch": 2, "sequence": 5}, {"batch": 5, "sequence": 10}]
    other = base.at({"ids": base.inputs["ids"][:, :3]})
    assert shapes_to_prove(other, graph) == [{"batch": 2, "sequence": 3}, {"batch": 5, "sequence": 6}]
