"""Whole tensors that a task replaces: a classifier head, a table, a bias, a norm, and anything else.

Factored, the initializer becomes one that can be overridden, with its first size free.  Banked, matrices in products
and lookups, conv kernels, biases and the parameters of norms are read per row; any other tensor once per run.
"""

from __future__ import annotations

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Rows
from tpeft_deploy.bundle.slots import Target
from tpeft_deploy.exporters.branches.split import split_bias, split_norm
from tpeft_deploy.exporters.branches.surgery import call, call_first, reroute, route_around
from tpeft_deploy.exporters.graph.batch_axes import order_of
from tpeft_deploy.exporters.graph.weight_uses import (
    Site,
    conv_sites,
    geometry,
    linear_sites,
    value_uses,
    vector_sites,
    weight_value,
)

__all__ = ["banked", "factored"]

_POINTWISE = {"Add", "Sub", "Mul", "Div", "Sqrt"}


def factored(model: ir.Model, target: Target, slots: dict[str, ir.Value]) -> None:
    """Route every consumer to the overridable input."""
    weight = weight_value(model.graph, target.name)
    for node, index in list(weight.uses()):
        node.replace_input_with(index, slots["value"])


def banked(model: ir.Model, target: Target, slots: dict[str, ir.Value], index: ir.Value) -> Rows:
    """Read the tensor per row where its uses allow that, else once per run."""
    weight = weight_value(model.graph, target.name)
    for node, position in list(value_uses(weight)):
        split_bias(model, node)
        if position > 0:
            split_norm(model, node)
    ways = [_matrix, _vector] if len(target.shape) == 2 else [_conv, _vector] if len(target.shape) > 2 else [_vector]
    if any(attach(model, target, slots["value"], index) for attach in ways):
        return "each"
    inputs = [index, slots["value"]]
    reroute(weight, call_first(model, "BankedValue", inputs, name=f"{target.name}.banked", like=_shapeless(weight)))
    return "group"


def _matrix(model: ir.Model, target: Target, values: ir.Value, index: ir.Value) -> bool:
    sites = linear_sites(weight_value(model.graph, target.name))
    if not sites or any(site.use == "matmul" or site.order != "major" for site in sites):
        return False
    for i, site in enumerate(sites):
        function = "BankedTable" if site.use == "lookup" else "BankedDense"
        name, like = f"{target.name}.banked.{i}", _shapeless(site.y)
        route_around(site.node, call(model, function, [site.x, index, values], name=name, like=like, after=site.node))
    return True


def _conv(model: ir.Model, target: Target, values: ir.Value, index: ir.Value) -> bool:
    sites = conv_sites(weight_value(model.graph, target.name), grouped=True)
    if not sites or any(site.order != "major" for site in sites):
        return False
    for i, site in enumerate(sites):
        group = {"group": site.node.attributes.get_int("group", 1)}
        new = call(
            model,
            "BankedWholeConv",
            [site.x, index, values],
            name=f"{target.name}.banked.{i}",
            like=_shapeless(site.y),
            after=site.node,
            attributes={**geometry(site.node, len(target.shape) - 2), **group},
        )
        route_around(site.node, new)
    return True


def _vector(model: ir.Model, target: Target, values: ir.Value, index: ir.Value) -> bool:
    vector = weight_value(model.graph, target.name)
    sites = vector_sites(vector)
    if sites and all(site.order == "major" for site in sites):
        for i, site in enumerate(sites):
            new = _rows(model, target, site, i, values, index, [1] * (_axes(site.x) - 2) + [-1])
            site.node.replace_input_with(1 if site.node.inputs[0] is site.x else 0, new)
        return True
    columns = _columns(vector) if not sites else None
    if not columns or any(order_of(x) != "major" for _, x in columns):
        return False
    for i, (column, x) in enumerate(columns):
        site = Site(column, "vector", x, column.outputs[0])
        tail = [-1] + [1] * (_axes(x) - 2)
        reroute(column.outputs[0], _rows(model, target, site, i, values, index, tail))
    return True


def _rows(
    model: ir.Model, target: Target, site: Site, number: int, values: ir.Value, index: ir.Value, tail: list[int]
) -> ir.Value:
    name, attributes = f"{target.name}.banked.{number}", {"tail": tail}
    before = site.x.producer() or model.graph[0]
    return call(
        model, "BankedVector", [site.x, index, values], name=name, like=None, after=before, attributes=attributes
    )


def _columns(vector: ir.Value) -> list[tuple[ir.Node, ir.Value]] | None:
    """The uses of a vector that `split` laid along axis 1, each with the activation that it meets there, or None."""
    found = []
    for node, _ in value_uses(vector):
        x = _meets(node.outputs[0]) if node.op_type == "Reshape" else None
        if x is None:
            return None
        found.append((node, x))
    return found


def _meets(column: ir.Value) -> ir.Value | None:
    """The activation that a column is added to, or multiplied with, perhaps after other arithmetic."""
    uses = list(column.uses())
    if len(uses) != 1 or uses[0][0].op_type not in _POINTWISE:
        return None
    node, position = uses[0]
    others = [value for i, value in enumerate(node.inputs) if i != position and value is not None]
    if others and others[0].const_value is None:
        return others[0] if others[0].shape is not None else None
    return _meets(node.outputs[0])


def _axes(x: ir.Value) -> int:
    return len(x.shape) if x.shape is not None else 0


def _shapeless(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type)
