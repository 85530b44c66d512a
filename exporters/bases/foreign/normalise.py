"""Bring a foreign graph to the form of a raw export: weights under the module's names, in torch's layout."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from tpeft_deploy.exporters.bases.foreign.identify import Found, Place
from tpeft_deploy.exporters.bases.foreign.known_weights import Known
from tpeft_deploy.exporters.branches.surgery import add_constant, apply, route_around
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.tucker import Array

__all__ = ["normalise"]


def normalise(model: ir.Model, found: Found, known: Known) -> set[str]:
    """Rewrite a model in place.

    Args:
        model: as `open_model` gives it.
        found: result of `identify`.
        known: the weights that it was found with.

    Returns:
        Names of the weights with proved values.
    """
    graph = model.graph
    places: dict[str, list[Place]] = defaultdict(list)
    for place in found.places:
        if place.name not in found.problems:
            places[place.name].append(place)
    _set_aside(graph, found, known, {place.use.value.name for own in places.values() for place in own})
    biases: set[str] = set()
    for name, own in places.items():
        weight = _initializer(graph, name, own[0], known)
        for place in own:
            if place.factors is not None:
                biases |= _unfuse(model, place, weight, known)
            elif place.turned:
                _turn(model, place, weight)
            else:
                place.use.node.replace_input_with(place.use.index, weight)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]
    return {name for name in graph.initializers if name in places or name in biases} | _tag(graph, found, known)


def _tag(graph: ir.Graph, found: Found, known: Known) -> set[str]:
    """Name the weights of quantised products."""
    held = {name for _, name in found.quantised if name not in found.problems and name not in graph.initializers}
    for node, name in found.quantised:
        if name in held:
            quantised.tag(node, name, known.shapes[name], known.digests[name])
    return held


def _set_aside(graph: ir.Graph, found: Found, known: Known, used: set[str | None]) -> None:
    """Free the names of weights for initializers that hold their values, by name and value."""
    for name in list(graph.initializers):
        renamed = found.rename(name)
        if name in used or name in known.shapes or renamed in known.shapes:
            value = graph.initializers[name]
            value.name = f"{name}.as_stored"
            if value.const_value is not None:
                value.const_value.name = value.name


def _initializer(graph: ir.Graph, name: str, place: Place, known: Known) -> ir.Value:
    """A new initializer with a weight's own values in the graph's dtype; large ones are made when they are read."""
    stored = _value(place.use.value)
    if place.factors is not None and known.arrays is not None:
        shape, make = known.shapes[name], partial(_cast, known, name, stored.dtype)
    else:
        shape = tuple(stored.shape.numpy())
        shape = shape[::-1] if place.turned else shape
        make = partial(_turned if place.turned else _as_stored, stored, name)
    return _register(graph, name, ir.LazyTensor(make, stored.dtype, ir.Shape(shape), name=name))


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _as_stored(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy(), name=name)


def _turned(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)


def _cast(known: Known, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    if known.arrays is None:
        raise ValueError(f"weight {name!r} has no values")
    return ir.tensor(np.ascontiguousarray(known.arrays[name], dtype=dtype.numpy()), name=name)


def _turn(model: ir.Model, place: Place, weight: ir.Value) -> None:
    """A product with what W^T is becomes one with the transpose of W, as a raw export writes it."""
    node = place.use.node
    if node.op_type == "Gemm":
        node.replace_input_with(place.use.index, weight)
        node.attributes["transB"] = ir.AttrInt64("transB", 1 - node.attributes.get_int("transB", 0))
        return
    first = node.graph[0] if node.graph is not None else None
    if first is None or weight.shape is None:
        raise ValueError(f"node {node.name!r} stands in no graph")
    turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{place.name}.turn.{node.name}")
    turn.outputs[0].name = f"{turn.name}.out"
    turn.outputs[0].shape, turn.outputs[0].type = ir.Shape(weight.shape.numpy()[::-1]), weight.type
    node.graph.insert_before(node, turn)  # type: ignore[union-attr]
    node.replace_input_with(place.use.index, turn.outputs[0])


def _unfuse(model: ir.Model, place: Place, weight: ir.Value, known: Known) -> set[str]:
    """Take a norm out of a layer: y = s (W x + b) + t, where the file has (s W) x + (s b + t).

    Returns:
        The name of b, where it is known.
    """
    node, y = place.use.node, place.use.node.outputs[0]
    if place.factors is None or weight.dtype is None:
        raise ValueError(f"{place.name!r} has no factors")
    dtype = weight.dtype.numpy()
    bias = _bias(model.graph, place, known) if node.op_type != "MatMul" else None
    inputs = [node.inputs[0], weight, *([bias[0]] if bias is not None else [])]
    product = ir.node(node.op_type, inputs, node.attributes, name=f"{node.name}.unfused")
    product.metadata_props.update(node.metadata_props)
    product.outputs[0].name = f"{product.name}.out"
    product.outputs[0].type, product.outputs[0].shape = y.type, y.shape.copy() if y.shape is not None else None
    model.graph.insert_after(node, product)
    if place.turned:
        _turn(model, Place(replace(place.use, node=product), place.name, turned=True), weight)
    axes = len(known.shapes[place.name]) - 2
    column = (-1, *[1] * axes)
    label = f"{place.name}.fused.{node.name}"
    scale = add_constant(model.graph, f"{label}.scale", place.factors.reshape(column).astype(dtype))
    total = apply(model, "Mul", [product.outputs[0], scale], like=y, after=product)
    shift = _shift(node, place.factors, bias[1] if bias is not None else None)
    if shift is not None:
        t = add_constant(model.graph, f"{label}.shift", shift.reshape(column).astype(dtype))
        total = apply(model, "Add", [total, t], like=y, after=total.producer())
    route_around(node, total)
    return {str(bias[0].name)} if bias is not None else set()


def _bias(graph: ir.Graph, place: Place, known: Known) -> tuple[ir.Value, Array] | None:
    """The layer's own bias, from the original weights: an initializer under its name, and its values."""
    name = f"{place.name.rpartition('.')[0]}.bias"
    if known.arrays is None or place.factors is None or known.shapes.get(name) != place.factors.shape:
        return None
    first, array = known.first[name], known.arrays[name]
    if first in graph.initializers:
        return graph.initializers[first], array
    dtype = _value(place.use.value).dtype
    return _register(graph, first, _cast(known, first, dtype)), array


def _shift(node: ir.Node, factors: Array, bias: Array | None) -> Array | None:
    fused = node.inputs[2] if len(node.inputs) > 2 else None
    if fused is None and bias is None:
        return None
    shift = np.zeros(factors.shape)
    if fused is not None:
        shift = shift + _value(fused).numpy().astype(np.float64).reshape(-1)
    return shift if bias is None else shift - factors * bias.astype(np.float64)


def _value(initializer: ir.Value) -> ir.TensorProtocol:
    if initializer.const_value is None:
        raise ValueError(f"{initializer.name!r} has no value")
    return initializer.const_value
