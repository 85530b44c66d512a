"""Inputs whose values pick rows of weights, in graphs as exporters write them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from tpeft_deploy.exporters.graph import picked_rows

WEIGHTS = {
    "table": np.zeros((7, 2), np.float32),
    "small": np.zeros((5, 2), np.float32),
    "wide": np.zeros((2, 9), np.float32),
    "scale": np.ones((), np.float32),
    "bytes": np.zeros((6, 2), np.int8),
}


def limits(body: str, *replaceable: str) -> dict[str, int]:
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (int64[B, S] ids, int64[B, S] mask) => (float y) {{ {body} }}"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in WEIGHTS.items())
    return picked_rows.limits(ir.serde.deserialize_model(model).graph, frozenset(replaceable))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gather(table, ids)", 7),
        ("a = Gather(table, ids) b = Gather(small, ids) y = Add(a, b)", 5),
        ("y = Gather<axis = 1>(wide, ids)", 9),
        ("y = Gather<axis = -1>(wide, ids)", 9),
        ("i = Cast<to = 7>(ids) j = Unsqueeze(i, mask) y = Gather(table, j)", 7),
        ("m = Equal(ids, mask) y = Gather(table, ids)", 7),
        ("t = DequantizeLinear(bytes, scale) y = Gather(t, ids)", 6),
        ("i = Cast<to = 9>(ids) j = Cast<to = 7>(i) y = Gather(table, j)", None),
        ("i = Add(ids, mask) y = Gather(table, i)", None),
        ("i = Slice(ids, mask, mask) y = Gather(table, i)", None),
        ("t = Relu(table) y = Gather(ids, t)", None),
        ("t = Add(table, mask) y = Gather(t, ids)", None),
    ],
)
def test_the_limit_is_that_of_the_smallest_weight(body: str, found: int | None) -> None:
    assert limits(body).get("ids") == found


def test_a_weight_that_tasks_replace_sets_none() -> None:
    assert limits("a = Gather(table, ids) b = Gather(small, ids) y = Add(a, b)", "small") == {"ids": 7}
