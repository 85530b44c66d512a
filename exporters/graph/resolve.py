"""From weight names to the initializers that hold them.

Resolution is by name AND value, on the raw graph only: after an optimiser has run, an initializer may keep its name
and hold other values (a conv with its BatchNorm folded in), and a branch there would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tpeft_deploy.errors import UnknownTarget, UnsupportedTarget
from tpeft_deploy.exporters.graph import quantised
from tpeft_deploy.exporters.oracle.bfloat16 import wide
from tpeft_deploy.tucker import Array

__all__ = ["held_by", "resolve"]


def resolve(graph: ir.Graph, weights: Mapping[str, Array], aliases: Mapping[str, str]) -> dict[str, str]:
    """Check every initializer that carries a weight's name against the weight's value.

    Args:
        graph: a raw export.
        weights: every weight of the base by every name it has, tied ones included.
        aliases: every such name -> one name for all names of the same parameter of the same module.

    Returns:
        Weight name -> name of the initializer that holds it; a weight that the graph does not use is absent.

    Raises:
        UnsupportedTarget: an initializer has a weight's name and another value.
    """
    held: dict[str, str] = {}
    for name, value in graph.initializers.items():
        if name not in weights or value.const_value is None:
            continue
        if not np.array_equal(wide(value.const_value), weights[name]):
            raise UnsupportedTarget(
                f"resolve weight {name!r} in the exported graph",
                expected="the initializer to hold the weight's own values",
                got="other values under the same name",
                fix="Give the module itself or a raw export (optimize=False).",
            )
        held[aliases[name]] = name
    for name in filter(None, map(quantised.name_of, graph)):
        held[aliases.get(name, name)] = name
    return {name: held[alias] for name, alias in aliases.items() if alias in held}


def held_by(resolved: Mapping[str, str], name: str, *, doing: str) -> str:
    """The initializer that holds a weight.

    Raises:
        UnknownTarget: the weight is in the base but not in its graph.
    """
    if name not in resolved:
        raise UnknownTarget(
            f"{doing}, weight {name!r}",
            expected="a weight that the forward pass uses",
            got="one that is not in the exported graph",
            fix="Leave its module out of target_modules and modules_to_save, or give unused='skip' (--unused skip).",
        )
    return resolved[name]
