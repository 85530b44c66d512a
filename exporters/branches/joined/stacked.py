"""The factored form for a GPU: linear layers that read the same activation become one layer.

    y (.., G O) = x W + (x down^T) U + bias

of G layers with weights of one size; x, the activation, is (.., I), W (I, G O), down (1, G, R, I), and up (1, G, R, O),
of which U (G R, G O) is the block diagonal.  The layers thus share their launches: on a GPU these cost more than the
products of a branch.  No product has a batch that only one operand has: CUDA would take pointers from the host for it.

ONNX Runtime computes W and the biases when it opens the graph, and keeps them in the place of what they were made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from tpeft_deploy.bundle.packing import Packed, pack
from tpeft_deploy.exporters.branches.joined.packed import biases_of, cut
from tpeft_deploy.exporters.branches.surgery import add_constant, add_input, apply, call, reroute, resemble

__all__ = ["stack"]


class _Layer(NamedTuple):
    """A linear layer with a branch.

    Args:
        node: branch.
        weight: initializer, (O, I) if it is `turned` in the graph, else (I, O).
        turned: True if the graph transposes the weight.
        down: graph input (I, R).
        up: graph input (R, O).
    """

    node: ir.Node
    weight: ir.Value
    turned: bool
    down: ir.Value
    up: ir.Value

    @property
    def size(self) -> int:
        """Outputs of the layer."""
        rows, columns = self.weight.shape.numpy()  # type: ignore[union-attr]
        return rows if self.turned else columns

    @property
    def alike(self) -> tuple[object, ...]:
        """Layers of which this is equal can be stacked."""
        return id(self.node.inputs[1]), self.turned, tuple(self.weight.shape or ()), self.weight.dtype, self.down.dtype


def stack(model: ir.Model) -> tuple[Packed, ...]:
    """Stack the layers with branches of a factored graph, in place.

    Returns:
        The new inputs; none where no two layers can be stacked.
    """
    groups: dict[tuple[object, ...], list[_Layer]] = {}
    for layer in _layers(model.graph):
        groups.setdefault(layer.alike, []).append(layer)
    packed: list[Packed] = []
    for group in groups.values():
        if len(group) > 1:
            _attach(model, group, packed)
    return tuple(packed)


def _layers(graph: ir.Graph) -> Iterator[_Layer]:
    for node in graph:
        y, x, down, up = node.inputs if node.op_type == "TuckerLinear" else (None,) * 4
        product = y.producer() if y is not None else None
        if y is None or product is None or down is None or up is None:
            continue
        if product.op_type != "MatMul" or product.inputs[0] is not x:
            continue
        weight = product.inputs[1]
        turn = weight.producer() if weight is not None else None
        turned = turn is not None and turn.op_type == "Transpose"
        weight = turn.inputs[0] if turn is not None and turned else weight
        constant = weight is not None and weight.is_initializer() and not weight.is_graph_input()
        alone = all(len(list(value.uses())) == 1 for value in (y, down, up)) and not y.is_graph_output()
        # An activation of one axis has no rows to share out.
        if weight is None or not constant or not alone or y.shape is None or len(y.shape) < 2:
            continue
        if down.is_graph_input() and up.is_graph_input():
            yield _Layer(node, weight, turned, down, up)


def _attach(model: ir.Model, group: Sequence[_Layer], packed: list[Packed]) -> None:
    """Put one stacked layer in place of a group, behind the branch of the first: the others' users stand below it."""
    first, outputs = group[0].node, [layer.node.outputs[0] for layer in group]
    x = first.inputs[1]
    if x is None:
        raise ValueError("a branch has an activation")
    inputs = [x, _weights(model, group)]
    inputs += [_packed(model, packed, [layer.down for layer in group], turned=True)]
    inputs += [_packed(model, packed, [layer.up for layer in group], turned=False)]
    inputs += [_diagonal(model, len(group), inputs[-1])]
    y = call(model, "StackedLinear", inputs, name=f"{first.name}.stacked", like=None, after=inputs[1].producer())
    if found := biases_of([layer.node for layer in group]):
        biases = add_constant(model.graph, f"{first.name}.biases", np.concatenate([bias for _, bias in found]))
        y = apply(model, "Add", [y, biases], like=None, after=y.producer())
        outputs = [node.outputs[0] for node, _ in found]
    for layer, old, own in zip(group, outputs, cut(model, y, [group[0].size] * len(group), axis=-1), strict=True):
        reroute(old, resemble(own, old))
        for value in (layer.down, layer.up):
            model.graph.inputs.remove(value)


def _weights(model: ir.Model, group: Sequence[_Layer]) -> ir.Value:
    parts, attributes = [layer.weight for layer in group], {"axis": 0 if group[0].turned else 1}
    whole = apply(model, "Concat", parts, like=None, after=group[0].node, attributes=attributes)
    if not group[0].turned:
        return whole
    return apply(model, "Transpose", [whole], like=None, after=whole.producer(), attributes={"perm": [1, 0]})


def _diagonal(model: ir.Model, count: int, up: ir.Value) -> ir.Value:
    dtype = (up.dtype or ir.DataType.FLOAT).numpy()
    return add_constant(
        model.graph, f"tpeft.diagonal.{count}.{dtype.name}", np.eye(count, dtype=dtype)[:, None, :, None]
    )


def _packed(model: ir.Model, packed: list[Packed], slots: Sequence[ir.Value], *, turned: bool) -> ir.Value:
    """Replace the factors of a group by one input, which is neutral by default as they are."""
    new = Packed(f"tpeft.stacked.{len(packed)}", (tuple(str(slot.name) for slot in slots),), turned)
    packed.append(new)
    values = {str(slot.name): slot.const_value.numpy() for slot in slots if slot.const_value is not None}
    default = ir.tensor(pack([new], values, {})[new.name], name=new.name)
    shape: list[int | str] = [1, len(slots), f"{new.name}.R", default.shape.numpy()[3]]
    return add_input(model.graph, new.name, shape, default.dtype, default)
