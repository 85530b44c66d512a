"""The banked branches as ONNX model-local functions of domain `tpeft`, authored with onnxscript.

Letters: B rows at the consumer (a multiple of the batch, batch-major), N length of `adapter_index` (1: one adapter
for all rows; or the batch: one adapter per row), T rows in a bank, m = B / N, P product of the spatial sizes.
`y` is what the base computes at the consumer; every function returns what the adapted base computes there.
ONNX Runtime inlines the functions when it loads the model.
"""

from collections.abc import Sequence

from onnxscript import graph, script
from onnxscript import opset20 as op
from onnxscript.values import OnnxFunction, Opset

from tpeft_deploy.exporters.branches.functions.factored import BLOCKS, DOMAIN, MICROSOFT

__all__ = ["BANKED"]

_tpeft = Opset(DOMAIN, 1)
_blocks = Opset(BLOCKS, 1)
_microsoft = Opset(MICROSOFT, 1)

# The bodies below are onnxscript, not Python: ONNX's types are not Python's, and mypy would check the wrong ones.
# mypy: ignore-errors


@script(_tpeft, default_opset=op)
def BankedLinear(y, x, adapter_index, downs, ups):
    """As TuckerLinear, row n with adapter `adapter_index[n]`; downs (T, I, R), ups (T, R, O)."""
    split = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), op.Shape(x, start=-1), axis=0)
    inner = op.MatMul(op.Reshape(x, split), op.Gather(downs, adapter_index))
    return y + op.Reshape(op.MatMul(inner, op.Gather(ups, adapter_index)), op.Shape(y))


@script(_tpeft, default_opset=op)
def RowsLinear(y, x, downs, ups):
    """As BankedLinear with rows that are gathered already; downs (N, I, R), ups (N, R, O)."""
    split = op.Concat(op.Shape(downs, end=1), op.Constant(value_ints=[-1]), op.Shape(x, start=-1), axis=0)
    return y + op.Reshape(op.MatMul(op.MatMul(op.Reshape(x, split), downs), ups), op.Shape(y))


@script(_tpeft, default_opset=op)
def PackedDown(x, adapter_index, down):
    """The inner activations (N, G, R, m) of the G branches that read x, of x (.., I) and down (N, 1, G, R, I)."""
    split = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), op.Shape(x, start=-1), axis=0)
    inner = _microsoft.FusedMatMul(op.Reshape(down, split), op.Reshape(x, split), transB=1)
    branches = op.Concat(op.Shape(adapter_index), op.Shape(down, start=2, end=4), op.Shape(inner, start=-1), axis=0)
    return op.Reshape(inner, branches)


@script(_tpeft, default_opset=op)
def PackedUp(inner, up):
    """The changes (N, G, m, O) of G branches, of inner (N, G, R, m) and up (N, 1, G, R, O)."""
    return _microsoft.FusedMatMul(inner, op.Squeeze(up, op.Constant(value_ints=[1])), transA=1)


