"""The sizes that an export is proved at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.helpers import nets
from tests.helpers.nets import Tagger
from tpeft_deploy import export_bundle
from tpeft_deploy.adapter import Adapter
from tpeft_deploy.exporters.bases.load import load_base
from tpeft_deploy.exporters.oracle.base import Inputs, Outputs
from tpeft_deploy.exporters.oracle.subject import Subject


def test_a_base_with_other_inputs_is_proved_at_their_sizes() -> None:
    shapes = {"ids": {0: "batch", 1: "sequence"}}
    base = load_base(Tagger(), example_inputs={"ids": torch.zeros(2, 5, dtype=torch.int64)}, dynamic_shapes=shapes)
    graph = base.graph().graph
    assert Subject(base, graph).shapes == [{"batch": 2, "sequence": 5}, {"batch": 5, "sequence": 10}]
    other = base.at({"ids": base.inputs["ids"][:, :3]})
    assert Subject(other, graph).shapes == [{"batch": 2, "sequence": 3}, {"batch": 5, "sequence": 6}]


def test_a_base_runs_once_at_each_size() -> None:
    shapes = {"ids": {0: "batch", 1: "sequence"}}
    base = load_base(Tagger(), example_inputs={"ids": torch.zeros(2, 5, dtype=torch.int64)}, dynamic_shapes=shapes)
    subject, honest, calls = Subject(base, base.graph().graph), base.reference, list[int]()

    def overwritten(adapter: Adapter | None, inputs: Inputs, names: Sequence[str]) -> Outputs:
        calls.append(len(calls))
        kept.update(honest(adapter, inputs, names))
        return kept

    kept: Outputs = {}
    base.reference = overwritten  # type: ignore[method-assign]
    first = subject.reference(None, subject.shapes[0])
    for array in kept.values():
        array[:] = 0  # a buffer that the model's next run overwrites
    again = subject.reference(None, subject.shapes[0])
    assert len(calls) == len(subject.shapes)
    assert all(array.any() and array is again[name] for name, array in first.items())


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
