"""Banked convs whose taps Col2Im adds, in place of a conv with a one-hot window; authored as in `conv`.

ONNX Runtime's CPU kernel takes a twentieth of the window's time: a conv of one output channel computes sixteen.  CUDA
has no Col2Im.
"""

from collections.abc import Sequence

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from tpeft_deploy.exporters.branches.functions.factored import DOMAIN

__all__ = ["COL2IM"]

_tpeft = Opset(DOMAIN, 1)

# As in `conv`, the bodies are onnxscript, and mypy would check the wrong types.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def BankedConvUpCol2Im(y, x, adapter_index, cores, ups, pads: Sequence[int], dilations: Sequence[int]):
    """As BankedConvUp with strides of 1; pads are (K - 1) dilation - pad of the base's conv.

    A tap of the base's conv moves the opposite way of one of Col2Im, so that the K taps are computed in reverse order.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    one = op.Constant(value_ints=[1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    picked = op.Reshape(op.Gather(cores, adapter_index), op.Constant(value_ints=[0, 0, 0, -1]))
    first = op.Constant(value_ints=[-(2**31)])
    turned = op.Slice(picked, rest, first, op.Constant(value_ints=[3]), rest)
    last = op.Transpose(turned, perm=[0, 1, 3, 2])  # (N, R_o, K, I)
    core = op.Reshape(last, op.Concat(rows, one, rest, op.Shape(last, start=3), axis=0))  # (N, 1, R_o K, I)
    taps = op.MatMul(core, split)  # (N, m, R_o K, P)
    columns = op.Reshape(taps, op.Concat(rest, op.Shape(taps, start=2), axis=0))
    sums = op.Col2Im(columns, op.Shape(y, start=2), op.Shape(cores, start=3), dilations=dilations, pads=pads)
    inner = op.Reshape(sums, op.Concat(op.Shape(taps, end=2), op.Shape(cores, start=1, end=2), rest, axis=0))
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, inner), op.Shape(y))


COL2IM: dict[str, OnnxFunction] = {f.name: f for f in (BankedConvUpCol2Im,)}
