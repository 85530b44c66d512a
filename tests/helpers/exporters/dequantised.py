"""The oracle of quantised bundles: the torch module with the values that their few bits stand for."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from tpeft_deploy.tucker import Array


def dequantised_module(module: nn.Module, graph: Path) -> nn.Module:
    """A copy of a module with the weights that a graph's MatMulNBits and DequantizeLinear nodes hold.

    Decoded here from the file by the operators' specification, without any code of the export.
    """
    model = onnx.load(graph)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    copy, found = deepcopy(module), 0
    parameters = dict(copy.named_parameters())
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "DequantizeLinear"):
            continue
        first, second = node.input[-2:]
        codes, scales, parameter = held[first], held[second], parameters[second.removesuffix(".scales")]
        if node.op_type == "DequantizeLinear":
            value = codes * scales.reshape(-1, *[1] * (codes.ndim - 1))
        else:
            value = _matrix(node, codes, scales)
            owner = copy.get_submodule(second.removesuffix(".weight.scales"))
            value = value.T if type(owner).__name__ == "Conv1D" else value
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(value, np.float32)))
        found += 1
    assert found
    return copy


def _matrix(node: onnx.NodeProto, codes: Array, scales: Array) -> Array:
    options = {attribute.name: attribute.i for attribute in node.attribute}
    blocks = codes.reshape(options["N"], -1, codes.shape[-1]).astype(np.int32)
    if options["bits"] == 4:
        blocks = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:2], -1)
    wide = (blocks - 2 ** (options["bits"] - 1)) * scales.reshape(options["N"], -1, 1)
    matrix: Array = wide.reshape(options["N"], -1)[:, : options["K"]]
    return matrix
