"""Graphs that compute with quantised weights: MatMulNBits for products, DequantizeLinear before convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from tpeft_deploy.bundle.manifest import Weight
from tpeft_deploy.bundle.quantised import Activations
from tpeft_deploy.errors import UnsupportedTarget
from tpeft_deploy.exporters.branches.surgery import add_constant, resemble, route_around
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.weight_uses import Site, linear_sites, weight_value
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.quantisation.packs import BLOCK, Pack

__all__ = ["append_packs", "encode"]

_LEVELS: Mapping[Activations, int] = {"float": compare.EXACT, "int8": compare.ROUNDED}
_MICROSOFT = "com.microsoft"


def encode(model: ir.Model, packs: Mapping[str, Pack], activations: Activations) -> None:
    """Let a graph compute with quantised weights in place of the values that they stand for, in place.

    Args:
        model: graph of a bundle, its branches attached; initializers hold the values of the packs.
        packs: initializer -> pack.
        activations: whether products round their inputs.

    Raises:
        UnsupportedTarget: a branch uses a weight by itself.
    """
    for name, pack in packs.items():
        value = weight_value(model.graph, name)
        tensors = [add_constant(model.graph, own, array) for own, array in pack.tensors(name).items()]
        if not pack.is_product:
            _decode(model.graph, value, tensors, name, pack)
            continue
        sites = linear_sites(value)
        if sites is None:
            raise UnsupportedTarget(f"quantise weight {name!r}", problem="the graph uses it outside of products")
        model.graph.opset_imports[_MICROSOFT] = 1
        for site in sites:
            _multiply(model.graph, site, tensors, name, pack, _LEVELS[activations])
        for node in [node for node, _ in value.uses()]:  # transposes, all their products gone
            model.graph.remove(node, safe=True)
        del model.graph.initializers[name]


def append_packs(packs: Mapping[str, Pack], places: Mapping[str, Weight], file: Path) -> None:
    """Write the tensors of packs behind the weights in a file, to the places that `lay_out_packs` gave them."""
    with file.open("ab") as stream:
        for name, pack in packs.items():
            for tensor, array in pack.tensors(name).items():
                stream.write(bytes(places[tensor].offset - stream.tell()))
                stream.write(array.tobytes())


def _multiply(graph: ir.Graph, site: Site, tensors: list[ir.Value], name: str, pack: Pack, level: int) -> None:
    old = site.node
    outputs, inputs = pack.sizes
    sizes = {"K": inputs, "N": outputs, "bits": pack.bits, "block_size": BLOCK, "accuracy_level": level}
    node = ir.node("MatMulNBits", [site.x, *tensors], sizes, domain=_MICROSOFT, name=f"{old.name}.int{pack.bits}")
    quantised.tag(node, name, pack.value.shape, pack.digest, turned=pack.turned)
    new = resemble(node.outputs[0], site.y)
    new.name = f"{node.name}.out"
    nodes = [node]
    bias = old.inputs[2] if len(old.inputs) > 2 else None
    if bias is not None:
        total = ir.node("Add", [new, bias], name=f"{old.name}.bias")
        new = resemble(total.outputs[0], site.y)
        new.name = f"{total.name}.out"
        nodes.append(total)
    graph.insert_after(old, nodes)
    route_around(old, new)


def _decode(graph: ir.Graph, value: ir.Value, tensors: list[ir.Value], name: str, pack: Pack) -> None:
    node = ir.node("DequantizeLinear", tensors, {"axis": 0}, name=f"{name}.dequantise")
    quantised.tag(node, name, pack.value.shape, pack.digest)
    wide = resemble(node.outputs[0], value)
    value.replace_all_uses_with(wide)
    del graph.initializers[name]
    wide.name = name
    graph.insert_before(graph[0], node)
