"""Near ties: how an operator that picks among scores enlarges an error that is within the limit.

TopK and ArgMax answer with whole numbers, and route rows elsewhere by them.  Where the last chosen score and the first
one left out differ by less than rounding does, two exact implementations pick differently, and everything behind jumps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tpeft_deploy.errors import NotEquivalent
from tpeft_deploy.exporters.oracle import compare
from tpeft_deploy.exporters.oracle.base import Inputs
from tpeft_deploy.exporters.oracle.compare import Check
from tpeft_deploy.tucker import Array

__all__ = ["explain"]

_PICKS = {"ArgMax", "ArgMin", "TopK"}


def explain(check: Check, file: Path, feeds: Inputs) -> Check:
    """A failed check with a sentence about the nearest scores that an operator upstream of its output picks among.

    Args:
        check: a failed check; one that passed comes back unchanged, as does one of a graph that picks nothing.
        file: the graph that was run.
        feeds: all inputs that it was run with.
    """
    failure = check.failure
    if failure is None:
        return check
    try:
        said = _nearest(check, file, feeds)
    except (NotEquivalent, *compare.ORT_ERRORS):
        return check  # a graph that does not run says so itself
    if said is None:
        return check
    fix = f"{said} {failure.fix or ''}".strip()
    told = NotEquivalent(failure.doing, problem=failure.problem, expected=failure.expected, got=failure.got, fix=fix)
    return replace(check, failure=told)


def _nearest(check: Check, file: Path, feeds: Inputs) -> str | None:
    model = ir.load(file)
    wrong = {name for name, error in check.outputs.items() if not error <= check.limit}
    picks = _upstream([value for value in model.graph.outputs if value.name in wrong])
    scores = _scores(model, picks, feeds)
    gaps = [(gap, node) for node in picks if (gap := _gap(node, scores)) is not None]
    if not gaps:
        return None
    gap, node = min(gaps, key=lambda pair: pair[0])
    near = gap <= check.limit
    return (
        f"{'Near ties explain it' if near else 'Near ties do not explain it'}: on these inputs the last score that "
        f"{node.op_type} {node.name!r} takes and the first one that it leaves are {gap:.1e} of the largest apart"
        f"{', so that rounding decides between them' if near else ''}."
    )


def _upstream(outputs: list[ir.Value]) -> list[ir.Node]:
    """The operators that pick, among all that the outputs are computed by."""
    found, waiting = dict[ir.Node, None](), [value.producer() for value in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [value.producer() for value in node.inputs if value is not None]
    return [node for node in found if node.op_type in _PICKS]


def _scores(model: ir.Model, picks: list[ir.Node], feeds: Inputs) -> Mapping[str, Array]:
    """Inputs of these operators: the graph is run once more, with their operands for outputs."""
    operands = {str(value.name): value for node in picks for value in node.inputs if value is not None}
    held = {name: value.const_value.numpy() for name, value in operands.items() if value.const_value is not None}
    given = {name: feeds[name] for name in operands if name in feeds}
    outputs = [value for name, value in operands.items() if name not in held and name not in given]
    if not outputs:
        return {**held, **given}
    del model.graph.outputs[:]
    model.graph.outputs.extend(outputs)
    with tempfile.TemporaryDirectory() as place:
        ir.save(model, Path(place) / "scores.onnx", external_data="scores.data")
        return {**held, **given, **compare.run(compare.open_session(Path(place) / "scores.onnx"), feeds, {})}


def _gap(node: ir.Node, scores: Mapping[str, Array]) -> float | None:
    """The smallest difference of the last score taken and the first one left, over the largest score."""
    own = [scores[str(value.name)] for value in node.inputs if value is not None]
    axis = node.attributes.get_int("axis", -1 if node.op_type == "TopK" else 0)
    count = int(own[1].reshape(-1)[0]) if node.op_type == "TopK" else 1
    smallest = node.op_type == "ArgMin" or not node.attributes.get_int("largest", 1)
    ordered = np.sort(own[0].astype(np.float64) * (1 if smallest else -1), axis)
    size = np.abs(own[0]).max(initial=0.0)
    if not 0 < count < own[0].shape[axis] or not size:
        return None
    taken, left = ordered.take(count - 1, axis), ordered.take(count, axis)
    gap = float((left - taken).min() / size)
    return gap if np.isfinite(gap) else None
