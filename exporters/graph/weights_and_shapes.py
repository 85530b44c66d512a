"""Optimising and saving graphs that share their weights.

The weights of a base keep their names and values through optimisation, so that all graphs of a bundle can read them
from one file and the runtime can replace them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from tpeft_deploy.bundle.manifest import Weight
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.constants import shift_ranges
from tpeft_deploy.exporters.graph.free_sizes import free_sizes
from tpeft_deploy.exporters.graph.norms import divide_norms
from tpeft_deploy.exporters.oracle.quiet import quiet

__all__ = [
    "clean_up",
    "complete_shapes",
    "forget_shapes",
    "fuse_norms",
    "held_tensor",
    "lay_out",
    "optimize",
    "prepare",
    "share_weights",
    "turn_weights",
    "write_weights",
]

_DTYPES = {"bfloat16": ir.DataType.BFLOAT16}  # numpy knows this dtype only where ml_dtypes was imported
_NORM_RULES = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
SMALL = 1 << 20  # bytes
ALIGNMENT = 4096  # what ONNX Runtime can map without a copy on every platform


def optimize(model: ir.Model, keep: Iterable[str] = (), *, inline: bool = False) -> None:
    """Run onnxscript's optimiser in place, leaving some initializers as they are.

    Args:
        model: changed in place.
        keep: initializers that must keep names and values, those that can be overridden included.
        inline: whether model-local functions are inlined.
    """
    with _hidden(model.graph, [*keep, *quantised.operands(model.graph)]), quiet():
        optimizer.optimize(model, inline=inline)
    clean_up(model)


def prepare(
    raw: ir.Model, keep: Iterable[str], free: Iterable[str] = (), resized: Iterable[str] = (), *, folded: bool = False
) -> ir.Model:
    """Optimise a copy of a raw graph without the values of its weights, for branches to be attached to its clones.

    Every target is as it was in the raw graph, by name and value: no rule can use a value that is hidden.

    Args:
        raw: left as it is.
        keep: every initializer that a branch, a task or the shared file may ask for.
        free: those of them that a task may replace by one of another size.
        resized: those of them that a task is known to replace so.
        folded: whether each graph will hold one task alone.

    Raises:
        UnsupportedTarget: the graph has the size of one in `resized` in a place that cannot be mended.
    """
    model = raw.clone()
    graph, traced = model.graph, {value.name: value.shape for value in _values(raw.graph)}
    weights = [graph.initializers[name] for name in free if name in graph.initializers]
    free_sizes(model, [str(value.name) for value in weights], resized, folded=folded)
    told = [dict(value.meta) for value in graph.outputs]  # an output that the optimiser replaces would lose it
    below = _below(weights)
    for value in below:
        value.shape = None  # else rules write the traced sizes into Reshape and Expand
    for value in weights:
        value.shape = _first_free(value)
    loose = {str(value.name) for value in below}
    optimize(model, keep, inline=True)
    shift_ranges(graph)
    for value, own in zip(graph.outputs, told, strict=True):
        value.meta.update(own)
    for value in _values(graph):
        if value.name in traced and (value.shape is None or value.name in loose):
            value.shape = _copied(traced[value.name])
    for value, original in zip([*graph.inputs, *graph.outputs], [*raw.graph.inputs, *raw.graph.outputs], strict=True):
        value.shape = _copied(original.shape)
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape = _copied(value.const_value.shape)  # type: ignore[arg-type]
    divide_norms(graph)
    return model


def clean_up(model: ir.Model) -> None:
    """Remove what nothing uses, in place, and let every tensor have the name of its initializer."""
    _remove_traces(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    passes.RemoveUnusedOpsetsPass()(model)
    # The pass looks at the graph alone; what inlines a function needs the model to import the function's domains.
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            model.graph.opset_imports.setdefault(domain, version)
    passes.NameFixPass()(model)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value.name = value.name


def _remove_traces(model: ir.Model) -> None:
    """Remove torch's stack traces: they name directories of the exporting machine, and digests would depend on them."""
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    nodes = [node for part in parts for node in ir.traversal.RecursiveGraphIterator(part)]
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, model.graph, *nodes, *model.graph.inputs]
    holders += model.graph.initializers.values()
    holders += [value for node in nodes for value in node.outputs]
    for holder in holders:
        for key in [key for key in holder.metadata_props if key.startswith("pkg.")]:
            del holder.metadata_props[key]


