"""The branches of convolutions with groups = 1, authored as in `factored_functions` and `banked_functions`.

Up and Down say which factor there is where only one is: Up has no `down`, Down no `up` (see `slots.Target.factors`).
"""

from collections.abc import Sequence

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from tpeft_deploy.exporters.branches.functions.factored import DOMAIN

__all__ = ["CONVS"]

_tpeft = Opset(DOMAIN, 1)

# The bodies below are onnxscript, not Python: ONNX's types are not Python's, and mypy would check the wrong ones.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def TuckerConv(y, x, down, core, up, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]):
    """1x1 conv down, core conv with the base's geometry, 1x1 conv up; zero padding commutes with the first."""
    inner = op.Conv(op.Conv(x, down), core, strides=strides, pads=pads, dilations=dilations)
    return y + op.Conv(inner, up)


@script(_tpeft, default_opset=op)
def TuckerConvUp(y, x, core, up, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]):
    """A LoRA: core conv (R_o, I, *K) with the base's geometry, 1x1 conv up."""
    return y + op.Conv(op.Conv(x, core, strides=strides, pads=pads, dilations=dilations), up)


@script(_tpeft, default_opset=op)
def TuckerConvDown(y, x, down, core, strides: Sequence[int], pads: Sequence[int], dilations: Sequence[int]):
    """1x1 conv down, core conv (O, R_i, *K) with the base's geometry."""
    return y + op.Conv(op.Conv(x, down), core, strides=strides, pads=pads, dilations=dilations)


