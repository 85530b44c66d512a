"""The factored branches as ONNX model-local functions of domain `tpeft`, authored with onnxscript.

`y` is what the base computes at the consumer; every function returns what the adapted base computes there.
ONNX Runtime inlines the functions when it loads the model.
"""

from collections.abc import Sequence

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

__all__ = ["BLOCKS", "DOMAIN", "FACTORED", "MICROSOFT"]

DOMAIN = "tpeft"
MICROSOFT = "com.microsoft"  # ONNX Runtime's fused operators, on every device
BLOCKS = "com.microsoft.nchwc"  # ONNX Runtime's internal operators, on the CPU only
_tpeft = Opset(DOMAIN, 1)
_blocks = Opset(BLOCKS, 1)
_microsoft = Opset(MICROSOFT, 1)

# The bodies below are onnxscript, not Python: ONNX's types are not Python's, and mypy would check the wrong ones.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def TuckerLinear(y, x, down, up):
    """y + (x down) up; x (B, .., I), down (I, R), up (R, O)."""
    return y + op.MatMul(op.MatMul(x, down), up)


@script(_tpeft, default_opset=op)
def StackedLinear(x, weights, down, up, diagonal):
    """x W + (x down^T) U (.., G O) of the G layers that read x (.., I); weights (I, G O), down (1, G, R, I).

    U (G R, G O) has on its diagonal the factors of up (1, G, R, O); diagonal (G, 1, G, 1) is an identity.
    """
    last = op.Constant(value_ints=[-1])
    downs = op.Reshape(down, op.Concat(last, op.Shape(x, start=-1), axis=0))
    ups = op.Mul(op.Unsqueeze(up, op.Constant(value_ints=[3])), diagonal)
    change = op.MatMul(
        _microsoft.FusedMatMul(x, downs, transB=1),
        op.Reshape(ups, op.Concat(last, op.Shape(weights, start=-1), axis=0)),
    )
    return op.MatMul(x, weights) + change


@script(_tpeft, default_opset=op)
def TuckerLookup(y, ids, down, up):
    """y + (up^T)[ids] down^T; ids of any shape, down (I, R), up (R, V)."""
    rows = op.Transpose(op.Gather(up, op.Reshape(ids, op.Constant(value_ints=[-1])), axis=1))
    return y + op.Reshape(op.MatMul(rows, op.Transpose(down)), op.Shape(y))


@script(_tpeft, default_opset=op)
def TuckerExpertsLeft(y, x, experts, up, down):
    """y + up[e] (down[e] x) of each token's own expert e; up (E, O, R), down (E, R, I), x (tokens, I, 1)."""
    own = op.Reshape(experts, op.Constant(value_ints=[-1]))
    return y + op.MatMul(op.Gather(up, own), op.MatMul(op.Gather(down, own), x))


@script(_tpeft, default_opset=op)
def TuckerExpertsRight(y, x, experts, up, down):
    """y + (x up[e]) down[e] of each token's own expert e; up (E, I, R), down (E, R, O), x (tokens, 1, I)."""
    own = op.Reshape(experts, op.Constant(value_ints=[-1]))
    return y + op.MatMul(op.MatMul(x, op.Gather(up, own)), op.Gather(down, own))


@script(_tpeft, default_opset=op)
def TuckerGain(y, gain, shape: Sequence[int]):
    """y * gain, its C factors reshaped to `shape` to broadcast against y."""
    return y * op.Reshape(gain, op.Constant(value_ints=shape))


@script(_tpeft, default_opset=op)
def TuckerChange(up, core):
    """The flat change (.., O, I K1 ..) of a weight; up (.., O, R_o), core (.., R_o, I K1 ..)."""
    return op.MatMul(up, core)


@script(_tpeft, default_opset=op)
def TuckerInputs(down, core):
    """The core (.., R_o, I K1 ..) without its input factor; down (.., I, R_i), core (.., R_o, R_i, K1 ..)."""
    whole = op.MatMul(op.Unsqueeze(down, op.Constant(value_ints=[-3])), core)
    return op.Reshape(whole, op.Concat(op.Shape(core, end=-2), op.Constant(value_ints=[-1]), axis=0))


@script(_tpeft, default_opset=op)
def TuckerWeight(weight, change):
    """W + dW; change (O, I K1 ..), or one zero."""
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), op.Constant(value_ints=[-1]), axis=0))
    return op.Reshape(flat + change, op.Shape(weight))


@script(_tpeft, default_opset=op)
def TuckerDepthwise(
    x,
    weight,
    bias,
    change,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    last: int,
):
    """A depthwise conv with weight W + dW, in the CPU's channel-blocked layout; `last` asks for (B, H, W, C)."""
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), op.Constant(value_ints=[-1]), axis=0))
    whole = op.Reshape(flat + change, op.Shape(weight))
    # A depthwise weight in blocked order is laid out like an image (1, C, k, k) in blocked order.
    blocked = op.Reshape(_blocks.ReorderInput(op.Transpose(whole, perm=[1, 0, 2, 3])), op.Shape(weight))
    y = _blocks.Conv(
        _blocks.ReorderInput(x),
        blocked,
        bias,
        kernel_shape=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=group,
    )
    return _blocks.ReorderOutput(y, channels=group, channels_last=last)


@script(_tpeft, default_opset=op)
def TuckerResized(up, value):
    """A factor (R, O) cut or filled up with zeros to (R, C); value (C, ..) is what a task has in the weight's place."""
    size = op.Shape(value, end=1)
    zeros = op.Expand(op.CastLike(op.Constant(value_float=0.0), up), op.Concat(op.Shape(up, end=-1), size, axis=0))
    start, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[-1])
    return op.Slice(op.Concat(up, zeros, axis=-1), start, size, last)


FACTORED: dict[str, OnnxFunction] = {
    f.name: f
    for f in (
        StackedLinear,
        TuckerLinear,
        TuckerLookup,
        TuckerExpertsLeft,
        TuckerExpertsRight,
        TuckerChange,
        TuckerInputs,
        TuckerWeight,
        TuckerDepthwise,
        TuckerGain,
        TuckerResized,
    )
}