@script(_tpeft, default_opset=op)
def PackedSum(y, change):
    """y + a branch's change (N, 1, m, O)."""
    return y + op.Reshape(change, op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedLinearMinor(y, x, adapter_index, downs, ups):
    """As BankedLinear where the batch is the innermost of x's leading axes (sequence-major layers)."""
    rest = op.Constant(value_ints=[-1])
    split = op.Concat(rest, op.Shape(adapter_index), op.Shape(x, start=-1), axis=0)
    rows = op.Transpose(op.Reshape(x, split), perm=[1, 0, 2])  # (N, m, I)
    change = op.MatMul(op.MatMul(rows, op.Gather(downs, adapter_index)), op.Gather(ups, adapter_index))
    return y + op.Reshape(op.Transpose(change, perm=[1, 0, 2]), op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedLinearShared(y, x, adapter_index, downs, ups):
    """As BankedLinear for an x (1, m, I) that all rows share: the result has one row per adapter."""
    return y + op.MatMul(op.MatMul(x, op.Gather(downs, adapter_index)), op.Gather(ups, adapter_index))


@script(_tpeft, default_opset=op)
def BankedShared(x, adapter_index, downs, ups):
    """The change alone for an x (1, m, I) that all rows share: (N, m, O)."""
    return op.MatMul(op.MatMul(x, op.Gather(downs, adapter_index)), op.Gather(ups, adapter_index))


@script(_tpeft, default_opset=op)
def BankedRepeated(y, changes):
    """y (B H, L, D), a shared result repeated for every row, + changes (N, H, L, D), each adapter's own."""
    flat = op.Reshape(changes, op.Concat(op.Constant(value_ints=[-1]), op.Shape(changes, start=2), axis=0))
    times = op.Shape(y, end=1) / op.Shape(flat, end=1)
    return y + op.Tile(flat, op.Concat(times, op.Constant(value_ints=[1, 1]), axis=0))


@script(_tpeft, default_opset=op)
def BankedSpread(values, x, adapter_index):
    """values (N, ..), one entry per adapter, repeated for every entry of x's first axis (B, ..), rows first."""
    entries = op.Shape(x, end=1)
    each = op.Concat(op.Shape(adapter_index), entries / op.Shape(adapter_index), op.Shape(values, start=1), axis=0)
    rows = op.Expand(op.Unsqueeze(values, op.Constant(value_ints=[1])), each)
    return op.Reshape(rows, op.Concat(entries, op.Shape(values, start=1), axis=0))


@script(_tpeft, default_opset=op)
def BankedLookup(y, ids, adapter_index, downs, ups):
    """As TuckerLookup, row n with adapter `adapter_index[n]`; downs (T, I, R), ups (T, R, V).

    Only the entries that are looked up are read: a row of `ups` may hold a whole vocabulary.
    """
    one = op.Constant(value_ints=[1])
    split = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), one, axis=0)
    zero, each = op.Constant(value_int=0), op.Constant(value_int=1)
    width = op.Squeeze(op.Shape(ups, start=2))
    size = op.Squeeze(op.Shape(ups, start=1, end=2)) * width
    words, total = op.Range(width, width + each, each), op.Range(size, size + each, each)  # a size without a copy
    places = op.Mod(op.Reshape(op.Cast(ids, to=7), split), words)  # (N, m, 1), -1 the last: never another adapter's
    first = op.Reshape(adapter_index, op.Constant(value_ints=[-1, 1, 1])) * total
    steps = op.Range(zero, size, width)
    rows = op.Gather(op.Reshape(ups, op.Constant(value_ints=[-1])), places + first + steps)  # (N, m, R)
    change = op.MatMul(rows, op.Transpose(op.Gather(downs, adapter_index), perm=[0, 2, 1]))
    return y + op.Reshape(change, op.Shape(y))


@script(_tpeft, default_opset=op)
def BankedLookupShared(y, ids, adapter_index, downs, ups):
    """As BankedLookup for ids (1, m) that all rows share: the result (N, m, I) has one row per adapter."""
    zero, each = op.Constant(value_int=0), op.Constant(value_int=1)
    width = op.Squeeze(op.Shape(ups, start=2))
    size = op.Squeeze(op.Shape(ups, start=1, end=2)) * width
    words, total = op.Range(width, width + each, each), op.Range(size, size + each, each)  # a size without a copy
    places = op.Mod(op.Reshape(op.Cast(ids, to=7), op.Constant(value_ints=[1, -1, 1])), words)
    first = op.Reshape(adapter_index, op.Constant(value_ints=[-1, 1, 1])) * total
    steps = op.Range(zero, size, width)
    rows = op.Gather(op.Reshape(ups, op.Constant(value_ints=[-1])), places + first + steps)
    return y + op.MatMul(rows, op.Transpose(op.Gather(downs, adapter_index), perm=[0, 2, 1]))


@script(_tpeft, default_opset=op)
def BankedExpertsLeft(y, x, experts, adapter_index, ups, downs):
    """As TuckerExpertsLeft, a token of row n with adapter `adapter_index[n]`; ups (T, E, O, R), downs (T, E, R, I)."""
    own = op.Reshape(experts, op.Constant(value_ints=[-1]))
    each = op.Concat(op.Shape(adapter_index), op.Shape(x, end=1) / op.Shape(adapter_index), axis=0)
    rows = op.Expand(op.Unsqueeze(adapter_index, op.Constant(value_ints=[1])), each)
    number = op.Shape(ups, start=1, end=2)
    # As in a lookup itself, -1 is the last expert: never another adapter's.
    places = op.Reshape(rows, op.Constant(value_ints=[-1])) * number + op.Mod(own, number)
    up = op.Reshape(ups, op.Concat(op.Constant(value_ints=[-1]), op.Shape(ups, start=2), axis=0))
    down = op.Reshape(downs, op.Concat(op.Constant(value_ints=[-1]), op.Shape(downs, start=2), axis=0))
    return y + op.MatMul(op.Gather(up, places), op.MatMul(op.Gather(down, places), x))


