"""LyCORIS' norm: changes of a norm's weight and bias, which are read as overrides.

w' = w + w_norm         b' = b + b_norm
"""

from __future__ import annotations

from tpeft_deploy.formats.about import About
from tpeft_deploy.formats.lycoris.full import added
from tpeft_deploy.formats.read.module import Change, Checkpoint, Module
from tpeft_deploy.formats.read.take import no_scale

__all__ = ["ABOUT", "NAME", "SUFFIXES", "matches", "read"]

NAME = "lycoris-norm"
ABOUT = About("LyCORIS", "norm", "norms", "yes", "override")
_PARTS = {"w_norm": "weight", "b_norm": "bias"}
SUFFIXES = frozenset(_PARTS)


def matches(module: Module, checkpoint: Checkpoint) -> bool:
    """Whether the module has a norm's differences."""
    return any(name in module.tensors for name in _PARTS)


def read(module: Module, checkpoint: Checkpoint) -> Change:
    """The norm's weight and bias as overrides.

    Raises:
        FormatError: no base was given, its norm has other shapes or no such parameter, or a scale was given.
    """
    no_scale(module, checkpoint)
    found = {tensor: module.tensors.pop(name) for name, tensor in _PARTS.items() if name in module.tensors}
    return Change(
        overrides={
            f"{module.name}.{tensor}": added(module, checkpoint, tensor, difference)
            for tensor, difference in found.items()
        }
    )