def fuse_norms(model: ir.Model) -> None:
    """Fold BatchNormalization into the small convolutions before it, in place; ONNX Runtime does so for all at load."""
    if all(node.op_type != "BatchNormalization" for node in model.graph):
        return
    # Large weights are merged anew each time that they are looked at.
    weights = model.graph.initializers.items()
    large = [name for name, value in weights if value.const_value and value.const_value.nbytes > SMALL]
    with _hidden(model.graph, large), quiet():
        RewriteRuleSet(_NORM_RULES).apply_to_model(model)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _below(values: Iterable[ir.Value]) -> list[ir.Value]:
    """All values that are computed from some values."""
    found: dict[int, ir.Value] = {}
    waiting = list(values)
    while waiting:
        for node in waiting.pop().consumers():
            new = [value for value in node.outputs if id(value) not in found]
            found |= {id(value): value for value in new}
            waiting += new
    return list(found.values())


def _first_free(weight: ir.Value) -> ir.Shape | None:
    return ir.Shape([f"{weight.name}.C", *weight.shape[1:]]) if weight.shape else weight.shape


def _copied(shape: ir.Shape | None) -> ir.Shape | None:
    return ir.Shape(list(shape)) if shape is not None else None


@contextmanager
def _hidden(graph: ir.Graph, keep: Iterable[str]) -> Iterator[None]:
    """Make plain graph inputs of initializers: the optimiser cannot use a value that it does not see.

    Being an input beside the value is not enough: its rules drop a bias that is zero, which an override need not be.
    """
    overridable = [value for value in graph.inputs if value.name in graph.initializers]
    kept = [graph.initializers[name] for name in keep if name in graph.initializers]
    hidden = {id(value): (value, value.const_value) for value in [*overridable, *kept]}
    own = list(graph.inputs)
    for value, _ in hidden.values():
        del graph.initializers[str(value.name)]
        value.const_value = None
        if not any(value is other for other in own):
            graph.inputs.append(value)
    yield
    del graph.inputs[len(own) :]
    for value, tensor in hidden.values():
        value.const_value = tensor
        if value.is_graph_input() or value.uses():
            graph.register_initializer(value)


def complete_shapes(graph: ir.Graph) -> None:
    """Give the products that the exporter left without a shape theirs, from what goes in."""
    for node in graph:
        y = node.outputs[0] if node.outputs else None
        if y is None or y.shape is not None or node.op_type != "MatMul":
            continue
        x, matrix = node.inputs[0], node.inputs[1]
        sizes = _matrix_sizes(matrix)
        if x is not None and x.shape is not None and sizes is not None:
            y.shape = ir.Shape([*x.shape[:-1], sizes[1]])
            y.type = x.type


def _matrix_sizes(matrix: ir.Value | None) -> tuple[int, int] | None:
    producer = matrix.producer() if matrix is not None else None
    if producer is not None and producer.op_type == "Transpose":
        own = _matrix_sizes(producer.inputs[0])
        return (own[1], own[0]) if own is not None else None
    if matrix is None or matrix.const_value is None or len(matrix.const_value.shape) != 2:
        return None
    rows, columns = matrix.const_value.shape.numpy()
    return rows, columns


def turn_weights(graph: ir.Graph) -> None:
    """Store every weight that is only ever used transposed that way, so that nothing is left to do at load."""
    for value in list(graph.initializers.values()):
        own, uses = value.const_value, list(value.uses())
        if own is None or value.is_graph_input() or value.is_graph_output() or not uses:
            continue
        if any(node.op_type != "Transpose" or list(node.attributes.get_ints("perm", [])) != [1, 0] for node, _ in uses):
            continue
        rows, columns = own.shape.numpy()
        name = f"{value.name}.transposed"
        tensor = ir.LazyTensor(partial(_turned, own, name), own.dtype, ir.Shape([columns, rows]), name=name)
        turned = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(own.dtype), const_value=tensor)
        for node, _ in uses:
            for user, index in list(node.outputs[0].uses()):
                user.replace_input_with(index, turned)
            if not node.outputs[0].is_graph_output():
                graph.remove(node, safe=True)
        graph.register_initializer(turned)
        if not value.uses():
            del graph.initializers[str(value.name)]