@script(_tpeft, default_opset=op)
def BankedExpertsRight(y, x, experts, adapter_index, ups, downs):
    """As TuckerExpertsRight, a token of row n with adapter `adapter_index[n]`; ups (T, E, I, R), downs (T, E, R, O)."""
    own = op.Reshape(experts, op.Constant(value_ints=[-1]))
    each = op.Concat(op.Shape(adapter_index), op.Shape(x, end=1) / op.Shape(adapter_index), axis=0)
    rows = op.Expand(op.Unsqueeze(adapter_index, op.Constant(value_ints=[1])), each)
    number = op.Shape(ups, start=1, end=2)
    # As in a lookup itself, -1 is the last expert: never another adapter's.
    places = op.Reshape(rows, op.Constant(value_ints=[-1])) * number + op.Mod(own, number)
    up = op.Reshape(ups, op.Concat(op.Constant(value_ints=[-1]), op.Shape(ups, start=2), axis=0))
    down = op.Reshape(downs, op.Concat(op.Constant(value_ints=[-1]), op.Shape(downs, start=2), axis=0))
    return y + op.MatMul(op.MatMul(x, op.Gather(up, places)), op.Gather(down, places))


@script(_tpeft, default_opset=op)
def BankedGroupedConv(
    x,
    weight,
    adapter_index,
    change,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    kernel_shape: Sequence[int],
):
    """A bias-free conv with weight W + dW of adapter `adapter_index[n]`: Scan over rows, one Conv each.

    change: (N, O, I K1 ..), or one zero per row.
    kernel_shape: ONNX Runtime cannot tell it of a weight that is replaced, and needs it for the shape of a row.
    """
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), rest, axis=0))
    weights = op.Reshape(flat + change, op.Concat(rows, op.Shape(weight), axis=0))
    split = op.Reshape(x, op.Concat(rows, rest, op.Shape(x, start=1), axis=0))

    @graph()
    def one_row(x_row, w_row):
        y_row = op.Conv(
            x_row, w_row, strides=strides, pads=pads, dilations=dilations, group=group, kernel_shape=kernel_shape
        )
        return y_row

    y = op.Scan(split, weights, body=one_row, num_scan_inputs=2)
    return op.Reshape(y, op.Concat(rest, op.Shape(y, start=2), axis=0))


