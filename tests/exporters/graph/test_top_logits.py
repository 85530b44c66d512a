from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.graph.top_logits import check, choice_graph

DTYPES = [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 50, 3000])
def test_the_graph_equals_numpy(tmp_path: Path, dtype: ir.DataType, vocabulary: int) -> None:
    ir.save(choice_graph(vocabulary, dtype), tmp_path / "choice.onnx")
    check(tmp_path / "choice.onnx", vocabulary, dtype)
    kept = ir.load(tmp_path / "choice.onnx").graph.outputs[0].shape
    assert kept is not None
    assert kept[1] == max(1, min(128, vocabulary // 4))


@pytest.mark.parametrize(("operator", "got"), [("Exp", "sums with a relative error"), ("TopK", "other logits")])
def test_a_wrong_graph_is_refused(tmp_path: Path, operator: str, got: str) -> None:
    model = choice_graph(50, ir.DataType.FLOAT)
    node = next(node for node in model.graph if node.op_type == operator)
    if operator == "Exp":
        node.op_type = "Softplus"
    else:
        node.attributes["largest"] = ir.AttrInt64("largest", np.int64(0).item())
    ir.save(model, tmp_path / "choice.onnx")
    with pytest.raises(NotEquivalent, match=got):
        check(tmp_path / "choice.onnx", 50, ir.DataType.FLOAT)
