"""Banked convs with a weight per row, without control flow: CUDA graphs cannot record a Scan.

A window, a conv that copies the K taps of one channel (im2col), turns the conv into a batched matrix product; it takes
K times the memory of the activation.  Letters as in `banked`; G groups, window (K, 1, *K) one-hot, K = K1 K2 ..
"""

from collections.abc import Sequence

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from tpeft_deploy.exporters.branches.functions.factored import DOMAIN

__all__ = ["WINDOWED"]

_tpeft = Opset(DOMAIN, 1)

# As in `banked`, the bodies are onnxscript, and mypy would check the wrong types.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def WindowedGroupedConv(
    x,
    weight,
    adapter_index,
    change,
    window,
    groups,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As BankedGroupedConv; groups (1,)."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    planes = op.Reshape(x, op.Concat(rest, one, op.Shape(x, start=2), axis=0))
    taps = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B I, K, *P')
    pixels = op.Reshape(taps, op.Constant(value_ints=[0, 0, -1]))
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), rest, axis=0))
    size = op.Shape(flat, start=1)
    weights = op.Reshape(flat + change, op.Concat(rows, one, groups, rest, size, axis=0))  # (N, 1, G, O / G, I K / G)
    patches = op.Reshape(pixels, op.Concat(rows, rest, groups, size, op.Shape(pixels, start=2), axis=0))
    shape = op.Concat(rest, op.Shape(weight, end=1), op.Shape(taps, start=2), axis=0)
    return op.Reshape(op.MatMul(weights, patches), shape)


@script(_tpeft, default_opset=op)
def WindowedWholeConv(
    x,
    adapter_index,
    values,
    window,
    groups,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As BankedWholeConv; groups (1,)."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    planes = op.Reshape(x, op.Concat(rest, one, op.Shape(x, start=2), axis=0))
    taps = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B I, K, *P')
    pixels = op.Reshape(taps, op.Constant(value_ints=[0, 0, -1]))
    flat = op.Reshape(op.Gather(values, adapter_index), op.Constant(value_ints=[0, 0, -1]))
    size = op.Shape(flat, start=2)
    weights = op.Reshape(flat, op.Concat(rows, one, groups, rest, size, axis=0))  # (N, 1, G, O / G, I K / G)
    patches = op.Reshape(pixels, op.Concat(rows, rest, groups, size, op.Shape(pixels, start=2), axis=0))
    shape = op.Concat(rest, op.Shape(values, start=1, end=2), op.Shape(taps, start=2), axis=0)
    return op.Reshape(op.MatMul(weights, patches), shape)


@script(_tpeft, default_opset=op)
def WindowedGroupedConvTranspose(
    x,
    weight,
    adapter_index,
    change,
    window,
    groups,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As BankedGroupedConvTranspose; groups (1,)."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    pixels = op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), rest, axis=0))
    one = op.Constant(value_ints=[1])
    split = op.Concat(rows, one, groups, rest, op.Shape(flat, start=1), axis=0)
    weights = op.Transpose(op.Reshape(flat + change, split), perm=[0, 1, 2, 4, 3])  # (N, 1, G, O K / G, I / G)
    per_group = op.Shape(weight, end=1) / groups
    inner = op.Reshape(pixels, op.Concat(rows, rest, groups, per_group, op.Shape(pixels, start=2), axis=0))
    taps = op.MatMul(weights, inner)  # (N, m, G, O K / G, P)
    planes = op.Reshape(taps, op.Concat(rest, op.Shape(window, end=1), op.Shape(x, start=2), axis=0))
    sums = op.ConvTranspose(
        planes, window, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )  # (B O, 1, *P')
    outputs = op.Shape(weight, start=1, end=2) * groups
    return op.Reshape(sums, op.Concat(rest, outputs, op.Shape(sums, start=2), axis=0))


@script(_tpeft, default_opset=op)
def BankedPlaces(changes):
    """The place (1, L, O) of every entry of a row of changes (N, L, O)."""
    sizes = op.Shape(changes, start=1)
    count = op.ReduceProd(sizes, keepdims=0)
    places = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    return op.Reshape(places, op.Concat(op.Constant(value_ints=[1]), sizes, axis=0))


@script(_tpeft, default_opset=op)
def BankedLayout(changes, places):
    """The entries of changes (N, L, O) in another layout, that of places: (N, *places)."""
    flat = op.Reshape(changes, op.Concat(op.Shape(changes, end=1), op.Constant(value_ints=[-1]), axis=0))
    return op.Gather(flat, places, axis=1)


WINDOWED: dict[str, OnnxFunction] = {
    f.name: f
    for f in (WindowedGroupedConv, WindowedWholeConv, WindowedGroupedConvTranspose, BankedPlaces, BankedLayout)
}
