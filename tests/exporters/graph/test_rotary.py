"""Rotary position encodings: fused where the result stays what it was."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tpeft_deploy.exporters.graph.rotary import fuse_rotary

# q (rows, chunk, 24) is three heads of eight; the angles of both halves are alike.
MODEL = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
decoder (float[rows, chunk, 24] q, float[rows, chunk, 4] angles) => (float[rows, chunk, 24] y)
<int64[4] split = {{0, 0, 3, 8}}, int64[3] joined = {{0, 0, 24}}, int64[1] axis = {{1}}, int64[1] zero = {{0}},
 int64[1] half = {{{half}}}, int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}, float scale = {{1.5}},
 float[rows, 3, chunk, 8] x, float[rows, chunk, 8] cos, float[rows, chunk, 8] sin, float[rows, chunk, 3, 8] heads>
{{
    heads = Reshape (q, split)
    turned = Transpose <perm = [0, 2, 1, 3]> (heads)
    x = {x}
    others = Neg (angles)
    double = Concat <axis = -1> (angles, {angles})
    cosines = Cos (double)
    cos = Mul (cosines, scale)
    sin = Sin (double)
    cos4 = Unsqueeze (cos, axis)
    sin4 = Unsqueeze (sin, axis)
    straight = Mul (x, cos4)
    low = Slice (x, zero, half, last)
    high = Slice (x, half, end, last)
    negative = Neg (high)
    swapped = Concat <axis = -1> (negative, low)
    across = Mul (swapped, sin4)
    rotated = Add (straight, across)
    back = Transpose <perm = [0, 2, 1, 3]> (rotated)
    flat = Reshape (back, joined)
    more = {more}
    y = Mul (flat, more)
}}
"""
PLAIN = {"half": "4", "x": "Tanh (turned)", "angles": "angles", "more": "Cast <to = 1> (scale)"}


def fused(**changes: str) -> tuple[int, Counter[str]]:
    """Number of rotations fused and the operators left, once the outputs were compared."""
    before = onnx.parser.parse_model(MODEL.format(**PLAIN | changes))
    before = onnx.shape_inference.infer_shapes(before, data_prop=True)
    model = ir.serde.deserialize_model(before)
    number = fuse_rotary(model.graph)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    draw = np.random.default_rng(0)
    feeds = {"q": draw.standard_normal((2, 5, 24)), "angles": draw.standard_normal((2, 5, 4))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    found = [
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for proto in (before, ir.serde.serialize_model(model))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-6)
    return number, Counter(node.op_type for node in model.graph)


def test_a_rotation_of_transposed_heads_reads_what_the_layer_gives() -> None:
    number, left = fused(x="Transpose <perm = [0, 2, 1, 3]> (heads)")
    assert number == 1
    assert not {"Neg", "Transpose"} & set(left)
    assert left["RotaryEmbedding"] == 1


def test_a_rotation_behind_a_norm_of_heads_is_fused_where_it_is() -> None:
    number, left = fused(x="Tanh (turned)")
    assert (number, left["Transpose"], left["RotaryEmbedding"], left["Neg"]) == (1, 2, 1, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"half": "3"},
        {"angles": "others"},
        {"more": "ReduceMax (swapped)"},
    ],
    ids=["other parts", "halves that differ", "a part that is read elsewhere"],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    number, left = fused(**changes)
    assert number == 0
    assert left["RotaryEmbedding"] == 0