@script(_tpeft, default_opset=op)
def TuckerConvTranspose(
    y,
    x,
    down,
    core,
    up,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConv with a transposed core conv; core (R_i, R_o, *K)."""
    inner = op.ConvTranspose(
        op.Conv(x, down), core, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )
    return y + op.Conv(inner, up)


@script(_tpeft, default_opset=op)
def TuckerConvTransposeUp(
    y,
    x,
    core,
    up,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConvUp with a transposed core conv; core (I, R_o, *K)."""
    inner = op.ConvTranspose(x, core, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding)
    return y + op.Conv(inner, up)


@script(_tpeft, default_opset=op)
def TuckerConvTransposeDown(
    y,
    x,
    down,
    core,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConvDown with a transposed core conv; core (R_i, O, *K)."""
    inner = op.ConvTranspose(
        op.Conv(x, down), core, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )
    return y + inner


@script(_tpeft, default_opset=op)
def BankedConv(
    y,
    x,
    adapter_index,
    downs,
    cores,
    ups,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As TuckerConv, row n with adapter `adapter_index[n]`; banks (T, ...), window (K, 1, *K) one-hot, K = K1 K2 ..

    The window is a conv that copies the K taps of one channel (im2col), so the core becomes a batched matrix
    product of dynamic rank.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    one = op.Constant(value_ints=[1])
    down = op.Unsqueeze(op.Reshape(op.Gather(downs, adapter_index), flat), one)  # (N, 1, R_i, I)
    inner = op.MatMul(down, split)  # (N, m, R_i, P)
    planes = op.Reshape(inner, op.Concat(rest, one, op.Shape(x, start=2), axis=0))
    taps = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B R_i, K, *P')
    core = op.Unsqueeze(op.Reshape(op.Gather(cores, adapter_index), flat), one)  # (N, 1, R_o, R_i K)
    patches = op.Reshape(taps, op.Concat(op.Shape(inner, end=2), op.Shape(core, start=3), rest, axis=0))
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, op.MatMul(core, patches)), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvUp(
    y,
    x,
    adapter_index,
    cores,
    ups,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As TuckerConvUp, row n with adapter `adapter_index[n]`; cores (T, R_o, I, *K), window (1, K, *K) one-hot.

    The core is a batched matrix product that computes the K taps of each of its R_o channels where they are read, so
    that no patches of the I channels are laid out; the window moves every tap to where it is added.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    one = op.Constant(value_ints=[1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    picked = op.Reshape(op.Gather(cores, adapter_index), op.Constant(value_ints=[0, 0, 0, -1]))
    last = op.Transpose(picked, perm=[0, 1, 3, 2])  # (N, R_o, K, I)
    core = op.Reshape(last, op.Concat(rows, one, rest, op.Shape(last, start=3), axis=0))  # (N, 1, R_o K, I)
    taps = op.MatMul(core, split)  # (N, m, R_o K, P)
    planes = op.Reshape(taps, op.Concat(rest, op.Shape(window, start=1, end=2), op.Shape(x, start=2), axis=0))
    sums = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B R_o, 1, *P')
    inner = op.Reshape(sums, op.Concat(op.Shape(taps, end=2), op.Shape(cores, start=1, end=2), rest, axis=0))
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, inner), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvUpPatches(
    y,
    x,
    adapter_index,
    cores,
    ups,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As BankedConvUp for few input channels; window as in BankedConv.

    The K taps of the I channels are laid out where the conv reads them: I K P' numbers, in place of R_o K P.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    one = op.Constant(value_ints=[1])
    planes = op.Reshape(x, op.Concat(rest, one, op.Shape(x, start=2), axis=0))
    taps = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B I, K, *P')
    core = op.Unsqueeze(op.Reshape(op.Gather(cores, adapter_index), flat), one)  # (N, 1, R_o, I K)
    each = op.Shape(x, end=1) / rows
    patches = op.Reshape(taps, op.Concat(rows, each, op.Shape(core, start=3), rest, axis=0))  # (N, m, I K, P')
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, op.MatMul(core, patches)), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvDown(
    y,
    x,
    adapter_index,
    downs,
    cores,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
):
    """As TuckerConvDown, row n with adapter `adapter_index[n]`; window as in BankedConv."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    one = op.Constant(value_ints=[1])
    down = op.Unsqueeze(op.Reshape(op.Gather(downs, adapter_index), flat), one)  # (N, 1, R_i, I)
    inner = op.MatMul(down, split)  # (N, m, R_i, P)
    planes = op.Reshape(inner, op.Concat(rest, one, op.Shape(x, start=2), axis=0))
    taps = op.Conv(planes, window, strides=strides, pads=pads, dilations=dilations)  # (B R_i, K, *P')
    core = op.Unsqueeze(op.Reshape(op.Gather(cores, adapter_index), flat), one)  # (N, 1, O, R_i K)
    patches = op.Reshape(taps, op.Concat(op.Shape(inner, end=2), op.Shape(core, start=3), rest, axis=0))
    return y + op.Reshape(op.MatMul(core, patches), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvTranspose(
    y,
    x,
    adapter_index,
    downs,
    cores,
    ups,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConvTranspose, row n with adapter `adapter_index[n]`; cores (T, R_i, R_o, *K).

    The core is a batched matrix product that computes the K taps of each channel; the window, a transposed conv with
    a one-hot kernel, adds them where they belong.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    one = op.Constant(value_ints=[1])
    down = op.Unsqueeze(op.Reshape(op.Gather(downs, adapter_index), flat), one)  # (N, 1, R_i, I)
    inner = op.MatMul(down, split)  # (N, m, R_i, P)
    core = op.Transpose(op.Reshape(op.Gather(cores, adapter_index), flat), perm=[0, 2, 1])  # (N, R_o K, R_i)
    taps = op.MatMul(op.Unsqueeze(core, one), inner)  # (N, m, R_o K, P)
    planes = op.Reshape(taps, op.Concat(rest, op.Shape(window, end=1), op.Shape(x, start=2), axis=0))
    sums = op.ConvTranspose(
        planes, window, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )  # (B R_o, 1, *P')
    counts = op.Concat(op.Shape(inner, end=2), op.Shape(cores, start=2, end=3), rest, axis=0)
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, op.Reshape(sums, counts)), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvTransposeUp(
    y,
    x,
    adapter_index,
    cores,
    ups,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConvTransposeUp, row n with adapter `adapter_index[n]`; window as in BankedConvTranspose."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    one = op.Constant(value_ints=[1])
    core = op.Transpose(op.Reshape(op.Gather(cores, adapter_index), flat), perm=[0, 2, 1])  # (N, R_o K, I)
    taps = op.MatMul(op.Unsqueeze(core, one), split)  # (N, m, R_o K, P)
    planes = op.Reshape(taps, op.Concat(rest, op.Shape(window, end=1), op.Shape(x, start=2), axis=0))
    sums = op.ConvTranspose(
        planes, window, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )  # (B R_o, 1, *P')
    counts = op.Concat(op.Shape(split, end=2), op.Shape(cores, start=2, end=3), rest, axis=0)
    up = op.Unsqueeze(op.Reshape(op.Gather(ups, adapter_index), flat), one)  # (N, 1, O, R_o)
    return y + op.Reshape(op.MatMul(up, op.Reshape(sums, counts)), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedConvTransposeDown(
    y,
    x,
    adapter_index,
    downs,
    cores,
    window,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
):
    """As TuckerConvTransposeDown, row n with adapter `adapter_index[n]`; window as in BankedConvTranspose."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    pixels = op.Reshape(x, flat)
    split = op.Reshape(pixels, op.Concat(rows, rest, op.Shape(pixels, start=1), axis=0))  # (N, m, I, P)
    one = op.Constant(value_ints=[1])
    down = op.Unsqueeze(op.Reshape(op.Gather(downs, adapter_index), flat), one)  # (N, 1, R_i, I)
    inner = op.MatMul(down, split)  # (N, m, R_i, P)
    core = op.Transpose(op.Reshape(op.Gather(cores, adapter_index), flat), perm=[0, 2, 1])  # (N, O K, R_i)
    taps = op.MatMul(op.Unsqueeze(core, one), inner)  # (N, m, O K, P)
    planes = op.Reshape(taps, op.Concat(rest, op.Shape(window, end=1), op.Shape(x, start=2), axis=0))
    sums = op.ConvTranspose(
        planes, window, strides=strides, pads=pads, dilations=dilations, output_padding=output_padding
    )  # (B O, 1, *P')
    return y + op.Reshape(sums, op.Shape(y))


CONVS: dict[str, OnnxFunction] = {
    f.name: f
    for f in (
        TuckerConv,
        TuckerConvUp,
        TuckerConvDown,
        TuckerConvTranspose,
        TuckerConvTransposeUp,
        TuckerConvTransposeDown,
        BankedConv,
        BankedConvUp,
        BankedConvUpPatches,
        BankedConvDown,
        BankedConvTranspose,
        BankedConvTransposeUp,
        BankedConvTransposeDown,
    )
}