@script(_tpeft, default_opset=op)
def BankedGroupedConvTranspose(
    x,
    weight,
    adapter_index,
    change,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[int],
    group: int,
    kernel_shape: Sequence[int],
):
    """As BankedGroupedConv for a transposed conv."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), rest, axis=0))
    weights = op.Reshape(flat + change, op.Concat(rows, op.Shape(weight), axis=0))
    split = op.Reshape(x, op.Concat(rows, rest, op.Shape(x, start=1), axis=0))

    @graph()
    def one_row(x_row, w_row):
        y_row = op.ConvTranspose(
            x_row,
            w_row,
            strides=strides,
            pads=pads,
            dilations=dilations,
            output_padding=output_padding,
            group=group,
            kernel_shape=kernel_shape,
        )
        return y_row

    y = op.Scan(split, weights, body=one_row, num_scan_inputs=2)
    return op.Reshape(y, op.Concat(rest, op.Shape(y, start=2), axis=0))


@script(_tpeft, default_opset=op)
def BankedDepthwise(
    x,
    weight,
    bias,
    adapter_index,
    change,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    last: int,
):
    """As TuckerDepthwise, row n with adapter `adapter_index[n]`: Scan over rows, one conv each."""
    rows = op.Shape(adapter_index)
    rest = op.Constant(value_ints=[-1])
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), rest, axis=0))
    planes = op.Reshape(flat + change, op.Concat(rows, op.Shape(weight, end=1), op.Shape(weight, start=2), axis=0))
    weights = op.Reshape(_blocks.ReorderInput(planes), op.Concat(rows, op.Shape(weight), axis=0))
    blocked = _blocks.ReorderInput(x)
    split = op.Reshape(blocked, op.Concat(rows, rest, op.Shape(blocked, start=1), axis=0))

    @graph()
    def one_row(x_row, w_row):
        y_row = _blocks.Conv(
            x_row,
            w_row,
            bias,
            kernel_shape=kernel,
            strides=strides,
            pads=pads,
            dilations=dilations,
            group=group,
        )
        return y_row

    y = op.Scan(split, weights, body=one_row, num_scan_inputs=2)
    y = op.Reshape(y, op.Concat(rest, op.Shape(y, start=2), axis=0))
    return _blocks.ReorderOutput(y, channels=group, channels_last=last)


@script(_tpeft, default_opset=op)
def BankedWholeConv(
    x,
    adapter_index,
    values,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
):
    """A bias-free conv with the whole weight values[adapter_index[n]]: Scan over rows, one Conv each."""
    split = op.Reshape(
        x, op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), op.Shape(x, start=1), axis=0)
    )

    @graph()
    def one_row(x_row, w_row):
        y_row = op.Conv(x_row, w_row, strides=strides, pads=pads, dilations=dilations, group=group)
        return y_row

    y = op.Scan(split, op.Gather(values, adapter_index), body=one_row, num_scan_inputs=2)
    return op.Reshape(y, op.Concat(op.Constant(value_ints=[-1]), op.Shape(y, start=2), axis=0))


@script(_tpeft, default_opset=op)
def BankedWeight(weight, change):
    """W + dW of the one adapter of this run: of a change (N, O, I K1 ..) with N > 1 the reshape fails."""
    flat = op.Reshape(weight, op.Concat(op.Shape(weight, end=1), op.Constant(value_ints=[-1]), axis=0))
    return op.Reshape(flat + change, op.Shape(weight))


@script(_tpeft, default_opset=op)
def BankedRows(adapter_index, values):
    """The rows values[adapter_index[n]] of a bank."""
    return op.Gather(values, adapter_index)


@script(_tpeft, default_opset=op)
def BankedDense(x, adapter_index, values):
    """x W^T with the whole weight W = values[adapter_index[n]]; x (B, .., I), values (T, C, I)."""
    split = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), op.Shape(x, start=-1), axis=0)
    weights = op.Transpose(op.Gather(values, adapter_index), perm=[0, 2, 1])
    y = op.MatMul(op.Reshape(x, split), weights)
    return op.Reshape(y, op.Concat(op.Shape(x, end=-1), op.Constant(value_ints=[-1]), axis=0))


@script(_tpeft, default_opset=op)
def BankedTable(ids, adapter_index, values):
    """values[adapter_index[n]][ids]; ids of any shape, rows first; values (T, C, I).

    As Gather itself, -1 is the last entry, and an index out of range an error: never another adapter's entry.
    """
    split = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[-1]), axis=0)
    own = op.Reshape(op.Cast(ids, to=7), split)
    each = op.Constant(value_int=1)
    size, last = op.Squeeze(op.Shape(values, start=1, end=2)), op.ReduceProd(op.Shape(values, end=2), keepdims=0)
    entries = op.Range(size, size + each, each)  # a size on the device without a copy
    nowhere = op.Range(last, last + each, each)  # one past the last entry of all
    first = op.Reshape(adapter_index, op.Constant(value_ints=[-1, 1])) * entries
    known = op.And(op.Less(own, entries), op.GreaterOrEqual(own, op.Neg(entries)))
    places = op.Where(known, op.Mod(own, entries) + first, nowhere)
    width = op.Shape(values, start=2)
    rows = op.Gather(op.Reshape(values, op.Concat(op.Constant(value_ints=[-1]), width, axis=0)), places)
    return op.Reshape(rows, op.Concat(op.Shape(ids), width, axis=0))


@script(_tpeft, default_opset=op)
def BankedVector(x, adapter_index, values, tail: Sequence[int]):
    """values[adapter_index[n]] for every entry of x's first axis, (B, *tail), against x; values (T, .., C)."""
    flat = op.Concat(op.Shape(adapter_index), op.Constant(value_ints=[1, -1]), axis=0)
    rows = op.Reshape(op.Gather(values, adapter_index), flat)
    entries = op.Shape(x, end=1)
    each = op.Concat(op.Shape(adapter_index), entries / op.Shape(adapter_index), op.Constant(value_ints=[1]), axis=0)
    return op.Reshape(op.Expand(rows, each), op.Concat(entries, op.Constant(value_ints=tail), axis=0))


@script(_tpeft, default_opset=op)
def BankedValue(adapter_index, values):
    """The one tensor values[adapter_index[0]] of this run; `adapter_index` must have length 1."""
    return op.Squeeze(op.Gather(values, adapter_index), op.Constant(value_ints=[0]))


@script(_tpeft, default_opset=op)
def BankedResized(ups, values):
    """As TuckerResized for banks (T, R, O) and (T, C, ..)."""
    size = op.Shape(values, start=1, end=2)
    zeros = op.Expand(op.CastLike(op.Constant(value_float=0.0), ups), op.Concat(op.Shape(ups, end=-1), size, axis=0))
    start, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[-1])
    return op.Slice(op.Concat(ups, zeros, axis=-1), start, size, last)


BANKED: dict[str, OnnxFunction] = {
    f.name: f
    for f in (
        BankedResized,
        BankedLinear,
        BankedLinearMinor,
        BankedLinearShared,
        BankedShared,
        BankedRepeated,
        BankedSpread,
        BankedLookup,
        BankedLookupShared,
        BankedExpertsLeft,
        BankedExpertsRight,
        BankedGroupedConv,
        BankedGroupedConvTranspose,
        BankedDepthwise,
        BankedWholeConv,
        BankedWeight,
        BankedRows,
        BankedDense,
        BankedTable,
        BankedVector,
        BankedValue,
        RowsLinear,
        PackedDown,
        PackedSum,
        PackedUp,
    )
}
