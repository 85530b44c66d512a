"""The functions of `exporters/branches/merged.py`: branches of linear layers on images of a fixed size.

Letters as in `functions/banked.py`.  split is [-1, I] and shape the result's, with -1 for its rows, so that no node
computes them.
"""

from collections.abc import Sequence

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from tpeft_deploy.exporters.branches.functions.factored import DOMAIN

__all__ = ["MERGED"]

_tpeft = Opset(DOMAIN, 1)

# The bodies below are onnxscript, not Python: ONNX's types are not Python's, and mypy would check the wrong ones.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def MergedLinear(x, weight, down, up):
    """x (W + dW); x (B, .., I), weight (I, O), down (I, R), up (R, O)."""
    return op.MatMul(x, weight + op.MatMul(down, up))


@script(_tpeft, default_opset=op)
def BankedMergedLinear(x, weight, adapter_index, downs, ups, split: Sequence[int], shape: Sequence[int]):
    """As MergedLinear, row n with adapter `adapter_index[n]`; downs (T, I, R), ups (T, R, O)."""
    rows = op.Reshape(x, op.Concat(op.Shape(adapter_index), op.Constant(value_ints=split), axis=0))
    weights = weight + op.MatMul(op.Gather(downs, adapter_index), op.Gather(ups, adapter_index))
    return op.Reshape(op.MatMul(rows, weights), op.Constant(value_ints=shape))


@script(_tpeft, default_opset=op)
def BankedSizedLinear(y, x, adapter_index, downs, ups, split: Sequence[int], shape: Sequence[int]):
    """As BankedLinear."""
    rows = op.Reshape(x, op.Concat(op.Shape(adapter_index), op.Constant(value_ints=split), axis=0))
    inner = op.MatMul(rows, op.Gather(downs, adapter_index))
    return y + op.Reshape(op.MatMul(inner, op.Gather(ups, adapter_index)), op.Constant(value_ints=shape))


MERGED: dict[str, OnnxFunction] = {f.name: f for f in (MergedLinear, BankedMergedLinear, BankedSizedLinear)}
