"""The targets of adapters: weights that get a branch, with the kind of branch that their uses allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import onnx_ir as ir

from tpeft_deploy.adapter import Adapter, gain_mode
from tpeft_deploy.bundle.slots import Kind, Target, best_factors
from tpeft_deploy.errors import UnknownTarget, UnsupportedTarget
from tpeft_deploy.exporters.branches import gain
from tpeft_deploy.exporters.branches.experts import expert_sites
from tpeft_deploy.exporters.branches.lifted import partners
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.graph.resolve import held_by
from tpeft_deploy.exporters.graph.weight_uses import (
    conv_sites,
    linear_sites,
    transposed_conv_sites,
    value_uses,
    weight_value,
)
from tpeft_deploy.exporters.oracle.subject import batch_axis

__all__ = ["activations", "covers", "plan", "plan_all", "without"]

_MATRIX = 2  # axes of a weight
# How many leading axes of an operand are rows and positions, by operator; 0 is all, negative leaves out the last.
_LEADING = {"MatMul": -1, "Gemm": -1, "Gather": 0, "Conv": 1, "ConvTranspose": 1, "BatchNormalization": 1}


def plan(graph: ir.Graph, adapters: Mapping[str, Adapter], resolved: Mapping[str, str], *, base: str) -> list[Target]:
    """Plan the targets of a set of adapters, with the kind that every consumer of each weight allows.

    Raises:
        UnknownTarget: a weight that an adapter changes is in the base but not in its graph.
    """
    deltas: dict[str, list[tuple[int, ...]]] = {}
    gains: dict[str, set[int | None]] = {}
    overrides: dict[str, None] = {}
    for task, adapter in adapters.items():
        doing = f"export adapter {task!r} for {base}"
        for name, delta in adapter.deltas.items():
            deltas.setdefault(held_by(resolved, name, doing=doing), []).append(delta.ranks)
        overrides |= {held_by(resolved, name, doing=doing): None for name in adapter.served_overrides}
        for name, array in adapter.gains.items():
            gains.setdefault(held_by(resolved, name, doing=doing), set()).add(gain_mode(array))
    targets: list[Target] = []
    for name in dict.fromkeys([*deltas, *gains]):
        modes = gains.get(name, set())
        if all(mode in (0, 1) and gain.can_scale(weight_value(graph, name), mode) for mode in modes):
            targets += [_best(_target(graph, name, _kind(graph, name)), deltas[name])] if name in deltas else []
            targets += [_target(graph, name, "gain_0" if mode == 0 else "gain_1") for mode in sorted(map(int, modes))]  # type: ignore[arg-type]
        else:
            # Gains are multiplied out: changes of full rank.
            whole = _target(graph, name, "weight")
            targets.append(_best(whole, [*deltas.get(name, []), whole.shape]))
    return targets + [_target(graph, name, "override") for name in overrides]


def plan_all(graph: ir.Graph, resolved: Mapping[str, str]) -> list[Target]:
    """Plan a target for every weight that is a linear layer or a convolution at all of its uses."""
    names = sorted(set(resolved.values()))
    return [_target(graph, name, _kind(graph, name)) for name in names if _is_layer(weight_value(graph, name))]


def activations(graph: ir.Graph, targets: Iterable[Target]) -> dict[str, int]:
    """Values that a banked branch must know the rows of: inputs and outputs of every consumer of a target.

    Returns:
        Name of the value -> its leading axes, as `batch_axes.find` takes them.
    """
    found: dict[str, int] = {}
    batch = batch_axis(graph)
    for target in targets:
        weight = weight_value(graph, target.name)
        for node, position in _consumers(weight):
            leading = _LEADING.get(node.op_type, -1)
            others = [value for i, value in enumerate(node.inputs) if i != position and value is not None]
            found |= {str(value.name): leading for value in others if _is_activation(value)}
            # A lookup's output has an axis more than the ids that it was looked up with.
            found |= {str(value.name): leading or -1 for value in node.outputs}
        if batch is not None and len(weight.shape or ()) == _MATRIX:
            met = (value for site in linear_sites(weight) or [] for value in partners(site.y, batch))
            found |= {str(value.name): 1 for value in met}
        found |= {str(site.x.name): 1 for site in expert_sites(weight)}
    return found


def _consumers(weight: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    yield from ((node, 1) for node in quantised.nodes_of(weight))
    for node, position in value_uses(weight):
        if node.op_type == "Transpose":
            yield from node.outputs[0].uses()
        else:
            yield node, position


def _is_activation(value: ir.Value) -> bool:
    return value.const_value is None and (value.producer() is not None or value.is_graph_input())


def without(
    targets: Sequence[Target], exclude: Iterable[str], names: Iterable[str], *, base: str, given: bool
) -> list[Target]:
    """The targets that are left.

    Args:
        targets: weights that adapters may change.
        exclude: names of weights or of modules, `*` and `?` included; a module stands for all weights inside it.
        names: every weight of the base.
        base: the base's name.
        given: whether the targets are what given adapters change, rather than all that adapters could.

    Raises:
        UnknownTarget: a name is that of no weight.
        UnsupportedTarget: a given adapter changes an excluded weight: without a branch it would be served wrong.
    """
    patterns, names = list(dict.fromkeys(exclude)), list(names)
    for pattern in patterns:
        if not any(covers(pattern, name) for name in names):
            raise UnknownTarget(
                f"exclude {pattern!r} from the targets of {base}",
                expected="a weight or a module of the base",
                got="a name that no weight has",
            )
    gone = [target.name for target in targets if any(covers(pattern, target.name) for pattern in patterns)]
    if gone and given:
        raise UnsupportedTarget(
            f"exclude {', '.join(dict.fromkeys(gone))} from the targets of {base}",
            expected="weights that no given adapter changes",
            got="changes of them, which would be lost",
            fix="Train the adapters without these modules, leave out --exclude, or use export folded.",
        )
    return [target for target in targets if target.name not in gone]


def _target(graph: ir.Graph, name: str, kind: Kind) -> Target:
    weight = weight_value(graph, name)
    if weight.shape is None or weight.dtype is None:
        raise ValueError(f"initializer {name!r} has no value")
    # The tensors of adapters stay float32 where the graph computes in bfloat16, see `bfloat16`.
    dtype = "float32" if weight.dtype == ir.DataType.BFLOAT16 else weight.dtype.numpy().name
    return Target(name, kind, tuple(weight.shape.numpy()), dtype)


def _best(target: Target, ranks: Iterable[tuple[int, ...]]) -> Target:
    """The target with the slots in which these changes hold the fewest numbers."""
    if target.kind not in ("conv", "conv_transpose", "weight"):
        return target
    factors = best_factors(target.kind, target.shape, ranks)
    return replace(target, kind=target.kind if factors else "weight", factors=factors)


def _kind(graph: ir.Graph, name: str) -> Kind:
    weight = weight_value(graph, name)
    axes = len(weight.shape or ())
    if axes == 2:
        uses = {site.use for site in linear_sites(weight) or []}
        if uses and uses <= {"linear", "lookup"}:
            return "linear"
        return "matmul" if uses == {"matmul"} else "weight"
    if axes > 2 and conv_sites(weight, grouped=False):
        return "conv"
    if axes == 3 and expert_sites(weight):
        return "experts"
    return "conv_transpose" if axes > 2 and transposed_conv_sites(weight, grouped=False) else "weight"


def _is_layer(weight: ir.Value) -> bool:
    axes = len(weight.shape or ())
    if axes == 2:
        return bool({site.use for site in linear_sites(weight) or []} & {"linear", "matmul"})
    if axes == 3 and expert_sites(weight):
        return True
    return axes > 2 and bool(conv_sites(weight, grouped=True) or transposed_conv_sites(weight, grouped=True))


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern is that of a weight, or of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