def _turned(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=name)


def forget_shapes(graph: ir.Graph, changed: Iterable[ir.Value]) -> None:
    """Drop the shapes of values that are computed from values with wrong traced shapes.

    ONNX Runtime fuses by shapes, so all others keep theirs.

    Args:
        graph: changed.
        changed: graph inputs and computed values that have other sizes than were traced.
    """
    reached = set(changed)
    for node in graph:
        inner = (value for attribute in node.attributes.values() for value in _outer_values(attribute))
        if any(value in reached for value in (*node.inputs, *inner) if value is not None):
            reached.update(node.outputs)
        for value in node.outputs:
            if value in reached:
                value.shape = None


def _outer_values(attribute: ir.Attr) -> Iterator[ir.Value]:
    """The values that the graphs of an attribute read."""
    graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else []
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            yield from (value for value in node.inputs if value is not None)


def lay_out(graph: ir.Graph, digests: Mapping[str, str]) -> dict[str, Weight]:
    """Lay out the named initializers of a graph in one file, one after another; equal ones share a place.

    Args:
        graph: holds every initializer named in `digests`.
        digests: initializer -> its `weight_digest`.
    """
    weights: dict[str, Weight] = {}
    alike: dict[tuple[str, str], list[str]] = {}
    end = 0
    for name, digest in digests.items():
        if name not in graph.initializers:  # quantised: its bytes stay in the graphs
            shape = quantised.stand_in(graph, name).shape
            weights[name] = Weight(shape.numpy() if shape is not None else (), "float32", digest, 0, 0)
            continue
        value = held_tensor(graph, name)
        dtype = value.dtype.numpy().name
        others = alike.setdefault((digest, dtype), [])
        # Digests are of rounded values: only the bytes say that two weights are one.
        twin = next((o for o in others if held_tensor(graph, o).tobytes() == value.tobytes()), None)
        if twin is not None:
            weights[name] = weights[twin]
            continue
        others.append(name)
        start = end + -end % ALIGNMENT
        end = start + value.nbytes
        weights[name] = Weight(tuple(value.shape.numpy()), dtype, digest, start, value.nbytes)
    return weights


def write_weights(graph: ir.Graph, weights: Mapping[str, Weight], path: Path) -> None:
    """Write initializers of a graph to the places that `lay_out` gave them."""
    with path.open("wb") as stream:
        for name, weight in weights.items():
            if not weight.length or weight.offset < stream.tell():
                continue  # in the graphs, or written already under another name
            stream.write(bytes(weight.offset - stream.tell()))
            stream.write(held_tensor(graph, name).tobytes())


def held_tensor(graph: ir.Graph, name: str) -> ir.TensorProtocol:
    """The value of an initializer that is known to have one."""
    value = graph.initializers[name].const_value
    if value is None:
        raise ValueError(f"initializer {name!r} has no value")
    return value


def share_weights(model: ir.Model, weights: Mapping[str, Weight], aliases: Mapping[str, str], file: Path) -> None:
    """Let a graph read initializers from the shared file instead of carrying them.

    Args:
        model: changed in place.
        weights: result of `lay_out`.
        aliases: initializer of this graph -> weight with the same value.
        file: the shared file, to stand beside the model's own.
    """
    for name, value in model.graph.initializers.items():
        weight = weights.get(aliases.get(name, name))
        if weight is None or value.const_value is None:
            continue
        dtype = _DTYPES.get(weight.dtype) or ir.DataType.from_numpy(np.dtype(weight.dtype))
        if value.const_value.dtype != dtype:
            continue  # a default in float32 of a weight in bfloat16
        value.const_value = ir.ExternalTensor(
            file.name,
            weight.offset,
            weight.length,
            dtype,
            shape=ir.Shape(weight.shape),
            name=name,
            base_dir=file.parent,
        )
