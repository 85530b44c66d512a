"""The choice graph of a decoder: the largest logits of each row, and sums over the whole row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.oracle.compare import open_session

__all__ = ["check", "choice_graph"]

_OPSET = 18
_MOST = 128  # logits of a row that are kept; the nucleus of most rows is smaller, as is top-k in practice
_SHARE = 4  # a logit and its token take 12 bytes, the logit alone 2 or 4
_LIMIT = 1e-6  # relative error of the sums


def choice_graph(vocabulary: int, dtype: ir.DataType) -> ir.Model:
    """Make the graph; the kernels of all operators exist on CPU and CUDA.

    Ports are those that `DecoderPorts.choice` lists.  Which of equal logits are kept, and their order, depends on the
    kernel.

    Args:
        vocabulary: number of tokens.
        dtype: dtype of the logits.
    """
    kept = max(1, min(_MOST, vocabulary // _SHARE))
    logits = ir.val("logits", dtype, ["rows", vocabulary])
    temperatures = ir.val("temperatures", ir.DataType.FLOAT, ["rows", "sums"])
    numbers = {"kept": [kept], "zero": [0], "one": [1], "two": [2], "last": [-1]}
    constants = {
        name: ir.val(name, const_value=ir.tensor(np.array(value), name=name)) for name, value in numbers.items()
    }
    nodes: list[ir.Node] = []

    def add(operator: str, *inputs: ir.Value, outputs: int = 1, **attributes: int) -> ir.Node:
        nodes.append(ir.node(operator, inputs, attributes, num_outputs=outputs))
        return nodes[-1]

    whole = add("Cast", logits, to=int(ir.DataType.FLOAT)).outputs[0] if dtype != ir.DataType.FLOAT else logits
    values, tokens = add("TopK", whole, constants["kept"], outputs=2, axis=-1, largest=1, sorted=1).outputs
    first = add("Slice", values, constants["zero"], constants["one"], constants["one"]).outputs[0]
    divisors = add("Unsqueeze", temperatures, constants["two"]).outputs[0]
    # Divided first and subtracted then, as `sampling.tempered` does, so that float32 rounds alike.
    parts = [add("Unsqueeze", each, constants["one"]).outputs[0] for each in (whole, first)]
    scaled, largest = (add("Div", part, divisors).outputs[0] for part in parts)
    exponentials = add("Exp", add("Sub", scaled, largest).outputs[0]).outputs[0]
    wide = add("Cast", exponentials, to=int(ir.DataType.DOUBLE)).outputs[0]
    sums = add("ReduceSum", wide, constants["last"], keepdims=0).outputs[0]
    found: dict[str, tuple[ir.Value, ir.DataType, str | int]] = {
        "top_logits": (values, ir.DataType.FLOAT, kept),
        "top_tokens": (tokens, ir.DataType.INT64, kept),
        "sums": (sums, ir.DataType.DOUBLE, "sums"),
    }
    for name, (value, kind, size) in found.items():
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(["rows", size])
    outputs = [value for value, _, _ in found.values()]
    graph = ir.Graph(
        [logits, temperatures], outputs, nodes=nodes, initializers=list(constants.values()), opset_imports={"": _OPSET}
    )
    graph.name = "choice"
    return ir.Model(graph, ir_version=10)


def check(file: Path, vocabulary: int, dtype: ir.DataType) -> None:
    """Compare a choice graph with numpy, on random logits and on equal ones.

    Raises:
        NotEquivalent: they differ.
    """
    random = np.random.default_rng(0)
    logits = (3 * random.standard_normal((3, vocabulary))).astype(np.float32)
    logits[1, ::2] = logits.max()
    if dtype == ir.DataType.BFLOAT16:
        stored = (logits.view(np.uint32) >> 16).astype(np.uint16)
        logits = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = logits.astype(dtype.numpy())
        logits = stored.astype(np.float32)
    temperatures = np.array([[1, 0.7], [1, 1], [1, 1.6]], np.float32)
    feeds = {
        "logits": onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(stored, int(dtype)),
        "temperatures": onnxruntime.OrtValue.ortvalue_from_numpy(temperatures),
    }
    found = open_session(file).run_with_ort_values(["top_logits", "top_tokens", "sums"], feeds)
    values, tokens, sums = (value.numpy() for value in found)
    expected = -np.sort(-logits, -1)[:, : values.shape[1]]
    scaled = logits[:, None] / temperatures[:, :, None]
    totals = np.exp((scaled - scaled.max(-1, keepdims=True)).astype(np.float64)).sum(-1)
    same = np.array_equal(values, expected) and np.array_equal(np.take_along_axis(logits, tokens, -1), expected)
    error = float(np.abs(sums / totals - 1).max())
    if not same or not error <= _LIMIT:
        got = f"sums with a relative error of {error:.2g}" if same else "other logits or tokens"
        raise NotEquivalent(f"check {file.name}", expected="the largest logits of numpy, and their sums", got=got)
