"""Reading an ONNX file of unknown origin, and bringing it to the opset and the plain form that branches need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import version_converter

from tpeft_deploy.errors import UnsupportedBase
from tpeft_deploy.exporters.oracle.quiet import quiet

__all__ = ["OPSET", "open_model"]

OPSET = 20  # of the branches' functions
_BETWEEN = 18  # what onnx's own converter brings older graphs to; from here on onnxscript's keeps all names
_IR_VERSION = 10
_SMALL = 16  # elements; what is smaller may be a size or an axis that a converter has to read
_DEFAULT = ("", "ai.onnx")


def open_model(path: Path) -> ir.Model:
    """The file's model: opset 20 or above, constants and weights as initializers, shapes inferred.

    Raises:
        UnsupportedBase: it is no ONNX model, was written by this toolkit, reaches outside its directory, or has
            an opset that cannot be converted.
    """
    try:
        model = ir.load(path)
        outputs, opset = len(model.graph.outputs), _opset(model)
    except FileNotFoundError as error:
        raise UnsupportedBase(f"load base {path}", expected="an ONNX file", got="nothing there") from error
    except Exception as error:  # whatever protobuf and onnx-ir raise for a damaged file; the cause is kept
        raise UnsupportedBase(f"load base {path}", expected="an ONNX model", got=str(error)[:200]) from error
    if not outputs or opset is None:
        raise UnsupportedBase(f"load base {path}", expected="an ONNX model", got="a file with no graph in it")
    _refuse(path, model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=_SMALL)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    if opset < OPSET:
        model = _converted(path, model, opset)
    passes.IdentityEliminationPass()(model)
    passes.NameFixPass()(model)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    _name_batch(model.graph)
    return _inferred(model)


def _opset(model: ir.Model) -> int | None:
    return next((model.graph.opset_imports[domain] for domain in _DEFAULT if domain in model.graph.opset_imports), None)


def _refuse(path: Path, model: ir.Model) -> None:
    form = model.metadata_props.get("tpeft.form")
    if form == "folded":
        raise UnsupportedBase(
            f"load base {path}",
            expected="the base itself",
            got=f"a fold of task {model.metadata_props.get('tpeft.task')!r}, with changed weights",
            fix="Give the file or the module that it was folded from.",
        )
    if form is not None:
        raise UnsupportedBase(
            f"load base {path}",
            expected="a model file of its own",
            got=f"the {form} graph of a bundle",
            fix="Add adapters to the bundle itself, or give the file or the module that it was exported from.",
        )
    for value in model.graph.initializers.values():
        place = value.const_value
        if not isinstance(place, ir.ExternalTensor):
            continue
        file = (path.parent / place.location).resolve()
        if not file.is_relative_to(path.parent.resolve()):
            raise UnsupportedBase(
                f"load base {path}, weight {value.name!r}",
                expected="external data beside the file",
                got=f"a path outside its directory, {place.location!r}",
            )
        if not file.is_file():
            raise UnsupportedBase(
                f"load base {path}, weight {value.name!r}",
                expected=f"its data in {place.location!r}",
                got="no such file",
            )


def _converted(path: Path, model: ir.Model, opset: int) -> ir.Model:
    try:
        if opset < _BETWEEN:
            with _weightless(model) as weights:
                old = ir.to_proto(model)
            with quiet():
                model = ir.from_proto(onnx.version_converter.convert_version(old, _BETWEEN))
            _put_back(model.graph, weights)
        with quiet():
            version_converter.convert_version(model, OPSET, fallback=False)
    except Exception as error:  # the converters raise whatever their operators' adapters do; the cause is kept
        raise UnsupportedBase(
            f"load base {path}",
            expected=f"a model that can be converted from opset {opset} to {OPSET}",
            got=f"{type(error).__name__}: {str(error).strip()[:200]}",
            fix=f"Export it again with opset_version={OPSET}.",
        ) from error
    if _opset(model) != OPSET:
        raise UnsupportedBase(
            f"load base {path}",
            expected=f"a model that can be converted from opset {opset} to {OPSET}",
            got=f"opset {_opset(model)}",
            fix=f"Export it again with opset_version={OPSET}.",
        )
    return model


@contextmanager
def _weightless(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """The model with its float weights as plain inputs: onnx's converter copies values, and reads no external ones."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size >= _SMALL:
            weights[name] = tensor
            del model.graph.initializers[name]
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            value.const_value = None
            model.graph.inputs.append(value)
    yield weights


def _put_back(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol]) -> None:
    for value in list(graph.inputs):
        if value.name in weights:
            graph.inputs.remove(value)
            value.const_value = weights[str(value.name)]
            graph.register_initializer(value)


def _name_batch(graph: ir.Graph) -> None:
    """Name the free sizes that have no name; all first axes without one are the batch."""
    for value in graph.inputs:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, ir.SymbolicDim):
                continue
            name = size.value
            if name is None or name.startswith(f"{value.name}_dynamic_axes"):
                value.shape[axis] = ir.SymbolicDim("batch" if axis == 0 else f"{value.name}_{axis}")


def _inferred(model: ir.Model) -> ir.Model:
    """Ranks and shapes of what is computed; what an exporter wrote down may lack them."""
    with quiet():
        return passes.ShapeInferencePass()(model).model
